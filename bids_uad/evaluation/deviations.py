"""Scores beside their deviation from healthy people: what it gains on lesions, and what bias it takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from bids_uad.evaluation.subjects import HEALTHY, LESION

NORMATIVE = "+normative"

COLUMNS: dict[str, dict[str, Any]] = {
    "detector": {"Description": "Anomaly detector"},
    "modality": {"Description": "Modality of the images"},
    "deviation": {
        "Description": "What the numbers are of",
        "Levels": {
            "none": "Anomaly scores",
            "normative": "Their deviation from healthy people of the same age and sex at the same place",
        },
    },
    "dice_mean": {"Description": "Mean Dice at the fixed threshold over the lesion scans"},
    "auprc_mean": {"Description": "Mean average precision over the lesion scans with a lesion"},
    "fpr_healthy_mean": {
        "Description": "Mean share of the brain voxels above the fixed threshold, healthy scans"
    },
    "age_estimate": {
        "Description": "Change of the log odds of a false positive with ten years, all else held (group_bias)"
    },
    "age_ci_low": {"Description": "Lower end of its 95 % confidence interval"},
    "age_ci_high": {"Description": "Upper end of the same"},
    "sex_estimate": {"Description": "Difference of the same log odds, male minus female"},
    "sex_ci_low": {"Description": "Lower end of its 95 % confidence interval"},
    "sex_ci_high": {"Description": "Upper end of the same"},
}


def compare_deviations(subjects: pd.DataFrame, bias: pd.DataFrame) -> pd.DataFrame:
    """Put the numbers of scores and of their deviation side by side.

    Parameters
    ----------
    subjects : pandas.DataFrame
        One row per image and detector, columns of :data:`bids_uad.evaluation.subjects.COLUMNS`. Images that
        only one of the two has are left out.
    bias : pandas.DataFrame
        Coefficients of :func:`bids_uad.evaluation.bias.model_bias`.

    Returns
    -------
    pandas.DataFrame
        Columns of `COLUMNS`, two rows for each detector and modality that has both; bias is NaN where it was
        not modelled.
    """
    rows = []
    effects = bias[bias["outcome"] == "fpr"].set_index(["detector", "modality", "term"])
    for modality, scans in subjects.groupby("modality", sort=True):
        by_detector = dict(list(scans.groupby("detector", sort=True)))
        for deviating in [name for name in by_detector if name.endswith(NORMATIVE)]:
            plain = deviating.removesuffix(NORMATIVE)
            if plain not in by_detector:
                continue
            both = set(by_detector[plain]["source_image"]) & set(by_detector[deviating]["source_image"])
            for deviation, detector in (("none", plain), ("normative", deviating)):
                own = by_detector[detector]
                own = own[own["source_image"].isin(both)]
                row = {"detector": plain, "modality": modality, "deviation": deviation}
                row["dice_mean"] = own.loc[own["role"] == LESION, "dice"].mean()
                row["auprc_mean"] = own.loc[own["role"] == LESION, "auprc"].mean()
                row["fpr_healthy_mean"] = own.loc[own["role"] == HEALTHY, "fpr"].mean()
                for term in ("age", "sex"):
                    key = (detector, modality, term)
                    for column in ("estimate", "ci_low", "ci_high"):
                        row[f"{term}_{column}"] = effects.at[key, column] if key in effects.index else np.nan
                rows.append(row)
    return pd.DataFrame(rows, columns=list(COLUMNS))
