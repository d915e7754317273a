"""Score histograms, and fixed thresholds computed from those of the validation scans."""

from __future__ import annotations

from typing import Any

import numpy as np

from bids_uad.errors import ModelError

FPR_LEVELS = {"fpr_1pct": 0.01, "fpr_5pct": 0.05}
"""False-positive rate in healthy brains of each threshold that is defined by it."""
MAX_MASK_FPR = 0.02
"""Largest false-positive rate in healthy brains at which ``max_dice`` is the default threshold."""
# Relative resolution 0.1 %, so that binning changes no threshold by more.
FINE_EDGES = np.concatenate([[0.0], np.geomspace(1e-8, 1e4, 27_632), [np.inf]])
FINAL_BINS = 500
"""Bins of score tables. AUPRC from these counts differs from AUPRC of the voxels by less than 1e-4 (seven
detectors, eight simulated lesion scans each), and by up to 2e-3 for bright lesions of a few hundred voxels,
which more bins do not improve."""
UNSPECIFIED = "unspecified"


class ThresholdEstimator:
    """Accumulate score histograms of validation scans in constant memory, and compute thresholds."""

    def __init__(self) -> None:
        bins = len(FINE_EDGES) - 1
        self.healthy = np.zeros(bins, dtype=np.int64)
        self.all_voxels = np.zeros(bins, dtype=np.int64)
        self.dice_sums: dict[str, np.ndarray] = {}
        self.n_lesions: dict[str, int] = {}
        self.n_healthy = 0
        self.n_empty_mask = 0

    @property
    def n_lesion(self) -> int:
        """Number of scans with lesions so far."""
        return sum(self.n_lesions.values())

    @property
    def dice_sum(self) -> np.ndarray:
        """Sum of the Dice of the scans with lesions, by bin."""
        return sum(self.dice_sums.values(), np.zeros(len(FINE_EDGES) - 1))

    def add(
        self, scores: np.ndarray, brain: np.ndarray, lesion: np.ndarray | None, kind: str = UNSPECIFIED
    ) -> None:
        """Add one anomaly map.

        Parameters
        ----------
        scores : numpy.ndarray of float
            Anomaly map.
        brain : numpy.ndarray of bool, shape of `scores`
            Brain mask.
        lesion : numpy.ndarray of bool, shape of `scores`, or None
            Lesion mask; None for a healthy control. Scans with an empty mask are counted separately and do
            not affect the thresholds, because any threshold above their highest score gives a Dice of 1.
        kind : str, default="unspecified"
            Type of the lesion.

        Raises
        ------
        ValueError
            If the brain mask is empty, or a score is NaN or infinite.
        """
        if not brain.any():
            raise ValueError("the brain mask is empty")
        rest, inside = score_counts(scores, brain, lesion, FINE_EDGES)
        self.all_voxels += rest
        if inside is None:
            self.healthy += rest
            self.n_healthy += 1
            return
        self.all_voxels += inside
        if not inside.any():
            self.n_empty_mask += 1
            return
        positive = above(inside)
        dice = 2 * positive / (positive + above(rest) + inside.sum())
        self.dice_sums[kind] = self.dice_sums.get(kind, 0) + dice
        self.n_lesions[kind] = self.n_lesions.get(kind, 0) + 1

    def thresholds(self) -> dict[str, float]:
        """Compute the fixed thresholds.

        Returns
        -------
        dict
            ``max_dice``, the edge with the highest mean Dice over scans with lesions, if there are any;
            ``fpr_1pct`` and ``fpr_5pct``, the lowest edges at which the pooled false-positive rate in healthy
            brains is at most 1 % and 5 %, if there are healthy scans.
        """
        found = {}
        if self.n_lesion:
            found["max_dice"] = float(FINE_EDGES[self.dice_sum.argmax()])
        if self.n_healthy:
            rate = above(self.healthy) / self.healthy.sum()
            for name, level in FPR_LEVELS.items():
                found[name] = float(FINE_EDGES[np.argmax(rate <= level)])
        return found

    def bin_edges(self) -> np.ndarray:
        """Compute about 500 bin edges for score tables, which include every threshold.

        Half are quantiles of all validation voxels, denser towards the highest scores, where the thresholds
        lie. Half are spaced geometrically from the 90 % quantile to twice the highest score, for lesions with
        higher scores than those of the validation scans. Edges other than thresholds have five digits.

        Returns
        -------
        numpy.ndarray of float64
            Ascending edges, from 0 to infinity.

        Raises
        ------
        ModelError
            If every score is 0.
        """
        if not self.all_voxels[1:].any():
            raise ModelError(
                "all anomaly scores of the validation scans are 0, so that no threshold can be computed; "
                "check the validation scans, or train the model again"
            )
        share = 1 - above(self.all_voxels) / self.all_voxels.sum()
        tail = 1 - np.geomspace(1, 1e-6, FINAL_BINS // 2)
        quantiles = FINE_EDGES[np.searchsorted(share, tail, side="left").clip(1, len(share) - 1)]
        top = FINE_EDGES[np.flatnonzero(self.all_voxels)[-1]]
        bottom = max(FINE_EDGES[np.searchsorted(share, 0.9)], top / 1000)
        even = np.geomspace(bottom, 2 * top, FINAL_BINS // 2)
        fixed = np.array(list(self.thresholds().values()))
        free = np.array([float(f"{edge:.5g}") for edge in np.concatenate([quantiles, even])])
        # An edge that equals a threshold up to rounding would make an empty bin.
        free = free[~np.isclose(free[:, None], fixed, rtol=1e-3, atol=0.0).any(axis=1)]
        return np.unique(np.concatenate([[0.0], free, fixed, [np.inf]]))

    def _default(self, healthy_fpr: dict[str, float]) -> str:
        """Return the name of the threshold for masks: ``max_dice`` unless its FPR exceeds `MAX_MASK_FPR`."""
        acceptable = healthy_fpr.get("max_dice", 0.0) <= MAX_MASK_FPR
        return "max_dice" if self.n_lesion and acceptable else "fpr_1pct"

    def summary(self) -> dict[str, Any]:
        """Return thresholds, their FPR and Dice, and bin edges, for ``calibration.json``."""
        found = self.thresholds()
        rate = above(self.healthy) / max(1, int(self.healthy.sum()))
        at = {name: int(np.searchsorted(FINE_EDGES, value)) for name, value in found.items()}
        healthy_fpr = {name: float(rate[k]) for name, k in at.items()} if self.n_healthy else {}
        return {
            "thresholds": found,
            "default_threshold": self._default(healthy_fpr),
            "validation": {
                "n_healthy": self.n_healthy,
                "n_lesion": self.n_lesion,
                "n_empty_mask": self.n_empty_mask,
                "healthy_fpr": healthy_fpr,
                "mean_dice": {name: float(self.dice_sum[k] / self.n_lesion) for name, k in at.items()}
                if self.n_lesion
                else {},
                "by_kind": {
                    kind: {
                        "n": self.n_lesions[kind],
                        "mean_dice": {name: float(total[k] / self.n_lesions[kind]) for name, k in at.items()},
                    }
                    for kind, total in sorted(self.dice_sums.items())
                },
            },
            # JSON has no infinity, so the last edge is left out.
            "bin_edges": self.bin_edges()[:-1].tolist(),
        }


def count_scores(scores: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Count scores per bin.

    Parameters
    ----------
    scores : numpy.ndarray, shape (N,)
        Scores, at least 0.
    edges : numpy.ndarray, shape (K + 1,)
        Ascending edges, the first 0 and the last infinity.

    Returns
    -------
    numpy.ndarray of int64, shape (K,)
        Counts of scores s with ``edges[k] < s <= edges[k + 1]``; scores of 0 are in the first bin.

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
    """Count the brain voxels of a map per score bin, separately outside and inside the lesions.

    Parameters
    ----------
    scores : numpy.ndarray of float
        Anomaly map.
    brain : numpy.ndarray of bool
        Brain mask, same shape. Only voxels inside are counted.
    lesion : numpy.ndarray of bool or None
        Lesion mask, same shape; None if there is no mask, whether or not there are lesions.
    edges : numpy.ndarray, shape (K + 1,)
        Edges as in :func:`count_scores`.

    Returns
    -------
    nonlesion : numpy.ndarray of int64, shape (K,)
        Counts outside the lesions; of all brain voxels if `lesion` is None.
    lesion : numpy.ndarray of int64, shape (K,), or None
        Counts inside the lesions.
    """
    if lesion is None:
        return count_scores(scores[brain], edges), None
    return count_scores(scores[brain & ~lesion], edges), count_scores(scores[brain & lesion], edges)


def above(counts: np.ndarray) -> np.ndarray:
    """Return the number of voxels above the lower edge of each bin.

    Parameters
    ----------
    counts : numpy.ndarray, shape (..., K)
        Voxels per bin.

    Returns
    -------
    numpy.ndarray, shape (..., K)
        Cumulative sums from the last bin.
    """
    return np.flip(np.cumsum(np.flip(counts, -1), -1), -1)
