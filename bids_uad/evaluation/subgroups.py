"""The same numbers for parts of a cohort: sex, age, scanner, lesion load, or what else a column says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.libqsturng import qsturng
from statsmodels.stats.oneway import anova_oneway

from bids_uad.evaluation.bootstrap import CONFIDENCE, bootstrap_interval, interval_columns
from bids_uad.evaluation.comparison import corrected
from bids_uad.evaluation.subjects import HEALTHY, LESION, LESION_LOAD

OUTCOMES = {"fpr": HEALTHY, "dice": LESION, "sensitivity": LESION}
AGE_BANDS = {"0 to 39": 40.0, "40 to 59": 60.0, "60 and above": np.inf}
QUARTILES = ("1st quarter", "2nd quarter", "3rd quarter", "4th quarter")
MAX_LEVELS = 8
"""A column of numbers with more values than this is cut at its quartiles, the lowest first."""
CATEGORY_NAMES = frozenset(
    [
        *("scanner", "device", "station", "serial", "manufacturer", "protocol"),
        *("site", "center", "centre", "institution", "hospital", "id"),
    ]
)
"""Words in the names of columns whose numbers are labels: `scanner`, `site_id`, `DeviceSerialNumber`."""
MIN_PARTICIPANTS = 3
"""Participants that a part needs to be listed."""
MIN_COMPARED = 6
"""Participants that a part needs for the test of all parts: with five in each of twelve parts the
simultaneous intervals cover less than 92 %."""
MIN_SHARED = 3
"""Participants in both of two parts from which a correlation of the two is estimated; with fewer it is 0."""

COLUMNS: dict[str, dict[str, Any]] = {
    "detector": {"Description": "Anomaly detector"},
    "modality": {"Description": "Modality of the images"},
    "outcome": {
        "Description": "What is averaged",
        "Levels": {
            "fpr": "False-positive rate at the fixed threshold, healthy scans",
            "dice": "Dice at the fixed threshold, lesion scans",
            "sensitivity": "Voxel-wise sensitivity at the fixed threshold, lesion scans",
        },
    },
    "factor": {"Description": "What divides the cohort"},
    "level": {"Description": "The part"},
    "n_participants": {"Description": "Participants in this part (images of one are averaged)"},
    "mean": {"Description": "Mean over them"},
    **interval_columns("mean", "mean"),
    "difference": {
        "Description": "This mean minus that of all participants of other parts, whose parts are averaged"
    },
    "difference_ci_low": {
        "Description": "Lower end of its 95 % interval (Welch; participants in both are taken as pairs), for "
        "this part alone: not corrected for the number of parts"
    },
    "difference_ci_high": {"Description": "Upper end of the same"},
    "p": {"Description": "Two-sided p value of the difference, for this part alone"},
    "p_fdr": {"Description": "The same, corrected over the whole table (Benjamini and Hochberg)"},
    "hedges_g": {"Description": "The difference in standard deviations (Hedges' g)"},
    "hedges_g_ci_low": {
        "Description": "Lower end of its 95 % interval (large-sample), for this part alone; n/a where "
        "participants are in this part and in others"
    },
    "hedges_g_ci_high": {"Description": "Upper end of the same"},
}
DISPARITY_COLUMNS: dict[str, dict[str, Any]] = {
    **{name: COLUMNS[name] for name in ("detector", "modality", "outcome", "factor")},
    "n_levels": {"Description": f"Parts with at least {MIN_COMPARED} participants, which are compared"},
    "n_participants": {"Description": "Participants in them"},
    "n_shared": {"Description": "Participants that are in more than one of them"},
    "p": {
        "Description": "p value of the hypothesis that all parts have the same mean: analysis of variance "
        "for unequal variances (Brown and Forsythe), or, with participants in more than one part, the "
        "smallest p value of all pairs, adjusted for their number (Games and Howell)"
    },
    "p_fdr": {"Description": "The same, corrected over the whole table (Benjamini and Hochberg)"},
    "highest": {"Description": "Part with the highest mean"},
    "lowest": {"Description": "Part with the lowest mean"},
    "gap": {
        "Description": "Highest minus lowest mean; of fpr, how far from equal false alarms a threshold is"
    },
    "gap_ci_low": {
        "Description": "Lower end of its 95 % interval, simultaneous for all pairs of parts (Games and "
        "Howell), so that it allows for these two having been picked"
    },
    "gap_ci_high": {"Description": "Upper end of the same"},
    "ratio": {"Description": "Highest divided by lowest mean; n/a where the lowest is zero"},
}


def levels_of(subjects: pd.DataFrame, factor: str) -> pd.Series | None:
    """Say which part of the cohort each image is in.

    Parameters
    ----------
    subjects : pandas.DataFrame
        One row per image and detector, with the columns of participants.tsv and others asked for.
    factor : str
        A column; `age` is cut into `AGE_BANDS`, `lesion load` is the quartile of the lesion volume, and any
        other column of more than `MAX_LEVELS` numbers is cut at its quartiles, unless its name has one of
        `CATEGORY_NAMES` in it: the numbers of scanners and sites are labels.

    Returns
    -------
    pandas.Series or None
        Text, missing where nothing is known; None without such a column.
    """
    if factor == LESION_LOAD:
        volume = subjects["lesion_volume_mm3"].where(subjects["role"] == LESION)
        return _quartiles(volume.where(volume > 0), subjects["source_image"])
    if factor not in subjects:
        return None
    values = subjects[factor]
    numbers = pd.to_numeric(values, errors="coerce")
    if factor == "age":
        return pd.cut(numbers, [-np.inf, *AGE_BANDS.values()], right=False, labels=list(AGE_BANDS)).astype(
            "string"
        )
    is_measure = numbers.notna().sum() == values.notna().sum() and not is_category(factor)
    if is_measure and numbers.nunique() > MAX_LEVELS:
        return _quartiles(numbers, subjects["source_image"])
    return values.astype("string")


def is_category(name: str) -> bool:
    """Return whether numbers in a column of this name are labels and not measurements.

    Parameters
    ----------
    name : str
        In snake case, camel case or separate words.

    Returns
    -------
    bool
        Whether one of its words is in `CATEGORY_NAMES`, also with a number or a plural s behind it.
    """
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)
    return any(word.lower().removesuffix("s") in CATEGORY_NAMES for word in words)


def _quartiles(values: pd.Series, images: pd.Series) -> pd.Series:
    """Cut at quartiles over images, each of which counts once however many detectors there are."""
    once = values[~images.duplicated()].dropna()
    if once.nunique() < len(QUARTILES):
        return pd.Series(pd.NA, index=values.index, dtype="string")
    inner = np.quantile(once, [0.25, 0.5, 0.75])
    place = np.searchsorted(inner, values.fillna(0), side="left")
    return pd.Series(np.array(QUARTILES)[place], index=values.index).where(values.notna()).astype("string")


def compare_subgroups(
    subjects: pd.DataFrame, factors: Sequence[str], *, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Average over the parts of a cohort, and measure how far apart they are.

    Parameters
    ----------
    subjects : pandas.DataFrame
        One row per image and detector, with the columns of participants.tsv.
    factors : sequence of str
        See :func:`levels_of`.
    seed : int
        Seed of the bootstrap.

    Returns
    -------
    subgroups : pandas.DataFrame
        Columns of `COLUMNS`.
    disparities : pandas.DataFrame
        Columns of `DISPARITY_COLUMNS`.
    """
    subgroups: list[dict[str, Any]] = []
    disparities: list[dict[str, Any]] = []
    for factor in factors:
        levels = levels_of(subjects, factor)
        if levels is None:
            continue
        for (detector, modality), scans in subjects.groupby(["detector", "modality"], sort=True):
            for outcome, role in OUTCOMES.items():
                chosen = scans[(scans["role"] == role) & scans[outcome].notna()]
                means = chosen.groupby(["participant_id", levels[chosen.index].rename("level")])[outcome]
                means = means.mean().unstack("level").astype(float)
                means = means.loc[:, means.notna().sum() >= MIN_PARTICIPANTS].sort_index(axis="columns")
                if means.shape[1] < 2:
                    continue
                labels = {"detector": detector, "modality": modality, "outcome": outcome, "factor": factor}
                subgroups += [labels | _stratum(name, means, seed) for name in means]
                means = means.loc[:, means.notna().sum() >= MIN_COMPARED].dropna(how="all")
                if means.shape[1] > 1:
                    disparities.append(labels | _disparity(means))
    tables = (
        pd.DataFrame(subgroups, columns=list(COLUMNS)),
        pd.DataFrame(disparities, columns=list(DISPARITY_COLUMNS)),
    )
    for table in tables:
        table["p_fdr"] = corrected(table["p"], "fdr_bh")
    return tables


