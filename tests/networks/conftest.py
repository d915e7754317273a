"""Slices that networks' tests paint on."""

from __future__ import annotations

import numpy as np
import pytest
import torch


@pytest.fixture
def slices():
    """Eight grey discs, and the brain they are."""
    y, x = np.ogrid[:96, :112]
    disc = torch.from_numpy((y - 48) ** 2 + (x - 56) ** 2 < 40**2)
    brain = disc.expand(8, 1, 96, 112).clone()
    return torch.rand(
        brain.shape, generator=torch.Generator().manual_seed(5)
    ) * 0.1 * brain + 0.4 * brain, brain


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
