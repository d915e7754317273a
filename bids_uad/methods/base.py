"""What every detector offers: training stages and a score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Generator, Tensor, nn

from bids_uad.constraints import Constrained, Count, Positive
from bids_uad.networks.keyed import SliceGenerator
from bids_uad.space import CROP, SliceSide


@dataclass(frozen=True)
class Batch:
    """Healthy slices to learn from.

    Parameters
    ----------
    slices : Tensor, shape (B, 1, H, W)
        Intensities in [0, 1].
    brain : Tensor of bool, shape (B, 1, H, W)
    tissue : Tensor of int64, shape (B, H, W), optional
        Tissue classes, 0 outside the brain; only where the training data have them.
    """

    slices: Tensor
    brain: Tensor
    tissue: Tensor | None = None

    def cut(self, rows: slice, columns: slice) -> Batch:
        """Keep a rectangle of every slice."""
        inside = (..., rows, columns)
        tissue = None if self.tissue is None else self.tissue[inside]
        return Batch(self.slices[inside], self.brain[inside], tissue)


@dataclass(frozen=True)
class GradientStage(Constrained):
    """A training stage that descends a loss.

    Parameters
    ----------
    name : str
    module : nn.Module
        What is trained; everything else stays as it is.
    loss : callable
        ``loss(batch, generator)``, a scalar Tensor.
    steps, batch_size, learning_rate
        The preset's schedule: AdamW, the learning rate falling to zero by a half cosine.
    needs_tissue : bool
        Whether the batches must have tissue classes.
    """

    name: str
    module: nn.Module
    loss: Callable[[Batch, Generator], Tensor]
    steps: Count
    batch_size: Count
    learning_rate: Positive
    needs_tissue: bool = False

    @classmethod
    def scheduled(
        cls,
        name: str,
        module: nn.Module,
        loss: Callable[[Batch, Generator], Tensor],
        schedule: Any,
        **options: Any,
    ) -> GradientStage:
        """Make a stage whose `steps`, `batch_size` and `learning_rate` are those of `schedule`."""
        return cls(
            name,
            module,
            loss,
            steps=schedule.steps,
            batch_size=schedule.batch_size,
            learning_rate=schedule.learning_rate,
            **options,
        )


@dataclass(frozen=True)
class FitStage(Constrained):
    """A training stage without gradients: it sees batches once and keeps what it needs.

    Parameters
    ----------
    name : str
    fit : callable
        ``fit(batches, generator)``.
    slices : int
        How many randomly chosen slices it is shown.
    batch_size : int
    """

    name: str
    fit: Callable[[Iterator[Batch], Generator], None]
    slices: Count
    batch_size: Count


Stage = GradientStage | FitStage

FieldOfView = tuple[SliceSide, SliceSide]
"""Height and width in pixels of the part of a slice that a detector is shown."""

WHOLE_SLICE = (CROP, CROP)
BRAIN_FIELD = (160, 192)
"""Holds a brain of 160 mm from side to side and 192 mm from front to back."""


class Detector(nn.Module, ABC):
    """An unsupervised anomaly detector for axial brain slices.

    Attributes
    ----------
    name : str
        Registry name.
    title : str
        Name in reports.
    citation : str
        Key in ``boilerplate/bids_uad.bib``.
    presets : dict
        Hyper-parameters by preset name: ``paper``, ``default`` or ``lite``.
    hyper : dataclass
        The hyper-parameters of this instance.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    citation: ClassVar[str]
    presets: ClassVar[dict[str, Any]]

    def __init__(self, hyper: Any) -> None:
        super().__init__()
        self.hyper = hyper

    @property
    def field_of_view(self) -> tuple[int, int]:
        """Height and width in pixels of what the detector is shown of a slice.

        The whole of it, unless the hyper-parameters name a smaller one: brains leave a wide margin, and a
        network that has never seen the margin need not be shown it.
        """
        return getattr(self.hyper, "field_of_view", WHOLE_SLICE)

    @property
    def depth(self) -> float:
        """Standard deviation in mm of the Gaussian across slices that smooths the map; 0: none does."""
        return getattr(self.hyper, "depth", 0.0)

    def describe(self) -> dict[str, Any]:
        """Hyper-parameters as plain values, for a bundle's JSON."""
        return asdict(self.hyper)

    @abstractmethod
    def stages(self) -> list[Stage]:
        """Training stages, in the order they are run."""

    @abstractmethod
    def score(self, slices: Tensor, brain: Tensor, generator: SliceGenerator) -> Tensor:
        """Score every pixel of a batch of slices.

        Parameters
        ----------
        slices : Tensor, shape (B, 1, *field_of_view)
            Intensities in [0, 1], 0 outside the brain.
        brain : Tensor of bool, shape (B, 1, *field_of_view)
        generator : SliceGenerator
            Random numbers that depend on subject, slice and step only, so that a stochastic map does not
            depend on which slices share a batch. Deterministic detectors leave it alone.

        Returns
        -------
        Tensor, shape (B, 1, *field_of_view)
            Higher is more anomalous; 0 outside the brain.
        """
