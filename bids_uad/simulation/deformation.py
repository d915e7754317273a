"""Smooth, invertible deformations: individual variation, ventricle size, mass effect."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from bids_uad.simulation.spatial import (
    BOX_SHAPE,
    box_points,
    random_field,
    smooth,
    tensor,
)

MINIMUM_JACOBIAN = 0.2
MIDLINE = -119.0
"""Position of the midline in SRI24 space, world x, mm."""


def jacobian_determinant(displacement: torch.Tensor) -> torch.Tensor:
    """Compute the Jacobian determinant of ``x + displacement(x)``, which is positive without folds.

    Parameters
    ----------
    displacement : torch.Tensor, shape (3, X, Y, Z)
        Displacement along the axes of the box, voxels.

    Returns
    -------
    torch.Tensor, shape (X-1, Y-1, Z-1)
        Determinant by forward differences.
    """
    base = displacement[:, :-1, :-1, :-1]
    columns = [
        displacement[:, 1:, :-1, :-1] - base,
        displacement[:, :-1, 1:, :-1] - base,
        displacement[:, :-1, :-1, 1:] - base,
    ]
    for axis, column in enumerate(columns):
        column[axis] += 1.0
    a, b, c = columns
    return (
        a[0] * (b[1] * c[2] - b[2] * c[1])
        - b[0] * (a[1] * c[2] - a[2] * c[1])
        + c[0] * (a[1] * b[2] - a[2] * b[1])
    )


def random_deformation(rng: np.random.Generator, amplitude: float) -> torch.Tensor:
    """Draw a displacement field with a large and a small spatial scale.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of all random numbers.
    amplitude : float
        Standard deviation of each component of the large-scale part, mm.

    Returns
    -------
    torch.Tensor, shape (3, X, Y, Z)
        Displacement, mm.
    """
    large = random_field(rng, 48.0, channels=3) * amplitude
    return large + random_field(rng, 16.0, channels=3) * (0.3 * amplitude)


def expand_region(region: torch.Tensor, amount: float, width: float = 5.0) -> torch.Tensor:
    """Compute the displacement that widens a region (or narrows it, `amount` < 0).

    Points are displaced along the gradient of the smoothed map of the region, so that the surrounding tissue
    is compressed.

    Parameters
    ----------
    region : torch.Tensor, shape (X/2, Y/2, Z/2)
        Soft map in [0, 1] on every second voxel of the box.
    amount : float
        Maximum shift, mm.
    width : float, default=5.0
        Range of the shift, mm; the map is smoothed by half of it.

    Returns
    -------
    torch.Tensor, shape (3, X, Y, Z)
        Displacement, mm.
    """
    potential = smooth(region, width / 2)
    slopes = torch.stack(torch.gradient(potential))
    largest = slopes.norm(dim=0).max().clamp_min(1e-6)
    field = slopes / largest * amount
    return F.interpolate(field[None], size=BOX_SHAPE, mode="trilinear", align_corners=False)[0]


def mass_effect(centre: np.ndarray, radius: float, amount: float) -> torch.Tensor:
    """Compute the displacement of tissue away from the centre of a growing mass.

    Parameters
    ----------
    centre : numpy.ndarray, shape (3,)
        Index in the box.
    radius : float
        Radius of the mass, mm, at which the displacement is largest.
    amount : float
        Maximum shift, mm.

    Returns
    -------
    torch.Tensor, shape (3, X, Y, Z)
        Displacement, mm.
    """
    axes = [
        torch.arange(size, dtype=torch.float32) - float(c) for size, c in zip(BOX_SHAPE, centre, strict=True)
    ]
    offset = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    ratio = offset.square().sum(0).sqrt() / radius
    # ratio * exp((1 - ratio^2) / 2) peaks at 1 where ratio = 1.
    return -offset / radius * torch.exp((1 - ratio**2) / 2) * amount


def remove_folds(displacement: torch.Tensor) -> torch.Tensor:
    """Scale down a displacement until its Jacobian determinant is at least 0.2 everywhere.

    Parameters
    ----------
    displacement : torch.Tensor, shape (3, X, Y, Z)
        Displacement, mm.

    Returns
    -------
    torch.Tensor, shape (3, X, Y, Z)
        Displacement times a factor of at most 1, mm.
    """
    coarse = F.avg_pool3d(displacement[None], 2)[0] / 2
    while float(jacobian_determinant(coarse).min()) < MINIMUM_JACOBIAN:
        coarse = coarse * 0.85
        displacement = displacement * 0.85
    return displacement


def source_points(
    displacement: torch.Tensor, size: np.ndarray, turn: np.ndarray, step: int = 1
) -> torch.Tensor:
    """Compute the source position of the tissue of each voxel of the box.

    Parameters
    ----------
    displacement : torch.Tensor, shape (3, X, Y, Z)
        Displacement along the axes of the box, mm.
    size : numpy.ndarray, shape (3,)
        Head size along each axis relative to the source.
    turn : numpy.ndarray, shape (3, 3)
        Residual rotation after registration.
    step : int, default=1
        Subsampling: only every `step`-th voxel of the box is used.

    Returns
    -------
    torch.Tensor, shape (X, Y, Z, 3)
        SRI24 world coordinates, mm.
    """
    points = box_points()[::step, ::step, ::step].clone()
    # The first two axes of the box are opposite to world x and y.
    points += displacement.permute(1, 2, 3, 0) * torch.tensor([-1.0, -1.0, 1.0])
    centre = torch.tensor([MIDLINE, 107.0, 77.0])
    matrix = tensor(np.diag(1.0 / size) @ turn).float()
    return (points - centre) @ matrix.T + centre
