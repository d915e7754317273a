"""Random shapes, fields and deformations of volumes, for :mod:`bids_uad.methods.pls.painting`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

COARSE = 8
"""Voxels between the points at which a deformation is computed."""


class Box(tuple):
    """Slices of the three axes of a volume, which index it."""

    @classmethod
    def whole(cls, volume: Tensor) -> Box:
        """Return the box that contains a whole volume."""
        return cls(slice(0, size) for size in volume.shape)


def bounding_box(mask: Tensor, margin: int) -> Box:
    """Return the smallest box that contains a mask and a margin around it, within the volume."""
    planes = mask.any(2).any(1), mask.any(2).any(0), mask.any(1).any(0)
    spans = []
    for occupied, size in zip(planes, mask.shape, strict=True):
        found = occupied.nonzero().flatten().tolist() or [0, size - 1]
        spans.append(slice(max(0, found[0] - margin), min(size, found[-1] + 1 + margin)))
    return Box(spans)


def uniform(low: float, high: float, generator: Generator) -> float:
    """Draw a number from [low, high)."""
    return low + (high - low) * float(torch.rand((), generator=generator))


def log_uniform(low: float, high: float, generator: Generator) -> float:
    """Draw a positive number from [low, high), whose logarithm is uniformly distributed."""
    return math.exp(uniform(math.log(low), math.log(high), generator))


def chance(probability: float, generator: Generator) -> bool:
    """Return True with the given probability."""
    return uniform(0, 1, generator) < probability


def integer(low: int, high: int, generator: Generator) -> int:
    """Draw an integer from [low, high]."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def draw_voxels(mask: Tensor, number: int, generator: Generator) -> Tensor:
    """Draw voxels of a mask with replacement.

    Parameters
    ----------
    mask : Tensor of bool, shape (Z, H, W)
        Mask.
    number : int
        Number of voxels.
    generator : torch.Generator
        Draws the voxels.

    Returns
    -------
    Tensor, shape (number, 3)
        Indices; none if the mask is empty.
    """
    places = mask.flatten().nonzero().flatten()
    if not number or not len(places):
        return torch.zeros((0, 3))
    drawn = places[torch.randint(0, len(places), (number,), generator=generator)]
    _, height, width = mask.shape
    return torch.stack([drawn // (height * width), drawn // width % height, drawn % width], 1).float()


def normal_field(shape: tuple[int, ...], spacing: float, generator: Generator) -> Tensor:
    """Interpolate standard normal numbers on a grid of `spacing` voxels; the standard deviation is about 1.

    Parameters
    ----------
    shape : tuple of int
        Shape (Z, H, W).
    spacing : float
        Voxels between the grid points.
    generator : torch.Generator
        Draws the numbers.

    Returns
    -------
    Tensor, shape (Z, H, W)
        Field.
    """
    coarse = torch.randn((1, 1, *(math.ceil(size / spacing) + 1 for size in shape)), generator=generator)
    fine = F.interpolate(coarse, size=shape, mode="trilinear", align_corners=True)[0, 0]
    # The mean squared weight of linear interpolation is 2/3 per axis.
    return fine * 1.5**1.5


def gaussian_smooth(volume: Tensor, sigma: float) -> Tensor:
    """Smooth a volume by a Gaussian whose weights are normalised within the volume.

    Parameters
    ----------
    volume : Tensor, shape (Z, H, W)
        Volume.
    sigma : float
        Standard deviation in voxels; below 0.2, the volume is returned unchanged.

    Returns
    -------
    Tensor, shape (Z, H, W)
        Smoothed volume.
    """
    if sigma < 0.2:
        return volume
    for axis, size in enumerate(volume.shape):
        # A product with the weights of all pairs of positions is faster than a convolution.
        position = torch.arange(size, dtype=volume.dtype)
        weights = torch.exp(-0.5 * ((position[:, None] - position) / sigma) ** 2)
        matrix = weights / weights.sum(1, keepdim=True)
        volume = torch.movedim(torch.movedim(volume, axis, -1) @ matrix.T, -1, axis)
    return volume.contiguous()


def erode_in_plane(mask: Tensor, pixels: int) -> Tensor:
    """Erode a mask in each slice by squares of side ``2 * pixels + 1``.

    Parameters
    ----------
    mask : Tensor of bool, shape (Z, H, W)
        Mask.
    pixels : int
        Distance in pixels.

    Returns
    -------
    Tensor of bool, shape (Z, H, W)
        Eroded mask.
    """
    if not pixels:
        return mask
    outside = (~mask).float()[:, None]
    side = 2 * pixels + 1
    outside = F.max_pool2d(outside, (side, 1), stride=1, padding=(pixels, 0))
    return F.max_pool2d(outside, (1, side), stride=1, padding=(0, pixels))[:, 0] == 0


def _around(shape: tuple[int, ...], centre: Tensor, reach: float) -> tuple[Box, list[Tensor]]:
    """Return the box within `reach` of a centre, and the offsets of its voxels along each axis."""
    box = Box(
        slice(
            min(max(0, math.floor(float(c) - reach)), size - 1),
            max(min(size, math.ceil(float(c) + reach) + 1), 1),
        )
        for c, size in zip(centre, shape, strict=True)
    )
    axes = [torch.arange(part.start, part.stop) - float(c) for part, c in zip(box, centre, strict=True)]
    return box, list(torch.meshgrid(*axes, indexing="ij"))


def random_orientation(generator: Generator) -> Tensor:
    """Draw an orthogonal matrix, shape (3, 3)."""
    return torch.linalg.qr(torch.randn((3, 3), generator=generator)).Q


def ellipsoid(
    shape: tuple[int, ...], centre: Tensor, radius: float, roughness: float, generator: Generator
) -> tuple[Box, Tensor]:
    """Draw an ellipsoid with an irregular surface.

    Parameters
    ----------
    shape : tuple of int
        Shape of the volume.
    centre : Tensor, shape (3,)
        Centre, voxels.
    radius : float
        Geometric mean of the semi-axes, voxels; each differs from it by a factor of at most 1.6.
    roughness : float
        Irregularity of the surface: 0.45 times this is its standard deviation relative to the radius.
    generator : torch.Generator
        Draws axes, rotation and surface.

    Returns
    -------
    box : Box
        Part of the volume.
    mask : Tensor, shape of the box
        Fraction of each voxel that is inside, from 0 to 1.
    """
    factors = [math.exp(uniform(-0.35, 0.35, generator)) for _ in range(3)]
    mean = math.prod(factors) ** (1 / 3)
    axes = torch.tensor([radius * factor / mean for factor in factors])
    box, offsets = _around(shape, centre, 1.5 * (1 + roughness) * float(axes.max()) + 1)
    turned = torch.tensordot(random_orientation(generator), torch.stack(offsets), dims=1)
    distance = (turned / axes[:, None, None, None]).square().sum(0).sqrt()
    size = tuple(distance.shape)
    if roughness:
        coarse, fine = (normal_field(size, max(2.0, radius * part), generator) for part in (0.8, 0.3))
        distance = distance + roughness * (0.8 * coarse + 0.4 * fine) * 0.5
    return box, ((1 - distance) * radius + 0.5).clamp(0, 1)


def expand_shape(
    shape: tuple[int, ...], centre: Tensor, binary: Tensor, radius: float, generator: Generator
) -> tuple[Box, Tensor]:
    """Place a rotated, mirrored and scaled copy of a shape.

    Parameters
    ----------
    shape : tuple of int
        Shape of the volume.
    centre : Tensor, shape (3,)
        Centre, voxels.
    binary : Tensor of bool, shape (x, y, z)
        Shape, cropped.
    radius : float
        Radius in voxels of a sphere of the volume of the result; the scale is limited to 0.6 to 1.6.
    generator : torch.Generator
        Draws rotation (up to 20 degrees) and mirroring.

    Returns
    -------
    box : Box
        Part of the volume.
    mask : Tensor, shape of the box
        Fraction of each voxel that is inside, from 0 to 1.
    """
    binary = F.pad(binary, (1,) * 6)  # interpolation outside the volume would continue a shape of one voxel
    own = (3 * float(binary.sum()) / (4 * math.pi)) ** (1 / 3)
    scale = min(max(radius / max(own, 1.0), 0.6), 1.6)
    half = torch.tensor([(size - 1) / 2 for size in binary.shape])
    box, offsets = _around(shape, centre, scale * float(half.norm()) + 2)
    near = torch.eye(3) + 0.2 * torch.randn((3, 3), generator=generator)
    turn = torch.linalg.qr(near)
    signs = torch.where(torch.rand(3, generator=generator) < 0.5, -1.0, 1.0)
    # The axes of a shape are across, along and up; those of a volume are up, across and along.
    matrix = (turn.Q * turn.R.diag().sign()) @ torch.diag(signs)
    places = torch.stack([offsets[1], offsets[2], offsets[0]], -1) @ matrix.T / scale
    grid = (places / half).flip(-1)
    sampled = F.grid_sample(binary.float()[None, None], grid[None], mode="bilinear", align_corners=True)
    return box, sampled[0, 0]


def warp(
    image: Tensor,
    labels: Tensor,
    angles: Sequence[float],
    zoom: Sequence[float],
    shift: Sequence[float],
    pushes: Sequence[tuple[Tensor, float, float]],
    roughness: float,
    *,
    flip: bool,
    generator: Generator,
) -> tuple[Tensor, Tensor]:
    """Deform an image and its labels.

    Parameters
    ----------
    image : Tensor, shape (Z, H, W)
        Image, by linear interpolation.
    labels : Tensor of uint8, shape (Z, H, W)
        Labels, by nearest-neighbour interpolation.
    angles, zoom, shift : sequence of float
        Rotation about each axis in radians, factor of the size along each axis, and shift in voxels.
    pushes : sequence of (Tensor, float, float)
        Centre in the result, radius and largest displacement of points that push the tissue away (negative:
        attract it). The displacement is largest at the radius.
    roughness : float
        Standard deviation of a smooth random displacement with a scale of 32 voxels.
    flip : bool
        Whether to exchange left and right (rows).
    generator : torch.Generator
        Draws the random displacement.

    Returns
    -------
    image, labels : Tensor, shape (Z, H, W)
        Deformed copies.
    """
    shape = tuple(image.shape)
    counts = [math.ceil((size - 1) / COARSE) + 1 for size in shape]
    axes = [torch.linspace(0, size - 1, count) for size, count in zip(shape, counts, strict=True)]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    middle = torch.tensor([(size - 1) / 2 for size in shape])[:, None, None, None]
    for centre, radius, amount in pushes:
        away = points - centre[:, None, None, None]
        ratio = away.square().sum(0) / radius**2
        # Distance over radius, times exp((1 - ratio) / 2), is 1 at the radius and less elsewhere.
        points = points - away / radius * torch.exp((1 - ratio) / 2) * amount
    offset = points - middle - torch.tensor(shift)[:, None, None, None]
    matrix = torch.eye(3)
    for axis, angle in enumerate(angles):
        first, second = (other for other in range(3) if other != axis)
        turn = torch.eye(3)
        turn[first, first] = turn[second, second] = math.cos(angle)
        turn[first, second], turn[second, first] = -math.sin(angle), math.sin(angle)
        matrix = matrix @ turn
    source = torch.tensordot(torch.diag(1 / torch.tensor(zoom)) @ matrix, offset, dims=1) + middle
    if roughness:
        coarse = [max(2, math.ceil(size / 32) + 1) for size in shape]
        random = torch.randn((1, 3, *coarse), generator=generator) * roughness
        source = source + F.interpolate(random, size=counts, mode="trilinear", align_corners=True)[0]
    if flip:
        source[1] = shape[1] - 1 - source[1]
    scale = torch.tensor([2 / (size - 1) for size in shape])[:, None, None, None]
    grid = F.interpolate((source * scale - 1).flip(0)[None], size=shape, mode="trilinear", align_corners=True)
    grid = grid.permute(0, 2, 3, 4, 1)
    moved = F.grid_sample(image[None, None], grid, mode="bilinear", align_corners=True)[0, 0]
    nearest = F.grid_sample(labels.to(image.dtype)[None, None], grid, mode="nearest", align_corners=True)
    return moved, nearest[0, 0].to(labels.dtype)
