"""Smoothing of anomaly maps across slices."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def smooth_across_slices(scores: Tensor, brain: Tensor, sigma: float) -> Tensor:
    """Average each pixel with those above and below it in the brain, by a Gaussian.

    Slices are scored one by one. A lesion goes on in the next slice; what a network takes for one in a single
    slice mostly does not.

    Parameters
    ----------
    scores : Tensor of float, shape (Z, H, W)
        0 outside the brain.
    brain : Tensor of bool, shape (Z, H, W)
    sigma : float
        Standard deviation in slices (1 mm). The Gaussian is cut at three of them.

    Returns
    -------
    Tensor, shape (Z, H, W)
        0 outside the brain, which has no weight.
    """
    radius = math.ceil(3 * sigma)
    total, weight = torch.zeros_like(scores), torch.zeros_like(scores)
    for step in range(-radius, radius + 1):
        share = math.exp(-0.5 * (step / sigma) ** 2)
        here = slice(max(0, -step), min(len(scores), len(scores) - step))
        there = slice(max(0, step), min(len(scores), len(scores) + step))
        total[here].add_(scores[there], alpha=share)
        weight[here].add_(brain[there], alpha=share)
    return torch.where(brain, total / weight.clamp_min(1e-6), 0.0)
