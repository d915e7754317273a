"""Images that quality control rules out."""

from __future__ import annotations

import re
from pathlib import Path

from bids_uad.errors import InputError
from bids_uad.evaluation.tables import read_row, subject_of

_NAME = re.compile(r"^(?P<prefix>sub-.+)_space-SRI24_desc-(?P<modality>T[12]w)Preproc_qc\.tsv$")
_COLUMNS = ("exclude", "exclude_reasons")
BY_HAND = "no reason given"


def find_exclusions(
    output_dir: str | Path, only: frozenset[str] = frozenset()
) -> tuple[dict[tuple[str, str], str], list[str]]:
    """Read from the quality tables which images are left out, and why.

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
    found, unreadable = {}, []
    for path in sorted(Path(output_dir).glob("sub-*/**/*Preproc_qc.tsv")):
        name = _NAME.match(path.name)
        if name is None or (only and subject_of(path) not in only):
            continue
        try:
            row = read_row(path, _COLUMNS)
        except InputError as error:
            unreadable.append(str(error))
            continue
        if row["exclude"].lower() == "yes":
            reason = row["exclude_reasons"]
            found[name["prefix"], name["modality"]] = BY_HAND if reason in ("n/a", "") else reason
    return found, unreadable
