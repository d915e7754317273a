"""The `calibrate` level: fix a bundle's thresholds on validation scans.

``bids_uad VALIDATION MODELS calibrate --detector disyre --modality T2w --preset lite`` writes
``MODELS/disyre-T2w-lite/calibration.json`` and, with healthy people enough, ``normative.nii.gz`` beside it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np

from bids_uad.atomic import write_json, write_text
from bids_uad.calibration.deviation import DeviationCalibrator
from bids_uad.calibration.normative import MIN_SUBJECTS, HealthyCohort, NormativeReference
from bids_uad.config import RunConfig
from bids_uad.dataset.identity import identities
from bids_uad.dataset.participants import (
    age_and_sex,
    cohort_of,
    healthy_flag,
    read_participants,
)
from bids_uad.dataset.preprocessed import PreprocessedScan, find_preprocessed
from bids_uad.errors import ConfigError, InputError, ModelError
from bids_uad.levels.cohort import Cohort, describe, healthy_cohort
from bids_uad.levels.model_card import add_validation
from bids_uad.levels.train import bundle_folder
from bids_uad.listing import listed

if TYPE_CHECKING:
    from bids_uad.engine.bundle import Bundle

logger = logging.getLogger(__name__)


def run_calibrate(config: RunConfig) -> int:
    """Score validation scans and keep the thresholds they imply in the bundle.

    Hyper-parameters that are changed (`config.hyper`) are kept in the bundle, too; the weights must fit them.

    Healthy scans (by participants.tsv) give the false-positive thresholds, scans with a lesion mask the
    Dice threshold. A scan that is neither is left out: a missing mask does not mean healthy. With
    `MIN_SUBJECTS` healthy people or more, a normative reference of their scores is fitted, too; those of
    `normative_dir` have a part in nothing else.

    Parameters
    ----------
    config : RunConfig
        `bids_dir` holds preprocessed validation scans, `output_dir` the bundle.

    Returns
    -------
    int
        0.

    Raises
    ------
    ConfigError
        If there is no such hyper-parameter.
    InputError
        If no scan can be used, or `normative_dir` holds people of `bids_dir`.
    ModelError
        If the bundle is missing or damaged.
    """
    from rich.progress import track

    from bids_uad.calibration.thresholds import ThresholdEstimator
    from bids_uad.engine.bundle import NORMATIVE, NORMATIVE_FILE, file_sha256, load_bundle

    bundle = load_bundle(bundle_folder(config))
    if config.hyper:
        try:
            bundle = bundle.with_hyper(config.hyper)
        except ValueError as error:
            raise ConfigError(f"--hyper: {error}") from None
    people = read_participants(config.bids_dir)
    scans = [
        scan
        for scan in find_preprocessed(config.bids_dir, bundle.modality)
        if scan.lesion or healthy_flag(people.row(scan.subject))
    ]
    if not scans:
        raise InputError(
            config.bids_dir,
            "no healthy scan and no lesion mask",
            "add `group` to participants.tsv or lesion masks",
        )
    validation = Cohort(config.bids_dir, tuple(scans))
    others = [] if config.normative_dir is None else [_others(config.normative_dir, validation, bundle)]
    healthy = _healthy([validation, *others])
    scored = _scorer(config, bundle)
    estimator = ThresholdEstimator()
    config.work_dir.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="calibrate-", dir=config.work_dir) as waiting:
        deviations = _deviations(healthy, Path(waiting))
        for scan in track(scans, description=f"Scoring with {bundle.name}"):
            scores, brain = scored(scan)
            lesion = np.asarray(nib.load(scan.lesion).dataobj) > 0 if scan.lesion else None
            row = people.row(scan.subject)
            kind = cohort_of(row)
            estimator.add(scores, brain, lesion, kind)
            if deviations is not None:
                person = age_and_sex(row)
                deviations.add(scores, brain, lesion, subject=scan.subject, person=person, kind=kind)
        if deviations is not None:
            for scan, person in track(list(_people(others)), description="Scoring for the reference"):
                deviations.add_to_reference(*scored(scan), person=person)
        calibration = estimator.summary()
        normative = None if deviations is None else _finish(deviations)
        # Thresholds of an earlier calibration must not stand beside what follows.
        for name in ("calibration.json", NORMATIVE_FILE):
            (bundle.folder / name).unlink(missing_ok=True)
        if normative is not None:
            reference, thresholds = normative
            reference.write(bundle.folder / NORMATIVE_FILE)
            calibration[NORMATIVE] = thresholds | {
                "reference": reference.describe(),
                "n_healthy_subjects": len(healthy),
                "sha256": file_sha256(bundle.folder / NORMATIVE_FILE),
            }
            if others:
                calibration[NORMATIVE]["cohort"] = describe(others)
    calibration["cohort"] = describe([validation])
    calibration["weights_sha256"] = bundle.sha256
    if config.hyper:
        write_json(bundle.folder / "bundle.json", bundle.info)
    write_json(bundle.folder / "calibration.json", calibration)
    card = bundle.folder / "MODEL_CARD.md"
    write_text(card, add_validation(card.read_text(encoding="utf-8"), calibration))
    for name, value in calibration["thresholds"].items():
        logger.info("%s: %s = %.5g", bundle.name, name, value)
    for name, value in calibration.get(NORMATIVE, {"thresholds": {}})["thresholds"].items():
        logger.info("%s, deviation: %s = %.5g", bundle.name, name, value)
    return 0


def _finish(deviations: DeviationCalibrator) -> tuple[NormativeReference, dict[str, Any]] | None:
    """Fit the normative reference and its thresholds; None, with a warning, where that is not possible."""
    try:
        reference, thresholds = deviations.finish()
        return reference, thresholds.summary()
    except ModelError as error:
        logger.warning("No normative reference: %s", error)
        return None


def _scorer(config: RunConfig, bundle: Bundle) -> Callable[[PreprocessedScan], tuple[np.ndarray, np.ndarray]]:
    """Load a model; give what makes the map of a scan, and reads its brain mask."""
    import torch

    from bids_uad.engine.bundle import load_detector
    from bids_uad.engine.execution import Execution, resolve_device, resolve_precision
    from bids_uad.engine.inference import anomaly_map

    torch.set_num_threads(config.nprocs)
    device = resolve_device(config.device)
    execution = Execution(resolve_precision(config.precision, device), config.batch_size, config.compiled)
    detector = execution.prepare(load_detector(bundle, str(device)))

    def scored(scan: PreprocessedScan) -> tuple[np.ndarray, np.ndarray]:
        brain = np.asarray(nib.load(scan.brain).dataobj) > 0
        volume = np.asarray(nib.load(scan.image).dataobj, dtype=np.float32)
        if not brain.any():
            raise InputError(scan.brain, "the brain mask is empty", "run the participant level again")
        if not np.isfinite(volume).all():
            raise InputError(scan.image, "NaN or infinite intensities", "run the participant level again")
        scores = anomaly_map(
            detector,
            volume,
            brain,
            key=scan.key,
            seed=config.random_seed,
            protocol=bundle.protocol,
            execution=execution,
        )
        return scores, brain

    return scored


def _others(folder: Path, validation: Cohort, bundle: Bundle) -> Cohort:
    """Find the healthy people who are there for the reference alone.

    Raises
    ------
    InputError
        If one of them is in the validation, too, and would be judged by a reference that knows the person.
    """
    others = healthy_cohort(folder, bundle.modality)
    known = identities(validation.folder, {scan.subject for scan in validation.scans})
    twice = [
        subject
        for subject in sorted({scan.subject for scan in others.scans})
        if not known.isdisjoint(identities(folder, [subject]))
    ]
    if twice:
        raise InputError(
            folder,
            f"{listed(twice, 5)} among the validation scans, too",
            "give --normative-dir other people than those of BIDS_DIR",
        )
    return others


def _people(cohorts: Sequence[Cohort]) -> Iterator[tuple[PreprocessedScan, dict[str, float | None]]]:
    """Go through the healthy scans of cohorts, with age and sex."""
    for cohort in cohorts:
        rows = read_participants(cohort.folder)
        for scan in cohort.scans:
            if scan.lesion is None:
                yield scan, age_and_sex(rows.row(scan.subject))


def _healthy(cohorts: Sequence[Cohort]) -> list[dict[str, float | None]]:
    """Age and sex of every healthy person, once."""
    people = {
        (cohort.folder, scan.subject): person for cohort in cohorts for scan, person in _people([cohort])
    }
    return list(people.values())


def _deviations(healthy: list[dict[str, float | None]], waiting: Path) -> DeviationCalibrator | None:
    """Prepare a normative reference; None where there are too few healthy people for one."""
    if len(healthy) < MIN_SUBJECTS:
        logger.warning(
            "%d healthy people are too few for a normative reference (%d are needed): --deviation normative "
            "will not be possible with this model",
            len(healthy),
            MIN_SUBJECTS,
        )
        return None
    return DeviationCalibrator(HealthyCohort.of(healthy), waiting)
