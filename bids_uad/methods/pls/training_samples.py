"""Training samples of PLS: augmented healthy slices and the synthetic lesions painted into them.

Augmentations of the healthy brain and its mask come first, then the lesions, then the augmentations of
contrast and bias field, in the order in which ``PLS.loss`` applies them. All draw from the generator that
they are given, and treat the slices of a batch independently.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from bids_uad.constraints import Constrained, Count, Items, NonNegative, PositiveRange, Probability
from bids_uad.networks.synthetic_anomalies import (
    AnomalyConfig,
    gaussian_blur,
    random_centres,
    random_shapes,
    uniform,
)

STRIP_REMNANT = AnomalyConfig(size=(6.0, 50.0), log_size=True)
DARK_SPOT = AnomalyConfig(size=(6.0, 24.0), log_size=True)


def erode_edge(brain: Tensor, generator: Generator, max_pixels: int = 2) -> Tensor:
    """Erode each brain mask by 0 to `max_pixels` pixels, since skull-stripping programs differ by as much.

    Parameters
    ----------
    brain : Tensor of bool, shape (B, 1, H, W)
        Brain masks.
    generator : torch.Generator
        Draws the number of pixels for each slice.
    max_pixels : int, default=2
        Largest erosion in pixels.

    Returns
    -------
    Tensor of bool, shape (B, 1, H, W)
        Eroded brain masks.
    """
    outside = (~brain).float()
    pixels = torch.randint(0, max_pixels + 1, (len(brain), 1, 1, 1), generator=generator, device=brain.device)
    for step in range(max_pixels):
        grown = F.max_pool2d(outside, 3, stride=1, padding=1)
        outside = torch.where(step < pixels, grown, outside)
    return outside == 0


def cut_edge(brain: Tensor, generator: Generator, probability: float) -> Tensor:
    """Cut part of the brain off along a straight line, as a wrong mask or a small field of view does.

    Parameters
    ----------
    brain : Tensor of bool, shape (B, 1, H, W)
        Brain masks.
    generator : torch.Generator
        Draws which slices are cut, in which direction and how far.
    probability : float
        Probability that a slice is cut.

    Returns
    -------
    Tensor of bool, shape (B, 1, H, W)
        Brain masks. In the direction of the cut, at least two thirds of the way from centre to edge remain.
    """
    if not probability:
        return brain
    batch, _, height, width = brain.shape
    draw = partial(_uniform_per_slice, batch, generator)
    angle = 2 * math.pi * draw()
    row, column = brain_centre(brain)
    down = torch.arange(height, device=brain.device).view(1, 1, -1, 1) - row.view(-1, 1, 1, 1)
    right = torch.arange(width, device=brain.device).view(1, 1, 1, -1) - column.view(-1, 1, 1, 1)
    along = angle.cos() * down + angle.sin() * right
    reach = along.masked_fill(~brain, 0).amax((1, 2, 3), keepdim=True)
    inside = along <= reach * (1 - draw() / 3)
    return brain & (inside | (draw() >= probability))


def scale_ventricles(
    images: Tensor, brain: Tensor, generator: Generator, probability: float
) -> tuple[Tensor, Tensor]:
    """Expand or contract the centre of the brain, to vary the size of the ventricles.

    Parameters
    ----------
    images : Tensor, shape (B, 1, H, W)
        Slices.
    brain : Tensor of bool, shape (B, 1, H, W)
        Brain masks.
    generator : torch.Generator
        Draws which slices are warped, and how.
    probability : float
        Probability that a slice is warped.

    Returns
    -------
    images : Tensor, shape (B, 1, H, W)
        Warped slices.
    brain : Tensor of bool, shape (B, 1, H, W)
        Warped brain masks.

    Notes
    -----
    A point at distance r from the centre gets the intensity found at r (1 - a exp(-r^2 / 2 s^2)), with a
    from -0.3 to 0.6 and s from 12 to 40 pixels. This distance increases with r, so the warp is invertible.
    """
    batch, _, height, width = images.shape
    device = images.device
    rows = torch.arange(height, device=device).view(1, -1, 1)
    columns = torch.arange(width, device=device).view(1, 1, -1)
    jitter = 6 * torch.randn((2, batch, 1, 1), generator=generator, device=device)
    row, column = (
        centre.view(-1, 1, 1) + offset for centre, offset in zip(brain_centre(brain), jitter, strict=True)
    )
    amount = uniform((batch, 1, 1), -0.3, 0.6, generator) * (
        torch.rand((batch, 1, 1), generator=generator, device=device) < probability
    )
    sd = uniform((batch, 1, 1), 12.0, 40.0, generator)
    down, right = rows - row, columns - column
    scale = 1 - amount * torch.exp(-(down**2 + right**2) / (2 * sd**2))
    grid = torch.stack(
        [(column + scale * right) / (width - 1) * 2 - 1, (row + scale * down) / (height - 1) * 2 - 1], dim=-1
    )
    warped = F.grid_sample(images, grid, mode="bilinear", align_corners=True)
    inside = F.grid_sample(brain.to(images.dtype), grid, mode="nearest", align_corners=True) > 0
    return warped, inside


def add_rim_artifacts(images: Tensor, brain: Tensor, generator: Generator, probability: float) -> Tensor:
    """Blend patches of one intensity into the outermost two pixels of the brain.

    They imitate dura and skull that an imperfect skull-stripping leaves inside the mask.

    Parameters
    ----------
    images : Tensor, shape (B, 1, H, W)
        Slices, intensities in [0, 1].
    brain : Tensor of bool, shape (B, 1, H, W)
        Brain masks.
    generator : torch.Generator
        Draws patches, intensity and opacity.
    probability : float
        Probability that a slice has artefacts.

    Returns
    -------
    Tensor, shape (B, 1, H, W)
        Slices, intensities in [0, 1].
    """
    batch, _, height, width = images.shape
    draw = partial(_uniform_per_slice, batch, generator)
    rim = edge_of(brain, 2)
    patches = smooth_random_field(batch, 10, (height, width), generator) > 2 * draw() - 0.5
    opacity = rim * patches * draw() * (draw() < probability)
    return images + opacity * (draw() - images)


def add_strip_remnants(
    images: Tensor, brain: Tensor, generator: Generator, probability: float
) -> tuple[Tensor, Tensor]:
    """Add up to two pieces of other tissue outside the brain edge, such as eye or muscle.

    Parameters
    ----------
    images : Tensor, shape (B, 1, H, W)
        Slices, intensities in [0, 1].
    brain : Tensor of bool, shape (B, 1, H, W)
        Brain masks.
    generator : torch.Generator
        Draws place, shape and texture.
    probability : float
        Probability of each piece.

    Returns
    -------
    images : Tensor, shape (B, 1, H, W)
        Slices, intensities in [0, 1], unchanged inside the brain.
    brain : Tensor of bool, shape (B, 1, H, W)
        Brain masks that include the pieces.
    """
    if not probability:
        return images, brain
    batch, _, height, width = images.shape
    draw = partial(_uniform_per_slice, batch, generator)
    edge = edge_of(brain)
    mask = brain
    for _ in range(2):
        centres = random_centres(edge, generator)
        shape = random_shapes(centres, height, width, STRIP_REMNANT, generator, ("disc", "blobs")) > 0
        coarse = smooth_random_field(batch, 8, (height, width), generator)
        fine = smooth_random_field(batch, 32, (height, width), generator)
        fill = (draw() + 0.3 * draw() * coarse + 0.3 * draw() * fine).clamp(0, 1)
        piece = shape & ~mask & (draw() < probability)
        images = torch.where(piece, fill, images)
        mask = mask | piece
    return images, mask


def darken_nuclei(
    images: Tensor, brain: Tensor, bright_fluid: Tensor, generator: Generator, probability: float
) -> Tensor:
    """Darken a pair of spots beside the midline, as iron darkens deep grey nuclei in T2w scans.

    Iron in pallidum, red nucleus, substantia nigra and dentate nucleus increases with age (Hallgren and
    Sourander 1958) and varies more between people than in simulated scans.

    Parameters
    ----------
    images : Tensor, shape (B, 1, H, W)
        Slices, intensities in [0, 1]; left and right lie along H.
    brain : Tensor of bool, shape (B, 1, H, W)
        Brain masks.
    bright_fluid : Tensor of bool, scalar
        Whether fluid is bright (T2w). If False, the slices are returned unchanged.
    generator : torch.Generator
        Draws place, size and darkness.
    probability : float
        Probability that a slice is changed.

    Returns
    -------
    Tensor, shape (B, 1, H, W)
        Slices, intensities in [0, 1].
    """
    if not probability:
        return images
    batch = len(images)
    row, column = brain_centre(brain)
    from_midline = uniform((batch,), 3.0, 28.0, generator)
    along = column + 15 * torch.randn((batch,), generator=generator, device=images.device)
    pair = [torch.stack([row + side * from_midline, along], 1) for side in (-1, 1)]
    darkening = 0.7 * _uniform_per_slice(batch, generator) * bright_fluid
    return _darken_spots(images, brain, pair, generator, darkening, probability)


def add_flow_voids(
    images: Tensor, brain: Tensor, bright_fluid: Tensor, generator: Generator, probability: float
) -> Tensor:
    """Darken three spots of the brain edge, one of them at the midline.

    They imitate venous sinuses, whose flowing blood is dark in T2w scans, and dura. Skull-stripping leaves
    parts of both on many brains. Parameters and result are those of :func:`darken_nuclei`.
    """
    if not probability:
        return images
    batch, _, height, _ = images.shape
    edge = edge_of(brain)
    rows = torch.arange(height, device=images.device).view(1, 1, -1, 1)
    midline = (rows - brain_centre(brain)[0].view(-1, 1, 1, 1)).abs() < 6
    spots = [random_centres(where, generator) for where in (edge & midline, edge, edge)]
    darkening = (1 - 0.6 * _uniform_per_slice(batch, generator)) * bright_fluid
    return _darken_spots(images, brain, spots, generator, darkening, probability)


def _darken_spots(
    images: Tensor,
    brain: Tensor,
    centres: list[Tensor],
    generator: Generator,
    darkening: Tensor,
    probability: float,
) -> Tensor:
    """Multiply soft-edged spots by ``1 - darkening``, in a slice with the given probability."""
    batch, _, height, width = images.shape
    spots = torch.zeros_like(images)
    for centre in centres:
        spots = torch.maximum(spots, random_shapes(centre, height, width, DARK_SPOT, generator, ("blobs",)))
    soft = gaussian_blur(spots, uniform((batch,), 0.5, 2.0, generator))
    return images * (1 - darkening * (_uniform_per_slice(batch, generator) < probability) * soft * brain)


@dataclass(frozen=True)
class SyntheticLesionConfig(Constrained):
    """Shape, place and intensity of synthetic lesions.

    Parameters
    ----------
    large_size, core_size, small_size : tuple of float
        Smallest and largest side in pixels, drawn log-uniformly: of the large lesion, of the core near its
        centre, and of the small lesions.
    probabilities : tuple of float, default=(0.6, 0.3, 0.5)
        Probabilities of the large lesion, the core and the small lesions.
    max_small : int, default=4
        Largest number of small lesions in a slice.
    fluid_like_prob : float, default=0.75
        Probability that a lesion has the intensity of fluid, as oedema does; otherwise its intensity is
        drawn from the whole range.
    foreign_texture_prob : float, default=0.2
        Probability that a lesion is filled with the texture of another slice.
    opacity : tuple of float, default=(0.15, 1.0)
        Range of the blending weight of a lesion.
    max_blur : float, default=3.0
        Largest standard deviation of the edge of a large lesion in pixels; a third of it for the others.
    white_matter_prob : float, default=0.0
        Probability that a small lesion is placed in white matter; otherwise it lies anywhere in the brain.
    periventricular_prob : float, default=0.0
        Probability of a periventricular lesion, where most multiple sclerosis plaques and white matter
        hyperintensities lie.
    periventricular_thickness : tuple of float, default=(1.0, 6.0)
        Range of the standard deviation, in pixels, of the blur that sets the thickness of a periventricular
        lesion. Its thickness varies along the ventricle, down to zero.
    """

    large_size: PositiveRange = (10.0, 90.0)
    core_size: PositiveRange = (5.0, 40.0)
    small_size: PositiveRange = (3.0, 16.0)
    probabilities: tuple[Probability, Probability, Probability] = (0.6, 0.3, 0.5)
    max_small: Count = 4
    fluid_like_prob: Probability = 0.75
    foreign_texture_prob: Probability = 0.2
    opacity: Annotated[tuple[Probability, Probability], Items(2, "weakly")] = (0.15, 1.0)
    max_blur: NonNegative = 3.0
    white_matter_prob: Probability = 0.0
    periventricular_prob: Probability = 0.0
    periventricular_thickness: PositiveRange = (1.0, 6.0)

    renamed_fields: ClassVar[dict[str, str]] = {
        "large": "large_size",
        "core": "core_size",
        "small": "small_size",
        "chance": "probabilities",
        "most_small": "max_small",
        "wet": "fluid_like_prob",
        "texture": "foreign_texture_prob",
        "blur": "max_blur",
        "in_white": "white_matter_prob",
        "lining": "periventricular_prob",
        "thickness": "periventricular_thickness",
    }


def paint_lesions(
    images: Tensor, brain: Tensor, bright_fluid: Tensor, config: SyntheticLesionConfig, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Paint synthetic lesions into healthy slices; some slices remain unchanged.

    Parameters
    ----------
    images : Tensor, shape (B, 1, H, W)
        Healthy slices, intensities in [0, 1].
    brain : Tensor of bool, shape (B, 1, H, W)
        Brain masks.
    bright_fluid : Tensor of bool, scalar
        Whether fluid is bright (T2w).
    config : SyntheticLesionConfig
        Shape, place and intensity of the lesions.
    generator : torch.Generator
        Draws the lesions.

    Returns
    -------
    painted : Tensor, shape (B, 1, H, W)
        Slices, intensities in [0, 1], unchanged outside the brain.
    small : Tensor of bool, shape (B, 1, H, W)
        Pixels that small and periventricular lesions have changed.
    """
    batch, _, height, width = images.shape
    device = images.device
    draw = partial(_uniform_per_slice, batch, generator)

    def shape(size: tuple[float, float], centres: Tensor) -> Tensor:
        return random_shapes(centres, height, width, AnomalyConfig(size=size, log_size=True), generator)

    def fill(x: Tensor, mask: Tensor, max_blur: float, probability: float) -> Tensor:
        soft = gaussian_blur(mask, uniform((batch,), 0.0, max_blur, generator))
        return _fill_lesion(x, soft * brain * (draw() < probability), bright_fluid, config, generator)

    centres = random_centres(brain, generator)
    core_centres = centres + 4 * torch.randn(centres.shape, generator=generator, device=device)
    count = torch.randint(1, config.max_small + 1, (batch, 1, 1, 1), generator=generator, device=device)
    scattered = torch.zeros_like(images)
    use_white = config.white_matter_prob or config.periventricular_prob
    white = white_matter_mask(images, brain, bright_fluid) if use_white else None
    for number in range(config.max_small):
        where = (
            torch.where(draw() < config.white_matter_prob, white, brain)
            if config.white_matter_prob
            else brain
        )
        one = shape(config.small_size, random_centres(where, generator))
        scattered = torch.maximum(scattered, one * (number < count))
    x = fill(images, shape(config.large_size, centres), config.max_blur, config.probabilities[0])
    x = fill(x, shape(config.core_size, core_centres), config.max_blur, config.probabilities[1])
    without_small = x
    if config.periventricular_prob:
        fluid = ventricle_mask(images, brain, bright_fluid).to(images.dtype)
        band = _periventricular_band(fluid, white, config, generator)
        x = fill(x, band, config.max_blur / 3, config.periventricular_prob)
    x = fill(x, scattered, config.max_blur / 3, config.probabilities[2])
    return x.clamp(0, 1), x != without_small


