"""Base classes of detectors: training batches and stages, the score, and hyper-parameters as plain values."""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from typing import Annotated, Any, ClassVar, get_type_hints

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from bids_uad.constraints import Constrained, Count, Interval, OneOf, Positive, check_parameters
from bids_uad.networks.backbones import BackboneConfig, build_backbone
from bids_uad.networks.counter_rng import SliceGenerator
from bids_uad.networks.synthetic_anomalies import cut_windows, paint_anomalies, vary_intensity
from bids_uad.space import CROP, SliceSide

LOGGER = logging.getLogger("bids_uad")

FieldOfView = tuple[SliceSide, SliceSide]
"""Height and width in pixels of the part of a slice that a detector processes."""
WHOLE_SLICE = (CROP, CROP)
BRAIN_FIELD = (160, 192)
"""Field of view that contains a brain 160 mm wide and 192 mm long."""
N_INTENSITY_CLASSES = 10
"""Intensity classes among which the bias of painted anomalies is drawn, in the training of a backbone."""
MIN_PAINTED_CHANGE = 0.05
"""Smallest intensity change (image range 0 to 1) that is labelled as painted anomaly."""


@dataclass(frozen=True)
class Batch:
    """Healthy slices for training.

    Parameters
    ----------
    slices : Tensor, shape (B, 1, H, W)
        Intensities in [0, 1].
    brain : Tensor of bool, shape (B, 1, H, W)
        Brain masks.
    tissue : Tensor of int64, shape (B, H, W), optional
        Tissue classes, 0 outside the brain. None if the training data have none.
    """

    slices: Tensor
    brain: Tensor
    tissue: Tensor | None = None

    def cut(self, rows: slice, columns: slice) -> Batch:
        """Return the given rows and columns of every slice, as views."""
        inside = (..., rows, columns)
        tissue = None if self.tissue is None else self.tissue[inside]
        return Batch(self.slices[inside], self.brain[inside], tissue)


@dataclass(frozen=True)
class Scan:
    """Healthy scan for training.

    Parameters
    ----------
    slices : Tensor of float32, shape (Z, H, W)
        Intensities in [0, 1].
    brain : Tensor of bool, shape (Z, H, W)
        Brain mask.
    tissue : Tensor of uint8, shape (Z, H, W), optional
        Tissue classes, 0 outside the brain.
    """

    slices: Tensor
    brain: Tensor
    tissue: Tensor | None = None


@dataclass(frozen=True)
class PaintedScan:
    """Scan with synthetic lesions.

    Parameters
    ----------
    slices : Tensor, shape (Z, H, W)
        Intensities in [0, 1].
    brain : Tensor of bool, shape (Z, H, W)
        Brain mask.
    target : Tensor, shape (Z, H, W)
        Target of the network in [0, 1].
    weight : Tensor, shape (Z, H, W)
        Weight in the loss, 0 outside the brain.
    """

    slices: Tensor
    brain: Tensor
    target: Tensor
    weight: Tensor


@dataclass(frozen=True)
class PaintedBatch:
    """Slices of painted scans.

    Parameters
    ----------
    inputs : Tensor, shape (B, C, h, w)
        Input channels, see :meth:`Detector.inputs`.
    brain, target, weight : Tensor, shape (B, 1, h, w)
        As in :class:`PaintedScan`.
    """

    inputs: Tensor
    brain: Tensor
    target: Tensor
    weight: Tensor


@dataclass(frozen=True)
class OptimiserConfig(Constrained):
    """Learning-rate schedule, averaging of weights and clipping of gradients, with AdamW.

    Parameters
    ----------
    schedule : {"cosine", "constant"}, default="cosine"
        Learning rate over the steps. ``cosine`` is a linear warm-up over 2 % of the steps, followed by half a
        cosine period to 0.
    ema_decay : float or None, default=0.999
        Final decay of the exponential moving average of the weights, which is the result of the training. If
        None, the result is the weights of the last step.
    clip_norm : float or None, default=1.0
        Largest norm of the gradient of all weights; None does not limit it.
    """

    schedule: Annotated[str, OneOf("cosine", "constant")] = "cosine"
    ema_decay: Annotated[float, Interval(0, 1, closed="left")] | None = 0.999
    clip_norm: Positive | None = 1.0


OPTIMISER = OptimiserConfig()
"""Settings of presets ``default`` and ``lite``."""


