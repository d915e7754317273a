"""Synthetic anomalies painted into healthy slices, and the augmentations before them.

The disentangled anomaly generation of Disyre v2 (Naval Marimont et al. 2024): random shapes with a foreign
texture and an intensity bias, of known severity. All functions are vectorised over the batch and draw from
the generator that they are given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from bids_uad.constraints import Constrained, Count, Interval, NonNegative, OneOf, PositiveRange, Probability

SHAPES = ("rectangle", "disc", "blobs")
COMPONENTS = (*SHAPES, "texture", "bias", "blur")
"""Components of synthetic anomalies: shapes, foreign texture, intensity bias and soft edges."""
MIN_CONTRAST = 0.35
"""Smallest factor of the differences between tissues in the augmentation of intensities."""


@dataclass(frozen=True)
class AnomalyConfig(Constrained):
    """Shape, edge and intensity of synthetic anomalies.

    Parameters
    ----------
    size : tuple of float, default=(10.0, 44.0)
        Smallest and largest side or diameter of a shape in pixels.
    log_size : bool, default=False
        Whether to draw sizes log-uniformly instead of uniformly.
    max_shapes : int, default=1
        Largest number of shapes of an anomaly. More shapes per slice shorten the training.
    max_blur : float, default=5.0
        Largest standard deviation of the edge of the mask in pixels.
    blur_probability : float, default=0.7
        Probability that the edge is soft.
    matching : {"minmax", "mean"}, default="minmax"
        How the intensities of a foreign texture are matched to those that it replaces. The publication
        describes ``minmax``, its code uses ``mean``.
    class_offset : float, default=1000.0
        Pixels added to the size of the mask when tissue classes for the bias are drawn.
    """

    size: PositiveRange = (10.0, 44.0)
    log_size: bool = False
    max_shapes: Count = 1
    max_blur: NonNegative = 5.0
    blur_probability: Probability = 0.7
    matching: Annotated[str, OneOf("minmax", "mean")] = "minmax"
    class_offset: NonNegative = 1000.0


def uniform(shape: tuple[int, ...], low: float, high: float, generator: Generator) -> Tensor:
    """Draw uniformly from [low, high), on the device of the generator."""
    draw = torch.rand(shape, generator=generator, device=generator.device)
    return low + (high - low) * draw


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur each image of a batch by its own standard deviation.

    Parameters
    ----------
    images : Tensor, shape (B, 1, H, W)
        Images; the border is padded by replication.
    sigma : Tensor, shape (B,)
        Standard deviations in pixels; 0 leaves an image unchanged. The kernel is truncated at three times the
        largest.

    Returns
    -------
    Tensor, shape (B, 1, H, W)
        Blurred images.
    """
    radius = max(1, math.ceil(3 * float(sigma.max())))
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma.to(images.dtype).clamp_min(1e-3)[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    batch = images.shape[0]
    stacked = F.pad(images, (radius,) * 4, mode="replicate").transpose(0, 1)
    stacked = F.conv2d(stacked, kernel.view(batch, 1, 1, -1), groups=batch)
    return F.conv2d(stacked, kernel.view(batch, 1, -1, 1), groups=batch).transpose(0, 1)


def random_centres(brain: Tensor, generator: Generator) -> Tensor:
    """Draw one brain pixel per image.

    Parameters
    ----------
    brain : Tensor of bool, shape (B, 1, H, W)
        Brain masks. If a mask is empty, any pixel is drawn.
    generator : torch.Generator
        Draws the pixels.

    Returns
    -------
    Tensor, shape (B, 2)
        Row and column.
    """
    candidates = brain.flatten(1)
    candidates = candidates | ~candidates.any(1, keepdim=True)
    rank = candidates.cumsum(1)
    # Ten times as fast as torch.multinomial on a CPU.
    drawn = (uniform((len(brain), 1), 0.0, 1.0, generator) * rank[:, -1:]).long() + 1
    index = torch.searchsorted(rank, drawn)[:, 0]
    width = brain.shape[-1]
    return torch.stack([index // width, index % width], dim=1).float()


def random_shapes(
    centres: Tensor,
    height: int,
    width: int,
    config: AnomalyConfig,
    generator: Generator,
    kinds: Sequence[str] = SHAPES,
) -> Tensor:
    """Draw one binary shape per image: a rectangle, a disc or blobs.

    Blobs are a thresholded smooth random field. They replace the shape library of the publication, which may
    not be redistributed.

    Parameters
    ----------
    centres : Tensor, shape (B, 2)
        Row and column of the centres.
    height, width : int
        Size of the result in pixels.
    config : AnomalyConfig
        Distribution of the sizes.
    generator : torch.Generator
        Draws the shapes.
    kinds : sequence of str, default=SHAPES
        Kinds of shape to draw from.

    Returns
    -------
    Tensor of float, shape (B, 1, H, W)
        1 inside the shape, 0 outside.
    """
    batch, device = centres.shape[0], centres.device
    low, high = config.size
    if config.log_size:
        sides = uniform((batch, 2), math.log(low), math.log(high), generator).exp()
    else:
        sides = uniform((batch, 2), low, high, generator)
    angle = uniform((batch,), -math.pi / 12, math.pi / 12, generator)
    angle = angle * (torch.rand((batch,), generator=generator, device=device) < 0.5)
    rows = torch.arange(height, device=device)[None, :, None] - centres[:, 0, None, None]
    columns = torch.arange(width, device=device)[None, None, :] - centres[:, 1, None, None]
    cosine, sine = angle.cos()[:, None, None], angle.sin()[:, None, None]
    u = (cosine * rows + sine * columns) / (sides[:, 0, None, None] / 2)
    v = (cosine * columns - sine * rows) / (sides[:, 1, None, None] / 2)
    rectangle = (u.abs() <= 1) & (v.abs() <= 1)
    side = sides[:, 0, None, None] / 2
    disc = rows**2 + columns**2 <= side**2
    # A level set of a random field with about three periods per side, limited to an ellipse.
    field = torch.randn((batch, 1, 7, 7), generator=generator, device=device)
    grid = torch.stack([v, u], dim=-1) * 0.8
    field = F.grid_sample(field, grid, mode="bicubic", padding_mode="border", align_corners=True)[:, 0]
    radius = (u**2 + v**2).sqrt()
    blobs = (field + 0.8 - radius**2 > 0.4) & (radius <= 1.6)
    allowed = torch.tensor([SHAPES.index(kind) for kind in SHAPES if kind in kinds], device=device)
    drawn = torch.randint(0, len(allowed), (batch,), generator=generator, device=device)
    kind = allowed[drawn][:, None, None]
    shape = torch.where(kind == 0, rectangle, torch.where(kind == 1, disc, blobs))
    return shape[:, None].float()


def _matched(texture: Tensor, image: Tensor, mask: Tensor, matching: str) -> Tensor:
    """Match the intensities of a texture inside the mask to those of the image."""
    inside = mask > 0.5
    count = inside.sum((1, 2, 3), keepdim=True).clamp_min(1)

    def mean(x: Tensor) -> Tensor:
        return (x * inside).sum((1, 2, 3), keepdim=True) / count

    if matching == "mean":
        return (texture + mean(image) - mean(texture)).clamp(0, 1)

    def extremes(x: Tensor) -> tuple[Tensor, Tensor]:
        low = x.masked_fill(~inside, math.inf).amin((1, 2, 3), keepdim=True)
        high = x.masked_fill(~inside, -math.inf).amax((1, 2, 3), keepdim=True)
        return low, high

    low, high = extremes(image)
    texture_low, texture_high = extremes(texture)
    scaled = (texture - texture_low) / (texture_high - texture_low).clamp_min(1e-3) * (high - low) + low
    return torch.where(inside.any(3, keepdim=True).any(2, keepdim=True), scaled, texture).clamp(0, 1)


def paint_anomalies(
    images: Tensor,
    brain: Tensor,
    codebook: Tensor,
    config: AnomalyConfig,
    generator: Generator,
    components: Sequence[str] = COMPONENTS,
) -> tuple[Tensor, Tensor]:
    """Paint one synthetic anomaly, of one or several shapes, into each healthy slice.

    Parameters
    ----------
    images : Tensor, shape (B, 1, H, W)
        Healthy slices, intensities in [0, 1].
    brain : Tensor of bool, shape (B, 1, H, W)
        Brain masks.
    codebook : Tensor, shape (K,)
        Tissue intensities (centres of k-means) that define the classes for the intensity bias.
    config : AnomalyConfig
        Shape, edge and intensity of the anomalies.
    generator : torch.Generator
        Draws the anomalies.
    components : sequence of str, default=COMPONENTS
        Components that are used. Random numbers of unused components are drawn as well, so that the other
        components do not change.

    Returns
    -------
    corrupted : Tensor, shape (B, 1, H, W)
        Slices with anomalies, intensities in [0, 1].
    severity : Tensor, shape (B,)
        The larger of texture opacity and intensity bias, in [0, 1].

    References
    ----------
    Naval Marimont et al. 2024, "Ensembled cold-diffusion restorations for unsupervised anomaly detection".
    """
    batch, _, height, width = images.shape
    device = images.device
    kinds = [kind for kind in SHAPES if kind in components]
    mask = random_shapes(random_centres(brain, generator), height, width, config, generator, kinds)
    count = torch.randint(1, config.max_shapes + 1, (batch, 1, 1, 1), generator=generator, device=device)
    for number in range(2, config.max_shapes + 1):
        shape = random_shapes(random_centres(brain, generator), height, width, config, generator, kinds)
        mask = torch.maximum(mask, shape * (number <= count))
    soft = torch.rand((batch,), generator=generator, device=device) < config.blur_probability
    soft = soft & ("blur" in components)
    mask = gaussian_blur(mask, uniform((batch,), 0.0, config.max_blur, generator) * soft)
    mask = mask * brain

    opacity = uniform((batch, 1, 1, 1), 0.0, 1.0, generator) * ("texture" in components)
    other = torch.randperm(batch, generator=generator, device=device)
    shift = torch.randint(-40, 41, (2,), generator=generator, device=device).tolist()
    texture = _matched(torch.roll(images[other].flip(-2), shift, (-2, -1)), images, mask, config.matching)
    textured = images + opacity * mask * (texture - images)
    changed = (textured != images).flatten(1).any(1)
    opacity = opacity.flatten() * changed

    bias = uniform((batch, 1, 1, 1), 0.0, 1.0, generator) * ("bias" in components)
    sign = torch.randint(0, 2, (batch, 1, 1, 1), generator=generator, device=device) * 2 - 1
    classes = (textured - codebook.view(1, -1, 1, 1)).abs().argmin(1, keepdim=True)
    members = classes == torch.arange(len(codebook), device=device).view(1, -1, 1, 1)
    counts = (members & (mask > 0.5)).sum((2, 3))
    chance = counts / (counts.sum(1, keepdim=True) + config.class_offset)
    chosen = torch.rand(counts.shape, generator=generator, device=device) < chance
    chosen = chosen | ~chosen.any(1, keepdim=True)
    indicator = (members & chosen[:, :, None, None]).any(1, keepdim=True).to(images.dtype)
    region = mask * gaussian_blur(indicator, torch.ones(batch, device=device))
    corrupted = (textured + sign * bias * region).clamp(0, 1)
    strength = (corrupted - textured).abs().flatten(1).amax(1)
    return corrupted, torch.maximum(opacity, strength)


@dataclass(frozen=True)
class AugmentationConfig(Constrained):
    """Augmentation of healthy slices before anomalies are painted.

    Parameters
    ----------
    spatial : float, default=0.2
        Probability of a rotation and zoom.
    rotation : float, default=15.0
        Largest rotation in degrees.
    zoom : tuple of float, default=(0.75, 1.25)
        Range of the isotropic zoom.
    shift : float, default=0.25
        Largest shift of the window from the centre of the brain, as a fraction of its side.
    flip_front_back : bool, default=True
        Whether to mirror front to back as well as left to right. Such brains do not occur, and training is
        shorter without them.
    intensity : float, default=0.15
        Probability of each intensity change.
    """

    spatial: Probability = 0.2
    rotation: Annotated[float, Interval(0, 180)] = 15.0
    zoom: PositiveRange = (0.75, 1.25)
    shift: Annotated[float, Interval(0, 1)] = 0.25
    flip_front_back: bool = True
    intensity: Probability = 0.15

    renamed_fields: ClassVar[dict[str, str]] = {"back_to_front": "flip_front_back"}


def cut_windows(
    images: Tensor,
    labels: Tensor,
    window: tuple[int, int],
    config: AugmentationConfig,
    generator: Generator,
) -> tuple[Tensor, Tensor]:
    """Cut one window per slice around the brain, randomly mirrored, rotated and zoomed.

    Parameters
    ----------
    images : Tensor, shape (B, 1, H, W)
        Slices.
    labels : Tensor of bool or int, shape (B, 1, H, W)
        Brain mask or tissue classes, 0 outside the brain.
    window : tuple of int
        Height and width of the windows in pixels.
    config : AugmentationConfig
        Probabilities and ranges of the transforms.
    generator : torch.Generator
        Draws the transforms.

    Returns
    -------
    images, labels : Tensor, shape (B, 1, h, w)
        Windows, by linear and nearest-neighbour interpolation. Without rotation and zoom, pixels are copied.
    """
    brain = labels > 0
    batch, _, height, width = images.shape
    device = images.device
    h, w = window
    rows = brain.any(3).flatten(1).float()
    columns = brain.any(2).flatten(1).float()

    def middle(profile: Tensor) -> Tensor:
        position = torch.arange(profile.shape[1], device=device)
        return (profile * position).sum(1) / profile.sum(1).clamp_min(1)

    def jitter(size: int, extent: int) -> Tensor:
        slack = min(size * config.shift, max(0.0, (extent - size) / 2))
        return uniform((batch,), -slack, slack, generator)

    centre_row = (middle(rows) + jitter(h, height)).clamp(h / 2, height - h / 2).round()
    centre_column = (middle(columns) + jitter(w, width)).clamp(w / 2, width - w / 2).round()
    turned = (torch.rand((batch,), generator=generator, device=device) < config.spatial).float()
    angle = turned * uniform((batch,), -1.0, 1.0, generator) * math.radians(config.rotation)
    zoom = 1 + turned * (uniform((batch,), *config.zoom, generator) - 1)
    flips = torch.randint(0, 2, (2, batch), generator=generator, device=device) * 2.0 - 1
    if not config.flip_front_back:
        flips[1] = 1.0
    r = (torch.arange(h, device=device) - (h - 1) / 2)[None, :, None] * flips[0, :, None, None]
    c = (torch.arange(w, device=device) - (w - 1) / 2)[None, None, :] * flips[1, :, None, None]
    cosine, sine = angle.cos()[:, None, None], angle.sin()[:, None, None]
    scale = zoom[:, None, None]
    row = (cosine * r - sine * c) / scale + centre_row[:, None, None] - 0.5
    column = (sine * r + cosine * c) / scale + centre_column[:, None, None] - 0.5
    grid = torch.stack([column / (width - 1) * 2 - 1, row / (height - 1) * 2 - 1], dim=-1)
    cut = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
    nearest = F.grid_sample(
        labels.to(images.dtype), grid, mode="nearest", padding_mode="zeros", align_corners=True
    )
    return cut, nearest.to(labels.dtype)


def vary_intensity(images: Tensor, brain: Tensor, config: AugmentationConfig, generator: Generator) -> Tensor:
    """Vary brightness, gamma, noise and sharpness, each with probability ``config.intensity``.

    Parameters
    ----------
    images : Tensor, shape (B, 1, H, W)
        Slices, intensities in [0, 1].
    brain : Tensor of bool, shape (B, 1, H, W)
        Brain masks.
    config : AugmentationConfig
        Probability of each change.
    generator : torch.Generator
        Draws the changes.

    Returns
    -------
    Tensor, shape (B, 1, H, W)
        Slices, intensities in [0, 1], 0 outside the brain.
    """
    batch = images.shape[0]
    device = images.device

    def selected() -> Tensor:
        draw = torch.rand((batch, 1, 1, 1), generator=generator, device=device)
        return draw < config.intensity

    def gamma() -> Tensor:
        # Log-uniform from 1/2 to 2.
        return uniform((batch, 1, 1, 1), -math.log(2), math.log(2), generator).exp()

    x = torch.where(selected(), images * uniform((batch, 1, 1, 1), 0.9, 1.1, generator), images).clamp(0, 1)
    x = torch.where(selected(), x ** gamma(), x)
    x = torch.where(selected(), 1 - (1 - x) ** gamma(), x)
    noise = torch.randn(x.shape, generator=generator, device=device)
    noise = noise * uniform((batch, 1, 1, 1), 0.0, 0.05, generator)
    x = torch.where(selected(), x + noise, x)
    blurred = gaussian_blur(x, uniform((batch,), 0.5, 1.5, generator))
    x = torch.where(selected(), blurred, x)
    return x.clamp(0, 1) * brain


def vary_intensities(
    slices: Tensor, probability: float, fine_bias: float, generator: Generator, *, mirrored: bool
) -> Tensor:
    """Vary contrast, bias field, brightness, gamma, noise and sharpness; neighbouring slices alike.

    Contrast is also reduced, since spin-echo T1w scans have a third of the contrast between grey and white
    matter of MPRAGE scans.

    Parameters
    ----------
    slices : Tensor, shape (B, C, H, W)
        Neighbouring slices as channels, intensities in [0, 1], 0 outside the brain.
    probability : float
        Probability of each change of range, brightness, gamma, noise and sharpness.
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
    x = torch.where(selected(), reduce_contrast(x, slices > 0, draw(MIN_CONTRAST, 1.0)), x)
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


def reduce_contrast(images: Tensor, brain: Tensor, factor: Tensor) -> Tensor:
    """Move intensities towards the mean of the brain, and scale them so that 1 remains 1.

    Parameters
    ----------
    images : Tensor, shape (B, C, H, W)
        Slices, intensities in [0, 1].
    brain : Tensor of bool, shape (B, C, H, W)
        Pixels of which the mean is computed.
    factor : Tensor, shape (B, 1, 1, 1)
        Factor of the differences from the mean, in (0, 1].

    Returns
    -------
    Tensor, shape (B, C, H, W)
        Slices, intensities in [0, 1].
    """
    axes = (1, 2, 3)
    mean = (images * brain).sum(axes, keepdim=True) / brain.sum(axes, keepdim=True).clamp_min(1)
    return (mean + factor * (images - mean)) / (mean + factor * (1 - mean))


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
