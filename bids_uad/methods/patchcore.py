"""PatchCore: distance to the nearest healthy patch.

Roth et al. 2022, "Towards total recall in industrial anomaly detection" (CVPR). Local features of healthy
slices, thinned to a coreset, are the model; a test patch scores its distance to the nearest of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from bids_uad.methods.base import Batch, Detector, FitStage, GradientStage, Stage
from bids_uad.networks.coreset import farthest_points
from bids_uad.networks.corruptions import AugmentationConfig, cut_windows, vary_intensity
from bids_uad.networks.tissuenet import TissueNet


@dataclass(frozen=True)
class PatchCoreHyper:
    """Hyper-parameters of PatchCore on tissue features.

    Parameters
    ----------
    classes : int
        Tissue classes the feature network learns, background included.
    widths : tuple of int
        Channels of the feature network.
    neighbourhood : int
        Side of the square of features averaged into one descriptor, odd.
    candidates : int
        Descriptors the coreset is chosen from.
    bank : int
        Descriptors kept.
    bank_slices : int
        Slices the candidates are drawn from.
    augmentation : AugmentationConfig
        Variation of the slices while the feature network learns.
    window : tuple of int
        Height and width in pixels of the windows it learns from.
    steps, batch_size, learning_rate
        Schedule of the feature network.
    """

    classes: int = 6
    widths: tuple[int, int, int, int] = (8, 24, 48, 96)
    neighbourhood: int = 3
    candidates: int = 60_000
    bank: int = 4_096
    bank_slices: int = 3_000
    augmentation: AugmentationConfig = field(
        default_factory=lambda: AugmentationConfig(spatial=0.3, zoom=(0.85, 1.15), intensity=0.25)
    )
    window: tuple[int, int] = (160, 192)
    steps: int = 600
    batch_size: int = 8
    learning_rate: float = 2e-3


class PatchCore(Detector):
    """Nearest neighbour in a memory bank of healthy patch features.

    Parameters
    ----------
    hyper : PatchCoreHyper
    """

    name: ClassVar[str] = "patchcore"
    title: ClassVar[str] = "PatchCore"
    citation: ClassVar[str] = "patchcore"
    presets: ClassVar[dict[str, PatchCoreHyper]] = {"lite": PatchCoreHyper()}

    def __init__(self, hyper: PatchCoreHyper) -> None:
        super().__init__(hyper)
        self.backbone = TissueNet(hyper.classes, hyper.widths)
        width = hyper.widths[2] + hyper.widths[3]
        self.register_buffer("centre", torch.zeros(width))
        self.register_buffer("spread", torch.ones(width))
        self.register_buffer("bank", torch.zeros(hyper.bank, width, dtype=torch.float16))

    def stages(self) -> list[Stage]:
        """First the feature network, then the memory bank."""
        hyper = self.hyper
        return [
            GradientStage(
                "features",
                self.backbone,
                self.tissue_loss,
                steps=hyper.steps,
                batch_size=hyper.batch_size,
                learning_rate=hyper.learning_rate,
                needs_tissue=True,
            ),
            FitStage("bank", self.fit_bank, slices=hyper.bank_slices, batch_size=16),
        ]

    def tissue_loss(self, batch: Batch, generator: Generator) -> Tensor:
        """Cross-entropy of the tissue classes."""
        config = self.hyper.augmentation
        images, tissue = cut_windows(
            batch.slices, batch.tissue[:, None], self.hyper.window, config, generator
        )
        images = vary_intensity(images, tissue > 0, config, generator)
        return F.cross_entropy(self.backbone(images), tissue[:, 0])

    def descriptors(self, slices: Tensor) -> Tensor:
        """Standardised local features on the quarter-resolution grid.

        Parameters
        ----------
        slices : Tensor, shape (B, 1, 224, 224)

        Returns
        -------
        Tensor, shape (B, 56, 56, C)
        """
        side = self.hyper.neighbourhood
        quarter, eighth = (
            F.avg_pool2d(feature, side, stride=1, padding=side // 2)
            for feature in self.backbone.features(slices)
        )
        eighth = F.interpolate(eighth, size=quarter.shape[-2:], mode="bilinear", align_corners=False)
        joined = torch.cat([quarter, eighth], 1).movedim(1, -1)
        return (joined - self.centre) / self.spread

    def fit_bank(self, batches: Iterator[Batch], generator: Generator) -> None:
        """Collect healthy descriptors inside the brain and keep a coreset of them."""
        self.centre.zero_()
        self.spread.fill_(1)
        share = -(-self.hyper.candidates // self.hyper.bank_slices)
        kept = []
        for batch in batches:
            found = self.descriptors(batch.slices)[self._covered(batch.brain)]
            pick = torch.randperm(len(found), generator=generator, device=found.device)
            kept.append(found[pick[: share * len(batch.slices)]])
        candidates = torch.cat(kept)
        self.centre.copy_(candidates.mean(0))
        self.spread.copy_(candidates.std(0).clamp_min(1e-6))
        candidates = (candidates - self.centre) / self.spread
        chosen = farthest_points(candidates, self.hyper.bank, generator)
        self.bank = candidates[chosen].half()

    @staticmethod
    def _covered(brain: Tensor) -> Tensor:
        """Cells of the descriptor grid that hold any brain, shape (B, 56, 56)."""
        return F.max_pool2d(brain.float(), 4)[:, 0] > 0

    def score(self, slices: Tensor, brain: Tensor, generators: Sequence[Generator]) -> Tensor:
        """Euclidean distance to the nearest descriptor of the bank, interpolated to the pixels."""
        covered = self._covered(brain)
        queries = self.descriptors(slices)[covered]
        bank = self.bank.to(queries.dtype)
        bank_norm = bank.square().sum(1)
        nearest = [
            (chunk.square().sum(1) + (bank_norm - 2 * chunk @ bank.T).amin(1))
            for chunk in queries.split(4096)
        ]
        coarse = torch.zeros(covered.shape, dtype=queries.dtype, device=slices.device)
        if nearest:
            coarse[covered] = torch.cat(nearest).clamp_min(0).sqrt()
        fine = F.interpolate(coarse[:, None], size=slices.shape[-2:], mode="bilinear", align_corners=False)
        return torch.where(brain, fine, 0.0)
