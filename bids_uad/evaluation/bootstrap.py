"""Percentile bootstrap over people, not over images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import pandas as pd

N_RESAMPLES = 2000
CONFIDENCE = 0.95
MIN_SUBJECTS = 5
"""Participants that an interval needs. If all lesions of two of four participants are found and none of the
others, 6 % of the resamples hold only the former and 6 % only the latter, so that the interval runs from 0 to
1; with five it never does."""
MAX_SHARE_WIDTH = 0.95
"""An interval of a share that is wider covers nearly all that is possible, and is not given."""
# Resamples are worked through in blocks, so that memory does not grow with their number times the images.
_BLOCK = 500_000

Interval = tuple[float, float]


def interval_columns(name: str, what: str, *, share: bool = False) -> dict[str, dict[str, Any]]:
    """Describe the two columns of an interval, as sidecars of tables do.

    Parameters
    ----------
    name : str
        Of the column that it belongs to.
    what : str
        The number in words.
    share : bool, default=False
        Whether the interval is that of :func:`share_interval`.
    """
    interval = f"{CONFIDENCE:.0%} percentile bootstrap interval over participants ({N_RESAMPLES} resamples)"
    few = f"n/a with fewer than {MIN_SUBJECTS} participants"
    if share:
        few += f", or where it would be wider than {MAX_SHARE_WIDTH:g}"
    return {
        f"{name}_ci_{end}": {"Description": f"{which} end of the {interval} of the {what}; {few}"}
        for end, which in (("low", "Lower"), ("high", "Upper"))
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
    """Compute a percentile bootstrap confidence interval by resampling subjects.

    A subject is drawn with all its images: two sessions of one person are not two people. Numbers of equally
    many people share their resamples: the draw costs more than its use, and detectors on the same people
    are then compared on the same draws. An interval does not depend on what else is computed.

    Parameters
    ----------
    values : sequence of float
        One number per image; images with NaN are left out.
    subjects : sequence of str
        The subject of each image.
    seed : int
        Seed of the whole run.
    statistic : {"mean", "median"}
        What to compute of the images drawn.
    weights : sequence of float, optional
        With the mean: the weighted mean, sum(values * weights) / sum(weights); a ratio of
        totals when `values` are ratios and `weights` their denominators.
    n_resamples : int
        Number of resamples.
    confidence : float
        Coverage of the interval.

    Returns
    -------
    low, high : float
        NaN, NaN with fewer than `MIN_SUBJECTS` subjects, whose interval would say nothing.
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
    """Compute the interval of a share of totals, sum(parts) / sum(wholes), by resampling subjects.

    Parameters
    ----------
    parts, wholes : sequence of float
        One of each for each image; images whose whole is 0 are left out.
    subjects : sequence of str
        The subject of each image.
    seed : int
        Seed of the whole run.

    Returns
    -------
    low, high : float
        NaN, NaN with fewer than `MIN_SUBJECTS` subjects, and where the interval is wider than
        `MAX_SHARE_WIDTH`.
    """
    whole = np.asarray(wholes, dtype=np.float64)
    ratio = np.divide(parts, whole, out=np.full(len(whole), np.nan), where=whole > 0)
    low, high = bootstrap_interval(ratio, subjects, seed=seed, weights=whole)
    return (low, high) if high - low <= MAX_SHARE_WIDTH else (float("nan"), float("nan"))


@lru_cache(maxsize=16)
def _resamples(seed: int, n_people: int, n_resamples: int) -> np.ndarray:
    """How often each person is drawn, uint8, (n_resamples, n_people); nobody is ever drawn 256 times."""
    generator = np.random.default_rng([seed, n_people])
    drawn = np.empty((n_resamples, n_people), np.uint8)
    for row in drawn:
        row[:] = np.bincount(generator.integers(n_people, size=n_people), minlength=n_people)
    drawn.flags.writeable = False
    return drawn


def _blocks(drawn: np.ndarray, width: int) -> Iterator[np.ndarray]:
    """Cut resamples into blocks that, at `width` numbers a row, stay small."""
    size = max(1, _BLOCK // width)
    return (drawn[start : start + size] for start in range(0, len(drawn), size))


def _median_of_repeats(value: np.ndarray, repeats: np.ndarray) -> np.ndarray:
    """Median of sorted `value` (n,), each taken `repeats` (b, n) times, for each of the b rows."""
    cumulative = np.cumsum(repeats, axis=1, dtype=np.int32)
    total = cumulative[:, -1:]
    lower = np.argmax(cumulative > (total - 1) // 2, axis=1)
    upper = np.argmax(cumulative > total // 2, axis=1)
    return (value[lower] + value[upper]) / 2
