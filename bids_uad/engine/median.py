"""The 3 x 3 x 3 median filter that sees only the brain."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_median(volume: Tensor, brain: Tensor) -> Tensor:
    """Median of each brain voxel's 3 x 3 x 3 neighbours that are brain, itself included.

    Parameters
    ----------
    volume : Tensor of float, shape (X, Y, Z)
    brain : Tensor of bool, shape (X, Y, Z)

    Returns
    -------
    Tensor, shape (X, Y, Z)
        0 outside the brain. Of an even number of neighbours the lower middle one is taken, so that every
        value is one that occurs.
    """
    result = torch.zeros_like(volume)
    if not brain.any():
        return result
    occupied = [torch.nonzero(brain.any(tuple({0, 1, 2} - {axis}))).flatten() for axis in (0, 1, 2)]
    box = tuple(slice(int(index[0]), int(index[-1]) + 1) for index in occupied)
    inside = torch.where(brain[box], volume[box], torch.nan)
    padded = torch.full(
        [size + 2 for size in inside.shape], torch.nan, dtype=volume.dtype, device=volume.device
    )
    padded[1:-1, 1:-1, 1:-1] = inside
    target, region = result[box], brain[box]
    # Slab by slab, so that the 27 neighbours of only a few million voxels exist at once.
    depth = max(1, 4_000_000 // max(1, inside.shape[0] * inside.shape[1] * 27))
    for start in range(0, inside.shape[2], depth):
        stop = min(start + depth, inside.shape[2])
        here = region[:, :, start:stop]
        neighbours = torch.stack(
            [
                padded[i : i + inside.shape[0], j : j + inside.shape[1], start + k : stop + k][here]
                for i in range(3)
                for j in range(3)
                for k in range(3)
            ]
        )
        target[:, :, start:stop][here] = neighbours.nanmedian(0).values
    return result
