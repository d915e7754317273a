"""Thresholds on deviations from a normative reference, none of them flattered.

Healthy people of the reference are judged by what the others alone say; people with lesions are strangers to
it anyway. Some healthy people may be there for the reference alone. Maps are gone through twice, for the
reference has to be whole before anybody can be judged; they wait on disk, so that memory does not grow with
their number.
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
class _Waiting:
    """A map that waits to be judged."""

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
    """Fits a normative reference on healthy maps, and thresholds on the deviations of all maps from it.

    Parameters
    ----------
    cohort : HealthyCohort
        The healthy people to come.
    folder : pathlib.Path
        Where maps may wait.
    """

    cohort: HealthyCohort
    folder: Path
    _waiting: list[_Waiting] = field(default_factory=list)

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
        """Take in one map.

        Parameters
        ----------
        scores : numpy.ndarray of float32, shape SHAPE
        brain : numpy.ndarray of bool
        lesion : numpy.ndarray of bool or None
            None for a healthy scan.
        subject : str
            Maps of one subject are judged, and come, together.
        person : mapping
            `age` and `sex`.
        kind : str
            Of the lesion.
        """
        path = self.folder / f"{len(self._waiting):06d}.npz"
        parts = {"shape": scores.shape, "brain": np.packbits(brain), "scores": scores[brain]}
        if lesion is None:
            self._estimator.add(scores, brain, **person)
        else:
            parts["lesion"] = np.packbits(lesion)
        np.savez(path, **parts)
        self._waiting.append(_Waiting(subject, person, kind, lesion is None, path))

    def add_to_reference(
        self, scores: np.ndarray, brain: np.ndarray, *, person: Mapping[str, float | None]
    ) -> None:
        """Take in the map of a healthy person who is not judged; shapes as in `add`."""
        self._estimator.add(scores, brain, **person)

    def finish(self) -> tuple[NormativeReference, ThresholdEstimator]:
        """Fit the reference and judge everybody.

        Returns
        -------
        reference : NormativeReference
        thresholds : ThresholdEstimator
            Of the deviations.
        """
        whole = self._estimator.fit()
        thresholds = ThresholdEstimator()
        for _, maps in groupby(self._waiting, lambda waiting: waiting.subject):
            own = list(maps)
            reference = self._without([waiting for waiting in own if waiting.healthy]) or whole
            for waiting in own:
                scores, brain, lesion = waiting.load()
                z = reference.deviations(scores, brain, **waiting.person)
                thresholds.add(z, brain, lesion, waiting.kind)
        return whole, thresholds

    def _without(self, own: list[_Waiting]) -> NormativeReference | None:
        """Fit the reference of all but these; None where there are none of these."""
        if not own:
            return None
        loaded = [(waiting.load(), waiting.person) for waiting in own]
        for (scores, brain, _), person in loaded:
            self._estimator.remove(scores, brain, **person)
        reference = self._estimator.fit()
        for (scores, brain, _), person in loaded:
            self._estimator.add(scores, brain, **person)
        return reference
