"""Working box, smoothing, random fields and resampling: the arithmetic the other files share.

All volumes live on a box cut out of the SRI24 grid that holds every brain with room to spare, so that no
operation runs over the empty border.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from bids_uad.space import AFFINE, SHAPE

BOX = (slice(40, 200), slice(30, 230), slice(0, 152))
BOX_SHAPE = tuple(part.stop - part.start for part in BOX)
BOX_AFFINE = AFFINE @ np.array(
    [[1.0, 0, 0, BOX[0].start], [0, 1.0, 0, BOX[1].start], [0, 0, 1.0, BOX[2].start], [0, 0, 0, 1.0]]
)


def tensor(array: np.ndarray) -> torch.Tensor:
    """Tensor of an array, on the device that the simulation runs on (torch's default device)."""
    return torch.as_tensor(array, device=torch.get_default_device())


def to_grid(volume: torch.Tensor, dtype: type = np.float32) -> np.ndarray:
    """Put a box volume back on the whole SRI24 grid, 0 elsewhere.

    Parameters
    ----------
    volume : torch.Tensor, shape `BOX_SHAPE`
    dtype : numpy scalar type

    Returns
    -------
    numpy.ndarray, shape (240, 240, 155)
    """
    grid = np.zeros(SHAPE, dtype=dtype)
    grid[BOX] = volume.cpu().numpy()
    return grid


def gaussian_matrix(size: int, sigma: float) -> torch.Tensor:
    """Gaussian smoothing along an axis of `size` samples as a matrix; rows sum to 1.

    Parameters
    ----------
    size : int
    sigma : float
        Standard deviation in samples; 0 gives the identity.

    Returns
    -------
    torch.Tensor, shape (size, size), float32
    """
    if sigma <= 0:
        return torch.eye(size)
    index = torch.arange(size, dtype=torch.float64)
    weights = torch.exp(-0.5 * ((index[:, None] - index[None, :]) / sigma) ** 2)
    return (weights / weights.sum(1, keepdim=True)).float()


def apply_axis(volume: torch.Tensor, matrix: torch.Tensor, axis: int) -> torch.Tensor:
    """Multiply one axis of a volume by a matrix of shape (new length, old length)."""
    return torch.movedim(torch.movedim(volume, axis, -1) @ matrix.T, -1, axis).contiguous()


def smooth(volume: torch.Tensor, sigma: float | tuple[float, float, float]) -> torch.Tensor:
    """Gaussian smoothing of the last three axes.

    Parameters
    ----------
    volume : torch.Tensor, shape (..., X, Y, Z)
    sigma : float or three floats
        Standard deviation in voxels.

    Returns
    -------
    torch.Tensor
        Same shape; float32.
    """
    sigmas = (sigma,) * 3 if isinstance(sigma, (int, float)) else sigma
    for axis, width in zip((-3, -2, -1), sigmas, strict=True):
        if width > 0:
            volume = apply_axis(volume, gaussian_matrix(volume.shape[axis], width), axis)
    return volume


def spline_matrix(size: int, spacing: float) -> torch.Tensor:
    """Cubic B-splines with knots every `spacing` samples, evaluated at `size` samples.

    Returns
    -------
    torch.Tensor, shape (size, knots), float32
        Rows sum to 1.
    """
    knots = int(np.ceil((size - 1) / spacing)) + 3
    distance = np.abs(np.arange(size)[:, None] / spacing - (np.arange(knots)[None, :] - 1))
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.clip(2 - distance, 0, None) ** 3 / 6
    return tensor(np.where(distance < 1, near, far).astype(np.float32))


def random_field(
    rng: np.random.Generator, scale: float, shape: tuple[int, int, int] = BOX_SHAPE, channels: int = 1
) -> torch.Tensor:
    """Smooth Gaussian random field of zero mean and unit standard deviation.

    White noise on a coarse lattice, upsampled to full size by cubic B-splines.

    Parameters
    ----------
    rng : numpy.random.Generator
    scale : float
        Lattice spacing in voxels.
    shape : tuple of int
    channels : int

    Returns
    -------
    torch.Tensor, shape (channels, *shape), float32
    """
    matrices = [spline_matrix(size, scale) for size in shape]
    coarse = tuple(matrix.shape[1] for matrix in matrices)
    field = tensor(rng.standard_normal((channels, *coarse), dtype=np.float32))
    for axis, matrix in zip((1, 2, 3), matrices, strict=True):
        field = apply_axis(field, matrix, axis)
    return (field - field.mean((1, 2, 3), keepdim=True)) / field.std((1, 2, 3), keepdim=True)


def box_points() -> torch.Tensor:
    """World coordinates (RAS+, mm) of the voxels of the box.

    Returns
    -------
    torch.Tensor, shape (X, Y, Z, 3), float32
    """
    axes = [
        BOX_AFFINE[axis, 3] + BOX_AFFINE[axis, axis] * np.arange(size) for axis, size in enumerate(BOX_SHAPE)
    ]
    grids = np.meshgrid(*axes, indexing="ij")
    return tensor(np.stack(grids, -1).astype(np.float32))


def sample(volume: torch.Tensor, affine: np.ndarray, points: torch.Tensor) -> torch.Tensor:
    """Read a volume at world points with trilinear interpolation, 0 outside it.

    Parameters
    ----------
    volume : torch.Tensor, shape (C, X, Y, Z), float32
    affine : numpy.ndarray, shape (4, 4)
        Voxel index -> world (mm) of the volume.
    points : torch.Tensor, shape (I, J, K, 3)
        World coordinates, mm.

    Returns
    -------
    torch.Tensor, shape (C, I, J, K)
    """
    inverse = tensor(np.linalg.inv(affine)).float()
    size = torch.tensor(volume.shape[1:], dtype=torch.float32)
    # World -> index -> [-1, 1] in one product; grid_sample wants the fastest axis first.
    matrix = inverse[:3, :3] * (2 / (size - 1))[:, None]
    offset = inverse[:3, 3] * (2 / (size - 1)) - 1
    grid = (points @ matrix.T + offset).flip(-1)
    # "bilinear" is its name for trilinear on volumes.
    return F.grid_sample(volume[None], grid[None], mode="bilinear", align_corners=True)[0]


def sample_inside(
    volume: torch.Tensor, affine: np.ndarray, points: torch.Tensor, inside: torch.Tensor
) -> torch.Tensor:
    """`sample` at the marked points only, 0 elsewhere.

    Parameters
    ----------
    volume, affine, points
        As for `sample`.
    inside : torch.Tensor of bool, shape (I, J, K)

    Returns
    -------
    torch.Tensor, shape (C, I, J, K)
    """
    result = torch.zeros(volume.shape[0], *inside.shape)
    result[:, inside] = sample(volume, affine, points[inside][None, None])[:, 0, 0]
    return result


def nonzero_points(volume: torch.Tensor, affine: np.ndarray, points: torch.Tensor) -> torch.Tensor:
    """Points at which a single-channel volume may be non-zero, found on every fourth point.

    Returns
    -------
    torch.Tensor of bool, shape (I, J, K)
    """
    coarse = sample(volume[None], affine, points[::4, ::4, ::4].contiguous())
    wide = F.max_pool3d(coarse[None], 5, stride=1, padding=2)
    return F.interpolate(wide, size=points.shape[:3], mode="nearest")[0, 0] > 0
