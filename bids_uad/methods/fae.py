"""FAE: an autoencoder of features.

Meissen et al. 2022 ("Unsupervised anomaly localization with structural feature-autoencoders",
arXiv 2208.10992). The maps of a frozen network are stacked, squeezed and restored. Healthy features come back
in their structure.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from bids_uad.constraints import (
    Constrained,
    Count,
    Interval,
    Positive,
)
from bids_uad.methods.base import Batch, FeatureDetector, GradientStage, Stage, stack_maps
from bids_uad.networks.backbones import BackboneConfig, check_maps
from bids_uad.networks.counter_rng import SliceGenerator
from bids_uad.networks.similarity import ssim_map

STRIDE = 4  # of the finest map; the kernels of the decoder are laid out for its 56 x 56 pixels
WindowSide = Annotated[int, Interval(1, 55, odd=True)]


@dataclass(frozen=True)
class FAEHyper(Constrained):
    """Hyper-parameters of FAE.

    Parameters
    ----------
    backbone : BackboneConfig
    widths : tuple of int
        Channels of the four levels of the encoder.
    dropout : float
        Probability of dropping a channel.
    training_window, scoring_window : int
        Sides of the SSIM windows, in feature pixels. The published code trains with another than it scores.
    steps, batch_size, learning_rate
        Training schedule of the autoencoder.
    """

    backbone: BackboneConfig = field(default_factory=lambda: BackboneConfig(name="resnet18", taps=(0, 1, 2)))
    widths: tuple[Count, Count, Count, Count] = (100, 150, 200, 300)
    dropout: Annotated[float, Interval(0, 1, closed="left")] = 0.1
    training_window: WindowSide = 11
    scoring_window: WindowSide = 11
    steps: Count = 20_000
    batch_size: Count = 128
    learning_rate: Positive = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_maps(self, 0, finest=STRIDE)


class FeatureAutoencoder(nn.Sequential):
    """Four halvings by strided convolutions, and back by transposed ones.

    Parameters
    ----------
    channels : int
        Of the stacked features.
    widths : tuple of int
    dropout : float
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
        # The first kernel is odd: it brings 3 back to 7, where all others double.
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
    """

    name: ClassVar[str] = "fae"
    citation: ClassVar[str] = "fae"
    presets: ClassVar[dict[str, FAEHyper]] = {
        "paper": FAEHyper(training_window=5),
        "default": FAEHyper(),
        "lite": FAEHyper(
            backbone=BackboneConfig(),
            widths=(24, 32, 48, 64),
            steps=500,
            batch_size=16,
            learning_rate=2e-3,
        ),
    }

    def __init__(self, hyper: FAEHyper) -> None:
        super().__init__(hyper)
        self.autoencoder = FeatureAutoencoder(sum(hyper.backbone.channels), hyper.widths, hyper.dropout)

    def stages(self) -> list[Stage]:
        """The backbone, if it is our own, then the autoencoder."""
        return [
            *self.backbone_stages(),
            GradientStage.scheduled("autoencoder", self.autoencoder, self.loss, self.hyper),
        ]

    def feature_stack(self, slices: Tensor) -> Tensor:
        """Stack the backbone's maps at the size of the finest."""
        maps = self.features(slices)
        return stack_maps(maps, maps[0].shape[-2:])

    def loss(self, batch: Batch, generator: Generator) -> Tensor:
        """One minus the mean SSIM of features and restored features."""
        features = self.feature_stack(batch.slices)
        restored = self.autoencoder(features)
        return 1 - ssim_map(restored, features, window=self.hyper.training_window, valid=True).mean()

    def score(self, slices: Tensor, brain: Tensor, generator: SliceGenerator) -> Tensor:
        """One minus the SSIM of features and restored features, mean over channels; in [0, 2]."""
        features = self.feature_stack(slices)
        likeness = ssim_map(self.autoencoder(features), features, window=self.hyper.scoring_window)
        unlike = 1 - likeness.mean(1, keepdim=True)
        fine = F.interpolate(unlike, size=slices.shape[-2:], mode="bilinear", align_corners=True)
        return torch.where(brain, fine, 0.0)