def _stratum(name: str, means: pd.DataFrame, seed: int) -> dict[str, Any]:
    part, others = means[name].dropna(), means.drop(columns=name).mean(axis="columns").dropna()
    low, high = bootstrap_interval(part.to_numpy(), list(part.index), seed=seed)
    pair = pairwise_differences(pd.concat([part, others], axis="columns", keys=["part", "others"])).iloc[0]
    g, g_low, g_high = hedges_g(part.to_numpy(), others.to_numpy())
    if part.index.isin(others.index).any():
        g_low = g_high = np.nan
    return {
        "level": name,
        "n_participants": len(part),
        "mean": part.mean(),
        "mean_ci_low": low,
        "mean_ci_high": high,
        "difference": pair["difference"],
        "difference_ci_low": pair["ci_low"],
        "difference_ci_high": pair["ci_high"],
        "p": 2 * stats.t.sf(abs(pair["difference"]) / pair["error"], pair["df"]),
        "hedges_g": g,
        "hedges_g_ci_low": g_low,
        "hedges_g_ci_high": g_high,
    }


def _disparity(means: pd.DataFrame) -> dict[str, Any]:
    of_parts = means.mean()
    highest, lowest = of_parts.idxmax(), of_parts.idxmin()
    pairs = pairwise_differences(means)
    gap = pairs[(pairs["a"].isin([highest, lowest])) & (pairs["b"].isin([highest, lowest]))]
    low, high = np.nan, np.nan
    if len(gap):
        ends = gap.iloc[0][["ci_low", "ci_high"]]
        low, high = ends if gap.iloc[0]["a"] == highest else -ends[::-1]
    return {
        "n_levels": means.shape[1],
        "n_participants": len(means),
        "n_shared": int((means.notna().sum(axis="columns") > 1).sum()),
        "p": equal_means_p(means, pairs),
        "highest": highest,
        "lowest": lowest,
        "gap": of_parts[highest] - of_parts[lowest],
        "gap_ci_low": low,
        "gap_ci_high": high,
        "ratio": of_parts[highest] / of_parts[lowest] if of_parts[lowest] > 0 else np.nan,
    }


