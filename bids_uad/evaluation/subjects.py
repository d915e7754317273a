"""One row of numbers for each image and detector."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from bids_uad.dataset.image_metadata import image_columns
from bids_uad.dataset.participants import FACTS, Participants, describe_columns
from bids_uad.dataset.sidecars import SCANNER_SEEN_LEVELS
from bids_uad.errors import InputError
from bids_uad.evaluation.metrics import (
    average_precision,
    confusion,
    edge_index,
    lesion_wise,
)
from bids_uad.evaluation.tables import UnitScores

LESION_LOAD = "lesion load"
"""A factor that is no column: the quartile of an image's lesion volume."""
LESION, HEALTHY, MISSING_MASK = "lesion", "healthy", "missing_mask"

COLUMNS: dict[str, dict[str, Any]] = {
    "participant_id": {"Description": "Participant"},
    "session_id": {"Description": "Session, n/a without sessions"},
    "source_image": {"Description": "The raw image that was scored"},
    "modality": {"Description": "Modality of the image"},
    "detector": {"Description": "Anomaly detector"},
    "preset": {"Description": "Preset of the detector's model bundle"},
    "cohort": {
        "Description": "healthy, else the participant's pathology (or what --cohort names), else unspecified"
    },
    "role": {
        "Description": "What the image is used for",
        "Levels": {
            LESION: "Not known to be healthy and has a lesion mask (which may be empty): Dice, "
            "AUPRC, lesion-wise numbers",
            HEALTHY: "Healthy by participants.tsv: false-positive rate only",
            MISSING_MASK: "Not known to be healthy and no lesion mask: used for nothing",
        },
    },
    "threshold_name": {"Description": "How the fixed threshold was chosen on validation data"},
    "seen_in_training": {
        "Description": "Cohorts of the model that the participant was in, with 'and' between them: training, "
        "validation, normative reference; or no"
    },
    "scanner_seen": {
        "Description": "Whether the model has learnt from the participant's scanner (column scanner of "
        "participants.tsv)",
        "Levels": SCANNER_SEEN_LEVELS,
    },
    "threshold": {"Description": "The fixed threshold on the anomaly score; positive is above it"},
    "n_brain_voxels": {"Description": "Voxels of the brain mask in SRI24 space", "Units": "voxel"},
    "n_lesion_voxels": {"Description": "Lesion voxels inside the brain mask", "Units": "voxel"},
    "prevalence": {"Description": "Lesion voxels divided by brain voxels"},
    "dice": {"Description": "Dice at the fixed threshold; 1 if mask and prediction are empty"},
    "both_empty": {"Description": "1 if mask and prediction are both empty, else 0"},
    "sensitivity": {"Description": "Lesion voxels above the threshold / lesion voxels"},
    "precision": {"Description": "Lesion voxels above the threshold / voxels above it"},
    "auprc": {
        "Description": "Average precision over the brain voxels of the image, from counts per score bin: the "
        "mean over all orders of the voxels in a bin, those of score zero tied"
    },
    "fpr": {
        "Description": "Non-lesion brain voxels above the threshold / non-lesion brain voxels; "
        "n/a when the lesions are not known"
    },
    "brain_volume_mm3": {"Description": "Volume of the brain mask", "Units": "mm^3"},
    "anomaly_volume_mm3": {"Description": "Volume above the threshold", "Units": "mm^3"},
    "lesion_volume_mm3": {"Description": "Volume of the lesion mask", "Units": "mm^3"},
    "min_lesion_volume_mm3": {
        "Description": "Least volume of lesions, and of false lesions, that are counted (option "
        "--min-lesion-volume of the participant level); n/a in tables of earlier versions, whose lesion-wise "
        "numbers are left out",
        "Units": "mm^3",
    },
    "n_components": {"Description": "26-connected components of the prediction"},
    "n_counted_components": {"Description": "Those of at least that volume"},
    "n_lesions": {"Description": "26-connected components of the lesion mask, of at least that volume"},
    "n_lesions_detected": {"Description": "Those of them that the prediction touches"},
    "n_false_components": {
        "Description": "Predicted components, of at least that volume, that touch no lesion of any size"
    },
    "lesion_sensitivity": {"Description": "n_lesions_detected / n_lesions"},
    "lesion_precision": {"Description": "n_lesions_detected / (n_lesions_detected + n_false_components)"},
    "lesion_f1": {
        "Description": "2 n_lesions_detected / (n_lesions + n_lesions_detected + n_false_components), the "
        "harmonic mean of the two"
    },
    "model_sha256": {"Description": "SHA-256 of the model bundle"},
    "app_version": {"Description": "Version of bids_uad that scored the image"},
    "report": {"Description": "The participant's report, relative to this file; n/a without one"},
}


