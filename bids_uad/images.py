"""NIfTI images as this package writes them: one header contract for every file.

Data type uint8, int32 or float32 (int16 for simulated raw scans alone), no scaling (``scl_slope`` 1,
``scl_inter`` 0), millimetres, and an sform and a qform that are both set and agree. Programs differ in which
of the two they read, and some apply a slope that is not a number.
"""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np

from bids_uad.atomic import atomic_path

DTYPES = (np.uint8, np.int16, np.int32, np.float32)


def make_image(volume: np.ndarray, affine: np.ndarray, dtype: type, *, code: int = 1) -> nib.Nifti1Image:
    """Make an image whose header keeps the contract of this package.

    Parameters
    ----------
    volume : numpy.ndarray, three- or four-dimensional
        Its values must fit into `dtype`; they are not scaled.
    affine : numpy.ndarray, shape (4, 4)
        Voxel-to-world (RAS+, mm). The sform holds it in single precision. The qform holds the nearest
        matrix without shear; since it is stored as a quaternion in single precision, it may differ by
        0.2 mm at the corners of a head.
    dtype : {numpy.uint8, numpy.int16, numpy.int32, numpy.float32}
        Type on disk.
    code : int, default=1
        NIfTI code of both forms: 1 for the scanner's coordinates, 2 for those of another image.

    Returns
    -------
    nibabel.Nifti1Image

    Raises
    ------
    ValueError
        If `dtype` is another type.
    """
    if dtype not in DTYPES:
        names = ", ".join(np.dtype(known).name for known in DTYPES)
        raise ValueError(f"dtype of an image must be one of {names}; got {np.dtype(dtype).name}")
    image = nib.Nifti1Image(np.asarray(volume, dtype=dtype), affine)
    image.header.set_xyzt_units("mm")
    image.header.set_slope_inter(1.0, 0.0)
    image.set_sform(affine, code=code)
    image.set_qform(affine, code=code)
    return image


def save_image(image: nib.Nifti1Image, target: str | Path) -> Path:
    """Write an image of :func:`make_image` atomically; equal images make equal files.

    Parameters
    ----------
    image : nibabel.Nifti1Image
    target : path-like
        Ends in ``.nii`` or ``.nii.gz``.

    Returns
    -------
    pathlib.Path
        `target`.
    """
    with atomic_path(target) as temporary:
        nib.save(image, temporary)
    return Path(target)
