"""Changes of the intensities of training slices of PLS, and its overlap loss."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from bids_uad.networks.synthetic_anomalies import gaussian_blur, uniform


def vary_intensities(
    slices: Tensor, probability: float, fine_bias: float, generator: Generator, *, mirrored: bool
) -> Tensor:
    """Vary contrast, bias field, brightness, gamma, noise and sharpness; neighbouring slices alike.

    Parameters
    ----------
    slices : Tensor, shape (B, C, H, W)
        Neighbouring slices as channels, intensities in [0, 1], 0 outside the brain.
    probability : float
        Probability of each change of brightness, gamma, noise and sharpness.
    fine_bias : float
        Largest standard deviation of the logarithm of the fine bias field.
    generator : torch.Generator
        Draws the changes.
    mirrored : bool
        Whether the last channel is mirrored (along H), so that the mirrored bias field applies to it.

    Returns
    -------
    Tensor, shape (B, C, H, W)
        Intensities in [0, 1]. They are not 0 outside the brain.
    """
    batch, channels, height, width = slices.shape

    def draw(low: float, high: float) -> Tensor:
        return uniform((batch, 1, 1, 1), low, high, generator)

    def selected() -> Tensor:
        return draw(0, 1) < probability

    def gamma() -> Tensor:
        return draw(-math.log(2), math.log(2)).exp()

    x = vary_contrast(slices, generator)
    fields = [
        draw(0, strength) * smooth_random_field(batch, periods, (height, width), generator)
        for strength, periods in ((0.12, 2), (fine_bias, 8))
    ]
    bias = sum(fields).exp()
    bias = bias.expand(-1, channels - mirrored, -1, -1)
    if mirrored:
        bias = torch.cat([bias, bias[:, :1].flip(-2)], 1)
    x = (x * bias).clamp(0, 1)
    x = torch.where(selected(), x * draw(0.9, 1.1), x).clamp(0, 1)
    x = torch.where(selected(), x ** gamma(), x)
    x = torch.where(selected(), 1 - (1 - x) ** gamma(), x)
    noisy = selected()
    if noisy.any():
        noise = torch.randn(x.shape, generator=generator, device=x.device)
        x = torch.where(noisy, x + noise * draw(0, 0.05), x)
    blurry = selected()
    if blurry.any():
        sigma = (draw(0.5, 1.5) * blurry).view(-1, 1).expand(-1, channels).flatten()
        x = gaussian_blur(x.reshape(-1, 1, height, width), sigma).view_as(x)
    return x.clamp(0, 1)


def vary_contrast(images: Tensor, generator: Generator) -> Tensor:
    """Map intensities by a random increasing curve that fixes 0 and 1: x + sum of three sines.

    Parameters
    ----------
    images : Tensor, shape (B, C, H, W)
        Slices, intensities in [0, 1].
    generator : torch.Generator
        Draws the amplitudes of each element of the batch.

    Returns
    -------
    Tensor, shape (B, C, H, W)
        Slices, intensities in [0, 1].
    """
    result = images
    for wave in (1, 2, 3):
        # The slope of the sum is at least 1 - 3 * 0.08 pi > 0.2.
        amplitude = uniform((len(images), 1, 1, 1), -0.08, 0.08, generator) / wave
        result = result + amplitude * (math.pi * wave * images).sin()
    return result


def smooth_random_field(batch: int, periods: int, size: tuple[int, int], generator: Generator) -> Tensor:
    """Interpolate standard normal numbers on a coarse grid to smooth random fields.

    Parameters
    ----------
    batch : int
        Number of fields.
    periods : int
        Number of grid intervals per side.
    size : tuple of int
        Height and width in pixels.
    generator : torch.Generator
        Draws the numbers.

    Returns
    -------
    Tensor, shape (batch, 1, *size)
        Fields with a standard deviation of about 1.
    """
    coarse = torch.randn((batch, 1, periods + 1, periods + 1), generator=generator, device=generator.device)
    return F.interpolate(coarse, size=size, mode="bicubic", align_corners=True)


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
