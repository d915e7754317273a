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

from bids_uad.constraints import (
    Constrained,
    Count,
    Interval,
    NonNegative,
    OneOf,
    PositiveRange,
    Probability,
    invalid,
)

SHAPES = ("rectangle", "disc", "blobs")
COMPONENTS = (*SHAPES, "texture", "bias", "blur")
"""Components of synthetic anomalies: shapes, foreign texture, intensity bias and soft edges."""
MIN_CONTRAST = 0.35
"""Smallest factor of the differences between tissues in the augmentation of intensities."""
WINDOW, WINDOW_MARGIN = 64, 10
"""Side of the window of a published anomaly, and smallest distance of a disc from its edge, in pixels."""
LARGEST_DEFORMATION = 0.25
"""Largest scale of the published elastic deformation, as a fraction of the side of the image."""


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
    published : bool, default=False
        Whether to place anomalies as in the published code: one shape inside a window of 64 x 64 pixels
        around a brain pixel, with a patch of another slice as texture. Matching and tissue classes then
        include the soft edge of the shape.

    Raises
    ------
    InvalidParameterError
        If a value is not allowed, or published shapes do not fit into their window.
    """

    size: PositiveRange = (10.0, 44.0)
    log_size: bool = False
    max_shapes: Count = 1
    max_blur: NonNegative = 5.0
    blur_probability: Probability = 0.7
    matching: Annotated[str, OneOf("minmax", "mean")] = "minmax"
    class_offset: NonNegative = 1000.0
    published: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        largest = WINDOW - 2 * WINDOW_MARGIN
        if self.published and self.size[1] > largest:
            raise invalid(self, "size", f"at most {largest} pixels if 'published' is True")


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
    return _select_kinds([rectangle, disc, blobs], kinds, generator)


def window_shapes(
    batch: int, config: AnomalyConfig, generator: Generator, kinds: Sequence[str] = SHAPES
) -> Tensor:
    """Draw one binary shape per image in a window of 64 x 64 pixels, as in the published code.

    Rectangles have even sides and any position inside the window; half of them are rotated about its centre.
    Discs keep a distance of 10 pixels from its edge. Blobs, which replace the published shape library, lie at
    its centre.

    Parameters
    ----------
    batch : int
        Number of shapes.
    config : AnomalyConfig
        Range of the sizes.
    generator : torch.Generator
        Draws the shapes.
    kinds : sequence of str, default=SHAPES
        Kinds of shape to draw from.

    Returns
    -------
    Tensor of float, shape (batch, 1, 64, 64)
        1 inside the shape, 0 outside.
    """
    device = generator.device

    def integers(low: Tensor | int, high: Tensor | int, count: int) -> Tensor:
        draw = torch.rand((batch, count), generator=generator, device=device)
        return low + (draw * (high - low + 1)).floor()

    low, high = (int(side) for side in config.size)
    middle = (WINDOW - 1) / 2
    offsets = torch.arange(WINDOW, device=device) - middle
    half = integers(low, high, 2) // 2
    centre = integers(half, WINDOW - half, 2)
    angle = uniform((batch,), -math.pi / 12, math.pi / 12, generator)
    angle = angle * (torch.rand((batch,), generator=generator, device=device) < 0.5)
    cosine, sine = angle.cos()[:, None, None], angle.sin()[:, None, None]
    rows, columns = offsets[None, :, None], offsets[None, None, :]
    turned = torch.stack([cosine * rows + sine * columns, cosine * columns - sine * rows], 1) + middle
    first, last = ((centre + sign * half - 0.5)[..., None, None] for sign in (-1, 1))
    rectangle = ((turned >= first) & (turned < last)).all(1)
    radius = integers(low, high, 1) // 2
    margin = radius + WINDOW_MARGIN
    centre = integers(margin, WINDOW - margin, 2)
    # The published grid has 64 points from 0 to 64.
    points = torch.linspace(0, WINDOW, WINDOW, device=device)
    squares = (points - centre[..., None]) ** 2
    disc = squares[:, 0, :, None] + squares[:, 1, None, :] <= radius[..., None] ** 2
    centres = torch.full((batch, 2), middle, device=device)
    blobs = random_shapes(centres, WINDOW, WINDOW, config, generator, ("blobs",))[:, 0] > 0
    return _select_kinds([rectangle, disc, blobs], kinds, generator)


def _select_kinds(shapes: Sequence[Tensor], kinds: Sequence[str], generator: Generator) -> Tensor:
    """Select one of the kinds of shape of each image; `shapes` are (B, H, W), the result (B, 1, H, W)."""
    device = generator.device
    allowed = torch.tensor([SHAPES.index(kind) for kind in SHAPES if kind in kinds], device=device)
    batch = len(shapes[0])
    kind = allowed[torch.randint(0, len(allowed), (batch,), generator=generator, device=device)]
    return torch.stack(list(shapes))[kind, torch.arange(batch, device=device)][:, None].float()


def cut_out(images: Tensor, rows: Tensor, columns: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut a rectangle out of each image of a batch, with zeros beyond the border.

    Parameters
    ----------
    images : Tensor, shape (B, 1, H, W)
        Images.
    rows, columns : Tensor of int64, shape (B,)
        First row and column of the rectangles; may be negative.
    size : tuple of int
        Height and width of the rectangles.

    Returns
    -------
    Tensor, shape (B, 1, *size)
        Rectangles.
    """
    height, width = images.shape[-2:]
    row = (rows[:, None] + torch.arange(size[0], device=images.device))[:, :, None]
    column = (columns[:, None] + torch.arange(size[1], device=images.device))[:, None]
    known = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    return (images[batch, 0, row.clamp(0, height - 1), column.clamp(0, width - 1)] * known)[:, None]