def unit_role(unit: UnitScores) -> str:
    """Say what an image may be used for: `lesion`, `healthy` or `missing_mask`.

    A missing mask never makes anyone healthy, and a mask never makes a control a patient.
    """
    if unit.healthy:
        return HEALTHY
    return LESION if unit.has_lesion_mask else MISSING_MASK


def subject_row(unit: UnitScores) -> dict[str, Any]:
    """Compute the scalar numbers of one unit.

    Parameters
    ----------
    unit : UnitScores
        The tables of one image and detector.

    Returns
    -------
    dict
        A value for every key of `COLUMNS` but `report`; numbers that are not defined are NaN.

    Raises
    ------
    InputError
        If the threshold is not one of the bin edges.
    """
    try:
        edge = edge_index(unit.edges, unit.threshold)
    except ValueError as error:
        remedy = "score the subject again with an undamaged bundle"
        raise InputError(unit.path, str(error), remedy) from error
    nan = float("nan")
    role = unit_role(unit)
    n_lesion = unit.n_lesion if unit.has_lesion_mask else unit.n_nonlesion * 0
    counts = confusion(unit.n_nonlesion, n_lesion, edge)
    judged = role == LESION
    n_lesion_voxels = int(n_lesion.sum())
    n_brain_voxels = int(unit.n_nonlesion.sum()) + n_lesion_voxels
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
        "prevalence": n_lesion_voxels / n_brain_voxels if judged and n_brain_voxels else nan,
        "dice": counts.dice if judged else nan,
        "both_empty": float(counts.both_empty) if judged else nan,
        "sensitivity": counts.sensitivity if judged else nan,
        "precision": counts.precision if judged else nan,
        "auprc": average_precision(unit.n_nonlesion, n_lesion) if judged else nan,
        "fpr": nan if role == MISSING_MASK else counts.false_positive_rate,
        "brain_volume_mm3": unit.brain_volume_mm3,
        "anomaly_volume_mm3": unit.anomaly_volume_mm3,
        "lesion_volume_mm3": unit.lesion_volume_mm3,
        "min_lesion_volume_mm3": unit.min_lesion_volume_mm3,
        "n_components": unit.n_components,
        "n_counted_components": unit.n_counted_components,
        "n_lesions": unit.n_lesions,
        "n_lesions_detected": unit.n_lesions_detected,
        "n_false_components": unit.n_false_components,
        **(
            lesion_wise(unit.n_lesions, unit.n_lesions_detected, unit.n_false_components)
            if judged
            else dict.fromkeys(("lesion_sensitivity", "lesion_precision", "lesion_f1"), nan)
        ),
        "model_sha256": unit.model_sha256,
        "app_version": unit.app_version,
    }


def add_participant_columns(
    table: pd.DataFrame, participants: Participants
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Append the columns of participants.tsv, with the values of each image's session.

    Parameters
    ----------
    table : pandas.DataFrame
        One row per image and detector.
    participants : Participants

    Returns
    -------
    table : pandas.DataFrame
        With the further columns; one whose name is taken is called `participants_<name>`. `age` is in years
        (float), `sex` is `male`, `female` or `other`, and all others are text, also a numeric `scanner`.
    descriptions : dict
        Column dictionary of the whole table.
    """
    keys = [
        (subject, None if pd.isna(session) else session)
        for subject, session in zip(table["participant_id"], table["session_id"], strict=True)
    ]
    rows = {key: participants.row(*key) for key in dict.fromkeys(keys)}
    of_sessions = [fact for fact in FACTS if any(fact in row for row in rows.values())]
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
    factors: Sequence[str],
    bids_dir: Path,
    participants: Participants,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Put what the raw dataset says about each image behind the numbers, for factors that have no column.

    Parameters
    ----------
    table : pandas.DataFrame
        One row per image and detector.
    descriptions : dict
        Its column dictionary.
    factors : sequence of str
        What the cohort is to be divided by.
    bids_dir : pathlib.Path
        The raw dataset.
    participants : Participants
        Those of the raw dataset.

    Returns
    -------
    table : pandas.DataFrame
        With a column for each factor that sessions.tsv, scans.tsv or a sidecar knows.
    descriptions : dict
        Column dictionary of the whole table.
    """
    unknown = [factor for factor in factors if factor not in table and factor != LESION_LOAD]
    if not unknown:
        return table, descriptions
    found = image_columns(bids_dir, table["source_image"], unknown, participants)
    told = {
        name: {"Description": f"{name}, as sessions.tsv, scans.tsv or the sidecar of the raw image says"}
        for name in found
    }
    return table.join(found, on="source_image"), descriptions | told
