"""IterMask: iterative shrinking of a mask by the error with which its content is restored.

Liang et al. 2024 ("IterMask2: iterative unsupervised anomaly segmentation via spatial and frequency masking",
arXiv 2406.02422). A first network restores a slice from its high frequencies and the phase of its low
frequencies; the pixels with the largest errors form the first mask. A second network fills the mask from the
surrounding pixels and the same frequencies. Pixels with a small error are removed from the mask, and the
masked pixels are filled again, until the mask hardly shrinks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from bids_uad.constraints import Constrained, Count, Interval, NonNegative, Positive, Probability
from bids_uad.methods.base import (
    BRAIN_FIELD,
    OPTIMISER,
    WHOLE_SLICE,
    Batch,
    Detector,
    FieldOfView,
    FitStage,
    GradientStage,
    OptimiserConfig,
    Stage,
)
from bids_uad.networks.counter_rng import SliceGenerator
from bids_uad.networks.ddpmpp import LITE_NETWORK, NETWORK, DDPMpp, DDPMppConfig, check_network
from bids_uad.space import CROP

MAX_ROUNDS = 100
"""Limit of the iterations; masks that lose a tenth per round are empty much earlier."""
UNET = replace(NETWORK, norm="batch", time_embedding=False, rescale=False)


@dataclass(frozen=True)
class IterMaskHyper(Constrained):
    """Hyper-parameters of IterMask.

    Parameters
    ----------
    network : DDPMppConfig
        Architecture of both networks.
    radius : float, default=15.0
        Frequencies below this radius, in cycles per 224 pixels, keep only their phase.
    initial_mask_fraction : float, default=0.6
        Fraction of the brain in the first mask, rounded up to whole pixels: those with the largest errors.
    error_tail_fraction : float, default=0.2
        Fraction of the masked pixels of healthy slices with an error above the threshold of the mask.
    min_shrinkage : float, default=0.1
        The iteration of a slice ends when its mask loses less than this fraction in a round.
    whole_brain : bool, default=False
        Whether to score, as published, all pixels by the last filling, and slices whose first mask leaves
        less than `min_shrinkage` of the brain unmasked by their squared intensity. If False, each pixel is
        scored by the last filling in which it was masked.
    field_of_view : tuple of int, default=(160, 192)
        Height and width in pixels of the part of a slice that is processed.
    threshold_slices : int, default=2000
        Number of healthy slices from which the threshold of the mask is computed.
    held_out_threshold : bool, default=False
        Whether these are slices of held-out subjects, as published, instead of training subjects.
    steps, batch_size, learning_rate : int, int, float, default=100000, 128, 1e-4
        Training schedule of each network: optimiser steps, slices per step, largest learning rate.
    optimiser : OptimiserConfig
        Learning-rate schedule, averaging of weights and clipping of gradients.
    """

    network: DDPMppConfig = UNET
    radius: NonNegative = 15.0
    initial_mask_fraction: Annotated[float, Interval(0, 1, closed="right")] = 0.6
    error_tail_fraction: Probability = 0.2
    min_shrinkage: Probability = 0.1
    whole_brain: bool = False
    field_of_view: FieldOfView = BRAIN_FIELD
    threshold_slices: Count = 2_000
    held_out_threshold: bool = False
    steps: Count = 100_000
    batch_size: Count = 128
    learning_rate: Positive = 1e-4
    optimiser: OptimiserConfig = OPTIMISER

    renamed_fields: ClassVar[dict[str, str]] = {
        "first_share": "initial_mask_fraction",
        "masked_share": "error_tail_fraction",
        "least_shrinkage": "min_shrinkage",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_network(self, "field_of_view", time_embedding=False)


def frequency_condition(images: Tensor, radius: float) -> Tensor:
    """Set the magnitude of low frequencies to one and keep their phase.

    Parameters
    ----------
    images : Tensor, shape (B, 1, H, W)
        Slices.
    radius : float
        Radius of the disc of low frequencies, in cycles per 224 pixels; its border is not part of it.

    Returns
    -------
    Tensor, shape (B, 1, H, W)
        Slices whose edges are kept and whose regional intensities are lost.
    """
    height, width = images.shape[-2:]
    spectrum = torch.fft.fft2(images)
    rows = torch.fft.fftfreq(height, 1 / CROP, device=images.device)[:, None]
    columns = torch.fft.fftfreq(width, 1 / CROP, device=images.device)[None]
    low = rows**2 + columns**2 < radius**2
    angle = spectrum[..., low].angle()
    spectrum[..., low] = torch.polar(torch.ones_like(angle), angle)
    return torch.fft.ifft2(spectrum).real


def worst_pixels(errors: Tensor, brain: Tensor, fraction: float) -> Tensor:
    """Select the given fraction of the brain pixels of each slice with the largest errors.

    Parameters
    ----------
    errors : Tensor, shape (B, 1, H, W)
        Errors, at least 0.
    brain : Tensor of bool, shape (B, 1, H, W)
        Brain masks.
    fraction : float
        Fraction in (0, 1]; the number of pixels is rounded up.

    Returns
    -------
    Tensor of bool, shape (B, 1, H, W)
        Selected pixels.
    """
    selected = torch.zeros_like(brain)
    for chosen, error, inside in zip(selected, errors, brain, strict=True):
        values = error[inside]
        # The largest error that is not selected.
        rank = len(values) - math.ceil(fraction * len(values))
        chosen |= inside & (error > values.kthvalue(rank).values) if rank else inside
    return selected


class IterMask(Detector):
    """Iterative shrinking of a mask.

    Parameters
    ----------
    hyper : IterMaskHyper
        Hyper-parameters.
    """

    name: ClassVar[str] = "itermask"
    citation: ClassVar[str] = "itermask"
    presets: ClassVar[dict[str, IterMaskHyper]] = {
        "paper": IterMaskHyper(
            network=replace(UNET, causal=True),
            whole_brain=True,
            field_of_view=WHOLE_SLICE,
            held_out_threshold=True,
            optimiser=OptimiserConfig("constant", ema_decay=0.9999, clip_norm=None),
        ),
        "default": IterMaskHyper(held_out_threshold=True),
        "lite": IterMaskHyper(
            network=replace(LITE_NETWORK, width=16, norm="batch", time_embedding=False, rescale=False),
            threshold_slices=256,
            steps=800,
            batch_size=8,
            learning_rate=2e-3,
        ),
    }

    def __init__(self, hyper: IterMaskHyper) -> None:
        super().__init__(hyper)
        self.first = DDPMpp(hyper.network)
        self.filler = DDPMpp(hyper.network, inputs=2)
        self.register_buffer("threshold", torch.zeros(()))

    def stages(self) -> list[Stage]:
        """Train both networks, then compute the error below which a pixel leaves the mask."""
        hyper = self.hyper
        return [
            GradientStage.scheduled("first", self.first, self.first_loss, hyper),
            GradientStage.scheduled("filler", self.filler, self.filler_loss, hyper),
            FitStage(
                "threshold",
                self.fit_threshold,
                slices=hyper.threshold_slices,
                batch_size=16,
                held_out=hyper.held_out_threshold,
            ),
        ]

    def fill(self, images: Tensor, condition: Tensor, mask: Tensor, noise: Tensor) -> Tensor:
        """Fill the mask from the surrounding pixels and the frequency condition.

        Parameters
        ----------
        images : Tensor, shape (B, 1, H, W)
            Slices, intensities in [-3, 3].
        condition : Tensor, shape (B, 1, H, W)
            Result of :func:`frequency_condition`.
        mask : Tensor of bool, shape (B, 1, H, W)
            Pixels that are replaced by noise in the input.
        noise : Tensor, shape (B, 1, H, W)
            Standard normal numbers.

        Returns
        -------
        Tensor, shape (B, 1, H, W)
            Restored slices, intensities in [-3, 3].
        """
        return self.filler(torch.cat([torch.where(mask, noise, images), condition], 1))

    def first_loss(self, batch: Batch, generator: Generator) -> Tensor:
        """Compute the mean squared error of slices restored from their frequency condition."""
        images = 6 * batch.slices - 3
        return (self.first(frequency_condition(images, self.hyper.radius)) - images).square().mean()

    def _masked_errors(self, batch: Batch, generator: Generator) -> tuple[Tensor, Tensor]:
        """Return squared errors and mask of slices with a random mask, both (B, 1, H, W)."""
        images = 6 * batch.slices - 3
        mask = clustered_squares(batch.brain, generator)
        noise = torch.randn(images.shape, generator=generator, device=images.device)
        filled = self.fill(images, frequency_condition(images, self.hyper.radius), mask, noise)
        return (filled - images).square(), mask

    def filler_loss(self, batch: Batch, generator: Generator) -> Tensor:
        """Compute the mean squared error of partly masked slices, over all pixels."""
        return self._masked_errors(batch, generator)[0].mean()

    def fit_threshold(self, batches: Iterator[Batch], generator: Generator) -> None:
        """Compute the error that `error_tail_fraction` of the masked healthy pixels exceed."""
        pooled = []
        for batch in batches:
            errors, mask = self._masked_errors(batch, generator)
            pooled.append(errors[mask])
        values = torch.cat(pooled).sort().values
        self.threshold.copy_(values[int((1 - self.hyper.error_tail_fraction) * (len(values) - 1))])

    def score(self, slices: Tensor, brain: Tensor, generator: SliceGenerator) -> Tensor:
        """Compute the squared error of the filling, intensities in [-3, 3].

        Slices whose mask has stopped shrinking are removed from the batch.
        """
        hyper = self.hyper
        images = 6 * slices - 3
        condition = frequency_condition(images, hyper.radius)
        errors = (images - self.first(condition)).square()
        mask = worst_pixels(errors, brain, hyper.initial_mask_fraction)
        # Pixels that are never masked have a small error of the first network.
        scores = images.square() if hyper.whole_brain else errors.clamp_max(self.threshold)
        active = torch.arange(len(images), device=images.device)
        if hyper.whole_brain:
            active = active[self._shrinks(brain, mask)]
        for round_ in range(MAX_ROUNDS):
            if len(active) == 0:
                break
            current, hidden = images[active], mask[active]
            noise = generator[active].normal(round_, *current.shape[1:])
            residual = (current - self.fill(current, condition[active], hidden, noise)).square()
            wrong = hidden & (residual > self.threshold)
            scored = torch.ones_like(hidden) if hyper.whole_brain else hidden
            scores[active] = torch.where(scored, residual, scores[active])
            mask[active] = wrong
            active = active[self._shrinks(hidden, wrong)]
        return torch.where(brain, scores, 0.0)

    def _shrinks(self, before: Tensor, after: Tensor) -> Tensor:
        """Return which masks lose enough of their pixels, shape (B,); an empty mask does not."""
        pixels, left = before.flatten(1).sum(1), after.flatten(1).sum(1)
        return (pixels - left >= self.hyper.min_shrinkage * pixels) & (pixels > 0)


VARIANCE = (0.3, 10.0)
"""Range of the variances of a cluster of squares."""
WIDE, NARROW = 0.1, 0.4
"""Units of the Gaussian density per pixel, for wide and narrow clusters."""
MEDIUM_SQUARES, LARGE_SQUARES = (5, 10), (3, 10)
"""Half-open ranges of the number of squares of 8 and 16 pixels."""


@dataclass(frozen=True)
class SquareSize:
    """Side in pixels of one size of squares, and the half-open range of their number for each image."""

    side: int
    low: float | Tensor
    high: float | Tensor


def clustered_squares(brain: Tensor, generator: Generator) -> Tensor:
    """Draw one mask per image: a cluster of squares of three sizes, most of them of the smallest size.

    The upper left corners are drawn from a Gaussian density around a random brain pixel, rows and columns in
    two independent draws. Two thirds of the images have a wide cluster of many squares, the others a narrow
    cluster of few.

    Parameters
    ----------
    brain : Tensor of bool, shape (B, 1, H, W)
        Brain masks.
    generator : torch.Generator
        Draws clusters and squares.

    Returns
    -------
    Tensor of bool, shape (B, 1, H, W)
        Masks inside the brain.

    References
    ----------
    Liang et al. 2024, "IterMask2: iterative unsupervised anomaly segmentation via spatial and frequency
    masking"; sizes and numbers of the published code.
    """
    batch, _, height, width = brain.shape
    device = brain.device

    def uniform(low: float | Tensor, high: float | Tensor) -> Tensor:
        return low + (high - low) * torch.rand(batch, generator=generator, device=device)

    narrow = torch.randint(0, 3, (batch,), generator=generator, device=device) == 2
    c11, c22 = uniform(*VARIANCE), uniform(*VARIANCE)
    extent = (c11 * c22).sqrt()
    # A correlation below 1 keeps the covariance matrix positive definite.
    sign = torch.randint(0, 2, (batch,), generator=generator, device=device) * 2 - 1
    c12 = sign * uniform(0.0, 0.99 * extent)

    weights = brain.flatten(1).float()
    weights = torch.where(weights.any(1, keepdim=True), weights, torch.ones_like(weights))
    centre = torch.multinomial(weights, 1, generator=generator)
    pitch = torch.where(narrow, NARROW, WIDE)[:, None]
    index = torch.arange(height * width, device=device)[None]
    rows = (index // width - centre // width) * pitch
    columns = (index % width - centre % width) * pitch
    # Mahalanobis distance with the inverse of [[c11, c12], [c12, c22]].
    quadratic = c22[:, None] * rows**2 - 2 * c12[:, None] * rows * columns + c11[:, None] * columns**2
    quadratic = quadratic / (c11 * c22 - c12**2)[:, None]
    density = weights * torch.exp(-0.5 * quadratic)

    sizes = (
        SquareSize(4, torch.where(narrow, 5.0, 100.0) * extent, torch.where(narrow, 20.0, 200.0) * extent),
        SquareSize(8, *MEDIUM_SQUARES),
        SquareSize(16, *LARGE_SQUARES),
    )
    mask = torch.zeros_like(brain)
    for size in sizes:
        count = uniform(size.low, size.high).floor()
        most = max(1, int(count.max()))
        row, column = (
            torch.multinomial(density, most, replacement=True, generator=generator) for _ in range(2)
        )
        corners = row // width * width + column % width
        drawn = torch.arange(most, device=device)[None] < count[:, None]
        # Surplus corners of an image go to an extra cell, which is removed.
        corners = torch.where(drawn, corners, height * width)
        hit = torch.zeros(batch, height * width + 1, device=device).scatter_(1, corners, 1.0)[:, :-1]
        spread = F.pad(hit.view(batch, 1, height, width), (size.side - 1, 0, size.side - 1, 0))
        mask |= F.max_pool2d(spread, size.side, stride=1) > 0
    return mask & brain
