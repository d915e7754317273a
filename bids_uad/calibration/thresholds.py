"""Score histograms, fixed thresholds computed from those of the validation scans, and the decision rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from bids_uad.errors import ModelError
from bids_uad.images import bounding_box
from bids_uad.space import VOXEL_MM3

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
CONNECTIVITY = np.ones((3, 3, 3), dtype=bool)
"""26-connectivity: voxels that share a face, an edge or a corner are connected."""
NO_HOLES, HOLES_3D, HOLES_AXIAL = FILLING = ("none", "3d", "axial")
"""Holes that a decision rule fills: none, cavities, or holes of each axial slice, which include cavities."""
RULE_THRESHOLD = "max_dice_f1"
"""Name of the threshold that is chosen together with the other parts of a decision rule."""
TIMES_P95, TIMES_MEAN = 3, 10
"""Multiples of the 95th percentile and, if that is not known, of the mean of the marked fraction of healthy
validation scans, above which a scan is reported."""
LEAST_LIMIT = 0.01
"""Marked fraction of the brain that is never reported."""


@dataclass(frozen=True)
class DecisionRule:
    """Steps from an anomaly map to the anomaly mask.

    A voxel belongs to the mask if its score exceeds `low`, and its 26-connected component of such voxels has
    at least `min_volume` and a voxel whose score exceeds `threshold` (hysteresis, Canny 1986). Holes are
    filled last. With the default values this is a plain threshold.

    Parameters
    ----------
    threshold : float
        Score that a voxel of each component exceeds. Compared in double precision, as in the score histogram.
    low : float, optional
        Score that every voxel exceeds, at most `threshold`; by default `threshold`.
    min_volume : float, default=0
        Minimum volume of a component in mm3, before holes are filled.
    holes : {"none", "3d", "axial"}, default="none"
        Holes that are filled.

    Raises
    ------
    ValueError
        If `low` exceeds `threshold`, `min_volume` is negative, or `holes` has another value.
    """

    threshold: float
    low: float | None = None
    min_volume: float = 0.0
    holes: str = NO_HOLES

    def __post_init__(self) -> None:
        if self.low is None:
            object.__setattr__(self, "low", self.threshold)
        if not self.low <= self.threshold:
            raise ValueError(f"the low threshold {self.low:g} exceeds the threshold {self.threshold:g}")
        if not self.min_volume >= 0:
            raise ValueError(f"min_volume must be at least 0, got {self.min_volume}")
        if self.holes not in FILLING:
            raise ValueError(f"holes must be one of {', '.join(FILLING)}, got {self.holes!r}")

    @classmethod
    def read(cls, threshold: float, entries: Mapping[str, Any]) -> DecisionRule:
        """Create a rule from its threshold and the other entries of :meth:`entries`."""
        return cls(threshold, entries["low_threshold"], entries["min_volume_mm3"], entries["holes"])

    def entries(self) -> dict[str, Any]:
        """Return all parts but the threshold, for ``calibration.json``."""
        return {"low_threshold": self.low, "min_volume_mm3": self.min_volume, "holes": self.holes}

    @property
    def is_plain(self) -> bool:
        """Whether the rule is a plain threshold."""
        return self.low == self.threshold and self.min_volume == 0 and self.holes == NO_HOLES

    def mask(self, scores: np.ndarray, brain: np.ndarray) -> np.ndarray:
        """Apply the rule to an anomaly map.

        Parameters
        ----------
        scores : numpy.ndarray of float32, shape (x, y, z)
            Anomaly scores on a grid of 1 mm; the last axis is perpendicular to axial slices.
        brain : numpy.ndarray of bool, same shape
            Brain mask. Voxels outside never belong to the anomaly mask.

        Returns
        -------
        numpy.ndarray of bool
            Anomaly mask.
        """
        mask = (scores > np.float64(self.low)) & brain
        if self.is_plain or not mask.any():
            return mask
        box = bounding_box(mask)
        labels, count = ndimage.label(mask[box], structure=CONNECTIVITY)
        kept = np.zeros(count + 1, dtype=bool)
        kept[labels[scores[box] > np.float64(self.threshold)]] = True
        sizes = np.bincount(labels.ravel(), minlength=count + 1)
        kept &= reaches_volume(sizes, self.min_volume)
        kept[0] = False
        mask[box] = fill_holes(kept[labels], self.holes) & brain[box]
        return mask


def reaches_volume(sizes: np.ndarray, min_volume: float) -> np.ndarray:
    """Return which components reach a minimum volume, given their numbers of voxels of 1 mm3.

    The tolerance allows for rounding, since the minimum need not be a multiple of the voxel volume.
    """
    return sizes * VOXEL_MM3 >= min_volume * (1 - 1e-9)


def fill_holes(mask: np.ndarray, holes: str) -> np.ndarray:
    """Fill the holes of a mask.

    Parameters
    ----------
    mask : numpy.ndarray of bool, shape (x, y, z)
        Mask.
    holes : {"none", "3d", "axial"}
        Whether to fill nothing, background that no path of face neighbours connects to the border of the
        volume, or background for which this holds within its axial slice.

    Returns
    -------
    numpy.ndarray of bool
        `mask` and its holes.
    """
    if holes == NO_HOLES:
        return mask
    structure = ndimage.generate_binary_structure(3, 1)
    margin = [(1, 1)] * 3
    if holes == HOLES_AXIAL:
        structure[:, :, [0, 2]] = False
        margin[2] = (0, 0)
    # Labels, since scipy's binary_fill_holes takes seconds for a volume.
    labels, count = ndimage.label(np.pad(~mask, margin, constant_values=True), structure=structure)
    # The margin of each slice (of the volume) is one component with the background around the mask.
    outside = np.zeros(count + 1, dtype=bool)
    outside[labels[0, 0]] = True
    inner = tuple(slice(before, before + size) for (before, _), size in zip(margin, mask.shape, strict=True))
    return ~outside[labels[inner]]


@dataclass(frozen=True)
class HealthyMarked:
    """Fraction of the brain that a model marks in the healthy scans of its validation data.

    Parameters
    ----------
    mean, p95 : float, optional
        Mean and 95th percentile over scans; None if the model bundle does not state it.
    """

    mean: float | None = None
    p95: float | None = None

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> HealthyMarked:
        """Read the columns `healthy_mean` and `healthy_p95` of a metrics table; both may be missing."""
        values = (row.get(name) for name in ("healthy_mean", "healthy_p95"))
        known = (None if value in (None, "n/a") else float(value) for value in values)
        return cls(*(None if value is None or np.isnan(value) else value for value in known))

    def columns(self) -> dict[str, float | None]:
        """Return the columns of a metrics table."""
        return {"healthy_mean": self.mean, "healthy_p95": self.p95}

    @property
    def limit(self) -> float | None:
        """Marked fraction above which a scan is reported; None if nothing is known of healthy scans."""
        if self.p95 is not None:
            return max(TIMES_P95 * self.p95, LEAST_LIMIT)
        return None if self.mean is None else max(TIMES_MEAN * self.mean, LEAST_LIMIT)

    def warning(self, marked: float, name: str) -> str:
        """Describe a marked fraction far above that of healthy scans.

        Parameters
        ----------
        marked : float
            Marked fraction of the brain; may be NaN.
        name : str
            Name of the detector.

        Returns
        -------
        str
            One or two sentences; empty if the fraction is at most `limit`, or that is not known.
        """
        if self.limit is None or not marked > self.limit:
            return ""
        usual = "on average" if self.p95 is None else "or less in 95 % of them"
        return (
            f"{name} marks {100 * marked:.2g} % of the brain, but in healthy validation scans "
            f"{100 * (self.mean if self.p95 is None else self.p95):.2g} % {usual}: either the lesion is "
            "large, or the threshold does not hold for this scan."
        )


class ThresholdEstimator:
    """Accumulate score histograms of validation scans, and compute thresholds.

    Memory grows by 0.1 MB per healthy scan.
    """

    def __init__(self) -> None:
        bins = len(FINE_EDGES) - 1
        self.healthy = np.zeros(bins, dtype=np.int64)
        self._of_healthy: list[np.ndarray] = []
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
        self.add_counts(*score_counts(scores, brain, lesion, FINE_EDGES), kind)

    def add_counts(self, rest: np.ndarray, inside: np.ndarray | None, kind: str = UNSPECIFIED) -> None:
        """Add the score histogram of one anomaly map over the bins of `FINE_EDGES`.

        Parameters
        ----------
        rest, inside : numpy.ndarray of int64, shape (bins,)
            Brain voxels outside and inside the lesions, as :func:`score_counts` returns them; `inside` is
            None for a healthy control.
        kind : str, default="unspecified"
            Type of the lesion.
        """
        self.all_voxels += rest
        if inside is None:
            self.healthy += rest
            self._of_healthy.append((above(rest) / rest.sum()).astype(np.float32))
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

    def bin_edges(self, rule: DecisionRule | None = None) -> np.ndarray:
        """Compute about 500 bin edges for score tables, which include every threshold.

        Half are quantiles of all validation voxels, denser towards the highest scores, where the thresholds
        lie. Half are spaced geometrically from the 90 % quantile to twice the highest score, for lesions with
        higher scores than those of the validation scans. Edges other than thresholds have five digits.

        Parameters
        ----------
        rule : DecisionRule, optional
            Rule with two further thresholds.

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
        chosen = () if rule is None else (rule.low, rule.threshold)
        fixed = np.array([*self.thresholds().values(), *chosen])
        free = np.array([float(f"{edge:.5g}") for edge in np.concatenate([quantiles, even])])
        # An edge that equals a threshold up to rounding would make an empty bin.
        free = free[~np.isclose(free[:, None], fixed, rtol=1e-3, atol=0.0).any(axis=1)]
        return np.unique(np.concatenate([[0.0], free, fixed, [np.inf]]))

    def _default(self, healthy_fpr: dict[str, float]) -> str:
        """Return the name of the threshold for masks: ``max_dice`` unless its FPR exceeds `MAX_MASK_FPR`."""
        acceptable = healthy_fpr.get("max_dice", 0.0) <= MAX_MASK_FPR
        return "max_dice" if self.n_lesion and acceptable else "fpr_1pct"

    def summary(self, rule: DecisionRule | None = None) -> dict[str, Any]:
        """Return thresholds, their FPR and Dice, and bin edges, for ``calibration.json``.

        Parameters
        ----------
        rule : DecisionRule, optional
            Rule that was chosen for the masks; a plain threshold is the default.

        Returns
        -------
        dict
            Entries of ``calibration.json``; FPR and Dice are those of plain thresholds.
        """
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
                "healthy_p95": {
                    name: float(np.percentile([rates[k] for rates in self._of_healthy], 95))
                    for name, k in at.items()
                    if self.n_healthy
                },
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
            "bin_edges": self.bin_edges(rule)[:-1].tolist(),
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
