"""Parts of a cohort."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from bids_uad.evaluation.strata import hedges_g, levels_of, stratify


@pytest.fixture
def subjects() -> pd.DataFrame:
    """Sixty healthy and forty lesion scans; men have twice the false positives."""
    rng = np.random.default_rng(0)
    rows = []
    for k in range(100):
        healthy, male = k < 60, k % 2 == 0
        rows.append(
            {
                "participant_id": f"sub-{k:03d}",
                "source_image": f"sub-{k:03d}_T1w.nii.gz",
                "detector": "made",
                "modality": "T1w",
                "role": "healthy" if healthy else "lesion",
                "fpr": rng.normal(0.02 if male else 0.01, 0.002) if healthy else np.nan,
                "dice": np.nan if healthy else k / 100,
                "sensitivity": np.nan if healthy else k / 100,
                "lesion_volume_mm3": np.nan if healthy else float(k),
                "age": str(20 + k % 60),
                "sex": "M" if male else "F",
                "scanner": "A",
                "weight": str(50 + k / 10),
            }
        )
    return pd.DataFrame(rows)


def test_parts_are_averaged_and_compared(subjects: pd.DataFrame) -> None:
    strata, disparities = stratify(subjects, ["sex", "nothing", "scanner"], seed=0)
    assert set(strata["factor"]) == {"sex"}  # one scanner has nothing to be compared with
    fpr = strata[strata["outcome"] == "fpr"].set_index("level")
    men, women = (subjects[(subjects["sex"] == sex) & (subjects["role"] == "healthy")]["fpr"] for sex in "MF")
    row = fpr.loc["M"]
    assert row["n_participants"] == 30
    assert row["mean"] == pytest.approx(men.mean())
    assert row["mean_ci_low"] < men.mean() < row["mean_ci_high"]
    welch = stats.ttest_ind(men, women, equal_var=False).confidence_interval(0.95)
    assert row["difference"] == pytest.approx(men.mean() - women.mean())
    assert (row["difference_ci_low"], row["difference_ci_high"]) == pytest.approx(tuple(welch))
    gap = disparities.set_index("outcome").loc["fpr"]
    assert (gap["highest"], gap["lowest"], gap["n_levels"]) == ("M", "F", 2)
    assert gap["gap"] == pytest.approx(men.mean() - women.mean())
    assert gap["ratio"] == pytest.approx(men.mean() / women.mean())


def test_hedges_g_by_hand() -> None:
    one, other = np.array([3.0, 4.0, 5.0]), np.array([1.0, 2.0, 3.0, 2.0])
    pooled = np.sqrt((2 * 1.0 + 3 * (2 / 3)) / 5)
    g, low, high = hedges_g(one, other)
    assert g == pytest.approx((1 - 3 / 19) * 2.0 / pooled)
    assert high - g == pytest.approx(1.959964 * np.sqrt(7 / 12 + g**2 / 14), rel=1e-6)
    assert g - low == pytest.approx(high - g)
    assert np.isnan(hedges_g(np.ones(3), np.ones(4))).all()


def test_ages_are_cut_at_forty_and_sixty(subjects: pd.DataFrame) -> None:
    levels = levels_of(subjects, "age")
    ages = subjects["age"].astype(int)
    assert levels[ages == 39].unique().tolist() == ["0 to 39"]
    assert levels[ages == 40].unique().tolist() == ["40 to 59"]
    assert levels[ages == 60].unique().tolist() == ["60 and above"]


def test_lesions_and_many_numbers_are_cut_at_quartiles_of_images(subjects: pd.DataFrame) -> None:
    twice = pd.concat([subjects, subjects.assign(detector="other")], ignore_index=True)
    levels = levels_of(twice, "lesion load")
    assert levels.isna().sum() == 120
    assert levels.value_counts().to_dict() == {f"{n} quarter": 20 for n in ("1st", "2nd", "3rd", "4th")}
    assert levels[60] == "1st quarter"
    assert levels[99] == "4th quarter"
    assert set(levels_of(subjects, "weight").value_counts()) == {25}
    strata, _ = stratify(subjects, ["lesion load"], seed=0)
    dice = strata[strata["outcome"] == "dice"].set_index("level")["mean"]
    assert dice["1st quarter"] == pytest.approx(np.mean(np.arange(60, 70) / 100))
    assert list(dice.index) == ["1st quarter", "2nd quarter", "3rd quarter", "4th quarter"]


@pytest.mark.parametrize(
    "name",
    ["scanner", "Scanner", "site", "SITE", "site_id", "SiteID", "DeviceSerialNumber", "StationName"],
)
def test_levels_of_keeps_numeric_labels_of_scanners_and_sites(subjects: pd.DataFrame, name: str) -> None:
    subjects[name] = [str(101 + k % 12) for k in range(len(subjects))]
    assert set(levels_of(subjects, name)) == {str(101 + k) for k in range(12)}


@pytest.mark.parametrize("name", ["weight", "opposite", "EchoTime", "residual"])
def test_levels_of_cuts_other_columns_of_numbers_at_quartiles(subjects: pd.DataFrame, name: str) -> None:
    subjects[name] = [str(101 + k % 12) for k in range(len(subjects))]
    assert set(levels_of(subjects, name)) == {"1st quarter", "2nd quarter", "3rd quarter", "4th quarter"}


def test_parts_of_one_or_two_are_not_averaged(subjects: pd.DataFrame) -> None:
    subjects.loc[subjects.index[:2], "sex"] = "X"
    strata, _ = stratify(subjects, ["sex"], seed=0)
    assert set(strata["level"]) == {"F", "M"}


def test_several_scans_of_one_count_once(subjects: pd.DataFrame) -> None:
    twice = pd.concat([subjects, subjects], ignore_index=True)
    for one, other in zip(stratify(subjects, ["sex"], seed=1), stratify(twice, ["sex"], seed=1), strict=True):
        pd.testing.assert_frame_equal(one, other)
