"""FAE: an autoencoder of features.

Meissen et al. 2022 ("Unsupervised anomaly localization with structural feature-autoencoders",
arXiv 2208.10992). An autoencoder restores the stacked feature maps of a frozen network; the score is their
structural dissimilarity.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from bids_uad.constraints import Constrained, Count, Interval, Positive
from bids_uad.methods.base import (
    OPTIMISER,
    Batch,
    FeatureDetector,
    GradientStage,
    OptimiserConfig,
    Stage,
    occupied_box,
    stack_maps,
)
from bids_uad.networks.backbones import LESIONS, BackboneConfig, check_maps
from bids_uad.networks.counter_rng import SliceGenerator
from bids_uad.networks.similarity import ssim_map

STRIDE = 4
"""Required stride of the finest map; the kernels of the decoder fit 56 x 56 pixels."""
WindowSide = Annotated[int, Interval(1, 55, odd=True)]


@dataclass(frozen=True)
class FAEHyper(Constrained):
    """Hyper-parameters of FAE.

    Parameters
    ----------
    backbone : BackboneConfig
        Frozen network and its feature maps.
    widths : tuple of int, default=(100, 150, 200, 300)
        Channels of the four levels of the encoder.
    dropout : float, default=0.1
        Probability of dropping a channel.
    training_window, scoring_window : int, default=11
        Sides of the SSIM windows in training and scoring, in pixels of the finest map. The original method
        uses 5 and 5, the published benchmark 5 and 11.
    steps, batch_size, learning_rate : int, int, float, default=20000, 128, 1e-4
        Training schedule of the autoencoder: optimiser steps, slices per step, largest learning rate.
    optimiser : OptimiserConfig
        Learning-rate schedule, averaging of weights and clipping of gradients.
    """

    backbone: BackboneConfig = field(default_factory=lambda: BackboneConfig(name="resnet18", taps=(0, 1, 2)))
    widths: tuple[Count, Count, Count, Count] = (100, 150, 200, 300)
    dropout: Annotated[float, Interval(0, 1, closed="left")] = 0.1
    training_window: WindowSide = 11
    scoring_window: WindowSide = 11
    steps: Count = 20_000
    batch_size: Count = 128
    learning_rate: Positive = 1e-4
    optimiser: OptimiserConfig = OPTIMISER

    def __post_init__(self) -> None:
        super().__post_init__()
        check_maps(self, 0, finest=STRIDE)


class FeatureAutoencoder(nn.Sequential):
    """Convolutional autoencoder that halves the size four times and doubles it four times.

    Parameters
    ----------
    channels : int
        Channels of the stacked feature maps.
    widths : tuple of int
        Channels of the four levels of the encoder.
    dropout : float
        Probability of dropping a channel.
    """

    def __init__(self, channels: int, widths: tuple[int, int, int, int], dropout: float) -> None:
        def activated(conv: nn.Module, outputs: int) -> list[nn.Module]:
            return [conv, nn.BatchNorm2d(outputs), nn.LeakyReLU(0.01), nn.Dropout2d(dropout)]

        layers: list[nn.Module] = []
        inputs = channels
        for outputs in widths:
            layers += activated(nn.Conv2d(inputs, outputs, 6, stride=2, padding=2, bias=False), outputs)
            inputs = outputs
        layers.append(nn.Conv2d(inputs, inputs, 5, padding=2, bias=False))
        # The first kernel is odd, since it enlarges 3 pixels to 7; the others double the size.
        for outputs, kernel in zip((*widths[-2::-1], channels), (7, 6, 6, 6), strict=True):
            conv = nn.ConvTranspose2d(inputs, outputs, kernel, stride=2, padding=2, bias=False)
            layers += activated(conv, outputs)
            inputs = outputs
        layers.append(nn.Conv2d(channels, channels, 1, bias=False))
        super().__init__(*layers)


class FAE(FeatureDetector):
    """Structural feature autoencoder.

    Parameters
    ----------
    hyper : FAEHyper
        Hyper-parameters.
    """

    name: ClassVar[str] = "fae"
    citation: ClassVar[str] = "fae"
    presets: ClassVar[dict[str, FAEHyper]] = {
        "paper": FAEHyper(
            training_window=5,
            steps=40_000,
            optimiser=OptimiserConfig("constant", ema_decay=None, clip_norm=None),
        ),
        "default": FAEHyper(training_window=5, scoring_window=5),
        "lite": FAEHyper(
            backbone=BackboneConfig(name=LESIONS),
            widths=(24, 32, 48, 64),
            steps=500,
            batch_size=16,
            learning_rate=2e-3,
        ),
    }
    modality_settings: ClassVar[dict[tuple[str, str], dict[str, Any]]] = {("paper", "T1w"): {"steps": 20_000}}

    def __init__(self, hyper: FAEHyper) -> None:
        super().__init__(hyper)
        self.autoencoder = FeatureAutoencoder(sum(hyper.backbone.channels), hyper.widths, hyper.dropout)

    def stages(self) -> list[Stage]:
        """Train the backbone, if it is not pretrained, then the autoencoder."""
        return [
            *self.backbone_stages(),
            GradientStage.scheduled("autoencoder", self.autoencoder, self.loss, self.hyper),
        ]

    def feature_stack(self, slices: Tensor, brain: Tensor | None = None) -> Tensor:
        """Stack the feature maps at the size of the finest, shape (B, C, h, w)."""
        maps = self.features(slices, brain)
        return stack_maps(maps, maps[0].shape[-2:])

    def loss(self, batch: Batch, generator: Generator) -> Tensor:
        """Compute one minus the mean SSIM of feature maps and restored feature maps."""
        features = self.feature_stack(batch.slices)
        restored = self.autoencoder(features)
        return 1 - ssim_map(restored, features, window=self.hyper.training_window, valid=True).mean()

    def score(self, slices: Tensor, brain: Tensor, generator: SliceGenerator) -> Tensor:
        """Compute one minus the SSIM of feature maps and restored ones, mean over channels, in [0, 2]."""
        features = self.feature_stack(slices, brain)
        restored = self.autoencoder(features)
        dissimilarity = torch.zeros_like(features[:, :1])
        # The windows of all cells from which a pixel of the brain is interpolated; one slice at a time fits
        # in the cache of a processor core.
        reach = (self.hyper.scoring_window // 2 + 2) * STRIDE
        for index in range(len(slices)):
            box = occupied_box(brain[index : index + 1], reach, STRIDE)
            rows, columns = (slice(side.start // STRIDE, side.stop // STRIDE) for side in box)
            parts = (maps[index : index + 1, :, rows, columns] for maps in (restored, features))
            similarity = ssim_map(*parts, window=self.hyper.scoring_window)
            dissimilarity[index, :, rows, columns] = 1 - similarity.mean(1)
        fine = F.interpolate(dissimilarity, size=slices.shape[-2:], mode="bilinear", align_corners=True)
        return torch.where(brain, fine, 0.0)
