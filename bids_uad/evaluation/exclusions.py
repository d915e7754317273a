"""Images that quality control rules out, and those whose outputs rest on them."""

from __future__ import annotations

import re
from pathlib import Path

from bids_uad.errors import InputError
from bids_uad.evaluation.tables import read_row, subject_of

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
