"""Who should be in the benchmark and is not, and why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bids_uad.dataset.participants import Participants

_PREPROC = "_space-SRI24_desc-preproc_"


@dataclass(frozen=True)
class Absence:
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


def find_absences(
    output_dir: str | Path,
    participants: Participants,
    present: Iterable[tuple[str, str, str]],
    only: frozenset[str] = frozenset(),
) -> list[Absence]:
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
    list of Absence
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

    absences = []
    expected = set(participants.labels) | set(folders)
    for subject in sorted(expected & only if only else expected):
        if subject not in folders:
            absences.append(Absence(subject, subject, None, None, "no outputs at all"))
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
            absences.append(Absence(subject, subject, None, None, reason, crashes))
        for prefix, modality in images:
            for detector in sorted(detectors[modality]):
                if (prefix, modality, detector) not in tables:
                    reason = "preprocessed, but no score table"
                    absences.append(Absence(subject, prefix, modality, detector, reason, crashes))
            if not detectors[modality] and subject not in with_tables:
                reason = "preprocessed, but no score table of any detector"
                absences.append(Absence(subject, prefix, modality, None, reason, crashes))
    return absences


def subject_folders(output_dir: str | Path) -> list[str]:
    """Return the `sub-<label>` folders of the derivatives, sorted."""
    return sorted(path.name for path in Path(output_dir).glob("sub-*") if path.is_dir())
