"""RIAD: reconstruction by inpainting.

Zavrtanik et al. 2021 ("Reconstruction by inpainting for visual anomaly detection"). Cells of a slice are
hidden in turn, and a U-Net fills each from what is around it. What the surroundings do not foretell is
anomalous.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from bids_uad.constraints import (
    Constrained,
    Count,
    Interval,
    Items,
    Positive,
    invalid,
)
from bids_uad.methods.base import (
    BRAIN_FIELD,
    WHOLE_SLICE,
    Batch,
    Detector,
    FieldOfView,
    GradientStage,
    Stage,
)
from bids_uad.networks.counter_rng import SliceGenerator
from bids_uad.networks.ddpmpp import (
    LITE_NETWORK,
    NETWORK,
    DDPMpp,
    DDPMppConfig,
    check_network,
)
from bids_uad.networks.similarity import gms_maps, ssim_map
from bids_uad.space import CROP

SMALLEST_FIELD = 24  # pixels; what is left of it after three halvings still has a gradient

INPAINTING = replace(NETWORK, blocks=(1, 1, 1, 2, 3, 2), time_embedding=False, rescale=False)


@dataclass(frozen=True)
class RIADHyper(Constrained):
    """Hyper-parameters of RIAD.

    Parameters
    ----------
    network : DDPMppConfig
    cells : tuple of int
        Sides of the square cells, in pixels. Where they do not divide a field, those at its end are cut.
    parts : int
        Disjoint sets of cells; each is hidden once.
    weigh_by_cells : bool
        Divide the map of each cell size by its number of cells, as published, so that the largest cells
        decide. Otherwise all sizes count alike.
    field_of_view : tuple of int
        Height and width of the part of a slice that is seen.
    steps, batch_size, learning_rate
        Training schedule.
    """

    network: DDPMppConfig = INPAINTING
    cells: Annotated[tuple[Annotated[int, Interval(1, CROP)], ...], Items()] = (8, 16, 28, 32)
    parts: Annotated[int, Interval(2)] = 5
    weigh_by_cells: bool = False
    field_of_view: FieldOfView = BRAIN_FIELD
    steps: Count = 100_000
    batch_size: Count = 16
    learning_rate: Positive = 5e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_network(self, "field_of_view", time_embedding=False)
        if min(self.field_of_view) < SMALLEST_FIELD:
            raise invalid(self, "field_of_view", f"at least {SMALLEST_FIELD} pixels high and wide")


def cell_parts(uniform: Tensor, parts: int, side: int) -> Tensor:
    """Share the cells of a grid out among disjoint sets.

    Parameters
    ----------
    uniform : Tensor, shape (B, rows, columns)
        Random numbers, one a cell, whose order decides.
    parts : int
    side : int
        Side of a cell in pixels.

    Returns
    -------
    Tensor of int64, shape (B, 1, rows * side, columns * side)
        The set, 0 to ``parts - 1``, of each pixel; set sizes differ by one cell at most.
    """
    rank = uniform.flatten(1).argsort(1).argsort(1)
    grid = (rank * parts // rank.shape[1]).view(-1, 1, *uniform.shape[1:])
    return grid.repeat_interleave(side, 2).repeat_interleave(side, 3)


class RIAD(Detector):
    """Reconstruction by inpainting.

    Parameters
    ----------
    hyper : RIADHyper
    """

    name: ClassVar[str] = "riad"
    citation: ClassVar[str] = "riad"
    presets: ClassVar[dict[str, RIADHyper]] = {
        "paper": RIADHyper(
            network=replace(INPAINTING, causal=True, activate_second=False),
            weigh_by_cells=True,
            field_of_view=WHOLE_SLICE,
        ),
        "default": RIADHyper(),
        "lite": RIADHyper(
            network=replace(LITE_NETWORK, time_embedding=False, rescale=False),
            cells=(16, 32),
            parts=3,
            steps=800,
            batch_size=8,
            learning_rate=1.5e-3,
        ),
    }

    def __init__(self, hyper: RIADHyper) -> None:
        super().__init__(hyper)
        self.network = DDPMpp(hyper.network)

    def stages(self) -> list[Stage]:
        """One network."""
        return [GradientStage.scheduled("inpainting", self.network, self.loss, self.hyper)]

    @staticmethod
    def _grid(slices: Tensor, cell: int) -> tuple[int, int]:
        """Rows and columns of cells that cover a slice."""
        height, width = slices.shape[-2:]
        return -(-height // cell), -(-width // cell)

    def inpaint(self, slices: Tensor, part_of: Tensor) -> Tensor:
        """Fill every cell from the cells of the other sets.

        Parameters
        ----------
        slices : Tensor, shape (B, 1, H, W)
        part_of : Tensor of int, at least of that shape
            From :func:`cell_parts`.

        Returns
        -------
        Tensor, shape (B, 1, H, W)
        """
        parts = self.hyper.parts
        numbers = torch.arange(parts, device=slices.device).view(parts, 1, 1, 1, 1)
        height, width = slices.shape[-2:]
        hidden = part_of[None, ..., :height, :width] == numbers
        filled = self.network((slices[None] * ~hidden).flatten(0, 1)).view(hidden.shape)
        return (filled * hidden).sum(0)

    def loss(self, batch: Batch, generator: Generator) -> Tensor:
        """Squared error, gradient and structural dissimilarity, at one cell size drawn for the batch."""
        slices = batch.slices
        draw = torch.randint(len(self.hyper.cells), (), generator=generator, device=slices.device)
        side = self.hyper.cells[int(draw)]
        uniform = torch.rand(
            (len(slices), *self._grid(slices, side)), generator=generator, device=slices.device
        )
        filled = self.inpaint(slices, cell_parts(uniform, self.hyper.parts, side))
        gradients = gms_maps(filled, slices)
        gradient_loss = sum(1 - part.mean() for part in gradients) / len(gradients)
        structure_loss = 1 - ssim_map(filled, slices, valid=True).mean()
        return (filled - slices).square().mean() + gradient_loss + structure_loss

    def score(self, slices: Tensor, brain: Tensor, generator: SliceGenerator) -> Tensor:
        """Gradient dissimilarity of the inpainted slice, over scales and cell sizes.

        The published map is this one less a constant: it subtracts the least value of a whole volume.
        """
        total = torch.zeros_like(slices)
        for cell in self.hyper.cells:
            grid = self._grid(slices, cell)
            part_of = cell_parts(generator.uniform(cell, *grid), self.hyper.parts, cell)
            filled = self.inpaint(slices, part_of)
            maps = gms_maps(filled, slices)
            likeness = sum(
                F.interpolate(part, size=slices.shape[-2:], mode="bilinear", align_corners=False)
                for part in maps
            )
            weight = 1 / math.prod(grid) if self.hyper.weigh_by_cells else 1 / len(self.hyper.cells)
            total += weight * (1 - likeness / len(maps))
        return torch.where(brain, total, 0.0)
