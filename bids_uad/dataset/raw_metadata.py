"""Reading of the metadata of a raw dataset: TSV tables, JSON sidecars, and the cells of participants tables.

BIDS leaves much open: sexes are written as words, letters or numbers, ages are given as bounds (`89+`) or
ranges for privacy, and healthy controls have many names. The `parse_` functions take the text of one cell and
the description of its column in the JSON sidecar, whose `Levels` and `Units` override the defaults here.
"""

from __future__ import annotations

import csv
import io
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from bids_uad.errors import InputError, truncate_list, unreadable
from bids_uad.files import parse_json_object

LOGGER = logging.getLogger("bids_uad")


MALE, FEMALE, OTHER = "male", "female", "other"
SEXES = {MALE: 0.5, FEMALE: -0.5}
"""Value of each sex as a covariate, centred on zero."""
MAX_AGE = 120.0
"""Highest age in years; a larger number is a code, such as 999, or an age in another unit."""

_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_POINTERS = ("/annex/objects/", "version https://git-lfs")
"""First characters of the files that git-annex and Git LFS leave in place of the content."""
_DASHES = ("\u2013", "\u2014")
_MISSING = frozenset({"", "-", "--", *_DASHES, ".", "n/a", "na", "n.a.", "#n/a", "<na>", "nan", "null"})
_UNKNOWN = frozenset(
    [
        *("?", "none", "unknown", "unk", "u", "missing", "undisclosed", "unspecified", "not available"),
        *("not known", "not reported", "not specified", "not applicable", "prefer not to say", "declined"),
    ]
)
"""Texts for a value that is not known, in columns of ages, sexes, groups or scanners."""

_SEX_WORDS = {
    **dict.fromkeys(("m", "male", "males", "man", "men", "boy", "boys"), MALE),
    **dict.fromkeys(("f", "female", "females", "woman", "women", "girl", "girls"), FEMALE),
    **dict.fromkeys(("o", "other", "intersex", "diverse"), OTHER),
}

_HEALTHY_WORDS = frozenset(["control", "healthy", "normal", "neurotypical"])
_HEALTHY_ABBREVIATIONS = frozenset(["hc", "hv", "td", "tdc", "cn", "cu", "nc", "ctrl", "ctl"])
_HEALTHY_PHRASES = frozenset(
    ["typically developing", "typical development", "cognitively normal", "cognitively unimpaired"]
)
_NEUTRAL_WORDS = frozenset(
    [
        *("participant", "subject", "volunteer", "adult", "individual", "person", "people", "child"),
        *("group", "comparison", "young", "younger", "old", "older", "elderly", "aged", "matched"),
        *("male", "female", "men", "women", "adolescent", "neurologically", "a", "the", "and", "or"),
        *("of", "in", "this", "study", "sample", "cohort", "site", "age", "children"),
    ]
)
"""Words that do not change the meaning of a name for healthy controls, such as `adult healthy controls`."""
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
class Table:
    """Table of text cells.

    Parameters
    ----------
    key : str
        Name of the column that identifies rows, as spelt in the file.
    columns : tuple of str
        Columns that have a name, in the order of the file.
    rows : tuple of dict
        Cells by column, without surrounding blanks.
    notes : tuple of str
        Deviations from the BIDS format that were tolerated, as ``path: problem; remedy``.
    """

    key: str
    columns: tuple[str, ...]
    rows: tuple[dict[str, str], ...]
    notes: tuple[str, ...]


