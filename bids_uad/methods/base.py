"""What every detector offers: training stages and a score."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar, get_type_hints

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from bids_uad.constraints import Constrained, Count, Positive, check_parameters
from bids_uad.networks.backbones import BackboneConfig, build_backbone
from bids_uad.networks.counter_rng import SliceGenerator
from bids_uad.networks.synthetic_anomalies import cut_windows, paint_anomalies, vary_intensity
from bids_uad.space import CROP, SliceSide


def hyper_from_values(kind: type, values: dict[str, Any]) -> Any:
    """Rebuild a (nested) hyper-parameter dataclass.

    Parameters
    ----------
    kind : type
        The dataclass.
    values : dict
        As read from JSON: lists for tuples, dictionaries for nested dataclasses.

    Returns
    -------
    instance of `kind`

    Raises
    ------
    ValueError
        If a name is unknown, one without a default is missing, or a value is not allowed. The default of an
        option stands for what was done before it came, which is what older bundles mean.
    """
    hints = get_type_hints(kind)
    names = {entry.name for entry in fields(kind)}
    needed = {
        entry.name for entry in fields(kind) if entry.default is MISSING and entry.default_factory is MISSING
    }
    odd = sorted((set(values) - names) | (needed - set(values)))
    if odd:
        raise ValueError(f"hyper-parameters of {kind.__name__} do not match: {', '.join(odd)}")

    def rebuilt(name: str, value: Any) -> Any:
        if is_dataclass(hints[name]) and isinstance(value, dict):
            return hyper_from_values(hints[name], value)
        return tuple(value) if isinstance(value, list) else value

    hyper = kind(**{name: rebuilt(name, value) for name, value in values.items()})
    check_parameters(hyper)
    return hyper


def change_hyper(hyper: Any, changes: Sequence[str]) -> Any:
    """Replace hyper-parameters by what a user gave.

    Parameters
    ----------
    hyper : dataclass
    changes : sequence of str
        ``NAME=VALUE``, the value as in JSON: ``stride=4``, ``labels=[74, 24]``.

    Returns
    -------
    dataclass
        Of the same kind.

    Raises
    ------
    ValueError
        If there is no such hyper-parameter, or the value is not allowed.
    """
    plain = {
        entry.name: getattr(hyper, entry.name)
        for entry in fields(hyper)
        if not is_dataclass(getattr(hyper, entry.name))
    }
    found = {}
    for change in changes:
        name, _, text = change.partition("=")
        if name not in plain:
            raise ValueError(f"no hyper-parameter {name!r}; there are {', '.join(plain)}")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        if isinstance(value, list):
            value = tuple(value)
        if isinstance(plain[name], float) and type(value) is int:
            value = float(value)
        found[name] = value
    changed = replace(hyper, **found)
    check_parameters(changed)
    return changed


def names_of(changes: Sequence[str]) -> list[str]:
    """Give the names of the hyper-parameters that ``NAME=VALUE`` items change."""
    return [change.partition("=")[0] for change in changes]


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
    citation : str
        Key in ``boilerplate/bids_uad.bib``.
    presets : dict
        Hyper-parameters by preset name: ``paper``, ``default`` or ``lite``.
    hyper : dataclass
        The hyper-parameters of this instance.
    """

    name: ClassVar[str]
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


INTENSITIES = 10  # classes of intensity that a painted bias keeps to
VISIBLE = 0.05  # change of intensity from which a pixel counts as painted


class FeatureDetector(Detector):
    """A detector that looks at features of a frozen backbone.

    Parameters
    ----------
    hyper : dataclass
        Has a field `backbone`, a :class:`~bids_uad.networks.backbones.BackboneConfig`.
    """

    def __init__(self, hyper: Any) -> None:
        super().__init__(hyper)
        self.backbone = build_backbone(hyper.backbone)
        self._backbone_is_given = hyper.backbone.pretrained

    def use_backbone(self, other: nn.Module) -> None:
        """Take the weights of a trained backbone of the same make, instead of training one."""
        self.backbone.load_state_dict(other.state_dict())
        self._backbone_is_given = True

    def backbone_stages(self) -> list[GradientStage]:
        """The stage that trains a backbone of our own; none where it comes trained."""
        config: BackboneConfig = self.hyper.backbone
        if self._backbone_is_given:
            return []
        return [
            GradientStage.scheduled("features", self.backbone, self.feature_loss, config, needs_tissue=True)
        ]

    def feature_loss(self, batch: Batch, generator: Generator) -> Tensor:
        """Cross-entropy of the tissue classes, and of anomalies painted over them, which are the last class.

        Features that only tell tissues apart learn to overlook what is odd about them, as
        ``benchmarks/backbones.py`` measures.
        """
        config = self.hyper.backbone
        images, tissue = cut_windows(
            batch.slices, batch.tissue[:, None], config.window, config.augmentation, generator
        )
        images = vary_intensity(images, tissue > 0, config.augmentation, generator)
        intensities = torch.linspace(0, 1, INTENSITIES, device=images.device)
        painted, _ = paint_anomalies(images, tissue > 0, intensities, config.anomaly, generator)
        visible = (painted - images).abs() > VISIBLE
        classes = torch.where(visible, config.classes - 1, tissue)
        return F.cross_entropy(self.backbone.classify(painted), classes[:, 0])

    @torch.no_grad()
    def features(self, slices: Tensor) -> list[Tensor]:
        """Maps of the backbone that the detector looks at, fine to coarse.

        Parameters
        ----------
        slices : Tensor, shape (B, 1, H, W)
            In [0, 1].
        """
        maps = self.backbone(slices)
        return [maps[tap] for tap in self.hyper.backbone.taps]


def stacked(maps: list[Tensor], size: tuple[int, int]) -> Tensor:
    """Resize maps to one size, corners aligned, and stack their channels.

    Parameters
    ----------
    maps : list of Tensor, shapes (B, C, H, W)
    size : tuple of int

    Returns
    -------
    Tensor, shape (B, sum of C, *size)
    """
    return torch.cat(
        [F.interpolate(part, size=size, mode="bilinear", align_corners=True) for part in maps], 1
    )