@dataclass(frozen=True)
class GradientStage(Constrained):
    """A training stage that minimises a loss.

    Parameters
    ----------
    name : str
        Name in logs and in ``bundle.json``.
    module : nn.Module
        Module that is trained; all others are left unchanged.
    loss : callable
        ``loss(batch, generator)``, which returns a scalar Tensor.
    steps : int
        Optimiser steps.
    batch_size : int
        Slices per step.
    learning_rate : float
        Largest learning rate.
    optimiser : OptimiserConfig
        Learning-rate schedule, averaging of weights and clipping of gradients.
    needs_tissue : bool, default=False
        Whether the scans must have tissue classes.
    paint : callable, optional
        ``paint(scan, generator)``, which returns a :class:`PaintedScan`. With it, the batches are instances
        of :class:`PaintedBatch`, of slices of several painted scans.
    """

    name: str
    module: nn.Module
    loss: Callable[[Any, Generator], Tensor]
    steps: Count
    batch_size: Count
    learning_rate: Positive
    optimiser: OptimiserConfig = OPTIMISER
    needs_tissue: bool = False
    paint: Callable[[Scan, Generator], PaintedScan] | None = None

    @classmethod
    def scheduled(
        cls,
        name: str,
        module: nn.Module,
        loss: Callable[[Any, Generator], Tensor],
        schedule: Any,
        **options: Any,
    ) -> GradientStage:
        """Make a stage with the training settings of a detector or backbone.

        Parameters
        ----------
        name : str
            Name of the stage.
        module : nn.Module
            Module that is trained.
        loss : callable
            ``loss(batch, generator)``, which returns a scalar Tensor.
        schedule : dataclass
            Hyper-parameters with fields `steps`, `batch_size` and `learning_rate`; a field `optimiser` is
            optional.
        **options
            Other parameters of :class:`GradientStage`.
        """
        return cls(
            name,
            module,
            loss,
            steps=schedule.steps,
            batch_size=schedule.batch_size,
            learning_rate=schedule.learning_rate,
            optimiser=getattr(schedule, "optimiser", OPTIMISER),
            **options,
        )


@dataclass(frozen=True)
class FitStage(Constrained):
    """A training stage without gradients, in one pass over the batches.

    Parameters
    ----------
    name : str
        Name in logs and in ``bundle.json``.
    fit : callable
        ``fit(batches, generator)``.
    slices : int
        Number of randomly chosen slices.
    batch_size : int
        Slices per batch.
    held_out : bool, default=False
        Whether the slices are those of held-out subjects, if there are any, instead of training subjects.
    """

    name: str
    fit: Callable[[Iterator[Batch], Generator], None]
    slices: Count
    batch_size: Count
    held_out: bool = False


Stage = GradientStage | FitStage


class Detector(nn.Module, ABC):
    """An unsupervised anomaly detector for axial brain slices.

    Parameters
    ----------
    hyper : dataclass
        Hyper-parameters.

    Attributes
    ----------
    name : str
        Key in :data:`bids_uad.methods.registry.DETECTORS`.
    citation : str
        Key in ``boilerplate/bids_uad.bib``.
    presets : dict
        Hyper-parameters by preset name: ``paper``, ``default`` or ``lite``.
    modality_settings : dict
        Hyper-parameters that differ for a modality, as ``{(preset, modality): {name: value}}``.
    """

    name: ClassVar[str]
    citation: ClassVar[str]
    presets: ClassVar[dict[str, Any]]
    modality_settings: ClassVar[dict[tuple[str, str], dict[str, Any]]] = {}

    def __init__(self, hyper: Any) -> None:
        super().__init__()
        self.hyper = hyper

    @property
    def field_of_view(self) -> tuple[int, int]:
        """Height and width in pixels of the part of a slice that is processed, by default the whole slice."""
        return getattr(self.hyper, "field_of_view", WHOLE_SLICE)

    @property
    def slice_smoothing(self) -> float:
        """Standard deviation in mm of the Gaussian that smooths the map across slices; 0 is none."""
        return getattr(self.hyper, "slice_smoothing", 0.0)

    def describe(self) -> dict[str, Any]:
        """Return the hyper-parameters as plain values, for ``bundle.json``."""
        return asdict(self.hyper)

    def inputs(self, slices: Tensor, numbers: Sequence[int], rows: slice, columns: slice) -> Tensor:
        """Return the input channels of some slices of a scan, by default their intensities.

        Parameters
        ----------
        slices : Tensor, shape (155, 224, 224)
            Intensities of all slices, 0 outside the brain.
        numbers : sequence of int
            Slices whose channels are returned.
        rows, columns : slice
            Part of the slices.

        Returns
        -------
        Tensor, shape (len(numbers), C, h, w)
            Channels.
        """
        return slices[list(numbers), None, rows, columns]

    @abstractmethod
    def stages(self) -> list[Stage]:
        """Return the training stages in order."""

    @abstractmethod
    def score(self, slices: Tensor, brain: Tensor, generator: SliceGenerator) -> Tensor:
        """Compute the anomaly score of every pixel of a batch of slices.

        Parameters
        ----------
        slices : Tensor, shape (B, C, *field_of_view)
            Input channels, see :meth:`inputs`; by default one, intensities in [0, 1], 0 outside the brain.
        brain : Tensor of bool, shape (B, 1, *field_of_view)
            Brain masks.
        generator : SliceGenerator
            Random numbers that depend on image, slice and step only, so that the map of a slice does not
            depend on the other slices of the batch. Deterministic detectors ignore it.

        Returns
        -------
        Tensor, shape (B, 1, *field_of_view)
            Scores, higher for more anomalous pixels, 0 outside the brain.
        """


