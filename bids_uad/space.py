"""The SRI24 grid, the space of all anomaly maps.

240 x 240 x 155 voxels of 1 mm, stored left-posterior-superior (LPS) as in the BraTS data. Detectors
process axial slices, centre-cropped to 224 x 224.
"""

from __future__ import annotations

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
