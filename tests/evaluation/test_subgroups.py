"""Subgroup means and disparities against SciPy and statsmodels."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.multicomp import pairwise_tukeyhsd

from bids_uad.evaluation.subgroups import (
    compare_subgroups,
    equal_means_p,
    hedges_g,
    levels_of,
    pairwise_differences,
)


@pytest.fixture
def subjects() -> pd.DataFrame:
    """Simulate 60 healthy and 40 lesion scans; men have twice the false-positive rate of women."""
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


def test_compare_subgroups_agrees_with_scipy(subjects: pd.DataFrame) -> None:
    subgroups, disparities = compare_subgroups(subjects, ["sex", "nothing", "scanner"], seed=0)
    assert set(subgroups["factor"]) == {"sex"}  # a single scanner has no subgroups
    fpr = subgroups[subgroups["outcome"] == "fpr"].set_index("level")
    men, women = (subjects[(subjects["sex"] == sex) & (subjects["role"] == "healthy")]["fpr"] for sex in "MF")
    row = fpr.loc["M"]
    assert row["n_participants"] == 30
    assert row["mean"] == pytest.approx(men.mean())
    interval = stats.bootstrap(
        (men.to_numpy(),), np.mean, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    found = (row["mean_ci_low"], row["mean_ci_high"])
    assert found == pytest.approx(tuple(interval), abs=0.1 * (interval.high - interval.low))
    welch = stats.ttest_ind(men, women, equal_var=False).confidence_interval(0.95)
    assert row["difference"] == pytest.approx(men.mean() - women.mean())
    assert (row["difference_ci_low"], row["difference_ci_high"]) == pytest.approx(tuple(welch))
    gap = disparities.set_index("outcome").loc["fpr"]
    assert (gap["highest"], gap["lowest"], gap["n_levels"]) == ("M", "F", 2)
    assert gap["gap"] == pytest.approx(men.mean() - women.mean())
    assert gap["ratio"] == pytest.approx(men.mean() / women.mean())
    # With two subgroups, simultaneous interval and test are those of Welch.
    assert (gap["gap_ci_low"], gap["gap_ci_high"]) == pytest.approx(tuple(welch))
    p = stats.ttest_ind(men, women, equal_var=False).pvalue
    assert row["p"] == pytest.approx(p)
    assert gap["p"] == pytest.approx(p)
    assert (gap["n_participants"], gap["n_shared"]) == (60, 0)
    assert subgroups["p_fdr"].to_numpy() == pytest.approx(stats.false_discovery_control(subgroups["p"]))
    assert disparities["p_fdr"].to_numpy() == pytest.approx(stats.false_discovery_control(disparities["p"]))


def test_hedges_g_agrees_with_the_formula() -> None:
    one, other = np.array([3.0, 4.0, 5.0]), np.array([1.0, 2.0, 3.0, 2.0])
    pooled = np.sqrt((2 * 1.0 + 3 * (2 / 3)) / 5)
    g, low, high = hedges_g(one, other)
    assert g == pytest.approx((1 - 3 / 19) * 2.0 / pooled)
    assert high - g == pytest.approx(1.959964 * np.sqrt(7 / 12 + g**2 / 14), rel=1e-6)
    assert g - low == pytest.approx(high - g)
    assert np.isnan(hedges_g(np.ones(3), np.ones(4))).all()


def test_ages_are_divided_at_40_and_60(subjects: pd.DataFrame) -> None:
    levels = levels_of(subjects, "age")
    ages = subjects["age"].astype(int)
    assert levels[ages == 39].unique().tolist() == ["0 to 39"]
    assert levels[ages == 40].unique().tolist() == ["40 to 59"]
    assert levels[ages == 60].unique().tolist() == ["60 and above"]


def test_lesion_load_and_numeric_columns_are_divided_at_quartiles(subjects: pd.DataFrame) -> None:
    twice = pd.concat([subjects, subjects.assign(detector="other")], ignore_index=True)
    levels = levels_of(twice, "lesion load")
    assert levels.isna().sum() == 120
    assert levels.value_counts().to_dict() == {f"{n} quarter": 20 for n in ("1st", "2nd", "3rd", "4th")}
    assert levels[60] == "1st quarter"
    assert levels[99] == "4th quarter"
    assert set(levels_of(subjects, "weight").value_counts()) == {25}
    subgroups, _ = compare_subgroups(subjects, ["lesion load"], seed=0)
    dice = subgroups[subgroups["outcome"] == "dice"].set_index("level")["mean"]
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
def test_levels_of_divides_other_numeric_columns_at_quartiles(subjects: pd.DataFrame, name: str) -> None:
    subjects[name] = [str(101 + k % 12) for k in range(len(subjects))]
    assert set(levels_of(subjects, name)) == {"1st quarter", "2nd quarter", "3rd quarter", "4th quarter"}


def test_subgroups_of_one_or_two_participants_are_not_listed(subjects: pd.DataFrame) -> None:
    subjects.loc[subjects.index[:2], "sex"] = "X"
    subgroups, _ = compare_subgroups(subjects, ["sex"], seed=0)
    assert set(subgroups["level"]) == {"F", "M"}


def test_repeated_scans_of_a_participant_are_averaged(subjects: pd.DataFrame) -> None:
    twice = pd.concat([subjects, subjects], ignore_index=True)
    for one, other in zip(
        compare_subgroups(subjects, ["sex"], seed=1), compare_subgroups(twice, ["sex"], seed=1), strict=True
    ):
        pd.testing.assert_frame_equal(one, other)


def independent_groups(*groups: np.ndarray) -> pd.DataFrame:
    """Return a table of participants (rows) and groups (columns) without shared participants."""
    owner = np.repeat(np.arange(len(groups)), [len(values) for values in groups])
    table = np.full((len(owner), len(groups)), np.nan)
    table[np.arange(len(owner)), owner] = np.concatenate(groups)
    return pd.DataFrame(table, columns=[f"part {k}" for k in range(len(groups))])


def test_pairwise_intervals_agree_with_games_and_howell_of_statsmodels() -> None:
    rng = np.random.default_rng(3)
    values = independent_groups(*(rng.normal(k / 4, 1 + k / 2, 7 + 5 * k) for k in range(5)))
    pairs = pairwise_differences(values)
    long = values.stack().dropna()
    reference = pairwise_tukeyhsd(long.to_numpy(), long.index.get_level_values(1), use_var="unequal")
    assert pairs["difference"].to_numpy() == pytest.approx(-reference.meandiffs)
    assert pairs["df"].to_numpy() == pytest.approx(reference.df_total)
    intervals = pairs[["ci_low", "ci_high"]].to_numpy()
    np.testing.assert_allclose(intervals, -reference.confint[:, ::-1], rtol=2e-3, atol=1e-3)


def test_groups_of_the_same_participants_agree_with_the_paired_t_test() -> None:
    rng = np.random.default_rng(4)
    one = rng.normal(size=12)
    both = pd.DataFrame({"one": one, "other": one + rng.normal(0.2, 0.3, 12)})
    pair = pairwise_differences(both).iloc[0]
    paired = stats.ttest_rel(both["one"], both["other"])
    assert (pair["ci_low"], pair["ci_high"]) == pytest.approx(tuple(paired.confidence_interval(0.95)))
    assert pair["df"] == 11
    assert equal_means_p(both, pairwise_differences(both)) == pytest.approx(paired.pvalue, rel=1e-3)


def test_partly_shared_groups_agree_with_the_formula_of_derrick() -> None:
    rng = np.random.default_rng(5)
    values = pd.DataFrame(rng.normal(size=(20, 2)), columns=["one", "other"])
    values["other"] += values["one"]
    values.iloc[:8, 1], values.iloc[15:, 0] = np.nan, np.nan
    one, other = values["one"].dropna(), values["other"].dropna()
    shared = values.dropna()
    n, m, c = len(one), len(other), len(shared)
    assert (n, m, c) == (15, 12, 7)
    r = stats.pearsonr(shared["one"], shared["other"]).statistic
    error = np.sqrt(one.var() / n + other.var() / m - 2 * r * one.std() * other.std() * c / (n * m))
    welch = stats.ttest_ind(one, other, equal_var=False).df
    df = c - 1 + (welch - c + 1) / (n - c + m - c + 2 * c) * (n - c + m - c)
    pair = pairwise_differences(values).iloc[0]
    assert pair["error"] == pytest.approx(error)
    assert pair["df"] == pytest.approx(df)
    assert pair["ci_high"] - pair["difference"] == pytest.approx(stats.t.ppf(0.975, df) * error)


def test_constant_groups_have_no_interval() -> None:
    values = independent_groups(np.zeros(6), np.ones(7), np.arange(8.0))
    pairs = pairwise_differences(values).set_index(["a", "b"])
    assert np.isnan(pairs.loc[("part 0", "part 1"), "ci_low"])
    low, high = pairs.loc[("part 0", "part 2"), ["ci_low", "ci_high"]]
    # Welch with a variance of zero in one group: 7 degrees of freedom, three groups.
    error = np.arange(8.0).std(ddof=1) / np.sqrt(8)
    margin = stats.studentized_range.ppf(0.95, 3, 7) * error / np.sqrt(2)
    assert (low, high) == pytest.approx((-3.5 - margin, -3.5 + margin), abs=0.005)
    same = independent_groups(np.zeros(6), np.zeros(7))
    assert np.isnan(equal_means_p(same, pairwise_differences(same)))


def test_participants_on_several_scanners_are_paired(subjects: pd.DataFrame) -> None:
    healthy = subjects[subjects["role"] == "healthy"].reset_index(drop=True)
    travelled = pd.concat(
        [healthy, healthy.iloc[:20].assign(scanner="B"), healthy.iloc[:20].assign(scanner="C")]
    )
    travelled["fpr"] += (travelled["scanner"] == "C") * np.random.default_rng(0).normal(
        1e-3, 1e-3, len(travelled)
    )
    subgroups, disparities = compare_subgroups(travelled.reset_index(drop=True), ["scanner"], seed=0)
    gap = disparities.iloc[0]
    assert (gap["n_levels"], gap["n_participants"], gap["n_shared"]) == (3, 60, 20)
    row = subgroups.set_index("level").loc["C"]
    # All participants were scanned on A; their scans on A and B are averaged.
    others = healthy["fpr"]
    assert row["difference"] == pytest.approx(row["mean"] - others.mean())
    assert np.isnan(row["hedges_g_ci_low"])
    # The standard error is that of the paired differences.
    pairs = travelled[travelled["scanner"] == "C"]["fpr"].to_numpy() - healthy["fpr"][:20].to_numpy()
    means = {
        name: travelled[travelled["scanner"] == name].set_index("participant_id")["fpr"] for name in "BC"
    }
    pair = pairwise_differences(pd.DataFrame(means)).iloc[0]
    assert pair["error"] == pytest.approx(pairs.std(ddof=1) / np.sqrt(20), rel=0.05)


def test_type_1_error_of_the_gap_of_eight_scanners() -> None:
    rng = np.random.default_rng(6)
    n, excluded = 60, 0
    for _ in range(n):
        scans = {"participant_id": [f"sub-{k}" for k in range(96)], "detector": "made", "modality": "T1w"}
        table = pd.DataFrame(scans | {"role": "healthy", "scanner": list("ABCDEFGH") * 12})
        table = table.assign(fpr=rng.normal(0.02, 0.004, 96), dice=np.nan, sensitivity=np.nan)
        gap = compare_subgroups(table, ["scanner"], seed=0)[1].iloc[0]
        excluded += gap["gap_ci_low"] > 0
    assert excluded <= 0.12 * n


SIZES = {
    "equal": lambda k: (np.full(k, 12), np.ones(k)),
    "unequal sizes": lambda k: (np.linspace(8, 40, k).astype(int), np.ones(k)),
    "larger parts vary more": lambda k: (np.linspace(8, 40, k).astype(int), np.linspace(1, 2, k)),
    "larger parts vary less": lambda k: (np.linspace(8, 40, k).astype(int), np.linspace(2, 1, k)),
}


@pytest.mark.slow
@pytest.mark.parametrize("k", [2, 4, 8, 12])
@pytest.mark.parametrize("case", [*SIZES, "participants in several parts"])
def test_simultaneous_intervals_cover_95_percent(case: str, k: int) -> None:
    rng = np.random.default_rng([k, len(case)])
    covered = rejected = gaps = 0
    n_cohorts = 500
    for _ in range(n_cohorts):
        if case in SIZES:
            sizes, deviations = SIZES[case](k)
            parts = [rng.normal(0.3, s, n) for n, s in zip(sizes, deviations, strict=True)]
            values = independent_groups(*parts)
        else:  # 8 participants of each part alone, 16 in half of the parts each, at a correlation of 0.7
            every = rng.normal(size=(8 * k + 16, 1)) * np.sqrt(0.7)
            every = every + rng.normal(size=(8 * k + 16, k)) * np.sqrt(0.3)
            inside = np.repeat(np.eye(k, dtype=bool), 8, axis=0)
            several = np.argsort(rng.random((16, k)), axis=1) < max(2, k // 2)
            values = pd.DataFrame(np.where(np.vstack([inside, several]), every, np.nan))
        pairs = pairwise_differences(values)
        holds = (pairs["ci_low"] <= 0) & (pairs["ci_high"] >= 0)
        means = values.mean()
        ends = {means.idxmax(), means.idxmin()}
        gaps += bool(holds[[{a, b} == ends for a, b in zip(pairs["a"], pairs["b"], strict=True)]].all())
        covered += bool(holds.all())
        rejected += equal_means_p(values, pairs) < 0.05
    print(f"{case}, {k} parts: all pairs {covered}, gap {gaps}, test {rejected} of {n_cohorts}")
    assert 0.92 * n_cohorts <= covered <= 0.98 * n_cohorts
    assert 0.92 * n_cohorts <= gaps <= 0.98 * n_cohorts
    assert 0.025 * n_cohorts <= rejected <= 0.075 * n_cohorts
