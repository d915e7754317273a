"""Whether the tables of a cohort may be put together at all."""

from __future__ import annotations

import numpy as np

from bids_uad.errors import InputError
from bids_uad.evaluation.tables import UnitScores


class ConsistencyCheck:
    """Compares each unit with the first of the same detector and modality."""

    def __init__(self) -> None:
        self._first: dict[tuple[str, str], UnitScores] = {}
        self._versions: dict[str, set[str]] = {}

    def check(self, unit: UnitScores) -> None:
        """Refuse a unit that was scored by another model.

        Parameters
        ----------
        unit : UnitScores
            The next unit.

        Raises
        ------
        InputError
            If its model bundle, its bin edges or its threshold differ from those before.
        """
        self._versions.setdefault(unit.app_version, set()).add(unit.subject)
        self._compare(unit)

    def include(self, other: ConsistencyCheck) -> None:
        """Take over what another check has seen, as if its units had been checked here.

        Raises
        ------
        InputError
            If it has seen another model.
        """
        for version, subjects in other._versions.items():
            self._versions.setdefault(version, set()).update(subjects)
        for unit in other._first.values():
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

    def warnings(self) -> list[str]:
        """Return what is odd but no reason to stop: tables of several app versions."""
        if len(self._versions) < 2:
            return []
        parts = [
            f"{version} ({len(subjects)} participant{'s' if len(subjects) > 1 else ''})"
            for version, subjects in sorted(self._versions.items())
        ]
        return [f"The score tables come from several app versions: {', '.join(parts)}."]
