"""The SRI24 grid, the space of all anomaly maps.

240 x 240 x 155 voxels of 1 mm, stored left-posterior-superior (LPS) as in the BraTS data. Detectors
process axial slices, centre-cropped to 224 x 224.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING, Annotated

import numpy as np

from bids_uad.constraints import Interval

if TYPE_CHECKING:
    import nibabel as nib

NAME = "SRI24"
SHAPE = (240, 240, 155)
AFFINE = np.array(
    [[-1.0, 0.0, 0.0, 0.0], [0.0, -1.0, 0.0, 239.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
)
VOXEL_MM3 = 1.0
CROP = 224
SliceSide = Annotated[int, Interval(16, CROP)]
"""Height or width of a window in a cropped slice, pixels."""
MARGIN = (SHAPE[0] - CROP) // 2
BRAIN_CENTRE = (112, 122)
"""Row and column of a cropped slice at the centre of the brain."""
TISSUES = ("csf", "ventricle", "cortex", "white", "deep", "brainstem")
"""Channels of the tissue priors.

`csf` is fluid outside the ventricles, `ventricle` includes choroid plexus, `cortex` and `white` include the
cerebellum, and `deep` is thalamus, basal ganglia, hippocampus and amygdala.
"""
TISSUE_FILE = "tissues_probseg.nii.gz"
PRIOR_STEP = 3
PRIOR_START = (40, 30, 0)
PRIOR_SHAPE = (54, 67, 52)
"""Grid of the stored priors: spacing and first voxel in voxels of the SRI24 grid, whose midplane (first index
119.5) is also that of this grid, and shape."""
PRIOR_AFFINE = AFFINE @ np.array(
    [[3.0, 0, 0, PRIOR_START[0]], [0, 3.0, 0, PRIOR_START[1]], [0, 0, 3.0, PRIOR_START[2]], [0, 0, 0, 1.0]]
)


def to_slices(volume: np.ndarray) -> np.ndarray:
    """Convert a volume on the SRI24 grid to cropped axial slices.

    Parameters
    ----------
    volume : numpy.ndarray, shape (240, 240, 155)
        Image or mask.

    Returns
    -------
    numpy.ndarray, shape (155, 224, 224)
        A view, slice axis first.

    Raises
    ------
    ValueError
        If the volume is not on the SRI24 grid.
    """
    if volume.shape != SHAPE:
        raise ValueError(f"expected a volume of shape {SHAPE}, got {volume.shape}")
    inner = slice(MARGIN, MARGIN + CROP)
    return np.moveaxis(volume[inner, inner, :], -1, 0)


def from_slices(slices: np.ndarray) -> np.ndarray:
    """Convert cropped axial slices to a volume on the SRI24 grid; the margin is 0.

    Parameters
    ----------
    slices : numpy.ndarray, shape (155, 224, 224)
        Output of :func:`to_slices`.

    Returns
    -------
    numpy.ndarray, shape (240, 240, 155)
        Same dtype as the input.
    """
    expected = (SHAPE[2], CROP, CROP)
    if slices.shape != expected:
        raise ValueError(f"expected slices of shape {expected}, got {slices.shape}")
    inner = slice(MARGIN, MARGIN + CROP)
    volume = np.zeros(SHAPE, dtype=slices.dtype)
    volume[inner, inner, :] = np.moveaxis(slices, 0, -1)
    return volume


def to_image(volume: np.ndarray, dtype: type = np.float32) -> nib.Nifti1Image:
    """Create a NIfTI image from an array on the SRI24 grid (sform and qform code 2: aligned).

    Parameters
    ----------
    volume : numpy.ndarray, shape (240, 240, 155)
        Voxel values.
    dtype : type, default=numpy.float32
        Type on disk; see :func:`bids_uad.images.make_image`.

    Returns
    -------
    nibabel.Nifti1Image
        Image with the affine of the SRI24 grid.

    Raises
    ------
    ValueError
        If the volume is not on the SRI24 grid, or `dtype` is not supported.
    """
    from bids_uad.images import make_image

    if volume.shape != SHAPE:
        raise ValueError(f"expected a volume of shape {SHAPE}, got {volume.shape}")
    return make_image(volume, AFFINE, dtype, code=2)


@lru_cache(maxsize=1)
def tissue_priors() -> np.ndarray:
    """Interpolate the tissue priors of the built-in atlas to the SRI24 grid.

    The result, 214 MB, is kept for further calls.

    Returns
    -------
    numpy.ndarray of float32, shape (6, 240, 240, 155)
        Probability of each tissue of `TISSUES`, from 0 to 1, rounded to 0.01 at the stored voxels; their sum
        is at most 1, but for rounding, and 0 far from the brain. Symmetric about the midplane, so reversing
        the second axis swaps left and right. Read-only.
    """
    import nibabel as nib

    with resources.as_file(resources.files("bids_uad") / "data" / "atlas" / TISSUE_FILE) as path:
        priors = np.moveaxis(np.asarray(nib.load(path).dataobj, dtype=np.float32) / 100, -1, 0)
    for axis, (start, size) in enumerate(zip(PRIOR_START, SHAPE, strict=True), 1):
        weights = _linear_weights((np.arange(size) - start) / PRIOR_STEP, priors.shape[axis])
        priors = np.moveaxis(np.tensordot(weights, priors, (1, axis)), 0, axis)
    priors = np.ascontiguousarray(priors)
    priors.flags.writeable = False
    return priors


def _linear_weights(positions: np.ndarray, size: int) -> np.ndarray:
    """Compute the matrix of linear interpolation of `size` samples; the end samples are repeated."""
    distance = np.abs(np.clip(positions, 0, size - 1)[:, None] - np.arange(size)[None, :])
    return np.maximum(1 - distance, 0).astype(np.float32)
