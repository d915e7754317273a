"""ANDi: aggregated normative diffusion.

Frotscher et al. 2023 ("Unsupervised anomaly detection using aggregated normative diffusion",
arXiv 2312.01904). A diffusion model of healthy slices, trained on pyramid noise, denoises a slice from many
noise levels in one step each. At each level, the posterior mean given the denoised slice is compared with the
posterior mean given the slice itself; the score is the geometric mean of the squared differences over levels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from torch import Generator, Tensor

from bids_uad.constraints import Constrained, Count, Interval, NonNegative, Positive
from bids_uad.methods.base import (
    BRAIN_FIELD,
    OPTIMISER,
    WHOLE_SLICE,
    Batch,
    Detector,
    FieldOfView,
    GradientStage,
    OptimiserConfig,
    Stage,
)
from bids_uad.networks.counter_rng import SliceGenerator
from bids_uad.networks.ddpmpp import (
    LITE_NETWORK,
    NETWORK,
    DDPMpp,
    DDPMppConfig,
    NoisePredictor,
    check_network,
    pyramid_noise,
    signal_and_noise,
    transition_weight,
)

STEPS = 1000
"""Time steps of the diffusion."""
FIRST, LAST = 125, 26
"""First and last time step of the aggregation, which runs backwards in time."""


@dataclass(frozen=True)
class ANDiHyper(Constrained):
    """Hyper-parameters of ANDi.

    Parameters
    ----------
    network : DDPMppConfig
        Network that predicts the velocity.
    time_scale : float, default=1000.0
        Factor from the diffusion time in [0, 1] to the time label of the network.
    discount : float, default=0.9
        Weight of each coarser layer of the pyramid noise in training.
    published_noise : bool, default=False
        Whether to draw pyramid noise as in the published code, see
        :func:`bids_uad.networks.ddpmpp.layered_noise`.
    stride : int, default=1
        Only every stride-th of the 100 noise levels is used.
    field_of_view : tuple of int, default=(160, 192)
        Height and width in pixels of the part of a slice that is processed.
    residual_floor : float, default=1e-8
        Smallest squared residual in the geometric mean (image range -1 to 1). Without it, the score of a
        pixel is 0 if one level restores it exactly.
    steps, batch_size, learning_rate : int, int, float, default=50000, 128, 1e-4
        Training schedule: optimiser steps, slices per step, largest learning rate.
    optimiser : OptimiserConfig
        Learning-rate schedule, averaging of weights and clipping of gradients.
    """

    network: DDPMppConfig = NETWORK
    time_scale: Positive = 1000.0
    discount: NonNegative = 0.9
    published_noise: bool = False
    stride: Annotated[int, Interval(1, FIRST - LAST + 1)] = 1
    field_of_view: FieldOfView = BRAIN_FIELD
    residual_floor: NonNegative = 1e-8
    steps: Count = 50_000
    batch_size: Count = 128
    learning_rate: Positive = 1e-4
    optimiser: OptimiserConfig = OPTIMISER

    def __post_init__(self) -> None:
        super().__post_init__()
        check_network(self, "field_of_view", time_embedding=True)


def noise_levels(stride: int) -> Tensor:
    """Return the times at which a slice is denoised, descending, shape (ceil(100 / stride),), float64."""
    return torch.arange(FIRST, LAST - 1, -stride, dtype=torch.float64) / STEPS


def aggregation_constant(times: Tensor) -> float:
    """Compute the geometric mean of the squared transition weights, 6.644e-4 for the published levels.

    The difference of two posterior means is the residual times a weight that depends on time only, so the
    weights can be taken out of the geometric mean of the squared differences.

    Parameters
    ----------
    times : Tensor, shape (T,)
        Times from :func:`noise_levels`.

    Returns
    -------
    float
        Factor of the score.
    """
    return float((2 * transition_weight(times, times - 1 / STEPS).log()).mean().exp())


class ANDi(Detector):
    """Aggregated normative diffusion.

    Parameters
    ----------
    hyper : ANDiHyper
        Hyper-parameters.
    """

    name: ClassVar[str] = "andi"
    citation: ClassVar[str] = "andi"
    presets: ClassVar[dict[str, ANDiHyper]] = {
        "paper": ANDiHyper(
            network=replace(NETWORK, causal=True, activate_second=False),
            time_scale=1.0,
            published_noise=True,
            field_of_view=WHOLE_SLICE,
            residual_floor=0.0,
            steps=15_000,
            optimiser=OptimiserConfig("constant", ema_decay=0.9999, clip_norm=None),
        ),
        "default": ANDiHyper(),
        "lite": ANDiHyper(network=LITE_NETWORK, stride=10, steps=1_500, batch_size=8, learning_rate=1.5e-3),
    }

    def __init__(self, hyper: ANDiHyper) -> None:
        super().__init__(hyper)
        self.network = DDPMpp(hyper.network)
        self.predictor = NoisePredictor(self.network, hyper.time_scale)

    def stages(self) -> list[Stage]:
        """Return one stage, which trains the network."""
        return [GradientStage.scheduled("denoising", self.network, self.loss, self.hyper)]

    def loss(self, batch: Batch, generator: Generator) -> Tensor:
        """Compute the mean squared error of the predicted noise, at a random time for each slice."""
        images = 2 * batch.slices - 1
        noise = pyramid_noise(images, self.hyper.discount, generator, published=self.hyper.published_noise)
        time = torch.rand(len(images), generator=generator, device=images.device)
        return self.predictor.loss(images, noise, time)

    def score(self, slices: Tensor, brain: Tensor, generator: SliceGenerator) -> Tensor:
        """Compute the geometric mean over noise levels of the squared difference of the posterior means.

        Each level has its own white noise. Logarithms are summed level by level, in constant memory.
        """
        x = 2 * slices - 1
        times = noise_levels(self.hyper.stride)
        total = torch.zeros_like(x)
        for time, alpha, sigma in zip(times, *signal_and_noise(times), strict=True):
            noise = generator.normal(round(float(time) * STEPS), *x.shape[1:])
            noised = noise.mul_(float(sigma)).add_(x, alpha=float(alpha))
            residual = self.predictor.restore(noised, float(time)).sub_(x)
            total += residual.square_().clamp_min_(self.hyper.residual_floor).log_()
        return torch.where(brain, aggregation_constant(times) * (total / len(times)).exp(), 0.0)
