"""Metrics in subgroups of a cohort by sex, age, scanner, lesion load or another variable, and disparities."""

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
"""A numeric variable with more values than this is divided at its quartiles."""
CATEGORY_NAMES = frozenset(
    [
        *("scanner", "device", "station", "serial", "manufacturer", "protocol"),
        *("site", "center", "centre", "institution", "hospital", "id"),
    ]
)
"""Words in the names of variables whose numbers are labels: `scanner`, `site_id`, `DeviceSerialNumber`."""
MIN_PARTICIPANTS = 3
"""Minimum number of participants of a subgroup in the table."""
MIN_COMPARED = 6
"""Minimum number of participants of a subgroup in tests of disparity: with five in each of twelve subgroups,
simultaneous intervals of nominally 95 % cover less than 92 %."""
MIN_SHARED = 3
"""Minimum number of participants in both of two subgroups for an estimate of their correlation, else 0."""

COLUMNS: dict[str, dict[str, Any]] = {
    "detector": {"Description": "Anomaly detector"},
    "modality": {"Description": "Modality of the images"},
    "outcome": {
        "Description": "Averaged outcome",
        "Levels": {
            "fpr": "False-positive rate at the fixed threshold, healthy scans",
            "dice": "Dice at the fixed threshold, lesion scans",
            "sensitivity": "Voxel-wise sensitivity at the fixed threshold, lesion scans",
        },
    },
    "factor": {"Description": "Subgroup variable"},
    "level": {"Description": "Subgroup: value, age band or quartile of the variable"},
    "n_participants": {
        "Description": "Number of participants in the subgroup; the images of a participant are averaged"
    },
    "mean": {"Description": "Mean outcome over these participants"},
    **interval_columns("mean", "mean"),
    "difference": {
        "Description": "Mean of this subgroup minus the mean over the participants of all other subgroups"
    },
    "difference_ci_low": {
        "Description": "Lower limit of the 95 % confidence interval of difference (Welch, with participants "
        "in both groups as pairs), not corrected for the number of subgroups"
    },
    "difference_ci_high": {"Description": "Upper limit of the 95 % confidence interval of difference"},
    "p": {"Description": "Two-sided p value of difference, not corrected"},
    "p_fdr": {"Description": "p, corrected over the whole table (Benjamini and Hochberg)"},
    "hedges_g": {"Description": "Difference in pooled standard deviations (Hedges' g)"},
    "hedges_g_ci_low": {
        "Description": "Lower limit of the 95 % confidence interval of hedges_g (large-sample), not "
        "corrected; n/a if participants belong to several subgroups"
    },
    "hedges_g_ci_high": {"Description": "Upper limit of the 95 % confidence interval of hedges_g"},
}
DISPARITY_COLUMNS: dict[str, dict[str, Any]] = {
    **{name: COLUMNS[name] for name in ("detector", "modality", "outcome", "factor")},
    "n_levels": {"Description": f"Number of compared subgroups (at least {MIN_COMPARED} participants each)"},
    "n_participants": {"Description": "Number of participants in these subgroups"},
    "n_shared": {"Description": "Number of participants in more than one of these subgroups"},
    "p": {
        "Description": "p value of the hypothesis that all subgroups have the same mean: analysis of "
        "variance for unequal variances (Brown and Forsythe), or, with participants in several subgroups, "
        "the smallest p value of all pairs, adjusted for their number (Games and Howell)"
    },
    "p_fdr": {"Description": "p, corrected over the whole table (Benjamini and Hochberg)"},
    "highest": {"Description": "Subgroup with the highest mean"},
    "lowest": {"Description": "Subgroup with the lowest mean"},
    "gap": {
        "Description": "Highest minus lowest mean; for fpr, the disparity in false positives at one threshold"
    },
    "gap_ci_low": {
        "Description": "Lower limit of the 95 % confidence interval of gap, simultaneous for all pairs of "
        "subgroups (Games and Howell), which accounts for the choice of the extreme pair"
    },
    "gap_ci_high": {"Description": "Upper limit of the 95 % confidence interval of gap"},
    "ratio": {"Description": "Highest divided by lowest mean; n/a if the lowest is zero"},
}


