"""EfficientNet-B4 with torchvision's parameter names, so that its weights load as they are.

Tan and Le 2019, "EfficientNet: rethinking model scaling for convolutional neural networks"
(arXiv 1905.11946).
"""

from __future__ import annotations

from torch import Tensor, nn

STEM, LAST = 48, 1792
# Of each stage: expansion, kernel, stride, channels, blocks; the baseline's, scaled by 1.4 in width and 1.8
# in depth.
B4 = (
    (1, 3, 1, 24, 2),
    (6, 3, 2, 32, 4),
    (6, 5, 2, 56, 4),
    (6, 3, 2, 112, 6),
    (6, 5, 1, 160, 6),
    (6, 5, 2, 272, 8),
    (6, 3, 1, 448, 2),
)


def _conv(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, activate: bool = True
) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, nn.SiLU()) if activate else nn.Sequential(*layers)


class SqueezeExcitation(nn.Module):
    """Weigh channels by what their means say."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Scale each channel of x, shape (B, channels, H, W), by a number in (0, 1)."""
        mean = x.mean((2, 3), keepdim=True)
        return x * self.fc2(nn.functional.silu(self.fc1(mean))).sigmoid()


class InvertedResidual(nn.Module):
    """Widen, filter channel by channel, weigh, narrow; with a shortcut where shapes allow."""

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.shortcut = stride == 1 and inputs == outputs
        widen = [_conv(inputs, inner, 1)] if expansion != 1 else []
        self.block = nn.Sequential(
            *widen,
            _conv(inner, inner, kernel, stride, groups=inner),
            SqueezeExcitation(inner, max(1, inputs // 4)),
            _conv(inner, outputs, 1, activate=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        h = self.block(x)
        return h + x if self.shortcut else h


class EfficientNetB4(nn.Module):
    """EfficientNet-B4 up to one of its stages.

    Parameters
    ----------
    stages : int
        How many of the seven stages to build; 7 adds the last convolution and the classifier, too, and makes
        the published network whole.
    """

    def __init__(self, stages: int = 7) -> None:
        super().__init__()
        layers = [_conv(3, STEM, 3, 2)]
        inputs = STEM
        for expansion, kernel, stride, channels, count in B4[:stages]:
            blocks = []
            for number in range(count):
                blocks.append(InvertedResidual(inputs, channels, expansion, kernel, 1 if number else stride))
                inputs = channels
            layers.append(nn.Sequential(*blocks))
        if stages == len(B4):
            layers.append(_conv(inputs, LAST, 1))
            self.classifier = nn.Sequential(nn.Dropout(0.4), nn.Linear(LAST, 1000))
        self.features = nn.Sequential(*layers)

    def stage_maps(self, images: Tensor) -> list[Tensor]:
        """Maps after each stage.

        Parameters
        ----------
        images : Tensor, shape (B, 3, H, W)

        Returns
        -------
        list of Tensor
            The first at half the resolution.
        """
        h = self.features[0](images)
        maps = []
        for stage in self.features[1:]:
            h = stage(h)
            maps.append(h)
        return maps