class FeatureDetector(Detector):
    """A detector that scores features of a frozen backbone.

    Parameters
    ----------
    hyper : dataclass
        Has a field `backbone`, a :class:`~bids_uad.networks.backbones.BackboneConfig`.
    """

    def __init__(self, hyper: Any) -> None:
        super().__init__(hyper)
        self.backbone = build_backbone(hyper.backbone)
        self._backbone_is_trained = hyper.backbone.pretrained

    def use_backbone(self, other: nn.Module) -> None:
        """Copy the weights of a trained backbone of the same architecture, so that none is trained."""
        self.backbone.load_state_dict(other.state_dict())
        self._backbone_is_trained = True

    def backbone_stages(self) -> list[GradientStage]:
        """Return the stage that trains the backbone; an empty list if it is already trained."""
        config: BackboneConfig = self.hyper.backbone
        if self._backbone_is_trained:
            return []
        return [
            GradientStage.scheduled("features", self.backbone, self.feature_loss, config, needs_tissue=True)
        ]

    def feature_loss(self, batch: Batch, generator: Generator) -> Tensor:
        """Compute the cross-entropy of tissue classes, with painted anomalies as the last class.

        Without painted anomalies the features respond less to lesions, see ``benchmarks/backbones.py``.

        Parameters
        ----------
        batch : Batch
            Healthy slices with tissue classes.
        generator : torch.Generator
            Random numbers of augmentation and anomalies.

        Returns
        -------
        Tensor, scalar
            The loss.
        """
        config = self.hyper.backbone
        images, tissue = cut_windows(
            batch.slices, batch.tissue[:, None], config.window, config.augmentation, generator
        )
        images = vary_intensity(images, tissue > 0, config.augmentation, generator)
        codebook = torch.linspace(0, 1, N_INTENSITY_CLASSES, device=images.device)
        painted, _ = paint_anomalies(images, tissue > 0, codebook, config.anomaly, generator)
        changed = (painted - images).abs() > MIN_PAINTED_CHANGE
        classes = torch.where(changed, config.classes - 1, tissue)
        return F.cross_entropy(self.backbone.classify(painted), classes[:, 0])

    @torch.no_grad()
    def features(self, slices: Tensor, brain: Tensor | None = None) -> list[Tensor]:
        """Compute the feature maps that the detector uses.

        Parameters
        ----------
        slices : Tensor, shape (B, 1, H, W)
            Intensities in [0, 1].
        brain : Tensor of bool, shape (B, 1, H, W), optional
            Brain masks, outside of which the slices are 0; the backbone may process only their surroundings.

        Returns
        -------
        list of Tensor, shape (B, C, h, w)
            Maps that `taps` of the backbone selects, from fine to coarse.
        """
        return self.backbone(slices, brain, self.hyper.backbone.taps)


