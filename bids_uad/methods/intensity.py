"""Intensity: a baseline without a network.

Many lesions contain more water than healthy tissue and are bright in T2w and FLAIR images and dark in T1w
images. Meissen et al. 2022 ("Challenging current semi-supervised anomaly segmentation methods for brain MRI")
found thresholding of the intensity superior to many detectors, so it is part of every benchmark here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from bids_uad.config import Modality
from bids_uad.constraints import Constrained, Count
from bids_uad.methods.base import Batch, Detector, FitStage, Stage
from bids_uad.networks.counter_rng import SliceGenerator


def fluid_polarity(batches: Iterator[Batch]) -> Tensor:
    """Determine from the skewness of the intensities whether fluid is bright or dark.

    Fluid forms the tail of the histogram of healthy brains: to the right if it is bright, else to the left.

    Parameters
    ----------
    batches : iterator of Batch
        Healthy slices.

    Returns
    -------
    Tensor, scalar
        1 if fluid is bright, -1 if it is dark: the sign of the third central moment.
    """
    values = torch.cat([batch.slices[batch.brain] for batch in batches]).double()
    return (values - values.mean()).pow(3).mean().sign()


@dataclass(frozen=True)
class IntensityHyper(Constrained):
    """Hyper-parameters of the baseline.

    Parameters
    ----------
    slices : int, default=256
        Number of slices from which the polarity of fluid is determined.
    modality : str, optional
        Modality of the scans, set by the training. Lesions are bright in FLAIR, where fluid is dark; in other
        modalities they are assumed to be bright if fluid is.
    """

    slices: Count = 256
    modality: Modality | None = None


class Intensity(Detector):
    """Intensity as score, inverted if lesions are dark.

    Parameters
    ----------
    hyper : IntensityHyper
        Hyper-parameters.
    """

    name: ClassVar[str] = "intensity"
    citation: ClassVar[str] = "meissen2022"
    presets: ClassVar[dict[str, IntensityHyper]] = {"lite": IntensityHyper()}

    def __init__(self, hyper: IntensityHyper) -> None:
        super().__init__(hyper)
        self.register_buffer("polarity", torch.ones(()))

    def stages(self) -> list[Stage]:
        """Return one stage, which fits the polarity."""
        return [FitStage("polarity", self.fit_polarity, slices=self.hyper.slices, batch_size=64)]

    def fit_polarity(self, batches: Iterator[Batch], generator: Generator) -> None:
        """Set the polarity of lesions: that of fluid in healthy slices, but bright in FLAIR."""
        fluid = fluid_polarity(batches)
        self.polarity.copy_(torch.ones(()) if self.hyper.modality == "FLAIR" else fluid)

    def score(self, slices: Tensor, brain: Tensor, generator: SliceGenerator) -> Tensor:
        """Return the intensity, or one minus the intensity if lesions are dark."""
        return torch.where(brain, torch.where(self.polarity > 0, slices, 1 - slices), 0.0)
