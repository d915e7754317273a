"""Who should be in the benchmark and is not, and why."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bids_uad.dataset.participants import Participants
from bids_uad.errors import InputError
from bids_uad.evaluation.tables import subject_of
from bids_uad.files import read_row

_PREPROC = "_space-SRI24_desc-preproc_"


@dataclass(frozen=True)
class MissingData:
    """One participant without a score table.

    Parameters
    ----------
    subject : str
        `sub-<label>`.
    image : str
        Entities of the image where it is known, else `subject`.
    modality, detector : str or None
        Which table is missing; None when there is none at all.
    reason : str
        What the derivatives tell about it.
    crash_files : tuple of str
        Crash files of the participant, relative to the derivatives.
    """

    subject: str
    image: str
    modality: str | None
    detector: str | None
    reason: str
    crash_files: tuple[str, ...] = ()


def find_missing_data(
    output_dir: str | Path,
    participants: Participants,
    present: Iterable[tuple[str, str, str]],
    only: frozenset[str] = frozenset(),
) -> list[MissingData]:
    """List the score tables that one would expect and that are not there.

    Parameters
    ----------
    output_dir : path-like
        Root of the derivatives; only names are looked at.
    participants : Participants
        Everybody who should have outputs.
    present : iterable of (str, str, str)
        Image prefix, modality and detector of each table that was read.
    only : frozenset of str
        The `sub-<label>` to look at; empty means everybody.

    Returns
    -------
    list of MissingData
        Sorted by subject. A participant without a preprocessed image of a modality that has other
        tables is not listed for that modality: most likely there is no such scan. Nor is a modality that
        nobody has tables of, if the participant has others: most likely it was not asked for.
    """
    root = Path(output_dir)
    detectors = defaultdict(set)
    tables = set(present)
    with_tables = set()
    for prefix, modality, detector in tables:
        detectors[modality].add(detector)
        with_tables.add(prefix.split("_", 1)[0])
    folders = subject_folders(root)

    missing_data = []
    expected = set(participants.labels) | set(folders)
    for subject in sorted(expected & only if only else expected):
        if subject not in folders:
            missing_data.append(MissingData(subject, subject, None, None, "no outputs at all"))
            continue
        crashes = tuple(
            str(path.relative_to(root)) for path in sorted((root / subject).glob("**/log/**/crash*"))
        )
        images = sorted(
            tuple(path.name.removesuffix(".nii.gz").split(_PREPROC, 1))
            for path in (root / subject).glob(f"**/sub-*{_PREPROC}T[12]w.nii.gz")
        )
        if subject not in with_tables and not images:
            reason = "no preprocessed image"
            missing_data.append(MissingData(subject, subject, None, None, reason, crashes))
        for prefix, modality in images:
            for detector in sorted(detectors[modality]):
                if (prefix, modality, detector) not in tables:
                    reason = "preprocessed, but no score table"
                    missing_data.append(MissingData(subject, prefix, modality, detector, reason, crashes))
            if not detectors[modality] and subject not in with_tables:
                reason = "preprocessed, but no score table of any detector"
                missing_data.append(MissingData(subject, prefix, modality, None, reason, crashes))
    return missing_data


def subject_folders(output_dir: str | Path) -> list[str]:
    """Return the `sub-<label>` folders of the derivatives, sorted."""
    return sorted(path.name for path in Path(output_dir).glob("sub-*") if path.is_dir())


Image = tuple[str, str]

_NAME = re.compile(r"^(?P<prefix>sub-.+)_space-SRI24_desc-(?P<modality>T[12]w)Preproc_qc\.tsv$")
_COLUMNS = ("exclude", "exclude_reasons")
_OPTIONAL_COLUMNS = ("depends_on", "exclude_dependents")
"""Columns that tables of earlier versions lack."""
_MISSING = ("n/a", "")
BY_HAND = "no reason given"


def find_exclusions(
    output_dir: str | Path, only: frozenset[str] = frozenset()
) -> tuple[dict[Image, str], list[str]]:
    """Read from the quality tables which images are left out, and why.

    An image is left out if its own table says so, or if an image that it depends on is left out for its brain
    mask or registration (``exclude_dependents``), directly or through others: a T2w image that was registered
    to the atlas through a T1w image lies where that one does.

    Parameters
    ----------
    output_dir : path-like
        Root of the derivatives.
    only : frozenset of str
        The `sub-<label>` to look at; empty means everybody.

    Returns
    -------
    exclusions : dict
        Reason by image prefix and modality.
    unreadable : list of str
        Tables that could not be read, one message each.
    """
    rows: dict[Image, dict[str, str]] = {}
    unreadable = []
    for path in sorted(Path(output_dir).glob("sub-*/**/*Preproc_qc.tsv")):
        name = _NAME.match(path.name)
        if name is None or (only and subject_of(path) not in only):
            continue
        try:
            rows[name["prefix"], name["modality"]] = read_row(path, _COLUMNS, _OPTIONAL_COLUMNS)
        except InputError as error:
            unreadable.append(str(error))
    found = {image: _own_reason(row) for image, row in rows.items() if _says_yes(row["exclude"])}
    for image in rows.keys() - found.keys():
        cause = _failed_dependency(image, rows)
        if cause is not None:
            found[image] = f"depends on {'_'.join(cause)}, which is left out: {found[cause]}"
    return found, unreadable


def _failed_dependency(image: Image, rows: dict[Image, dict[str, str]]) -> Image | None:
    """Find an image that takes another out of the group level: the nearest one, in breadth-first order."""
    seen, queue = {image}, [image]
    for current in queue:
        for cause in _dependencies(rows[current]):
            if cause in seen or cause not in rows:
                continue
            if _says_yes(rows[cause]["exclude"]) and rows[cause]["exclude_dependents"].lower() != "no":
                return cause
            seen.add(cause)
            queue.append(cause)
    return None


def _dependencies(row: dict[str, str]) -> list[Image]:
    """Prefix and modality of the images in `depends_on`."""
    names = [] if row["depends_on"] in _MISSING else row["depends_on"].split(",")
    return [(prefix, modality) for prefix, _, modality in (name.strip().rpartition("_") for name in names)]


def _own_reason(row: dict[str, str]) -> str:
    return BY_HAND if row["exclude_reasons"] in _MISSING else row["exclude_reasons"]


def _says_yes(cell: str) -> bool:
    return cell.strip().lower() == "yes"
