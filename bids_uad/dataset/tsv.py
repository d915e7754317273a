"""Tables and JSON sidecars of raw datasets, with the encodings and separators that are found in practice."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bids_uad.errors import InputError, unreadable
from bids_uad.listing import listed

_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_POINTERS = ("/annex/objects/", "version https://git-lfs")


@dataclass(frozen=True)
class Table:
    """A table of text.

    Parameters
    ----------
    key : str
        Name of the column that identifies rows, as spelt in the file.
    columns : tuple of str
        All named columns, in the order of the file.
    rows : tuple of dict
        Cells by column, without surrounding blanks.
    notes : tuple of str
        Departures from the format that could be dealt with, as ``path: problem; remedy``.
    """

    key: str
    columns: tuple[str, ...]
    rows: tuple[dict[str, str], ...]
    notes: tuple[str, ...]


def read_table(path: Path, key: str) -> Table:
    """Read a tab-separated table.

    A byte order mark, any line ends, UTF-16 and Latin-1 are accepted, and commas, semicolons or blanks where
    every row then has as many cells as the header.

    Parameters
    ----------
    path : pathlib.Path
    key : str
        Name of the column that identifies rows, in any case.

    Returns
    -------
    Table
        A row with another number of cells than the header has only its key: what belongs where is not known.

    Raises
    ------
    InputError
        If the file cannot be read, is empty, is no text, or has no column `key`.
    """
    text, notes = read_text(path)
    lines = [line for line in re.split(r"\r\n|\r|\n", text) if line.strip()]
    if not lines:
        raise InputError(path, "an empty file", f"write a table with a column {key}, or remove it")
    cells, separator = _split(lines)
    header = [name.strip() for name in cells[0]]
    while not header[-1]:
        header.pop()
    place = next((i for i, name in enumerate(header) if name.lower() == key), None)
    if place is None:
        columns = listed(filter(None, header), 5)
        remedy = "add it, or separate columns by tabs"
        raise InputError(path, f"no column {key} (columns: {columns})", remedy)
    if separator != "tabs":
        if any(len(row) != len(header) for row in cells):
            raise InputError(path, f"columns are separated by {separator}", "separate them by tabs")
        notes.append(f"{path}: columns are separated by {separator}; BIDS asks for tabs")
    names = list(dict.fromkeys(filter(None, header)))
    twice = [name for name in names if header.count(name) > 1]
    if twice:
        notes.append(f"{path}: several columns are called {listed(twice, 5)}; the first of them is used")
    rows, uneven = [], []
    for row in cells[1:]:
        row = [cell.strip() for cell in row]
        while len(row) > len(header) and not row[-1]:
            row.pop()
        if len(row) == len(header):
            rows.append({name: row[header.index(name)] for name in names})
        elif len(row) > place:
            uneven.append(row[place])
            rows.append({header[place]: row[place]})
    if uneven:
        notes.append(
            f"{path}: rows with more or fewer cells than the header are not used ({listed(uneven, 5)}); "
            "write n/a for what is not known"
        )
    return Table(header[place], tuple(names), tuple(rows), tuple(notes))


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; a missing file has no fields.

    Raises
    ------
    InputError
        If it cannot be read, is not valid JSON, or holds something else.
    """
    if not path.is_symlink() and not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise InputError(path, f"not valid JSON ({error})", "repair it") from error
    if not isinstance(content, dict):
        raise InputError(path, "not a JSON object", "repair it")
    return content


def read_text(path: Path) -> tuple[str, list[str]]:
    """Read a text file: UTF-8, UTF-16 with a byte order mark, else Latin-1.

    Returns
    -------
    text : str
    notes : list of str
        A line if it is not UTF-8.

    Raises
    ------
    InputError
        If it cannot be read or is no text.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    encoding, notes = "utf-8-sig", []
    try:
        if content.startswith(_UTF16):
            encoding = "utf-16"
            notes = [f"{path}: read as UTF-16; BIDS asks for UTF-8"]
        text = content.decode(encoding)
    except UnicodeDecodeError:
        text = content.decode("latin-1")
        notes = [f"{path}: not UTF-8, read as Latin-1; save it as UTF-8 if letters are wrong"]
    if "\0" in text:
        raise InputError(path, "not a text file", "repair or remove it")
    if text.startswith(_POINTERS):
        raise InputError(
            path, "a pointer to content that is not here", "fetch it (datalad get, git lfs pull)"
        )
    return text, notes


def _split(lines: list[str]) -> tuple[list[list[str]], str]:
    """Split lines into cells, and name what separates them."""
    header = lines[0]
    signs = {"\t": "tabs", ",": "commas", ";": "semicolons"}
    sign = next((sign for sign in signs if sign in header), None)
    if sign is None:
        words = [line.split() for line in lines]
        return (words, "blanks") if len(words[0]) > 1 else ([[line] for line in lines], "tabs")
    try:
        cells = list(csv.reader(io.StringIO("\n".join(lines)), delimiter=sign))
    except csv.Error:
        cells = []
    if len(cells) != len(lines):  # a stray quotation mark joins lines until the next one
        cells = [line.split(sign) for line in lines]
    return cells, signs[sign]
