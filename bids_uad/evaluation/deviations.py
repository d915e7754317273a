"""Comparison of anomaly scores with their normative deviation: detection of lesions, and bias."""

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
        "Description": "Kind of score",
        "Levels": {
            "none": "Anomaly score",
            "normative": "Voxel-wise deviation of the score from healthy controls of the same age and sex",
        },
    },
    "dice_mean": {"Description": "Mean Dice at the fixed threshold, lesion scans"},
    "auprc_mean": {"Description": "Mean average precision, scans with a lesion"},
    "fpr_healthy_mean": {"Description": "Mean false-positive rate at the fixed threshold, healthy scans"},
    "age_estimate": {
        "Description": "Change in the log odds of a false positive per 10 years, adjusted for the other "
        "covariates (from group_bias)"
    },
    "age_ci_low": {"Description": "Lower limit of the 95 % confidence interval of age_estimate"},
    "age_ci_high": {"Description": "Upper limit of the 95 % confidence interval of age_estimate"},
    "sex_estimate": {"Description": "Difference in the log odds of a false positive, male minus female"},
    "sex_ci_low": {"Description": "Lower limit of the 95 % confidence interval of sex_estimate"},
    "sex_ci_high": {"Description": "Upper limit of the 95 % confidence interval of sex_estimate"},
}


def compare_deviations(subjects: pd.DataFrame, bias: pd.DataFrame) -> pd.DataFrame:
    """Compare the results of anomaly scores and of their normative deviation on the same images.

    Parameters
    ----------
    subjects : pandas.DataFrame
        One row per image and detector, columns of :data:`bids_uad.evaluation.subjects.COLUMNS`. Images with
        only one of the two are left out.
    bias : pandas.DataFrame
        Coefficients from :func:`bids_uad.evaluation.bias.model_bias`.

    Returns
    -------
    pandas.DataFrame
        Columns of `COLUMNS`, two rows for each detector and modality that has both. Coefficients are NaN if
        there is no bias model.
    """
    rows = []
    effects = bias[bias["outcome"] == "fpr"].set_index(["detector", "modality", "term"])
    for modality, scans in subjects.groupby("modality", sort=True):
        by_detector = dict(list(scans.groupby("detector", sort=True)))
        for normative in [name for name in by_detector if name.endswith(NORMATIVE)]:
            plain = normative.removesuffix(NORMATIVE)
            if plain not in by_detector:
                continue
            both = set(by_detector[plain]["source_image"]) & set(by_detector[normative]["source_image"])
            for deviation, detector in (("none", plain), ("normative", normative)):
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
