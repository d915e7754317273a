"""Table of subjects: one row of metrics for each image and detector, with participant and image metadata."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bids_uad.calibration.thresholds import LEAST_LIMIT, TIMES_MEAN, TIMES_P95
from bids_uad.dataset.image_metadata import image_metadata
from bids_uad.dataset.participants import STANDARD_COLUMNS, Participants, describe_columns
from bids_uad.dataset.sidecars import METRICS_COLUMNS
from bids_uad.errors import InputError
from bids_uad.evaluation.metrics import (
    Confusion,
    average_precision,
    confusion,
    edge_index,
    lesion_wise,
)
from bids_uad.evaluation.tables import UnitScores
from bids_uad.space import VOXEL_MM3

LESION_LOAD = "lesion load"
"""Subgroup variable that is not a column: quartile of the lesion volume of the image."""
LESION, HEALTHY, MISSING_MASK = "lesion", "healthy", "missing_mask"

COLUMNS: dict[str, dict[str, Any]] = {
    "participant_id": {"Description": "Participant"},
    "session_id": {"Description": "Session, n/a without sessions"},
    "source_image": METRICS_COLUMNS["source_image"],
    "modality": METRICS_COLUMNS["modality"],
    "detector": METRICS_COLUMNS["detector"],
    "preset": METRICS_COLUMNS["preset"],
    "cohort": {
        "Description": "healthy for healthy controls, else the pathology (or the column that --cohort "
        "names), else unspecified"
    },
    "role": {
        "Description": "Metrics for which the image is used",
        "Levels": {
            LESION: "Not a healthy control, with a lesion mask (which may be empty): Dice, AUPRC, "
            "lesion-wise metrics",
            HEALTHY: "Healthy control by participants.tsv: false-positive rate only",
            MISSING_MASK: "Not a healthy control, without a lesion mask: not used",
        },
    },
    "threshold_name": METRICS_COLUMNS["threshold_name"],
    "seen_in_training": METRICS_COLUMNS["seen_in_training"],
    "scanner_seen": METRICS_COLUMNS["scanner_seen"],
    "threshold": METRICS_COLUMNS["threshold"],
    "n_brain_voxels": {"Description": "Number of brain voxels in SRI24 space", "Units": "voxel"},
    "n_lesion_voxels": {"Description": "Number of lesion voxels inside the brain", "Units": "voxel"},
    "prevalence": {"Description": "Lesion voxels / brain voxels"},
    "dice": {"Description": "Dice coefficient of anomaly mask and lesion mask; 1 if both masks are empty"},
    "both_empty": {"Description": "1 if anomaly mask and lesion mask are both empty, else 0"},
    "sensitivity": {"Description": "Lesion voxels in the anomaly mask / lesion voxels"},
    "precision": {"Description": "Lesion voxels in the anomaly mask / voxels in the anomaly mask"},
    "auprc": {
        "Description": "Area under the precision-recall curve: average precision over the brain voxels, "
        "computed from the score histogram as the expectation over all orders of the voxels of a bin (scores "
        "of zero are tied)"
    },
    "fpr": {
        "Description": "False-positive rate: non-lesion brain voxels in the anomaly mask / non-lesion brain "
        "voxels; n/a without a lesion mask, except for healthy controls"
    },
    **{
        name: METRICS_COLUMNS[name]
        for name in (
            *("brain_volume_mm3", "anomaly_volume_mm3", "lesion_volume_mm3", "detected_volume_mm3"),
            "min_lesion_volume_mm3",
            *("n_components", "n_counted_components", "n_lesions", "n_lesions_detected"),
            "n_false_components",
        )
    },
    "marked_fraction": {"Description": "anomaly_volume_mm3 / brain_volume_mm3"},
    "marked_limit": {
        "Description": "marked_fraction above which a scan is far outside what the model marks in healthy "
        f"validation scans: {TIMES_P95} times their 95th percentile ({TIMES_MEAN} times their mean if the "
        f"bundle does not state it), at least {LEAST_LIMIT:g}; n/a if nothing is known of healthy scans"
    },
    "marked_excess": {
        "Description": "1 if marked_fraction exceeds marked_limit, else 0. Either the lesion is large, or "
        "the threshold does not hold for the scan"
    },
    "lesion_sensitivity": {"Description": "n_lesions_detected / n_lesions"},
    "lesion_precision": {"Description": "n_lesions_detected / (n_lesions_detected + n_false_components)"},
    "lesion_f1": {
        "Description": "Harmonic mean of lesion_sensitivity and lesion_precision: 2 * n_lesions_detected / "
        "(n_lesions + n_lesions_detected + n_false_components)"
    },
    "model_sha256": {"Description": "SHA-256 of the model bundle"},
    "app_version": {"Description": "Version of bids_uad that scored the image"},
    "report": {"Description": "Report of the participant, relative to this file; n/a without a report"},
}


def unit_role(unit: UnitScores) -> str:
    """Return the role of an image: `lesion`, `healthy` or `missing_mask`.

    Healthy controls are defined by participants.tsv alone: a participant without a lesion mask is not taken
    for healthy, and a control with a lesion mask remains a control.

    Parameters
    ----------
    unit : UnitScores
        Score tables of one image and detector.

    Returns
    -------
    str
        One of the levels of the column `role`.
    """
    if unit.healthy:
        return HEALTHY
    return LESION if unit.has_lesion_mask else MISSING_MASK


def subject_row(unit: UnitScores) -> dict[str, Any]:
    """Compute the metrics of one image and detector.

    Parameters
    ----------
    unit : UnitScores
        Score tables of one image and detector.

    Returns
    -------
    dict
        Value of each column of `COLUMNS` except `report`; NaN for metrics that are not defined.

    Raises
    ------
    InputError
        If the threshold is not one of the bin edges.
    """
    try:
        edge = edge_index(unit.edges, unit.threshold)
    except ValueError as error:
        remedy = "score the participant again with an undamaged bundle"
        raise InputError(unit.path, str(error), remedy) from error
    nan = float("nan")
    role = unit_role(unit)
    n_lesion = unit.n_lesion if unit.has_lesion_mask else unit.n_nonlesion * 0
    counts = _confusion_of_mask(unit, n_lesion, edge)
    scored = role == LESION
    n_lesion_voxels = int(n_lesion.sum())
    n_brain_voxels = int(unit.n_nonlesion.sum()) + n_lesion_voxels
    marked, limit = unit.anomaly_volume_mm3 / (unit.brain_volume_mm3 or nan), unit.healthy_marked.limit
    return {
        "participant_id": unit.subject,
        "session_id": f"ses-{unit.session}" if unit.session else None,
        "source_image": unit.source_image,
        "modality": unit.modality,
        "detector": unit.detector,
        "preset": unit.preset,
        "cohort": unit.cohort,
        "role": role,
        "threshold_name": unit.threshold_name,
        "seen_in_training": unit.seen_in_training,
        "scanner_seen": unit.scanner_seen,
        "threshold": unit.threshold,
        "n_brain_voxels": n_brain_voxels,
        "n_lesion_voxels": n_lesion_voxels if unit.has_lesion_mask else nan,
        "prevalence": n_lesion_voxels / n_brain_voxels if scored and n_brain_voxels else nan,
        "dice": counts.dice if scored else nan,
        "both_empty": float(counts.both_empty) if scored else nan,
        "sensitivity": counts.sensitivity if scored else nan,
        "precision": counts.precision if scored else nan,
        "auprc": average_precision(unit.n_nonlesion, n_lesion) if scored else nan,
        "fpr": nan if role == MISSING_MASK else counts.false_positive_rate,
        "brain_volume_mm3": unit.brain_volume_mm3,
        "anomaly_volume_mm3": unit.anomaly_volume_mm3,
        "lesion_volume_mm3": unit.lesion_volume_mm3,
        "detected_volume_mm3": unit.detected_volume_mm3,
        "min_lesion_volume_mm3": unit.min_lesion_volume_mm3,
        "n_components": unit.n_components,
        "n_counted_components": unit.n_counted_components,
        "n_lesions": unit.n_lesions,
        "n_lesions_detected": unit.n_lesions_detected,
        "n_false_components": unit.n_false_components,
        "marked_fraction": marked,
        "marked_limit": nan if limit is None else limit,
        "marked_excess": nan if limit is None or np.isnan(marked) else float(marked > limit),
        **(
            lesion_wise(unit.n_lesions, unit.n_lesions_detected, unit.n_false_components)
            if scored
            else dict.fromkeys(("lesion_sensitivity", "lesion_precision", "lesion_f1"), nan)
        ),
        "model_sha256": unit.model_sha256,
        "app_version": unit.app_version,
    }


def _confusion_of_mask(unit: UnitScores, n_lesion: np.ndarray, edge: int) -> Confusion:
    """Return the confusion matrix of the anomaly mask.

    Its volumes are those of the metrics table, since a decision rule is more than a threshold. Tables of
    earlier versions lack the volume inside the lesions; their masks are plain thresholds, so that the score
    histogram has the same counts.
    """
    at_threshold = confusion(unit.n_nonlesion, n_lesion, edge)
    true_positive = 0.0 if unit.n_lesion is None else unit.detected_volume_mm3
    if np.isnan(true_positive) or np.isnan(unit.anomaly_volume_mm3):
        return at_threshold
    true_positive, positive = round(true_positive / VOXEL_MM3), round(unit.anomaly_volume_mm3 / VOXEL_MM3)
    return Confusion(
        true_positive=true_positive,
        false_positive=positive - true_positive,
        false_negative=int(n_lesion.sum()) - true_positive,
        true_negative=int(unit.n_nonlesion.sum()) - (positive - true_positive),
    )


def add_participant_columns(
    table: pd.DataFrame, participants: Participants
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Append the columns of participants.tsv, with the values at the session of each image.

    Parameters
    ----------
    table : pandas.DataFrame
        One row per image and detector.
    participants : Participants
        Participants of the raw dataset.

    Returns
    -------
    table : pandas.DataFrame
        Table with the further columns; a column whose name is taken is called `participants_<name>`. `age` is
        in years (float), `sex` is `male`, `female` or `other`, and all others are text.
    descriptions : dict
        Description of each column of the table.
    """
    keys = [
        (subject, None if pd.isna(session) else session)
        for subject, session in zip(table["participant_id"], table["session_id"], strict=True)
    ]
    rows = {key: participants.row(*key) for key in dict.fromkeys(keys)}
    of_sessions = [fact for fact in STANDARD_COLUMNS if any(fact in row for row in rows.values())]
    columns = list(dict.fromkeys([*participants.columns, *of_sessions]))
    names = {column: f"participants_{column}" if column in table.columns else column for column in columns}
    added = pd.DataFrame([rows[key] for key in keys], index=table.index, columns=columns)
    own = {column: COLUMNS[column] for column in table.columns}
    described = describe_columns(participants, columns)
    table = pd.concat([table, added.rename(columns=names)], axis=1)
    return table, own | {names[column]: described[column] for column in columns}


def add_image_columns(
    table: pd.DataFrame,
    descriptions: dict[str, Any],
    variables: Sequence[str],
    bids_dir: Path,
    participants: Participants,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Append a column of image metadata for each subgroup variable that is not in the table.

    Parameters
    ----------
    table : pandas.DataFrame
        One row per image and detector.
    descriptions : dict
        Description of each column.
    variables : sequence of str
        Subgroup variables.
    bids_dir : pathlib.Path
        Root of the raw dataset.
    participants : Participants
        Participants of the raw dataset.

    Returns
    -------
    table : pandas.DataFrame
        Table with a column for each variable found in sessions.tsv, scans.tsv or the sidecars.
    descriptions : dict
        Description of each column of the table.
    """
    missing = [name for name in variables if name not in table and name != LESION_LOAD]
    if not missing:
        return table, descriptions
    metadata = image_metadata(bids_dir, table["source_image"], missing, participants)
    added = {
        name: {"Description": f"{name}, from sessions.tsv, scans.tsv or the sidecar of the raw image"}
        for name in metadata
    }
    return table.join(metadata, on="source_image"), descriptions | added