def pairwise_differences(values: pd.DataFrame) -> pd.DataFrame:
    """Compare the means of every two groups, with intervals that hold for all pairs at once.

    Groups may differ in size and variance, and may share participants, who are then taken as pairs.

    Parameters
    ----------
    values : pandas.DataFrame, shape (n_participants, n_groups)
        One number for each participant and group; NaN where a participant is not in a group.

    Returns
    -------
    pandas.DataFrame
        One row for each pair of columns: `a` and `b` (names), `difference` (mean of a minus mean of b),
        `error` (its standard error), `df` (degrees of freedom), `ci_low` and `ci_high` (95 % interval,
        simultaneous for all pairs; for two groups Welch's). The last four are NaN where neither group varies.

    Notes
    -----
    Games and Howell 1976 (Journal of Educational Statistics 1), with the quantiles of the studentized range
    by Gleason's approximation (relative error below 0.0004). The standard error and the degrees of freedom
    for groups that share participants are those of Derrick et al. 2017 (Journal of Modern Applied Statistical
    Methods 16), which are Welch's for groups that share none, and those of the paired t test for groups of
    the same participants.
    """
    known = values.notna().to_numpy(float)
    n = known.sum(axis=0)
    mean, variance = values.mean().to_numpy(), values.var(ddof=1).to_numpy()
    shared = known.T @ known
    correlation = values.corr(min_periods=MIN_SHARED).fillna(0.0).to_numpy()
    a, b = np.triu_indices(len(n), 1)
    both, own = shared[a, b], variance / n
    covariance = correlation[a, b] * np.sqrt(variance[a] * variance[b]) * both / (n[a] * n[b])
    with np.errstate(divide="ignore", invalid="ignore"):
        welch = (own[a] + own[b]) ** 2 / (own[a] ** 2 / (n[a] - 1) + own[b] ** 2 / (n[b] - 1))
        error = np.sqrt(np.maximum(own[a] + own[b] - 2 * covariance, 0.0))
    # As many as there are pairs of values, and in proportion for those without a partner.
    alone = n[a] + n[b] - 2 * both
    df = both - 1 + (welch - both + 1) * alone / (alone + 2 * both)
    df[~np.isfinite(welch)], error[~np.isfinite(welch)] = np.nan, np.nan
    varies = np.isfinite(df) & (error > 0)
    margin = np.full(len(a), np.nan)
    if varies.any():
        quantiles = np.array([qsturng(CONFIDENCE, len(n), freedom) for freedom in df[varies]])
        margin[varies] = quantiles * error[varies] / np.sqrt(2)
    difference = mean[a] - mean[b]
    return pd.DataFrame(
        {
            "a": values.columns[a],
            "b": values.columns[b],
            "difference": difference,
            "error": np.where(varies, error, np.nan),
            "df": np.where(varies, df, np.nan),
            "ci_low": difference - margin,
            "ci_high": difference + margin,
        }
    )


