"""Score histograms over fixed bins.

Bin k holds scores in (edges[k], edges[k + 1]]; the first also holds edges[0] = 0 and the last is open
upwards. So the voxels above an edge are exactly the sum of the bins from it on, and every threshold that is
an edge can be evaluated from counts alone.
"""

from __future__ import annotations

import numpy as np


def count_scores(scores: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Count scores per bin.

    Parameters
    ----------
    scores : numpy.ndarray, shape (N,)
        Non-negative.
    edges : numpy.ndarray, shape (K + 1,)
        Ascending, ``edges[0] == 0``, ``edges[-1] == inf``.

    Returns
    -------
    numpy.ndarray of int64, shape (K,)

    Raises
    ------
    ValueError
        If a score is NaN or infinite.
    """
    if not np.isfinite(scores).all():
        raise ValueError("NaN or infinite scores cannot be counted")
    index = np.searchsorted(edges[:-1], scores.astype(np.float64, copy=False), side="left") - 1
    return np.bincount(np.maximum(index, 0), minlength=len(edges) - 1)


def score_counts(
    scores: np.ndarray, brain: np.ndarray, lesion: np.ndarray | None, edges: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None]:
    """Count the brain voxels of a map per score bin, lesion and rest apart.

    Parameters
    ----------
    scores : numpy.ndarray of float
        Anomaly map.
    brain : numpy.ndarray of bool
        Same shape. Voxels outside do not count, lesion or not.
    lesion : numpy.ndarray of bool or None
        Same shape; None when there is no mask, which does not mean there is no lesion.
    edges : numpy.ndarray, shape (K + 1,)

    Returns
    -------
    nonlesion : numpy.ndarray of int64, shape (K,)
        All brain voxels when `lesion` is None.
    lesion : numpy.ndarray of int64, shape (K,), or None
    """
    if lesion is None:
        return count_scores(scores[brain], edges), None
    return count_scores(scores[brain & ~lesion], edges), count_scores(scores[brain & lesion], edges)


def above(counts: np.ndarray) -> np.ndarray:
    """Voxels above each bin's lower edge: the reverse cumulative sum along the last axis."""
    return np.flip(np.cumsum(np.flip(counts, -1), -1), -1)
