"""Model bundles: directories that hold everything a trained detector needs, nothing pickled."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from bids_uad import __version__
from bids_uad.config import MODALITIES, RENAMED_DETECTORS
from bids_uad.constraints import (
    Interval,
    Items,
    OneOf,
    allows,
    describe,
)
from bids_uad.engine.protocol import Protocol, protocol_of
from bids_uad.errors import ModelError, truncate_list
from bids_uad.files import atomic_paths, json_text, remove_unfinished

if TYPE_CHECKING:
    from torch import Tensor

    from bids_uad.methods.base import Detector

ALL = "all"
LOGGER = logging.getLogger("bids_uad")

DEFAULT_MODELS = ("pls-T1w-default", "pls-T2w-default")
"""Those that find most in scans they have not met, see the README's tables."""
PACKAGED = Path(__file__).parents[1] / "data" / "bundles"
NORMATIVE = "normative"
"""Deviation from healthy people, and what its part of ``calibration.json`` is called."""
NORMATIVE_FILE = "normative.nii.gz"
WEIGHTS = "weights.safetensors"
DEVIATING = ("pls",)
"""Detectors whose maps are deviations unless scores are asked for: they find more so. The published ones are
as they were published."""

INFO = {
    "detector": str,
    "preset": str,
    "modality": Annotated[str, OneOf(*MODALITIES)],
    "hyper": dict[str, Any],
    "input": dict[str, Any],
    "code_version": str,
    "sha256": dict[str, str],
}
"""What ``bundle.json`` must hold."""
FIXED = {
    "thresholds": dict[str, Annotated[float, Interval(-np.inf)]],
    "default_threshold": str,
    "bin_edges": Annotated[list[Annotated[float, Interval(0)]], Items(2, "strictly")],
}
"""What ``calibration.json`` must hold, and its part about deviations, too."""


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk, checked.

    Parameters
    ----------
    folder : pathlib.Path
    info : dict
        ``bundle.json``.
    calibration : dict or None
        ``calibration.json``; None before ``calibrate``.
    deviation : str
        What thresholds and bin edges belong to: ``none``, the scores themselves, or ``normative``, their
        deviation from healthy people.
    """

    folder: Path
    info: dict[str, Any] = field(repr=False)
    calibration: dict[str, Any] | None = field(repr=False)
    deviation: str = "none"

    @property
    def detector(self) -> str:
        """Registry name."""
        return RENAMED_DETECTORS.get(self.info["detector"], self.info["detector"])

    @property
    def preset(self) -> str:
        """Preset the hyper-parameters started from."""
        return self.info["preset"]

    @property
    def protocol(self) -> Protocol:
        """What is done to volumes before and after the detector."""
        return protocol_of(self.preset)

    @property
    def post_processing(self) -> str:
        """What is done to a map after scoring, in words."""
        hyper = self.info.get("hyper", {})
        sigma = hyper.get("slice_smoothing", hyper.get("depth", 0))  # the name until 0.1
        smoothing = f"Gaussian of {sigma:g} mm standard deviation across slices, then " if sigma else ""
        return smoothing + self.protocol.filtering

    @property
    def modality(self) -> str:
        """``T1w`` or ``T2w``."""
        return self.info["modality"]

    @property
    def name(self) -> str:
        """Folder name."""
        return self.folder.name

    @property
    def scored_as(self) -> str:
        """What its scores go by in tables: the detector, and the deviation where there is one."""
        return self.detector if self.deviation == "none" else f"{self.detector}+{self.deviation}"

    @property
    def label(self) -> str:
        """Folder name, and the deviation where there is one."""
        return self.name if self.deviation == "none" else f"{self.name}+{self.deviation}"

    @property
    def sha256(self) -> str:
        """Checksum of the weights, the identity of a trained detector."""
        return self.info["sha256"][WEIGHTS]

    @cached_property
    def calibration_sha256(self) -> str:
        """Checksum of ``calibration.json``, the identity of its thresholds."""
        return file_sha256(self.folder / "calibration.json")

    @property
    def thresholds(self) -> dict[str, float]:
        """Fixed thresholds by name."""
        return self._fixed()["thresholds"]

    @property
    def default_threshold(self) -> tuple[str, float]:
        """Name and value of the threshold that makes masks."""
        name = self._fixed()["default_threshold"]
        return name, self.thresholds[name]

    @property
    def bin_edges(self) -> np.ndarray:
        """Edges of the score histogram, float64, from 0 to infinity."""
        return np.array([*self._fixed()["bin_edges"], np.inf])

    @property
    def normative(self) -> dict[str, Any]:
        """What ``calibration.json`` says about the normative reference.

        Raises
        ------
        ModelError
            If the bundle has none.
        """
        if NORMATIVE not in self._calibrated():
            raise ModelError(
                f"model bundle {self.folder} has no normative reference; run `calibrate` on it with healthy "
                "subjects enough, or leave --deviation normative out"
            )
        return self._calibrated()[NORMATIVE]

    @property
    def usual_deviation(self) -> str:
        """What maps are made of unless somebody asks: ``normative`` for `DEVIATING` with a reference."""
        return NORMATIVE if self.detector in DEVIATING and NORMATIVE in self._calibrated() else "none"

    def with_deviation(self, deviation: str) -> Bundle:
        """Give the same model with the thresholds of ``none`` or ``normative``.

        Raises
        ------
        ModelError
            If it has none.
        """
        changed = replace(self, deviation=deviation)
        changed.default_threshold  # noqa: B018 - refused here if it has none
        return changed

    @property
    def origin(self) -> dict[str, Any]:
        """What the model has learnt from and how it differs from its preset, as its maps' sidecars tell.

        Returns
        -------
        dict
            `TrainingSubjects` (those set aside do not count), `TrainingFraction`, `TrainingSteps` (of all
            stages), `TrainingSource`, `ThresholdCohort`, each None where the bundle does not say, and
            `HyperParameters`, those that were changed by hand.
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
            "HyperParameters": {name: self.info["hyper"][name] for name in self.info.get("changed", ())},
            "ThresholdCohort": (self.calibration or {}).get("cohort", {}).get("source"),
        }

    def cohorts_containing(self, hashes: set[str]) -> list[str]:
        """Cohorts of this model that hold a subject: ``training``, ``validation``, ``normative reference``.

        Only deviations know the last: people whom nothing else was fixed on.

        Parameters
        ----------
        hashes : set of str
            Of the subject, see `bids_uad.dataset.participants`.
        """
        told = {"training": self.info.get("training", {}), "validation": self._calibrated().get("cohort", {})}
        if self.deviation == NORMATIVE:
            told["normative reference"] = self.normative.get("cohort", {})
        return [name for name, cohort in told.items() if not hashes.isdisjoint(cohort.get("subjects", ()))]

    def with_hyper(self, changes: Sequence[str]) -> Bundle:
        """Change hyper-parameters, ``NAME=VALUE``; nothing is written, and thresholds hold no longer.

        Raises
        ------
        ValueError
            If there is no such hyper-parameter, or the value is not allowed.
        """
        from bids_uad.methods.base import change_hyper, changed_names

        hyper = change_hyper(bundle_hyper(self), changes)
        changed = sorted(set(changed_names(type(hyper), [*self.info.get("changed", ()), *changes])))
        return Bundle(self.folder, {**self.info, "hyper": asdict(hyper), "changed": changed}, None)

    def _fixed(self) -> dict[str, Any]:
        """Thresholds and bin edges of the deviation."""
        return self._calibrated() if self.deviation == "none" else self.normative

    def _calibrated(self) -> dict[str, Any]:
        if self.calibration is None:
            raise ModelError(f"model bundle {self.folder} has no thresholds yet; run `calibrate` on it")
        return self.calibration


