"""The benchmark table: one row for each detector, modality and cohort."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from bids_uad.dataset.participants import Participants
from bids_uad.errors import truncate_list
from bids_uad.evaluation.bootstrap import bootstrap_interval, interval_columns, share_interval
from bids_uad.evaluation.curves import Curves
from bids_uad.evaluation.lesion_detection import Lesions
from bids_uad.evaluation.metrics import lesion_wise
from bids_uad.evaluation.missing import MissingData, find_exclusions, find_missing_data
from bids_uad.evaluation.scores import EXCLUDED, read_scores
from bids_uad.evaluation.subjects import COLUMNS as SUBJECT_COLUMNS
from bids_uad.evaluation.subjects import HEALTHY, LESION, MISSING_MASK

ALL = "all"
EXCESS_SHARE = 0.1
"""Fraction of all scans, or of healthy ones, with `marked_excess` from which on a model is reported; that of
healthy scans is at most a few percent if the threshold holds."""

COLUMNS: dict[str, dict[str, Any]] = {
    "detector": {"Description": "Anomaly detector"},
    "modality": {"Description": "Modality of the images"},
    "cohort": {
        "Description": "all, or, if there are several cohorts of lesion scans, one of them (by the column "
        "pathology of participants.tsv, or the column that --cohort names); metrics of healthy scans are in "
        "the row 'all' only"
    },
    "preset": {"Description": "Hyperparameter preset of the detector"},
    "threshold_name": {"Description": "Criterion by which the threshold was chosen on validation data"},
    "threshold": {"Description": "Fixed threshold; voxels with a higher score are positive"},
    "n_participants": {"Description": "Number of participants with a score table"},
    "n_scans": {"Description": "Number of images with a score table"},
    "n_lesion_scans": {
        "Description": "Number of lesion scans: images with a lesion mask of participants who are not "
        "healthy controls"
    },
    "n_healthy_scans": {
        "Description": "Number of healthy scans: images of healthy controls by participants.tsv"
    },
    "n_missing_mask": {
        "Description": "Number of images without a lesion mask of participants who are not healthy controls; "
        "not used"
    },
    "n_missing_participants": {
        "Description": "Number of participants of the dataset without a table of this detector and modality"
    },
    "n_failed_scans": {"Description": "Number of preprocessed images without a readable score table"},
    "n_excluded_scans": {
        "Description": "Number of images excluded by quality control (column exclude of the qc tables)"
    },
    "n_empty_mask": {"Description": "Number of lesion scans with an empty lesion mask"},
    "n_both_empty": {
        "Description": "Number of lesion scans with an empty lesion mask and an empty anomaly mask (Dice 1)"
    },
    "prevalence": {"Description": "Fraction of lesion voxels among the brain voxels of all lesion scans"},
    "dice_mean": {"Description": "Mean Dice at the fixed threshold, lesion scans"},
    **interval_columns("dice", "mean Dice"),
    "dice_nonempty_mean": {
        "Description": "Mean Dice at the fixed threshold, lesion scans whose lesion mask is not empty"
    },
    "dice_optimal": {
        "Description": "Highest mean Dice of a single threshold, lesion scans whose lesion mask is not empty "
        "(compare with dice_nonempty_mean). An upper bound, since the threshold is chosen on the test scans; "
        "not used for anomaly masks"
    },
    "dice_optimal_threshold": {"Description": "Threshold of dice_optimal"},
    "sensitivity_mean": {"Description": "Mean voxel-wise sensitivity at the fixed threshold, lesion scans"},
    "precision_mean": {
        "Description": "Mean voxel-wise precision at the fixed threshold, lesion scans with a positive voxel"
    },
    "auprc_mean": {
        "Description": "Mean area under the precision-recall curve (average precision over brain voxels), "
        "lesion scans whose lesion mask is not empty"
    },
    **interval_columns("auprc", "mean AUPRC"),
    "auprc_pooled": {
        "Description": "Average precision over the pooled brain voxels of all lesion scans; weighted by "
        "lesion volume"
    },
    "fpr_healthy_mean": {
        "Description": "Mean false-positive rate (fraction of brain voxels above the fixed threshold), "
        "healthy scans"
    },
    **interval_columns("fpr_healthy_mean", "mean"),
    "fpr_healthy_median": {"Description": "Median false-positive rate, healthy scans"},
    **interval_columns("fpr_healthy_median", "median"),
    "fpr_lesion_mean": {
        "Description": "Mean false-positive rate (fraction of non-lesion brain voxels above the fixed "
        "threshold), lesion scans"
    },
    **interval_columns("fpr_lesion_mean", "mean"),
    "marked_limit": SUBJECT_COLUMNS["marked_limit"],
    "excess_share": {
        "Description": "Fraction of scans with more than marked_limit of the brain in the anomaly mask, "
        "which have large lesions, or for which the threshold does not hold"
    },
    "excess_share_healthy": {"Description": "The same, healthy scans only: about 0 if the threshold holds"},
    "min_lesion_volume_mm3": {
        "Description": "Minimum volume of counted lesions and of false-positive components (option "
        "--min-counted-volume of the participant level)",
        "Units": "mm^3",
    },
    "n_lesions": {
        "Description": "Number of lesions (26-connected, of at least min_lesion_volume_mm3), all lesion scans"
    },
    "lesion_sensitivity": {
        "Description": "Detected lesions / lesions, all lesion scans; a lesion is detected if it overlaps "
        "with the anomaly mask"
    },
    **interval_columns("lesion_sensitivity", "lesion-wise sensitivity", share=True),
    "lesion_precision": {
        "Description": "Detected lesions / (detected lesions + false-positive components), all lesion scans. "
        "False-positive components have at least min_lesion_volume_mm3 and overlap with no lesion of any size"
    },
    **interval_columns("lesion_precision", "lesion-wise precision", share=True),
    "lesion_f1": {
        "Description": "Harmonic mean of lesion_sensitivity and lesion_precision: 2 * detected lesions / "
        "(lesions + detected lesions + false-positive components)"
    },
    **interval_columns("lesion_f1", "lesion-wise F1", share=True),
    "false_lesions_per_lesion_scan": {
        "Description": "Mean number of false-positive components, lesion scans"
    },
    **interval_columns("false_lesions_per_lesion_scan", "mean"),
    "false_lesions_per_healthy_scan": {
        "Description": "Mean number of components of at least min_lesion_volume_mm3, healthy scans"
    },
    **interval_columns("false_lesions_per_healthy_scan", "mean"),
    "model_sha256": {"Description": "SHA-256 of the model bundle"},
    "app_version": {"Description": "Versions of bids_uad that scored the images"},
}


@dataclass(frozen=True)
class Evaluation:
    """Results of a cohort: tables, curves, missing data and warnings.

    Parameters
    ----------
    subjects : pandas.DataFrame
        One row per image and detector, columns of `subjects.COLUMNS`.
    benchmark : pandas.DataFrame
        One row per detector, modality and cohort, columns of `benchmark.COLUMNS`.
    curves : dict
        `Curves` over all scans by detector and modality.
    cohort_curves : dict
        `Curves` over the scans of a cohort by detector, modality and cohort.
    missing_data : list of MissingData
        Participants and images without a score table, or excluded.
    unreadable : list of str
        One message for each table that cannot be read.
    warnings : list of str
        Warnings about the data behind the results, one sentence or two each.
    lesions : Lesions
        Volume, contrast and detection of each lesion.
    """

    subjects: pd.DataFrame
    benchmark: pd.DataFrame
    curves: dict[tuple[str, str], Curves]
    cohort_curves: dict[tuple[str, str, str], Curves]
    missing_data: list[MissingData]
    unreadable: list[str]
    warnings: list[str]
    lesions: Lesions

    @property
    def min_lesion_volume(self) -> float | None:
        """Minimum volume of a counted lesion in mm3; None if no score table states it."""
        known = self.subjects["min_lesion_volume_mm3"].dropna()
        return float(known.iloc[0]) if len(known) else None


def evaluate(
    output_dir: str | Path,
    paths: Sequence[Path],
    participants: Participants,
    *,
    seed: int,
    only: frozenset[str] = frozenset(),
    processes: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Read the score tables of a cohort and compute the benchmark.

    Parameters
    ----------
    output_dir : path-like
        Root of the derivatives.
    paths : sequence of pathlib.Path
        Metrics tables, sorted.
    participants : Participants
        Participants of the raw dataset.
    seed : int
        Seed of the bootstrap.
    only : frozenset of str, default=frozenset()
        Participants (`sub-<label>`) to include; empty means all.
    processes : int, default=1
        Number of processes that read tables.
    progress : callable, optional
        Function that is called with the number of tables read since its last call.

    Returns
    -------
    Evaluation
        Tables, curves, missing data and warnings.

    Raises
    ------
    InputError
        If the tables of one detector and modality come from different models.
    """
    root = Path(output_dir)
    exclusions, unreadable = find_exclusions(root, only)
    scores = read_scores(paths, participants, exclusions, processes=processes, progress=progress)
    unreadable = [text.replace(f"{root}/", "") for text in (*unreadable, *scores.unreadable)]
    reports = {path.name for path in root.glob("sub-*.html")}
    subjects = scores.rows.reindex(columns=list(SUBJECT_COLUMNS))
    report = subjects["participant_id"].astype(str) + ".html"
    subjects["report"] = report.where(report.isin(reports), None)
    subjects = subjects.sort_values(
        ["modality", "detector", "participant_id", "source_image"], ignore_index=True
    )
    missing_data = sorted(
        [*find_missing_data(root, participants, scores.present, only), *scores.excluded],
        key=lambda missing: missing.subject,
    )
    expected = set(participants.labels) | {missing.subject for missing in missing_data}
    cohorts = {subject: participants.cohorts(subject) for subject in (expected & only if only else expected)}
    curves = _pooled(scores.curves) | scores.curves
    benchmark = _benchmark(subjects, curves, missing_data, cohorts, seed)
    warnings = scores.consistency.warnings() + _warnings(subjects, participants, scores.contradictions)
    overall = {key[:2]: value for key, value in sorted(curves.items()) if key[2] == ALL}
    return Evaluation(
        subjects, benchmark, overall, scores.curves, missing_data, unreadable, warnings, scores.lesions
    )


