"""PLS: painted-lesion segmentation, the default detector.

A network is trained to segment synthetic lesions that are painted into healthy scans, and is then applied
to real scans. The idea is that of foreign patch interpolation (Tan et al. 2022, "Detecting outliers with
foreign patch interpolation", first published in 2020), where a network predicts how strongly a patch of
another image was blended in, and of DRAEM (Zavrtanik et al. 2021, "DRAEM: a discriminatively trained
reconstruction embedding for surface anomaly detection"), which segments painted textures. Here the lesions
imitate tumours, strokes and white matter lesions in three dimensions (:mod:`bids_uad.methods.pls.painting`).
The input of the network is a slice with its neighbours and its place in the atlas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from bids_uad.constraints import Constrained, Count, CountOrZero, NonNegative, Positive, Probability
from bids_uad.methods.base import (
    BRAIN_FIELD,
    Detector,
    FieldOfView,
    GradientStage,
    PaintedBatch,
    PaintedScan,
    Scan,
    Stage,
)
from bids_uad.methods.pls.painting import PaintingConfig, paint_scan, prior_slices
from bids_uad.networks.counter_rng import SliceGenerator
from bids_uad.networks.ddpmpp import LITE_NETWORK, SEGMENTATION_NETWORK, DDPMpp, DDPMppConfig, check_network
from bids_uad.networks.synthetic_anomalies import uniform, vary_intensities
from bids_uad.space import CROP, SHAPE, TISSUES

MIDLINE = (CROP - 1) / 2
"""Row of the midline in a cropped slice, since the built-in atlas is symmetric about that of the grid."""
UP_SCALE = 75
"""Slices per unit of the coordinate towards the top."""
PLACE_CHANNELS = 3 + len(TISSUES)
"""Coordinates along three axes, and tissue priors."""


@dataclass(frozen=True)
class PLSHyper(Constrained):
    """Hyper-parameters of PLS.

    Parameters
    ----------
    network : DDPMppConfig
        Segmentation network.
    field_of_view : tuple of int, default=(160, 192)
        Height and width in pixels of the input, which is part of a slice.
    neighbours : int, default=2
        Neighbouring slices on each side in the input.
    place : bool, default=True
        Whether the input includes atlas coordinates and tissue priors.
    place_dropout : float, default=0.15
        Probability that coordinates and tissue priors of a training slice are left out.
    painting : PaintingConfig
        Training scans.
    intensity : float, default=0.5
        Probability of each change of brightness, gamma, noise and sharpness of a training slice.
    fine_bias_strength : float, default=0.06
        Largest standard deviation of the logarithm of a multiplicative field with about 8 periods per
        side, which is applied in addition to a coarse bias field.
    tversky_weight : float, default=0.0
        Weight of the Tversky loss (Salehi et al. 2017) beside the binary cross-entropy.
    slice_smoothing : float, default=0.0
        Standard deviation in mm of the Gaussian that smooths the anomaly map across slices; 0 is none.
    steps : int, default=3000
        Optimiser steps.
    batch_size : int, default=8
        Slices per step.
    learning_rate : float, default=1e-3
        Initial learning rate.
    """

    network: DDPMppConfig = field(default_factory=lambda: replace(LITE_NETWORK, time_embedding=False))
    field_of_view: FieldOfView = BRAIN_FIELD
    neighbours: CountOrZero = 2
    place: bool = True
    place_dropout: Probability = 0.15
    painting: PaintingConfig = field(default_factory=PaintingConfig)
    intensity: Probability = 0.5
    fine_bias_strength: NonNegative = 0.06
    tversky_weight: NonNegative = 0.0
    slice_smoothing: NonNegative = 0.0
    steps: Count = 3_000
    batch_size: Count = 8
    learning_rate: Positive = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_network(self, "field_of_view", time_embedding=False)

    @property
    def intensity_channels(self) -> int:
        """Number of input channels that are intensities: the slice and its neighbours."""
        return 2 * self.neighbours + 1


class PLS(Detector):
    """Painted-lesion segmentation.

    Parameters
    ----------
    hyper : PLSHyper
        Hyper-parameters.

    Attributes
    ----------
    shapes : list of Tensor of bool, default=[]
        Shapes of real lesions that synthetic ones may have, see
        :func:`bids_uad.simulation.shapes.component_shapes`.
    """

    name: ClassVar[str] = "pls"
    citation: ClassVar[str] = "fpi"
    presets: ClassVar[dict[str, PLSHyper]] = {
        "default": PLSHyper(
            network=SEGMENTATION_NETWORK,
            slice_smoothing=1.0,
            steps=4_000,
        ),
        "lite": PLSHyper(
            network=replace(SEGMENTATION_NETWORK, width=12, multipliers=(1, 2, 4, 8), blocks=(0, 1, 1, 1)),
            slice_smoothing=1.0,
        ),
    }

    def __init__(self, hyper: PLSHyper) -> None:
        super().__init__(hyper)
        self.network = DDPMpp(hyper.network, hyper.intensity_channels + PLACE_CHANNELS * hyper.place)
        self.shapes: list[Tensor] = []

    def continue_from(self, weights: Mapping[str, Tensor]) -> None:
        """Copy the weights of a trained network, whose input is the same or a single slice.

        In the latter case, the weights of all other input channels are 0, so that the scores are the same.

        Parameters
        ----------
        weights : mapping of str to Tensor
            Tensors of a bundle.

        Raises
        ------
        KeyError
            If the first layer is missing.
        RuntimeError
            If another tensor is missing, or one has another shape.
        """
        prefix = "network."
        own = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        channels = self.hyper.network.fold**2  # of a single slice
        if own["enter.weight"].shape[1] == channels:
            before = self.hyper.neighbours * channels
            after = self.network.enter.in_channels - channels - before
            own["enter.weight"] = F.pad(own["enter.weight"], (0, 0, 0, 0, before, after))
        self.network.load_state_dict(own)

    def stages(self) -> list[Stage]:
        """Return one stage, which trains the network on painted scans."""
        return [
            GradientStage.scheduled("segmentation", self.network, self.loss, self.hyper, paint=self.paint)
        ]

    def paint(self, scan: Scan, generator: Generator) -> PaintedScan:
        """Paint synthetic lesions into a healthy scan.

        Parameters
        ----------
        scan : Scan
            Healthy scan.
        generator : torch.Generator
            Draws lesions and variation.

        Returns
        -------
        PaintedScan
            See :func:`paint_scan`.
        """
        return paint_scan(scan, self.hyper.painting, generator, self.shapes)

    def inputs(self, slices: Tensor, numbers: Sequence[int], rows: slice, columns: slice) -> Tensor:
        """Return the input channels of some slices of a scan.

        Parameters
        ----------
        slices, numbers, rows, columns
            As of :meth:`Detector.inputs`.

        Returns
        -------
        Tensor, shape (len(numbers), C, h, w)
            Intensities of the slice and its neighbours from below to above, where the first and last slice of
            the volume are repeated; then the distance from the midline, the coordinates towards the back and
            the top, and the tissue priors.
        """
        index = torch.tensor(list(numbers))
        steps = torch.arange(-self.hyper.neighbours, self.hyper.neighbours + 1)
        around = (index[:, None] + steps).clamp(0, len(slices) - 1)
        channels = [slices[:, rows, columns][around]]
        if self.hyper.place:
            channels += [_coordinates(index, rows, columns)]
            channels += [prior_slices()[:, index, rows, columns].movedim(0, 1).float()]
        return torch.cat(channels, 1)

    def logits(self, batch: PaintedBatch, generator: Generator) -> Tensor:
        """Apply the network to slices of painted scans, of which contrast and bias field are varied.

        They are varied after the lesions are painted, so that lesion and healthy tissue are affected alike.

        Parameters
        ----------
        batch : PaintedBatch
            Slices of painted scans.
        generator : torch.Generator
            Random numbers of the intensity changes.

        Returns
        -------
        Tensor, shape (B, 1, h, w)
            Logits of the lesion probability.
        """
        hyper, inputs = self.hyper, batch.inputs
        count = hyper.intensity_channels
        clean = inputs[:, :count]
        intensities = vary_intensities(clean, hyper.intensity, hyper.fine_bias_strength, generator)
        kept = uniform((len(inputs), 1, 1, 1), 0.0, 1.0, generator) >= hyper.place_dropout
        return self.network(torch.cat([2 * intensities * (clean > 0) - 1, inputs[:, count:] * kept], 1))

    def loss(self, batch: PaintedBatch, generator: Generator) -> Tensor:
        """Compute the weighted binary cross-entropy with the target, and the Tversky loss if it has a weight.

        Parameters
        ----------
        batch, generator
            As of :meth:`logits`.

        Returns
        -------
        Tensor, scalar
            The loss.
        """
        logits = self.logits(batch, generator)
        loss = weighted_cross_entropy(logits, batch.target, batch.weight)
        if self.hyper.tversky_weight:
            loss = loss + self.hyper.tversky_weight * tversky_loss(
                logits.sigmoid(), batch.target, batch.weight > 0
            )
        return loss

    def score(self, slices: Tensor, brain: Tensor, generator: SliceGenerator) -> Tensor:
        """Predict the lesion probability, the mean over a slice and its left-right mirror image.

        If the map is smoothed across slices, only the mirror image of every second slice is processed, and
        smoothing takes the mean, at half the cost. Slices are numbered by their coordinates.
        """
        if self.hyper.place and self.hyper.slice_smoothing:
            numbers = _slice_numbers(slices[:, self.hyper.intensity_channels :])
            odd = numbers[:, None, None, None] % 2 == 1
            found = self.predict(torch.where(odd, slices.flip(-2), slices))
            return torch.where(brain, torch.where(odd, found.flip(-2), found), 0.0)
        straight = self.predict(slices)
        mirrored = self.predict(slices.flip(-2)).flip(-2)
        return torch.where(brain, (straight + mirrored) / 2, 0.0)

    def predict(self, slices: Tensor) -> Tensor:
        """Predict the lesion probability of slices, without their mirror images.

        Parameters
        ----------
        slices : Tensor, shape (B, C, h, w)
            Input channels, see :meth:`inputs`.

        Returns
        -------
        Tensor, shape (B, 1, h, w)
            Probabilities, also outside the brain.
        """
        count = self.hyper.intensity_channels
        return self.network(torch.cat([2 * slices[:, :count] - 1, slices[:, count:]], 1)).sigmoid()


def _coordinates(index: Tensor, rows: slice, columns: slice) -> Tensor:
    """Return coordinates of the pixels of some slices, from about -1 to 1, shape (len(index), 3, h, w)."""
    row, column = torch.arange(CROP)[rows, None], torch.arange(CROP)[columns]
    across, along = (row - MIDLINE).abs() / 70, (column - CROP / 2) / 90
    up = ((index - SHAPE[2] / 2) / UP_SCALE)[:, None, None]
    return torch.stack(torch.broadcast_tensors(across, along, up), 1)


def _slice_numbers(coordinates: Tensor) -> Tensor:
    """Return the numbers of the slices that have the given coordinates, shape (len(coordinates),)."""
    return (UP_SCALE * coordinates[:, 2, 0, 0] + SHAPE[2] / 2).round()


def weighted_cross_entropy(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Return the weighted mean of the binary cross-entropy, a scalar; all arguments have the same shape."""
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (loss * weight).sum() / weight.sum().clamp_min(1)


def tversky_loss(predicted: Tensor, target: Tensor, brain: Tensor, missed: float = 0.7) -> Tensor:
    """Compute one minus the Tversky index (Salehi et al. 2017) of a batch, with soft predictions.

    Parameters
    ----------
    predicted, target : Tensor, shape (B, 1, H, W)
        Probabilities.
    brain : Tensor of bool, shape (B, 1, H, W)
        Pixels that are compared.
    missed : float, default=0.7
        Weight of false negatives; false positives have one minus this weight.

    Returns
    -------
    Tensor, scalar
        Loss in [0, 1].
    """
    predicted, target = predicted * brain, target * brain
    hit = (predicted * target).sum()
    false_negative = ((1 - predicted) * target).sum()
    false_positive = (predicted * (1 - target)).sum()
    return 1 - (hit + 1) / (hit + missed * false_negative + (1 - missed) * false_positive + 1)
