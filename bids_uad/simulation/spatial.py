"""Smoothing, random fields and resampling on a box of the SRI24 grid.

All volumes are on this box, which contains all brains with a margin, to save the computation on the empty
border.
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
    """Convert an array to a tensor on torch's default device."""
    return torch.as_tensor(array, device=torch.get_default_device())


def to_grid(volume: torch.Tensor, dtype: type = np.float32) -> np.ndarray:
    """Convert a volume on the box to the whole SRI24 grid, with 0 elsewhere.

    Parameters
    ----------
    volume : torch.Tensor, shape `BOX_SHAPE`
        Volume on the box.
    dtype : type, default=numpy.float32
        Type of the result.

    Returns
    -------
    numpy.ndarray, shape (240, 240, 155)
        Volume on the SRI24 grid.
    """
    grid = np.zeros(SHAPE, dtype=dtype)
    grid[BOX] = volume.cpu().numpy()
    return grid


def gaussian_matrix(size: int, sigma: float) -> torch.Tensor:
    """Compute the matrix of Gaussian smoothing along an axis.

    Parameters
    ----------
    size : int
        Number of samples.
    sigma : float
        Standard deviation, samples; 0 gives the identity.

    Returns
    -------
    torch.Tensor, shape (size, size), float32
        Weights; rows sum to 1.
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
    """Smooth the last three axes with a Gaussian.

    Parameters
    ----------
    volume : torch.Tensor, shape (..., X, Y, Z)
        Volumes.
    sigma : float or tuple of float
        Standard deviation, voxels.

    Returns
    -------
    torch.Tensor, shape (..., X, Y, Z), float32
        Smoothed volumes.
    """
    sigmas = (sigma,) * 3 if isinstance(sigma, (int, float)) else sigma
    for axis, width in zip((-3, -2, -1), sigmas, strict=True):
        if width > 0:
            volume = apply_axis(volume, gaussian_matrix(volume.shape[axis], width), axis)
    return volume


def spline_matrix(size: int, spacing: float) -> torch.Tensor:
    """Evaluate cubic B-splines.

    Parameters
    ----------
    size : int
        Number of samples.
    spacing : float
        Distance of the knots, samples.

    Returns
    -------
    torch.Tensor, shape (size, knots), float32
        Weights; rows sum to 1.
    """
    knots = int(np.ceil((size - 1) / spacing)) + 3
    distance = np.abs(np.arange(size)[:, None] / spacing - (np.arange(knots)[None, :] - 1))
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.clip(2 - distance, 0, None) ** 3 / 6
    return tensor(np.where(distance < 1, near, far).astype(np.float32))


def random_field(
    rng: np.random.Generator, scale: float, shape: tuple[int, int, int] = BOX_SHAPE, channels: int = 1
) -> torch.Tensor:
    """Draw a smooth Gaussian random field: white noise on a coarse lattice, upsampled by cubic B-splines.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of the noise.
    scale : float
        Lattice spacing, voxels.
    shape : tuple of int, default=BOX_SHAPE
        Shape of the field.
    channels : int, default=1
        Number of independent fields.

    Returns
    -------
    torch.Tensor, shape (channels, *shape), float32
        Fields of zero mean and unit standard deviation.
    """
    matrices = [spline_matrix(size, scale) for size in shape]
    coarse = tuple(matrix.shape[1] for matrix in matrices)
    field = tensor(rng.standard_normal((channels, *coarse), dtype=np.float32))
    for axis, matrix in zip((1, 2, 3), matrices, strict=True):
        field = apply_axis(field, matrix, axis)
    return (field - field.mean((1, 2, 3), keepdim=True)) / field.std((1, 2, 3), keepdim=True)


def box_points() -> torch.Tensor:
    """Compute the world coordinates of the voxels of the box.

    Returns
    -------
    torch.Tensor, shape (X, Y, Z, 3), float32
        Coordinates, RAS+, mm.
    """
    axes = [
        BOX_AFFINE[axis, 3] + BOX_AFFINE[axis, axis] * np.arange(size) for axis, size in enumerate(BOX_SHAPE)
    ]
    grids = np.meshgrid(*axes, indexing="ij")
    return tensor(np.stack(grids, -1).astype(np.float32))


def sample(volume: torch.Tensor, affine: np.ndarray, points: torch.Tensor) -> torch.Tensor:
    """Sample a volume at world points by trilinear interpolation.

    Parameters
    ----------
    volume : torch.Tensor, shape (C, X, Y, Z), float32
        Volume with C channels.
    affine : numpy.ndarray, shape (4, 4)
        Voxel-to-world of the volume, mm.
    points : torch.Tensor, shape (I, J, K, 3)
        World coordinates, mm.

    Returns
    -------
    torch.Tensor, shape (C, I, J, K)
        Sampled values; 0 outside the volume.
    """
    inverse = tensor(np.linalg.inv(affine)).float()
    size = torch.tensor(volume.shape[1:], dtype=torch.float32)
    # From world to index to [-1, 1] in one product; grid_sample needs the fastest axis first.
    matrix = inverse[:3, :3] * (2 / (size - 1))[:, None]
    offset = inverse[:3, 3] * (2 / (size - 1)) - 1
    grid = (points @ matrix.T + offset).flip(-1)
    # grid_sample calls trilinear interpolation of volumes "bilinear".
    return F.grid_sample(volume[None], grid[None], mode="bilinear", align_corners=True)[0]


def sample_inside(
    volume: torch.Tensor, affine: np.ndarray, points: torch.Tensor, inside: torch.Tensor
) -> torch.Tensor:
    """Sample a volume at marked points only.

    Parameters
    ----------
    volume, affine, points
        As for :func:`sample`.
    inside : torch.Tensor of bool, shape (I, J, K)
        Marked points.

    Returns
    -------
    torch.Tensor, shape (C, I, J, K)
        Sampled values; 0 at the other points.
    """
    result = torch.zeros(volume.shape[0], *inside.shape)
    result[:, inside] = sample(volume, affine, points[inside][None, None])[:, 0, 0]
    return result


def nonzero_points(volume: torch.Tensor, affine: np.ndarray, points: torch.Tensor) -> torch.Tensor:
    """Mark the points at which a volume may be non-zero, from samples at every fourth point.

    Parameters
    ----------
    volume : torch.Tensor, shape (X, Y, Z)
        Non-negative volume.
    affine, points
        As for :func:`sample`.

    Returns
    -------
    torch.Tensor of bool, shape (I, J, K)
        Marked points.
    """
    coarse = sample(volume[None], affine, points[::4, ::4, ::4].contiguous())
    wide = F.max_pool3d(coarse[None], 5, stride=1, padding=2)
    return F.interpolate(wide, size=points.shape[:3], mode="nearest")[0, 0] > 0
