"""Scaling and ablation experiments: models with other training data or settings on the same participants."""

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
from bids_uad.evaluation.provenance import ModelProvenance

REFERENCE = "reference"
"""Name of the variant that the others are compared with: the outputs in OUTPUT_DIR of the group level."""

_PAIRED = ("difference", "difference_ci_low", "difference_ci_high", "statistic", "p")
COLUMNS: dict[str, dict[str, Any]] = {
    "detector": {"Description": "Anomaly detector"},
    "modality": {"Description": "Modality of the images"},
    "outcome": COMPARISON_COLUMNS["outcome"],
    "variant": {"Description": f"Name of the model variant; {REFERENCE}: the model of these outputs"},
    "n_training_subjects": {"Description": "Number of training participants; n/a if not reported"},
    "train_fraction": {
        "Description": "Fraction of the available training participants that was used; n/a if not reported"
    },
    "n_steps": {"Description": "Number of training steps; n/a if not reported"},
    "changes": {"Description": "Hyperparameters that differ from the preset; n/a without any"},
    "n_participants": {"Description": "Number of participants with this outcome"},
    "mean": {"Description": "Mean outcome over their scans"},
    **interval_columns("mean", "mean"),
    "n_pairs": {"Description": "Number of participants scored by both the variant and the reference"},
    "difference": {"Description": "Mean over these participants of variant minus reference"},
    **{name: COMPARISON_COLUMNS[name] for name in _PAIRED[1:]},
    "p_holm": {"Description": "p, corrected (Holm) over all variants of the detector, modality and outcome"},
}


@dataclass(frozen=True)
class Variant:
    """Results of one model for each detector and modality.

    Parameters
    ----------
    name : str
        Name of the variant in tables and figures.
    subjects : pandas.DataFrame
        One row per image and detector, columns of :data:`bids_uad.evaluation.subjects.COLUMNS`.
    provenance : dict, default={}
        `ModelProvenance` by detector and modality.
    """

    name: str
    subjects: pd.DataFrame
    provenance: dict[tuple[str, str], ModelProvenance] = field(default_factory=dict)


def compare_variants(variants: Sequence[Variant], *, seed: int) -> pd.DataFrame:
    """Compare each model variant with the reference on the participants that both have scored.

    Parameters
    ----------
    variants : sequence of Variant
        Variants, the reference first.
    seed : int
        Seed of the bootstrap.

    Returns
    -------
    pandas.DataFrame
        Columns of `COLUMNS`; one row for each detector and modality of the reference, outcome and variant
        with scans for it.
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
    model = variant.provenance.get((detector, modality), ModelProvenance())
    paired = {"n_pairs": np.nan, **dict.fromkeys(_PAIRED, np.nan)}
    if variant is not reference:
        scores = [participant_scores(each.subjects, modality, outcome) for each in (variant, reference)]
        both = [table[detector] for table in scores if detector in table]
        if len(both) == 2:
            result = compare_pair(pd.concat(both, axis=1).dropna(), seed)
            paired = {"n_pairs": result.pop("n_participants"), **result}
    return {
        "detector": detector,
        "modality": modality,
        "outcome": outcome,
        "variant": variant.name,
        "n_training_subjects": model.n_subjects,
        "train_fraction": model.fraction,
        "n_steps": model.n_steps,
        "changes": model.changes or None,
        "n_participants": scans["participant_id"].nunique(),
        "mean": scans[outcome].mean(),
        "mean_ci_low": low,
        "mean_ci_high": high,
        **paired,
    }