def _fill_lesion(
    images: Tensor, mask: Tensor, bright_fluid: Tensor, config: SyntheticLesionConfig, generator: Generator
) -> Tensor:
    """Blend the intensity of fluid, any other intensity or the texture of another slice into a mask."""
    batch, _, *size = images.shape
    device = images.device
    draw = partial(_uniform_per_slice, batch, generator)
    fluid = torch.where(bright_fluid, 1 - 0.45 * draw(), 0.4 * draw())
    level = torch.where(draw() < config.fluid_like_prob, fluid, draw())
    fill = level + 0.05 * smooth_random_field(batch, 12, (size[0], size[1]), generator)
    other = torch.randperm(batch, generator=generator, device=device)
    shift = torch.randint(-40, 41, (2,), generator=generator, device=device).tolist()
    foreign = torch.roll(images[other].flip(-2), shift, (-2, -1))
    fill = torch.where(draw() < config.foreign_texture_prob, foreign, fill)
    low, high = config.opacity
    opacity = low + (high - low) * draw()
    texture = 1 + 0.25 * smooth_random_field(batch, 6, (size[0], size[1]), generator)
    return images + mask * (opacity * texture).clamp(0, 1) * (fill - images)


def _periventricular_band(
    fluid: Tensor, white: Tensor, config: SyntheticLesionConfig, generator: Generator
) -> Tensor:
    """Return a band of white matter along the ventricles of varying thickness: 1 inside, (B, 1, H, W)."""
    batch, _, height, width = fluid.shape
    near = gaussian_blur(fluid, uniform((batch,), *config.periventricular_thickness, generator))
    # A step edge blurred by a Gaussian falls to 0.16 at one standard deviation from the edge.
    level = 0.16 * (1.2 * smooth_random_field(batch, 8, (height, width), generator)).exp()
    return ((near > level) & white).to(fluid.dtype)