def equal_means_p(values: pd.DataFrame, pairs: pd.DataFrame) -> float:
    """Test whether all groups have the same mean.

    Parameters
    ----------
    values : pandas.DataFrame, shape (n_participants, n_groups)
        As for :func:`pairwise_differences`.
    pairs : pandas.DataFrame
        Of :func:`pairwise_differences`.

    Returns
    -------
    float
        p value of the analysis of variance for unequal variances of Brown and Forsythe 1974 (Technometrics
        16), with Mehrotra's (1997) degrees of freedom; where participants are in several groups, which it
        does not allow for, the smallest adjusted p value of `pairs`. NaN where nothing varies.

    Notes
    -----
    Welch's analysis of variance rejects too often with many small groups: of true hypotheses 9 % with twelve
    groups of five, against 5 % of this one.
    """
    if pairs["error"].isna().all():
        return np.nan
    if (values.notna().sum(axis="columns") <= 1).all():
        groups = [values[name].dropna().to_numpy() for name in values]
        return float(anova_oneway(groups, use_var="bf").pvalue)
    extent = pairs["difference"].abs() / (pairs["ci_high"] - pairs["ci_low"])
    most = pairs.loc[extent.idxmax()]
    size = np.sqrt(2) * abs(most["difference"]) / most["error"]
    return float(stats.studentized_range.sf(size, values.shape[1], most["df"]))


def hedges_g(one: np.ndarray, other: np.ndarray) -> tuple[float, float, float]:
    """Standardise a difference of means.

    Parameters
    ----------
    one, other : numpy.ndarray
        One number for each participant.

    Returns
    -------
    g, low, high : float
        Hedges' g (Hedges 1981) with its large-sample 95 % interval; NaN where nothing varies.
    """
    n, m = len(one), len(other)
    freedom = n + m - 2
    pooled = np.sqrt(((n - 1) * one.var(ddof=1) + (m - 1) * other.var(ddof=1)) / freedom)
    if not pooled > 0:
        return np.nan, np.nan, np.nan
    g = (1 - 3 / (4 * freedom - 1)) * (one.mean() - other.mean()) / pooled
    error = stats.norm.ppf(0.5 + CONFIDENCE / 2) * np.sqrt((n + m) / (n * m) + g**2 / (2 * (n + m)))
    return float(g), float(g - error), float(g + error)
