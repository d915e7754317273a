"""Effects of age on tissue maps: wider ventricles and sulci, periventricular white matter changes."""

from __future__ import annotations

import numpy as np
import torch

from bids_uad.simulation.anatomy import CLASSES
from bids_uad.simulation.spatial import random_field, smooth

CSF, VENTRICLE, WHITE = (CLASSES.index(name) for name in ("csf", "ventricle", "white"))
REFERENCE_AGE = 45.0


def apparent_age(fractions: torch.Tensor) -> float:
    """Estimate the age from the volume of the ventricles: 1 % of the brain at 25 years, 4 % at 80.

    Parameters
    ----------
    fractions : torch.Tensor, shape (len(CLASSES), X, Y, Z)
        Tissue maps.

    Returns
    -------
    float
        Age, years.
    """
    volumes = fractions.sum((1, 2, 3))
    ratio = float(volumes[VENTRICLE] / (volumes.sum() - volumes[CSF]))
    return float(np.interp(ratio, [0.01, 0.04], [25.0, 80.0]))


def ventricle_growth(rng: np.random.Generator, age: float, apparent: float) -> float:
    """Draw the shift of the ventricle walls (mm) from an apparent age to the simulated age (years)."""
    return float(np.clip(0.045 * (age - apparent) + rng.normal(0.0, 0.5), -2.5, 3.0))


def widen_sulci(fractions: torch.Tensor, rng: np.random.Generator, age: float) -> tuple[torch.Tensor, float]:
    """Increase the fraction of fluid in voxels of fluid and tissue (decrease it in young subjects).

    Parameters
    ----------
    fractions : torch.Tensor, shape (len(CLASSES), X, Y, Z)
        Tissue maps.
    rng : numpy.random.Generator
        Source of all random numbers.
    age : float
        Simulated age, years.

    Returns
    -------
    fractions : torch.Tensor, shape (len(CLASSES), X, Y, Z)
        Tissue maps with the same sum in every voxel.
    strength : float
        The fluid fraction is raised to the power 1 / `strength`: 1 is the identity, larger values give more
        fluid.
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
    """Draw the age-related periventricular change of white matter, which is part of healthy ageing.

    Parameters
    ----------
    fractions : torch.Tensor, shape (len(CLASSES), X, Y, Z)
        Tissue maps.
    rng : numpy.random.Generator
        Source of all random numbers.
    age : float
        Simulated age, years.

    Returns
    -------
    change : torch.Tensor, shape (X, Y, Z)
        Weight of the signal of a hyperintensity, 0 to 1.
    strength : float
        Upper limit of `change`.
    """
    strength = float(np.clip(0.008 * (age - 35.0) + rng.normal(0.0, 0.08), 0.0, 0.5))
    near = smooth(fractions[VENTRICLE], 2.0) * 2.5
    patches = torch.sigmoid(1.5 * random_field(rng, 9.0)[0])
    return (near.clamp(0, 1) * patches * fractions[WHITE]) * strength, strength
