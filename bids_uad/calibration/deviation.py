"""Thresholds on deviations from a normative reference, with leave-one-out for its healthy controls.

Healthy controls are scored against the reference of the other controls, scans with lesions against the whole
reference. Further controls can be added to the reference only. Deviations can be computed only after all maps
were added, so the maps are kept on disk in the meantime and memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

import numpy as np

from bids_uad.calibration.normative import HealthyCohort, NormativeEstimator, NormativeReference
from bids_uad.calibration.thresholds import ThresholdEstimator


@dataclass(frozen=True)
class ValidationMap:
    """Anomaly map of a validation scan.

    Parameters
    ----------
    subject : str
        Subject label.
    person : mapping
        `age` in years and `sex` (0.5 male, -0.5 female); None if not known.
    kind : str
        Type of the lesion.
    scores : numpy.ndarray of float32, shape SHAPE
        Anomaly map, 0 outside the brain.
    brain : numpy.ndarray of bool, shape SHAPE
        Brain mask.
    lesion : numpy.ndarray of bool, shape SHAPE, or None
        Lesion mask; None for a healthy control.
    """

    subject: str
    person: Mapping[str, float | None]
    kind: str
    scores: np.ndarray
    brain: np.ndarray
    lesion: np.ndarray | None

    def store(self, path: Path) -> StoredMap:
        """Write the map to a file, and return its description."""
        parts = {"shape": self.scores.shape, "brain": np.packbits(self.brain)}
        parts["scores"] = self.scores[self.brain]
        if self.lesion is not None:
            parts["lesion"] = np.packbits(self.lesion)
        np.savez(path, **parts)
        return StoredMap(self.subject, self.person, self.kind, self.lesion is None, path)


@dataclass(frozen=True)
class StoredMap:
    """A :class:`ValidationMap` on disk.

    Parameters
    ----------
    subject, person, kind
        As of :class:`ValidationMap`.
    healthy : bool
        Whether the map is that of a healthy control.
    path : pathlib.Path
        File with the arrays.
    """

    subject: str
    person: Mapping[str, float | None]
    kind: str
    healthy: bool
    path: Path

    def load(self) -> ValidationMap:
        """Read the map."""
        with np.load(self.path) as file:
            shape = tuple(file["shape"])
            masks = [
                np.unpackbits(file[name], count=int(np.prod(shape))).astype(bool).reshape(shape)
                for name in ("brain", *([] if self.healthy else ["lesion"]))
            ]
            scores = np.zeros(shape, dtype=np.float32)
            scores[masks[0]] = file["scores"]
        lesion = None if self.healthy else masks[1]
        return ValidationMap(self.subject, self.person, self.kind, scores, masks[0], lesion)


@dataclass
class DeviationCalibrator:
    """Fit a normative reference on healthy maps, and thresholds on the deviations of all maps from it.

    Parameters
    ----------
    cohort : HealthyCohort
        Ages and sexes of all healthy controls that will be added.
    folder : pathlib.Path
        Empty folder for the maps.
    keep_deviations : bool, default=False
        Whether :meth:`finish` writes the deviations to `folder` as well.

    Attributes
    ----------
    maps : list of StoredMap
        Maps that were added, without those that were added to the reference only.
    deviations : list of StoredMap
        Their deviations; empty before :meth:`finish` and without `keep_deviations`.
    """

    cohort: HealthyCohort
    folder: Path
    keep_deviations: bool = False
    maps: list[StoredMap] = field(default_factory=list, init=False)
    deviations: list[StoredMap] = field(default_factory=list, init=False)

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
        if lesion is None:
            self._estimator.add(scores, brain, **person)
        added = ValidationMap(subject, person, kind, scores, brain, lesion)
        self.maps.append(added.store(self.folder / f"{len(self.maps):06d}.npz"))

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
        for _, maps in groupby(self.maps, lambda stored: stored.subject):
            own = list(maps)
            reference = self._without([stored for stored in own if stored.healthy]) or whole
            for stored in own:
                found = stored.load()
                z = reference.deviations(found.scores, found.brain, **found.person)
                thresholds.add(z, found.brain, found.lesion, found.kind)
                if self.keep_deviations:
                    path = stored.path.with_name(f"deviation-{stored.path.name}")
                    self.deviations.append(replace(found, scores=z).store(path))
        return whole, thresholds

    def _without(self, own: list[StoredMap]) -> NormativeReference | None:
        """Fit the reference without the given maps; None if there are none."""
        if not own:
            return None
        loaded = [stored.load() for stored in own]
        for found in loaded:
            self._estimator.remove(found.scores, found.brain, **found.person)
        reference = self._estimator.fit()
        for found in loaded:
            self._estimator.add(found.scores, found.brain, **found.person)
        return reference
