"""Segmentation metrics computed from counts of voxels per score bin.

A volume is described by how many of its brain voxels, lesion and non-lesion apart, fall into each
bin of a fixed, increasing grid of edges. Bin k holds the scores in (edges[k], edges[k+1]], the
first one also edges[0], the last one has no upper end. Whether a voxel is positive, `score > t`,
is then decided exactly for every t that is an edge, and every such threshold costs one sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import digamma

# Tables are text: a threshold may come back with fewer digits than the edge it was taken from.
_EDGE_RTOL = 1e-5


@dataclass(frozen=True)
class Confusion:
    """Voxels of one volume, sorted by prediction and truth."""

    true_positive: int
    false_positive: int
    false_negative: int
    true_negative: int

    @property
    def both_empty(self) -> bool:
        """No lesion and nothing found."""
        return self.true_positive + self.false_positive + self.false_negative == 0

    @property
    def truth_empty(self) -> bool:
        """Whether there is no lesion voxel."""
        return self.true_positive + self.false_negative == 0

    @property
    def dice(self) -> float:
        """2 |P and T| / (|P| + |T|); 1 when both are empty."""
        if self.both_empty:
            return 1.0
        doubled = 2 * self.true_positive
        return doubled / (doubled + self.false_positive + self.false_negative)

    @property
    def sensitivity(self) -> float:
        """Found share of the lesion voxels; NaN without any."""
        return _ratio(self.true_positive, self.true_positive + self.false_negative)

    @property
    def precision(self) -> float:
        """Lesion share of the voxels found; NaN when nothing is found."""
        return _ratio(self.true_positive, self.true_positive + self.false_positive)

    @property
    def false_positive_rate(self) -> float:
        """Share of the non-lesion brain voxels that is called anomalous; NaN without any."""
        return _ratio(self.false_positive, self.false_positive + self.true_negative)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


def lesion_wise(n_lesions: float, n_detected: float, n_false: float) -> dict[str, float]:
    """Compute sensitivity, precision and F1 of counted lesions.

    Parameters
    ----------
    n_lesions : float
        Lesions of the truth.
    n_detected : float
        Those that the prediction touches: the true positives.
    n_false : float
        Predicted components that touch no lesion: the false positives.

    Returns
    -------
    dict
        `lesion_sensitivity`, `lesion_precision` and `lesion_f1`; NaN where the denominator is 0, or a count
        is not known.

    Examples
    --------
    >>> lesion_wise(4, 2, 1)
    {'lesion_sensitivity': 0.5, 'lesion_precision': 0.6666666666666666, 'lesion_f1': 0.5714285714285714}
    """
    return {
        "lesion_sensitivity": _ratio(n_detected, n_lesions),
        "lesion_precision": _ratio(n_detected, n_detected + n_false),
        "lesion_f1": _ratio(2 * n_detected, n_lesions + n_detected + n_false),
    }


def edge_index(edges: np.ndarray, threshold: float) -> int:
    """Find the bin edge that a threshold is.

    Parameters
    ----------
    edges : numpy.ndarray
        Lower bin edges, increasing, shape (n_bins,).
    threshold : float
        A threshold on the same scale.

    Returns
    -------
    int
        k with `edges[k]` equal to `threshold` up to the digits of a text table.

    Raises
    ------
    ValueError
        If the threshold lies between two edges: counts per bin then cannot answer.
    """
    nearest = int(np.argmin(np.abs(edges - threshold)))
    if abs(edges[nearest] - threshold) > _EDGE_RTOL * abs(threshold):
        raise ValueError(f"threshold {threshold:g} is not one of the score bin edges")
    return nearest


def counts_above(counts: np.ndarray) -> np.ndarray:
    """Count the voxels with a score above each edge.

    Parameters
    ----------
    counts : numpy.ndarray
        Voxels per bin, shape (n_bins,).

    Returns
    -------
    numpy.ndarray
        Voxels in bin k and all higher ones, shape (n_bins,).
    """
    return np.cumsum(counts[::-1])[::-1]


def confusion(n_nonlesion: np.ndarray, n_lesion: np.ndarray, edge: int) -> Confusion:
    """Sort the voxels of a volume by `score > edges[edge]` and truth.

    Parameters
    ----------
    n_nonlesion, n_lesion : numpy.ndarray
        Voxels per bin, shape (n_bins,).
    edge : int
        Index of the threshold among the lower bin edges.

    Returns
    -------
    Confusion
        The four counts.
    """
    true_positive = int(n_lesion[edge:].sum())
    false_positive = int(n_nonlesion[edge:].sum())
    return Confusion(
        true_positive=true_positive,
        false_positive=false_positive,
        false_negative=int(n_lesion.sum()) - true_positive,
        true_negative=int(n_nonlesion.sum()) - false_positive,
    )


def dice_curve(n_nonlesion: np.ndarray, n_lesion: np.ndarray) -> np.ndarray:
    """Compute the Dice coefficient at every edge.

    Parameters
    ----------
    n_nonlesion, n_lesion : numpy.ndarray
        Voxels per bin, shape (n_bins,).

    Returns
    -------
    numpy.ndarray
        float64, shape (n_bins,); 1 where nothing is lesion and nothing is found.
    """
    true_positive = counts_above(n_lesion).astype(np.float64)
    denominator = true_positive + counts_above(n_nonlesion) + float(n_lesion.sum())
    dice = np.ones_like(true_positive)
    np.divide(2 * true_positive, denominator, out=dice, where=denominator > 0)
    return dice


def precision_recall(n_nonlesion: np.ndarray, n_lesion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute precision and recall at every edge.

    Parameters
    ----------
    n_nonlesion, n_lesion : numpy.ndarray
        Voxels per bin, shape (n_bins,).

    Returns
    -------
    precision, recall : numpy.ndarray
        float64, shape (n_bins,), from the lowest threshold to the highest. Precision is NaN where
        nothing is found; recall is NaN everywhere when there is no lesion voxel.
    """
    true_positive = counts_above(n_lesion).astype(np.float64)
    found = true_positive + counts_above(n_nonlesion)
    total = float(n_lesion.sum())
    precision = np.full_like(true_positive, np.nan)
    np.divide(true_positive, found, out=precision, where=found > 0)
    recall = true_positive / total if total else np.full_like(true_positive, np.nan)
    return precision, recall


