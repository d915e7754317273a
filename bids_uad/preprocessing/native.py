"""Bring a mask found on the SRI24 grid back to the grid of the raw scan."""

from __future__ import annotations

from os import PathLike

import nibabel as nib
import numpy as np

from bids_uad import space
from bids_uad.images import make_image
from bids_uad.preprocessing.resampling import resample
from bids_uad.preprocessing.transforms import read_itk


def map_to_native(
    mask_sri24: np.ndarray, native_image: str | PathLike[str], from_sri24: str | PathLike[str]
) -> nib.Nifti1Image:
    """Resample a label volume from SRI24 to the grid of a raw scan, with nearest neighbours.

    Parameters
    ----------
    mask_sri24 : numpy.ndarray, shape (240, 240, 155)
        Boolean or small non-negative integers.
    native_image : path-like
        An image on the grid of the raw scan; only its header is read.
    from_sri24 : path-like
        ITK text file ``from-SRI24_to-T1w`` (or ``-T2w``) of that scan.

    Returns
    -------
    nibabel.Nifti1Image
        uint8 (int32 if a label exceeds 255), three-dimensional, with the affine of `native_image`.

    Raises
    ------
    ValueError
        If the volume is not on the SRI24 grid.
    """
    labels = np.asarray(mask_sri24)
    if labels.shape != space.SHAPE:
        raise ValueError(f"expected a volume of shape {space.SHAPE}, got {labels.shape}")
    dtype = np.uint8 if labels.dtype == bool or labels.max() <= 255 else np.int32
    native = nib.load(native_image)
    values = resample(labels, space.AFFINE, native.shape[:3], native.affine, read_itk(from_sri24), order=0)
    return make_image(values, native.affine, dtype)