def white_matter_mask(images: Tensor, brain: Tensor, bright_fluid: Tensor) -> Tensor:
    """Return a rough white matter mask: the half of the brain whose intensity is farthest from fluid.

    Parameters
    ----------
    images : Tensor, shape (B, 1, H, W)
        Slices, intensities in [0, 1].
    brain : Tensor of bool, shape (B, 1, H, W)
        Brain masks.
    bright_fluid : Tensor of bool, scalar
        Whether fluid is bright (T2w).

    Returns
    -------
    Tensor of bool, shape (B, 1, H, W)
        Pixels below the median of the brain if fluid is bright, else above it.
    """
    median = _brain_median(images, brain)
    return brain & torch.where(bright_fluid, images < median, images > median)


def ventricle_mask(images: Tensor, brain: Tensor, bright_fluid: Tensor, min_distance: int = 20) -> Tensor:
    """Return a rough ventricle mask: fluid far from the brain edge.

    Parameters
    ----------
    images : Tensor, shape (B, 1, H, W)
        Slices, intensities in [0, 1].
    brain : Tensor of bool, shape (B, 1, H, W)
        Brain masks.
    bright_fluid : Tensor of bool, scalar
        Whether fluid is bright (T2w).
    min_distance : int, default=20
        Smallest distance from the brain edge in pixels, along rows and columns.

    Returns
    -------
    Tensor of bool, shape (B, 1, H, W)
        Pixels whose intensity is nearer to the fluid end of the range than to the median of the brain.
    """
    extreme = bright_fluid.to(images.dtype)
    fluid = (images - extreme).abs() < (_brain_median(images, brain) - extreme).abs() / 2
    side = 2 * min_distance + 1
    outside = F.max_pool2d((~brain).float(), (side, 1), stride=1, padding=(min_distance, 0))
    outside = F.max_pool2d(outside, (1, side), stride=1, padding=(0, min_distance))
    return fluid & (outside == 0)


