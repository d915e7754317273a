"""Limits of change: percentiles of the benchmark, and the constants that follow from its stored results."""

from __future__ import annotations

import pandas as pd
import pytest

from benchmarks.sessions import TABLE, limits, round_up
from bids_uad.evaluation.longitudinal import CHANGE_LIMITS, MAX_RESIDUAL_MM


def test_limits_are_percentiles_by_kind_of_lesion():
    small = pd.DataFrame({"volume_before_mm3": 500.0, "volume_after_mm3": [500.0 + k for k in range(101)]})
    larger = pd.DataFrame(
        {"volume_before_mm3": [10_000.0, 30_000.0], "volume_after_mm3": [30_000.0, 10_000.0]}
    )
    single = pd.DataFrame(
        {"volume_before_mm3": [0.0] * 101, "volume_after_mm3": [10.0 * k for k in range(1, 102)]}
    )
    not_matched = pd.DataFrame({"volume_before_mm3": [None], "volume_after_mm3": [None]})
    table = pd.concat([small, larger, single, not_matched], ignore_index=True)
    table = table.assign(participant_id="sub-01", modality="T2w", residual_mm=0.5)
    (row,) = limits(table).to_dict("records")
    assert row["modality"] == "T2w"
    assert row["small, mm3"] == pytest.approx(95)
    assert row["larger, fraction"] == pytest.approx(1.0)
    assert row["in one, mm3"] == pytest.approx(960)
    assert (row["lesions in both"], row["small"], row["in one"]) == (103, 101, 101)


@pytest.mark.parametrize(("value", "rounded"), [(0.123, 0.13), (0.5, 0.5), (941.0, 950.0), (1001.0, 1100.0)])
def test_limits_are_rounded_up(value, rounded):
    assert round_up(value) == pytest.approx(rounded)


@pytest.mark.skipif(not TABLE.is_file(), reason="needs the results of benchmarks.sessions")
def test_constants_follow_from_the_stored_results():
    table = pd.read_csv(TABLE, sep="\t", na_values="n/a")
    rows = limits(table).set_index("modality")
    for modality, limit in CHANGE_LIMITS.items():
        row = rows.loc[modality]
        expected = [round_up(row[name]) for name in ("small, mm3", "larger, fraction", "in one, mm3")]
        assert [limit.volume, limit.fraction, limit.single] == pytest.approx(expected), modality
    assert table["residual_mm"].max() < MAX_RESIDUAL_MM / 2