def levels_of(subjects: pd.DataFrame, variable: str) -> pd.Series | None:
    """Return the subgroup of each image.

    Parameters
    ----------
    subjects : pandas.DataFrame
        One row per image and detector, with the columns of participants.tsv and of image metadata.
    variable : str
        Subgroup variable: a column, or `lesion load` for quartiles of the lesion volume. `age` is divided
        into `AGE_BANDS`. Any other numeric column with more than `MAX_LEVELS` values is divided at its
        quartiles, unless :func:`is_category` holds.

    Returns
    -------
    pandas.Series or None
        Subgroup as text, missing if the value is not known; None if there is no such column.
    """
    if variable == LESION_LOAD:
        volume = subjects["lesion_volume_mm3"].where(subjects["role"] == LESION)
        return _quartiles(volume.where(volume > 0), subjects["source_image"])
    if variable not in subjects:
        return None
    values = subjects[variable]
    numbers = pd.to_numeric(values, errors="coerce")
    if variable == "age":
        return pd.cut(numbers, [-np.inf, *AGE_BANDS.values()], right=False, labels=list(AGE_BANDS)).astype(
            "string"
        )
    is_measure = numbers.notna().sum() == values.notna().sum() and not is_category(variable)
    if is_measure and numbers.nunique() > MAX_LEVELS:
        return _quartiles(numbers, subjects["source_image"])
    return values.astype("string")


def is_category(name: str) -> bool:
    """Return whether numbers in a column of this name are labels instead of measurements.

    Parameters
    ----------
    name : str
        Column name in snake case, camel case or separate words.

    Returns
    -------
    bool
        True if one of its words is in `CATEGORY_NAMES`, also if followed by a number or a plural s.
    """
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)
    return any(word.lower().removesuffix("s") in CATEGORY_NAMES for word in words)


def _quartiles(values: pd.Series, images: pd.Series) -> pd.Series:
    """Divide values at the quartiles over images; the rows of an image for several detectors count once."""
    unique = values[~images.duplicated()].dropna()
    if unique.nunique() < len(QUARTILES):
        return pd.Series(pd.NA, index=values.index, dtype="string")
    quartile = np.searchsorted(np.quantile(unique, [0.25, 0.5, 0.75]), values.fillna(0), side="left")
    return pd.Series(np.array(QUARTILES)[quartile], index=values.index).where(values.notna()).astype("string")


