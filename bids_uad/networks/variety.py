"""How healthy brains and their scans differ: ventricles, iron, flowing blood, coils and contrast.

A network that is to see foreign tissue in scans of scanners it never saw must learn from many looks of
healthy tissue. Contrast and shading are varied after blemishes were painted, lest they give them away.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from bids_uad.networks.blemishes import draw_each, smooth_field
from bids_uad.networks.corruptions import (
    AnomalyConfig,
    gaussian_blur,
    random_centres,
    random_shapes,
    uniform,
)
from bids_uad.networks.stripping import middle_of, rim_of


def darken_nuclei(
    images: Tensor, brain: Tensor, bright_fluid: Tensor, generator: Generator, chance: float
) -> Tensor:
    """Darken a pair of spots beside the midline, as iron does to deep nuclei in T2w scans.

    Pallidum, red nucleus, substantia nigra and dentate nucleus gain iron with age (Hallgren and Sourander
    1958), and differ between people more than any simulated scan shows. Where fluid is dark (T1w) nothing
    changes.

    Parameters
    ----------
    images : Tensor, shape (B, 1, H, W)
        In [0, 1]; left and right lie along H.
    brain : Tensor of bool, shape (B, 1, H, W)
    bright_fluid : Tensor of bool, scalar
    generator : torch.Generator
    chance : float
        How often.

    Returns
    -------
    Tensor, shape (B, 1, H, W)
        In [0, 1].
    """
    if not chance:
        return images
    batch = len(images)
    row, column = middle_of(brain)
    apart = uniform((batch,), 3.0, 28.0, generator)
    along = column + 15 * torch.randn((batch,), generator=generator, device=images.device)
    pair = [torch.stack([row + side * apart, along], 1) for side in (-1, 1)]
    return _darkened(images, brain, pair, generator, 0.7 * draw_each(batch, generator) * bright_fluid, chance)


def darken_sinuses(
    images: Tensor, brain: Tensor, bright_fluid: Tensor, generator: Generator, chance: float
) -> Tensor:
    """Darken three spots of the brain's rim, one at the midline, as flowing blood and dura are in T2w scans.

    Skull-stripping leaves parts of the venous sinuses and of the dura on many brains. Where fluid is dark
    (T1w) nothing changes.

    Parameters
    ----------
    images : Tensor, shape (B, 1, H, W)
        In [0, 1]; left and right lie along H.
    brain : Tensor of bool, shape (B, 1, H, W)
    bright_fluid : Tensor of bool, scalar
    generator : torch.Generator
    chance : float
        How often.

    Returns
    -------
    Tensor, shape (B, 1, H, W)
        In [0, 1].
    """
    if not chance:
        return images
    batch, _, height, _ = images.shape
    rim = rim_of(brain)
    rows = torch.arange(height, device=images.device).view(1, 1, -1, 1)
    midline = (rows - middle_of(brain)[0].view(-1, 1, 1, 1)).abs() < 6
    spots = [random_centres(where, generator) for where in (rim & midline, rim, rim)]
    amount = (1 - 0.6 * draw_each(batch, generator)) * bright_fluid
    return _darkened(images, brain, spots, generator, amount, chance)


def _darkened(
    images: Tensor, brain: Tensor, centres: list[Tensor], generator: Generator, amount: Tensor, chance: float
) -> Tensor:
    """Darken soft spots about the centres by a share of their grey values, where `chance` has it."""
    batch, _, height, width = images.shape
    config = AnomalyConfig(size=(6.0, 24.0), log_size=True)
    spots = torch.zeros_like(images)
    for centre in centres:
        spots = torch.maximum(spots, random_shapes(centre, height, width, config, generator, ("blobs",)))
    soft = gaussian_blur(spots, uniform((batch,), 0.5, 2.0, generator))
    return images * (1 - amount * (draw_each(batch, generator) < chance) * soft * brain)


def swell_middle(images: Tensor, brain: Tensor, generator: Generator, chance: float) -> tuple[Tensor, Tensor]:
    """Swell or shrink what lies about the middle of the brain, as ventricles differ between people.

    Parameters
    ----------
    images : Tensor, shape (B, 1, H, W)
    brain : Tensor of bool, shape (B, 1, H, W)
    generator : torch.Generator
    chance : float
        How often.

    Returns
    -------
    images : Tensor, shape (B, 1, H, W)
    brain : Tensor of bool, shape (B, 1, H, W)

    Notes
    -----
    A point at a distance r of the centre shows what was at r (1 - a exp(-r^2 / 2 s^2)), with a from -0.3 to
    0.6 and s from 12 to 40 pixels. This distance grows with r, so that nothing is folded.
    """
    batch, _, height, width = images.shape
    device = images.device
    rows = torch.arange(height, device=device).view(1, -1, 1)
    columns = torch.arange(width, device=device).view(1, 1, -1)
    jitter = 6 * torch.randn((2, batch, 1, 1), generator=generator, device=device)
    row, column = (
        middle.view(-1, 1, 1) + moved for middle, moved in zip(middle_of(brain), jitter, strict=True)
    )
    amount = uniform((batch, 1, 1), -0.3, 0.6, generator) * (
        torch.rand((batch, 1, 1), generator=generator, device=device) < chance
    )
    spread = uniform((batch, 1, 1), 12.0, 40.0, generator)
    down, right = rows - row, columns - column
    scale = 1 - amount * torch.exp(-(down**2 + right**2) / (2 * spread**2))
    grid = torch.stack(
        [(column + scale * right) / (width - 1) * 2 - 1, (row + scale * down) / (height - 1) * 2 - 1], dim=-1
    )
    swollen = F.grid_sample(images, grid, mode="bilinear", align_corners=True)
    inside = F.grid_sample(brain.to(images.dtype), grid, mode="nearest", align_corners=True) > 0
    return swollen, inside


def bend_contrast(images: Tensor, generator: Generator) -> Tensor:
    """Bend the contrast by a random curve that keeps the order of grey values, and keeps 0 and 1.

    Parameters
    ----------
    images : Tensor, shape (B, 1, H, W)
        In [0, 1].
    """
    bent = images
    for wave in (1, 2, 3):
        # The slope of the three together stays above 0.2.
        height = uniform((len(images), 1, 1, 1), -0.08, 0.08, generator) / wave
        bent = bent + height * (math.pi * wave * images).sin()
    return bent


def shade(images: Tensor, generator: Generator, strength: float = 0.12, bumps: int = 2) -> Tensor:
    """Shade slices as a coil does: a smooth factor whose logarithm has a standard deviation up to `strength`.

    Parameters
    ----------
    images : Tensor, shape (B, 1, H, W)
        In [0, 1].
    generator : torch.Generator
    strength : float
    bumps : int
        Of the factor, on a side.

    Returns
    -------
    Tensor, shape (B, 1, H, W)
        In [0, 1].
    """
    batch, _, height, width = images.shape
    field = smooth_field(batch, bumps, (height, width), generator)
    return (images * (uniform((batch, 1, 1, 1), 0.0, strength, generator) * field).exp()).clamp(0, 1)
