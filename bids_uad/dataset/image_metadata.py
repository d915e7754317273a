"""Metadata of images from sessions.tsv, scans.tsv and sidecars of a raw dataset, for subgroups."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd

from bids_uad.dataset.participants import Participants
from bids_uad.dataset.raw_metadata import SidecarReader, is_missing, read_table


def image_metadata(
    root: Path, images: Iterable[str], names: Sequence[str], participants: Participants
) -> pd.DataFrame:
    """Read metadata fields of images from sessions.tsv, scans.tsv or the sidecars, in this order.

    Parameters
    ----------
    root : pathlib.Path
        Root of the raw dataset.
    images : iterable of str
        Images as in the column `source_image`: BIDS URIs, or paths relative to `root`.
    names : sequence of str
        Names of table columns or sidecar fields.
    participants : Participants
        Participants of the raw dataset, with their sessions.

    Returns
    -------
    pandas.DataFrame
        One row for each image (the index), one column of text for each name that any image has; missing for
        images without the field.

    Raises
    ------
    InputError
        If a scans.tsv or a sidecar cannot be read.
    """
    scans = cache(_read_scans)
    sidecars = SidecarReader(root)
    rows = {}
    for image in dict.fromkeys(images):
        path = PurePosixPath(image.rsplit(":", 1)[-1])
        sources = (_session(path, participants), _scan(path, root, scans), _sidecar(path, sidecars))
        rows[image] = {
            name: next((fields[name] for fields in sources if name in fields), None) for name in names
        }
    table = pd.DataFrame.from_dict(rows, orient="index", columns=list(names), dtype="string")
    return table.dropna(axis="columns", how="all")


def _session(image: PurePosixPath, participants: Participants) -> dict[str, str]:
    """Return the values of the participant at the session of an image."""
    subject, session = image.parts[0], image.parts[1]
    row = participants.row(subject, session) if session.startswith("ses-") else {}
    return {name: _text(value) for name, value in row.items()}


def _scan(image: PurePosixPath, root: Path, scans: Any) -> dict[str, str]:
    """Return the row of an image in scans.tsv."""
    folder = image.parent.parent  # of the session, or of the participant
    table = scans(root / folder / f"{'_'.join(folder.parts)}_scans.tsv")
    return table.get(str(image.relative_to(folder)), {})


def _sidecar(image: PurePosixPath, sidecars: SidecarReader) -> dict[str, str]:
    """Return the fields of the sidecars of an image as text."""
    return {name: _text(value) for name, value in sidecars.fields(image).items() if value not in (None, "")}


def _read_scans(path: Path) -> dict[str, dict[str, str]]:
    """Read the rows of a scans.tsv by file name; empty without the file."""
    if not path.is_symlink() and not path.exists():
        return {}
    table = read_table(path, "filename")
    return {
        row[table.key]: {name: value for name, value in row.items() if not is_missing(value)}
        for row in table.rows
    }


def _text(value: Any) -> str:
    """Return a value as text, so that 3 and 3.0 tesla are equal."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)
