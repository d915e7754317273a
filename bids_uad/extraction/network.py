"""The network: a three-dimensional U-Net on 3 mm voxels that looks at blocks of 2 x 2 x 2 of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GROUPS = 8
FOLD = 2


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(inputs, outputs, 3, padding=1, bias=False),
        nn.GroupNorm(GROUPS, outputs),
        nn.SiLU(),
        nn.Conv3d(outputs, outputs, 3, padding=1, bias=False),
        nn.GroupNorm(GROUPS, outputs),
        nn.SiLU(),
    )


class BrainNet(nn.Module):
    """Says of each voxel how likely it is brain.

    After SynthStrip (Hoopes et al. 2022, doi:10.1016/j.neuroimage.2022.119474), which taught such a network
    with synthetic heads of random contrast; this one is small enough for a second on one CPU core.

    Parameters
    ----------
    widths : tuple of int
        Channels at each of four resolutions, the finest first.
    """

    def __init__(self, widths: tuple[int, int, int, int] = (24, 48, 72, 96)) -> None:
        super().__init__()
        inputs = (FOLD**3, *widths[:-1])
        self.down = nn.ModuleList([_block(*pair) for pair in zip(inputs, widths, strict=True)])
        coarse = widths[:0:-1]
        self.up = nn.ModuleList(
            [_block(below + level, level) for below, level in zip(coarse, widths[-2::-1], strict=True)]
        )
        self.head = nn.Conv3d(widths[0], FOLD**3, 3, padding=1)

    def forward(self, volumes: Tensor) -> Tensor:
        """Logits of each voxel.

        Parameters
        ----------
        volumes : Tensor, shape (B, 1, X, Y, Z)
            Sizes divisible by 16; the head's bright tissue at about 1, air at 0.

        Returns
        -------
        Tensor, of the same shape
        """
        x = _fold(volumes)
        skips = []
        for level, block in enumerate(self.down):
            x = block(F.max_pool3d(x, 2) if level else x)
            skips.append(x)
        for block, skip in zip(self.up, skips[-2::-1], strict=True):
            x = F.interpolate(x, size=skip.shape[2:], mode="nearest")
            x = block(torch.cat([x, skip], dim=1))
        return _unfold(self.head(x))


def _fold(volumes: Tensor) -> Tensor:
    """Put blocks of voxels into channels."""
    batch, _, x, y, z = volumes.shape
    blocks = volumes.reshape(batch, x // FOLD, FOLD, y // FOLD, FOLD, z // FOLD, FOLD)
    return blocks.permute(0, 2, 4, 6, 1, 3, 5).reshape(batch, FOLD**3, x // FOLD, y // FOLD, z // FOLD)


def _unfold(blocks: Tensor) -> Tensor:
    """Undo `_fold`."""
    batch, _, x, y, z = blocks.shape
    volumes = blocks.reshape(batch, FOLD, FOLD, FOLD, x, y, z).permute(0, 4, 1, 5, 2, 6, 3)
    return volumes.reshape(batch, 1, FOLD * x, FOLD * y, FOLD * z)