def _pooled(curves: Mapping[tuple[str, str, str], Curves]) -> dict[tuple[str, str, str], Curves]:
    """Pool the cohorts of each detector and modality."""
    pooled: dict[tuple[str, str, str], Curves] = {}
    for (detector, modality, _), part in sorted(curves.items()):
        empty = Curves(part.edges, part.threshold)
        pooled.setdefault((detector, modality, ALL), empty).include(part)
    return pooled


def _benchmark(
    subjects: pd.DataFrame,
    curves: dict[tuple[str, str, str], Curves],
    missing_data: list[MissingData],
    cohorts_of: dict[str, set[str]],
    seed: int,
) -> pd.DataFrame:
    """Compute the benchmark table, given the cohorts of each expected participant."""
    rows = []
    for (modality, detector), scans in subjects.groupby(["modality", "detector"], sort=True):
        cohorts = sorted(set(scans["cohort"]) - {"healthy"})
        names = [ALL, *cohorts] if len(cohorts) > 1 else [ALL]
        scored = set(scans["participant_id"])
        for cohort in names:
            chosen = scans if cohort == ALL else scans[scans["cohort"] == cohort]
            members = {name for name, own in cohorts_of.items() if cohort == ALL or cohort in own}
            missing = [
                each
                for each in missing_data
                if each.modality == modality and each.detector in (detector, None) and each.subject in members
            ]
            excluded = [each for each in missing if each.reason.startswith(EXCLUDED)]
            curve = curves[detector, modality, cohort]
            row = {"detector": detector, "modality": modality, "cohort": cohort}
            row |= _row(chosen, curve, seed)
            row["n_missing_participants"] = len(members - scored - {each.subject for each in excluded})
            row["n_failed_scans"] = len(missing) - len(excluded)
            row["n_excluded_scans"] = len(excluded)
            rows.append(row)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _row(scans: pd.DataFrame, curve: Curves, seed: int) -> dict[str, Any]:
    """Compute the metrics of one detector, modality and cohort."""
    lesion = scans[scans["role"] == LESION]
    healthy = scans[scans["role"] == HEALTHY]
    first = scans.iloc[0]
    optimal, optimal_threshold = curve.optimal
    row: dict[str, Any] = {
        "preset": first["preset"],
        "threshold_name": first["threshold_name"],
        "threshold": first["threshold"],
        "n_participants": scans["participant_id"].nunique(),
        "n_scans": len(scans),
        "n_lesion_scans": len(lesion),
        "n_healthy_scans": len(healthy),
        "n_missing_mask": int((scans["role"] == MISSING_MASK).sum()),
        "n_empty_mask": int((lesion["n_lesion_voxels"] == 0).sum()),
        "n_both_empty": int(lesion["both_empty"].sum()),
        "prevalence": curve.prevalence,
        "dice_nonempty_mean": lesion.loc[lesion["n_lesion_voxels"] > 0, "dice"].mean(),
        "dice_optimal": optimal,
        "dice_optimal_threshold": optimal_threshold,
        "sensitivity_mean": lesion["sensitivity"].mean(),
        "precision_mean": lesion["precision"].mean(),
        "auprc_pooled": curve.pooled_auprc,
        "fpr_healthy_median": healthy["fpr"].median(),
        "marked_limit": first["marked_limit"],
        "excess_share": scans["marked_excess"].mean(),
        "excess_share_healthy": healthy["marked_excess"].mean(),
        "min_lesion_volume_mm3": scans["min_lesion_volume_mm3"].max(),
        "n_lesions": lesion["n_lesions"].sum(min_count=1),
        "model_sha256": first["model_sha256"],
        "app_version": ", ".join(sorted(scans["app_version"].unique())),
    }
    means = {
        "dice": ("dice_mean", lesion, "dice"),
        "auprc": ("auprc_mean", lesion, "auprc"),
        "fpr_healthy_mean": ("fpr_healthy_mean", healthy, "fpr"),
        "fpr_lesion_mean": ("fpr_lesion_mean", lesion, "fpr"),
        "false_lesions_per_lesion_scan": ("false_lesions_per_lesion_scan", lesion, "n_false_components"),
        "false_lesions_per_healthy_scan": (
            "false_lesions_per_healthy_scan", healthy, "n_counted_components"),
    }  # fmt: skip

    def interval(name: str, table: pd.DataFrame, values: pd.Series, **options: Any) -> None:
        low, high = bootstrap_interval(values, table["participant_id"], seed=seed, **options)
        row[f"{name}_ci_low"], row[f"{name}_ci_high"] = low, high

    for name, (column, table, source) in means.items():
        row[column] = table[source].mean()
        interval(name, table, table[source])
    interval("fpr_healthy_median", healthy, healthy["fpr"], statistic="median")
    counted = lesion[lesion["n_lesions"].notna()]
    detected, n, false = (counted[name] for name in ("n_lesions_detected", "n_lesions", "n_false_components"))
    row |= lesion_wise(n.sum(), detected.sum(), false.sum())
    for name, part, whole in (
        ("lesion_sensitivity", detected, n),
        ("lesion_precision", detected, detected + false),
        ("lesion_f1", 2 * detected, n + detected + false),
    ):
        low, high = share_interval(part, whole, counted["participant_id"], seed=seed)
        row[f"{name}_ci_low"], row[f"{name}_ci_high"] = low, high
    return row


