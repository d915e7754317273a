"""MP2RAGE images (UNIT1): T1-weighted without bias field, with noise of full amplitude around the head.

The image is a ratio of two inversion images, from -0.5 to 0.5 (Marques et al. 2010, NeuroImage 49, 1271,
equation 3). Where both hold nothing but complex Gaussian noise, the ratio is uniformly distributed over this
range, so that air looks like salt and pepper. Whatever computes on intensities needs the head alone.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import numpy as np
from scipy import ndimage

SUFFIX = "UNIT1"
WINDOW_MM = 5.0
CLOSING_MM = 8.0
MIN_PART_MM3 = 10_000.0
DESCRIPTION = (
    "The noise around the head of the MP2RAGE image [@mp2rage], which fills the range of its intensities, "
    "was set to 0 before anything was computed on it. "
)
AIR_ROUGHNESS = 0.1
"""Least roughness of the border of the volume, as a fraction of the intensity range, that tells noise in the
air; 0.17 is expected of uniform noise, and 0.05 at most of tissue with a signal-to-noise ratio of 10."""


def is_uniform_image(path: str | PathLike[str]) -> bool:
    """Say whether a file name has the suffix of an MP2RAGE image (``UNIT1``)."""
    return Path(path).name.split(".", 1)[0].endswith(f"_{SUFFIX}")


def mask_background(data: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, float]:
    """Set the noise around the head of an MP2RAGE image to 0.

    A voxel's roughness is the smaller of the differences to its two neighbours along an axis, averaged over
    the axes and over 5 mm. It is high in noise and low in tissue, at edges, too, where one of the two
    neighbours is like the voxel. The head is what is less than half as rough as the border of the volume: its
    connected parts of 10 mL and more (brain and scalp), closed by 8 mm across bone and sinuses, with the
    holes filled.

    Parameters
    ----------
    data : numpy.ndarray, three-dimensional
        No negative values.
    affine : numpy.ndarray, shape (4, 4)

    Returns
    -------
    data : numpy.ndarray
        With 0 outside the head; unchanged if the border of the volume holds no noise (an image that is masked
        or denoised).
    masked : float
        Fraction of the voxels that were set to 0.
    """
    zooms = np.linalg.norm(affine[:3, :3], axis=0)
    low, high = np.percentile(data, [1, 99])
    roughness = _roughness(data, zooms) / max(high - low, np.finfo(np.float32).tiny)
    air = float(np.median(_faces(roughness)))
    if air < AIR_ROUGHNESS:
        return data, 0.0
    labels, _ = ndimage.label(roughness < air / 2)
    sizes = np.bincount(labels.ravel()) * float(np.prod(zooms))
    sizes[0] = 0.0
    if sizes.max() < MIN_PART_MM3:
        return data, 0.0
    head = ndimage.binary_fill_holes(_closed(sizes[labels] >= MIN_PART_MM3, zooms))
    return np.where(head, data, np.float32(0)), float(1 - head.mean())


def _roughness(data: np.ndarray, zooms: np.ndarray) -> np.ndarray:
    total = np.zeros(data.shape, dtype=np.float32)
    for axis in range(3):
        step = np.abs(np.diff(data, axis=axis))
        # At either end of an axis there is one neighbour only.
        before = np.concatenate([step.take([0], axis=axis), step], axis=axis)
        after = np.concatenate([step, step.take([-1], axis=axis)], axis=axis)
        total += np.minimum(before, after) / 3
    size = [max(3, 2 * round(WINDOW_MM / zoom / 2) + 1) for zoom in zooms]
    return ndimage.uniform_filter(total, size=size, mode="nearest")


def _closed(mask: np.ndarray, zooms: np.ndarray) -> np.ndarray:
    """Close a mask by a ball; the volume is extended so that its border does not act as background."""
    margin = [int(np.ceil(CLOSING_MM / zoom)) + 1 for zoom in zooms]
    inner = tuple(slice(width, -width) for width in margin)
    padded = np.pad(mask, [(width, width) for width in margin])
    grown = ndimage.distance_transform_edt(~padded, sampling=zooms) <= CLOSING_MM
    closed = ndimage.distance_transform_edt(grown, sampling=zooms) > CLOSING_MM
    return closed[inner] | mask


def _faces(volume: np.ndarray) -> np.ndarray:
    return np.concatenate([volume.take([0, -1], axis=axis).ravel() for axis in range(3)])
