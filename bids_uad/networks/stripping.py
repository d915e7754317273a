"""What skull-stripping leaves on brains and takes off them: a network learns that neither is a lesion."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from bids_uad.networks.blemishes import draw_each, smooth_field
from bids_uad.networks.corruptions import AnomalyConfig, random_centres, random_shapes

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
