"""DDPM++ (partial): partial diffusion with the DDPM++ network, a baseline of the diffusion detectors.

A slice is noised up to an intermediate time and denoised by a diffusion model of healthy slices; the score
is the reconstruction error (Wyatt et al. 2022, "AnoDDPM: anomaly detection with denoising diffusion
probabilistic models using simplex noise"). Network, loss and noise schedule are those of ANDi, so that the
two detectors differ only in their score. The published benchmark uses DDPM++ as a network only.
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
    layered_noise,
    pyramid_noise,
    signal_and_noise,
)

SCORING_RATIO = 3.0
"""Ratio of the sizes of successive layers of pyramid noise in scoring; drawn from 2 to 4 in training."""


@dataclass(frozen=True)
class PartialDiffusionHyper(Constrained):
    """Hyper-parameters of partial diffusion.

    Parameters
    ----------
    network : DDPMppConfig
        Network that predicts the velocity.
    time_scale : float, default=1000.0
        Factor from the diffusion time in [0, 1] to the time label of the network.
    discount : float, default=0.0
        Weight of each coarser layer of pyramid noise, in training and scoring; 0 is white noise.
    start : float, default=0.25
        Diffusion time up to which a slice is noised, in (0, 1].
    denoising_steps : int, default=10
        Deterministic steps from `start` back to the image.
    field_of_view : tuple of int, default=(160, 192)
        Height and width in pixels of the part of a slice that is processed.
    steps, batch_size, learning_rate : int, int, float, default=50000, 128, 1e-4
        Training schedule: optimiser steps, slices per step, largest learning rate.
    optimiser : OptimiserConfig
        Learning-rate schedule, averaging of weights and clipping of gradients.
    """

    network: DDPMppConfig = NETWORK
    time_scale: Positive = 1000.0
    discount: NonNegative = 0.0
    start: Annotated[float, Interval(0, 1, closed="right")] = 0.25
    denoising_steps: Count = 10
    field_of_view: FieldOfView = BRAIN_FIELD
    steps: Count = 50_000
    batch_size: Count = 128
    learning_rate: Positive = 1e-4
    optimiser: OptimiserConfig = OPTIMISER

    def __post_init__(self) -> None:
        super().__post_init__()
        check_network(self, "field_of_view", time_embedding=True)


class PartialDiffusion(Detector):
    """Partial diffusion with a DDPM++ network.

    Parameters
    ----------
    hyper : PartialDiffusionHyper
        Hyper-parameters.
    """

    name: ClassVar[str] = "ddpmpp"
    citation: ClassVar[str] = "anoddpm"
    presets: ClassVar[dict[str, PartialDiffusionHyper]] = {
        "paper": PartialDiffusionHyper(
            network=replace(NETWORK, causal=True, activate_second=False),
            time_scale=1.0,
            field_of_view=WHOLE_SLICE,
            steps=15_000,
            optimiser=OptimiserConfig("constant", ema_decay=0.9999, clip_norm=None),
        ),
        "default": PartialDiffusionHyper(),
        "lite": PartialDiffusionHyper(
            network=LITE_NETWORK,
            # After a short training, one long step restores better than several short ones.
            start=0.4,
            denoising_steps=1,
            steps=1_500,
            batch_size=8,
            learning_rate=1.5e-3,
        ),
    }

    def __init__(self, hyper: PartialDiffusionHyper) -> None:
        super().__init__(hyper)
        self.network = DDPMpp(hyper.network)
        self.predictor = NoisePredictor(self.network, hyper.time_scale)

    def stages(self) -> list[Stage]:
        """Return one stage, which trains the network."""
        return [GradientStage.scheduled("denoising", self.network, self.loss, self.hyper)]

    def loss(self, batch: Batch, generator: Generator) -> Tensor:
        """Compute the mean squared error of the predicted noise, at a random time for each slice."""
        images = 2 * batch.slices - 1
        if self.hyper.discount:
            noise = pyramid_noise(images, self.hyper.discount, generator, published=False)
        else:
            noise = torch.randn(images.shape, generator=generator, device=images.device)
        time = torch.rand(len(images), generator=generator, device=images.device)
        return self.predictor.loss(images, noise, time)

    def _slice_noise(self, size: tuple[int, int], generator: SliceGenerator) -> Tensor:
        """Draw noise of the kind used in training, shape (B, 1, *size)."""

        def white(number: int, size: tuple[int, int]) -> Tensor:
            return generator.normal(number, 1, *size)

        if not self.hyper.discount:
            return white(0, size)
        return layered_noise(white, size, self.hyper.discount, lambda: SCORING_RATIO)

    def restore(self, slices: Tensor, generator: SliceGenerator) -> Tensor:
        """Noise slices and denoise them by deterministic steps (DDIM, Song et al. 2020, arXiv 2010.02502).

        Parameters
        ----------
        slices : Tensor, shape (B, 1, H, W)
            Slices, intensities in [-1, 1].
        generator : SliceGenerator
            Random numbers of the noise.

        Returns
        -------
        Tensor, shape (B, 1, H, W)
            Restored slices, intensities in [-1, 1].
        """
        times = torch.linspace(self.hyper.start, 0, self.hyper.denoising_steps + 1, dtype=torch.float64)[:-1]
        alphas, sigmas = (scale.tolist() for scale in signal_and_noise(times))
        noise = self._slice_noise(tuple(slices.shape[-2:]), generator)
        noised = alphas[0] * slices + sigmas[0] * noise
        for step, time in enumerate(times[:-1].tolist(), start=1):
            restored, noise = self.predictor.denoise(noised, time)
            noised = alphas[step] * restored + sigmas[step] * noise
        return self.predictor.restore(noised, float(times[-1]))

    def score(self, slices: Tensor, brain: Tensor, generator: SliceGenerator) -> Tensor:
        """Compute the absolute reconstruction error, intensities in [0, 1]."""
        restored = self.restore(2 * slices - 1, generator)
        return torch.where(brain, (slices - (restored + 1) / 2).abs(), 0.0)
