"""A small tissue-segmentation network whose encoder serves as a frozen feature extractor.

Stands in for ImageNet backbones: it has only ever seen brains, and its weights are free to ship.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class TissueNet(nn.Module):
    """Encoder of three halvings with a light decoder that names the tissue of each pixel.

    Parameters
    ----------
    classes : int
        Tissue classes, background included.
    widths : tuple of int
        Channels at full, half, quarter and eighth resolution.
    """

    def __init__(self, classes: int, widths: tuple[int, int, int, int] = (8, 24, 48, 96)) -> None:
        super().__init__()
        full, half, quarter, eighth = widths
        self.at_full = _block(1, full)
        self.at_half = nn.Sequential(_block(full, half, 2), _block(half, half))
        self.at_quarter = nn.Sequential(_block(half, quarter, 2), _block(quarter, quarter))
        self.at_eighth = nn.Sequential(
            _block(quarter, eighth, 2), _block(eighth, eighth), _block(eighth, eighth)
        )
        self.merge_quarter = _block(eighth + quarter, quarter)
        self.merge_half = _block(quarter + half, half)
        self.head = nn.Conv2d(half + full, classes, 3, padding=1)

    def forward(self, slices: Tensor) -> list[Tensor]:
        """Encoder features at half, quarter and eighth resolution.

        Parameters
        ----------
        slices : Tensor, shape (B, 1, H, W)
            H and W divisible by 8.

        Returns
        -------
        list of Tensor
            Shapes (B, widths[1], H/2, W/2), (B, widths[2], H/4, W/4) and (B, widths[3], H/8, W/8).
        """
        half = self.at_half(self.at_full(slices))
        quarter = self.at_quarter(half)
        return [half, quarter, self.at_eighth(quarter)]

    def classify(self, images: Tensor) -> Tensor:
        """Class scores, which the network is trained by.

        Returns
        -------
        Tensor, shape (B, classes, H, W)
            Unnormalised log-probabilities.
        """
        full = self.at_full(images)
        half = self.at_half(full)
        quarter = self.at_quarter(half)
        eighth = self.at_eighth(quarter)
        h = self.merge_quarter(torch.cat([self._doubled(eighth), quarter], 1))
        h = self.merge_half(torch.cat([self._doubled(h), half], 1))
        return self.head(torch.cat([self._doubled(h), full], 1))

    @staticmethod
    def _doubled(x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
