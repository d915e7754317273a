"""Corrections of raw intensities: bias field (N4), and noise in the background of MP2RAGE images."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import numpy as np
from scipy import ndimage

from bids_uad.preprocessing.registration import Volume
from bids_uad.preprocessing.resampling import load_ants, resample, resample_isotropic, to_ants

FIELD_SPACING_MM = 5.0
ITERATIONS = (40, 40, 40)
"""Maximum iterations per spline level. A spline span covers the brain at the first level and a quarter of it
(40 mm) at the third; a fourth level would be fine enough to remove the contrast of a large lesion."""

UNIFORM_SUFFIX = "UNIT1"
MP2RAGE_DESCRIPTION = (
    "The noise around the head of the MP2RAGE image [@mp2rage], which fills the range of its intensities, "
    "was set to 0 before anything was computed on it. "
)
"""Sentence for the methods text."""
WINDOW_MM = 5.0
CLOSING_MM = 8.0
MIN_PART_MM3 = 10_000.0
MIN_AIR_ROUGHNESS = 0.1
"""Roughness of the border of the volume, as a fraction of the intensity range, above which it is noise; 0.17
is expected of uniform noise, and 0.05 at most of tissue with a signal-to-noise ratio of 10."""


def correct_bias(
    volume: np.ndarray, affine: np.ndarray, mask: np.ndarray, iterations: tuple[int, ...] = ITERATIONS
) -> np.ndarray:
    """Divide a scan by its bias field, estimated inside a mask on 5 mm voxels.

    N4 (Tustison et al. 2010, doi:10.1109/TMI.2010.2046908). The scan is averaged, within the mask, to
    isotropic 5 mm voxels rather than subsampled by a shrink factor: thick slices keep their detail in the
    plane, and voxels are less noisy. It is cropped to the mask, so that the knots of the spline do not depend
    on the amount of air in the scan. The field is interpolated linearly, as a logarithm, to the full grid.

    Parameters
    ----------
    volume : numpy.ndarray, three-dimensional
        Raw intensities; negative ones are set to 0.
    affine : numpy.ndarray, shape (4, 4)
        Voxel-to-world of `volume`, mm.
    mask : numpy.ndarray of bool
        Region in which the field is estimated, of the shape of `volume`. The whole volume is corrected.
    iterations : tuple of int, default=(40, 40, 40)
        Maximum iterations per level of the spline.

    Returns
    -------
    numpy.ndarray of float32
        Corrected intensities with the same median inside the mask.

    Raises
    ------
    ValueError
        If the median inside the mask is 0.
    """
    ants = load_ants()
    volume = np.maximum(np.asarray(volume, dtype=np.float32), 0.0)
    median = float(np.median(volume[mask]))
    if not median > 0:
        raise ValueError("most of the mask has no signal")
    weight, coarse_affine = resample_isotropic(mask, affine, FIELD_SPACING_MM)
    total, _ = resample_isotropic(np.where(mask, volume, 0.0), affine, FIELD_SPACING_MM)
    region = weight > 0.5
    # A fixed median makes the logarithm of N4 independent of the scanner's units.
    coarse = np.divide(total * (100.0 / median), weight, out=np.zeros_like(total), where=region)
    box = Volume(coarse, coarse_affine, region).cropped(1)
    field = ants.n4_bias_field_correction(
        to_ants(box.data, box.affine),
        mask=to_ants(box.mask, box.affine),
        shrink_factor=1,
        convergence={"iters": list(iterations), "tol": 1e-6},
        return_bias_field=True,
    ).numpy()
    logarithm = np.log(np.maximum(field, 1e-3))
    corrected = volume / np.exp(resample(logarithm, box.affine, volume.shape, affine, extend=True))
    return (corrected * (median / float(np.median(corrected[mask])))).astype(np.float32)


def is_uniform_image(path: str | PathLike[str]) -> bool:
    """Return whether a file name has the suffix of an MP2RAGE image (``UNIT1``)."""
    return Path(path).name.split(".", 1)[0].endswith(f"_{UNIFORM_SUFFIX}")


def mask_background(data: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, float]:
    """Set the noise around the head of an MP2RAGE image to 0.

    The roughness of a voxel is the smaller of the differences to its two neighbours along an axis, averaged
    over the axes and over 5 mm. It is high in noise and low in tissue, also at edges, where one of the two
    neighbours is similar. The head is the region with less than half the roughness of the border of the
    volume: connected parts of at least 10 mL (brain and scalp), closed by 8 mm across bone and sinuses, with
    holes filled.

    Parameters
    ----------
    data : numpy.ndarray, three-dimensional
        Non-negative intensities.
    affine : numpy.ndarray, shape (4, 4)
        Voxel-to-world of `data`, mm.

    Returns
    -------
    data : numpy.ndarray
        Intensities, 0 outside the head; unchanged if the border of the volume is not noise (in an image that
        is masked or denoised).
    masked : float
        Fraction of the voxels that were set to 0.
    """
    zooms = np.linalg.norm(affine[:3, :3], axis=0)
    low, high = np.percentile(data, [1, 99])
    roughness = _roughness(data, zooms) / max(high - low, np.finfo(np.float32).tiny)
    faces = np.concatenate([roughness.take([0, -1], axis=axis).ravel() for axis in range(3)])
    air = float(np.median(faces))
    if air < MIN_AIR_ROUGHNESS:
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
        # At either end of an axis there is only one neighbour.
        before = np.concatenate([step.take([0], axis=axis), step], axis=axis)
        after = np.concatenate([step, step.take([-1], axis=axis)], axis=axis)
        total += np.minimum(before, after) / 3
    size = [max(3, 2 * round(WINDOW_MM / zoom / 2) + 1) for zoom in zooms]
    return ndimage.uniform_filter(total, size=size, mode="nearest")


def _closed(mask: np.ndarray, zooms: np.ndarray) -> np.ndarray:
    """Close a mask by a ball; the volume is padded so that its border does not act as background."""
    margin = [int(np.ceil(CLOSING_MM / zoom)) + 1 for zoom in zooms]
    inner = tuple(slice(width, -width) for width in margin)
    padded = np.pad(mask, [(width, width) for width in margin])
    dilated = ndimage.distance_transform_edt(~padded, sampling=zooms) <= CLOSING_MM
    closed = ndimage.distance_transform_edt(dilated, sampling=zooms) > CLOSING_MM
    return closed[inner] | mask
