"""PatchCore: distance to the nearest healthy patch.

Roth et al. 2022, "Towards total recall in industrial anomaly detection" (CVPR). A memory bank holds a coreset
of the local features of healthy slices; the score is the distance to the nearest feature of the bank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from bids_uad.constraints import Constrained, Count, CountOrZero, Interval, OneOf, invalid
from bids_uad.methods.base import Batch, FeatureDetector, FitStage, Stage, occupied_box
from bids_uad.networks.backbones import LESIONS, BackboneConfig, check_maps
from bids_uad.networks.counter_rng import SliceGenerator

SEARCH_CHUNK = 256
"""Queries that are compared to the bank at once; their distances fit in the cache of a processor core."""


PUBLISHED_STARTS = 10
"""Random descriptors from which the published selection of the bank starts."""


@dataclass(frozen=True)
class PatchCoreHyper(Constrained):
    """Hyper-parameters of PatchCore.

    Parameters
    ----------
    backbone : BackboneConfig
        Frozen network with two feature maps, the second with twice the stride of the first.
    descriptor : {"published", "pooled"}, default="published"
        Descriptor of a location: two rounds of adaptive pooling, as published, or the mean of its
        neighbourhood in both maps with each channel standardised.
    neighbourhood : int, default=5
        Side of the square of features that are averaged to one descriptor, odd.
    squared_distance : bool, default=False
        Whether to score squared distances, as published.
    score_outside_brain : bool, default=False
        Whether to score grid cells without brain, and to select descriptors of such cells for the bank. The
        published method does, so that interpolation mixes background distances into the edge of the brain.
        If False, these cells are set to 0 and left out of the bank.
    candidates : int, default=200000
        Number of descriptors from which the coreset is selected.
    projection_dim : int, default=128
        Dimension of the random projection in which the coreset is selected; 0 uses the descriptors.
    bank_size : int, default=10000
        Number of descriptors in the bank, at most `candidates`.
    bank_slices : int, default=20000
        Number of slices from which the candidates are drawn.
    published_coreset : bool, default=False
        Whether the bank is float32, and its selection starts from ten random descriptors, as published.

    Raises
    ------
    InvalidParameterError
        If a value is not allowed, the backbone does not give two maps that fit, or `bank_size` exceeds
        `candidates`.
    """

    backbone: BackboneConfig = field(
        default_factory=lambda: BackboneConfig(name="wide_resnet50_2", taps=(2, 3))
    )
    descriptor: Annotated[str, OneOf("published", "pooled")] = "published"
    neighbourhood: Annotated[int, Interval(1, 27, odd=True)] = 5
    squared_distance: bool = False
    score_outside_brain: bool = False
    candidates: Count = 200_000
    projection_dim: CountOrZero = 128
    bank_size: Count = 10_000
    bank_slices: Count = 20_000
    published_coreset: bool = False

    renamed_fields: ClassVar[dict[str, str]] = {
        "squared": "squared_distance",
        "every_place": "score_outside_brain",
        "projection": "projection_dim",
        "bank": "bank_size",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_maps(self, 2, halving=True, doubling=self.descriptor == "published")
        if self.bank_size > self.candidates:
            raise invalid(self, "bank_size", f"at most 'candidates', {self.candidates}")


class PatchCore(FeatureDetector):
    """Nearest neighbour in a memory bank of healthy patch features.

    Parameters
    ----------
    hyper : PatchCoreHyper
        Hyper-parameters.
    """

    name: ClassVar[str] = "patchcore"
    citation: ClassVar[str] = "patchcore"
    presets: ClassVar[dict[str, PatchCoreHyper]] = {
        "paper": PatchCoreHyper(
            backbone=BackboneConfig(name="wide_resnet50_2", taps=(2, 3), normalise=False),
            squared_distance=True,
            score_outside_brain=True,
            # 1 % of the 28 x 28 descriptors of each slice.
            candidates=3_920_000,
            bank_size=39_200,
            bank_slices=5_000,
            published_coreset=True,
        ),
        "default": PatchCoreHyper(),
        "lite": PatchCoreHyper(
            backbone=BackboneConfig(name=LESIONS, taps=(1, 2)),
            descriptor="pooled",
            neighbourhood=3,
            candidates=60_000,
            bank_size=4_096,
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
        self.search = NearestNeighbour()
        kind = torch.float32 if hyper.published_coreset else torch.float16
        self.register_buffer("bank", torch.zeros(hyper.bank_size, width, dtype=kind))

    def stages(self) -> list[Stage]:
        """Train the backbone, if it is not pretrained, then fill the memory bank."""
        bank = FitStage("bank", self.fit_bank, slices=self.hyper.bank_slices, batch_size=16)
        return [*self.backbone_stages(), bank]

    def descriptors(self, slices: Tensor) -> Tensor:
        """Compute local descriptors on the grid of the finer map.

        Parameters
        ----------
        slices : Tensor, shape (B, 1, 224, 224)
            Slices, intensities in [0, 1].

        Returns
        -------
        Tensor, shape (B, h, w, C)
            Descriptors.
        """
        return (self._describe(*self.features(slices)) - self.centre) / self.spread

    def _describe(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """Compute the descriptors of two feature maps, before standardisation."""
        describe = published_descriptors if self.hyper.descriptor == "published" else pooled_descriptors
        return describe(fine, coarse, self.hyper.neighbourhood)

    def fit_bank(self, batches: Iterator[Batch], generator: Generator) -> None:
        """Fill the bank with a coreset of the descriptors of all grid cells that are scored."""
        hyper = self.hyper
        self.centre.zero_()
        self.spread.fill_(1)
        per_slice = -(-hyper.candidates // hyper.bank_slices)
        kept = []
        for batch in batches:
            described = self.descriptors(batch.slices)
            described = described[self._scored(batch.brain, described.shape[1])]
            pick = torch.randperm(len(described), generator=generator, device=described.device)
            kept.append(described[pick[: per_slice * len(batch.slices)]])
        candidates = torch.cat(kept)
        if hyper.descriptor == "pooled":
            self.centre.copy_(candidates.mean(0))
            self.spread.copy_(candidates.std(0).clamp_min(1e-6))
            candidates = (candidates - self.centre) / self.spread
        compared = candidates
        if hyper.projection_dim:
            shape = (candidates.shape[1], hyper.projection_dim)
            compared = candidates @ torch.randn(shape, generator=generator, device=candidates.device)
        starts = PUBLISHED_STARTS if hyper.published_coreset else 1
        selected = farthest_points(compared, hyper.bank_size, generator, starts)
        self.bank = candidates[selected].to(self.bank.dtype)

    def _scored(self, brain: Tensor, grid: int) -> Tensor:
        """Return which cells of the grid are scored, shape (B, grid, grid)."""
        covered = F.max_pool2d(brain.float(), brain.shape[-1] // grid)[:, 0] > 0
        return torch.ones_like(covered) if self.hyper.score_outside_brain else covered

    def score(self, slices: Tensor, brain: Tensor, generator: SliceGenerator) -> Tensor:
        """Compute the distance to the nearest descriptor of the bank, interpolated to the pixels."""
        maps = self.features(slices, brain)
        scored = self._scored(brain, maps[0].shape[-1])
        coarse = torch.zeros(scored.shape, dtype=maps[0].dtype, device=slices.device)
        if scored.any():
            # The neighbourhood in the coarser map, and one cell more for its interpolation.
            reach = 2 * (self.hyper.neighbourhood // 2 + 1)
            rows, columns = occupied_box(scored[:, None], reach, 2)
            fine, half = maps[0][..., rows, columns], maps[1][..., _halved(rows), _halved(columns)]
            queries = self._describe(fine, half)[scored[:, rows, columns]]
            squared = self.search((queries - self.centre) / self.spread, self.bank)
            coarse[scored] = squared if self.hyper.squared_distance else squared.sqrt()
        fine = F.interpolate(coarse[:, None], size=slices.shape[-2:], mode="bilinear", align_corners=False)
        return torch.where(brain, fine, 0.0)


def _halved(span: slice) -> slice:
    return slice(span.start // 2, span.stop // 2)


class NearestNeighbour(nn.Module):
    """Exhaustive search for the nearest of a set of points."""

    def forward(self, queries: Tensor, bank: Tensor) -> Tensor:
        """Compute squared Euclidean distances to the nearest points.

        Under autocast on a CPU, the matrix product runs in bfloat16. It gives whole distances then, which
        are small where it matters, instead of products, which would have to be subtracted from the norms.

        Parameters
        ----------
        queries : Tensor, shape (N, C)
            Points.
        bank : Tensor, shape (M, C)
            Points among which the nearest is searched.

        Returns
        -------
        Tensor, shape (N,)
            Squared distances.
        """
        device = queries.device.type
        low = device == "cpu" and torch.is_autocast_enabled("cpu")
        kind = torch.bfloat16 if low else queries.dtype
        with torch.autocast(device, enabled=False):
            queries, bank = queries.to(kind), bank.to(kind)
            ones = torch.ones_like(bank[:, :1])
            points = torch.cat([-2 * bank, *_norms(bank), *(ones for _ in _norms(queries[:1]))], 1).T
            ones = torch.ones_like(queries[:, :1])
            queries = torch.cat([queries, *(ones for _ in _norms(bank[:1])), *_norms(queries)], 1)
            nearest = [(chunk @ points).amin(1) for chunk in queries.split(SEARCH_CHUNK)]
            return torch.cat(nearest).clamp_min(0).float()


def _norms(points: Tensor) -> list[Tensor]:
    """Return columns whose sum is the squared norm of each point, two in bfloat16 for the precision."""
    norm = points.float().square().sum(1, keepdim=True)
    high = norm.to(points.dtype)
    return [high] if points.dtype != torch.bfloat16 else [high, (norm - high).to(points.dtype)]


def farthest_points(points: Tensor, count: int, generator: Generator, starts: int = 1) -> Tensor:
    """Select points greedily, each the farthest from those already selected.

    Parameters
    ----------
    points : Tensor, shape (N, C)
        Points; distances are Euclidean.
    count : int
        Number of points to select, at most N.
    generator : torch.Generator
        Draws the first point, or the points at which the selection starts.
    starts : int, default=1
        If 1, the first point is random. Otherwise it is the one with the largest mean distance to this number
        of random points, and no later point is farther from those selected than its own mean distance.

    Returns
    -------
    Tensor of int64, shape (count,)
        Indices in the order of selection.

    Raises
    ------
    ValueError
        If there are fewer than `count` points.
    """
    if len(points) < count:
        raise ValueError(f"cannot select {count} of {len(points)} descriptors; train on more slices")
    squared = points.square().sum(1)
    selected = torch.empty(count, dtype=torch.int64, device=points.device)
    if starts == 1:
        current = torch.randint(len(points), (1,), generator=generator, device=points.device)
        distance = torch.full((len(points),), torch.inf, device=points.device)
    else:
        drawn = torch.randperm(len(points), generator=generator, device=points.device)[:starts]
        to_drawn = squared[:, None] + squared[drawn] - 2 * (points @ points[drawn].T)
        distance = to_drawn.clamp_min(0).sqrt().mean(1).square()
        current = distance.argmax()[None]
    for index in range(count):
        selected[index] = current
        to_current = squared + squared[current] - 2 * (points @ points[current[0]])
        distance = torch.minimum(distance, to_current)
        current = distance.argmax()[None]
    return selected


def pooled_descriptors(fine: Tensor, coarse: Tensor, side: int) -> Tensor:
    """Compute means of neighbourhoods in both maps, at the locations of the finer map.

    Parameters
    ----------
    fine : Tensor, shape (B, C, H, W)
        Finer map.
    coarse : Tensor, shape (B, D, H/2, W/2)
        Coarser map.
    side : int
        Side of the neighbourhood, odd; the border is padded with zeros.

    Returns
    -------
    Tensor, shape (B, H, W, C + D)
        Descriptors.
    """
    fine, coarse = (F.avg_pool2d(part, side, stride=1, padding=side // 2) for part in (fine, coarse))
    coarse = F.interpolate(coarse, size=fine.shape[-2:], mode="bilinear", align_corners=False)
    return torch.cat([fine, coarse], 1).movedim(1, -1)


def published_descriptors(fine: Tensor, coarse: Tensor, side: int) -> Tensor:
    """Compute the published descriptor of PatchCore in closed form.

    The published code unfolds the neighbourhood of each location to C x side x side values, pools these
    adaptively to 2 C numbers in each map, and the numbers of both maps together to 2 C again. Adaptive
    pooling of C side**2 values to 2 C takes means of half a neighbourhood of a channel, and the last pooling
    takes means of pairs. The result equals means over neighbourhoods: of each channel of the finer map, with
    the centre counted twice, and of each pair of channels of the coarser map.

    Parameters
    ----------
    fine : Tensor, shape (B, C, H, W)
        Finer map.
    coarse : Tensor, shape (B, 2 C, H/2, W/2)
        Coarser map.
    side : int
        Side of the neighbourhood, odd; the border is padded with zeros.

    Returns
    -------
    Tensor, shape (B, H, W, 2 C)
        Descriptors.
    """
    cells = side**2
    mean = F.avg_pool2d(fine, side, stride=1, padding=side // 2)
    near = (cells * mean + fine) / (cells + 1)
    far = F.avg_pool2d(coarse, side, stride=1, padding=side // 2)
    far = F.interpolate(far, size=fine.shape[-2:], mode="bilinear", align_corners=False)
    paired = far.unflatten(1, (-1, 2)).mean(2)
    return torch.cat([near, paired], 1).movedim(1, -1)
