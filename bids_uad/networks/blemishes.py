"""Blemishes painted into healthy slices: lesions of no disease.

What is painted is wet more often than not, soft or sharp, single or scattered, with or without a core.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from bids_uad.constraints import (
    Constrained,
    Count,
    Items,
    NonNegative,
    PositiveRange,
    Probability,
)
from bids_uad.networks.corruptions import (
    AnomalyConfig,
    gaussian_blur,
    random_centres,
    random_shapes,
    uniform,
)


@dataclass(frozen=True)
class BlemishConfig(Constrained):
    """What blemishes look like.

    Parameters
    ----------
    large, core, small : tuple of float
        Smallest and largest side in pixels, drawn log-uniformly: of one large shape, of a core in its midst,
        and of scattered small ones.
    chance : tuple of float
        Probability of a large shape, of a core and of small ones.
    most_small : int
        Largest number of small shapes.
    wet : float
        Share of shapes that move towards the look of fluid; the others go to any grey value.
    texture : float
        Share of shapes that are filled with another slice.
    opacity : tuple of float
        How far the grey value moves.
    blur : float
        Largest standard deviation of a large shape's edge, in pixels; small shapes have a third.
    in_white : float
        Share of small shapes that lie in white matter, where small lesions are commonest; the others lie
        anywhere.
    lining : float
        Probability of a lining of the ventricles, along which most plaques and white matter hyperintensities
        lie.
    thickness : tuple of float
        Of a lining, in pixels; thicker in some places, and missing in others.
    """

    large: PositiveRange = (10.0, 90.0)
    core: PositiveRange = (5.0, 40.0)
    small: PositiveRange = (3.0, 16.0)
    chance: tuple[Probability, Probability, Probability] = (0.6, 0.3, 0.5)
    most_small: Count = 4
    wet: Probability = 0.75
    texture: Probability = 0.2
    opacity: Annotated[tuple[Probability, Probability], Items(2, "weakly")] = (0.15, 1.0)
    blur: NonNegative = 3.0
    in_white: Probability = 0.0
    lining: Probability = 0.0
    thickness: PositiveRange = (1.0, 6.0)


def smooth_field(batch: int, bumps: int, size: tuple[int, int], generator: Generator) -> Tensor:
    """Smooth random fields with about `bumps` bumps a side.

    Returns
    -------
    Tensor, shape (batch, 1, *size)
        Of standard deviation near 1.
    """
    coarse = torch.randn((batch, 1, bumps + 1, bumps + 1), generator=generator, device=generator.device)
    return F.interpolate(coarse, size=size, mode="bicubic", align_corners=True)


def draw_each(batch: int, generator: Generator) -> Tensor:
    """Draw a number from [0, 1) for each image, shape (batch, 1, 1, 1)."""
    return uniform((batch, 1, 1, 1), 0.0, 1.0, generator)


def _filled(
    images: Tensor, mask: Tensor, bright_fluid: Tensor, config: BlemishConfig, generator: Generator
) -> Tensor:
    """Move the grey values under a mask towards fluid, to any other value, or to those of another slice."""
    batch, _, *size = images.shape
    device = images.device

    draw = partial(draw_each, batch, generator)
    fluid = torch.where(bright_fluid, 1 - 0.45 * draw(), 0.4 * draw())
    level = torch.where(draw() < config.wet, fluid, draw())
    fill = level + 0.05 * smooth_field(batch, 12, (size[0], size[1]), generator)
    other = torch.randperm(batch, generator=generator, device=device)
    shift = torch.randint(-40, 41, (2,), generator=generator, device=device).tolist()
    foreign = torch.roll(images[other].flip(-2), shift, (-2, -1))
    fill = torch.where(draw() < config.texture, foreign, fill)
    low, high = config.opacity
    opacity = low + (high - low) * draw()
    opacity = (opacity * (1 + 0.25 * smooth_field(batch, 6, (size[0], size[1]), generator))).clamp(0, 1)
    return images + mask * opacity * (fill - images)


def white_matter(images: Tensor, brain: Tensor, bright_fluid: Tensor) -> Tensor:
    """Tell roughly where white matter is: the half of the brain that looks least like fluid.

    Parameters
    ----------
    images : Tensor, shape (B, 1, H, W)
    brain : Tensor of bool, shape (B, 1, H, W)
    bright_fluid : Tensor of bool, scalar

    Returns
    -------
    Tensor of bool, shape (B, 1, H, W)
    """
    median = _median(images, brain)
    return brain & torch.where(bright_fluid, images < median, images > median)


def ventricles(images: Tensor, brain: Tensor, bright_fluid: Tensor, rim: int = 20) -> Tensor:
    """Tell roughly where ventricles are: fluid that is more than `rim` pixels away from the brain's edge.

    Parameters
    ----------
    images : Tensor, shape (B, 1, H, W)
        In [0, 1].
    brain : Tensor of bool, shape (B, 1, H, W)
    bright_fluid : Tensor of bool, scalar
    rim : int

    Returns
    -------
    Tensor of bool, shape (B, 1, H, W)
    """
    extreme = bright_fluid.to(images.dtype)
    fluid = (images - extreme).abs() < (_median(images, brain) - extreme).abs() / 2
    outside = F.max_pool2d((~brain).float(), (2 * rim + 1, 1), stride=1, padding=(rim, 0))
    outside = F.max_pool2d(outside, (1, 2 * rim + 1), stride=1, padding=(0, rim))
    return fluid & (outside == 0)


def _median(images: Tensor, brain: Tensor) -> Tensor:
    """Median of each brain, shape (B, 1, 1, 1)."""
    return images.masked_fill(~brain, math.nan).flatten(1).nanmedian(1).values.view(-1, 1, 1, 1)


def _lining(fluid: Tensor, white: Tensor, config: BlemishConfig, generator: Generator) -> Tensor:
    """White matter along the ventricles, from a seam to caps: 1 where it is, shape (B, 1, H, W)."""
    batch, _, height, width = fluid.shape
    near = gaussian_blur(fluid, uniform((batch,), *config.thickness, generator))
    # At 0.16, the edge is one standard deviation away from a straight wall.
    uneven = 0.16 * (1.2 * smooth_field(batch, 8, (height, width), generator)).exp()
    return ((near > uneven) & white).to(fluid.dtype)


def paint_blemishes(
    images: Tensor, brain: Tensor, bright_fluid: Tensor, config: BlemishConfig, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Paint blemishes into slices; some stay as they are.

    Parameters
    ----------
    images : Tensor, shape (B, 1, H, W)
        In [0, 1].
    brain : Tensor of bool, shape (B, 1, H, W)
    bright_fluid : Tensor of bool, scalar
        Whether fluid is bright, as in T2w.
    config : BlemishConfig
    generator : torch.Generator

    Returns
    -------
    painted : Tensor, shape (B, 1, H, W)
        In [0, 1]; unchanged outside the brain.
    small : Tensor of bool, shape (B, 1, H, W)
        Where small shapes and linings have changed it.
    """
    batch, _, height, width = images.shape
    device = images.device
    draw = partial(draw_each, batch, generator)

    def shape(size: tuple[float, float], centres: Tensor) -> Tensor:
        return random_shapes(centres, height, width, AnomalyConfig(size=size, log_size=True), generator)

    def painted(x: Tensor, mask: Tensor, blur: float, chance: float) -> Tensor:
        soft = gaussian_blur(mask, uniform((batch,), 0.0, blur, generator))
        return _filled(x, soft * brain * (draw() < chance), bright_fluid, config, generator)

    centres = random_centres(brain, generator)
    near = centres + 4 * torch.randn(centres.shape, generator=generator, device=device)
    count = torch.randint(1, config.most_small + 1, (batch, 1, 1, 1), generator=generator, device=device)
    scattered = torch.zeros_like(images)
    white = white_matter(images, brain, bright_fluid) if config.in_white or config.lining else None
    for number in range(config.most_small):
        among = torch.where(draw() < config.in_white, white, brain) if config.in_white else brain
        one = shape(config.small, random_centres(among, generator))
        scattered = torch.maximum(scattered, one * (number < count))
    x = painted(images, shape(config.large, centres), config.blur, config.chance[0])
    x = painted(x, shape(config.core, near), config.blur, config.chance[1])
    without = x
    if config.lining:
        fluid = ventricles(images, brain, bright_fluid).to(images.dtype)
        along = _lining(fluid, white, config, generator)
        x = painted(x, along, config.blur / 3, config.lining)
    x = painted(x, scattered, config.blur / 3, config.chance[2])
    return x.clamp(0, 1), x != without
