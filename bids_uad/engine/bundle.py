"""Model bundles: folders with weights, hyper-parameters and thresholds of a trained detector.

A bundle holds ``bundle.json``, ``weights.safetensors``, ``MODEL_CARD.md`` and, once calibrated,
``calibration.json`` and possibly ``normative.nii.gz``. Nothing is pickled, so loading a bundle runs no code.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, reduce
from operator import getitem
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from bids_uad import __version__, space
from bids_uad.calibration.thresholds import FILLING, DecisionRule, HealthyMarked
from bids_uad.config import DEVIATIONS, MODALITIES, RENAMED_DETECTORS
from bids_uad.constraints import Constrained, Interval, Items, Matches, OneOf, allows, describe
from bids_uad.errors import ModelError, truncate_list
from bids_uad.files import atomic_paths, file_sha256, json_text, remove_unfinished
from bids_uad.images import SCALING

if TYPE_CHECKING:
    from torch import Tensor

    from bids_uad.methods.base import Detector

ALL = "all"
LOGGER = logging.getLogger("bids_uad")

DEFAULT_MODELS = ("pls-T1w-default", "pls-T2w-default", "pls-FLAIR-default")
"""Bundles used by default: those with the highest Dice on scans outside their training data."""
PACKAGED = Path(__file__).parents[1] / "data" / "bundles"
NORMATIVE = "normative"
"""Deviation from a normative reference of healthy controls; also its key in ``calibration.json``."""
NORMATIVE_FILE = "normative.nii.gz"
WEIGHTS = "weights.safetensors"
NORMATIVE_BY_DEFAULT = ("pls",)
"""Detectors whose maps are deviations by default, since these have a higher Dice; the published detectors
give scores, as published."""

INFO_ENTRIES = {
    "detector": str,
    "preset": str,
    "modality": Annotated[str, OneOf(*MODALITIES)],
    "hyper": dict[str, Any],
    "input": dict[str, Any],
    "code_version": str,
    "sha256": dict[str, str],
}
"""Required entries of ``bundle.json``."""
THRESHOLD_ENTRIES = {
    "thresholds": dict[str, Annotated[float, Interval(-np.inf)]],
    "default_threshold": str,
    "bin_edges": Annotated[list[Annotated[float, Interval(0)]], Items(2, "strictly")],
}
"""Required entries of ``calibration.json``, and of its part for deviations."""
RULE_ENTRIES = {
    "low_threshold": Annotated[float, Interval(-np.inf)],
    "min_volume_mm3": Annotated[float, Interval(0)],
    "holes": Annotated[str, OneOf(*FILLING)],
}
"""Required entries of a decision rule that is not a plain threshold."""
MODEL_MINIMUM = "decision rule of the model (ThresholdCohort)"
OPTION_MINIMUM = "--min-lesion-size"
"""Sources of the minimum volume of components."""
DEFAULT_DEVIATION = "default_deviation"
"""Entry of ``calibration.json`` for the kind of maps that `calibrate` chose, if it did."""


@dataclass(frozen=True)
class Protocol(Constrained):
    """Scaling, brain mask and filter around a detector.

    Parameters
    ----------
    scaling : dict
        Description of the scaling, for `input` in ``bundle.json``.
    filtering : str
        Description of the filter, for the sidecars of anomaly maps.
    published : bool
        Whether to follow arXiv 2512.01534, whose thresholds depend on it: min-max scaling of the volume,
        brain where the scaled intensity is not 0, and a median filter of even size that includes background.
    """

    scaling: dict[str, Any]
    filtering: Annotated[str, Matches(".+", "a str that is not empty")]
    published: bool

    @property
    def name(self) -> str:
        """``published`` or ``corrected``."""
        return "published" if self.published else "corrected"

    @property
    def input_contract(self) -> dict[str, Any]:
        """Grid and scaling of the input volumes, for ``bundle.json``; JSON types only."""
        return {
            "space": space.NAME,
            "shape": list(space.SHAPE),
            "affine": space.AFFINE.tolist(),
            "scaling": self.scaling,
        }

    def prepare(self, volume: np.ndarray, brain: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scale a preprocessed volume to [0, 1].

        Parameters
        ----------
        volume : numpy.ndarray of float
            Skull-stripped intensities with the 99.5th percentile of the brain at 1, not clipped.
        brain : numpy.ndarray of bool
            Brain mask, same shape.

        Returns
        -------
        volume : numpy.ndarray of float32
            Intensities in [0, 1], 0 outside the brain.
        brain : numpy.ndarray of bool
            Brain mask for the detector.
        """
        stripped = np.where(brain, volume, 0).astype(np.float32)
        if not self.published:
            return stripped.clip(0, 1), brain
        low, high = stripped.min(), stripped.max()
        scaled = (stripped - low) / (high - low) if high > low else np.zeros_like(stripped)
        return scaled, scaled != 0


