"""Detectors with pseudo-random weights that depend on tensor names only, and a phantom volume."""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import numpy as np
import torch

from bids_uad import space
from bids_uad.images import scale_intensity
from bids_uad.methods.base import Detector
from bids_uad.methods.registry import build_detector


def pseudo_trained(name: str, preset: str = "lite") -> Detector:
    """Return a detector whose weights depend only on the names and shapes of its tensors."""
    detector = build_detector(name, preset)
    state = detector.state_dict()
    for key, value in state.items():
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
        drawn = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))
        # Scales and statistics of normalisation layers are left unchanged.
        if value.ndim > 1:
            state[key] = (drawn / math.sqrt(math.prod(value.shape[1:]))).to(value.dtype)
        elif key.endswith("bias"):
            state[key] = 0.1 * drawn
    if name == "itermask":
        state["threshold"] = torch.tensor(2.0)
    if name == "patchcore":
        state["bank"] = state["bank"] * 5
    detector.load_state_dict(state)
    return detector.eval()


@lru_cache(maxsize=2)
def phantom(first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a volume with two tissues, noise and a bright ball in slices [first, last), and its mask.

    Both are read only: they are shared by the tests of a process.
    """
    x, y, z = np.ogrid[: space.SHAPE[0], : space.SHAPE[1], : space.SHAPE[2]]
    radius = np.sqrt(((x - 119) / 66) ** 2 + ((y - 129) / 85) ** 2) + 0 * z
    brain = (radius < 1) & (z >= first) & (z < last)
    noise = np.random.default_rng(0).normal(0, 0.03, space.SHAPE)
    ball = (x - 140) ** 2 + (y - 120) ** 2 + (z - first - 3) ** 2 < 64
    volume = np.where(radius < 0.6, 0.8, 0.5) + noise + 0.5 * ball
    volume = scale_intensity(volume, brain)
    volume.flags.writeable = brain.flags.writeable = False
    return volume, brain
