"""Descriptors of places in feature maps, as PatchCore compares them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pooled_descriptors(fine: Tensor, coarse: Tensor, side: int) -> Tensor:
    """Means of neighbourhoods in both maps, at the places of the finer one.

    Parameters
    ----------
    fine : Tensor, shape (B, C, H, W)
    coarse : Tensor, shape (B, D, H/2, W/2)
    side : int
        Of the neighbourhood, odd; zeros beyond the border count.

    Returns
    -------
    Tensor, shape (B, H, W, C + D)
    """
    fine, coarse = (F.avg_pool2d(part, side, stride=1, padding=side // 2) for part in (fine, coarse))
    coarse = F.interpolate(coarse, size=fine.shape[-2:], mode="bilinear", align_corners=False)
    return torch.cat([fine, coarse], 1).movedim(1, -1)


def published_descriptors(fine: Tensor, coarse: Tensor, side: int) -> Tensor:
    """PatchCore's published descriptor in closed form.

    The published code unfolds each place into its neighbourhood's C x side x side values, pools these
    adaptively to 2 C numbers in each map, and both maps' numbers together to 2 C again. Since 2 C numbers out
    of C side**2 are means of half a channel's neighbourhood each, and the last pooling takes means of pairs,
    what remains are means over neighbourhoods: of each channel of the finer map, its centre twice, and of
    each pair of channels of the coarser one. Nothing needs to be unfolded.

    Parameters
    ----------
    fine : Tensor, shape (B, C, H, W)
    coarse : Tensor, shape (B, 2 C, H/2, W/2)
    side : int
        Of the neighbourhood, odd; zeros beyond the border count.

    Returns
    -------
    Tensor, shape (B, H, W, 2 C)
    """
    cells = side**2
    mean = F.avg_pool2d(fine, side, stride=1, padding=side // 2)
    near = (cells * mean + fine) / (cells + 1)
    far = F.avg_pool2d(coarse, side, stride=1, padding=side // 2)
    far = F.interpolate(far, size=fine.shape[-2:], mode="bilinear", align_corners=False)
    paired = far.unflatten(1, (-1, 2)).mean(2)
    return torch.cat([near, paired], 1).movedim(1, -1)
