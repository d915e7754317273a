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

COLUMNS: dict[str, dict[str, Any]] = {
    "detector": {"Description": "Anomaly detector"},
    "modality": {"Description": "Modality of the images"},
    "cohort": {
        "Description": "all, or the lesion scans of one cohort (by the column pathology of participants.tsv, "
        "or the one that --cohort names) when there are several; false positives on healthy scans are in the "
        "row 'all' only"
    },
    "preset": {"Description": "Preset of the detector's model bundle"},
    "threshold_name": {"Description": "How the fixed threshold was chosen on validation data"},
    "threshold": {"Description": "The fixed threshold on the anomaly score; positive is above it"},
    "n_participants": {"Description": "Participants with a score table"},
    "n_scans": {"Description": "Images with a score table"},
    "n_lesion_scans": {"Description": "Images with a lesion mask of participants not known to be healthy"},
    "n_healthy_scans": {"Description": "Images of healthy participants (participants.tsv)"},
    "n_missing_mask": {
        "Description": "Images without a lesion mask of participants not known to be healthy; "
        "used for nothing"
    },
    "n_missing_participants": {"Description": "Known participants without any such score table"},
    "n_failed_scans": {"Description": "Preprocessed images without a readable score table"},
    "n_excluded_scans": {"Description": "Images that quality control leaves out (exclude in the qc tables)"},
    "n_empty_mask": {"Description": "Lesion scans whose lesion mask is empty"},
    "n_both_empty": {"Description": "Lesion scans with an empty mask and an empty prediction (Dice 1)"},
    "prevalence": {"Description": "Lesion share of the brain voxels of all lesion scans"},
    "dice_mean": {"Description": "Mean Dice at the fixed threshold over the lesion scans"},
    **interval_columns("dice", "mean Dice"),
    "dice_nonempty_mean": {"Description": "The same over lesion scans whose mask is not empty"},
    "dice_optimal": {
        "Description": "Highest mean Dice of any one threshold, over the lesion scans whose mask is "
        "not empty (to be compared with dice_nonempty_mean). An upper bound that looks at the test "
        "set; no mask is ever made with it"
    },
    "dice_optimal_threshold": {"Description": "The threshold of dice_optimal"},
    "sensitivity_mean": {"Description": "Mean voxel-wise sensitivity at the fixed threshold"},
    "precision_mean": {
        "Description": "Mean voxel-wise precision at the fixed threshold, over the lesion scans in "
        "which anything is found"
    },
    "auprc_mean": {
        "Description": "Mean area under the precision-recall curve (average precision over brain "
        "voxels) over the lesion scans with a lesion"
    },
    **interval_columns("auprc", "mean AUPRC"),
    "auprc_pooled": {
        "Description": "Average precision over the brain voxels of all lesion scans together; "
        "large lesions weigh more"
    },
    "fpr_healthy_mean": {
        "Description": "Mean share of the brain voxels above the fixed threshold, healthy scans"
    },
    **interval_columns("fpr_healthy_mean", "mean"),
    "fpr_healthy_median": {"Description": "Median of the same"},
    **interval_columns("fpr_healthy_median", "median"),
    "fpr_lesion_mean": {
        "Description": "Mean share of the non-lesion brain voxels above the fixed threshold, lesion scans"
    },
    **interval_columns("fpr_lesion_mean", "mean"),
    "min_lesion_volume_mm3": {
        "Description": "Least volume of lesions, and of false lesions, that are counted (option "
        "--min-lesion-volume of the participant level)",
        "Units": "mm^3",
    },
    "n_lesions": {"Description": "26-connected lesions of at least that volume, of all lesion scans"},
    "lesion_sensitivity": {
        "Description": "Lesions that the prediction touches / lesions, all lesion scans together"
    },
    **interval_columns("lesion_sensitivity", "lesion-wise sensitivity", share=True),
    "lesion_precision": {
        "Description": "Lesions that the prediction touches / (these + false lesions), all lesion scans "
        "together. False lesions are predicted components of at least that volume that touch no lesion of "
        "any size"
    },
    **interval_columns("lesion_precision", "lesion-wise precision", share=True),
    "lesion_f1": {
        "Description": "2 * lesions that the prediction touches / (lesions + these + false lesions), the "
        "harmonic mean of lesion-wise sensitivity and precision"
    },
    **interval_columns("lesion_f1", "lesion-wise F1", share=True),
    "false_lesions_per_lesion_scan": {"Description": "Mean number of false lesions, lesion scans"},
    **interval_columns("false_lesions_per_lesion_scan", "mean"),
    "false_lesions_per_healthy_scan": {
        "Description": "Mean number of predicted components of at least that volume, healthy scans"
    },
    **interval_columns("false_lesions_per_healthy_scan", "mean"),
    "model_sha256": {"Description": "SHA-256 of the model bundle"},
    "app_version": {"Description": "Versions of bids_uad that scored the images"},
}