def average_precision(n_nonlesion: np.ndarray, n_lesion: np.ndarray) -> float:
    """Compute the area under the precision-recall curve.

    The sum over thresholds of (gain in recall) x (precision), without interpolation, as
    scikit-learn's `average_precision_score` defines it. How the voxels of a bin follow each other is not
    known; the sum is the mean over all orders, in closed form (McSherry and Najork 2008, Computing
    information retrieval performance measures efficiently in the presence of tied scores). The first
    bin holds the zeros, which are equal indeed.

    Parameters
    ----------
    n_nonlesion, n_lesion : numpy.ndarray
        Voxels per bin, shape (n_bins,).

    Returns
    -------
    float
        In [0, 1]; NaN when there is no lesion voxel.
    """
    total = int(n_lesion.sum())
    if total == 0:
        return float("nan")
    tied = n_lesion[0] * (total / (total + int(n_nonlesion.sum())))
    # Place r of a bin with n voxels, k of them lesion, holds one with chance k / n, on average behind
    # (r - 1) (k - 1) / (n - 1) others of this bin; precision is (lesion voxels so far) / (voxels so far).
    inside = np.flatnonzero(n_lesion[1:]) + 1
    lesion, size = n_lesion[inside].astype(np.float64), (n_lesion + n_nonlesion)[inside].astype(np.float64)
    lesion_before = counts_above(n_lesion)[inside] - lesion
    before = lesion_before + counts_above(n_nonlesion)[inside] - n_nonlesion[inside]
    step = (lesion - 1) / np.maximum(size - 1, 1)
    harmonic = digamma(before + size + 1) - digamma(before + 1)
    gains = lesion / size * (step * size + (lesion_before + 1 - step * (before + 1)) * harmonic)
    return float((tied + gains.sum()) / total)
