"""Other output heads of the default detector, for the ablations: by lesion size, and of tissue classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Generator, Tensor

from bids_uad.methods.base import PaintedBatch, PaintedScan, Scan
from bids_uad.methods.pls.detector import PLS, PLSHyper, weighted_cross_entropy
from bids_uad.networks.counter_rng import SliceGenerator

SIZE_LIMITS_ML = (1.0, 20.0)
"""Volumes between small, medium and large lesions."""
TISSUE_CLASSES = 5
"""Classes of the tissue maps of simulated scans."""
TISSUE_WEIGHT = 0.3
CODE_STEP = 2.0
"""Unit in which the class of a voxel is added to the target, whose values are from 0 to 1."""


class _WithHeads(PLS):
    """PLS whose network has further outputs. The targets of training include a class of each voxel."""

    heads: int

    def __init__(self, hyper: PLSHyper) -> None:
        super().__init__(hyper)
        self.network.leave = _with_outputs(self.network.leave, self.heads)

    def continue_from(self, weights: Mapping[str, Tensor]) -> None:
        """Copy the weights of a network with one output; see :meth:`more_outputs` for those of the heads."""
        single = PLS(self.hyper)
        single.continue_from(weights)
        heads = {name: self.more_outputs(w) for name, w in single.network.leave.state_dict().items()}
        others = single.network.state_dict() | {f"leave.{name}": w for name, w in heads.items()}
        self.network.load_state_dict(others)

    def more_outputs(self, weight: Tensor) -> Tensor:
        """Return the weights of all heads, given those of a single output."""
        raise NotImplementedError

    def classes(self, scan: Scan, painted: PaintedScan) -> Tensor:
        """Return the class of each voxel, 0 if it has none."""
        raise NotImplementedError

    def paint(self, scan: Scan, generator: Generator) -> PaintedScan:
        """Paint a scan, and add the classes to the target."""
        painted = super().paint(scan, generator)
        coded = painted.target + CODE_STEP * self.classes(scan, painted)
        return replace(painted, target=coded.to(painted.target.dtype))


class SizeHeads(_WithHeads):
    """One head each for small, medium and large lesions; the score is the maximum of their probabilities."""

    heads = len(SIZE_LIMITS_ML) + 1

    def more_outputs(self, weight: Tensor) -> Tensor:
        """Start all heads with the same weights."""
        return weight.repeat(self.heads, *[1] * (weight.dim() - 1))

    def classes(self, scan: Scan, painted: PaintedScan) -> Tensor:
        """Number the size of the lesion that a voxel is part of, from 1."""
        labels, count = ndimage.label(painted.target.numpy() > 0)
        volumes = np.bincount(labels.ravel(), minlength=count + 1) / 1000
        sizes = 1 + np.digitize(volumes, SIZE_LIMITS_ML)
        sizes[0] = 0
        return torch.from_numpy(sizes[labels])

    def loss(self, batch: PaintedBatch, generator: Generator) -> Tensor:
        """Compute the mean cross-entropy of the heads, each without the lesions of other sizes."""
        logits = self.logits(batch, generator)
        size, target = _decode(batch.target)
        own = torch.arange(1, self.heads + 1).view(1, -1, 1, 1).to(size.device)
        weight = batch.weight * ((size == own) | (size == 0))
        losses = [
            weighted_cross_entropy(*(part[:, [head]] for part in (logits, target * (size == own), weight)))
            for head in range(self.heads)
        ]
        return torch.stack(losses).mean()

    def score(self, slices: Tensor, brain: Tensor, generator: SliceGenerator) -> Tensor:
        """Predict the lesion probability: the maximum over the heads."""
        return super().score(slices, brain, generator).amax(1, keepdim=True)


class TissueHead(_WithHeads):
    """An additional head that segments tissue classes, with the cross-entropy outside of lesions."""

    heads = 1 + TISSUE_CLASSES

    def more_outputs(self, weight: Tensor) -> Tensor:
        """Start the tissue outputs with weights of 0."""
        return torch.cat([weight, weight.new_zeros(TISSUE_CLASSES * len(weight), *weight.shape[1:])])

    def classes(self, scan: Scan, painted: PaintedScan) -> Tensor:
        """Return the tissue classes of the scan, without the displacement by painted lesions."""
        if scan.tissue is None:
            raise ValueError("the scans have no tissue maps: train on simulated ones")
        return scan.tissue

    def loss(self, batch: PaintedBatch, generator: Generator) -> Tensor:
        """Add the cross-entropy of the tissue classes to that of lesions."""
        logits = self.logits(batch, generator)
        tissue, target = _decode(batch.target)
        known = (tissue > 0) & (target == 0) & batch.brain
        of_tissue = F.cross_entropy(logits[:, 1:], (tissue[:, 0] - 1).clamp_min(0).long(), reduction="none")
        of_tissue = (of_tissue * known[:, 0]).sum() / known.sum().clamp_min(1)
        return weighted_cross_entropy(logits[:, :1], target, batch.weight) + TISSUE_WEIGHT * of_tissue

    def score(self, slices: Tensor, brain: Tensor, generator: SliceGenerator) -> Tensor:
        """Predict the lesion probability: the first output."""
        return super().score(slices, brain, generator)[:, :1]


def _with_outputs(conv: torch.nn.Conv2d, heads: int) -> torch.nn.Conv2d:
    """Return a convolution as `conv`, whose weights are all 0 before training, with more outputs."""
    result = type(conv)(conv.in_channels, heads * conv.out_channels, 3, padding=1)
    for parameter in result.parameters():
        torch.nn.init.zeros_(parameter)
    return result


def _decode(coded: Tensor) -> tuple[Tensor, Tensor]:
    """Separate class and target."""
    classes = torch.div(coded, CODE_STEP, rounding_mode="floor")
    return classes, coded - CODE_STEP * classes
