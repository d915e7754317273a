"""Lesion detection of a cohort, against sums computed by hand."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from bids_uad.dataset.participants import read_participants
from bids_uad.evaluation.benchmark import evaluate
from bids_uad.evaluation.lesion_detection import (
    ALL,
    COLUMNS,
    MISSED_COLUMNS,
    SMALLEST,
    lesion_sensitivity,
    missed_by_all,
)
from bids_uad.evaluation.tables import find_metrics_tables
from tests.evaluation.fake_tables import Scan, beta_counts, write_participants

DETECTORS = ("disyre", "patchcore")


@pytest.fixture
def drawn(tmp_path) -> pd.DataFrame:
    """Write lesion tables of eight patients; return all lesions."""
    rng = np.random.default_rng(7)
    participants, frames = [], []
    for k in range(8):
        who = f"{k:02d}"
        participants.append({"participant_id": f"sub-{who}", "group": "patient"})
        n = int(rng.integers(2, 6))
        volume = np.sort(np.round(10 ** rng.uniform(0, 4.5, n)))[::-1]
        contrast = rng.normal(0, 1.5, n)
        contrast[0] = np.nan
        for detector in DETECTORS:
            found = np.where(rng.random(n) < 0.5, 0, np.round(rng.random(n) * volume) / volume)
            Scan(
                who,
                detector=detector,
                n_lesion=beta_counts(rng, int(volume.sum()), 3, 9),
                n_lesions=n,
                n_lesions_detected=int((found > 0).sum()),
                min_lesion_volume=0.0,
                lesions=pd.DataFrame(
                    {
                        "lesion": np.arange(1, n + 1),
                        "volume_mm3": volume,
                        "detected_fraction": found,
                        "detected": (found > 0).astype(int),
                        "contrast": contrast,
                    }
                ),
            ).write(tmp_path)
            frames.append(
                pd.DataFrame(
                    {"who": who, "detector": detector, "k": range(n), "volume": volume}
                    | {"found": found, "contrast": contrast}
                )
            )
    write_participants(tmp_path, participants)
    return pd.concat(frames, ignore_index=True)


def read(root):
    return evaluate(root, find_metrics_tables(root), read_participants(root), seed=0)


def test_lesion_sensitivity_agrees_with_sums_by_hand(tmp_path, drawn):
    evaluation = read(tmp_path)
    table = lesion_sensitivity(evaluation.lesions.table, evaluation.subjects, seed=0)
    assert list(table) == list(COLUMNS)
    load = drawn[drawn["detector"] == "disyre"].groupby("who")["volume"].sum()
    cuts = np.quantile(load, [0.25, 0.5, 0.75])
    quarter = load.map(lambda volume: f"{(volume > cuts).sum() + 1}")
    ends = [0, 10, 100, 1000, 10_000, np.inf]
    for row in table.itertuples():
        own = drawn[drawn["detector"] == row.detector]
        if row.factor == "lesion volume":
            k = list(dict.fromkeys(table.loc[table["factor"] == row.factor, "level"])).index(row.level)
            present = [
                (low, high)
                for low, high in pairwise(ends)
                if ((drawn["volume"] >= low) & (drawn["volume"] < high)).any()
            ]
            low, high = present[k]
            own = own[(own["volume"] >= low) & (own["volume"] < high)]
        elif row.factor == "lesion contrast":
            low, high = {
                "below 0.5": (0, 0.5),
                "0.5 to 1": (0.5, 1),
                "1 to 2": (1, 2),
                "2 and above": (2, 99),
            }[row.level]
            own = own[(own["contrast"].abs() >= low) & (own["contrast"].abs() < high)]
        elif row.factor == "lesion load":
            own = own[own["who"].map(quarter) == row.level[0]]
        assert row.n_lesions == len(own)
        assert row.n_participants == own["who"].nunique()
        assert row.lesion_sensitivity == pytest.approx((own["found"] > 0).mean())
        voxels = (own["found"] * own["volume"]).sum() / own["volume"].sum()
        assert row.voxel_sensitivity == pytest.approx(voxels)
        low, high = row.lesion_sensitivity_ci_low, row.lesion_sensitivity_ci_high
        if row.n_participants >= 5 and not np.isnan(low):
            assert low <= row.lesion_sensitivity <= high <= low + 0.95
        else:
            assert np.isnan(low)
    assert table["factor"].value_counts().to_dict() == {
        "all lesions": 2,
        "lesion volume": 10,
        "lesion contrast": 8,
        "lesion load": 8,
    }


def test_interval_agrees_with_a_literal_bootstrap_of_participants(tmp_path, drawn):
    evaluation = read(tmp_path)
    table = lesion_sensitivity(evaluation.lesions.table, evaluation.subjects, seed=0)
    row = table[(table["factor"] == ALL) & (table["detector"] == "disyre")].iloc[0]
    own = drawn[drawn["detector"] == "disyre"]
    participants = dict(list(own.groupby("who")))
    rng = np.random.default_rng(1)
    shares = []
    for _ in range(3000):
        chosen = pd.concat([participants[who] for who in rng.choice(list(participants), len(participants))])
        shares.append((chosen["found"] > 0).mean())
    low, high = np.quantile(shares, [0.025, 0.975])
    assert row["lesion_sensitivity_ci_low"] == pytest.approx(low, abs=0.02)
    assert row["lesion_sensitivity_ci_high"] == pytest.approx(high, abs=0.02)


def test_missed_by_all_agrees_with_sums_by_hand(tmp_path, drawn):
    table = missed_by_all(read(tmp_path).lesions.table, seed=0).set_index("lesions")
    assert {"lesions", *table} == set(MISSED_COLUMNS)
    both = drawn.groupby(["who", "k"]).agg(volume=("volume", "first"), best=("found", "max"))
    assert table.loc[ALL, "n_lesions"] == len(both)
    assert table.loc[ALL, "missed_fraction"] == pytest.approx((both["best"] == 0).mean())
    limit = np.quantile(both["volume"], 0.25)
    small = both[both["volume"] <= limit]
    row = table.loc[SMALLEST]
    assert row["n_lesions"] == len(small)
    assert row["missed_fraction"] == pytest.approx((small["best"] == 0).mean())
    assert row["volume_limit_mm3"] == small["volume"].max()
    assert row["n_detectors"] == 2


def test_missed_by_all_excludes_images_not_scored_by_all_detectors(tmp_path, drawn):
    for path in (tmp_path / "sub-00").rglob("*Patchcore_*"):
        path.unlink()
    table = missed_by_all(read(tmp_path).lesions.table, seed=0).set_index("lesions")
    others = drawn[drawn["who"] != "00"].groupby(["who", "k"])["found"].max()
    assert table.loc[ALL, "n_lesions"] == len(others)
    assert table.loc[ALL, "missed_fraction"] == pytest.approx((others == 0).mean())


def test_deprecated_column_of_lesion_tables_is_read(tmp_path, drawn):
    expected = read(tmp_path).lesions.table
    for path in tmp_path.rglob("*_lesions.tsv"):
        path.write_text(path.read_text().replace("\tdetected_fraction\t", "\tfound_share\t"))
    pd.testing.assert_frame_equal(read(tmp_path).lesions.table, expected)


def test_outputs_of_early_versions_without_lesion_tables_are_counted(tmp_path, drawn):
    for path in tmp_path.rglob("*_lesions.tsv"):
        path.unlink()
    evaluation = read(tmp_path)
    assert evaluation.unreadable == []
    assert evaluation.lesions.without == 16
    assert lesion_sensitivity(evaluation.lesions.table, evaluation.subjects, seed=0).empty
    assert missed_by_all(evaluation.lesions.table, seed=0).empty


def test_lesions_below_the_minimum_volume_are_not_counted(tmp_path, drawn):
    for path in sorted(tmp_path.rglob("*_metrics.tsv")):
        lesions = pd.read_csv(path.with_name(path.name.replace("_metrics", "_lesions")), sep="\t")
        large = lesions[lesions["volume_mm3"] >= 50]
        row = pd.read_csv(path, sep="\t").assign(
            min_lesion_volume_mm3=50.0, n_lesions=len(large), n_lesions_detected=large["detected"].sum()
        )
        row.to_csv(path, sep="\t", index=False, na_rep="n/a")
    evaluation = read(tmp_path)
    assert evaluation.unreadable == []
    large = drawn[drawn["volume"] >= 50]
    assert len(large) < len(drawn)
    table = evaluation.lesions.table
    assert sorted(table["volume_mm3"]) == sorted(large["volume"])
    row = (
        lesion_sensitivity(table, evaluation.subjects, seed=0)
        .set_index(["factor", "detector"])
        .loc[ALL, "disyre"]
    )
    own = large[large["detector"] == "disyre"]
    assert row["n_lesions"] == len(own)
    assert row["lesion_sensitivity"] == pytest.approx((own["found"] > 0).mean())


def test_damaged_lesion_tables_are_reported(tmp_path, drawn):
    first, second = sorted(tmp_path.rglob("*_lesions.tsv"))[:2]
    first.write_text("\n".join(first.read_text().splitlines()[:-1]) + "\n")
    second.write_text(second.read_text().replace("\n1\t", "\none\t"))
    first, second = read(tmp_path).unreadable
    assert "in the metrics table" in first
    assert "not only numbers" in second
