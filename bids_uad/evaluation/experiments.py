"""Models that differ in what they have learnt from or how, on the same people: scaling and ablation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from bids_uad.evaluation.bootstrap import bootstrap_interval, interval_columns
from bids_uad.evaluation.comparison import COLUMNS as COMPARISON_COLUMNS
from bids_uad.evaluation.comparison import (
    OUTCOMES,
    compare_pair,
    corrected,
    participant_scores,
)
from bids_uad.evaluation.provenance import Origin

REFERENCE = "reference"
"""Name of the variant that the others are compared with: the outputs that the group level works on."""

_PAIRED = ("difference", "difference_ci_low", "difference_ci_high", "statistic", "p")
COLUMNS: dict[str, dict[str, Any]] = {
    "detector": {"Description": "Anomaly detector"},
    "modality": {"Description": "Modality of the images"},
    "outcome": COMPARISON_COLUMNS["outcome"],
    "variant": {"Description": f"Name of the variant; {REFERENCE}: the model of these outputs"},
    "n_training_subjects": {"Description": "Subjects that the model has learnt from; n/a if not told"},
    "train_fraction": {"Description": "Share of the training subjects that these are; n/a if not told"},
    "n_steps": {"Description": "Training steps; n/a if not told"},
    "changes": {"Description": "Hyper-parameters that differ from the preset, n/a without any"},
    "n_participants": {"Description": "Participants with this number"},
    "mean": {"Description": "Mean over their scans"},
    **interval_columns("mean", "mean"),
    "n_pairs": {"Description": "Participants whom the reference has scored, too"},
    "difference": {"Description": "Mean over these participants of the variant minus the reference"},
    **{name: COMPARISON_COLUMNS[name] for name in _PAIRED[1:]},
    "p_holm": {"Description": "The same, corrected (Holm) over all variants of the detector and modality"},
}


@dataclass(frozen=True)
class Variant:
    """One model for each detector and modality, and what it scored.

    Parameters
    ----------
    name : str
    subjects : pandas.DataFrame
        One row per image and detector, columns of :data:`bids_uad.evaluation.subjects.COLUMNS`.
    origins : dict
        (detector, modality) -> `Origin`.
    """

    name: str
    subjects: pd.DataFrame
    origins: dict[tuple[str, str], Origin] = field(default_factory=dict)


def compare_variants(variants: Sequence[Variant], *, seed: int) -> pd.DataFrame:
    """Put variants side by side, and compare each with the first on the participants that both have scored.

    Parameters
    ----------
    variants : sequence of Variant
        The reference first.
    seed : int
        Seed of the bootstrap.

    Returns
    -------
    pandas.DataFrame
        Columns of `COLUMNS`; a row for each variant, and outcome that it has scans for, of every detector and
        modality that the reference has.
    """
    reference = variants[0]
    tables = []
    for detector, modality in reference.subjects.groupby(["detector", "modality"]).groups:
        for outcome in OUTCOMES:
            rows = [
                row
                for variant in variants
                if (row := _row(variant, reference, detector, modality, outcome, seed)) is not None
            ]
            table = pd.DataFrame(rows)
            if len(table):
                table["p_holm"] = corrected(table["p"], "holm")
                tables.append(table)
    columns = list(COLUMNS)
    return pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)


def _row(
    variant: Variant, reference: Variant, detector: str, modality: str, outcome: str, seed: int
) -> dict[str, Any] | None:
    scans = variant.subjects
    scans = scans[
        (scans["detector"] == detector)
        & (scans["modality"] == modality)
        & (scans["role"] == OUTCOMES[outcome])
        & scans[outcome].notna()
    ]
    if scans.empty:
        return None
    low, high = bootstrap_interval(scans[outcome], scans["participant_id"], seed=seed)
    origin = variant.origins.get((detector, modality), Origin())
    paired = {"n_pairs": np.nan, **dict.fromkeys(_PAIRED, np.nan)}
    if variant is not reference:
        scores = [participant_scores(some.subjects, modality, outcome) for some in (variant, reference)]
        both = [table[detector] for table in scores if detector in table]
        if len(both) == 2:
            found = compare_pair(pd.concat(both, axis=1).dropna(), seed)
            paired = {"n_pairs": found.pop("n_participants"), **found}
    return {
        "detector": detector,
        "modality": modality,
        "outcome": outcome,
        "variant": variant.name,
        "n_training_subjects": origin.n_subjects,
        "train_fraction": origin.fraction,
        "n_steps": origin.n_steps,
        "changes": origin.changes or None,
        "n_participants": scans["participant_id"].nunique(),
        "mean": scans[outcome].mean(),
        "mean_ci_low": low,
        "mean_ci_high": high,
        **paired,
    }
