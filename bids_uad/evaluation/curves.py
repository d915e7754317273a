"""Counts and Dice curves of a cohort, added up one image at a time."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from bids_uad.evaluation.metrics import average_precision, dice_curve, edge_index
from bids_uad.evaluation.subjects import HEALTHY, LESION, unit_role
from bids_uad.evaluation.tables import UnitScores


@dataclass
class Curves:
    """The running sums of one detector, modality and cohort.

    Its size depends on the number of score bins only, not on the number of images.

    Parameters
    ----------
    edges : numpy.ndarray
        Lower edges of the score bins, shape (n_bins,).
    threshold : float
        The fixed threshold, one of `edges`.
    lesion, nonlesion : numpy.ndarray
        Voxels per bin inside and outside the lesions of the lesion scans, int64, (n_bins,).
    healthy : numpy.ndarray
        Non-lesion voxels per bin of the healthy scans, int64, shape (n_bins,).
    dice_sum : numpy.ndarray
        Sum of the Dice at each edge over the scans with a lesion, float64, shape (n_bins,). Scans
        with an empty mask are left out: a threshold above every score would win by them.
    n_with_lesion : int
        Number of these scans.
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
        """Add one image; one that is neither healthy nor has a lesion mask adds nothing."""
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
        """Add the sums of other images of the same detector and modality."""
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
        """Highest mean Dice of any one threshold, and that threshold (NaN without lesions).

        Of several equally good thresholds the lowest is returned.
        """
        if not self.n_with_lesion:
            return float("nan"), float("nan")
        best = int(np.argmax(self.mean_dice))
        return float(self.mean_dice[best]), float(self.edges[best])

    @property
    def pooled_auprc(self) -> float:
        """Average precision over the brain voxels of all lesion scans together."""
        return average_precision(self.nonlesion, self.lesion)

    @property
    def prevalence(self) -> float:
        """Lesion share of the brain voxels of all lesion scans: the AUPRC of guessing."""
        total = self.lesion.sum() + self.nonlesion.sum()
        return float(self.lesion.sum() / total) if total else float("nan")
