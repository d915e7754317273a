"""Percentile bootstrap over people, not over images."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Literal

import numpy as np

N_RESAMPLES = 2000
CONFIDENCE = 0.95
MIN_SUBJECTS = 3
# Resamples are drawn in blocks, so that memory does not grow with their number times the images.
_BLOCK = 2_000_000

Interval = tuple[float, float]


def bootstrap_interval(
    values: Sequence[float],
    subjects: Sequence[str],
    *,
    seed: int,
    key: str,
    statistic: Literal["mean", "median"] = "mean",
    weights: Sequence[float] | None = None,
    n_resamples: int = N_RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Compute a percentile bootstrap confidence interval by resampling subjects.

    A subject is drawn with all its images: two sessions of one person are not two people.

    Parameters
    ----------
    values : sequence of float
        One number per image; images with NaN are left out.
    subjects : sequence of str
        The subject of each image.
    seed : int
        Seed of the whole run.
    key : str
        Name of this number. Each has its own random stream, so that adding a detector does not
        change the intervals of the others.
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
        NaN, NaN with fewer than `MIN_SUBJECTS` subjects, of which no interval can be made.
    """
    value = np.asarray(values, dtype=np.float64)
    weight = np.ones_like(value) if weights is None else np.asarray(weights, dtype=np.float64)
    kept = np.isfinite(value) & (weight > 0)
    value, weight = value[kept], weight[kept]
    names = np.asarray(subjects, dtype=object)[kept].astype(str)
    labels, cluster = np.unique(names, return_inverse=True)
    if len(labels) < MIN_SUBJECTS:
        return float("nan"), float("nan")

    order = np.argsort(value, kind="stable")
    value, weight, cluster = value[order], weight[order], cluster[order]
    generator = np.random.default_rng([seed, zlib.crc32(key.encode())])
    chance = np.full(len(labels), 1 / len(labels))
    block = max(1, _BLOCK // len(value))
    statistics = []
    for start in range(0, n_resamples, block):
        size = min(block, n_resamples - start)
        drawn = generator.multinomial(len(labels), chance, size=size)[:, cluster]
        if statistic == "mean":
            statistics.append((drawn @ (value * weight)) / (drawn @ weight))
        else:
            statistics.append(_median_of_repeats(value, drawn))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(statistics), [tail, 1 - tail])
    return float(low), float(high)


def _median_of_repeats(value: np.ndarray, repeats: np.ndarray) -> np.ndarray:
    """Median of sorted `value` (n,), each taken `repeats` (b, n) times, for each of the b rows."""
    cumulative = np.cumsum(repeats, axis=1)
    total = cumulative[:, -1:]
    lower = np.argmax(cumulative > (total - 1) // 2, axis=1)
    upper = np.argmax(cumulative > total // 2, axis=1)
    return (value[lower] + value[upper]) / 2