def read_table(path: Path, key: str) -> Table:
    """Read a tab-separated table of a raw dataset.

    A byte order mark, any line ends, UTF-16 and Latin-1 are accepted; so are commas, semicolons or blanks as
    separators if every row then has as many cells as the header.

    Parameters
    ----------
    path : pathlib.Path
        The table.
    key : str
        Name of the column that identifies rows, in lower case; the file may spell it in any case.

    Returns
    -------
    Table
        A row with more or fewer cells than the header has only its key, since the columns of its cells are
        not known.

    Raises
    ------
    InputError
        If the file cannot be read, is empty, is not text, or has no column `key`.
    """
    text, notes = _read_text(path)
    lines = [line for line in re.split(r"\r\n|\r|\n", text) if line.strip()]
    if not lines:
        raise InputError(path, "an empty file", f"write a table with a column {key}, or remove it")
    cells, separator = _split_cells(lines)
    header = [name.strip() for name in cells[0]]
    while not header[-1]:
        header.pop()
    key_index = next((i for i, name in enumerate(header) if name.lower() == key), None)
    if key_index is None:
        columns = truncate_list(filter(None, header), 5)
        remedy = "add it, or separate columns by tabs"
        raise InputError(path, f"no column {key} (columns: {columns})", remedy)
    if separator != "tabs":
        if any(len(row) != len(header) for row in cells):
            raise InputError(path, f"columns are separated by {separator}", "separate them by tabs")
        notes.append(f"{path}: columns are separated by {separator}; BIDS asks for tabs")
    names = list(dict.fromkeys(filter(None, header)))
    duplicates = [name for name in names if header.count(name) > 1]
    if duplicates:
        notes.append(f"{path}: several columns named {truncate_list(duplicates, 5)}; the first is used")
    rows, uneven = [], []
    for row in cells[1:]:
        row = [cell.strip() for cell in row]
        while len(row) > len(header) and not row[-1]:
            row.pop()
        if len(row) == len(header):
            rows.append({name: row[header.index(name)] for name in names})
        elif len(row) > key_index:
            uneven.append(row[key_index])
            rows.append({header[key_index]: row[key_index]})
    if uneven:
        notes.append(
            f"{path}: rows with more or fewer cells than the header are not used "
            f"({truncate_list(uneven, 5)}); write n/a for missing values"
        )
    return Table(header[key_index], tuple(names), tuple(rows), tuple(notes))


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file of a raw dataset.

    Parameters
    ----------
    path : pathlib.Path
        The file.

    Returns
    -------
    dict
        Fields of the JSON object; empty if there is no such file.

    Raises
    ------
    InputError
        If the file cannot be read, is not valid JSON, or does not hold an object.
    """
    if not path.is_symlink() and not path.exists():
        return {}
    try:
        return parse_json_object(path)
    except ValueError as error:
        raise InputError(path, str(error), "repair it") from error


def _read_text(path: Path) -> tuple[str, list[str]]:
    """Read a text file in UTF-8, UTF-16 (with a byte order mark) or else Latin-1; add a note if not UTF-8."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    encoding, notes = "utf-8-sig", []
    try:
        if content.startswith(_UTF16_MARKS):
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


def _split_cells(lines: list[str]) -> tuple[list[list[str]], str]:
    """Split lines into cells; return also the name of the separator."""
    separators = {"\t": "tabs", ",": "commas", ";": "semicolons"}
    separator = next((character for character in separators if character in lines[0]), None)
    if separator is None:
        words = [line.split() for line in lines]
        return (words, "blanks") if len(words[0]) > 1 else ([[line] for line in lines], "tabs")
    try:
        cells = list(csv.reader(io.StringIO("\n".join(lines)), delimiter=separator))
    except csv.Error:
        cells = []
    if len(cells) != len(lines):  # a stray quotation mark joins lines until the next one
        cells = [line.split(separator) for line in lines]
    return cells, separators[separator]


class SidecarReader:
    """Reader of the sidecars of images, by the inheritance principle of BIDS.

    Files that several images share are read once.

    Parameters
    ----------
    root : pathlib.Path
        Root of the raw dataset.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._read = cache(read_json_object)
        self._json_files = cache(lambda folder: sorted(folder.glob("*.json")))

    def files(self, image: PurePosixPath) -> list[Path]:
        """List the sidecars that apply to an image, the most specific last.

        Parameters
        ----------
        image : pathlib.PurePosixPath
            Image, relative to the root of the dataset.

        Returns
        -------
        list of pathlib.Path
            JSON files with the suffix of the image, in the folders above it, whose names have no entity that
            the image lacks. Files in outer folders come first, and within a folder those with fewer entities.
        """
        entities, suffix = _split_name(image.name)
        files = []
        for folder in reversed(image.parents):
            candidates = [(*_split_name(path.name), path) for path in self._json_files(self._root / folder)]
            applicable = [
                (len(own), path) for own, kind, path in candidates if kind == suffix and own <= entities
            ]
            files += [path for _, path in sorted(applicable)]
        return files

    def fields(self, image: PurePosixPath) -> dict[str, Any]:
        """Merge the sidecars of an image; a more specific file overrides the fields of a less specific one.

        Parameters
        ----------
        image : pathlib.PurePosixPath
            Image, relative to the root of the dataset.

        Returns
        -------
        dict
            Metadata of the image; empty without a sidecar.

        Raises
        ------
        InputError
            If one of the sidecars cannot be read or is not a JSON object.
        """
        fields: dict[str, Any] = {}
        for path in self.files(image):
            fields |= self._read(path)
        return fields

    def fields_if_readable(self, image: PurePosixPath) -> dict[str, Any]:
        """Return :meth:`fields` of an image, or none, with a warning, if a sidecar cannot be read."""
        try:
            return self.fields(image)
        except InputError as error:
            LOGGER.warning("%s. The metadata of %s are not used", error, image.name)
            return {}


def _split_name(name: str) -> tuple[frozenset[str], str]:
    """Split a file name into its entities (`key-value`) and its suffix."""
    *entities, suffix = name.split(".", 1)[0].split("_")
    return frozenset(entities), suffix


@dataclass(frozen=True)
class ColumnDescription:
    """Description of a table column in a JSON sidecar.

    Parameters
    ----------
    levels : dict of str to str, default={}
        Description of each value, by the value as text.
    units : str, optional
        Unit of the numbers; None if the sidecar does not state it.
    """

    levels: Mapping[str, str] = field(default_factory=dict)
    units: str | None = None

    @classmethod
    def read(cls, entry: Any) -> ColumnDescription:
        """Read the entry of a column in a JSON sidecar.

        Parameters
        ----------
        entry : Any
            JSON value; keys that BIDS does not define are ignored. A level is described by text or by an
            object with `Description`.

        Returns
        -------
        ColumnDescription
            Units and levels; those that cannot be used are missing.
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
        """Return the description of a value, None without one; the spelling may differ in case."""
        code = _code(text)
        if code in self.levels:
            return self.levels[code]
        return next((label for key, label in self.levels.items() if key.lower() == code.lower()), None)