def _brain_median(images: Tensor, brain: Tensor) -> Tensor:
    """Return the median intensity of each brain, shape (B, 1, 1, 1)."""
    return images.masked_fill(~brain, math.nan).flatten(1).nanmedian(1).values.view(-1, 1, 1, 1)


def vary_contrast(images: Tensor, generator: Generator) -> Tensor:
    """Map intensities by a random increasing curve that fixes 0 and 1: x + sum of three sines.

    Parameters
    ----------
    images : Tensor, shape (B, 1, H, W)
        Slices, intensities in [0, 1].
    generator : torch.Generator
        Draws the amplitudes.

    Returns
    -------
    Tensor, shape (B, 1, H, W)
        Slices, intensities in [0, 1].
    """
    result = images
    for wave in (1, 2, 3):
        # The slope of the sum is at least 1 - 3 * 0.08 pi > 0.2.
        amplitude = uniform((len(images), 1, 1, 1), -0.08, 0.08, generator) / wave
        result = result + amplitude * (math.pi * wave * images).sin()
    return result


def add_bias_field(images: Tensor, generator: Generator, strength: float = 0.12, periods: int = 2) -> Tensor:
    """Multiply slices by a smooth random field, as the receive coil does.

    Parameters
    ----------
    images : Tensor, shape (B, 1, H, W)
        Slices, intensities in [0, 1].
    generator : torch.Generator
        Draws field and strength.
    strength : float, default=0.12
        Largest standard deviation of the logarithm of the field.
    periods : int, default=2
        Number of grid intervals of the field per side.

    Returns
    -------
    Tensor, shape (B, 1, H, W)
        Slices, intensities in [0, 1].
    """
    batch, _, height, width = images.shape
    field = smooth_random_field(batch, periods, (height, width), generator)
    return (images * (uniform((batch, 1, 1, 1), 0.0, strength, generator) * field).exp()).clamp(0, 1)


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


