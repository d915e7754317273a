"""Comparison of model variants with the reference, against NumPy and SciPy."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from bids_uad.evaluation.experiments import (
    COLUMNS,
    REFERENCE,
    Variant,
    compare_variants,
)
from bids_uad.evaluation.provenance import ModelProvenance, read_model_provenance

SUBJECTS = [f"sub-{k}" for k in range(12)]


def scans(values, subjects=SUBJECTS, role="lesion", outcome="dice", detector="disyre"):
    table = pd.DataFrame({"participant_id": subjects, outcome: values})
    for other in {"dice", "auprc", "fpr"} - {outcome}:
        table[other] = np.nan
    return table.assign(role=role, detector=detector, modality="T2w")


def test_compare_variants_agrees_with_scipy():
    generator = np.random.default_rng(0)
    full = generator.uniform(0.2, 0.6, 12)
    less = full - generator.uniform(0.0, 0.2, 12)
    few = Variant(
        "few",
        scans(less[2:], SUBJECTS[2:]),
        {("disyre", "T2w"): ModelProvenance(n_subjects=8, fraction=0.1, n_steps=60)},
    )
    odd = Variant(
        "odd",
        scans(full + 0.01 * (-1) ** np.arange(12)),
        {("disyre", "T2w"): ModelProvenance(hyper={"stride": 4, "anomalies": ["disc", "bias"]})},
    )
    table = compare_variants([Variant(REFERENCE, scans(full)), few, odd], seed=0)
    assert list(table.columns) == list(COLUMNS)
    table = table.set_index("variant")
    assert list(table.index) == [REFERENCE, "few", "odd"]
    assert table["mean"].to_dict() == pytest.approx(
        {REFERENCE: full.mean(), "few": less[2:].mean(), "odd": full.mean()}
    )
    assert table["n_participants"].tolist() == [12, 10, 12]
    assert table["n_pairs"].tolist()[1:] == [10, 12]
    assert pd.isna(table.loc[REFERENCE, "difference"])
    assert table.loc["few", "difference"] == pytest.approx((less - full)[2:].mean())
    interval = stats.bootstrap(
        ((less - full)[2:],), np.mean, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    found = table.loc["few", ["difference_ci_low", "difference_ci_high"]].tolist()
    assert found == pytest.approx(tuple(interval), abs=0.1 * (interval.high - interval.low))
    p = [
        stats.wilcoxon(d, zero_method="pratt").pvalue
        for d in ((less - full)[2:], 0.01 * (-1) ** np.arange(12))
    ]
    assert table["p"].tolist()[1:] == pytest.approx(p)
    assert table["p_holm"].tolist()[1:] == pytest.approx([min(1, 2 * p[0]), max(p[1], 2 * p[0])])
    assert table.loc["few", ["n_training_subjects", "train_fraction", "n_steps"]].tolist() == [8, 0.1, 60]
    assert table.loc["odd", "changes"] == "anomalies=disc, bias; stride=4"


def test_outcomes_without_scans_have_no_row():
    reference = pd.concat(
        [scans([0.1, 0.2, 0.3], SUBJECTS[:3]), scans([0.01, 0.02, 0.03], SUBJECTS[3:6], "healthy", "fpr")]
    )
    others = pd.concat([scans([0.1, 0.2], SUBJECTS[8:10]), scans([0.5] * 3, SUBJECTS[:3], detector="fae")])
    table = compare_variants([Variant(REFERENCE, reference), Variant("other", others)], seed=0)
    assert set(table["detector"]) == {"disyre"}
    assert table.groupby("outcome")["variant"].agg(list).to_dict() == {
        "dice": [REFERENCE, "other"],
        "fpr": [REFERENCE],
    }
    alone = table[(table["variant"] == "other")].iloc[0]
    assert alone["n_pairs"] == 0
    assert pd.isna(alone["difference"])
    assert pd.isna(alone["p"])


def test_provenance_is_read_from_sidecars(tmp_path):
    folder = tmp_path / "sub-1" / "ses-2" / "anat"
    folder.mkdir(parents=True)
    metadata = {
        "Model": "disyre-T2w-lite",
        "TrainingSubjects": 8,
        "TrainingFraction": 0.1,
        "TrainingSteps": 60,
    }
    (folder / "sub-1_ses-2_run-1_space-SRI24_desc-T2wDisyre_metrics.json").write_text(json.dumps(metadata))
    rows = pd.DataFrame(
        {
            "detector": ["disyre", "fae"],
            "modality": "T2w",
            "source_image": "bids:raw:sub-1/ses-2/anat/sub-1_ses-2_run-1_T2w.nii.gz",
        }
    )
    assert read_model_provenance(tmp_path, rows) == {
        ("disyre", "T2w"): ModelProvenance("disyre-T2w-lite", 8, 0.1, 60),
        ("fae", "T2w"): ModelProvenance(),
    }
