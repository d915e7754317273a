"""Grids of images: where the voxels lie, whatever order they are stored in."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np

from bids_uad.errors import InputError
from bids_uad.nifti import open_nifti

TOLERANCE_MM = 0.1

Grid = tuple[tuple[int, ...], np.ndarray]
"""Shape (first three axes) and affine."""


def grid_of(path: Path) -> Grid:
    """Read the grid of an image from its header.

    Raises
    ------
    InputError
        If the file is missing or no image, see :func:`bids_uad.nifti.open_nifti`, or its affine is singular.
    """
    image = open_nifti(path)
    affine = np.asarray(image.affine)
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine) < 4:
        raise InputError(path, "the header's affine is singular or not finite", "repair the NIfTI header")
    return tuple(int(size) for size in image.shape[:3]), affine


def same_grid(one: Grid, other: Grid) -> bool:
    """Say whether two grids have their voxels at the same places, whatever order they are stored in.

    Parameters
    ----------
    one, other : tuple of shape and affine

    Returns
    -------
    bool
        True if, after both are reordered to RAS, the shapes are equal and no corner is further away
        than 0.1 mm.
    """
    (shape_one, affine_one), (shape_other, affine_other) = _to_ras(*one), _to_ras(*other)
    if shape_one != shape_other:
        return False
    corners = np.array(np.meshgrid(*[(0, size - 1) for size in shape_one])).reshape(3, -1)
    distance = nib.affines.apply_affine(affine_one, corners.T) - nib.affines.apply_affine(
        affine_other, corners.T
    )
    return bool(np.linalg.norm(distance, axis=1).max() < TOLERANCE_MM)


def _to_ras(shape: tuple[int, ...], affine: np.ndarray) -> Grid:
    """Describe a grid as if its voxels were stored in RAS order."""
    orientation = nib.io_orientation(affine)
    reordered = affine @ nib.orientations.inv_ornt_aff(orientation, shape)
    new_shape = [0, 0, 0]
    for axis, (target, _) in enumerate(orientation):
        new_shape[int(target)] = shape[axis]
    return tuple(new_shape), reordered
