"""ResNet-18 and Wide ResNet-50-2 with torchvision's parameter names, so that its weights load as they are.

He et al. 2016, "Deep residual learning for image recognition"; Zagoruyko and Komodakis 2016, "Wide residual
networks".
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def _conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
    return conv, nn.BatchNorm2d(outputs)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int, widening: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv_norm(inputs, planes, 3, stride)
        self.conv2, self.bn2 = _conv_norm(planes, planes, 3)
        project = stride != 1 or inputs != planes
        self.downsample = nn.Sequential(*_conv_norm(inputs, planes, 1, stride)) if project else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, planes, H / stride, W / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + shortcut)


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution and a shortcut; the 3x3 has `widening` times the planes."""

    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int, widening: int) -> None:
        super().__init__()
        inner, outputs = planes * widening, planes * self.expansion
        self.conv1, self.bn1 = _conv_norm(inputs, inner, 1)
        self.conv2, self.bn2 = _conv_norm(inner, inner, 3, stride)
        self.conv3, self.bn3 = _conv_norm(inner, outputs, 1)
        project = stride != 1 or inputs != outputs
        self.downsample = nn.Sequential(*_conv_norm(inputs, outputs, 1, stride)) if project else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, 4 planes, H / stride, W / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        h = F.relu(self.bn1(self.conv1(x)))
        h = F.relu(self.bn2(self.conv2(h)))
        return F.relu(self.bn3(self.conv3(h)) + shortcut)


class ResNet(nn.Module):
    """A ResNet up to one of its stages.

    Parameters
    ----------
    block : type
        :class:`BasicBlock` or :class:`Bottleneck`.
    depths : tuple of int
        Blocks of each of the four stages.
    widening : int
    stages : int
        How many stages to build; 4 adds the classifier, too, and makes the published network whole.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        widening: int = 1,
        stages: int = 4,
    ) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv_norm(3, 64, 7, 2)
        inputs = 64
        self.stage_names = [f"layer{stage + 1}" for stage in range(stages)]
        for stage, name in enumerate(self.stage_names):
            planes = 64 * 2**stage
            blocks = []
            for number in range(depths[stage]):
                blocks.append(block(inputs, planes, 2 if stage and not number else 1, widening))
                inputs = planes * block.expansion
            self.add_module(name, nn.Sequential(*blocks))
        if stages == 4:
            self.fc = nn.Linear(inputs, 1000)

    def features(self, images: Tensor) -> list[Tensor]:
        """Maps after the first pooling and after each stage.

        Parameters
        ----------
        images : Tensor, shape (B, 3, H, W)

        Returns
        -------
        list of Tensor
            At a quarter of the resolution twice, then at an eighth, and so on.
        """
        h = F.max_pool2d(F.relu(self.bn1(self.conv1(images))), 3, stride=2, padding=1)
        maps = [h]
        for name in self.stage_names:
            h = self.get_submodule(name)(h)
            maps.append(h)
        return maps


def resnet18(stages: int = 4) -> ResNet:
    """ResNet-18."""
    return ResNet(BasicBlock, (2, 2, 2, 2), stages=stages)


def wide_resnet50_2(stages: int = 4) -> ResNet:
    """Wide ResNet-50-2."""
    return ResNet(Bottleneck, (3, 4, 6, 3), widening=2, stages=stages)
