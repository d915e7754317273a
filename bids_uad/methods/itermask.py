"""IterMask: a mask over the anomaly that shrinks as long as what it hides can be foretold.

Liang et al. 2024 ("IterMask2: iterative unsupervised anomaly segmentation via spatial and frequency masking",
arXiv 2406.02422). One network restores a slice from the phase of its low frequencies and all of the high
ones. A second also sees the slice outside a mask, and fills the mask. Pixels filled well leave the mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from bids_uad.constraints import (
    Constrained,
    Count,
    Interval,
    NonNegative,
    Positive,
    Probability,
)
from bids_uad.methods.base import (
    BRAIN_FIELD,
    WHOLE_SLICE,
    Batch,
    Detector,
    FieldOfView,
    FitStage,
    GradientStage,
    Stage,
)
from bids_uad.networks.counter_rng import SliceGenerator
from bids_uad.networks.ddpmpp import (
    LITE_NETWORK,
    NETWORK,
    DDPMpp,
    DDPMppConfig,
    check_network,
)
from bids_uad.space import CROP

MAX_ROUNDS = 100  # a mask that loses a tenth each round is empty long before

UNET = replace(NETWORK, norm="batch", time_embedding=False, rescale=False)


@dataclass(frozen=True)
class IterMaskHyper(Constrained):
    """Hyper-parameters of IterMask.

    Parameters
    ----------
    network : DDPMppConfig
        Of both networks.
    radius : float
        Frequencies nearer to zero than this lose their magnitude, in cycles per 224 pixels.
    first_share : float
        Share of the brain under the first mask, worst restored pixels first.
    masked_share : float
        Share of the masked pixels of healthy slices whose error lies above the shrinking threshold.
    least_shrinkage : float
        A slice is done when its mask loses less than this share in a round.
    whole_brain : bool
        Score every pixel by the last filling, hidden or not, and slices that are done after one round by
        their own intensity, as published; otherwise score each pixel by the last filling that hid it.
    field_of_view : tuple of int
        Height and width of the part of a slice that is seen.
    threshold_slices : int
        Healthy slices that settle the shrinking threshold.
    steps, batch_size, learning_rate
        Training schedule of each network.
    """

    network: DDPMppConfig = UNET
    radius: NonNegative = 15.0
    first_share: Annotated[float, Interval(0, 1, closed="right")] = 0.6
    masked_share: Probability = 0.2
    least_shrinkage: Probability = 0.1
    whole_brain: bool = False
    field_of_view: FieldOfView = BRAIN_FIELD
    threshold_slices: Count = 2_000
    steps: Count = 100_000
    batch_size: Count = 128
    learning_rate: Positive = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_network(self, "field_of_view", time_embedding=False)


def frequency_condition(images: Tensor, radius: float) -> Tensor:
    """Set the magnitude of low frequencies to one and keep their phase.

    Parameters
    ----------
    images : Tensor, shape (B, 1, H, W)
    radius : float
        In cycles per 224 pixels, the bins of a whole slice; this radius included.

    Returns
    -------
    Tensor, shape (B, 1, H, W)
        Shape remains, intensity does not.
    """
    height, width = images.shape[-2:]
    spectrum = torch.fft.fft2(images)
    rows = torch.fft.fftfreq(height, 1 / CROP, device=images.device)[:, None]
    columns = torch.fft.fftfreq(width, 1 / CROP, device=images.device)[None]
    low = rows**2 + columns**2 <= radius**2
    phase = torch.polar(torch.ones_like(images), spectrum.angle())
    return torch.fft.ifft2(torch.where(low, phase, spectrum)).real


def worst_pixels(errors: Tensor, brain: Tensor, share: float) -> Tensor:
    """Mark the given share of each slice's brain pixels, largest errors first.

    Parameters
    ----------
    errors : Tensor, shape (B, 1, H, W)
        At least 0.
    brain : Tensor of bool, shape (B, 1, H, W)
    share : float

    Returns
    -------
    Tensor of bool, shape (B, 1, H, W)
    """
    kept = (share * brain.flatten(1).sum(1, keepdim=True)).long()
    falling = torch.where(brain, errors, -1.0).flatten(1).sort(1, descending=True).values
    limit = falling.gather(1, kept.clamp_max(falling.shape[1] - 1))
    return (errors > limit[:, :, None, None]) & brain


class IterMask(Detector):
    """Iterative shrinking of a mask.

    Parameters
    ----------
    hyper : IterMaskHyper
    """

    name: ClassVar[str] = "itermask"
    citation: ClassVar[str] = "itermask"
    presets: ClassVar[dict[str, IterMaskHyper]] = {
        "paper": IterMaskHyper(
            network=replace(UNET, causal=True), whole_brain=True, field_of_view=WHOLE_SLICE
        ),
        "default": IterMaskHyper(),
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
        """Two networks, then the error below which a pixel leaves the mask."""
        hyper = self.hyper
        return [
            GradientStage.scheduled("first", self.first, self.first_loss, hyper),
            GradientStage.scheduled("filler", self.filler, self.filler_loss, hyper),
            FitStage("threshold", self.fit_threshold, slices=hyper.threshold_slices, batch_size=16),
        ]

    def fill(self, images: Tensor, condition: Tensor, mask: Tensor, noise: Tensor) -> Tensor:
        """Fill the mask from what is around it and from the frequency condition.

        Parameters
        ----------
        images, condition, noise : Tensor, shape (B, 1, H, W)
            In [-3, 3] units.
        mask : Tensor of bool, shape (B, 1, H, W)

        Returns
        -------
        Tensor, shape (B, 1, H, W)
        """
        return self.filler(torch.cat([torch.where(mask, noise, images), condition], 1))

    def first_loss(self, batch: Batch, generator: Generator) -> Tensor:
        """Squared error of the slice restored from its frequency condition."""
        images = 6 * batch.slices - 3
        return (self.first(frequency_condition(images, self.hyper.radius)) - images).square().mean()

    def _masked_errors(self, batch: Batch, generator: Generator) -> tuple[Tensor, Tensor]:
        images = 6 * batch.slices - 3
        mask = clustered_squares(batch.brain, generator)
        noise = torch.randn(images.shape, generator=generator, device=images.device)
        filled = self.fill(images, frequency_condition(images, self.hyper.radius), mask, noise)
        return (filled - images).square(), mask

    def filler_loss(self, batch: Batch, generator: Generator) -> Tensor:
        """Squared error of the whole slice, part of it masked."""
        return self._masked_errors(batch, generator)[0].mean()

    def fit_threshold(self, batches: Iterator[Batch], generator: Generator) -> None:
        """Find the error that a fifth of the masked healthy pixels exceed."""
        pooled = []
        for batch in batches:
            errors, mask = self._masked_errors(batch, generator)
            pooled.append(errors[mask])
        values = torch.cat(pooled).sort().values
        self.threshold.copy_(values[int((1 - self.hyper.masked_share) * (len(values) - 1))])

    def score(self, slices: Tensor, brain: Tensor, generator: SliceGenerator) -> Tensor:
        """Squared residual of the filling, in [-3, 3] units.

        A slice leaves the batch as soon as its mask has stopped shrinking.
        """
        hyper = self.hyper
        images = 6 * slices - 3
        condition = frequency_condition(images, hyper.radius)
        errors = (images - self.first(condition)).square()
        mask = worst_pixels(errors, brain, hyper.first_share)
        # What is never hidden was foretold well from the start.
        scores = images.square() if hyper.whole_brain else errors.clamp_max(self.threshold)
        active = torch.arange(len(images), device=images.device)
        for turn in range(MAX_ROUNDS):
            seen, hidden = images[active], mask[active]
            noise = generator[active].normal(turn, *seen.shape[1:])
            residual = (seen - self.fill(seen, condition[active], hidden, noise)).square()
            wrong = hidden & (residual > self.threshold)
            before, after = hidden.flatten(1).sum(1), wrong.flatten(1).sum(1)
            going_on = (before - after >= hyper.least_shrinkage * before) & (before > 0)
            if not hyper.whole_brain:
                scores[active] = torch.where(hidden, residual, scores[active])
            elif turn:
                scores[active] = residual
            mask[active] = wrong
            active = active[going_on]
            if len(active) == 0:
                break
        return torch.where(brain, scores, 0.0)


COVARIANCE = (0.3, 10.0)
WIDE, NARROW = 0.1, 0.4  # pixel pitch of the wide and of the narrow cluster
MEDIUM_SQUARES, LARGE_SQUARES = (5, 10), (3, 10)


@dataclass(frozen=True)
class SquareSize:
    """Squares of one size: side in pixels, and the half-open range of their number for each image."""

    side: int
    low: float | Tensor
    high: float | Tensor


def clustered_squares(brain: Tensor, generator: Generator) -> Tensor:
    """Draw one mask per image: squares of three sizes around a random place, the smallest by far the most.

    Squares lie at pixels drawn from a Gaussian density inside the brain, with row and column from two draws,
    and reach to the right and down. Two images in three have a wide cluster of many squares, the third a
    narrow one of few.

    Parameters
    ----------
    brain : Tensor of bool, shape (B, 1, H, W)

    Returns
    -------
    Tensor of bool, shape (B, 1, H, W)
        Inside the brain.

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
    c11, c22 = uniform(*COVARIANCE), uniform(*COVARIANCE)
    extent = (c11 * c22).sqrt()
    # A correlation below 1 keeps the density proper.
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
        # Corners beyond an image's own number go to an extra cell that is cut off again.
        corners = torch.where(drawn, corners, height * width)
        hit = torch.zeros(batch, height * width + 1, device=device).scatter_(1, corners, 1.0)[:, :-1]
        spread = F.pad(hit.view(batch, 1, height, width), (size.side - 1, 0, size.side - 1, 0))
        mask |= F.max_pool2d(spread, size.side, stride=1) > 0
    return mask & brain
