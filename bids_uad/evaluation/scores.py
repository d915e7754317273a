"""Reading of the score tables of a cohort, with a check that they are comparable."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from bids_uad.resources import map_in_processes

EXCLUDED = "excluded by quality control: "
"""Start of the reason of an excluded image."""
BATCH_SIZE = 100
"""Participants read at once; independent of the number of processes, so that sums of floats are as well."""


class ConsistencyCheck:
    """Check that all score tables of a detector and modality come from one model and one way of counting."""

    def __init__(self) -> None:
        self._first: dict[tuple[str, str], UnitScores] = {}
        self._versions: dict[str, set[str]] = {}
        self._first_counted: UnitScores | None = None
        self._without_minimum: set[str] = set()

    def check(self, unit: UnitScores) -> None:
        """Compare the scores of an image with those checked before.

        Parameters
        ----------
        unit : UnitScores
            Scores of one image and detector.

        Raises
        ------
        InputError
            If the model bundle, bin edges, threshold or minimum volume of components differ from those of the
            same detector and modality, or the minimum lesion volume from that of any table.
        """
        self._versions.setdefault(unit.app_version, set()).add(unit.subject)
        if np.isnan(unit.min_lesion_volume_mm3):
            self._without_minimum.add(unit.subject)
        self._compare(unit)

    def include(self, other: ConsistencyCheck) -> None:
        """Merge another check, as if its tables had been checked here.

        Parameters
        ----------
        other : ConsistencyCheck
            Check of other tables.

        Raises
        ------
        InputError
            If the tables of the two checks are not consistent.
        """
        self._without_minimum |= other._without_minimum
        for version, subjects in other._versions.items():
            self._versions.setdefault(version, set()).update(subjects)
        for unit in (*other._first.values(), other._first_counted):
            if unit is not None:
                self._compare(unit)

    def _compare(self, unit: UnitScores) -> None:
        first = self._first.setdefault((unit.detector, unit.modality), unit)
        difference = None
        if not np.array_equal(first.edges, unit.edges):
            difference = "other score bins"
        elif first.model_sha256 != unit.model_sha256:
            difference = "another model bundle"
        elif first.threshold != unit.threshold:
            difference = f"another threshold ({unit.threshold:g} instead of {first.threshold:g})"
        if difference is not None:
            raise InputError(
                unit.path,
                f"{difference} than {first.path.name} for {unit.detector} on {unit.modality} "
                f"(bundle SHA-256 {unit.model_sha256} and {first.model_sha256})",
                "score all participants with one bundle, or use a separate OUTPUT_DIR for each bundle",
            )
        if abs(first.min_component_volume_mm3 - unit.min_component_volume_mm3) > 0:  # False for NaN
            raise InputError(
                unit.path,
                f"masks with components of at least {unit.min_component_volume_mm3:g} mm3, but "
                f"{first.min_component_volume_mm3:g} mm3 in {first.path.name}",
                "run the participant level with the same --min-lesion-size for all participants",
            )
        minimum = unit.min_lesion_volume_mm3
        if np.isnan(minimum):
            return
        self._first_counted = self._first_counted or unit
        if minimum != self._first_counted.min_lesion_volume_mm3:
            raise InputError(
                unit.path,
                f"minimum lesion volume of {minimum:g} mm3, but "
                f"{self._first_counted.min_lesion_volume_mm3:g} mm3 in {self._first_counted.path.name}",
                "run the participant level with the same --min-counted-volume for all participants",
            )

    def warnings(self) -> list[str]:
        """Return warnings about tables of several app versions and tables without a minimum lesion volume."""
        lines = []
        if len(self._versions) > 1:
            parts = [
                f"{version} ({len(subjects)} participant{'s' if len(subjects) > 1 else ''})"
                for version, subjects in sorted(self._versions.items())
            ]
            lines.append(f"The score tables come from several app versions: {', '.join(parts)}.")
        if self._without_minimum:
            lines.append(
                "Score tables of an early app version, without a minimum lesion volume, are excluded from "
                f"the lesion-wise metrics: {truncate_list(sorted(self._without_minimum))}. Run the "
                "participant level again for these participants."
            )
        return lines


@dataclass
class Scores:
    """Results of all score tables of a cohort.

    Parameters
    ----------
    rows : pandas.DataFrame
        One row per image and detector, columns of `subjects.COLUMNS` without `report`.
    curves : dict, default={}
        `Curves` by detector, modality and cohort.
    present : list of (str, str, str), default=[]
        Image prefix, modality and detector of each table that was read.
    excluded : list of MissingData, default=[]
        Tables of images that quality control excludes.
    unreadable : list of str, default=[]
        One message for each table that cannot be read.
    contradictions : set of str, default=set()
        Healthy controls whose lesion mask is not empty.
    consistency : ConsistencyCheck
        Check of the tables in `rows`.
    lesions : Lesions
        Lesion tables of the images in `rows`.
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
    """Read the score tables of a cohort.

    Memory use does not grow with the histograms: each process holds one at a time, and only sums and one row
    of scalars for each table are kept.

    Parameters
    ----------
    paths : sequence of pathlib.Path
        Metrics tables; those of a participant are adjacent.
    participants : Participants
        Participants of the raw dataset.
    exclusions : mapping
        Reason of each exclusion by image prefix and modality.
    processes : int, default=1
        Number of processes that read tables. The result does not depend on it.
    progress : callable, optional
        Function that is called with the number of tables after each batch.

    Returns
    -------
    Scores
        Rows, sums and problems of all tables.

    Raises
    ------
    InputError
        If the tables of one detector and modality come from different models.
    """
    batches = list(_batches(paths))
    of_batches = [participants.only(map(subject_of, batch)) for batch in batches]
    read = partial(_read_batch, exclusions=exclusions)
    total, rows = Scores(), []
    results = map_in_processes(read, batches, of_batches, workers=processes)
    for batch, scores in zip(batches, results, strict=True):
        _add(total, scores)
        rows.append(scores.rows)
        if progress is not None:
            progress(len(batch))
    rows = [table for table in rows if len(table)]
    return replace(total, rows=pd.concat(rows, ignore_index=True) if rows else pd.DataFrame())


def _batches(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Yield the tables of `BATCH_SIZE` participants at a time."""
    by_participant = [list(tables) for _, tables in groupby(paths, subject_of)]
    for start in range(0, len(by_participant), BATCH_SIZE):
        yield [path for tables in by_participant[start : start + BATCH_SIZE] for path in tables]


def _read_batch(
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
            table = (unit.subject, unit.prefix, unit.modality, unit.detector)
            scores.excluded.append(MissingData(*table, EXCLUDED + reason))
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


def _add(total: Scores, batch: Scores) -> None:
    """Add the scores of a batch, except its rows, to the total."""
    total.consistency.include(batch.consistency)
    total.lesions.include(batch.lesions)
    for key, curves in batch.curves.items():
        total.curves.setdefault(key, Curves(curves.edges, curves.threshold)).include(curves)
    total.present += batch.present
    total.excluded += batch.excluded
    total.unreadable += batch.unreadable
    total.contradictions |= batch.contradictions
