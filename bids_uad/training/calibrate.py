"""Command `calibrate`: set the thresholds of a model bundle on validation scans.

``bids_uad calibrate VALIDATION MODELS --detector disyre --modality T2w --preset lite`` writes
``MODELS/disyre-T2w-lite/calibration.json`` and, with enough healthy controls, ``normative.nii.gz``. With a
decision rule other than a plain threshold, its parameters and the kind of maps are chosen as well.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np

from bids_uad.calibration.deviation import DeviationCalibrator, ValidationMap
from bids_uad.calibration.normative import MIN_SUBJECTS, HealthyCohort, NormativeReference
from bids_uad.calibration.thresholds import RULE_THRESHOLD, ThresholdEstimator
from bids_uad.config import HYSTERESIS, RunConfig
from bids_uad.dataset.participants import subject_hashes
from bids_uad.dataset.sri24_scans import PreprocessedScan
from bids_uad.errors import ConfigError, InputError, ModelError, truncate_list
from bids_uad.files import (
    atomic_paths,
    file_sha256,
    json_text,
    remove_unfinished,
    temporary_folder,
)
from bids_uad.progress import track
from bids_uad.training.cohort import (
    Cohort,
    describe_cohorts,
    healthy_cohort,
    read_lesion_mask,
    usable_scans,
    warn_about_masked_controls,
)
from bids_uad.training.decision_rule import (
    MAX_MEDIAN_MARKED,
    MAX_P95_MARKED,
    ChosenRule,
    choose_rule,
)
from bids_uad.training.model_card import add_validation
from bids_uad.training.train import bundle_folder

if TYPE_CHECKING:
    from bids_uad.engine.bundle import Bundle

logger = logging.getLogger(__name__)

HYSTERESIS_BY_DEFAULT = ("pls",)
"""Detectors with a decision rule by default; the published ones have a plain threshold, as published."""


def run_calibrate(config: RunConfig) -> int:
    """Score validation scans and write the thresholds to the bundle.

    Changed hyper-parameters (`config.hyper`) are written to the bundle as well; the weights must fit them.

    The false-positive thresholds are determined on scans of healthy controls (by participants.tsv), with or
    without a lesion mask, and the Dice threshold on scans of patients with a lesion mask that is not empty.
    Other scans are left out, since a missing mask does not imply health. With at least `MIN_SUBJECTS` healthy
    controls, a normative reference of their scores is fitted; controls of `normative_dir` are used for it
    only. With `decision_rule` ``hysteresis``, :func:`~bids_uad.training.decision_rule.choose_rule` chooses a
    rule for scores and one for deviations, and the better one decides which of the two is the default.

    Parameters
    ----------
    config : RunConfig
        `bids_dir` is a dataset of preprocessed validation scans, `output_dir` the folder of the bundle.

    Returns
    -------
    int
        Exit code 0.

    Raises
    ------
    ConfigError
        If a hyper-parameter does not exist or has an invalid value.
    InputError
        If no scan can be used, or `normative_dir` has participants of `bids_dir`.
    ModelError
        If the bundle is missing or damaged.
    """
    from bids_uad.engine.bundle import (
        DEFAULT_DEVIATION,
        NORMATIVE,
        NORMATIVE_FILE,
        load_bundle,
    )

    bundle = load_bundle(bundle_folder(config))
    if config.hyper:
        try:
            bundle = bundle.with_hyper(config.hyper)
        except ValueError as error:
            raise ConfigError(f"--hyper: {error}") from None
    found = Cohort(config.bids_dir, usable_scans(config.bids_dir, bundle.modality))
    participants = found.participants
    for note in participants.notes:
        logger.warning(note)
    controls = [scan for scan in found.scans if participants.person(scan.subject, scan.session).healthy]
    _check_masks(config.bids_dir, found.scans, controls)
    scans = [scan for scan in found.scans if scan in controls or scan.lesion is not None]
    validation = Cohort(config.bids_dir, tuple(scans))
    extra = (
        [] if config.normative_dir is None else [_normative_cohort(config.normative_dir, validation, bundle)]
    )
    healthy = _covariates_by_subject([Cohort(config.bids_dir, tuple(controls)), *extra])
    scored = _scorer(config, bundle)
    estimator = ThresholdEstimator()
    searching = _uses_hysteresis(config)
    maps = []
    for folder in (config.work_dir, bundle.folder):
        remove_unfinished(folder)
    with temporary_folder(config.work_dir, "calibrate") as scratch:
        deviations = _deviation_calibrator(healthy, scratch, keep_deviations=searching)
        for scan in track(scans, len(scans), f"Scoring with {bundle.name}", logger.info):
            scores, brain = scored(scan)
            lesion = read_lesion_mask(scan)
            if scan in controls:
                brain, lesion = _unmasked(brain, lesion), None
            kind = participants.cohort(scan.subject, scan.session)
            estimator.add(scores, brain, lesion, kind)
            person = participants.person(scan.subject, scan.session).covariates
            if deviations is None and searching:
                found_map = ValidationMap(scan.subject, person, kind, scores, brain, lesion)
                maps.append(found_map.store(scratch / f"{len(maps):06d}.npz"))
            elif deviations is not None:
                deviations.add(scores, brain, lesion, subject=scan.subject, person=person, kind=kind)
        if deviations is not None:
            more = list(_scans_with_covariates(extra))
            for scan, person in track(more, len(more), "Scoring for the reference", logger.info):
                scores, brain = scored(scan)
                deviations.add_to_reference(scores, _unmasked(brain, read_lesion_mask(scan)), person=person)
        rule = None
        if searching:
            maps = maps if deviations is None else deviations.maps
            rule = choose_rule(maps, estimator, config.min_counted_volume)
        calibration = _summary(estimator, rule)
        normative = None if deviations is None else _finish(deviations, config)
    calibration["cohort"] = describe_cohorts([validation])
    calibration["weights_sha256"] = bundle.sha256
    names = [NORMATIVE_FILE] * (normative is not None) + ["bundle.json"] * bool(config.hyper)
    targets = [bundle.folder / name for name in (*names, "MODEL_CARD.md", "calibration.json")]
    # Outputs of an earlier calibration that this one replaces.
    obsolete = [bundle.folder / name for name in ("calibration.json", NORMATIVE_FILE)]
    with atomic_paths(targets, obsolete) as paths:
        unfinished = dict(zip([target.name for target in targets], paths, strict=True))
        if normative is not None:
            reference, thresholds, deviation_rule = normative
            reference.write(unfinished[NORMATIVE_FILE])
            if rule is not None and deviation_rule is not None:
                as_good = deviation_rule.is_as_good_as(rule)
                calibration[DEFAULT_DEVIATION] = NORMATIVE if as_good else "none"
            calibration[NORMATIVE] = thresholds | {
                "reference": reference.describe(),
                "n_healthy_subjects": len(healthy),
                "sha256": file_sha256(unfinished[NORMATIVE_FILE]),
            }
            if extra:
                calibration[NORMATIVE]["cohort"] = describe_cohorts(extra)
        if config.hyper:
            unfinished["bundle.json"].write_text(json_text(bundle.info), encoding="utf-8")
        unfinished["calibration.json"].write_text(json_text(calibration), encoding="utf-8")
        card = (bundle.folder / "MODEL_CARD.md").read_text(encoding="utf-8")
        unfinished["MODEL_CARD.md"].write_text(add_validation(card, calibration), encoding="utf-8")
    counts = calibration["validation"]
    logger.info(
        "%s: scans of healthy controls %d, with a lesion %d, of patients with an empty lesion mask %d",
        bundle.name,
        *(counts[name] for name in ("n_healthy", "n_lesion", "n_empty_mask")),
    )
    for name, value in calibration["thresholds"].items():
        logger.info("%s: %s = %.5g", bundle.name, name, value)
    for name, value in calibration.get(NORMATIVE, {"thresholds": {}})["thresholds"].items():
        logger.info("%s, deviation: %s = %.5g", bundle.name, name, value)
    return 0


def _uses_hysteresis(config: RunConfig) -> bool:
    """Return whether a decision rule other than a plain threshold is chosen."""
    if config.decision_rule is not None:
        return config.decision_rule == HYSTERESIS
    return config.detector in HYSTERESIS_BY_DEFAULT


def _finish(
    deviations: DeviationCalibrator, config: RunConfig
) -> tuple[NormativeReference, dict[str, Any], ChosenRule | None] | None:
    """Fit the normative reference, its thresholds and rule; return None with a warning if this fails."""
    try:
        reference, thresholds = deviations.finish()
        rule = None
        if _uses_hysteresis(config):
            rule = choose_rule(deviations.deviations, thresholds, config.min_counted_volume)
        return reference, _summary(thresholds, rule), rule
    except ModelError as error:
        logger.warning("No normative reference: %s", error)
        return None


def _summary(estimator: ThresholdEstimator, chosen: ChosenRule | None) -> dict[str, Any]:
    """Return a part of ``calibration.json``: thresholds and, if one was chosen, the decision rule."""
    if chosen is None:
        return estimator.summary()
    content = estimator.summary(chosen.rule)
    validation = content["validation"]
    if not chosen.figures["within_limits"]:
        logger.warning(
            "No decision rule keeps the marked fraction of healthy brains within the limits (median %.1f %%, "
            "95th percentile %.1f %%); the one that exceeds them least is used",
            100 * MAX_MEDIAN_MARKED,
            100 * MAX_P95_MARKED,
        )
    content["thresholds"][RULE_THRESHOLD] = chosen.rule.threshold
    content["default_threshold"] = RULE_THRESHOLD
    content["rule"] = chosen.rule.entries()
    validation["rule"] = chosen.figures
    validation["mean_dice"][RULE_THRESHOLD] = chosen.mean_dice[None]
    for kind, figures in validation["by_kind"].items():
        figures["mean_dice"][RULE_THRESHOLD] = chosen.mean_dice[kind]
    if chosen.healthy_fpr is not None:
        validation["healthy_fpr"][RULE_THRESHOLD] = chosen.healthy_fpr
    return content


def _check_masks(
    folder: Path, found: Sequence[PreprocessedScan], controls: Sequence[PreprocessedScan]
) -> None:
    """Check all lesion masks before any scan is scored, and warn of scans that are left out.

    Raises
    ------
    InputError
        If a mask cannot be used, or there is neither a healthy control nor a scan with a lesion.
    """
    warn_about_masked_controls(controls)
    patients = [scan for scan in found if scan not in controls]
    without = sorted({scan.subject for scan in patients if scan.lesion is None})
    if without:
        logger.warning(
            "%d participant(s) left out, neither healthy by participants.tsv nor with a lesion mask: %s",
            len(without),
            truncate_list(without),
        )
    masked = [scan for scan in patients if scan.lesion is not None]
    empty = [scan for scan in masked if not (read_lesion_mask(scan) & _brain(scan)).any()]
    if empty:
        logger.warning(
            "%d scan(s) of patients have a lesion mask without voxels in the brain; they are not used for "
            "thresholds and are counted separately (n_empty_mask): %s",
            len(empty),
            truncate_list(sorted({scan.subject for scan in empty})),
        )
    if not controls and len(empty) == len(masked):
        raise InputError(
            folder,
            "no scan of a healthy control, and none of a patient with a lesion mask that is not empty",
            "label controls in the column `group` of participants.tsv, or add lesion masks",
        )


def _brain(scan: PreprocessedScan) -> np.ndarray:
    return np.asarray(nib.load(scan.brain).dataobj) > 0


def _unmasked(brain: np.ndarray, lesion: np.ndarray | None) -> np.ndarray:
    """Remove the lesion mask of a healthy control from its brain mask, as the group level does."""
    return brain if lesion is None else brain & ~lesion


def _scorer(config: RunConfig, bundle: Bundle) -> Callable[[PreprocessedScan], tuple[np.ndarray, np.ndarray]]:
    """Load a model; return a function from a scan to its anomaly map and brain mask."""
    import torch

    from bids_uad.engine.bundle import load_detector
    from bids_uad.engine.execution import Execution, resolve_device, resolve_precision
    from bids_uad.engine.inference import anomaly_map

    torch.set_num_threads(config.nprocs)
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device, published=bundle.protocol.published)
    execution = Execution(precision, config.batch_size, config.compiled)
    detector = execution.prepare(load_detector(bundle, str(device)))

    def scored(scan: PreprocessedScan) -> tuple[np.ndarray, np.ndarray]:
        brain = _brain(scan)
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


def _normative_cohort(folder: Path, validation: Cohort, bundle: Bundle) -> Cohort:
    """Find the healthy controls that are used for the normative reference only.

    Raises
    ------
    InputError
        If one of them is in the validation set as well, which would bias the thresholds.
    """
    others = healthy_cohort(folder, bundle.modality)
    validated = subject_hashes(validation.folder, {scan.subject for scan in validation.scans})
    shared = [
        subject
        for subject in sorted({scan.subject for scan in others.scans})
        if not validated.isdisjoint(subject_hashes(folder, [subject]))
    ]
    if shared:
        raise InputError(
            folder,
            f"{truncate_list(shared, 5)} also in the validation set",
            "set --normative-dir to a dataset of other participants than BIDS_DIR",
        )
    return others


def _scans_with_covariates(
    cohorts: Sequence[Cohort],
) -> Iterator[tuple[PreprocessedScan, dict[str, float | None]]]:
    """Iterate over the scans of cohorts, with age and sex."""
    for cohort in cohorts:
        for scan in cohort.scans:
            yield scan, cohort.participants.person(scan.subject, scan.session).covariates


def _covariates_by_subject(
    cohorts: Sequence[Cohort],
) -> dict[tuple[Path, str], dict[str | None, dict[str, float | None]]]:
    """Return age and sex of healthy controls: by dataset and participant, then by session."""
    people: dict[tuple[Path, str], dict[str | None, dict[str, float | None]]] = {}
    for cohort in cohorts:
        for scan, person in _scans_with_covariates([cohort]):
            people.setdefault((cohort.folder, scan.subject), {})[scan.session] = person
    return people


def _deviation_calibrator(
    healthy: Mapping[tuple[Path, str], Mapping[str | None, dict[str, float | None]]],
    scratch: Path,
    *,
    keep_deviations: bool,
) -> DeviationCalibrator | None:
    """Create the calibrator of the normative reference; return None if there are too few healthy controls."""
    if len(healthy) < MIN_SUBJECTS:
        logger.warning(
            "%d healthy controls are too few for a normative reference (at least %d); --deviation normative "
            "will not be available for this model",
            len(healthy),
            MIN_SUBJECTS,
        )
        return None
    covariates = [person for sessions in healthy.values() for person in sessions.values()]
    return DeviationCalibrator(HealthyCohort.from_participants(covariates), scratch, keep_deviations)
