"""Ages, sexes and diagnoses as they are written in tables of participants, brought to one form.

BIDS leaves much open: sexes are written as words, letters or numbers, ages are given as bounds (`89+`) and
ranges for privacy, and controls have many names. Each function takes the text of one cell and what the JSON
sidecar says about its column, whose `Levels` and `Units` take precedence over the defaults here.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bids_uad.errors import InputError, truncate_list, unreadable

MALE, FEMALE, OTHER = "male", "female", "other"
SEXES = {MALE: 0.5, FEMALE: -0.5}
"""Sexes as covariates of models, centred on zero."""
MAX_AGE = 120.0
"""Years; what is above it is a code, such as 999, or an age in another unit."""

_DASHES = ("\u2013", "\u2014")
_MISSING = frozenset({"", "-", "--", *_DASHES, ".", "n/a", "na", "n.a.", "#n/a", "<na>", "nan", "null"})
_UNKNOWN = frozenset(
    [
        *("?", "none", "unknown", "unk", "u", "missing", "undisclosed", "unspecified", "not available"),
        *("not known", "not reported", "not specified", "not applicable", "prefer not to say", "declined"),
    ]
)
"""Text that says, in a column of ages, sexes, groups or scanners, that the value is not known."""

_SEX_WORDS = {
    **dict.fromkeys(("m", "male", "males", "man", "men", "boy", "boys"), MALE),
    **dict.fromkeys(("f", "female", "females", "woman", "women", "girl", "girls"), FEMALE),
    **dict.fromkeys(("o", "other", "intersex", "diverse"), OTHER),
}

_HEALTHY_WORDS = frozenset(["control", "healthy", "normal", "neurotypical"])
_HEALTHY_ABBREVIATIONS = frozenset(["hc", "hv", "td", "tdc", "cn", "cu", "nc", "ctrl", "ctl"])
_HEALTHY_TOGETHER = frozenset(
    ["typically developing", "typical development", "cognitively normal", "cognitively unimpaired"]
)
_HEALTHY_BESIDE = frozenset(
    [
        *("participant", "subject", "volunteer", "adult", "individual", "person", "people", "child"),
        *("group", "comparison", "young", "younger", "old", "older", "elderly", "aged", "matched"),
        *("male", "female", "men", "women", "adolescent", "neurologically", "a", "the", "and", "or"),
        *("of", "in", "this", "study", "sample", "cohort", "site", "age", "children"),
    ]
)
"""Words that may stand beside one of the former without changing its meaning."""
_CLAUSE = re.compile(r"[.,;:(]|\b(?:without|with no|who|from|recruited)\b")

_DAYS = {"year": 365.25, "month": 365.25 / 12, "week": 7.0, "day": 1.0}
_UNITS = {
    **dict.fromkeys(("y", "yr", "yrs", "yo", "year", "years"), "year"),
    **dict.fromkeys(("m", "mo", "mos", "month", "months"), "month"),
    **dict.fromkeys(("w", "wk", "wks", "week", "weeks"), "week"),
    **dict.fromkeys(("d", "day", "days"), "day"),
}
_NUMBER = r"\d+(?:[.,]\d+)?"
_AGE = re.compile(
    rf"(?P<least>>=?|≥)?\s*(?P<low>{_NUMBER})\s*(?:(?:-|{'|'.join(_DASHES)}|to)\s*(?P<high>{_NUMBER}))?\s*(?P<plus>\+)?"
    r"\s*(?P<unit>[a-z]*)\.?(?:\s+old)?"
)


@dataclass(frozen=True)
class ColumnDescription:
    """What a JSON sidecar says about a column.

    Parameters
    ----------
    levels : dict of str to str
        Description of each value, by the value as text.
    units : str, optional
        Unit of the column; None if none is given.
    """

    levels: Mapping[str, str] = field(default_factory=dict)
    units: str | None = None

    @classmethod
    def read(cls, entry: Any) -> ColumnDescription:
        """Read the entry of a column; anything that BIDS does not define there is ignored.

        Parameters
        ----------
        entry : Any
            The JSON value. A level may be described by text or by an object with `Description`.

        Returns
        -------
        ColumnDescription
        """
        if not isinstance(entry, Mapping):
            return cls()
        units, levels = entry.get("Units"), entry.get("Levels")
        if not isinstance(units, str) or not units.strip():
            found = re.search(r"\bin (months|weeks|days)\b", str(entry.get("Description", "")).lower())
            units = found[1] if found else None
        if not isinstance(levels, Mapping):
            return cls({}, units)
        texts = {
            _code(str(key)): str(value.get("Description", "") if isinstance(value, Mapping) else value)
            for key, value in levels.items()
        }
        if texts and all(map(is_number, texts.values())) and not any(map(is_number, texts)):
            texts = {_code(code): label for label, code in texts.items()}  # written the wrong way round
        return cls(texts, units)

    def label(self, text: str) -> str | None:
        """Return how a value is described, None if it is not; exact spelling first, then any case."""
        code = _code(text)
        if code in self.levels:
            return self.levels[code]
        return next((label for key, label in self.levels.items() if key.lower() == code.lower()), None)


UNDESCRIBED = ColumnDescription()


class UnusableValueError(ValueError):
    """The text of a cell has no meaning that could be used."""


def is_missing(text: str) -> bool:
    """Return whether a cell is empty or says in one of the usual ways that nothing is there."""
    return text.strip().lower() in _MISSING


def is_unknown(text: str) -> bool:
    """Return whether a cell is missing, or says that its value is not known."""
    return is_missing(text) or text.strip().lower() in _UNKNOWN


def is_number(text: str) -> bool:
    """Return whether a cell holds a whole number, such as a code."""
    return re.fullmatch(r"[+-]?\d+", _code(text)) is not None


def parse_age(text: str, description: ColumnDescription = UNDESCRIBED) -> tuple[float | None, bool]:
    """Read an age.

    Parameters
    ----------
    text : str
        A number (`34`, `34.5`, `34,5`), with a unit of its own (`8 months`, `034Y`), a lower bound (`89+`,
        `>89`) or a range (`18-38`). A decimal comma is read as a point.
    description : ColumnDescription, default=UNDESCRIBED
        Its `units` are those of numbers without a unit, years if there are none. A described level, such as
        `1` for `18-29`, is read instead of the value.

    Returns
    -------
    age : float or None
        Years: the bound itself, the middle of a range; None if the value is missing.
    exact : bool
        False for a bound and for a range.

    Raises
    ------
    UnusableValueError
        If it is no age, negative, above `MAX_AGE` years, or in an unknown unit.
    """
    if is_unknown(text):
        return None, True
    label = description.label(text)
    if label is not None and is_unknown(label):
        return None, True
    found = _AGE.fullmatch((label or text).strip().lower()) or _AGE.fullmatch(text.strip().lower())
    if found is None:
        raise UnusableValueError(text)
    words = [found["unit"]] if found["unit"] else re.findall(r"[a-z]+", (description.units or "year").lower())
    unit = next((_UNITS[word] for word in words if word in _UNITS), None)
    if unit is None:
        raise UnusableValueError(text)
    low, high = (float(number.replace(",", ".")) for number in (found["low"], found["high"] or found["low"]))
    age = (low + high) / 2 * _DAYS[unit] / _DAYS["year"]
    if low > high or age > MAX_AGE:
        raise UnusableValueError(text)
    return age, not (found["high"] or found["plus"] or found["least"])


def parse_sex(
    text: str, description: ColumnDescription = UNDESCRIBED, *, codes: frozenset[str] = frozenset()
) -> str | None:
    """Read a sex.

    Parameters
    ----------
    text : str
        A word or its first letter, in any case, or a number.
    description : ColumnDescription, default=UNDESCRIBED
        Its `levels` say what a value means. Where they do not, words have their usual meaning.
    codes : frozenset of str, default=frozenset()
        All values of the column. Without levels, 1 is read as male and 2 as female, unless the column has a
        0, too: 0 and 1 are coded either way (UK Biobank has 0 for female, others have 0 for male).

    Returns
    -------
    str or None
        `male`, `female` or `other`; None if the value is missing.

    Raises
    ------
    UnusableValueError
        If it is none of these.
    """
    if is_unknown(text):
        return None
    label = description.label(text)
    if label is not None:
        if is_unknown(label):
            return None
        words = re.findall(r"[a-z]+", label.lower())
        words = [word for word in words if len(word) > 1 or len(words) == 1]
        sexes = {_SEX_WORDS[word] for word in words if word in _SEX_WORDS}
        if len(sexes) == 1:
            return sexes.pop()
    if text.strip().lower() in _SEX_WORDS:
        return _SEX_WORDS[text.strip().lower()]
    if is_coded_1_2(text, description, codes):
        return {"1": MALE, "2": FEMALE}[_code(text)]
    raise UnusableValueError(text)


def is_coded_1_2(text: str, description: ColumnDescription, codes: frozenset[str]) -> bool:
    """Return whether a sex is a number that :func:`parse_sex` reads by convention, without levels.

    Parameters
    ----------
    text : str
    description : ColumnDescription
    codes : frozenset of str
        All values of the column.
    """
    return not description.levels and _code(text) in ("1", "2") and "0" not in map(_code, codes)


def parse_group(text: str, description: ColumnDescription = UNDESCRIBED) -> str | None:
    """Read the group or diagnosis of a participant as text that :func:`is_healthy` understands.

    Parameters
    ----------
    text : str
    description : ColumnDescription, default=UNDESCRIBED
        Its `levels` replace numbers, and text where they say the opposite of it (`HC` for hydrocephalus).

    Returns
    -------
    str or None
        None if the value is missing.

    Raises
    ------
    UnusableValueError
        If it is a number that is not described.
    """
    if is_unknown(text):
        return None
    label = (description.label(text) or "").strip()
    if is_number(text):
        if not label:
            raise UnusableValueError(text)
        return None if is_unknown(label) else label
    if label and is_healthy(text):
        words = set(re.findall(r"[a-z]+", text.lower()))
        replaced = not is_healthy(label) and ("patient" in label.lower() or words <= _HEALTHY_ABBREVIATIONS)
    else:
        replaced = is_healthy(label)
    return label if replaced else text.strip()


def is_healthy(text: str) -> bool:
    """Return whether a group or diagnosis says that a participant is healthy.

    Parameters
    ----------
    text : str
        Only its first clause counts ("healthy controls, no neurological disease").

    Returns
    -------
    bool
        True if it is one of the usual names of healthy controls, in any case, singular or plural, with
        spaces, hyphens or underscores, and nothing but words such as `adult` or `matched` beside it. `disease
        control` and `not healthy` are none.
    """
    clause = _CLAUSE.split(text.strip().lower().replace("_", " "), maxsplit=1)[0]
    words = re.findall(r"[^\W_]+", clause)
    joined = f" {' '.join(words)} "
    found = any(f" {phrase} " in joined for phrase in _HEALTHY_TOGETHER)
    for phrase in _HEALTHY_TOGETHER:
        joined = joined.replace(f" {phrase} ", " ")
    for word in joined.split():
        forms = {word, word.removesuffix("s")}
        if forms & (_HEALTHY_WORDS | _HEALTHY_ABBREVIATIONS):
            found = True
        elif not forms & _HEALTHY_BESIDE and not word.isdigit():
            return False
    return found


def _code(text: str) -> str:
    """Write whole numbers alike: `1.0` and `01` are 1."""
    text = text.strip()
    number = re.fullmatch(r"([+-]?)0*(\d+)(?:\.0+)?", text)
    return f"{number[1].lstrip('+')}{number[2]}" if number else text


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
        columns = truncate_list(filter(None, header), 5)
        remedy = "add it, or separate columns by tabs"
        raise InputError(path, f"no column {key} (columns: {columns})", remedy)
    if separator != "tabs":
        if any(len(row) != len(header) for row in cells):
            raise InputError(path, f"columns are separated by {separator}", "separate them by tabs")
        notes.append(f"{path}: columns are separated by {separator}; BIDS asks for tabs")
    names = list(dict.fromkeys(filter(None, header)))
    twice = [name for name in names if header.count(name) > 1]
    if twice:
        notes.append(
            f"{path}: several columns are called {truncate_list(twice, 5)}; the first of them is used"
        )
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
            f"{path}: rows with more or fewer cells than the header are not used "
            f"({truncate_list(uneven, 5)}); write n/a for what is not known"
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