def edge_of(brain: Tensor, pixels: int = 1) -> Tensor:
    """Return the outermost pixels of brain masks.

    Parameters
    ----------
    brain : Tensor of bool, shape (B, 1, H, W)
        Brain masks.
    pixels : int, default=1
        Width of the edge, in 8-neighbourhoods.

    Returns
    -------
    Tensor of bool, shape (B, 1, H, W)
        Brain pixels within this distance of a pixel outside.
    """
    near_outside = F.max_pool2d((~brain).float(), 2 * pixels + 1, stride=1, padding=pixels) > 0
    return brain & near_outside


def brain_centre(brain: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean row and the mean column of each brain mask.

    Parameters
    ----------
    brain : Tensor of bool, shape (B, 1, H, W)
        Brain masks.

    Returns
    -------
    row, column : Tensor, shape (B,)
        Centre in pixels; 0 if the mask is empty.
    """
    _, _, height, width = brain.shape
    weight = brain[:, 0] / brain.sum((1, 2, 3)).clamp_min(1).view(-1, 1, 1)
    rows = torch.arange(height, device=brain.device).view(1, -1, 1)
    columns = torch.arange(width, device=brain.device).view(1, 1, -1)
    return (weight * rows).sum((1, 2)), (weight * columns).sum((1, 2))


def _uniform_per_slice(batch: int, generator: Generator) -> Tensor:
    """Draw one number from [0, 1) for each slice, shape (batch, 1, 1, 1)."""
    return uniform((batch, 1, 1, 1), 0.0, 1.0, generator)
