"""ANDi: aggregated normative diffusion.

Frotscher et al. 2023 ("Unsupervised anomaly detection using aggregated normative diffusion",
arXiv 2312.01904). A diffusion model of healthy slices, trained on pyramid noise, denoises a slice from many
noise levels in one step each. Where it would move the slice elsewhere than the slice itself would, tissue is
not as it should be. The squared differences of the posterior means are aggregated by their geometric mean.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from torch import Generator, Tensor

from bids_uad.constraints import (
    Constrained,
    Count,
    Interval,
    NonNegative,
    Positive,
)
from bids_uad.methods.base import (
    BRAIN_FIELD,
    WHOLE_SLICE,
    Batch,
    Detector,
    FieldOfView,
    GradientStage,
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
FIRST, LAST = 125, 26  # thousandths, where the aggregation begins and ends


@dataclass(frozen=True)
class ANDiHyper(Constrained):
    """Hyper-parameters of ANDi.

    Parameters
    ----------
    network : DDPMppConfig
    time_scale : float
        Factor from time in [0, 1] to the network's time label.
    discount : float
        Weight of each coarser layer of the training noise.
    published_noise : bool
        The pyramid noise of the published code.
    stride : int
        Use every stride-th of the 100 noise levels. The geometric mean bears well with fewer.
    field_of_view : tuple of int
        Height and width of the part of a slice that is seen.
    residual_floor : float
        Least squared residual that enters the geometric mean, in [-1, 1] units. Without it, one level that
        restores a pixel exactly makes the pixel's score zero, whatever the others say.
    steps, batch_size, learning_rate
        Training schedule.
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

    def __post_init__(self) -> None:
        super().__post_init__()
        check_network(self, "field_of_view", time_embedding=True)


def noise_levels(stride: int) -> Tensor:
    """Times at which a slice is denoised, descending; shape (ceil(100 / stride),), float64."""
    return torch.arange(FIRST, LAST - 1, -stride, dtype=torch.float64) / STEPS


def aggregation_constant(times: Tensor) -> float:
    """Geometric mean of the squared transition weights, 6.644e-4 over the published levels.

    It is all that the posterior means add to the residuals: the difference of the means is the residual times
    a number that depends on the time alone, and the geometric mean takes such numbers out.
    """
    return float((2 * transition_weight(times, times - 1 / STEPS).log()).mean().exp())


class ANDi(Detector):
    """Aggregated normative diffusion.

    Parameters
    ----------
    hyper : ANDiHyper
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
        ),
        "default": ANDiHyper(),
        "lite": ANDiHyper(network=LITE_NETWORK, stride=10, steps=1_500, batch_size=8, learning_rate=1.5e-3),
    }

    def __init__(self, hyper: ANDiHyper) -> None:
        super().__init__(hyper)
        self.network = DDPMpp(hyper.network)
        self.predictor = NoisePredictor(self.network, hyper.time_scale)

    def stages(self) -> list[Stage]:
        """One network."""
        return [GradientStage.scheduled("denoising", self.network, self.loss, self.hyper)]

    def loss(self, batch: Batch, generator: Generator) -> Tensor:
        """Error of the predicted noise, at a time of each slice's own."""
        images = 2 * batch.slices - 1
        noise = pyramid_noise(images, self.hyper.discount, generator, published=self.hyper.published_noise)
        time = torch.rand(len(images), generator=generator, device=images.device)
        return self.predictor.loss(images, noise, time)

    def score(self, slices: Tensor, brain: Tensor, generator: SliceGenerator) -> Tensor:
        """Geometric mean over noise levels of the squared difference of the posterior means.

        Each level draws white noise of its own. The sum of logarithms runs along, so that memory does not
        grow with the number of levels.
        """
        x = 2 * slices - 1
        times = noise_levels(self.hyper.stride)
        total = torch.zeros_like(x)
        for time, alpha, sigma in zip(times, *signal_and_noise(times), strict=True):
            noise = generator.normal(round(float(time) * STEPS), *x.shape[1:])
            noised = float(alpha) * x + float(sigma) * noise
            restored, _ = self.predictor.denoise(noised, float(time))
            total += (x - restored).square().clamp_min(self.hyper.residual_floor).log()
        return torch.where(brain, aggregation_constant(times) * (total / len(times)).exp(), 0.0)
