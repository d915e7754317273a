"""Comparison of scores and deviations against values computed by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from bids_uad.evaluation.deviations import compare_deviations


def scan(detector, image, role, **numbers):
    return {
        "detector": detector, "modality": "T2w", "source_image": image, "role": role,
        "dice": np.nan, "auprc": np.nan, "fpr": np.nan, **numbers,
    }  # fmt: skip


SUBJECTS = pd.DataFrame(
    [
        scan("fae", "a", "lesion", dice=0.2, auprc=0.3),
        scan("fae", "b", "lesion", dice=0.4, auprc=0.5),
        scan("fae", "c", "healthy", fpr=0.03),
        scan("fae", "only raw", "healthy", fpr=0.9),
        scan("fae+normative", "a", "lesion", dice=0.3, auprc=0.3),
        scan("fae+normative", "b", "lesion", dice=0.6, auprc=0.5),
        scan("fae+normative", "c", "healthy", fpr=0.01),
        scan("rd+normative", "a", "lesion", dice=0.9),
        scan("uniad", "a", "lesion", dice=0.9),
    ]
)
BIAS = pd.DataFrame(
    [
        ("fae", "fpr", 0.19, 0.1),
        ("fae", "dice", 9.0, 8.0),
        ("fae+normative", "fpr", 0.02, -0.1),
    ],
    columns=["detector", "outcome", "estimate", "ci_low"],
).assign(modality="T2w", term="age", ci_high=10.0)


def test_compare_deviations_uses_images_with_both_scores():
    table = compare_deviations(SUBJECTS, BIAS)
    assert table[["detector", "deviation"]].to_numpy().tolist() == [["fae", "none"], ["fae", "normative"]]
    assert table["dice_mean"].tolist() == pytest.approx([0.3, 0.45])
    assert table["auprc_mean"].tolist() == pytest.approx([0.4, 0.4])
    assert table["fpr_healthy_mean"].tolist() == pytest.approx([0.03, 0.01])
    assert table["age_estimate"].tolist() == [0.19, 0.02]
    assert table["age_ci_low"].iloc[0] == 0.1
    assert table["sex_estimate"].isna().all()


def test_compare_deviations_is_empty_without_pairs():
    alone = SUBJECTS[~SUBJECTS["detector"].str.startswith("fae")]
    assert compare_deviations(alone, BIAS).empty
