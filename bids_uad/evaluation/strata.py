"""The same numbers for parts of a cohort: sex, age, scanner, lesion load, or what else a column says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from bids_uad.evaluation.bootstrap import CONFIDENCE, bootstrap_interval, interval_columns
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
    "difference": {"Description": "This mean minus that of all other parts together"},
    "difference_ci_low": {"Description": "Lower end of its 95 % interval (Welch)"},
    "difference_ci_high": {"Description": "Upper end of the same"},
    "hedges_g": {"Description": "The difference in standard deviations (Hedges' g)"},
    "hedges_g_ci_low": {"Description": "Lower end of its 95 % interval (large-sample)"},
    "hedges_g_ci_high": {"Description": "Upper end of the same"},
}
DISPARITY_COLUMNS: dict[str, dict[str, Any]] = {
    **{name: COLUMNS[name] for name in ("detector", "modality", "outcome", "factor")},
    "n_levels": {"Description": f"Parts with at least {MIN_PARTICIPANTS} participants"},
    "highest": {"Description": "Part with the highest mean"},
    "lowest": {"Description": "Part with the lowest mean"},
    "gap": {
        "Description": "Highest minus lowest mean; of fpr, how far from equal false alarms a threshold is"
    },
    "gap_ci_low": {
        "Description": "Lower end of the 95 % interval (Welch) of the difference of these two parts"
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


def stratify(
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
    strata : pandas.DataFrame
        Columns of `COLUMNS`.
    disparities : pandas.DataFrame
        Columns of `DISPARITY_COLUMNS`.
    """
    strata: list[dict[str, Any]] = []
    disparities: list[dict[str, Any]] = []
    for factor in factors:
        levels = levels_of(subjects, factor)
        if levels is None:
            continue
        for (detector, modality), scans in subjects.groupby(["detector", "modality"], sort=True):
            for outcome, role in OUTCOMES.items():
                chosen = scans[(scans["role"] == role) & scans[outcome].notna()]
                means = chosen.groupby(["participant_id", levels[chosen.index].rename("level")])[
                    outcome
                ].mean()
                parts = {name: part.droplevel("level") for name, part in means.groupby("level")}
                parts = {name: part for name, part in parts.items() if len(part) >= MIN_PARTICIPANTS}
                if len(parts) < 2:
                    continue
                labels = {"detector": detector, "modality": modality, "outcome": outcome, "factor": factor}
                strata += [labels | _stratum(name, parts, seed) for name in sorted(parts)]
                disparities.append(labels | _disparity(parts))
    return (
        pd.DataFrame(strata, columns=list(COLUMNS)),
        pd.DataFrame(disparities, columns=list(DISPARITY_COLUMNS)),
    )


def _stratum(name: str, parts: dict[str, pd.Series], seed: int) -> dict[str, Any]:
    part = parts[name]
    others = pd.concat([values for other, values in parts.items() if other != name])
    low, high = bootstrap_interval(part.to_numpy(), list(part.index), seed=seed)
    difference, difference_low, difference_high = _welch(part, others)
    g, g_low, g_high = hedges_g(part.to_numpy(), others.to_numpy())
    return {
        "level": name,
        "n_participants": len(part),
        "mean": part.mean(),
        "mean_ci_low": low,
        "mean_ci_high": high,
        "difference": difference,
        "difference_ci_low": difference_low,
        "difference_ci_high": difference_high,
        "hedges_g": g,
        "hedges_g_ci_low": g_low,
        "hedges_g_ci_high": g_high,
    }


def _disparity(parts: dict[str, pd.Series]) -> dict[str, Any]:
    means = {name: part.mean() for name, part in parts.items()}
    highest, lowest = max(means, key=means.get), min(means, key=means.get)
    gap, low, high = _welch(parts[highest], parts[lowest])
    return {
        "n_levels": len(parts),
        "highest": highest,
        "lowest": lowest,
        "gap": gap,
        "gap_ci_low": low,
        "gap_ci_high": high,
        "ratio": means[highest] / means[lowest] if means[lowest] > 0 else np.nan,
    }


def _welch(one: pd.Series, other: pd.Series) -> tuple[float, float, float]:
    """Difference of two means and its interval; no interval where nothing varies."""
    difference = float(one.mean() - other.mean())
    if one.nunique() == 1 and other.nunique() == 1:
        return difference, np.nan, np.nan
    interval = stats.ttest_ind(one, other, equal_var=False).confidence_interval(CONFIDENCE)
    return difference, float(interval.low), float(interval.high)


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
