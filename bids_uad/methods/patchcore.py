"""PatchCore: distance to the nearest healthy patch.

Roth et al. 2022, "Towards total recall in industrial anomaly detection" (CVPR). Local features of healthy
slices, thinned to a coreset, are the model; a test patch scores its distance to the nearest of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from bids_uad.constraints import (
    Constrained,
    Count,
    CountOrZero,
    Interval,
    OneOf,
    invalid,
)
from bids_uad.methods.base import Batch, FeatureDetector, FitStage, Stage
from bids_uad.networks.backbones import BackboneConfig, check_maps
from bids_uad.networks.counter_rng import SliceGenerator


@dataclass(frozen=True)
class PatchCoreHyper(Constrained):
    """Hyper-parameters of PatchCore.

    Parameters
    ----------
    backbone : BackboneConfig
        Two maps, the second half as fine as the first.
    descriptor : {"published", "pooled"}
        How a place is described: by the published two rounds of adaptive pooling, or by the mean of its
        neighbourhood in both maps, each channel standardised.
    neighbourhood : int
        Side of the square of features averaged into one descriptor, odd.
    squared : bool
        Score squared distances, as published.
    every_place : bool
        Also score places without brain, which the interpolation to pixels mixes into the brain's rim, as
        published; otherwise they count as 0.
    candidates : int
        Descriptors the coreset is chosen from.
    projection : int
        Dimensions of the random projection in which the coreset is chosen; 0 keeps all channels of the
        descriptors.
    bank : int
        Descriptors kept, at most `candidates`.
    bank_slices : int
        Slices the candidates are drawn from.

    Raises
    ------
    InvalidParameterError
        If a value is not allowed, the backbone does not give two maps that fit, or `bank` exceeds
        `candidates`.
    """

    backbone: BackboneConfig = field(
        default_factory=lambda: BackboneConfig(name="wide_resnet50_2", taps=(2, 3))
    )
    descriptor: Annotated[str, OneOf("published", "pooled")] = "published"
    neighbourhood: Annotated[int, Interval(1, 27, odd=True)] = 5
    squared: bool = False
    every_place: bool = False
    candidates: Count = 200_000
    projection: CountOrZero = 128
    bank: Count = 10_000
    bank_slices: Count = 20_000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_maps(self, 2, halving=True, doubling=self.descriptor == "published")
        if self.bank > self.candidates:
            raise invalid(self, "bank", f"at most 'candidates', {self.candidates}")


class PatchCore(FeatureDetector):
    """Nearest neighbour in a memory bank of healthy patch features.

    Parameters
    ----------
    hyper : PatchCoreHyper
    """

    name: ClassVar[str] = "patchcore"
    citation: ClassVar[str] = "patchcore"
    presets: ClassVar[dict[str, PatchCoreHyper]] = {
        "paper": PatchCoreHyper(
            backbone=BackboneConfig(name="wide_resnet50_2", taps=(2, 3), normalise=False),
            squared=True,
            every_place=True,
        ),
        "default": PatchCoreHyper(),
        "lite": PatchCoreHyper(
            backbone=BackboneConfig(),
            descriptor="pooled",
            neighbourhood=3,
            candidates=60_000,
            bank=4_096,
            bank_slices=3_000,
        ),
    }

    def __init__(self, hyper: PatchCoreHyper) -> None:
        super().__init__(hyper)
        width = sum(hyper.backbone.channels)
        if hyper.descriptor == "published":
            width = 2 * hyper.backbone.channels[0]
        self.register_buffer("centre", torch.zeros(width))
        self.register_buffer("spread", torch.ones(width))
        self.register_buffer("bank", torch.zeros(hyper.bank, width, dtype=torch.float16))

    def stages(self) -> list[Stage]:
        """The backbone, if it is our own, then the memory bank."""
        bank = FitStage("bank", self.fit_bank, slices=self.hyper.bank_slices, batch_size=16)
        return [*self.backbone_stages(), bank]

    def descriptors(self, slices: Tensor) -> Tensor:
        """Local features on the grid of the finer map.

        Parameters
        ----------
        slices : Tensor, shape (B, 1, 224, 224)

        Returns
        -------
        Tensor, shape (B, h, w, C)
        """
        fine, coarse = self.features(slices)
        describe = published_descriptors if self.hyper.descriptor == "published" else pooled_descriptors
        found = describe(fine, coarse, self.hyper.neighbourhood)
        return (found - self.centre) / self.spread

    def fit_bank(self, batches: Iterator[Batch], generator: Generator) -> None:
        """Collect healthy descriptors inside the brain and keep a coreset of them."""
        hyper = self.hyper
        self.centre.zero_()
        self.spread.fill_(1)
        share = -(-hyper.candidates // hyper.bank_slices)
        kept = []
        for batch in batches:
            found = self.descriptors(batch.slices)
            found = found[self._covered(batch.brain, found.shape[1])]
            pick = torch.randperm(len(found), generator=generator, device=found.device)
            kept.append(found[pick[: share * len(batch.slices)]])
        candidates = torch.cat(kept)
        if hyper.descriptor == "pooled":
            self.centre.copy_(candidates.mean(0))
            self.spread.copy_(candidates.std(0).clamp_min(1e-6))
            candidates = (candidates - self.centre) / self.spread
        compared = candidates
        if hyper.projection:
            shape = (candidates.shape[1], hyper.projection)
            compared = candidates @ torch.randn(shape, generator=generator, device=candidates.device)
        self.bank = candidates[farthest_points(compared, hyper.bank, generator)].half()

    @staticmethod
    def _covered(brain: Tensor, grid: int) -> Tensor:
        """Cells of the descriptor grid that hold any brain, shape (B, grid, grid)."""
        return F.max_pool2d(brain.float(), brain.shape[-1] // grid)[:, 0] > 0

    def score(self, slices: Tensor, brain: Tensor, generator: SliceGenerator) -> Tensor:
        """Euclidean distance to the nearest descriptor of the bank, interpolated to the pixels."""
        described = self.descriptors(slices)
        covered = self._covered(brain, described.shape[1])
        if self.hyper.every_place:
            covered = torch.ones_like(covered)
        queries = described[covered]
        bank = self.bank.to(queries.dtype)
        bank_norm = bank.square().sum(1)
        nearest = [
            (chunk.square().sum(1) + (bank_norm - 2 * chunk @ bank.T).amin(1))
            for chunk in queries.split(4096)
        ]
        coarse = torch.zeros(covered.shape, dtype=queries.dtype, device=slices.device)
        if nearest:
            squared = torch.cat(nearest).clamp_min(0)
            coarse[covered] = squared if self.hyper.squared else squared.sqrt()
        fine = F.interpolate(coarse[:, None], size=slices.shape[-2:], mode="bilinear", align_corners=False)
        return torch.where(brain, fine, 0.0)


def farthest_points(points: Tensor, count: int, generator: Generator) -> Tensor:
    """Choose points greedily, each the farthest from those already chosen.

    Parameters
    ----------
    points : Tensor, shape (N, C)
        Distances are Euclidean in all C dimensions.
    count : int
        How many to keep, at most N.
    generator : torch.Generator
        Draws the first point.

    Returns
    -------
    Tensor of int64, shape (count,)
        Indices in the order chosen.

    Raises
    ------
    ValueError
        If there are fewer points than asked for.
    """
    if len(points) < count:
        raise ValueError(f"cannot choose {count} of {len(points)} descriptors; train on more slices")
    squared = points.square().sum(1)
    chosen = torch.empty(count, dtype=torch.int64, device=points.device)
    current = torch.randint(len(points), (1,), generator=generator, device=points.device)
    distance = torch.full((len(points),), torch.inf, device=points.device)
    for index in range(count):
        chosen[index] = current
        to_current = squared + squared[current] - 2 * (points @ points[current[0]])
        distance = torch.minimum(distance, to_current)
        current = distance.argmax()[None]
    return chosen


def pooled_descriptors(fine: Tensor, coarse: Tensor, side: int) -> Tensor:
    """Means of neighbourhoods in both maps, at the places of the finer one.

    Parameters
    ----------
    fine : Tensor, shape (B, C, H, W)
    coarse : Tensor, shape (B, D, H/2, W/2)
    side : int
        Of the neighbourhood, odd; zeros beyond the border count.

    Returns
    -------
    Tensor, shape (B, H, W, C + D)
    """
    fine, coarse = (F.avg_pool2d(part, side, stride=1, padding=side // 2) for part in (fine, coarse))
    coarse = F.interpolate(coarse, size=fine.shape[-2:], mode="bilinear", align_corners=False)
    return torch.cat([fine, coarse], 1).movedim(1, -1)


def published_descriptors(fine: Tensor, coarse: Tensor, side: int) -> Tensor:
    """PatchCore's published descriptor in closed form.

    The published code unfolds each place into its neighbourhood's C x side x side values, pools these
    adaptively to 2 C numbers in each map, and both maps' numbers together to 2 C again. Since 2 C numbers out
    of C side**2 are means of half a channel's neighbourhood each, and the last pooling takes means of pairs,
    what remains are means over neighbourhoods: of each channel of the finer map, its centre twice, and of
    each pair of channels of the coarser one. Nothing needs to be unfolded.

    Parameters
    ----------
    fine : Tensor, shape (B, C, H, W)
    coarse : Tensor, shape (B, 2 C, H/2, W/2)
    side : int
        Of the neighbourhood, odd; zeros beyond the border count.

    Returns
    -------
    Tensor, shape (B, H, W, 2 C)
    """
    cells = side**2
    mean = F.avg_pool2d(fine, side, stride=1, padding=side // 2)
    near = (cells * mean + fine) / (cells + 1)
    far = F.avg_pool2d(coarse, side, stride=1, padding=side // 2)
    far = F.interpolate(far, size=fine.shape[-2:], mode="bilinear", align_corners=False)
    paired = far.unflatten(1, (-1, 2)).mean(2)
    return torch.cat([near, paired], 1).movedim(1, -1)