def _boxes(masks: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return first pixel and length, each (B,), of the bounding boxes along both axes; the image if empty."""
    boxes = []
    for axis in (3, 2):
        profile = masks.any(axis)[:, 0]
        profile = profile | ~profile.any(1, keepdim=True)
        first = profile.to(torch.uint8).argmax(1)
        last = profile.shape[1] - 1 - profile.flip(1).to(torch.uint8).argmax(1)
        boxes.append((first, last + 1 - first))
    return boxes


def _random_starts(masks: Tensor, size: tuple[int, int], generator: Generator) -> list[Tensor]:
    """Draw first row and column, each (B,), of a rectangle in the bounding box, or centre it on that."""
    starts = []
    for (first, length), side in zip(_boxes(masks), size, strict=True):
        slack = length - side
        drawn = (uniform(slack.shape, 0.0, 1.0, generator) * slack).long()
        starts.append(first + torch.where(slack > 0, drawn, slack.div(2, rounding_mode="floor")))
    return starts


def _window_starts(brain: Tensor, generator: Generator) -> list[Tensor]:
    """Draw first row and column, each (B,), of windows around brain pixels that lie inside the image."""
    half = WINDOW // 2
    height, width = brain.shape[-2:]
    possible, inner = torch.zeros_like(brain), torch.zeros_like(brain)
    possible[..., half : height - half + 1, half : width - half + 1] = True
    inner[..., half : height - half, half : width - half] = True
    inner &= brain
    centres = random_centres(
        torch.where(inner.flatten(1).any(1)[:, None, None, None], inner, possible), generator
    )
    return [start.long() - half for start in centres.unbind(1)]


def _foreign_patches(images: Tensor, generator: Generator) -> Tensor:
    """Cut a window out of the brain of another slice of the batch."""
    source = images[torch.randperm(len(images), generator=generator, device=images.device)]
    return cut_out(source, *_random_starts(source > 0, (WINDOW, WINDOW), generator), (WINDOW, WINDOW))


def _matched(texture: Tensor, image: Tensor, inside: Tensor, matching: str) -> Tensor:
    """Match the intensities of a texture inside a mask to those of the image."""
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
    if config.published:
        brain = images > 0
        starts = _window_starts(brain, generator)
        mask = window_shapes(batch, config, generator, kinds)
    else:
        mask = random_shapes(random_centres(brain, generator), height, width, config, generator, kinds)
        count = torch.randint(1, config.max_shapes + 1, (batch, 1, 1, 1), generator=generator, device=device)
        for number in range(2, config.max_shapes + 1):
            shape = random_shapes(random_centres(brain, generator), height, width, config, generator, kinds)
            mask = torch.maximum(mask, shape * (number <= count))
    soft = torch.rand((batch,), generator=generator, device=device) < config.blur_probability
    soft = soft & ("blur" in components)
    mask = gaussian_blur(mask, uniform((batch,), 0.0, config.max_blur, generator) * soft)
    if config.published:
        mask = cut_out(mask, *(-start for start in starts), (height, width))
    mask = mask * brain
    inside = mask > (0.0 if config.published else 0.5)

    opacity = uniform((batch, 1, 1, 1), 0.0, 1.0, generator) * ("texture" in components)
    if config.published:
        patches = _foreign_patches(images, generator)
        texture = cut_out(patches, *(-start for start in starts), (height, width))
    else:
        other = torch.randperm(batch, generator=generator, device=device)
        shift = torch.randint(-40, 41, (2,), generator=generator, device=device).tolist()
        texture = torch.roll(images[other].flip(-2), shift, (-2, -1))
    texture = _matched(texture, images, inside, config.matching)
    textured = images + opacity * mask * (texture - images)
    changed = (textured != images).flatten(1).any(1)
    opacity = opacity.flatten() * changed

    bias = uniform((batch, 1, 1, 1), 0.0, 1.0, generator) * ("bias" in components)
    sign = torch.randint(0, 2, (batch, 1, 1, 1), generator=generator, device=device) * 2 - 1
    classes = (textured - codebook.view(1, -1, 1, 1)).abs().argmin(1, keepdim=True)
    members = classes == torch.arange(len(codebook), device=device).view(1, -1, 1, 1)
    counts = (members & inside).sum((2, 3))
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
    published : bool, default=False
        Whether to augment as in the published code: windows anywhere in the bounding box of the brain
        (`shift` is not used), an elastic deformation, a rotation and a zoom with probability `spatial` each,
        noise also outside the brain, and blur with half the probability of the other intensity changes.
    """

    spatial: Probability = 0.2
    rotation: Annotated[float, Interval(0, 180)] = 15.0
    zoom: PositiveRange = (0.75, 1.25)
    shift: Annotated[float, Interval(0, 1)] = 0.25
    flip_front_back: bool = True
    intensity: Probability = 0.15
    published: bool = False

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
        Windows, by linear (published: cubic) and nearest-neighbour interpolation. Without rotation and zoom,
        pixels are copied.
    """
    if config.published:
        return _published_windows(images, labels, window, config, generator)
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


def _published_windows(
    images: Tensor, labels: Tensor, window: tuple[int, int], config: AugmentationConfig, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Cut windows out of the bounding boxes of brains, and deform, rotate, zoom and mirror some of them."""
    batch, device = len(images), images.device

    def selected(probability: float) -> Tensor:
        return torch.rand((batch, 1, 1, 1), generator=generator, device=device) < probability

    starts = _random_starts(labels > 0, window, generator)
    cut, region = (cut_out(part, *starts, window) for part in (images, labels))
    steps = torch.stack([selected(config.spatial) for _ in range(3)])
    chosen = torch.nonzero(steps.any(0).flatten()).flatten()
    if len(chosen):
        deformed, turned, zoomed = steps[:, chosen]
        grid = _published_grid(window, deformed, turned, zoomed, config, generator)
        centres = []
        for (first, length), side in zip(_boxes(labels[chosen] > 0), window, strict=True):
            draw = torch.rand((len(chosen),), generator=generator, device=device)
            centres.append(first + side / 2 + draw * (length - side))
        position = grid + torch.stack(centres, 1)[..., None, None]
        last = torch.tensor(images.shape[-2:], device=device) - 1
        place = (position.movedim(1, -1) / last * 2 - 1).flip(-1)
        cubic = F.grid_sample(images[chosen], place, mode="bicubic", align_corners=True)
        nearest = F.grid_sample(labels[chosen].to(images.dtype), place, mode="nearest", align_corners=True)
        cut[chosen], region[chosen] = cubic, nearest.to(labels.dtype)
    for axis in (-2, -1) if config.flip_front_back else (-2,):
        mirrored = selected(0.5)
        cut, region = (torch.where(mirrored, part.flip(axis), part) for part in (cut, region))
    return cut, region


def _published_grid(
    size: tuple[int, int],
    deformed: Tensor,
    turned: Tensor,
    zoomed: Tensor,
    config: AugmentationConfig,
    generator: Generator,
) -> Tensor:
    """Return coordinates with mean 0, shape (B, 2, *size), after the transforms selected by (B, 1, 1, 1)."""
    batch, device = len(deformed), deformed.device
    axes = [torch.arange(side, device=device) - (side - 1) / 2 for side in size]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]
    grid = grid + deformed * elastic_offsets(batch, size, generator)
    angle = turned * uniform((batch, 1, 1, 1), -1.0, 1.0, generator) * math.radians(config.rotation)
    rows, columns = grid.split(1, 1)
    grid = torch.cat(
        [angle.cos() * rows - angle.sin() * columns, angle.sin() * rows + angle.cos() * columns], 1
    )
    grid = torch.where(zoomed, grid * _around_one(batch, config.zoom, generator), grid)
    return grid - grid.mean((2, 3), keepdim=True)


