"""What a raw dataset says about its images beyond participants.tsv: sessions.tsv, scans.tsv and sidecars."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd

from bids_uad.dataset.participants import Participants
from bids_uad.dataset.raw_metadata import SidecarReader, is_missing, read_table


def image_columns(
    root: Path, images: Iterable[str], names: Sequence[str], participants: Participants
) -> pd.DataFrame:
    """Look facts up that images have, each where it is first found: sessions.tsv, scans.tsv, the sidecar.

    Parameters
    ----------
    root : pathlib.Path
        The raw dataset.
    images : iterable of str
        As the score tables name them: BIDS URIs, or paths below `root`.
    names : sequence of str
        Columns or sidecar fields.
    participants : Participants
        Those of the raw dataset, with their sessions.

    Returns
    -------
    pandas.DataFrame
        One row for each image (the index), a column of text for each name that is known of any image; missing
        where it is not.

    Raises
    ------
    InputError
        If a file that could tell cannot be read.
    """
    facts = _Facts(root, participants)
    rows = {}
    for image in dict.fromkeys(images):
        path = PurePosixPath(image.rsplit(":", 1)[-1])
        told = (facts.session(path), facts.scan(path), facts.sidecar(path))
        rows[image] = {name: next((own[name] for own in told if name in own), None) for name in names}
    table = pd.DataFrame.from_dict(rows, orient="index", columns=list(names), dtype="string")
    return table.dropna(axis="columns", how="all")


class _Facts:
    """The small files of one dataset; what several images share is read once."""

    def __init__(self, root: Path, participants: Participants) -> None:
        self.root = root
        self.participants = participants
        self._table = cache(_read_table)
        self._sidecars = SidecarReader(root)

    def session(self, image: PurePosixPath) -> dict[str, str]:
        """Values of an image's session, as text."""
        subject, session = image.parts[0], image.parts[1]
        row = self.participants.row(subject, session) if session.startswith("ses-") else {}
        return {name: _text(value) for name, value in row.items()}

    def scan(self, image: PurePosixPath) -> dict[str, str]:
        """Row of an image in the list of its session's scans."""
        folder = image.parent.parent  # of the session, or of the participant
        table = self._table(self.root / folder / f"{'_'.join(folder.parts)}_scans.tsv")
        return table.get(str(image.relative_to(folder)), {})

    def sidecar(self, image: PurePosixPath) -> dict[str, str]:
        """Fields of an image's sidecars, as text."""
        fields = self._sidecars.fields(image)
        return {name: _text(value) for name, value in fields.items() if value not in (None, "")}


def _read_table(path: Path) -> dict[str, dict[str, str]]:
    """Read the rows of a list of scans by file name; a missing file has none."""
    if not path.is_symlink() and not path.exists():
        return {}
    table = read_table(path, "filename")
    return {
        row[table.key]: {name: value for name, value in row.items() if not is_missing(value)}
        for row in table.rows
    }


def _text(value: Any) -> str:
    """Write a value so that 3 and 3.0 tesla are the same."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)
