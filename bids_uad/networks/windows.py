"""Sliding windows: where they lie and how their overlap is weighted."""

from __future__ import annotations

import torch
from torch import Tensor


def window_starts(occupied: Tensor, window: int, stride: int) -> list[int]:
    """First indices of the windows that cover the occupied part of one axis.

    Parameters
    ----------
    occupied : Tensor of bool, shape (N,)
        Which positions must be covered.
    window, stride : int
        `window` is at most N.

    Returns
    -------
    list of int
        Ascending; all windows lie inside the axis. A span shorter than the window gets one window,
        centred on it. Empty if nothing is occupied.
    """
    positions = torch.nonzero(occupied).flatten()
    if len(positions) == 0:
        return []
    extent = len(occupied)
    first, last = int(positions[0]), int(positions[-1])
    span = last - first + 1
    if span <= window:
        return [min(max(first + (span - window) // 2, 0), extent - window)]
    end = last + 1 - window
    return [*range(first, end, stride), end]


def importance(height: int, width: int, device: torch.device) -> Tensor:
    """Gaussian weight of a window's pixels, standard deviation an eighth of each side, at least 0.001.

    Returns
    -------
    Tensor, shape (height, width)
        1 at the centre.
    """

    def profile(size: int) -> Tensor:
        offset = torch.arange(size, device=device) - (size - 1) / 2
        return torch.exp(-0.5 * (offset / (size / 8)) ** 2)

    return (profile(height)[:, None] * profile(width)[None]).clamp_min(1e-3)