def file_sha256(path: Path) -> str:
    """Compute the SHA-256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read_json(path: Path, folder: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"model bundle {folder}: {path.name} is missing; is this a bundle?") from None
    except ValueError as error:
        raise ModelError(f"model bundle {folder}: {path.name} is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ModelError(f"model bundle {folder}: {path.name} holds no JSON object; copy the bundle again")
    return content


def _check_entries(
    folder: Path, name: str, content: dict[str, Any], expected: dict[str, Any], within: str = ""
) -> None:
    """Refuse a bundle whose file lacks entries or has one that is not allowed."""
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
    """Refuse thresholds that cannot be used."""
    _check_entries(folder, "calibration.json", calibration, FIXED, within)
    names = OneOf(*calibration["thresholds"])
    default = {"default_threshold": Annotated[str, names]}
    _check_entries(folder, "calibration.json", calibration, default, within)


def load_bundle(folder: str | Path) -> Bundle:
    """Read and check a bundle without loading its weights.

    Parameters
    ----------
    folder : path-like

    Returns
    -------
    Bundle

    Raises
    ------
    ModelError
        If a file is missing, altered since training, has an entry that is not allowed, or is made for other
        inputs than ours.
    """
    folder = Path(folder)
    info = _read_json(folder / "bundle.json", folder)
    _check_entries(folder, "bundle.json", info, INFO)
    _check_entries(folder, "bundle.json", info["sha256"], {WEIGHTS: str}, " in 'sha256'")
    for name, expected in info["sha256"].items():
        _check_file(folder, name, expected)
    if info["input"] != protocol_of(info["preset"]).input_contract:
        raise ModelError(f"model bundle {folder} was made for other inputs than SRI24 scans of this version")
    path = folder / "calibration.json"
    calibration = _read_json(path, folder) if path.exists() else None
    if calibration is not None:
        _check_calibration(folder, calibration)
        if NORMATIVE in calibration:
            within = f" in {NORMATIVE!r}"
            _check_entries(folder, path.name, calibration, {NORMATIVE: dict[str, Any]})
            _check_calibration(folder, calibration[NORMATIVE], within)
            _check_entries(folder, path.name, calibration[NORMATIVE], {"sha256": str}, within)
            _check_file(folder, NORMATIVE_FILE, calibration[NORMATIVE]["sha256"])
    return Bundle(folder, info, calibration)


def _check_file(folder: Path, name: str, expected: str) -> None:
    """Refuse a bundle's file that is missing or altered."""
    path = folder / name
    if not path.is_file():
        raise ModelError(f"model bundle {folder}: {name} is missing; copy the bundle again")
    if file_sha256(path) != expected:
        raise ModelError(f"model bundle {folder}: {name} differs from its sha256; copy the bundle again")


