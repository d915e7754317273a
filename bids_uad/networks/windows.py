"""Sliding windows: where they lie and how their overlap is weighted."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def window_starts(extent: int, window: int, stride: int) -> list[int]:
    """First indices of the windows that cover one axis.

    Parameters
    ----------
    extent, window, stride : int
        `window` is at most `extent`.

    Returns
    -------
    list of int
        Ascending; the last window ends where the axis does.
    """
    end = extent - window
    return [*range(0, end, stride), end]


@cache
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
