"""Thresholds on deviations from a normative reference, with leave-one-out for its healthy controls.

Healthy controls are scored against the reference of the other controls, scans with lesions against the whole
reference. Further controls can be added to the reference only. Deviations can be computed only after all maps
were added, so the maps are kept on disk in the meantime and memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np

from bids_uad.calibration.normative import HealthyCohort, NormativeEstimator, NormativeReference
from bids_uad.calibration.thresholds import ThresholdEstimator


@dataclass(frozen=True)
class _StoredMap:
    """An anomaly map on disk."""

    subject: str
    person: Mapping[str, float | None]
    kind: str
    healthy: bool
    path: Path

    def load(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        with np.load(self.path) as file:
            shape = tuple(file["shape"])
            brain = np.unpackbits(file["brain"], count=int(np.prod(shape))).astype(bool).reshape(shape)
            scores = np.zeros(shape, dtype=np.float32)
            scores[brain] = file["scores"]
            if self.healthy:
                return scores, brain, None
            lesion = np.unpackbits(file["lesion"], count=brain.size).astype(bool).reshape(shape)
            return scores, brain, lesion


@dataclass
class DeviationCalibrator:
    """Fit a normative reference on healthy maps, and thresholds on the deviations of all maps from it.

    Parameters
    ----------
    cohort : HealthyCohort
        Ages and sexes of all healthy controls that will be added.
    folder : pathlib.Path
        Empty folder for the maps.
    """

    cohort: HealthyCohort
    folder: Path
    _stored: list[_StoredMap] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._estimator = NormativeEstimator(self.cohort)

    def add(
        self,
        scores: np.ndarray,
        brain: np.ndarray,
        lesion: np.ndarray | None,
        *,
        subject: str,
        person: Mapping[str, float | None],
        kind: str,
    ) -> None:
        """Add one anomaly map.

        Parameters
        ----------
        scores : numpy.ndarray of float32, shape SHAPE
            Anomaly map.
        brain : numpy.ndarray of bool, shape SHAPE
            Brain mask.
        lesion : numpy.ndarray of bool, shape SHAPE, or None
            Lesion mask; None for a healthy scan.
        subject : str
            Subject label. Maps of one subject must be added one after the other, and are left out together.
        person : mapping
            `age` in years and `sex` (0.5 male, -0.5 female); None if not known.
        kind : str
            Type of the lesion.
        """
        path = self.folder / f"{len(self._stored):06d}.npz"
        parts = {"shape": scores.shape, "brain": np.packbits(brain), "scores": scores[brain]}
        if lesion is None:
            self._estimator.add(scores, brain, **person)
        else:
            parts["lesion"] = np.packbits(lesion)
        np.savez(path, **parts)
        self._stored.append(_StoredMap(subject, person, kind, lesion is None, path))

    def add_to_reference(
        self, scores: np.ndarray, brain: np.ndarray, *, person: Mapping[str, float | None]
    ) -> None:
        """Add the map of a healthy control to the reference only; parameters as in :meth:`add`."""
        self._estimator.add(scores, brain, **person)

    def finish(self) -> tuple[NormativeReference, ThresholdEstimator]:
        """Fit the reference, and collect the deviations of all maps.

        Returns
        -------
        reference : NormativeReference
            Reference of all healthy controls.
        thresholds : ThresholdEstimator
            Histograms of the deviations.
        """
        whole = self._estimator.fit()
        thresholds = ThresholdEstimator()
        for _, maps in groupby(self._stored, lambda stored: stored.subject):
            own = list(maps)
            reference = self._without([stored for stored in own if stored.healthy]) or whole
            for stored in own:
                scores, brain, lesion = stored.load()
                z = reference.deviations(scores, brain, **stored.person)
                thresholds.add(z, brain, lesion, stored.kind)
        return whole, thresholds

    def _without(self, own: list[_StoredMap]) -> NormativeReference | None:
        """Fit the reference without the given maps; None if there are none."""
        if not own:
            return None
        loaded = [(stored.load(), stored.person) for stored in own]
        for (scores, brain, _), person in loaded:
            self._estimator.remove(scores, brain, **person)
        reference = self._estimator.fit()
        for (scores, brain, _), person in loaded:
            self._estimator.add(scores, brain, **person)
        return reference