def packaged_bundles() -> list[str]:
    """Names of the bundles that come with the package."""
    return sorted(path.parent.name for path in PACKAGED.glob("*/bundle.json"))


def resolve_bundles(
    models: list[str] | None, modalities: list[str], deviations: Sequence[str] = ("none",)
) -> list[Bundle]:
    """Find, check and choose bundles.

    Parameters
    ----------
    models : list of str, optional
        Names of packaged bundles, detector names (all packaged bundles of that detector), or paths.
        None takes `DEFAULT_MODELS`, ``["all"]`` every packaged one.
    modalities : list of str
        Modalities to be scored; packaged bundles of others are left out.
    deviations : sequence of str
        What maps are made of, see `Bundle.deviation`; empty takes what is usual for each.

    Returns
    -------
    list of Bundle
        Calibrated, ordered by detector and modality, one for each deviation.

    Raises
    ------
    ModelError
        If a name is unknown, a bundle is refused, two bundles would write the same files, a modality has
        no bundle, or a bundle has no normative reference that is asked for.
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
            folders = [Path(model).resolve()]  # detection runs in a folder of its own
        else:
            folders = [PACKAGED / name for name in known if name.split("-")[0] == model]
            if not folders:
                raise ModelError(
                    f"no model bundle {model!r}: neither a folder nor one of "
                    f"{', '.join(known) or '(none packaged)'}"
                )
        chosen += [load_bundle(folder) for folder in folders]
    chosen = [bundle for bundle in chosen if bundle.modality in modalities]
    seen: dict[tuple[str, str], Bundle] = {}
    for bundle in chosen:
        bundle.default_threshold  # noqa: B018 - an uncalibrated bundle is refused here
        bundle_hyper(bundle)  # and one with hyper-parameters that are not allowed
        key = (bundle.detector, bundle.modality)
        if key in seen:
            raise ModelError(
                f"{seen[key].folder} and {bundle.folder} are both {bundle.detector} for {bundle.modality}; "
                "choose one"
            )
        seen[key] = bundle
    for modality in modalities:
        if not any(bundle.modality == modality for bundle in chosen):
            raise ModelError(
                f"no model bundle for {modality}; name one with --models or leave the modality out"
            )
    return [
        bundle.with_deviation(deviation)
        for _, bundle in sorted(seen.items())
        for deviation in (deviations or (bundle.usual_deviation,))
    ]


def bundle_hyper(bundle: Bundle) -> Any:
    """Build the hyper-parameters of a bundle's detector.

    Parameters
    ----------
    bundle : Bundle

    Returns
    -------
    dataclass
        Of the kind that the detector's presets are.

    Raises
    ------
    ModelError
        If there is no such detector, or a hyper-parameter is unknown or has a value that is not allowed.
    """
    from bids_uad.methods.base import hyper_from_values
    from bids_uad.methods.registry import DETECTORS, detector_class

    if bundle.detector not in DETECTORS:
        raise ModelError(f"model bundle {bundle.folder}: this version has no detector {bundle.detector!r}")
    kind = type(next(iter(detector_class(bundle.detector).presets.values())))
    try:
        return hyper_from_values(kind, bundle.info["hyper"])
    except ValueError as error:
        raise ModelError(f"model bundle {bundle.folder}: {error}") from error


def load_detector(bundle: Bundle, device: str = "cpu") -> Detector:
    """Build a bundle's detector with its weights, ready to score.

    Parameters
    ----------
    bundle : Bundle
    device : str

    Returns
    -------
    Detector
        In evaluation mode.

    Raises
    ------
    ModelError
        If detector, hyper-parameters and weights do not fit together, or a weight is NaN or infinite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from bids_uad.methods.registry import build_detector

    try:
        detector = build_detector(bundle.detector, bundle_hyper(bundle))
        detector.load_state_dict(load_file(bundle.folder / WEIGHTS))
    except (ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"model bundle {bundle.folder}: its weights do not fit ({error})") from error
    wrong = not_finite(detector.state_dict())
    if wrong:
        raise ModelError(
            f"model bundle {bundle.folder}: weights.safetensors holds NaN or infinite values in "
            f"{truncate_list(wrong, 3)}; train the model again"
        )
    return detector.eval().to(device)


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """List the floating-point tensors, by name, that hold NaN or infinite values."""
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
    """Write a trained detector as a bundle.

    Weights of preset ``lite`` are stored as half floats, since they travel with the package. They are
    calibrated as stored.

    Parameters
    ----------
    folder : pathlib.Path
        Made if missing. Thresholds of an earlier training are removed: they belong to other weights.
    detector : Detector
    preset, modality : str
    training : dict
        The training cohort and schedule, kept in ``bundle.json``.
    card : str
        Text of ``MODEL_CARD.md``.
    changed : sequence of str
        Names of the hyper-parameters that differ from the preset's by the user's wish.

    Returns
    -------
    Bundle

    Raises
    ------
    ModelError
        If a weight is no number, or too large to store.
    """
    tensors = {key: value.contiguous().cpu() for key, value in detector.state_dict().items()}
    if wrong := not_finite(tensors):
        raise ModelError(
            f"{truncate_list(wrong, 3)}: NaN or infinite after training; {folder} is not written"
        )
    if preset == "lite":
        tensors = {key: _halved(key, value) for key, value in tensors.items()}
    remove_unfinished(folder)
    targets = [folder / name for name in (WEIGHTS, "MODEL_CARD.md", "bundle.json")]
    obsolete = [folder / name for name in ("bundle.json", "calibration.json", NORMATIVE_FILE)]
    with atomic_paths(targets, obsolete) as (weights, text, info):
        write_tensors(tensors, weights)
        weights.chmod(0o644)  # it is written for its owner alone, but containers run as anybody
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


def _halved(name: str, value: Tensor) -> Tensor:
    """Store a tensor of floats as half floats."""
    if not value.is_floating_point():
        return value
    half = value.half()
    if not half.isfinite().all():
        raise ModelError(f"{name} holds numbers that are not finite as half floats; was the training stable?")
    return half


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a ``.safetensors`` file.

    Parameters
    ----------
    tensors : dict of str to Tensor
    path : pathlib.Path
    metadata : mapping of str to str, optional

    Raises
    ------
    OSError
        If the file cannot be written; safetensors itself raises an error of its own kind.
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
