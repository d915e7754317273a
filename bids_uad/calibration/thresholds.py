"""Fixed thresholds from validation scans, streamed over volumes."""

from __future__ import annotations

from typing import Any

import numpy as np

from bids_uad.errors import ModelError

FPR_LEVELS = {"fpr_1pct": 0.01, "fpr_5pct": 0.05}
TOLERABLE_FPR = 0.02  # of healthy brain voxels, at the threshold that makes masks
# Relative resolution 0.1 %, fine enough that no threshold is moved by binning.
FINE_EDGES = np.concatenate([[0.0], np.geomspace(1e-8, 1e4, 27_632), [np.inf]])
FINAL_BINS = 500
"""With these, AUPRC from counts is that of the voxels within 1e-4 (seven detectors, eight simulated lesion
scans each). More bins do not help lesions of a few hundred voxels that stand out (2e-3), since the median
filter repeats scores."""
UNSPECIFIED = "unspecified"


class ThresholdEstimator:
    """Collects score histograms of validation volumes and derives thresholds from them.

    Memory does not grow with the number of volumes.
    """

    def __init__(self) -> None:
        bins = len(FINE_EDGES) - 1
        self.healthy = np.zeros(bins, dtype=np.int64)
        self.everything = np.zeros(bins, dtype=np.int64)
        self.dice_sums: dict[str, np.ndarray] = {}
        self.n_lesions: dict[str, int] = {}
        self.n_healthy = 0
        self.n_empty_mask = 0

    @property
    def n_lesion(self) -> int:
        """Volumes with lesions so far."""
        return sum(self.n_lesions.values())

    @property
    def dice_sum(self) -> np.ndarray:
        """Sum of their Dice by bin."""
        return sum(self.dice_sums.values(), np.zeros(len(FINE_EDGES) - 1))

    def add(
        self, scores: np.ndarray, brain: np.ndarray, lesion: np.ndarray | None, kind: str = UNSPECIFIED
    ) -> None:
        """Take in one map.

        Parameters
        ----------
        scores : numpy.ndarray of float
        brain : numpy.ndarray of bool
        lesion : numpy.ndarray of bool or None
            None for the scan of a healthy control. A scan without a lesion voxel in the brain that is not
            of a control is counted apart and has no part in the thresholds: at any threshold above its
            highest score its Dice would be 1.
        kind : str
            Of the lesion.

        Raises
        ------
        ValueError
            If the brain mask is empty, or a score is NaN or infinite.
        """
        if not brain.any():
            raise ValueError("the brain mask is empty")
        rest, inside = score_counts(scores, brain, lesion, FINE_EDGES)
        self.everything += rest
        if inside is None:
            self.healthy += rest
            self.n_healthy += 1
            return
        self.everything += inside
        if not inside.any():
            self.n_empty_mask += 1
            return
        positive = above(inside)
        dice = 2 * positive / (positive + above(rest) + inside.sum())
        self.dice_sums[kind] = self.dice_sums.get(kind, 0) + dice
        self.n_lesions[kind] = self.n_lesions.get(kind, 0) + 1

    def thresholds(self) -> dict[str, float]:
        """Fixed thresholds.

        Returns
        -------
        dict
            ``max_dice``, the edge with the highest mean Dice over lesion volumes (if there are any);
            ``fpr_1pct`` and ``fpr_5pct``, the lowest edges whose pooled false-positive rate in healthy brains
            is at most that (if there are healthy volumes).
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
        """About five hundred edges for score tables, every threshold among them.

        Half follow the quantiles of all validation voxels, crowding towards the top, where thresholds
        live; half grow evenly in ratio from the highest tenth to twice the highest score, for lesions
        brighter than any seen. All but thresholds have five digits, for they fill most of a table.

        Returns
        -------
        numpy.ndarray of float64
            From 0 to infinity.

        Raises
        ------
        ModelError
            If every score is 0.
        """
        if not self.everything[1:].any():
            raise ModelError(
                "every anomaly score of the validation scans is 0, so that no threshold can be fixed; train "
                "the model again, or check the validation scans"
            )
        share = 1 - above(self.everything) / self.everything.sum()
        tail = 1 - np.geomspace(1, 1e-6, FINAL_BINS // 2)
        quantiles = FINE_EDGES[np.searchsorted(share, tail, side="left").clip(1, len(share) - 1)]
        top = FINE_EDGES[np.flatnonzero(self.everything)[-1]]
        bottom = max(FINE_EDGES[np.searchsorted(share, 0.9)], top / 1000)
        even = np.geomspace(bottom, 2 * top, FINAL_BINS // 2)
        fixed = np.array(list(self.thresholds().values()))
        free = np.array([float(f"{edge:.5g}") for edge in np.concatenate([quantiles, even])])
        # One that differs from a threshold by its digits only would make a bin of nothing.
        free = free[~np.isclose(free[:, None], fixed, rtol=1e-3, atol=0.0).any(axis=1)]
        return np.unique(np.concatenate([[0.0], free, fixed, [np.inf]]))

    def _default(self, healthy_fpr: dict[str, float]) -> str:
        """Name of the threshold that makes masks: the best Dice, unless it floods healthy brains."""
        tolerable = healthy_fpr.get("max_dice", 0.0) <= TOLERABLE_FPR
        return "max_dice" if self.n_lesion and tolerable else "fpr_1pct"

    def summary(self) -> dict[str, Any]:
        """Thresholds with the evidence they rest on, for ``calibration.json``."""
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
            # JSON has no infinity: the last bin's upper edge is understood.
            "bin_edges": self.bin_edges()[:-1].tolist(),
        }


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
