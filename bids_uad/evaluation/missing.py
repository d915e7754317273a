"""Missing data of the benchmark: participants and images without score tables, and exclusions."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bids_uad.config import MODALITIES
from bids_uad.dataset.participants import Participants
from bids_uad.errors import InputError
from bids_uad.evaluation.tables import find_tables
from bids_uad.files import MISSING, read_row

Image = tuple[str, str]
"""Prefix (`sub-X[_ses-Y]...`) and modality of an image."""

NO_REASON = "no reason given"
"""Reason of an image that was excluded by hand without one."""

_MODALITY = rf"(?P<modality>{'|'.join(MODALITIES)})"
_PREPROC = re.compile(rf"^(?P<prefix>sub-.*?)_space-SRI24_desc-preproc_{_MODALITY}\.nii\.gz$")
_QUALITY_TABLE = re.compile(rf"^(?P<prefix>sub-.+)_space-SRI24_desc-{_MODALITY}Preproc_qc\.tsv$")
_COLUMNS = ("exclude", "exclude_reasons")
_OPTIONAL_COLUMNS = ("depends_on", "exclude_dependents")
"""Columns that tables of earlier versions lack."""


@dataclass(frozen=True)
class MissingData:
    """Missing or excluded score table.

    Parameters
    ----------
    subject : str
        Participant, `sub-<label>`.
    image : str
        Prefix of the image; the participant if no image is known.
    modality : str or None
        Modality of the image; None if the participant has no score table at all.
    detector : str or None
        Detector of the missing table; None if tables of all detectors are missing.
    reason : str
        Why the table is missing.
    crash_files : tuple of str, default=()
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
    """List the expected score tables that do not exist.

    Parameters
    ----------
    output_dir : path-like
        Root of the derivatives; only file names are read.
    participants : Participants
        Participants of the raw dataset, who are all expected to have outputs.
    present : iterable of (str, str, str)
        Image prefix, modality and detector of each table that was read.
    only : frozenset of str, default=frozenset()
        Participants (`sub-<label>`) to include; empty means all.

    Returns
    -------
    list of MissingData
        Sorted by participant. A participant with tables of one modality is not listed for another modality
        without a preprocessed image, since there is probably no such scan, nor for a modality without any
        tables in the cohort, since it was probably not requested.
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
        crashes, images = _crashes_and_images(root, subject)
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


def _crashes_and_images(root: Path, subject: str) -> tuple[tuple[str, ...], list[Image]]:
    """List the crash files, relative to the derivatives, and the preprocessed images of a participant."""
    crashes, images = [], []
    for parent, _, names in os.walk(root / subject):
        for name in names:
            if name.startswith("crash") and "log" in Path(parent).relative_to(root).parts:
                crashes.append(Path(parent, name).relative_to(root))
            elif (image := _PREPROC.match(name)) is not None:
                images.append((image["prefix"], image["modality"]))
    return tuple(map(str, sorted(crashes))), sorted(images)


def subject_folders(output_dir: str | Path) -> list[str]:
    """Return the `sub-<label>` folders of the derivatives, sorted."""
    return sorted(path.name for path in Path(output_dir).glob("sub-*") if path.is_dir())


def find_exclusions(
    output_dir: str | Path, only: frozenset[str] = frozenset()
) -> tuple[dict[Image, str], list[str]]:
    """Read from the quality-control tables which images are excluded.

    An image is excluded by its own table (``exclude``), or because an image that it depends on, directly or
    through others, is excluded for its brain mask or registration (``exclude_dependents``). For example, a
    T2w image that was registered to the atlas through a T1w image shares the errors of that registration.

    Parameters
    ----------
    output_dir : path-like
        Root of the derivatives.
    only : frozenset of str, default=frozenset()
        Participants (`sub-<label>`) to include; empty means all.

    Returns
    -------
    exclusions : dict
        Reason of each exclusion by image prefix and modality.
    unreadable : list of str
        One message for each table that cannot be read.
    """
    rows: dict[Image, dict[str, str]] = {}
    unreadable = []
    for path in find_tables(output_dir, "Preproc_qc.tsv", only):
        name = _QUALITY_TABLE.match(path.name)
        if name is None:
            continue
        try:
            rows[name["prefix"], name["modality"]] = read_row(path, _COLUMNS, _OPTIONAL_COLUMNS)
        except InputError as error:
            unreadable.append(str(error))
    exclusions = {image: _own_reason(row) for image, row in rows.items() if _is_yes(row["exclude"])}
    for image in rows.keys() - exclusions.keys():
        cause = _failed_dependency(image, rows)
        if cause is not None:
            exclusions[image] = f"depends on {'_'.join(cause)}, which is excluded: {exclusions[cause]}"
    return exclusions, unreadable


def _failed_dependency(image: Image, rows: dict[Image, dict[str, str]]) -> Image | None:
    """Find the nearest dependency that excludes an image, in breadth-first order; None without one."""
    seen, queue = {image}, [image]
    for current in queue:
        for cause in _dependencies(rows[current]):
            if cause in seen or cause not in rows:
                continue
            if _is_yes(rows[cause]["exclude"]) and rows[cause]["exclude_dependents"].lower() != "no":
                return cause
            seen.add(cause)
            queue.append(cause)
    return None


def _dependencies(row: dict[str, str]) -> list[Image]:
    """Return prefix and modality of the images in `depends_on`."""
    names = [] if row["depends_on"] in MISSING else row["depends_on"].split(",")
    return [(prefix, modality) for prefix, _, modality in (name.strip().rpartition("_") for name in names)]


def _own_reason(row: dict[str, str]) -> str:
    return NO_REASON if row["exclude_reasons"] in MISSING else row["exclude_reasons"]


def _is_yes(cell: str) -> bool:
    return cell.strip().lower() == "yes"
