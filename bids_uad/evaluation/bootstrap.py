"""Percentile bootstrap over participants, not over images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import pandas as pd

N_RESAMPLES = 2000
CONFIDENCE = 0.95
MIN_SUBJECTS = 5
"""Minimum number of participants for an interval.

If all lesions of two of four participants are detected and no lesion of the other two, 6 % of the resamples
contain only the former and 6 % only the latter, and the interval is 0 to 1. With five or more participants
this cannot happen.
"""
MAX_SHARE_WIDTH = 0.95
"""Maximum width of the interval of a fraction; a wider one is uninformative and reported as missing."""
_BLOCK = 500_000
"""Numbers per block of resamples, which limits the memory."""

Interval = tuple[float, float]


def interval_columns(name: str, what: str, *, share: bool = False) -> dict[str, dict[str, Any]]:
    """Describe the two columns of a confidence interval for the sidecar of a table.

    Parameters
    ----------
    name : str
        Name of the column that the interval belongs to.
    what : str
        Quantity in words, such as `mean Dice`.
    share : bool, default=False
        Whether the interval is computed by :func:`share_interval`.

    Returns
    -------
    dict of str to dict
        Descriptions of the columns `<name>_ci_low` and `<name>_ci_high`.
    """
    interval = f"{CONFIDENCE:.0%} confidence interval of the {what}"
    method = f"percentile bootstrap over participants, {N_RESAMPLES} resamples"
    missing = f"n/a with fewer than {MIN_SUBJECTS} participants"
    if share:
        missing += f" or if the interval is wider than {MAX_SHARE_WIDTH:g}"
    return {
        f"{name}_ci_{end}": {"Description": f"{limit} limit of the {interval} ({method}); {missing}"}
        for end, limit in (("low", "Lower"), ("high", "Upper"))
    }


def bootstrap_interval(
    values: Sequence[float],
    subjects: Sequence[str],
    *,
    seed: int,
    statistic: Literal["mean", "median"] = "mean",
    weights: Sequence[float] | None = None,
    n_resamples: int = N_RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Compute a percentile bootstrap confidence interval by resampling participants.

    A participant is drawn with all images, since images of one participant are not independent. The draws
    depend on the seed and the number of participants only, so that results do not depend on other
    computations, and detectors with the same participants are compared on the same draws.

    Parameters
    ----------
    values : sequence of float
        Value of each image; images with NaN are left out.
    subjects : sequence of str
        Participant of each image.
    seed : int
        Seed of the random draws.
    statistic : {"mean", "median"}, default="mean"
        Statistic of the drawn images.
    weights : sequence of float, optional
        Weights for the mean, sum(values * weights) / sum(weights); a ratio of totals if `values` are ratios
        and `weights` their denominators.
    n_resamples : int, default=2000
        Number of resamples.
    confidence : float, default=0.95
        Coverage of the interval.

    Returns
    -------
    low, high : float
        Limits of the interval; NaN with fewer than `MIN_SUBJECTS` participants.
    """
    value = np.asarray(values, dtype=np.float64)
    weight = np.ones_like(value) if weights is None else np.asarray(weights, dtype=np.float64)
    kept = np.isfinite(value) & (weight > 0)
    value, weight = value[kept], weight[kept]
    cluster, labels = pd.factorize(np.asarray(subjects, dtype=object)[kept], sort=True)
    if len(labels) < MIN_SUBJECTS:
        return float("nan"), float("nan")

    drawn = _resamples(seed, len(labels), n_resamples)
    if statistic == "mean":
        totals = np.column_stack(
            [np.bincount(cluster, weight * value, len(labels)), np.bincount(cluster, weight, len(labels))]
        )
        sums = np.concatenate([part.astype(np.float64) @ totals for part in _blocks(drawn, len(labels))])
        statistics = sums[:, 0] / sums[:, 1]
    else:
        order = np.argsort(value, kind="stable")
        repeats = (part[:, cluster[order]] for part in _blocks(drawn, len(value)))
        statistics = np.concatenate([_median_of_repeats(value[order], part) for part in repeats])
    tail = (1 - confidence) / 2
    low, high = np.quantile(statistics, [tail, 1 - tail])
    return float(low), float(high)


def share_interval(
    parts: Sequence[float], wholes: Sequence[float], subjects: Sequence[str], *, seed: int
) -> Interval:
    """Compute the interval of a fraction of totals, sum(parts) / sum(wholes), by resampling participants.

    Parameters
    ----------
    parts, wholes : sequence of float
        Numerator and denominator of each image; images with a denominator of 0 are left out.
    subjects : sequence of str
        Participant of each image.
    seed : int
        Seed of the random draws.

    Returns
    -------
    low, high : float
        Limits of the interval; NaN with fewer than `MIN_SUBJECTS` participants, or if the interval is wider
        than `MAX_SHARE_WIDTH`.
    """
    whole = np.asarray(wholes, dtype=np.float64)
    ratio = np.divide(parts, whole, out=np.full(len(whole), np.nan), where=whole > 0)
    low, high = bootstrap_interval(ratio, subjects, seed=seed, weights=whole)
    return (low, high) if high - low <= MAX_SHARE_WIDTH else (float("nan"), float("nan"))


@lru_cache(maxsize=16)
def _resamples(seed: int, n_subjects: int, n_resamples: int) -> np.ndarray:
    """Draw participants with replacement; return the number of draws, uint8, (n_resamples, n_subjects)."""
    generator = np.random.default_rng([seed, n_subjects])
    drawn = np.empty((n_resamples, n_subjects), np.uint8)
    for row in drawn:
        row[:] = np.bincount(generator.integers(n_subjects, size=n_subjects), minlength=n_subjects)
    drawn.flags.writeable = False
    return drawn


def _blocks(drawn: np.ndarray, width: int) -> Iterator[np.ndarray]:
    """Yield blocks of resamples of at most `_BLOCK` numbers, at `width` numbers per resample."""
    size = max(1, _BLOCK // width)
    return (drawn[start : start + size] for start in range(0, len(drawn), size))


def _median_of_repeats(value: np.ndarray, repeats: np.ndarray) -> np.ndarray:
    """Return the medians (b,) of sorted values (n,), each repeated as often as `repeats` (b, n) states."""
    cumulative = np.cumsum(repeats, axis=1, dtype=np.int32)
    total = cumulative[:, -1:]
    lower = np.argmax(cumulative > (total - 1) // 2, axis=1)
    upper = np.argmax(cumulative > total // 2, axis=1)
    return (value[lower] + value[upper]) / 2
