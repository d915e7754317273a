"""What years do to the tissue maps: thinner cortex, wider sulci, bright periventricular white matter."""

from __future__ import annotations

import numpy as np
import torch

from bids_uad.simulation.anatomy import CLASSES
from bids_uad.simulation.spatial import random_field, smooth

CSF, VENTRICLE, WHITE = (CLASSES.index(name) for name in ("csf", "ventricle", "white"))
REFERENCE_AGE = 45.0


def apparent_age(fractions: torch.Tensor) -> float:
    """Age that the ventricles of a source suggest: 1 % of the brain at 25 years, 4 % at 80.

    Parameters
    ----------
    fractions : torch.Tensor, shape (len(CLASSES), X, Y, Z)

    Returns
    -------
    float
        Years.
    """
    volumes = fractions.sum((1, 2, 3))
    share = float(volumes[VENTRICLE] / (volumes.sum() - volumes[CSF]))
    return float(np.interp(share, [0.01, 0.04], [25.0, 80.0]))


def ventricle_growth(rng: np.random.Generator, age: float, apparent: float) -> float:
    """Shift of the ventricle walls in mm that makes a brain of one age look like one of another."""
    return float(np.clip(0.045 * (age - apparent) + rng.normal(0.0, 0.5), -2.5, 3.0))


def widen_sulci(fractions: torch.Tensor, rng: np.random.Generator, age: float) -> tuple[torch.Tensor, float]:
    """Let fluid gain on the tissue it shares voxels with (or lose, in the young).

    Parameters
    ----------
    fractions : torch.Tensor, shape (len(CLASSES), X, Y, Z)
    rng : numpy.random.Generator
    age : float

    Returns
    -------
    fractions : torch.Tensor
        Same sum in every voxel.
    strength : float
        Exponent applied to the fluid share; 1 changes nothing, more means more fluid.
    """
    strength = float(np.clip(1.0 + 0.022 * (age - REFERENCE_AGE) + rng.normal(0.0, 0.15), 0.55, 2.2))
    local = strength * torch.exp(0.15 * random_field(rng, 40.0)[0])
    before = fractions[CSF]
    after = before.clamp(0, 1) ** (1.0 / local)
    total = fractions.sum(0)
    after = torch.minimum(after, total)
    others = (total - after) / (total - before).clamp_min(1e-4)
    aged = fractions * torch.where(total - before > 1e-4, others, torch.ones(()))
    aged[CSF] = torch.where(total - before > 1e-4, after, before)
    return aged, strength


def white_matter_change(
    fractions: torch.Tensor, rng: np.random.Generator, age: float
) -> tuple[torch.Tensor, float]:
    """Age-related periventricular change of white matter, which counts as healthy.

    Parameters
    ----------
    fractions : torch.Tensor, shape (len(CLASSES), X, Y, Z)
    rng : numpy.random.Generator
    age : float

    Returns
    -------
    share : torch.Tensor, shape (X, Y, Z)
        0 to 1: how far the white matter signal has moved towards that of a hyperintensity.
    strength : float
        Its largest value.
    """
    strength = float(np.clip(0.008 * (age - 35.0) + rng.normal(0.0, 0.08), 0.0, 0.5))
    near = smooth(fractions[VENTRICLE], 2.0) * 2.5
    patches = torch.sigmoid(1.5 * random_field(rng, 9.0)[0])
    return (near.clamp(0, 1) * patches * fractions[WHITE]) * strength, strength