def compare_subgroups(
    subjects: pd.DataFrame, variables: Sequence[str], *, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Compute the mean outcomes of subgroups, and the largest difference between subgroups.

    Parameters
    ----------
    subjects : pandas.DataFrame
        One row per image and detector, with the columns of participants.tsv and of image metadata.
    variables : sequence of str
        Subgroup variables, see :func:`levels_of`.
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
    for variable in variables:
        levels = levels_of(subjects, variable)
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
                labels = {"detector": detector, "modality": modality, "outcome": outcome, "factor": variable}
                subgroups += [labels | _subgroup(name, means, seed) for name in means]
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


def _subgroup(name: str, means: pd.DataFrame, seed: int) -> dict[str, Any]:
    """Compare one subgroup with all others, given means by participant (rows) and subgroup (columns)."""
    own, others = means[name].dropna(), means.drop(columns=name).mean(axis="columns").dropna()
    low, high = bootstrap_interval(own.to_numpy(), own.index, seed=seed)
    pair = pairwise_differences(pd.concat([own, others], axis="columns", keys=["own", "others"])).iloc[0]
    g, g_low, g_high = hedges_g(own.to_numpy(), others.to_numpy())
    if own.index.isin(others.index).any():
        g_low = g_high = np.nan
    return {
        "level": name,
        "n_participants": len(own),
        "mean": own.mean(),
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
    """Compare the subgroups with the highest and the lowest mean."""
    averages = means.mean()
    highest, lowest = averages.idxmax(), averages.idxmin()
    pairs = pairwise_differences(means)
    gap = pairs[(pairs["a"].isin([highest, lowest])) & (pairs["b"].isin([highest, lowest]))]
    low, high = np.nan, np.nan
    if len(gap):
        limits = gap.iloc[0][["ci_low", "ci_high"]]
        low, high = limits if gap.iloc[0]["a"] == highest else -limits[::-1]
    return {
        "n_levels": means.shape[1],
        "n_participants": len(means),
        "n_shared": int((means.notna().sum(axis="columns") > 1).sum()),
        "p": equal_means_p(means, pairs),
        "highest": highest,
        "lowest": lowest,
        "gap": averages[highest] - averages[lowest],
        "gap_ci_low": low,
        "gap_ci_high": high,
        "ratio": averages[highest] / averages[lowest] if averages[lowest] > 0 else np.nan,
    }


def pairwise_differences(values: pd.DataFrame) -> pd.DataFrame:
    """Compare the means of each pair of groups, with simultaneous confidence intervals.

    Groups may differ in size and variance, and may share participants, who are then treated as pairs.

    Parameters
    ----------
    values : pandas.DataFrame, shape (n_participants, n_groups)
        Value of each participant in each group; NaN if a participant is not in a group.

    Returns
    -------
    pandas.DataFrame
        One row for each pair of columns: `a` and `b` (names), `difference` (mean of a minus mean of b),
        `error` (standard error), `df` (degrees of freedom), `ci_low` and `ci_high` (95 % interval,
        simultaneous for all pairs; for two groups Welch's). The last four are NaN if neither group varies.

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
    # Interpolated between the paired t test (all participants in both groups) and Welch's test (none).
    unpaired = n[a] + n[b] - 2 * both
    df = both - 1 + (welch - both + 1) * unpaired / (unpaired + 2 * both)
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
        Values as for :func:`pairwise_differences`.
    pairs : pandas.DataFrame
        Result of :func:`pairwise_differences` for these values.

    Returns
    -------
    float
        p value of the analysis of variance for unequal variances of Brown and Forsythe 1974 (Technometrics
        16), with Mehrotra's (1997) degrees of freedom. That test requires independent groups; if participants
        are in several groups, the smallest adjusted p value of `pairs`. NaN if no group varies.

    Notes
    -----
    Welch's analysis of variance is too liberal with many small groups: at a nominal level of 5 %, its
    type I error rate is 9 % with twelve groups of five.
    """
    if pairs["error"].isna().all():
        return np.nan
    if (values.notna().sum(axis="columns") <= 1).all():
        groups = [values[name].dropna().to_numpy() for name in values]
        return float(anova_oneway(groups, use_var="bf").pvalue)
    relative = pairs["difference"].abs() / (pairs["ci_high"] - pairs["ci_low"])
    largest = pairs.loc[relative.idxmax()]
    statistic = np.sqrt(2) * abs(largest["difference"]) / largest["error"]
    return float(stats.studentized_range.sf(statistic, values.shape[1], largest["df"]))


def hedges_g(one: np.ndarray, other: np.ndarray) -> tuple[float, float, float]:
    """Compute Hedges' g, the standardised difference of two means (Hedges 1981).

    Parameters
    ----------
    one, other : numpy.ndarray
        Values of the participants of each group, one-dimensional.

    Returns
    -------
    g, low, high : float
        Hedges' g with its large-sample 95 % interval; NaN if neither group varies.
    """
    n, m = len(one), len(other)
    freedom = n + m - 2
    pooled = np.sqrt(((n - 1) * one.var(ddof=1) + (m - 1) * other.var(ddof=1)) / freedom)
    if not pooled > 0:
        return np.nan, np.nan, np.nan
    g = (1 - 3 / (4 * freedom - 1)) * (one.mean() - other.mean()) / pooled
    error = stats.norm.ppf(0.5 + CONFIDENCE / 2) * np.sqrt((n + m) / (n * m) + g**2 / (2 * (n + m)))
    return float(g), float(g - error), float(g + error)
