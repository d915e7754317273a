"""Segmentation metrics computed from score histograms.

A histogram counts the lesion voxels and the other brain voxels of an image in bins between fixed, increasing
edges. Bin k covers the scores in (edges[k], edges[k+1]]; the first bin includes edges[0], and the last bin
has no upper edge. For a threshold t that is an edge, the number of positive voxels (`score > t`) is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import digamma

_EDGE_RTOL = 1e-5
"""Relative tolerance for a threshold, which may have fewer digits in a text table than the edge."""


@dataclass(frozen=True)
class Confusion:
    """Confusion matrix of the brain voxels of one image.

    Parameters
    ----------
    true_positive, false_positive, false_negative, true_negative : int
        Number of voxels of each kind.
    """

    true_positive: int
    false_positive: int
    false_negative: int
    true_negative: int

    @property
    def both_empty(self) -> bool:
        """Whether both the lesion mask and the anomaly mask are empty."""
        return self.true_positive + self.false_positive + self.false_negative == 0

    @property
    def truth_empty(self) -> bool:
        """Whether the lesion mask is empty."""
        return self.true_positive + self.false_negative == 0

    @property
    def dice(self) -> float:
        """Dice coefficient 2 |P and T| / (|P| + |T|) of prediction P and truth T; 1 if both are empty."""
        if self.both_empty:
            return 1.0
        doubled = 2 * self.true_positive
        return doubled / (doubled + self.false_positive + self.false_negative)

    @property
    def sensitivity(self) -> float:
        """True-positive fraction of the lesion voxels; NaN without lesion voxels."""
        return _ratio(self.true_positive, self.true_positive + self.false_negative)

    @property
    def precision(self) -> float:
        """True-positive fraction of the positive voxels; NaN without positive voxels."""
        return _ratio(self.true_positive, self.true_positive + self.false_positive)

    @property
    def false_positive_rate(self) -> float:
        """False-positive fraction of the non-lesion voxels; NaN without non-lesion voxels."""
        return _ratio(self.false_positive, self.false_positive + self.true_negative)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


def lesion_wise(n_lesions: float, n_detected: float, n_false: float) -> dict[str, float]:
    """Compute lesion-wise sensitivity, precision and F1 score.

    Parameters
    ----------
    n_lesions : float
        Number of lesions.
    n_detected : float
        Number of lesions that overlap with the anomaly mask (true positives).
    n_false : float
        Number of components of the anomaly mask that overlap with no lesion (false positives).

    Returns
    -------
    dict
        `lesion_sensitivity`, `lesion_precision` and `lesion_f1`; NaN if the denominator is 0 or a count is
        NaN.

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
    """Return the index of the bin edge that equals a threshold.

    Parameters
    ----------
    edges : numpy.ndarray
        Lower bin edges, increasing, shape (n_bins,).
    threshold : float
        Threshold on the same scale.

    Returns
    -------
    int
        Index k with `edges[k]` equal to `threshold`, up to rounding in a text table.

    Raises
    ------
    ValueError
        If the threshold is between two edges, where the number of positive voxels is not known.
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
        Voxels in bin k and all higher bins, shape (n_bins,).
    """
    return np.cumsum(counts[::-1])[::-1]


def confusion(n_nonlesion: np.ndarray, n_lesion: np.ndarray, edge: int) -> Confusion:
    """Compute the confusion matrix at the threshold `edges[edge]`.

    Parameters
    ----------
    n_nonlesion, n_lesion : numpy.ndarray
        Voxels per bin, shape (n_bins,).
    edge : int
        Index of the threshold among the lower bin edges.

    Returns
    -------
    Confusion
        Numbers of true and false positives and negatives.
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
        Dice coefficients, float64, shape (n_bins,); 1 without lesion and positive voxels.
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
        float64, shape (n_bins,), from the lowest threshold to the highest. Precision is NaN without positive
        voxels, recall without lesion voxels.
    """
    true_positive = counts_above(n_lesion).astype(np.float64)
    found = true_positive + counts_above(n_nonlesion)
    total = float(n_lesion.sum())
    precision = np.full_like(true_positive, np.nan)
    np.divide(true_positive, found, out=precision, where=found > 0)
    recall = true_positive / total if total else np.full_like(true_positive, np.nan)
    return precision, recall


def average_precision(n_nonlesion: np.ndarray, n_lesion: np.ndarray) -> float:
    """Compute the area under the precision-recall curve (average precision).

    The sum over thresholds of (increase in recall) x (precision), without interpolation, as defined by
    scikit-learn's `average_precision_score`. The order of the scores within a bin is not known, so the
    expectation over all orders is computed in closed form (McSherry and Najork 2008, Computing information
    retrieval performance measures efficiently in the presence of tied scores). The scores of the first bin
    are all zero and are treated as tied.

    Parameters
    ----------
    n_nonlesion, n_lesion : numpy.ndarray
        Voxels per bin, shape (n_bins,).

    Returns
    -------
    float
        Average precision from 0 to 1; NaN without lesion voxels.
    """
    total = int(n_lesion.sum())
    if total == 0:
        return float("nan")
    tied = n_lesion[0] * (total / (total + int(n_nonlesion.sum())))
    # In a bin with n voxels, k of them lesion, the voxel at rank r is a lesion voxel with probability k / n,
    # preceded by (r - 1) (k - 1) / (n - 1) lesion voxels of the bin on average. The precision at this rank is
    # the number of lesion voxels up to it, divided by the number of voxels up to it.
    inside = np.flatnonzero(n_lesion[1:]) + 1
    lesion, size = n_lesion[inside].astype(np.float64), (n_lesion + n_nonlesion)[inside].astype(np.float64)
    lesion_before = counts_above(n_lesion)[inside] - lesion
    before = lesion_before + counts_above(n_nonlesion)[inside] - n_nonlesion[inside]
    step = (lesion - 1) / np.maximum(size - 1, 1)
    harmonic = digamma(before + size + 1) - digamma(before + 1)
    gains = lesion / size * (step * size + (lesion_before + 1 - step * (before + 1)) * harmonic)
    return float((tied + gains.sum()) / total)