UNDESCRIBED = ColumnDescription()


class UnusableValueError(ValueError):
    """The text of a cell cannot be interpreted."""


def is_missing(text: str) -> bool:
    """Return whether a cell is empty or holds one of the usual marks of a missing value, such as `n/a`."""
    return text.strip().lower() in _MISSING


def is_unknown(text: str) -> bool:
    """Return whether a value is missing or, by its text, not known (`unknown`, `not reported`)."""
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
        Description of the column. Its `units` apply to numbers without a unit (default: years). The
        description of a level, such as `18-29` for `1`, replaces the value.

    Returns
    -------
    age : float or None
        Age in years: the bound itself, or the middle of a range; None if the value is missing.
    exact : bool
        False for a bound or a range.

    Raises
    ------
    UnusableValueError
        If the text is not an age from 0 to `MAX_AGE` years in a known unit.
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
        Description of the column. Its `levels` take precedence over the usual meaning of words.
    codes : frozenset of str, default=frozenset()
        All values of the column. Without levels, 1 is read as male and 2 as female unless the column also
        has a 0, since datasets differ in what 0 and 1 stand for.

    Returns
    -------
    str or None
        `male`, `female` or `other`; None if the value is missing.

    Raises
    ------
    UnusableValueError
        If the text is neither missing nor one of these.
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
        Text of the cell.
    description : ColumnDescription
        Description of the column.
    codes : frozenset of str
        All values of the column.

    Returns
    -------
    bool
        True for 1 and 2 in a column without levels and without a 0.
    """
    return not description.levels and _code(text) in ("1", "2") and "0" not in map(_code, codes)


def parse_group(text: str, description: ColumnDescription = UNDESCRIBED) -> str | None:
    """Read the group or diagnosis of a participant, as text for :func:`is_healthy`.

    Parameters
    ----------
    text : str
        Text of the cell.
    description : ColumnDescription, default=UNDESCRIBED
        Description of the column. Its `levels` replace numbers, and texts that they contradict, such as `HC`
        for hydrocephalus.

    Returns
    -------
    str or None
        Group or diagnosis in words; None if the value is missing.

    Raises
    ------
    UnusableValueError
        If the text is a number without a description.
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
    """Return whether a group or diagnosis is one of the usual names of healthy controls.

    Parameters
    ----------
    text : str
        Group or diagnosis. Only the first clause is read ("healthy controls, no neurological disease").

    Returns
    -------
    bool
        True for names such as `HC`, `TD`, `control` or `healthy volunteers`, in any case, singular or plural,
        with spaces, hyphens or underscores, also with words such as `adult` or `matched`. False for `disease
        control` and `not healthy`.
    """
    clause = _CLAUSE.split(text.strip().lower().replace("_", " "), maxsplit=1)[0]
    words = re.findall(r"[^\W_]+", clause)
    joined = f" {' '.join(words)} "
    healthy = any(f" {phrase} " in joined for phrase in _HEALTHY_PHRASES)
    for phrase in _HEALTHY_PHRASES:
        joined = joined.replace(f" {phrase} ", " ")
    for word in joined.split():
        forms = {word, word.removesuffix("s")}
        if forms & (_HEALTHY_WORDS | _HEALTHY_ABBREVIATIONS):
            healthy = True
        elif not forms & _NEUTRAL_WORDS and not word.isdigit():
            return False
    return healthy


def _code(text: str) -> str:
    """Return whole numbers in one spelling: `1.0` and `01` become `1`."""
    text = text.strip()
    number = re.fullmatch(r"([+-]?)0*(\d+)(?:\.0+)?", text)
    return f"{number[1].lstrip('+')}{number[2]}" if number else text
