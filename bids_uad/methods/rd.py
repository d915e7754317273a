"""RD: reverse distillation.

Deng and Li 2022 ("Anomaly detection via reverse distillation from one-class embedding", arXiv 2201.10703). A
student network, trained on healthy slices, restores the feature maps of a frozen teacher from a compact
embedding of them, from coarse to fine. The score is the cosine distance of the maps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from bids_uad.constraints import Constrained, Count, Positive
from bids_uad.methods.base import (
    OPTIMISER,
    Batch,
    FeatureDetector,
    GradientStage,
    OptimiserConfig,
    Stage,
    occupied_box,
)
from bids_uad.networks.backbones import LESIONS, BackboneConfig, check_maps
from bids_uad.networks.counter_rng import SliceGenerator


@dataclass(frozen=True)
class RDHyper(Constrained):
    """Hyper-parameters of RD.

    Parameters
    ----------
    backbone : BackboneConfig
        Teacher; from each of its three maps to the next, the size halves.
    embedding_blocks : int, default=3
        Residual blocks of the embedding.
    student_blocks : tuple of int, default=(3, 4, 6)
        Residual blocks of the stages of the student, from coarse to fine.
    published_initialisation : bool, default=False
        Whether the convolutions of the embedding start with He's normal distribution, as in the published
        code and as those of the student.
    steps, batch_size, learning_rate : int, int, float, default=25000, 128, 1e-4
        Training schedule of embedding and student: optimiser steps, slices per step, largest learning rate.
    optimiser : OptimiserConfig
        Learning-rate schedule, averaging of weights and clipping of gradients.
    """

    backbone: BackboneConfig = field(
        default_factory=lambda: BackboneConfig(name="wide_resnet50_2", taps=(1, 2, 3))
    )
    embedding_blocks: Count = 3
    student_blocks: tuple[Count, Count, Count] = (3, 4, 6)
    published_initialisation: bool = False
    steps: Count = 25_000
    batch_size: Count = 128
    learning_rate: Positive = 1e-4
    optimiser: OptimiserConfig = OPTIMISER

    def __post_init__(self) -> None:
        super().__post_init__()
        check_maps(self, 3, halving=True)


def _halving(inputs: int, outputs: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def _initialise(network: nn.Module) -> None:
    """Draw the weights of convolutions, except transposed ones, from He's normal distribution."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class ResampledBottleneck(nn.Module):
    """Bottleneck block that halves, keeps or doubles the size.

    Parameters
    ----------
    inputs, inner, outputs : int
        Channels of input, 3x3 convolution and output.
    resample : {"down", "up"}, optional
        ``down`` uses stride 2, ``up`` a transposed 2x2 convolution; by default the size is kept.
    """

    def __init__(self, inputs: int, inner: int, outputs: int, resample: str | None = None) -> None:
        super().__init__()
        if resample == "up":
            middle = nn.ConvTranspose2d(inner, inner, 2, stride=2, bias=False)
            shortcut = nn.ConvTranspose2d(inputs, outputs, 2, stride=2, bias=False)
        else:
            stride = 2 if resample == "down" else 1
            middle = nn.Conv2d(inner, inner, 3, stride=stride, padding=1, bias=False)
            shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
        self.main = nn.Sequential(
            nn.Conv2d(inputs, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            middle,
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        project = resample is not None or inputs != outputs
        self.shortcut = nn.Sequential(shortcut, nn.BatchNorm2d(outputs)) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H', W')."""
        return F.relu(self.main(x).add_(self.shortcut(x)), inplace=True)


class OneClassEmbedding(nn.Module):
    """Fuse three feature maps at the size of the coarsest, and compress them.

    Parameters
    ----------
    channels : tuple of int
        Channels of the maps, from fine to coarse.
    blocks : int
        Residual blocks.
    """

    def __init__(self, channels: tuple[int, ...], blocks: int) -> None:
        super().__init__()
        fine, middle, coarse = channels
        self.from_fine = nn.Sequential(_halving(fine, middle), _halving(middle, coarse))
        self.from_middle = _halving(middle, coarse)
        sizes = [3 * coarse] + [2 * coarse] * blocks
        self.squeeze = nn.Sequential(
            *(
                ResampledBottleneck(inputs, coarse, 2 * coarse, None if number else "down")
                for number, inputs in enumerate(sizes[:-1])
            )
        )

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Return the embedding, shape (B, 2 coarse, H/2, W/2), with H and W the size of the coarsest map."""
        fine, middle, coarse = maps
        return self.squeeze(torch.cat([self.from_fine(fine), self.from_middle(middle), coarse], 1))


class Student(nn.Module):
    """Three stages that double the size.

    Parameters
    ----------
    channels : tuple of int
        Channels of the maps, from fine to coarse.
    blocks : tuple of int
        Residual blocks of the stages, from coarse to fine.
    """

    def __init__(self, channels: tuple[int, ...], blocks: tuple[int, int, int]) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        inputs = 2 * channels[-1]
        for outputs, count in zip(channels[::-1], blocks, strict=True):
            layers = [ResampledBottleneck(inputs, outputs // 2, outputs, "up")]
            layers += [ResampledBottleneck(outputs, outputs // 2, outputs) for _ in range(count - 1)]
            self.stages.append(nn.Sequential(*layers))
            inputs = outputs
        _initialise(self)

    def forward(self, embedding: Tensor) -> list[Tensor]:
        """Return restored maps in the order of the teacher, from fine to coarse."""
        maps = []
        for stage in self.stages:
            embedding = stage(embedding)
            maps.append(embedding)
        return maps[::-1]


class ReverseDistillation(FeatureDetector):
    """Reverse distillation.

    Parameters
    ----------
    hyper : RDHyper
        Hyper-parameters.
    """

    name: ClassVar[str] = "rd"
    citation: ClassVar[str] = "rd"
    presets: ClassVar[dict[str, RDHyper]] = {
        "paper": RDHyper(
            backbone=BackboneConfig(name="wide_resnet50_2", taps=(1, 2, 3), normalise=False),
            published_initialisation=True,
            steps=15_000,
            optimiser=OptimiserConfig("constant", ema_decay=None, clip_norm=None),
        ),
        "default": RDHyper(published_initialisation=True),
        "lite": RDHyper(
            backbone=BackboneConfig(name=LESIONS, taps=(0, 1, 2)),
            embedding_blocks=2,
            student_blocks=(2, 2, 2),
            steps=600,
            batch_size=8,
            learning_rate=2e-3,
        ),
    }
    modality_settings: ClassVar[dict[tuple[str, str], dict[str, Any]]] = {("paper", "T1w"): {"steps": 20_000}}

    def __init__(self, hyper: RDHyper) -> None:
        super().__init__(hyper)
        channels = hyper.backbone.channels
        self.embedding = OneClassEmbedding(channels, hyper.embedding_blocks)
        if hyper.published_initialisation:
            _initialise(self.embedding)
        self.student = Student(channels, hyper.student_blocks)

    def stages(self) -> list[Stage]:
        """Train the backbone, if it is not pretrained, then embedding and student together."""
        return [
            *self.backbone_stages(),
            GradientStage.scheduled(
                "student", nn.ModuleList([self.embedding, self.student]), self.loss, self.hyper
            ),
        ]

    def loss(self, batch: Batch, generator: Generator) -> Tensor:
        """Compute the sum over scales of one minus the cosine of flattened maps."""
        teacher_maps = self.features(batch.slices)
        student_maps = self.student(self.embedding(teacher_maps))
        return sum(
            (1 - F.cosine_similarity(a.flatten(1), b.flatten(1))).mean()
            for a, b in zip(teacher_maps, student_maps, strict=True)
        )

    def score(self, slices: Tensor, brain: Tensor, generator: SliceGenerator) -> Tensor:
        """Compute the sum over scales of one minus the cosine at each location, in [0, 6]."""
        teacher_maps = self.features(slices, brain)
        student_maps = self.student(self.embedding(teacher_maps))
        total = torch.zeros_like(slices)
        for stride, a, b in zip(self.hyper.backbone.strides, teacher_maps, student_maps, strict=True):
            distance = torch.zeros_like(a[:, :1])
            # Cells from which a pixel of the brain is interpolated, one slice at a time as in FAE.
            for index in range(len(slices)):
                box = occupied_box(brain[index : index + 1], 2 * stride, stride)
                part = (
                    index,
                    slice(None),
                    *(slice(side.start // stride, side.stop // stride) for side in box),
                )
                distance[part] = 1 - F.cosine_similarity(a[part], b[part], dim=0)
            total += F.interpolate(distance, size=slices.shape[-2:], mode="bilinear", align_corners=True)
        return torch.where(brain, total, 0.0)
