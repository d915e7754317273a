"""Put a volume on another grid through one affine, in one interpolation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import ndimage

from bids_uad.errors import unreadable
from bids_uad.preprocessing.antspy import load_ants, plain_names, to_ants


def resample(
    volume: np.ndarray,
    affine: np.ndarray,
    shape: tuple[int, int, int],
    target_affine: np.ndarray,
    pull: np.ndarray | None = None,
    order: int = 1,
    extend: bool = False,
) -> np.ndarray:
    """Resample a volume; outside its field of view the result is 0 (or the nearest edge value).

    Parameters
    ----------
    volume : numpy.ndarray, three-dimensional
        Boolean volumes are interpolated as 0/1.
    affine : numpy.ndarray, shape (4, 4)
        Voxel-to-world (RAS+, mm) of `volume`.
    shape : tuple of int
        Shape of the result.
    target_affine : numpy.ndarray, shape (4, 4)
        Voxel-to-world of the result.
    pull : numpy.ndarray, shape (4, 4), optional
        World matrix from points of the result to points of `volume`; identity by default.
    order : int
        0 nearest neighbour, 1 linear.
    extend : bool
        Repeat the edge values outside the field of view instead of 0.

    Returns
    -------
    numpy.ndarray of float32, of `shape`
    """
    matrix = _voxel_matrix(affine, target_affine, pull)
    # A sample belongs to the image up to half a voxel beyond its outermost centres (thick slices!); the
    # edge value is repeated there, and what lies further out is cleared by the field of view.
    sampled = ndimage.affine_transform(
        np.asarray(volume, dtype=np.float32),
        matrix[:3, :3],
        matrix[:3, 3],
        output_shape=shape,
        order=order,
        mode="nearest",
        prefilter=False,
    )
    if not extend:
        sampled[~_inside(volume.shape, shape, matrix)] = 0.0
    return sampled


def resample_mask(
    mask: np.ndarray,
    affine: np.ndarray,
    shape: tuple[int, int, int],
    target_affine: np.ndarray,
    pull: np.ndarray | None = None,
) -> np.ndarray:
    """Resample a binary mask: linear interpolation of its indicator, cut at one half.

    This is ITK's generic-label interpolation with a linear kernel. It keeps the volume of a mask, and its
    edge is smoother than the staircase that nearest neighbours leave of thick slices.

    Parameters
    ----------
    mask, affine, shape, target_affine, pull
        As in :func:`resample`; `mask` is boolean.

    Returns
    -------
    numpy.ndarray of bool, of `shape`
    """
    return resample(mask, affine, shape, target_affine, pull) > 0.5


def resample_mask_through(
    mask: np.ndarray,
    affine: np.ndarray,
    shape: tuple[int, int, int],
    target_affine: np.ndarray,
    transforms: Sequence[str],
) -> np.ndarray:
    """Resample a binary mask as :func:`resample_mask` does, through a chain of ITK transforms of any kind.

    Parameters
    ----------
    mask, affine, shape, target_affine
        As in :func:`resample`; `mask` is boolean.
    transforms : sequence of str
        Files. The first takes points of the result, each other points that the one before gives.

    Returns
    -------
    numpy.ndarray of bool, of `shape`

    Raises
    ------
    bids_uad.errors.InputError
        If one of the files cannot be opened.
    """
    for path in transforms:
        try:
            Path(path).open("rb").close()
        except OSError as error:
            raise unreadable(path, error) from error
    ants = load_ants()
    with plain_names(transforms) as names:
        moved = ants.apply_transforms(
            fixed=to_ants(np.zeros(shape, dtype=np.float32), target_affine),
            moving=to_ants(mask.astype(np.float32), affine),
            transformlist=names,
            # Otherwise an affine that stands alone or last is inverted.
            whichtoinvert=[False] * len(transforms),
            interpolator="linear",
        )
    return moved.numpy() > 0.5


def field_of_view(
    volume_shape: tuple[int, int, int],
    affine: np.ndarray,
    shape: tuple[int, int, int],
    target_affine: np.ndarray,
    pull: np.ndarray | None = None,
) -> np.ndarray:
    """Tell which voxels of a grid an image covers.

    Parameters
    ----------
    volume_shape : tuple of int
        Shape of the image.
    affine, shape, target_affine, pull
        As in :func:`resample`.

    Returns
    -------
    numpy.ndarray of bool, of `shape`
    """
    return _inside(volume_shape, shape, _voxel_matrix(affine, target_affine, pull))


def isotropic(volume: np.ndarray, affine: np.ndarray, spacing: float) -> tuple[np.ndarray, np.ndarray]:
    """Resample to isotropic voxels along the image's own axes, smoothing first where it gets coarser.

    Parameters
    ----------
    volume : numpy.ndarray, three-dimensional
    affine : numpy.ndarray, shape (4, 4)
    spacing : float
        New voxel edge in mm.

    Returns
    -------
    volume : numpy.ndarray of float32
    affine : numpy.ndarray, shape (4, 4)
        The corner of the first voxel stays where it was.
    """
    zooms = np.linalg.norm(affine[:3, :3], axis=0)
    smooth = smoothed(volume, affine, spacing)
    shape = tuple(int(n) for n in np.maximum(np.ceil(np.array(volume.shape) * zooms / spacing - 1e-3), 1))
    step = spacing / zooms
    to_old = np.diag([*step, 1.0])
    to_old[:3, 3] = step / 2 - 0.5
    coarse_affine = affine @ to_old
    return resample(smooth, affine, shape, coarse_affine), coarse_affine


def smoothed(volume: np.ndarray, affine: np.ndarray, spacing: float) -> np.ndarray:
    """Smooth a volume as far as voxels of `spacing` mm would, along each axis that is finer.

    Parameters
    ----------
    volume : numpy.ndarray, three-dimensional
    affine : numpy.ndarray, shape (4, 4)
    spacing : float

    Returns
    -------
    numpy.ndarray of float32
    """
    zooms = np.linalg.norm(affine[:3, :3], axis=0)
    widths = np.sqrt(np.maximum(spacing**2 - zooms**2, 0.0)) / zooms
    return ndimage.gaussian_filter(
        np.asarray(volume, dtype=np.float32), widths / np.sqrt(8 * np.log(2)), mode="nearest"
    )


def _voxel_matrix(affine: np.ndarray, target_affine: np.ndarray, pull: np.ndarray | None) -> np.ndarray:
    world = target_affine if pull is None else pull @ target_affine
    return np.linalg.inv(affine) @ world


def _inside(volume_shape: tuple[int, ...], shape: tuple[int, ...], matrix: np.ndarray) -> np.ndarray:
    inside = np.ones(shape, dtype=bool)
    grid = np.ogrid[tuple(slice(n) for n in shape)]
    for axis, size in enumerate(volume_shape):
        x, y, z = (np.float32(matrix[axis, k]) * grid[k].astype(np.float32) for k in range(3))
        position = x + (y + z + np.float32(matrix[axis, 3]))
        # The tolerance keeps an image that fills the grid exactly.
        inside &= position > -0.5 - 1e-3
        inside &= position < size - 0.5 + 1e-3
    return inside