@dataclass(frozen=True)
class Evaluation:
    """All that the group level knows about a cohort.

    Parameters
    ----------
    subjects : pandas.DataFrame
        One row per image and detector, columns of `subjects.COLUMNS`.
    benchmark : pandas.DataFrame
        One row per detector, modality and cohort, columns of `benchmark.COLUMNS`.
    curves : dict
        (detector, modality) -> `Curves` over all scans.
    cohort_curves : dict
        (detector, modality, cohort) -> `Curves` over the scans of one cohort.
    absences : list of MissingData
        Participants and images without a score table.
    unreadable : list of str
        Tables that could not be read, one message each.
    warnings : list of str
        What a reader of the numbers has to know.
    lesions : Lesions
        What was measured of each lesion.
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
        """Least volume in mm3 of the lesions that are counted; None if no score table has one."""
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
    """Go once through the score tables of a cohort and make the benchmark.

    Parameters
    ----------
    output_dir : path-like
        Root of the derivatives.
    paths : sequence of pathlib.Path
        The metrics tables, sorted.
    participants : Participants
        Who is who.
    seed : int
        Seed of the bootstrap.
    only : frozenset of str
        The `sub-<label>` that are expected to have tables; empty means everybody.
    processes : int
        How many read the tables.
    progress : callable, optional
        Called now and then with the number of tables that have been read since.

    Returns
    -------
    Evaluation
        Tables, curves and problems.

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
        key=lambda absence: absence.subject,
    )
    expected = set(participants.labels) | {absence.subject for absence in missing_data}
    cohorts = {subject: participants.cohorts(subject) for subject in (expected & only if only else expected)}
    curves = _whole(scores.curves) | scores.curves
    benchmark = _benchmark(subjects, curves, missing_data, cohorts, seed)
    warnings = scores.consistency.warnings() + _warnings(subjects, participants, scores.contradictions)
    overall = {key[:2]: value for key, value in sorted(curves.items()) if key[2] == ALL}
    return Evaluation(
        subjects, benchmark, overall, scores.curves, missing_data, unreadable, warnings, scores.lesions
    )


def _whole(curves: Mapping[tuple[str, str, str], Curves]) -> dict[tuple[str, str, str], Curves]:
    """Add up the cohorts of each detector and modality."""
    whole: dict[tuple[str, str, str], Curves] = {}
    for (detector, modality, _), part in sorted(curves.items()):
        empty = Curves(part.edges, part.threshold)
        whole.setdefault((detector, modality, ALL), empty).include(part)
    return whole


