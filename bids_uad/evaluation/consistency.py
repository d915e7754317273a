"""Whether the tables of a cohort may be put together at all."""

from __future__ import annotations

import numpy as np

from bids_uad.errors import InputError
from bids_uad.evaluation.tables import UnitScores
from bids_uad.listing import listed


class ConsistencyCheck:
    """Compares each unit with the first of the same detector and modality."""

    def __init__(self) -> None:
        self._first: dict[tuple[str, str], UnitScores] = {}
        self._versions: dict[str, set[str]] = {}
        self._counting: UnitScores | None = None
        self._uncounted: set[str] = set()

    def check(self, unit: UnitScores) -> None:
        """Refuse a unit that was scored by another model, or whose lesions were counted otherwise.

        Parameters
        ----------
        unit : UnitScores
            The next unit.

        Raises
        ------
        InputError
            If its model bundle, its bin edges, its threshold or its least lesion volume differ from those
            before.
        """
        self._versions.setdefault(unit.app_version, set()).add(unit.subject)
        if np.isnan(unit.min_lesion_volume_mm3):
            self._uncounted.add(unit.subject)
        self._compare(unit)

    def include(self, other: ConsistencyCheck) -> None:
        """Take over what another check has seen, as if its units had been checked here.

        Raises
        ------
        InputError
            If it has seen another model or least lesion volume.
        """
        self._uncounted |= other._uncounted
        for version, subjects in other._versions.items():
            self._versions.setdefault(version, set()).update(subjects)
        for unit in (*other._first.values(), other._counting):
            if unit is not None:
                self._compare(unit)

    def _compare(self, unit: UnitScores) -> None:
        first = self._first.setdefault((unit.detector, unit.modality), unit)
        what = None
        if not np.array_equal(first.edges, unit.edges):
            what = "other score bins"
        elif first.model_sha256 != unit.model_sha256:
            what = "another model bundle"
        elif first.threshold != unit.threshold:
            what = f"another threshold ({unit.threshold:g} instead of {first.threshold:g})"
        if what is not None:
            raise InputError(
                unit.path,
                f"{what} than {first.path.name} for {unit.detector} on {unit.modality} "
                f"(bundle sha256 {unit.model_sha256} against {first.model_sha256})",
                "score all subjects with one bundle, or keep each bundle in its own OUTPUT_DIR",
            )
        least = unit.min_lesion_volume_mm3
        if np.isnan(least):
            return
        self._counting = self._counting or unit
        if least != self._counting.min_lesion_volume_mm3:
            raise InputError(
                unit.path,
                f"lesions are counted from {least:g} mm3, but from "
                f"{self._counting.min_lesion_volume_mm3:g} mm3 in {self._counting.path.name}",
                "run the participant level for all participants with one --min-lesion-volume",
            )

    def warnings(self) -> list[str]:
        """Return what is odd but no reason to stop: tables of several app versions, or of early ones."""
        lines = []
        if len(self._versions) > 1:
            parts = [
                f"{version} ({len(subjects)} participant{'s' if len(subjects) > 1 else ''})"
                for version, subjects in sorted(self._versions.items())
            ]
            lines.append(f"The score tables come from several app versions: {', '.join(parts)}.")
        if self._uncounted:
            lines.append(
                "Score tables of an earlier version, which has no least lesion volume, are left out of all "
                f"lesion-wise numbers: {listed(sorted(self._uncounted))}. Run the participant level again "
                "for these participants."
            )
        return lines
