"""Score histograms and Dice curves of a cohort, accumulated image by image."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from bids_uad.evaluation.metrics import average_precision, dice_curve, edge_index
from bids_uad.evaluation.subjects import HEALTHY, LESION, unit_role
from bids_uad.evaluation.tables import UnitScores


@dataclass
class Curves:
    """Sums over the images of one detector, modality and cohort.

    The size depends on the number of score bins, not on the number of images.

    Parameters
    ----------
    edges : numpy.ndarray
        Lower edges of the score bins, shape (n_bins,).
    threshold : float
        Fixed threshold, one of `edges`.
    n_with_lesion : int, default=0
        Number of scans with a lesion.

    Attributes
    ----------
    lesion, nonlesion : numpy.ndarray
        Voxels per bin inside and outside the lesions of the lesion scans, int64, (n_bins,).
    healthy : numpy.ndarray
        Non-lesion voxels per bin of the healthy scans, int64, shape (n_bins,).
    dice_sum : numpy.ndarray
        Sum of the Dice at each edge over the scans with a lesion, float64, shape (n_bins,). Scans with an
        empty lesion mask are left out, since they would favour a threshold above all scores.
    """

    edges: np.ndarray
    threshold: float
    lesion: np.ndarray = field(init=False)
    nonlesion: np.ndarray = field(init=False)
    healthy: np.ndarray = field(init=False)
    dice_sum: np.ndarray = field(init=False)
    n_with_lesion: int = 0

    def __post_init__(self) -> None:
        n_bins = len(self.edges)
        self.lesion = np.zeros(n_bins, np.int64)
        self.nonlesion = np.zeros(n_bins, np.int64)
        self.healthy = np.zeros(n_bins, np.int64)
        self.dice_sum = np.zeros(n_bins, np.float64)

    def add(self, unit: UnitScores) -> None:
        """Add an image; images in the role `missing_mask` are ignored."""
        role = unit_role(unit)
        if role == HEALTHY:
            self.healthy += unit.n_nonlesion
        elif role == LESION:
            self.lesion += unit.n_lesion
            self.nonlesion += unit.n_nonlesion
            if unit.n_lesion.any():
                self.dice_sum += dice_curve(unit.n_nonlesion, unit.n_lesion)
                self.n_with_lesion += 1

    def include(self, other: Curves) -> None:
        """Add the sums of another set of images of the same detector and modality."""
        self.lesion += other.lesion
        self.nonlesion += other.nonlesion
        self.healthy += other.healthy
        self.dice_sum += other.dice_sum
        self.n_with_lesion += other.n_with_lesion

    @property
    def threshold_edge(self) -> int:
        """Index of the fixed threshold among the edges."""
        return edge_index(self.edges, self.threshold)

    @property
    def mean_dice(self) -> np.ndarray:
        """Mean Dice at each edge over the scans with a lesion; NaN without any."""
        if not self.n_with_lesion:
            return np.full(len(self.edges), np.nan)
        return self.dice_sum / self.n_with_lesion

    @property
    def optimal(self) -> tuple[float, float]:
        """Highest mean Dice of a single threshold, and the lowest such threshold; NaN without lesions."""
        if not self.n_with_lesion:
            return float("nan"), float("nan")
        best = int(np.argmax(self.mean_dice))
        return float(self.mean_dice[best]), float(self.edges[best])

    @property
    def pooled_auprc(self) -> float:
        """Average precision over the pooled brain voxels of all lesion scans."""
        return average_precision(self.nonlesion, self.lesion)

    @property
    def prevalence(self) -> float:
        """Fraction of lesion voxels in the brain voxels of all lesion scans: the AUPRC of random scores."""
        total = self.lesion.sum() + self.nonlesion.sum()
        return float(self.lesion.sum() / total) if total else float("nan")