def _benchmark(
    subjects: pd.DataFrame,
    curves: dict[tuple[str, str, str], Curves],
    missing_data: list[MissingData],
    known: dict[str, set[str]],
    seed: int,
) -> pd.DataFrame:
    rows = []
    for (modality, detector), scans in subjects.groupby(["modality", "detector"], sort=True):
        cohorts = sorted(set(scans["cohort"]) - {"healthy"})
        names = [ALL, *cohorts] if len(cohorts) > 1 else [ALL]
        seen = set(scans["participant_id"])
        for cohort in names:
            chosen = scans if cohort == ALL else scans[scans["cohort"] == cohort]
            members = {who for who, what in known.items() if cohort == ALL or cohort in what}
            absent = [
                absence
                for absence in missing_data
                if absence.modality == modality
                and absence.detector in (detector, None)
                and absence.subject in members
            ]
            ruled_out = [absence for absence in absent if absence.reason.startswith(EXCLUDED)]
            curve = curves[detector, modality, cohort]
            row = {"detector": detector, "modality": modality, "cohort": cohort}
            row |= _row(chosen, curve, seed)
            row["n_missing_participants"] = len(members - seen - {each.subject for each in ruled_out})
            row["n_failed_scans"] = len(absent) - len(ruled_out)
            row["n_excluded_scans"] = len(ruled_out)
            rows.append(row)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _row(scans: pd.DataFrame, curve: Curves, seed: int) -> dict[str, Any]:
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
        "min_lesion_volume_mm3": scans["min_lesion_volume_mm3"].max(),
        "n_lesions": lesion["n_lesions"].sum(min_count=1),
        "model_sha256": first["model_sha256"],
        "app_version": ", ".join(sorted(set(scans["app_version"]))),
    }
    means = {
        "dice": ("dice_mean", lesion, "dice"),
        "auprc": ("auprc_mean", lesion, "auprc"),
        "fpr_healthy_mean": ("fpr_healthy_mean", healthy, "fpr"),
        "fpr_lesion_mean": ("fpr_lesion_mean", lesion, "fpr"),
        "false_lesions_per_lesion_scan": (
            "false_lesions_per_lesion_scan",
            lesion,
            "n_false_components",
        ),
        "false_lesions_per_healthy_scan": (
            "false_lesions_per_healthy_scan",
            healthy,
            "n_counted_components",
        ),
    }

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


def _names(people: Iterable[str]) -> str:
    """Name participants once each, but not hundreds of them."""
    return truncate_list(sorted(set(people)))


def _meetings(subjects: pd.DataFrame) -> list[str]:
    """Warn of participants that a model has met before."""
    known = subjects[subjects["seen_in_training"] != "no"]
    groups = known.groupby(["detector", "modality", "seen_in_training"], sort=True)["participant_id"]
    return [
        f"The model of {detector} for {modality} has met {_names(people)} in {where}: its "
        "numbers on them say nothing about others."
        for (detector, modality, where), people in groups
    ]


def _warnings(subjects: pd.DataFrame, participants: Participants, contradictions: set[str]) -> list[str]:
    warnings = _meetings(subjects)
    if participants.path is None:
        warnings.append(
            "There is no participants.tsv: nobody is known to be healthy, so there is no "
            "false-positive rate on healthy scans."
        )
    elif not (subjects["role"] == HEALTHY).any():
        warnings.append(
            "No scored participant is healthy by the columns group or diagnosis of "
            "participants.tsv, so there is no false-positive rate on healthy scans."
        )
    if len(subjects) and not (subjects["n_lesion_voxels"] > 0).any():
        warnings.append(
            "There is no scan with a lesion in a lesion mask: Dice, AUPRC and lesion-wise numbers "
            "cannot be computed."
        )
    unlisted = set(subjects["participant_id"]) - set(participants.labels)
    if participants.path is not None and unlisted:
        warnings.append(f"Not in participants.tsv, so not known to be healthy: {_names(unlisted)}.")
    if contradictions:
        warnings.append(
            "Healthy by participants.tsv and yet with a lesion in the lesion mask: "
            f"{_names(contradictions)}. They count as healthy; the masked voxels are "
            "left out of their false-positive rate."
        )
    empty = subjects[(subjects["role"] == LESION) & (subjects["n_lesion_voxels"] == 0)]
    if len(empty):
        warnings.append(
            "The lesion mask is empty inside the brain: "
            f"{_names(empty['participant_id'])}. They count in Dice (1 if nothing "
            "is found, else 0), but not in [Dice] and in the curves."
        )
    masked = subjects[subjects["role"] == MISSING_MASK]
    if len(masked):
        warnings.append(
            "No lesion mask, and not known to be healthy, so used for nothing (a missing mask is "
            f"missing, never healthy): {_names(masked['participant_id'])}."
        )
    return warnings
