"""Threshold transfer between cohorts."""

from __future__ import annotations

import numpy as np
import pytest

from bids_uad.evaluation.curves import Curves
from bids_uad.evaluation.threshold_transfer import transfer_thresholds

EDGES = np.array([0.0, 1.0, 2.0, 3.0])


def curves(mean_dice: list[float], n: int = 2) -> Curves:
    made = Curves(EDGES, threshold=1.0)
    made.dice_sum = np.array(mean_dice) * n
    made.n_with_lesion = n
    return made


def test_each_threshold_is_applied_to_each_cohort() -> None:
    table = transfer_thresholds(
        {
            ("made", "T1w", "stroke"): curves([0.1, 0.2, 0.5, 0.3]),
            ("made", "T1w", "tumour"): curves([0.1, 0.6, 0.4, 0.2], n=3),
            ("made", "T1w", "healthy"): Curves(EDGES, threshold=1.0),
            ("alone", "T1w", "stroke"): curves([0.1, 0.2, 0.5, 0.3]),
        }
    )
    assert set(table["detector"]) == {"made"}
    matrix = table.pivot(index="fixed_on", columns="tested_on", values="dice_mean")
    assert list(matrix.index) == ["stroke", "tumour", "validation"]
    assert matrix.loc["stroke"].to_dict() == pytest.approx({"stroke": 0.5, "tumour": 0.4})
    assert matrix.loc["tumour"].to_dict() == pytest.approx({"stroke": 0.2, "tumour": 0.6})
    assert matrix.loc["validation"].to_dict() == pytest.approx({"stroke": 0.2, "tumour": 0.6})
    thresholds = table.drop_duplicates("fixed_on").set_index("fixed_on")["threshold"]
    assert thresholds.to_dict() == {"validation": 1.0, "stroke": 2.0, "tumour": 1.0}
    assert table.set_index("tested_on")["n_scans"].to_dict() == {"stroke": 2, "tumour": 3}
