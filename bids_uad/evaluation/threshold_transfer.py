"""Threshold transfer: Dice of the threshold chosen on one cohort when applied to another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from bids_uad.evaluation.curves import Curves

VALIDATION = "validation"
"""Source of the fixed threshold, with which the anomaly masks are made."""

COLUMNS: dict[str, dict[str, Any]] = {
    "detector": {"Description": "Anomaly detector"},
    "modality": {"Description": "Modality of the images"},
    "fixed_on": {
        "Description": "Cohort on which the threshold maximises the mean Dice; validation: the fixed "
        "threshold of the model, chosen on other scans"
    },
    "threshold": {"Description": "Threshold on the anomaly score"},
    "tested_on": {"Description": "Cohort to which the threshold is applied"},
    "n_scans": {"Description": "Number of scans of that cohort with a lesion in the lesion mask"},
    "dice_mean": {
        "Description": "Mean Dice over these scans at this threshold; if both cohorts are the same, an upper "
        "bound, since the threshold is chosen on the test scans"
    },
}


def transfer_thresholds(curves: Mapping[tuple[str, str, str], Curves]) -> pd.DataFrame:
    """Apply the optimal threshold of each cohort, and the fixed threshold, to every cohort.

    Parameters
    ----------
    curves : mapping
        `Curves` by detector, modality and cohort.

    Returns
    -------
    pandas.DataFrame
        Columns of `COLUMNS`; no rows for a detector with lesions in fewer than two cohorts.
    """
    rows = []
    for detector, modality in sorted({key[:2] for key in curves}):
        own = {
            cohort: curve
            for (*key, cohort), curve in sorted(curves.items())
            if (detector, modality) == tuple(key) and curve.n_with_lesion
        }
        if len(own) < 2:
            continue
        first = next(iter(own.values()))
        edges = {VALIDATION: first.threshold_edge}
        edges |= {cohort: int(np.argmax(curve.mean_dice)) for cohort, curve in own.items()}
        rows += [
            {
                "detector": detector,
                "modality": modality,
                "fixed_on": source,
                "threshold": first.edges[edge],
                "tested_on": cohort,
                "n_scans": curve.n_with_lesion,
                "dice_mean": curve.mean_dice[edge],
            }
            for source, edge in edges.items()
            for cohort, curve in own.items()
        ]
    return pd.DataFrame(rows, columns=list(COLUMNS))