def elastic_offsets(batch: int, size: tuple[int, int], generator: Generator) -> Tensor:
    """Draw the elastic deformations of the published code: smoothed white noise of limited amplitude.

    The scale is drawn from 0 to a quarter of the image. It is the standard deviation of the (periodic)
    Gaussian; the largest offset along an axis is an eighth to a half of it.

    Parameters
    ----------
    batch : int
        Number of deformations.
    size : tuple of int
        Height and width in pixels.
    generator : torch.Generator
        Draws the deformations.

    Returns
    -------
    Tensor, shape (batch, 2, *size)
        Offsets along rows and columns in pixels.
    """
    device = generator.device
    scale = uniform((batch, 1, 1, 1), 0.0, LARGEST_DEFORMATION, generator)
    sigma = scale * torch.tensor(size, device=device)[:, None, None]
    frequencies = [torch.fft.fftfreq(side, device=device) for side in size]
    spread = (frequencies[0][:, None] * sigma[:, :1]) ** 2 + (frequencies[1] * sigma[:, 1:]) ** 2
    noise = uniform((batch, 2, *size), -1.0, 1.0, generator)
    smooth = torch.fft.ifft2(torch.fft.fft2(noise) * torch.exp(-2 * math.pi**2 * spread)).real
    amplitude = sigma * uniform((batch, 2, 1, 1), 1 / 8, 1 / 2, generator)
    return smooth * amplitude / smooth.abs().amax((2, 3), keepdim=True)


