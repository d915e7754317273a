"""How healthy brains and their scans differ: ventricles, iron, flowing blood, coils and contrast.

A network that is to see foreign tissue in scans of scanners it never saw must learn from many looks of
healthy tissue. Contrast and shading are varied after blemishes were painted, lest they give them away.
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
from bids_uad.networks.synthetic_anomalies import (
    AnomalyConfig,
    gaussian_blur,
    random_centres,
    random_shapes,
    uniform,
)


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


REMNANT = AnomalyConfig(size=(6.0, 50.0), log_size=True)


def shrink_rim(brain: Tensor, generator: Generator, most: int = 2) -> Tensor:
    """Take 0 to `most` pixels off the brain's edge, as one skull-stripping program does and another does not.

    Parameters
    ----------
    brain : Tensor of bool, shape (B, 1, H, W)
    """
    outside = (~brain).float()
    depth = torch.randint(0, most + 1, (len(brain), 1, 1, 1), generator=generator, device=brain.device)
    for step in range(most):
        grown = F.max_pool2d(outside, 3, stride=1, padding=1)
        outside = torch.where(step < depth, grown, outside)
    return outside == 0


def rim_of(brain: Tensor, depth: int = 1) -> Tensor:
    """Give the brain's outermost `depth` pixels, corners included; shape and type as `brain`."""
    near_outside = F.max_pool2d((~brain).float(), 2 * depth + 1, stride=1, padding=depth) > 0
    return brain & near_outside


def soil_rim(images: Tensor, brain: Tensor, generator: Generator, chance: float) -> Tensor:
    """Leave patches of something else on the brain's outermost two pixels, as imperfect skull-stripping does.

    Parameters
    ----------
    images : Tensor, shape (B, 1, H, W)
        In [0, 1].
    brain : Tensor of bool, shape (B, 1, H, W)
    generator : torch.Generator
    chance : float
        How often.

    Returns
    -------
    Tensor, shape (B, 1, H, W)
        In [0, 1].
    """
    batch, _, height, width = images.shape
    draw = partial(draw_each, batch, generator)
    rim = rim_of(brain, 2)
    patches = smooth_field(batch, 10, (height, width), generator) > 2 * draw() - 0.5
    opacity = rim * patches * draw() * (draw() < chance)
    return images + opacity * (draw() - images)


def middle_of(brain: Tensor) -> tuple[Tensor, Tensor]:
    """Mean row and column of each brain mask, shape (batch,)."""
    _, _, height, width = brain.shape
    weight = brain[:, 0] / brain.sum((1, 2, 3)).clamp_min(1).view(-1, 1, 1)
    rows = torch.arange(height, device=brain.device).view(1, -1, 1)
    columns = torch.arange(width, device=brain.device).view(1, 1, -1)
    return (weight * rows).sum((1, 2)), (weight * columns).sum((1, 2))


def leave_remnants(
    images: Tensor, brain: Tensor, generator: Generator, chance: float
) -> tuple[Tensor, Tensor]:
    """Leave up to two pieces of something else on the brain's edge, as eyes and muscle are.

    Parameters
    ----------
    images : Tensor, shape (B, 1, H, W)
        In [0, 1].
    brain : Tensor of bool, shape (B, 1, H, W)
    generator : torch.Generator
    chance : float
        How often, for each piece.

    Returns
    -------
    images : Tensor, shape (B, 1, H, W)
        In [0, 1]; unchanged in the brain.
    brain : Tensor of bool, shape (B, 1, H, W)
        With the pieces.
    """
    if not chance:
        return images, brain
    batch, _, height, width = images.shape
    draw = partial(draw_each, batch, generator)
    edge = rim_of(brain)
    whole = brain
    for _ in range(2):
        centres = random_centres(edge, generator)
        shape = random_shapes(centres, height, width, REMNANT, generator, ("disc", "blobs")) > 0
        coarse = smooth_field(batch, 8, (height, width), generator)
        fine = smooth_field(batch, 32, (height, width), generator)
        fill = (draw() + 0.3 * draw() * coarse + 0.3 * draw() * fine).clamp(0, 1)
        piece = shape & ~whole & (draw() < chance)
        images = torch.where(piece, fill, images)
        whole = whole | piece
    return images, whole


def cut_edge(brain: Tensor, generator: Generator, chance: float) -> Tensor:
    """Cut an edge off the brain along a straight line, as a mask or the field of view does.

    Parameters
    ----------
    brain : Tensor of bool, shape (B, 1, H, W)
    generator : torch.Generator
    chance : float
        How often.

    Returns
    -------
    Tensor of bool, shape (B, 1, H, W)
        What is left: at least two thirds of the way from the middle to the edge, in the direction of the cut.
    """
    if not chance:
        return brain
    batch, _, height, width = brain.shape
    draw = partial(draw_each, batch, generator)
    angle = 2 * math.pi * draw()
    row, column = middle_of(brain)
    down = torch.arange(height, device=brain.device).view(1, 1, -1, 1) - row.view(-1, 1, 1, 1)
    right = torch.arange(width, device=brain.device).view(1, 1, 1, -1) - column.view(-1, 1, 1, 1)
    along = angle.cos() * down + angle.sin() * right
    reach = along.masked_fill(~brain, 0).amax((1, 2, 3), keepdim=True)
    kept = along <= reach * (1 - draw() / 3)
    return brain & (kept | (draw() >= chance))


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
