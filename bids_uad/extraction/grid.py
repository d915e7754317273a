"""The grid that heads are shown to the network on, and their intensities there."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SHAPE = (80, 96, 96)
SPACING = 3.0
"""mm; isotropic, RAS+."""
BRIGHT = 0.98
AIR = 0.02


def grid_around(centre: np.ndarray) -> np.ndarray:
    """Affine of the grid whose middle is a point of the world.

    Parameters
    ----------
    centre : numpy.ndarray, shape (3,)
        RAS+, mm.

    Returns
    -------
    numpy.ndarray, shape (4, 4)
    """
    affine = np.diag([SPACING, SPACING, SPACING, 1.0])
    affine[:3, 3] = centre - SPACING * (np.array(SHAPE) - 1) / 2
    return affine


def scale(volume: Tensor) -> Tensor:
    """Bring what is bright in a head to 1.

    Parameters
    ----------
    volume : Tensor
        Not negative.

    Returns
    -------
    Tensor
        Divided by the 98th percentile of what is not air, cut at 2; as it was if there is next to nothing.
    """
    tissue = volume[volume > AIR * volume.max()]
    if tissue.numel() < 100:
        return volume
    step = max(1, tissue.numel() // 200_000)
    return (volume / torch.quantile(tissue[::step], BRIGHT)).clamp(0, 2)
