"""Synthetic anomalies painted into healthy slices, and the augmentations before them.

The disentangled anomaly generation of Disyre v2 (Naval Marimont et al. 2024): a random shape, filled with
a foreign texture and an intensity bias, with a known severity. Everything is vectorised over the batch and
draws from the generator it is handed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from bids_uad.constraints import (
    Constrained,
    Count,
    Interval,
    NonNegative,
    OneOf,
    PositiveRange,
    Probability,
)

SHAPES = ("rectangle", "disc", "blobs")
COMPONENTS = (*SHAPES, "texture", "bias", "blur")
"""What synthetic anomalies are made of: kinds of shape, foreign texture, intensity bias, soft edges."""


@dataclass(frozen=True)
class AnomalyConfig(Constrained):
    """What synthetic anomalies look like.

    Parameters
    ----------
    size : tuple of float
        Smallest and largest side or diameter of a shape, in pixels.
    log_size : bool
        Draw sizes log-uniformly, so that small shapes are as common as large ones.
    max_shapes : int
        An anomaly is one to this many shapes, as multifocal disease is. A short training then sees more of
        what it has to undo.
    max_blur : float
        Largest standard deviation of the mask's edge, in pixels.
    blur_probability : float
        How often the edge is soft.
    matching : {"minmax", "mean"}
        How a foreign texture's intensities are fitted to those it replaces; the publication means the
        first, its code does the second.
    class_offset : float
        Pixels added to the mask when choosing which tissue classes the bias touches.
    """

    size: PositiveRange = (10.0, 44.0)
    log_size: bool = False
    max_shapes: Count = 1
    max_blur: NonNegative = 5.0
    blur_probability: Probability = 0.7
    matching: Annotated[str, OneOf("minmax", "mean")] = "minmax"
    class_offset: NonNegative = 1000.0


def uniform(shape: tuple[int, ...], low: float, high: float, generator: Generator) -> Tensor:
    """Draw uniformly from [low, high) on the generator's device."""
    draw = torch.rand(shape, generator=generator, device=generator.device)
    return low + (high - low) * draw


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur each image of a batch by its own standard deviation.

    Parameters
    ----------
    images : Tensor, shape (B, 1, H, W)
    sigma : Tensor, shape (B,)
        In pixels; 0 leaves the image as it is. The kernel is cut at 3 standard deviations of the largest.

    Returns
    -------
    Tensor, shape (B, 1, H, W)
        Borders are extended by replication.
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
        An image without brain gets a pixel anywhere.

    Returns
    -------
    Tensor, shape (B, 2)
        Row and column.
    """
    among = brain.flatten(1)
    among = among | ~among.any(1, keepdim=True)
    rank = among.cumsum(1)
    # A tenth of the time that torch.multinomial takes on a CPU.
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
    """Draw one binary shape per image: a rectangle, a disc or a cloud of blobs.

    Blobs are a thresholded smooth random field, in place of the publication's shape library, which is not
    free to pass on.

    Parameters
    ----------
    centres : Tensor, shape (B, 2)
    height, width : int
    kinds : sequence of str
        Those of `SHAPES` to draw from.

    Returns
    -------
    Tensor of float, shape (B, 1, H, W)
        0 or 1.
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
    # A field of about three bumps per side inside an ellipse; its level set has one or several parts.
    field = torch.randn((batch, 1, 7, 7), generator=generator, device=device)
    grid = torch.stack([v, u], dim=-1) * 0.8
    field = F.grid_sample(field, grid, mode="bicubic", padding_mode="border", align_corners=True)[:, 0]
    radius = (u**2 + v**2).sqrt()
    blobs = (field + 0.8 - radius**2 > 0.4) & (radius <= 1.6)
    places = torch.tensor([SHAPES.index(kind) for kind in SHAPES if kind in kinds], device=device)
    drawn = torch.randint(0, len(places), (batch,), generator=generator, device=device)
    kind = places[drawn][:, None, None]
    shape = torch.where(kind == 0, rectangle, torch.where(kind == 1, disc, blobs))
    return shape[:, None].float()


def _matched(texture: Tensor, image: Tensor, mask: Tensor, matching: str) -> Tensor:
    """Fit the texture's intensities inside the mask to the image's."""
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
    """Corrupt healthy slices with one synthetic anomaly each, of one or several shapes.

    Parameters
    ----------
    images : Tensor, shape (B, 1, H, W)
        Healthy slices in [0, 1].
    brain : Tensor of bool, shape (B, 1, H, W)
    codebook : Tensor, shape (K,)
        Tissue intensities (k-means centres) that split a slice into classes for the intensity bias.
    config : AnomalyConfig
    generator : torch.Generator
    components : sequence of str
        Those of `COMPONENTS` that anomalies are made of. One that is switched off is still drawn, so that
        the rest stays the same.

    Returns
    -------
    corrupted : Tensor, shape (B, 1, H, W)
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
    """How healthy slices are varied before they are corrupted.

    Parameters
    ----------
    spatial : float
        Probability of a rotation and zoom.
    rotation : float
        Largest rotation, in degrees.
    zoom : tuple of float
        Range of the isotropic zoom.
    shift : float
        Largest shift of the window off the brain's centre, as a share of its side.
    flip_front_back : bool
        Mirror front to back as well as left to right. Brains never come that way, and a network that need
        not allow for it learns sooner what belongs where.
    intensity : float
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
    """Cut one window per slice around its brain, mirrored, rotated and zoomed at random.

    Parameters
    ----------
    images : Tensor, shape (B, 1, H, W)
    labels : Tensor of bool or int, shape (B, 1, H, W)
        A brain mask or tissue classes, 0 outside the brain.
    window : tuple of int
        Height and width of the windows.

    Returns
    -------
    images, labels : Tensor, shape (B, 1, h, w)
        Windows without rotation are copied pixel by pixel; labels keep their type.
    """
    brain = labels > 0
    batch, _, height, width = images.shape
    device = images.device
    h, w = window
    # The window may slide as far as the image allows.
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
    """Change brightness, contrast curve, noise and sharpness, each at random; background stays 0.

    Parameters
    ----------
    images, brain : Tensor, shape (B, 1, H, W)

    Returns
    -------
    Tensor, shape (B, 1, H, W)
        In [0, 1].
    """
    batch = images.shape[0]
    device = images.device

    def picked() -> Tensor:
        draw = torch.rand((batch, 1, 1, 1), generator=generator, device=device)
        return draw < config.intensity

    def gamma() -> Tensor:
        # Half of the draws below 1, half above, as far as 2 either way.
        return uniform((batch, 1, 1, 1), -math.log(2), math.log(2), generator).exp()

    x = torch.where(picked(), images * uniform((batch, 1, 1, 1), 0.9, 1.1, generator), images).clamp(0, 1)
    x = torch.where(picked(), x ** gamma(), x)
    x = torch.where(picked(), 1 - (1 - x) ** gamma(), x)
    noise = torch.randn(x.shape, generator=generator, device=device)
    noise = noise * uniform((batch, 1, 1, 1), 0.0, 0.05, generator)
    x = torch.where(picked(), x + noise, x)
    blurred = gaussian_blur(x, uniform((batch,), 0.5, 1.5, generator))
    x = torch.where(picked(), blurred, x)
    return x.clamp(0, 1) * brain