def _names(subjects: Iterable[str]) -> str:
    """Return a sorted list of participants as text, cut after 20."""
    return truncate_list(sorted(set(subjects)))


def _leakage_warnings(subjects: pd.DataFrame) -> list[str]:
    """Warn of participants that are part of the training, validation or reference data of a model."""
    known = subjects[subjects["seen_in_training"] != "no"]
    groups = known.groupby(["detector", "modality", "seen_in_training"], sort=True)["participant_id"]
    return [
        f"The {where} data of the model of {detector} for {modality} include {_names(names)}: its results "
        "for these participants do not show its performance on new ones."
        for (detector, modality, where), names in groups
    ]


def _excess_warnings(subjects: pd.DataFrame) -> list[str]:
    """Warn of models that mark far more than in healthy validation scans, in many scans of the cohort."""
    lines = []
    for (detector, modality), scans in subjects.groupby(["detector", "modality"], sort=True):
        known = scans[scans["marked_excess"].notna()]
        excess = known["marked_excess"] == 1
        controls = known["role"] == HEALTHY
        n, n_controls = int(excess.sum()), int((excess & controls).sum())
        if n < 2 or (n < EXCESS_SHARE * len(known) and n_controls < EXCESS_SHARE * controls.sum()):
            continue
        cause = (
            "so that the threshold does not hold for this cohort"
            if n_controls > 1 and n_controls >= EXCESS_SHARE * controls.sum()
            else "which have large lesions, or the threshold does not hold for them"
        )
        among = f", {n_controls} of {controls.sum()} among healthy controls" if controls.any() else ""
        lines.append(
            f"{detector} on {modality} marks more than {100 * known['marked_limit'].iloc[0]:.2g} % of the "
            f"brain, far more than in healthy validation scans, in {n} of {len(known)} scans{among}, {cause}."
        )
    return lines