def _around_one(batch: int, limits: tuple[float, float], generator: Generator) -> Tensor:
    """Draw factors, shape (batch, 1, 1, 1), of which half are below 1 and half above."""
    shape = (batch, 1, 1, 1)
    below = torch.rand(shape, generator=generator, device=generator.device) < 0.5
    low, high = (uniform(shape, *sorted((limit, 1.0)), generator) for limit in limits)
    return torch.where(below, low, high)


def _published_intensities(images: Tensor, config: AugmentationConfig, generator: Generator) -> Tensor:
    """Vary brightness, gamma between the extremes of an image, noise and sharpness."""
    batch, device = len(images), images.device

    def selected() -> Tensor:
        return torch.rand((batch, 1, 1, 1), generator=generator, device=device) < config.intensity

    x = torch.where(selected(), images * uniform((batch, 1, 1, 1), 0.9, 1.1, generator), images)
    for sign in (1, -1):
        low, high = (sign * x).aminmax(dim=-1, keepdim=True)
        low, high = low.amin(-2, keepdim=True), high.amax(-2, keepdim=True)
        extent = (high - low).clamp_min(1e-7)
        gamma = _around_one(batch, (0.5, 2.0), generator)
        x = torch.where(selected(), sign * (((sign * x - low) / extent) ** gamma * extent + low), x)
    noise = torch.randn(x.shape, generator=generator, device=device)
    x = torch.where(selected(), x + noise * uniform((batch, 1, 1, 1), 0.0, 0.05, generator), x)
    blurred = gaussian_blur(x, uniform((batch,), 0.5, 1.5, generator))
    half = torch.rand((batch, 1, 1, 1), generator=generator, device=device) < 0.5
    return torch.where(selected() & half, blurred, x).clamp(0, 1)


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
        Slices, intensities in [0, 1], 0 outside the brain unless ``config.published``.
    """
    if config.published:
        return _published_intensities(images, config, generator)
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


def vary_intensities(slices: Tensor, probability: float, fine_bias: float, generator: Generator) -> Tensor:
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
    x = (x * sum(fields).exp()).clamp(0, 1)
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
