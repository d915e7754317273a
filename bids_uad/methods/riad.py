"""RIAD: reconstruction by inpainting.

Zavrtanik et al. 2021 ("Reconstruction by inpainting for visual anomaly detection"). Each cell of a slice is
masked once, and a U-Net fills it from the surrounding cells. The score is the gradient magnitude
dissimilarity of the slice and the filled slice, averaged over several cell sizes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from bids_uad.constraints import Constrained, Count, Interval, Items, Positive, invalid
from bids_uad.methods.base import (
    BRAIN_FIELD,
    OPTIMISER,
    WHOLE_SLICE,
    Batch,
    Detector,
    FieldOfView,
    GradientStage,
    OptimiserConfig,
    Stage,
)
from bids_uad.networks.counter_rng import SliceGenerator
from bids_uad.networks.ddpmpp import LITE_NETWORK, NETWORK, DDPMpp, DDPMppConfig, check_network
from bids_uad.networks.similarity import gms_maps, ssim_map
from bids_uad.space import CROP

SMALLEST_FIELD = 24
"""Smallest side of the field of view in pixels, so that gradients exist after halving it three times."""
INPAINTING = replace(NETWORK, blocks=(1, 1, 1, 2, 3, 2), time_embedding=False, rescale=False)


@dataclass(frozen=True)
class RIADHyper(Constrained):
    """Hyper-parameters of RIAD.

    Parameters
    ----------
    network : DDPMppConfig
        Inpainting network.
    cell_sizes : tuple of int, default=(8, 16, 28, 32)
        Sides of the square cells in pixels. Cells at the end of the field of view may be smaller.
    n_sets : int, default=5
        Number of disjoint sets of cells, each of which is masked once.
    weight_by_cells : bool, default=False
        Whether to divide the map of each cell size by the number of cells, as published, which gives the
        largest cells most weight. If False, all sizes have the same weight.
    field_of_view : tuple of int, default=(160, 192)
        Height and width in pixels of the part of a slice that is processed.
    steps, batch_size, learning_rate : int, int, float, default=100000, 16, 5e-5
        Training schedule: optimiser steps, slices per step, largest learning rate.
    optimiser : OptimiserConfig
        Learning-rate schedule, averaging of weights and clipping of gradients.
    """

    network: DDPMppConfig = INPAINTING
    cell_sizes: Annotated[tuple[Annotated[int, Interval(1, CROP)], ...], Items()] = (8, 16, 28, 32)
    n_sets: Annotated[int, Interval(2)] = 5
    weight_by_cells: bool = False
    field_of_view: FieldOfView = BRAIN_FIELD
    steps: Count = 100_000
    batch_size: Count = 16
    learning_rate: Positive = 5e-5
    optimiser: OptimiserConfig = OPTIMISER

    renamed_fields: ClassVar[dict[str, str]] = {
        "cells": "cell_sizes",
        "parts": "n_sets",
        "weigh_by_cells": "weight_by_cells",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_network(self, "field_of_view", time_embedding=False)
        if min(self.field_of_view) < SMALLEST_FIELD:
            raise invalid(self, "field_of_view", f"at least {SMALLEST_FIELD} pixels high and wide")


def cell_sets(uniform: Tensor, n_sets: int, side: int) -> Tensor:
    """Distribute the cells of a grid over disjoint sets.

    Parameters
    ----------
    uniform : Tensor, shape (B, rows, columns)
        One random number per cell; their ranks determine the sets.
    n_sets : int
        Number of sets.
    side : int
        Side of a cell in pixels.

    Returns
    -------
    Tensor of int64, shape (B, 1, rows * side, columns * side)
        Set of each pixel, 0 to ``n_sets - 1``. All sets have the same number of cells, but for the last ones,
        which have fewer if the number of cells is not divisible.
    """
    rank = uniform.flatten(1).argsort(1).argsort(1)
    grid = (rank // -(-rank.shape[1] // n_sets)).view(-1, 1, *uniform.shape[1:])
    return grid.repeat_interleave(side, 2).repeat_interleave(side, 3)


class RIAD(Detector):
    """Reconstruction by inpainting.

    Parameters
    ----------
    hyper : RIADHyper
        Hyper-parameters.
    """

    name: ClassVar[str] = "riad"
    citation: ClassVar[str] = "riad"
    presets: ClassVar[dict[str, RIADHyper]] = {
        "paper": RIADHyper(
            network=replace(INPAINTING, causal=True, activate_second=False),
            weight_by_cells=True,
            field_of_view=WHOLE_SLICE,
            optimiser=OptimiserConfig("constant", ema_decay=None, clip_norm=None),
        ),
        "default": RIADHyper(),
        "lite": RIADHyper(
            network=replace(LITE_NETWORK, time_embedding=False, rescale=False),
            cell_sizes=(16, 32),
            n_sets=3,
            steps=800,
            batch_size=8,
            learning_rate=1.5e-3,
        ),
    }
    modality_settings: ClassVar[dict[tuple[str, str], dict[str, Any]]] = {
        ("paper", "T1w"): {"learning_rate": 5e-6}
    }

    def __init__(self, hyper: RIADHyper) -> None:
        super().__init__(hyper)
        self.network = DDPMpp(hyper.network)

    def stages(self) -> list[Stage]:
        """Return one stage, which trains the network."""
        return [GradientStage.scheduled("inpainting", self.network, self.loss, self.hyper)]

    @staticmethod
    def _grid(slices: Tensor, cell: int) -> tuple[int, int]:
        """Return the numbers of rows and columns of cells that cover a slice."""
        height, width = slices.shape[-2:]
        return -(-height // cell), -(-width // cell)

    def inpaint(self, slices: Tensor, set_of: Tensor) -> Tensor:
        """Fill every cell from the cells of the other sets.

        Parameters
        ----------
        slices : Tensor, shape (B, 1, H, W)
            Slices, intensities in [0, 1].
        set_of : Tensor of int, shape (B, 1, at least H, at least W)
            Sets of the pixels, from :func:`cell_sets`.

        Returns
        -------
        Tensor, shape (B, 1, H, W)
            Filled slices.
        """
        n_sets = self.hyper.n_sets
        numbers = torch.arange(n_sets, device=slices.device).view(n_sets, 1, 1, 1, 1)
        height, width = slices.shape[-2:]
        hidden = set_of[None, ..., :height, :width] == numbers
        filled = self.network((slices[None] * ~hidden).flatten(0, 1)).view(hidden.shape)
        return (filled * hidden).sum(0)

    def loss(self, batch: Batch, generator: Generator) -> Tensor:
        """Compute squared error plus gradient and structural dissimilarity, at one random cell size."""
        slices = batch.slices
        draw = torch.randint(len(self.hyper.cell_sizes), (), generator=generator, device=slices.device)
        side = self.hyper.cell_sizes[int(draw)]
        uniform = torch.rand(
            (len(slices), *self._grid(slices, side)), generator=generator, device=slices.device
        )
        filled = self.inpaint(slices, cell_sets(uniform, self.hyper.n_sets, side))
        gradients = gms_maps(filled, slices)
        gradient_loss = sum(1 - part.mean() for part in gradients) / len(gradients)
        structure_loss = 1 - ssim_map(filled, slices, valid=True).mean()
        return (filled - slices).square().mean() + gradient_loss + structure_loss

    def score(self, slices: Tensor, brain: Tensor, generator: SliceGenerator) -> Tensor:
        """Compute the mean gradient dissimilarity of the filled slice over scales and cell sizes.

        The published map differs by a constant, the minimum of the volume, which is subtracted there.
        """
        total = torch.zeros_like(slices)
        for cell in self.hyper.cell_sizes:
            grid = self._grid(slices, cell)
            set_of = cell_sets(generator.uniform(cell, *grid), self.hyper.n_sets, cell)
            filled = self.inpaint(slices, set_of)
            maps = gms_maps(filled, slices)
            similarity = sum(
                F.interpolate(part, size=slices.shape[-2:], mode="bilinear", align_corners=False)
                for part in maps
            )
            weight = 1 / math.prod(grid) if self.hyper.weight_by_cells else 1 / len(self.hyper.cell_sizes)
            total += weight * (1 - similarity / len(maps))
        return torch.where(brain, total, 0.0)
