"""What a threshold that was fixed on one cohort is worth on another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from bids_uad.evaluation.curves import Curves

VALIDATION = "validation"
"""Where the thresholds come from that the masks are made with."""

COLUMNS: dict[str, dict[str, Any]] = {
    "detector": {"Description": "Anomaly detector"},
    "modality": {"Description": "Modality of the images"},
    "fixed_on": {
        "Description": "Cohort whose highest mean Dice chose the threshold; validation: the fixed threshold "
        "of the model, which has not looked at these scans"
    },
    "threshold": {"Description": "The threshold on the anomaly score"},
    "tested_on": {"Description": "Cohort it is applied to"},
    "n_scans": {"Description": "Lesion scans of that cohort whose mask is not empty"},
    "dice_mean": {
        "Description": "Mean Dice over these scans at this threshold; where both cohorts are the same an "
        "upper bound that looks at the test set"
    },
}


def transfer_thresholds(curves: Mapping[tuple[str, str, str], Curves]) -> pd.DataFrame:
    """Apply the best threshold of each cohort, and the fixed one, to every cohort.

    Parameters
    ----------
    curves : mapping
        (detector, modality, cohort) -> `Curves` of the lesion cohorts.

    Returns
    -------
    pandas.DataFrame
        Columns of `COLUMNS`; nothing for a detector with lesions in fewer than two cohorts.
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
        some = next(iter(own.values()))
        edges = {VALIDATION: some.threshold_edge}
        edges |= {cohort: int(np.argmax(curve.mean_dice)) for cohort, curve in own.items()}
        rows += [
            {
                "detector": detector,
                "modality": modality,
                "fixed_on": source,
                "threshold": some.edges[edge],
                "tested_on": cohort,
                "n_scans": curve.n_with_lesion,
                "dice_mean": curve.mean_dice[edge],
            }
            for source, edge in edges.items()
            for cohort, curve in own.items()
        ]
    return pd.DataFrame(rows, columns=list(COLUMNS))