def _warnings(subjects: pd.DataFrame, participants: Participants, contradictions: set[str]) -> list[str]:
    """Return the warnings about roles, lesion masks and train/test overlap of a cohort."""
    warnings = _leakage_warnings(subjects) + _excess_warnings(subjects)
    if participants.path is None:
        warnings.append(
            "No participants.tsv, so no participant is known to be a healthy control and there is no "
            "false-positive rate on healthy scans."
        )
    elif not (subjects["role"] == HEALTHY).any():
        warnings.append(
            "No scored participant is a healthy control by the columns group or diagnosis of "
            "participants.tsv, so there is no false-positive rate on healthy scans."
        )
    if len(subjects) and not (subjects["n_lesion_voxels"] > 0).any():
        warnings.append(
            "No lesion mask contains a lesion, so Dice, AUPRC and lesion-wise metrics cannot be computed."
        )
    unlisted = set(subjects["participant_id"]) - set(participants.labels)
    if participants.path is not None and unlisted:
        warnings.append(
            f"Not listed in participants.tsv, so not known to be healthy controls: {_names(unlisted)}."
        )
    if contradictions:
        warnings.append(
            f"Healthy by participants.tsv, but with a lesion in the lesion mask: {_names(contradictions)}. "
            "They are treated as healthy; lesion voxels are excluded from their false-positive rate."
        )
    empty = subjects[(subjects["role"] == LESION) & (subjects["n_lesion_voxels"] == 0)]
    if len(empty):
        warnings.append(
            f"Lesion mask without a voxel inside the brain: {_names(empty['participant_id'])}. They "
            "count in the mean Dice (1 if the anomaly mask is empty, else 0), but not in [Dice] and curves."
        )
    masked = subjects[subjects["role"] == MISSING_MASK]
    if len(masked):
        warnings.append(
            "Not used, because there is no lesion mask and the participant is not known to be a healthy "
            f"control: {_names(masked['participant_id'])}."
        )
    return warnings