def occupied_box(masks: Tensor, margin: int = 0, multiple: int = 1) -> tuple[slice, slice]:
    """Return the smallest rectangle that contains the masked pixels of a batch.

    Parameters
    ----------
    masks : Tensor of bool, shape (B, 1, H, W)
        Masks.
    margin : int, default=0
        Pixels that are added on each side, as far as there are any.
    multiple : int, default=1
        Number of which first and last row and column are multiples; H and W are.

    Returns
    -------
    rows, columns : slice
        The rectangle; the whole image if no pixel is masked.
    """
    spans = []
    # PyTorch reduces bytes faster than Booleans.
    union = masks.view(torch.uint8).amax((0, 1))
    for axis, size in enumerate(union.shape):
        pixels = torch.nonzero(union.amax(1 - axis)).flatten().tolist() or [0, size - 1]
        start, stop = pixels[0] - margin, pixels[-1] + 1 + margin
        spans.append(slice(max(start, 0) // multiple * multiple, min(-(-stop // multiple) * multiple, size)))
    return spans[0], spans[1]


def stack_maps(maps: list[Tensor], size: tuple[int, int]) -> Tensor:
    """Resize feature maps to one size, with corners aligned, and concatenate their channels.

    Parameters
    ----------
    maps : list of Tensor, shape (B, C, H, W)
        Feature maps.
    size : tuple of int
        Height and width of the result.

    Returns
    -------
    Tensor, shape (B, sum of C, *size)
        Stacked maps.
    """
    return torch.cat(
        [F.interpolate(part, size=size, mode="bilinear", align_corners=True) for part in maps], 1
    )


def current_name(kind: type, name: str) -> str:
    """Return the present name of a hyper-parameter that may have been renamed.

    Parameters
    ----------
    kind : type
        Dataclass of hyper-parameters; its class variable `renamed_fields`, if any, maps old to new names.
    name : str
        Present or former name of a field.

    Returns
    -------
    str
        Present name; `name` itself if no field of this name was renamed.
    """
    return getattr(kind, "renamed_fields", {}).get(name, name)


def hyper_from_values(kind: type, values: dict[str, Any]) -> Any:
    """Rebuild a (nested) dataclass of hyper-parameters from plain values.

    Parameters
    ----------
    kind : type
        The dataclass.
    values : dict
        Values as in JSON: lists for tuples, dictionaries for nested dataclasses. Former names of fields are
        accepted. A field that is missing gets its default.

    Returns
    -------
    instance of `kind`
        Checked hyper-parameters.

    Raises
    ------
    ValueError
        If a name is unknown, a field without a default is missing, or a value is not allowed.
    """
    hints = get_type_hints(kind)
    values = {current_name(kind, name): value for name, value in values.items()}
    names = {entry.name for entry in fields(kind)}
    required = {
        entry.name for entry in fields(kind) if entry.default is MISSING and entry.default_factory is MISSING
    }
    wrong = sorted((set(values) - names) | (required - set(values)))
    if wrong:
        raise ValueError(f"hyper-parameters of {kind.__name__} do not match: {', '.join(wrong)}")

    def rebuild(name: str, value: Any) -> Any:
        if is_dataclass(hints[name]) and isinstance(value, dict):
            return hyper_from_values(hints[name], value)
        return tuple(value) if isinstance(value, list) else value

    hyper = kind(**{name: rebuild(name, value) for name, value in values.items()})
    check_parameters(hyper)
    return hyper


def change_hyper(hyper: Any, changes: Sequence[str]) -> Any:
    """Replace hyper-parameters by the values of ``--hyper``.

    Parameters
    ----------
    hyper : dataclass
        Hyper-parameters.
    changes : sequence of str
        ``NAME=VALUE``, the value as in JSON: ``stride=4``, ``labels=[74, 24]``. A hyper-parameter inside
        another one is ``backbone.name``. Former names are accepted with a warning.

    Returns
    -------
    dataclass
        Changed copy of `hyper`.

    Raises
    ------
    ValueError
        If there is no such hyper-parameter, or the value is not allowed.
    """
    present = {
        entry.name: getattr(hyper, entry.name)
        for entry in fields(hyper)
        if not is_dataclass(getattr(hyper, entry.name))
    }
    replaced = {}
    inner: dict[str, list[str]] = {}
    for change in changes:
        old_name, _, text = change.partition("=")
        outer, dot, rest = change.partition(".")
        if dot and is_dataclass(getattr(hyper, outer, None)):
            inner.setdefault(outer, []).append(rest)
            continue
        name = current_name(type(hyper), old_name)
        if name not in present:
            raise ValueError(f"no hyper-parameter {name!r}; there are {', '.join(present)}")
        if name != old_name:
            LOGGER.warning("--hyper %s is deprecated: the hyper-parameter is called %s", old_name, name)
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        if isinstance(value, list):
            value = tuple(value)
        if isinstance(present[name], float) and type(value) is int:
            value = float(value)
        replaced[name] = value
    replaced |= {name: change_hyper(getattr(hyper, name), rest) for name, rest in inner.items()}
    changed = replace(hyper, **replaced)
    check_parameters(changed)
    return changed


def changed_names(kind: type, changes: Sequence[str]) -> list[str]:
    """Return the present names of the hyper-parameters that ``NAME=VALUE`` items change.

    Parameters
    ----------
    kind : type
        Dataclass of hyper-parameters.
    changes : sequence of str
        ``NAME=VALUE``, or only ``NAME``.

    Returns
    -------
    list of str
        Names of fields of `kind`, in the order of `changes`.
    """
    return [current_name(kind, change.partition("=")[0]) for change in changes]
