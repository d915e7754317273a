"""What the feature-based detectors share: a frozen backbone, and how it is trained where it is our own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from bids_uad.methods.base import Batch, Detector, GradientStage
from bids_uad.networks.backbones import BackboneConfig, build_backbone
from bids_uad.networks.corruptions import cut_windows, paint_anomalies, vary_intensity

INTENSITIES = 10  # classes of intensity that a painted bias keeps to
VISIBLE = 0.05  # change of intensity from which a pixel counts as painted


class FeatureDetector(Detector):
    """A detector that looks at features of a frozen backbone.

    Parameters
    ----------
    hyper : dataclass
        Has a field `backbone`, a :class:`~bids_uad.networks.backbones.BackboneConfig`.
    """

    def __init__(self, hyper: Any) -> None:
        super().__init__(hyper)
        self.backbone = build_backbone(hyper.backbone)
        self._backbone_is_given = hyper.backbone.pretrained

    def use_backbone(self, other: nn.Module) -> None:
        """Take the weights of a trained backbone of the same make, instead of training one."""
        self.backbone.load_state_dict(other.state_dict())
        self._backbone_is_given = True

    def backbone_stages(self) -> list[GradientStage]:
        """The stage that trains a backbone of our own; none where it comes trained."""
        config: BackboneConfig = self.hyper.backbone
        if self._backbone_is_given:
            return []
        return [
            GradientStage.scheduled("features", self.backbone, self.feature_loss, config, needs_tissue=True)
        ]

    def feature_loss(self, batch: Batch, generator: Generator) -> Tensor:
        """Cross-entropy of the tissue classes, and of anomalies painted over them, which are the last class.

        Features that only tell tissues apart learn to overlook what is odd about them, as
        ``benchmarks/backbones.py`` measures.
        """
        config = self.hyper.backbone
        images, tissue = cut_windows(
            batch.slices, batch.tissue[:, None], config.window, config.augmentation, generator
        )
        images = vary_intensity(images, tissue > 0, config.augmentation, generator)
        intensities = torch.linspace(0, 1, INTENSITIES, device=images.device)
        painted, _ = paint_anomalies(images, tissue > 0, intensities, config.anomaly, generator)
        visible = (painted - images).abs() > VISIBLE
        classes = torch.where(visible, config.classes - 1, tissue)
        return F.cross_entropy(self.backbone.classify(painted), classes[:, 0])

    @torch.no_grad()
    def features(self, slices: Tensor) -> list[Tensor]:
        """Maps of the backbone that the detector looks at, fine to coarse.

        Parameters
        ----------
        slices : Tensor, shape (B, 1, H, W)
            In [0, 1].
        """
        maps = self.backbone(slices)
        return [maps[tap] for tap in self.hyper.backbone.taps]


def stacked(maps: list[Tensor], size: tuple[int, int]) -> Tensor:
    """Resize maps to one size, corners aligned, and stack their channels.

    Parameters
    ----------
    maps : list of Tensor, shapes (B, C, H, W)
    size : tuple of int

    Returns
    -------
    Tensor, shape (B, sum of C, *size)
    """
    return torch.cat(
        [F.interpolate(part, size=size, mode="bilinear", align_corners=True) for part in maps], 1
    )
