"""Paired comparison of detectors against SciPy."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from bids_uad.evaluation.comparison import (
    COLUMNS,
    compare_detectors,
    mean_ranks,
    participant_scores,
)


def scans(seed: int = 0, n: int = 30) -> pd.DataFrame:
    """A good, a slightly worse and a bad detector on the same lesion and healthy scans."""
    rng = np.random.default_rng(seed)
    hard = rng.uniform(0, 0.3, n)
    rows = []
    for detector, level in {"bad": 0.1, "good": 0.5, "worse": 0.45}.items():
        for k in range(n):
            dice = np.clip(level - hard[k] + rng.normal(0, 0.02), 0, 1)
            row = {"participant_id": f"sub-{k:02d}", "modality": "T2w", "detector": detector}
            rows.append(row | {"role": "lesion", "dice": dice, "auprc": dice, "fpr": 0.2})
            row["participant_id"] = f"sub-h{k:02d}"
            rows.append(row | {"role": "healthy", "dice": np.nan, "auprc": np.nan, "fpr": 0.01})
    return pd.DataFrame(rows)


def test_compare_detectors_agrees_with_scipy_and_holm() -> None:
    subjects = scans()
    table = compare_detectors(subjects, seed=0)
    assert list(table.columns) == list(COLUMNS)
    dice = table[table["outcome"] == "dice"].set_index(["detector_a", "detector_b"])
    assert len(dice) == 3
    wide = subjects[subjects["role"] == "lesion"].pivot(
        index="participant_id", columns="detector", values="dice"
    )
    p = {}
    for a, b in dice.index:
        difference = wide[a] - wide[b]
        p[a, b] = stats.wilcoxon(wide[a], wide[b], zero_method="pratt").pvalue
        row = dice.loc[(a, b)]
        assert row["difference"] == pytest.approx(difference.mean())
        interval = stats.bootstrap(
            (difference.to_numpy(),), np.mean, method="percentile", rng=np.random.default_rng(1)
        ).confidence_interval
        found = (row["difference_ci_low"], row["difference_ci_high"])
        assert found == pytest.approx(tuple(interval), abs=0.1 * (interval.high - interval.low))
        assert row["p"] == pytest.approx(p[a, b])
    highest = 0.0
    for rank, pair in enumerate(sorted(p, key=p.get)):
        highest = max(highest, min(1.0, p[pair] * (3 - rank)))
        assert dice.loc[pair, "p_holm"] == pytest.approx(highest)


def test_equal_detectors_have_no_p_value() -> None:
    table = compare_detectors(scans(), seed=0)
    same = table[table["outcome"] == "fpr"]
    assert (same["difference"] == 0).all()
    assert same[["p", "p_holm"]].isna().all(axis=None)


def test_pairs_include_participants_scored_by_both_detectors_only() -> None:
    subjects = scans()
    gone = (subjects["detector"] == "bad") & subjects["participant_id"].isin(["sub-00", "sub-01"])
    table = compare_detectors(subjects[~gone], seed=0)
    counts = table[table["outcome"] == "dice"].set_index(["detector_a", "detector_b"])["n_participants"]
    assert counts["bad", "good"] == 28
    assert counts["good", "worse"] == 30


def test_repeated_scans_of_a_participant_are_one_pair() -> None:
    subjects = scans()
    twice = pd.concat([subjects, subjects], ignore_index=True)
    pd.testing.assert_frame_equal(compare_detectors(subjects, seed=1), compare_detectors(twice, seed=1))


def test_mean_ranks_agree_with_scipy() -> None:
    scores = participant_scores(scans(), "T2w", "dice")
    ranks = mean_ranks(scores, "dice")
    expected = stats.rankdata(-scores.to_numpy(), axis=1).mean(axis=0)
    assert list(ranks.index) == ["good", "worse", "bad"]
    assert ranks[scores.columns].to_numpy() == pytest.approx(expected)
    # Lower false-positive rates rank first.
    few = participant_scores(scans(), "T2w", "fpr")
    few["good"] = 0.005
    assert mean_ranks(few, "fpr").to_dict() == {"good": 1.0, "bad": 2.5, "worse": 2.5}
