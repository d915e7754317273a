"""Thinning a set of descriptors to a few that cover it."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def farthest_points(points: Tensor, count: int, generator: Generator) -> Tensor:
    """Choose points greedily, each the farthest from those already chosen.

    Parameters
    ----------
    points : Tensor, shape (N, C)
        Distances are Euclidean in all C dimensions.
    count : int
        How many to keep, at most N.
    generator : torch.Generator
        Draws the first point.

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
