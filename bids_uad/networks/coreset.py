"""Thinning a set of descriptors to a few that cover it."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

PROJECTED = 128


def farthest_points(points: Tensor, count: int, generator: Generator) -> Tensor:
    """Choose points greedily, each the farthest from those already chosen.

    Distances are taken after a random linear projection to at most 128 dimensions
    (Johnson-Lindenstrauss), as PatchCore does.

    Parameters
    ----------
    points : Tensor, shape (N, C)
    count : int
        How many to keep, at most N.
    generator : torch.Generator
        Draws the projection and the first point.

    Returns
    -------
    Tensor of int64, shape (count,)
        Indices in the order chosen.

    Raises
    ------
    ValueError
        If there are fewer points than asked for.
    """
    if len(points) < count:
        raise ValueError(f"cannot choose {count} of {len(points)} descriptors; train on more slices")
    if points.shape[1] > PROJECTED:
        shape = (points.shape[1], PROJECTED)
        points = points @ torch.randn(shape, generator=generator, device=points.device) / PROJECTED**0.5
    squared = points.square().sum(1)
    chosen = torch.empty(count, dtype=torch.int64, device=points.device)
    current = torch.randint(len(points), (1,), generator=generator, device=points.device)
    distance = torch.full((len(points),), torch.inf, device=points.device)
    for index in range(count):
        chosen[index] = current
        to_current = squared + squared[current] - 2 * (points @ points[current[0]])
        distance = torch.minimum(distance, to_current)
        current = distance.argmax()[None]
    return chosen