CORRECTED = Protocol(SCALING, "median of the 3 x 3 x 3 neighbours inside the brain mask", published=False)
PUBLISHED = Protocol(
    {"method": "minmax", "region": "volume"},
    "median of 4 x 4 x 4 voxels, background included",
    published=True,
)


def protocol_of(preset: str) -> Protocol:
    """Return the protocol of a preset.

    Parameters
    ----------
    preset : str
        Name of the preset.

    Returns
    -------
    Protocol
        `PUBLISHED` for ``paper``, else `CORRECTED`.
    """
    return PUBLISHED if preset == "paper" else CORRECTED


@dataclass(frozen=True)
class Bundle:
    """A checked bundle on disk.

    Parameters
    ----------
    folder : pathlib.Path
        Folder of the bundle.
    info : dict
        Content of ``bundle.json``.
    calibration : dict or None
        Content of ``calibration.json``; None if the bundle is not calibrated.
    deviation : {"none", "normative"}, default="none"
        Whether maps hold scores or their deviations from the normative reference. Thresholds and bin edges
        are chosen accordingly.
    min_component_volume : float, optional
        Minimum volume in mm3 of components of the anomaly mask; by default that of the decision rule.
    """

    folder: Path
    info: dict[str, Any] = field(repr=False)
    calibration: dict[str, Any] | None = field(repr=False)
    deviation: str = "none"
    min_component_volume: float | None = None

    @property
    def detector(self) -> str:
        """Name of the detector, a key of :data:`bids_uad.methods.registry.DETECTORS`."""
        return RENAMED_DETECTORS.get(self.info["detector"], self.info["detector"])

    @property
    def preset(self) -> str:
        """Preset of the hyper-parameters."""
        return self.info["preset"]

    @property
    def protocol(self) -> Protocol:
        """Scaling before and filter after the detector."""
        return protocol_of(self.preset)

    @property
    def post_processing(self) -> str:
        """Smoothing and filter of the map, in words."""
        hyper = self.info.get("hyper", {})
        sigma = hyper.get("slice_smoothing", hyper.get("depth", 0))  # former name
        smoothing = f"Gaussian of {sigma:g} mm standard deviation across slices, then " if sigma else ""
        return smoothing + self.protocol.filtering

    @property
    def modality(self) -> str:
        """``T1w``, ``T2w`` or ``FLAIR``."""
        return self.info["modality"]

    @property
    def name(self) -> str:
        """Folder name."""
        return self.folder.name

    @property
    def scored_as(self) -> str:
        """Name in tables: the detector, with ``+normative`` if maps are deviations."""
        return self.detector if self.deviation == "none" else f"{self.detector}+{self.deviation}"

    @property
    def label(self) -> str:
        """Folder name, with ``+normative`` if maps are deviations."""
        return self.name if self.deviation == "none" else f"{self.name}+{self.deviation}"

    @property
    def sha256(self) -> str:
        """SHA-256 of the weights, which identifies a trained detector."""
        return self.info["sha256"][WEIGHTS]

    @cached_property
    def calibration_sha256(self) -> str:
        """SHA-256 of ``calibration.json``, which identifies the thresholds."""
        return file_sha256(self.folder / "calibration.json")

    @property
    def thresholds(self) -> dict[str, float]:
        """Thresholds by name."""
        return self._threshold_set()["thresholds"]

    @property
    def default_threshold(self) -> tuple[str, float]:
        """Name and value of the threshold for anomaly masks."""
        name = self._threshold_set()["default_threshold"]
        return name, self.thresholds[name]

    @property
    def rule(self) -> DecisionRule:
        """Steps from a map to the anomaly mask; a plain threshold unless the bundle has a decision rule."""
        threshold, entries = self.default_threshold[1], self._threshold_set().get("rule")
        rule = DecisionRule(threshold) if entries is None else DecisionRule.read(threshold, entries)
        minimum = self.min_component_volume
        return rule if minimum is None else replace(rule, min_volume=minimum)

    @property
    def min_component_volume_source(self) -> str:
        """Where the minimum volume of components comes from, for sidecars."""
        return MODEL_MINIMUM if self.min_component_volume is None else OPTION_MINIMUM

    @property
    def healthy_marked(self) -> HealthyMarked:
        """Fraction of the brain that the decision rule marks in healthy validation scans."""
        validation, name = self._threshold_set().get("validation", {}), self.default_threshold[0]
        p95 = validation.get("healthy_p95", {}).get(name)
        return HealthyMarked(
            validation.get("healthy_fpr", {}).get(name), validation.get("rule", {}).get("healthy_p95", p95)
        )

    @property
    def bin_edges(self) -> np.ndarray:
        """Edges of the score histogram, float64, from 0 to infinity."""
        return np.array([*self._threshold_set()["bin_edges"], np.inf])

    @property
    def normative(self) -> dict[str, Any]:
        """Part of ``calibration.json`` about the normative reference.

        Raises
        ------
        ModelError
            If the bundle has no normative reference.
        """
        if NORMATIVE not in self._calibrated():
            raise ModelError(
                f"model bundle {self.folder} has no normative reference; run `calibrate` on it with at "
                "least 20 healthy subjects, or do not use --deviation normative"
            )
        return self._calibrated()[NORMATIVE]

    @property
    def default_deviation(self) -> str:
        """Kind of maps that `calibrate` chose, else ``normative`` for `NORMATIVE_BY_DEFAULT`, else ``none``.

        It is ``normative`` only if the bundle has a normative reference.
        """
        calibration = self._calibrated()
        legacy = NORMATIVE if self.detector in NORMATIVE_BY_DEFAULT else "none"
        return calibration.get(DEFAULT_DEVIATION, legacy) if NORMATIVE in calibration else "none"

    def with_deviation(self, deviation: str) -> Bundle:
        """Return the bundle with another deviation.

        Parameters
        ----------
        deviation : {"none", "normative"}
            As the attribute.

        Returns
        -------
        Bundle
            The same model with the thresholds of this deviation.

        Raises
        ------
        ModelError
            If it has no such thresholds.
        """
        changed = replace(self, deviation=deviation)
        changed.default_threshold  # noqa: B018 - raises if there are none
        return changed

    @property
    def provenance(self) -> dict[str, Any]:
        """Training data, training steps and changed hyper-parameters, for the sidecars of anomaly maps.

        Returns
        -------
        dict
            `TrainingSubjects` (without those held out), `TrainingFraction`, `TrainingSteps` (sum over
            stages), `TrainingSource` and `ThresholdCohort`, each None if the bundle does not state it, and
            `HyperParameters`, those that the user has changed.
        """
        training = self.info.get("training", {})
        subjects = training.get("n_subjects")
        if subjects is not None:
            subjects -= training.get("n_held_out_subjects", 0)
        steps = [stage["steps"] for stage in training.get("stages", ()) if "steps" in stage]
        return {
            "TrainingSubjects": subjects,
            "TrainingFraction": training.get("train_fraction"),
            "TrainingSteps": sum(steps) if steps else None,
            "TrainingSource": training.get("source"),
            "HyperParameters": {
                name: reduce(getitem, name.split("."), self.info["hyper"])
                for name in self.info.get("changed", ())
            },
            "ThresholdCohort": (self.calibration or {}).get("cohort", {}).get("source"),
        }

    def cohorts_containing(self, hashes: set[str]) -> list[str]:
        """Return the cohorts of this model that contain a subject.

        Parameters
        ----------
        hashes : set of str
            Hashes of the subject, see :mod:`bids_uad.dataset.participants`.

        Returns
        -------
        list of str
            ``training``, ``validation`` and, for deviations only, ``normative reference``.
        """
        cohorts = {
            "training": self.info.get("training", {}),
            "validation": self._calibrated().get("cohort", {}),
        }
        if self.deviation == NORMATIVE:
            cohorts["normative reference"] = self.normative.get("cohort", {})
        return [name for name, cohort in cohorts.items() if not hashes.isdisjoint(cohort.get("subjects", ()))]

    def with_hyper(self, changes: Sequence[str]) -> Bundle:
        """Return an uncalibrated bundle with changed hyper-parameters; nothing is written.

        Parameters
        ----------
        changes : sequence of str
            ``NAME=VALUE``, see :func:`bids_uad.methods.base.change_hyper`.

        Returns
        -------
        Bundle
            The same weights without thresholds, which do not apply to other hyper-parameters.

        Raises
        ------
        ValueError
            If there is no such hyper-parameter, or the value is not allowed.
        """
        from bids_uad.methods.base import change_hyper, changed_names

        hyper = change_hyper(bundle_hyper(self), changes)
        changed = sorted(set(changed_names(type(hyper), [*self.info.get("changed", ()), *changes])))
        return Bundle(self.folder, {**self.info, "hyper": asdict(hyper), "changed": changed}, None)

    def _threshold_set(self) -> dict[str, Any]:
        """Return the part of ``calibration.json`` that belongs to `deviation`."""
        return self._calibrated() if self.deviation == "none" else self.normative

    def _calibrated(self) -> dict[str, Any]:
        if self.calibration is None:
            raise ModelError(f"model bundle {self.folder} is not calibrated; run `calibrate` on it")
        return self.calibration


