"""Intensity: the baseline without a model.

Lesions are wet, so they look like fluid: bright in T2w, dark in T1w. Thresholding the intensity is hard to
beat (Meissen et al. 2022, "Challenging current semi-supervised anomaly segmentation methods for brain MRI"),
which is why every benchmark here shows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from bids_uad.constraints import Constrained, Count
from bids_uad.methods.base import (
    Batch,
    Detector,
    FitStage,
    Stage,
)
from bids_uad.networks.counter_rng import SliceGenerator


def fluid_polarity(batches: Iterator[Batch]) -> Tensor:
    """Sign of fluid's contrast.

    Fluid is the tail of the healthy histogram: bright if it is skewed upwards, dark if downwards.

    Parameters
    ----------
    batches : iterator of Batch
        Of healthy slices.

    Returns
    -------
    Tensor, scalar
        1 where fluid is bright, -1 where it is dark.
    """
    values = torch.cat([batch.slices[batch.brain] for batch in batches]).double()
    return (values - values.mean()).pow(3).mean().sign()


@dataclass(frozen=True)
class IntensityHyper(Constrained):
    """Hyper-parameters of the baseline: how many slices settle the polarity."""

    slices: Count = 256


class Intensity(Detector):
    """The scan itself, turned so that fluid is high.

    Parameters
    ----------
    hyper : IntensityHyper
    """

    name: ClassVar[str] = "intensity"
    citation: ClassVar[str] = "meissen2022"
    presets: ClassVar[dict[str, IntensityHyper]] = {"lite": IntensityHyper()}

    def __init__(self, hyper: IntensityHyper) -> None:
        super().__init__(hyper)
        self.register_buffer("polarity", torch.ones(()))

    def stages(self) -> list[Stage]:
        """One look at the histogram."""
        return [FitStage("polarity", self.fit_polarity, slices=self.hyper.slices, batch_size=64)]

    def fit_polarity(self, batches: Iterator[Batch], generator: Generator) -> None:
        """Learn whether fluid is bright or dark."""
        self.polarity.copy_(fluid_polarity(batches))

    def score(self, slices: Tensor, brain: Tensor, generator: SliceGenerator) -> Tensor:
        """Intensity, or one minus it where fluid is dark."""
        return torch.where(brain, torch.where(self.polarity > 0, slices, 1 - slices), 0.0)
