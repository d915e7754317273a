"""Whether the tables of a cohort may be put together at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import pandas as pd

from bids_uad.dataset.participants import Participants
from bids_uad.errors import InputError, truncate_list
from bids_uad.evaluation.curves import Curves
from bids_uad.evaluation.lesion_detection import Lesions
from bids_uad.evaluation.missing import MissingData
from bids_uad.evaluation.subjects import LESION, subject_row
from bids_uad.evaluation.tables import UnitScores, read_unit, subject_of
from bids_uad.resources import worker_pool


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
                f"lesion-wise numbers: {truncate_list(sorted(self._uncounted))}. Run the participant "
                "level again for these participants."
            )
        return lines


EXCLUDED = "left out by quality control: "
PARTICIPANTS_AT_ONCE = 100
"""The parts do not depend on the number of processes, so neither does a sum of floats."""


@dataclass
class Scores:
    """What is kept of the score tables that were read.

    Parameters
    ----------
    rows : pandas.DataFrame
        One row per image and detector, columns of `subjects.COLUMNS` but `report`.
    curves : dict
        (detector, modality, cohort) -> `Curves` over the scans of one cohort.
    present : list of (str, str, str)
        Image prefix, modality and detector of each table that could be read.
    excluded : list of MissingData
        Tables of images that quality control leaves out.
    unreadable : list of str
        One message for each table that could not be read.
    contradictions : set of str
        Healthy participants with a lesion in a lesion mask.
    consistency : ConsistencyCheck
        Has seen every table in `rows`.
    lesions : Lesions
        The lesion tables beside those in `rows`.
    """

    rows: pd.DataFrame = field(default_factory=pd.DataFrame)
    curves: dict[tuple[str, str, str], Curves] = field(default_factory=dict)
    present: list[tuple[str, str, str]] = field(default_factory=list)
    excluded: list[MissingData] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    contradictions: set[str] = field(default_factory=set)
    consistency: ConsistencyCheck = field(default_factory=ConsistencyCheck)
    lesions: Lesions = field(default_factory=Lesions)


def read_scores(
    paths: Sequence[Path],
    participants: Participants,
    exclusions: Mapping[tuple[str, str], str],
    *,
    processes: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Scores:
    """Read score tables, each once, and add them up.

    Only sums and one row of scalars for each table stay; a process holds one histogram at a time.

    Parameters
    ----------
    paths : sequence of pathlib.Path
        The metrics tables, those of a participant side by side.
    participants : Participants
        Who is who.
    exclusions : mapping
        (image prefix, modality) -> why quality control leaves the image out.
    processes : int
        How many read. The result does not depend on it.
    progress : callable, optional
        Called with the number of tables after each part.

    Returns
    -------
    Scores

    Raises
    ------
    InputError
        If the tables of one detector and modality come from different models.
    """
    parts = list(_parts(paths))
    people = [participants.only(map(subject_of, part)) for part in parts]
    read = partial(_read_part, exclusions=exclusions)
    total, rows = Scores(), []
    workers = min(processes, len(parts))
    # Not forked, for whoever calls may have threads.
    with worker_pool(workers, "spawn") if workers > 1 else nullcontext() as pool:
        results = (map if pool is None else pool.map)(read, parts, people)
        for part, scores in zip(parts, results, strict=True):
            _add(total, scores)
            rows.append(scores.rows)
            if progress is not None:
                progress(len(part))
    rows = [table for table in rows if len(table)]
    return replace(total, rows=pd.concat(rows, ignore_index=True) if rows else pd.DataFrame())


def _parts(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Cut the tables into parts of `PARTICIPANTS_AT_ONCE`."""
    people = [list(tables) for _, tables in groupby(paths, subject_of)]
    for start in range(0, len(people), PARTICIPANTS_AT_ONCE):
        yield [path for tables in people[start : start + PARTICIPANTS_AT_ONCE] for path in tables]


def _read_part(
    paths: Sequence[Path], participants: Participants, exclusions: Mapping[tuple[str, str], str]
) -> Scores:
    scores, rows = Scores(), []
    for path in paths:
        try:
            unit = read_unit(path, participants)
            row = subject_row(unit)
        except InputError as error:
            scores.unreadable.append(str(error))
            continue
        scores.present.append((unit.prefix, unit.modality, unit.detector))
        reason = exclusions.get((unit.prefix, unit.modality))
        if reason is not None:
            which = (unit.subject, unit.prefix, unit.modality, unit.detector)
            scores.excluded.append(MissingData(*which, EXCLUDED + reason))
            continue
        if row["role"] == LESION:
            try:
                scores.lesions.add(unit)
            except InputError as error:
                scores.unreadable.append(str(error))
        scores.consistency.check(unit)
        rows.append(row)
        if unit.healthy and unit.has_lesion_mask and unit.n_lesion.any():
            scores.contradictions.add(unit.subject)
        key = (unit.detector, unit.modality, unit.cohort)
        scores.curves.setdefault(key, Curves(unit.edges, unit.threshold)).add(unit)
    return replace(scores, rows=pd.DataFrame(rows))


def _add(total: Scores, part: Scores) -> None:
    """Add a part to the sums, its rows apart."""
    total.consistency.include(part.consistency)
    total.lesions.include(part.lesions)
    for key, curves in part.curves.items():
        total.curves.setdefault(key, Curves(curves.edges, curves.threshold)).include(curves)
    total.present += part.present
    total.excluded += part.excluded
    total.unreadable += part.unreadable
    total.contradictions |= part.contradictions