def _read_json(path: Path, folder: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"model bundle {folder}: {path.name} is missing; check that this folder is a model bundle"
        ) from None
    except ValueError as error:
        raise ModelError(f"model bundle {folder}: {path.name} is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ModelError(f"model bundle {folder}: {path.name} is not a JSON object; copy the bundle again")
    return content


def _check_entries(
    folder: Path, name: str, content: dict[str, Any], expected: dict[str, Any], within: str = ""
) -> None:
    """Raise an error if a JSON file of a bundle lacks an entry or has a wrong value."""
    lacking = set(expected) - set(content)
    if lacking:
        raise ModelError(f"model bundle {folder}: {name} lacks {', '.join(sorted(lacking))}{within}")
    for entry, annotation in expected.items():
        if not allows(annotation, content[entry]):
            raise ModelError(
                f"model bundle {folder}: The {entry!r} entry of {name}{within} must be "
                f"{describe(annotation)}. Got {content[entry]!r} instead."
            )


def _check_calibration(folder: Path, calibration: dict[str, Any], within: str = "") -> None:
    """Raise an error if thresholds or bin edges are missing or wrong."""
    _check_entries(folder, "calibration.json", calibration, THRESHOLD_ENTRIES, within)
    names = OneOf(*calibration["thresholds"])
    default = {"default_threshold": Annotated[str, names]}
    _check_entries(folder, "calibration.json", calibration, default, within)
    if "rule" in calibration:
        _check_entries(folder, "calibration.json", calibration, {"rule": dict[str, Any]}, within)
        rule = calibration["rule"]
        _check_entries(folder, "calibration.json", rule, RULE_ENTRIES, f" in 'rule'{within}")
        threshold = calibration["thresholds"][calibration["default_threshold"]]
        if rule["low_threshold"] > threshold:
            raise ModelError(
                f"model bundle {folder}: The 'low_threshold' entry of calibration.json in 'rule'{within} "
                f"must be at most {threshold:g}, the default threshold. Got {rule['low_threshold']!r}."
            )


def load_bundle(folder: str | Path) -> Bundle:
    """Read and check a bundle without loading its weights.

    Parameters
    ----------
    folder : path-like
        Folder of the bundle.

    Returns
    -------
    Bundle
        Checked bundle.

    Raises
    ------
    ModelError
        If a file is missing, differs from its checksum or has a wrong entry, or if the model was made for
        other input than SRI24 scans of this version.
    """
    folder = Path(folder)
    info = _read_json(folder / "bundle.json", folder)
    _check_entries(folder, "bundle.json", info, INFO_ENTRIES)
    _check_entries(folder, "bundle.json", info["sha256"], {WEIGHTS: str}, " in 'sha256'")
    for name, expected in info["sha256"].items():
        _check_file(folder, name, expected)
    if info["input"] != protocol_of(info["preset"]).input_contract:
        raise ModelError(
            f"model bundle {folder} was made for other input than SRI24 scans of this version; train it again"
        )
    path = folder / "calibration.json"
    calibration = _read_json(path, folder) if path.exists() else None
    if calibration is not None:
        _check_calibration(folder, calibration)
        if DEFAULT_DEVIATION in calibration:
            choice = {DEFAULT_DEVIATION: Annotated[str, OneOf(*DEVIATIONS)]}
            _check_entries(folder, path.name, calibration, choice)
        if NORMATIVE in calibration:
            within = f" in {NORMATIVE!r}"
            _check_entries(folder, path.name, calibration, {NORMATIVE: dict[str, Any]})
            _check_calibration(folder, calibration[NORMATIVE], within)
            _check_entries(folder, path.name, calibration[NORMATIVE], {"sha256": str}, within)
            _check_file(folder, NORMATIVE_FILE, calibration[NORMATIVE]["sha256"])
    return Bundle(folder, info, calibration)


def _check_file(folder: Path, name: str, expected: str) -> None:
    """Raise an error if a file of a bundle is missing or differs from its checksum."""
    path = folder / name
    if not path.is_file():
        raise ModelError(f"model bundle {folder}: {name} is missing; copy the bundle again")
    if file_sha256(path) != expected:
        raise ModelError(f"model bundle {folder}: {name} differs from its sha256; copy the bundle again")


def packaged_bundles() -> list[str]:
    """Return the names of the bundles of the package."""
    return sorted(path.parent.name for path in PACKAGED.glob("*/bundle.json"))


def resolve_bundles(
    models: list[str] | None,
    modalities: Sequence[str],
    deviations: Sequence[str] = ("none",),
    *,
    skip_missing: bool = False,
) -> list[Bundle]:
    """Find, check and select bundles.

    Parameters
    ----------
    models : list of str, optional
        Names of packaged bundles, names of detectors (all packaged bundles of that detector), or paths.
        None stands for `DEFAULT_MODELS`, ``["all"]`` for all packaged bundles.
    modalities : sequence of str
        Modalities of the images; bundles for others are left out.
    deviations : sequence of {"none", "normative"}, default=("none",)
        Kinds of maps; if empty, the default of each detector.
    skip_missing : bool, default=False
        Whether a modality may have no bundle if another has one; it is reported in the log.

    Returns
    -------
    list of Bundle
        Calibrated bundles by detector and modality, one for each deviation.

    Raises
    ------
    ModelError
        If a name is unknown, a bundle is invalid or not calibrated, two bundles would write the same files,
        a modality has no bundle, or a requested normative reference is missing.
    """
    known = packaged_bundles()
    chosen: list[Bundle] = []
    if models == [ALL]:
        models = known
    for model in DEFAULT_MODELS if models is None else models:
        detector, separator, rest = model.partition("-")
        if detector in RENAMED_DETECTORS and not Path(model).is_dir():
            current = RENAMED_DETECTORS[detector] + separator + rest
            LOGGER.warning("--models %s is deprecated: the detector is called %s", model, current)
            model = current
        if model in known:
            folders = [PACKAGED / model]
        elif Path(model).is_dir():
            folders = [Path(model).resolve()]  # absolute, because nipype nodes run in other folders
        else:
            folders = [PACKAGED / name for name in known if name.split("-")[0] == model]
            if not folders:
                raise ModelError(
                    f"no model bundle {model!r}: it is neither a folder nor one of "
                    f"{', '.join(known) or '(none packaged)'}"
                )
        chosen += [load_bundle(folder) for folder in folders]
    chosen = [bundle for bundle in chosen if bundle.modality in modalities]
    seen: dict[tuple[str, str], Bundle] = {}
    for bundle in chosen:
        bundle.default_threshold  # noqa: B018 - raises if the bundle is not calibrated
        if bundle.folder.parent != PACKAGED:  # importing PyTorch takes seconds; packaged ones are tested
            bundle_hyper(bundle)  # raises if a hyper-parameter is wrong
        key = (bundle.detector, bundle.modality)
        if key in seen:
            raise ModelError(
                f"{seen[key].folder} and {bundle.folder} are both {bundle.detector} for {bundle.modality}; "
                "name only one of them with --models"
            )
        seen[key] = bundle
    for modality in modalities:
        if any(bundle.modality == modality for bundle in chosen):
            continue
        problem = f"no model bundle for {modality}"
        if not (skip_missing and chosen):
            raise ModelError(f"{problem}; name one with --models, or use --modalities without {modality}")
        LOGGER.warning("%s among those of this run; %s images are not scored", problem, modality)
    return [
        bundle.with_deviation(deviation)
        for _, bundle in sorted(seen.items())
        for deviation in (deviations or (bundle.default_deviation,))
    ]


def bundle_hyper(bundle: Bundle) -> Any:
    """Build the hyper-parameters of a bundle's detector.

    Parameters
    ----------
    bundle : Bundle
        Checked bundle.

    Returns
    -------
    dataclass
        Hyper-parameters, of the type that belongs to the detector.

    Raises
    ------
    ModelError
        If there is no such detector, or a hyper-parameter is unknown or has a wrong value.
    """
    from bids_uad.methods.base import hyper_from_values
    from bids_uad.methods.registry import DETECTORS, detector_class

    if bundle.detector not in DETECTORS:
        raise ModelError(
            f"model bundle {bundle.folder}: no detector named {bundle.detector!r} in this version; there are "
            f"{', '.join(DETECTORS)}"
        )
    kind = type(next(iter(detector_class(bundle.detector).presets.values())))
    try:
        return hyper_from_values(kind, bundle.info["hyper"])
    except ValueError as error:
        raise ModelError(f"model bundle {bundle.folder}: {error}") from error


def load_detector(bundle: Bundle, device: str = "cpu") -> Detector:
    """Build the detector of a bundle and load its weights.

    Parameters
    ----------
    bundle : Bundle
        Checked bundle.
    device : str, default="cpu"
        Device as in PyTorch.

    Returns
    -------
    Detector
        Detector in evaluation mode, on `device`.

    Raises
    ------
    ModelError
        If the weights do not fit the hyper-parameters, or a weight is NaN or infinite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from bids_uad.methods.registry import build_detector

    try:
        detector = build_detector(bundle.detector, bundle_hyper(bundle))
        detector.load_state_dict(load_file(bundle.folder / WEIGHTS))
    except (ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"model bundle {bundle.folder}: the weights do not fit the detector ({error}); copy the "
            "bundle again"
        ) from error
    wrong = not_finite(detector.state_dict())
    if wrong:
        raise ModelError(
            f"model bundle {bundle.folder}: weights.safetensors contains NaN or infinite values in "
            f"{truncate_list(wrong, 3)}; train the model again"
        )
    return detector.eval().to(device)


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the floating-point tensors that contain NaN or infinite values."""
    return [
        name
        for name, value in tensors.items()
        if value.is_floating_point() and not bool(value.isfinite().all())
    ]


def save_bundle(
    folder: Path,
    detector: Detector,
    *,
    preset: str,
    modality: str,
    training: dict[str, Any],
    card: str,
    changed: Sequence[str] = (),
) -> Bundle:
    """Write a trained detector as a bundle; calibration uses the stored weights.

    Weights are stored as float16, but those of preset ``paper`` in single precision.

    Parameters
    ----------
    folder : pathlib.Path
        Folder of the bundle, made if missing. Thresholds of an earlier training are removed.
    detector : Detector
        Trained detector.
    preset : str
        Name of the preset.
    modality : str
        ``T1w``, ``T2w`` or ``FLAIR``.
    training : dict
        Training cohort and schedule, for ``bundle.json``.
    card : str
        Text of ``MODEL_CARD.md``.
    changed : sequence of str, default=()
        Names of the hyper-parameters that the user has changed.

    Returns
    -------
    Bundle
        The bundle, read again.

    Raises
    ------
    ModelError
        If a weight is NaN, infinite or too large for float16.
    """
    tensors = {key: value.contiguous().cpu() for key, value in detector.state_dict().items()}
    if wrong := not_finite(tensors):
        raise ModelError(
            f"{truncate_list(wrong, 3)}: NaN or infinite after training; {folder} is not written"
        )
    if preset != "paper":
        tensors = {key: _to_half(key, value) for key, value in tensors.items()}
    remove_unfinished(folder)
    targets = [folder / name for name in (WEIGHTS, "MODEL_CARD.md", "bundle.json")]
    obsolete = [folder / name for name in ("bundle.json", "calibration.json", NORMATIVE_FILE)]
    with atomic_paths(targets, obsolete) as (weights, text, info):
        write_tensors(tensors, weights)
        weights.chmod(0o644)  # safetensors writes 0600, but containers run under any user
        text.write_text(card, encoding="utf-8")
        content = {
            "detector": detector.name,
            "preset": preset,
            "modality": modality,
            "hyper": detector.describe(),
            "changed": sorted(changed),
            "input": protocol_of(preset).input_contract,
            "training": training,
            "code_version": __version__,
            "sha256": {WEIGHTS: file_sha256(weights)},
        }
        info.write_text(json_text(content), encoding="utf-8")
    return load_bundle(folder)


def _to_half(name: str, value: Tensor) -> Tensor:
    """Return floating-point tensors as float16, others unchanged."""
    if not value.is_floating_point():
        return value
    half = value.half()
    if not half.isfinite().all():
        raise ModelError(
            f"{name} has values outside the range of float16; lower the learning rate, or inspect "
            "the training scans"
        )
    return half


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a ``.safetensors`` file.

    Parameters
    ----------
    tensors : dict of str to Tensor
        Tensors by name.
    path : pathlib.Path
        File to write.
    metadata : mapping of str to str, optional
        Metadata of the file; none by default.

    Raises
    ------
    OSError
        If the file cannot be written. The error of safetensors is not an OSError.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, None if metadata is None else dict(metadata))
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
