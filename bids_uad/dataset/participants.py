"""Participants of a dataset: age, sex, group and scanner at each session, and hashes for train/test overlap.

All levels read participants here. The values at a session are those of `sub-<label>_sessions.tsv`, else of
the row of `participants.tsv` with that `session_id`, else of the row of the participant without a session.
Contradictory values are treated as missing.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pandas as pd

from bids_uad.dataset.raw_metadata import (
    FEMALE,
    MALE,
    MAX_AGE,
    OTHER,
    SEXES,
    ColumnDescription,
    UnusableValueError,
    is_coded_1_2,
    is_healthy,
    is_missing,
    is_number,
    is_unknown,
    parse_age,
    parse_group,
    parse_sex,
    read_json_object,
    read_table,
)
from bids_uad.errors import InputError, truncate_list
from bids_uad.files import read_json, write_json, write_tsv

HEALTHY_COLUMNS = ("group", "diagnosis")
COHORT_COLUMN = "pathology"
STANDARD_COLUMNS = {
    "age": ("age",),
    "sex": ("sex", "gender"),
    "scanner": ("scanner",),
    "group": ("group",),
    "diagnosis": ("diagnosis",),
}
"""Columns that are converted to a standard form, and their accepted names (any case), the first preferred."""
HEALTHY, UNSPECIFIED = "healthy", "unspecified"
MAX_LISTED = 5
"""Maximum number of values listed in a message."""

_HASH_DIGITS = 16
_URN = "urn:bids-dataset:"

_DESCRIPTIONS: dict[str, dict[str, Any]] = {
    "participant_id": {"Description": "Unique participant identifier"},
    "session_id": {"Description": "Session of the participant"},
    "age": {"Description": "Age of the participant", "Units": "year"},
    "sex": {
        "Description": "Sex of the participant",
        "Levels": {MALE: "Male", FEMALE: "Female", OTHER: "Neither of the two"},
    },
    "group": {
        "Description": "Group of the participant: healthy control (control, healthy, HC, TDC, CN and similar "
        "names), or any other group"
    },
    "diagnosis": {"Description": "Diagnosis of the participant"},
    "pathology": {"Description": "Type of lesion, which defines the cohorts of the benchmark"},
    "scanner": {"Description": "Scanner with which the participant was imaged"},
}


@dataclass(frozen=True)
class Person:
    """Age, sex, health and scanner of a participant at one session; None for unknown values.

    Parameters
    ----------
    age : float, optional
        Age in years.
    sex : {"male", "female", "other"}, optional
        Sex.
    healthy : bool, optional
        Whether the participant is a healthy control by the column `group` or `diagnosis`.
    scanner : str, optional
        Name of the scanner.
    """

    age: float | None = None
    sex: str | None = None
    healthy: bool | None = None
    scanner: str | None = None

    @property
    def covariates(self) -> dict[str, float | None]:
        """Covariates of normative models: age in years, and sex coded as in `SEXES`."""
        return {"age": self.age, "sex": SEXES.get(self.sex)}


@dataclass(frozen=True)
class Participants:
    """Participants of a dataset, with lookup by participant and session.

    Parameters
    ----------
    rows : dict of str to dict, default={}
        Known values by `sub-<label>`, `ses-<label>` (None for values at all sessions) and column: `age` as
        float in years, all others as text. None marks contradictory values of a session.
    labels : tuple of str, default=()
        Participants listed in `participants.tsv`, as `sub-<label>`, in the order of the table.
    columns : tuple of str, default=()
        Columns of `participants.tsv` without `participant_id` and `session_id`, in the order of the table;
        `STANDARD_COLUMNS` have their standard names.
    path : pathlib.Path, optional
        Path of `participants.tsv`; None without the file.
    descriptions : dict, default={}
        Descriptions of the columns from the JSON sidecars.
    notes : tuple of str, default=()
        Values that were interpreted by convention or could not be used, as ``path: problem; remedy``.
    cohort_column : str, default="pathology"
        Column that names the cohorts of participants who are not healthy controls.
    """

    rows: Mapping[str, Mapping[str | None, Mapping[str, Any]]] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    path: Path | None = None
    descriptions: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    cohort_column: str = COHORT_COLUMN

    def row(self, subject: str, session: str | None = None) -> dict[str, Any]:
        """Return all known values of a participant.

        Parameters
        ----------
        subject : str
            Participant, `sub-<label>`.
        session : str, optional
            Label of the session, with or without `ses-`. Without a session, the row of the participant is
            returned, and values that are the same at all sessions.

        Returns
        -------
        dict
            Known values by column; empty if the participant is not in the dataset.
        """
        own = self.rows.get(subject, {})
        everywhere = own.get(None, {})
        if session is None:
            return merge_rows([row for key, row in own.items() if key is not None])[0] | everywhere
        row = {**everywhere, **own.get(_prefixed(session, "ses-"), {})}
        return {column: value for column, value in row.items() if value is not None}

    def person(self, subject: str, session: str | None = None) -> Person:
        """Return age, sex, health and scanner of a participant; parameters as for :meth:`row`."""
        row = self.row(subject, session)
        known = [row[name] for name in HEALTHY_COLUMNS if name in row and not is_number(row[name])]
        healthy = is_healthy(known[0]) if known else None
        return Person(row.get("age"), row.get("sex"), healthy, row.get("scanner"))

    def cohort(self, subject: str, session: str | None = None) -> str:
        """Return `healthy`, else the value of `cohort_column`, else `unspecified`; see :meth:`row`."""
        if self.person(subject, session).healthy:
            return HEALTHY
        row = self.row(subject, session)
        return str(row.get(self.column(self.cohort_column), UNSPECIFIED))

    def cohorts(self, subject: str) -> set[str]:
        """Return the cohorts of a participant (`sub-<label>`) at all sessions."""
        sessions = [session for session in self.rows.get(subject, {}) if session is not None]
        return {self.cohort(subject, session) for session in sessions or [None]}

    def column(self, name: str) -> str:
        """Return the name in `columns` of a column that is given in any case or by another accepted name."""
        if name in self.columns:
            return name
        common = next((fact for fact, names in STANDARD_COLUMNS.items() if name.lower() in names), None)
        return common or next((own for own in self.columns if own.lower() == name.lower()), name)

    def with_cohort_column(self, column: str) -> Participants:
        """Return the participants with another `cohort_column`.

        Parameters
        ----------
        column : str
            Column name, in any case.

        Returns
        -------
        Participants
            The same participants.

        Raises
        ------
        InputError
            If there is no such column.
        """
        name = self.column(column)
        if name not in self.columns:
            raise InputError(
                self.path or "participants.tsv",
                f"no column {column} for cohorts",
                f"choose one of {', '.join(self.columns)}" if self.columns else "add it",
            )
        return replace(self, cohort_column=name)

    def only(self, subjects: Iterable[str]) -> Participants:
        """Return a subset of the participants, given as `sub-<label>`."""
        kept = set(subjects)
        rows = {subject: own for subject, own in self.rows.items() if subject in kept}
        return replace(self, rows=rows, labels=tuple(label for label in self.labels if label in kept))


def read_participants(
    folder: str | Path | None = None, subjects: Iterable[str] | None = None
) -> Participants:
    """Read `participants.tsv`, the `sessions.tsv` of participants, and their sidecars.

    Parameters
    ----------
    folder : path-like, optional
        Root of a raw or derivative dataset.
    subjects : iterable of str, optional
        Participants (`sub-<label>`) whose `sessions.tsv` are read; by default all of the dataset.

    Returns
    -------
    Participants
        Empty without `folder`, or if it has none of the files.

    Raises
    ------
    InputError
        If `participants.tsv` or its sidecar cannot be read, or has no column `participant_id`. A
        `sessions.tsv` that cannot be read is skipped, with a note.
    """
    if folder is None:
        return Participants()
    root = Path(folder)
    path = root / "participants.tsv"
    reader = _Reader()
    labels: tuple[str, ...] = ()
    exists = path.is_symlink() or path.exists()
    if exists:
        labels = reader.read_participants(path)
    if subjects is None:
        sessions = sorted(root.glob("sub-*/sub-*_sessions.tsv"))
    else:
        sessions = [root / subject / f"{subject}_sessions.tsv" for subject in sorted(set(subjects))]
    reader.read_sessions(root, [path for path in sessions if path.is_symlink() or path.exists()])
    return Participants(
        rows=dict(reader.rows),
        labels=labels,
        columns=tuple(reader.columns),
        path=path if exists else None,
        descriptions=reader.descriptions,
        notes=tuple(reader.finish()),
    )


def try_read_participants(folder: str | Path, subjects: Iterable[str] | None = None) -> Participants:
    """Read participants as :func:`read_participants`; return none, with a note, if the table is not valid."""
    try:
        return read_participants(folder, subjects)
    except InputError as error:
        return Participants(notes=(f"{error}; the table is not used",))


class _Reader:
    """Reader of the participant tables of one dataset, which collects notes on values that cannot be used."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str | None, dict[str, Any]]] = defaultdict(dict)
        self.columns: list[str] = []
        self.descriptions: dict[str, Any] = {}
        self._entries: dict[str, Any] = {}
        self._sex_codes: frozenset[str] = frozenset()
        self._notes: list[str] = []
        self._session_notes: list[str] = []
        self._undescribed: dict[tuple[str, str], list[str]] = defaultdict(list)
        self._unusable: dict[tuple[str, str, str], list[str]] = defaultdict(list)
        self._inexact: dict[tuple[str, str], list[str]] = defaultdict(list)
        self._coded: dict[tuple[str, str], list[str]] = defaultdict(list)
        self._known: dict[tuple[str, str], int] = defaultdict(int)

    def read_participants(self, path: Path) -> tuple[str, ...]:
        """Read `participants.tsv` and return the listed participants."""
        table = read_table(path, "participant_id")
        self._notes += table.notes
        self._entries = entries = read_json_object(path.with_suffix(".json"))
        session_key = next((name for name in table.columns if name.lower() == "session_id"), None)
        others = [name for name in table.columns if name not in (table.key, session_key)]
        self._sex_codes = _values(table.rows, others, "sex")
        self.columns = list(dict.fromkeys(_common_name(name) for name in others))
        self._describe(others, entries)

        rows: dict[str, dict[str | None, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
        malformed = []
        for row in table.rows:
            if is_missing(row[table.key]):
                continue
            subject = _prefixed(row[table.key], "sub-")
            if len(subject.split()) > 1:
                malformed.append(row[table.key])
                continue
            session = row.get(session_key, "") if session_key else ""
            key = None if is_missing(session) else _prefixed(session, "ses-")
            rows[subject][key].append(self._normalise(row, others, entries, str(path)))
        if malformed:
            problem = f"not a participant_id: {truncate_list(malformed, MAX_LISTED)}"
            self._note(path, problem, "separate columns by tabs")
        for subject, by_session in rows.items():
            self._add(path, subject, by_session)
        return tuple(rows)

    def read_sessions(self, root: Path, paths: Sequence[Path]) -> None:
        """Read `sub-<label>_sessions.tsv` files; one that cannot be read is skipped with a note."""
        for path in paths:
            subject = path.parent.name
            try:
                shared = read_json_object(root / "sessions.json")
                table = read_table(path, "session_id")
                entries = {**self._entries, **shared, **read_json_object(path.with_suffix(".json"))}
            except InputError as error:
                self._session_notes.append(f"{error}; the table is not used")
                continue
            self._session_notes += table.notes
            others = [name for name in table.columns if name not in (table.key, "participant_id")]
            codes = self._sex_codes | _values(table.rows, others, "sex")
            self._describe(others, entries)
            by_session: dict[str | None, list[dict[str, Any]]] = defaultdict(list)
            for row in table.rows:
                if not is_missing(row[table.key]):
                    values = self._normalise(row, others, entries, f"{root}/sub-*/sub-*_sessions.tsv", codes)
                    by_session[_prefixed(row[table.key], "ses-")].append(values)
            for session, rows in by_session.items():
                values = self._merge(path, str(session), rows)
                self.rows[subject][session] = self.rows[subject].get(session, {}) | values

    def finish(self) -> list[str]:
        """Return all notes."""
        for (source, column, expected), values in self._unusable.items():
            known = self._known[source, column]
            problem = f"column {column}: {len(values)} of {known} values are not {expected}, and not used"
            if len(values) == known:
                problem = f"column {column} cannot be used: none of its values is {expected}"
            self._note(source, f"{problem} ({_listed(values)})", "add Levels or Units to the JSON sidecar")
        for (source, column), values in self._undescribed.items():
            counts = f"{len(values)} of {self._known[source, column]}"
            problem = (
                f"column {column}: {counts} values are numbers without a description ({_listed(values)})"
            )
            remedy = "describe them under Levels in the JSON sidecar; until then they do not mean healthy"
            self._note(source, problem, remedy)
        for (source, column), values in self._inexact.items():
            counts = f"{len(values)} of {self._known[source, column]}"
            problem = f"column {column}: {counts} ages are bounds or ranges ({_listed(values)})"
            self._note(source, problem, "the bound, or the middle of the range, is used")
        for (source, column), values in self._coded.items():
            self._note(
                source,
                f"column {column}: {len(values)} values are 1 or 2 without a description, "
                "read as 1 = male and 2 = female",
                "if this is wrong, describe them under Levels in the JSON sidecar",
            )
        notes = [*self._notes, *self._session_notes[:MAX_LISTED]]
        more = len(self._session_notes) - MAX_LISTED
        if more > 0:
            notes.append(f"{more} more notes of this kind about files sub-*_sessions.tsv")
        return notes

    def _note(self, source: str | Path, problem: str, remedy: str) -> None:
        self._notes.append(f"{source}: {problem}; {remedy}")

    def _describe(self, columns: Iterable[str], entries: Mapping[str, Any]) -> None:
        """Store the descriptions of columns, by standard name."""
        for column in columns:
            name, entry = _common_name(column), _entry(entries, column)
            entry = {"Description": entry} if isinstance(entry, str) else entry
            if isinstance(entry, Mapping) and entry:
                self.descriptions.setdefault(name, entry)

    def _normalise(
        self,
        row: Mapping[str, str],
        columns: Sequence[str],
        entries: Mapping[str, Any],
        source: str,
        codes: frozenset[str] | None = None,
    ) -> dict[str, Any]:
        """Return the known values of a row, those of `STANDARD_COLUMNS` in standard form."""
        values: dict[str, Any] = {}
        for column in sorted(columns, key=_rank):
            text, name = row.get(column, ""), _common_name(column)
            if is_missing(text) or (name in STANDARD_COLUMNS and is_unknown(text)):
                continue
            if name not in STANDARD_COLUMNS:
                values.setdefault(name, text)
                continue
            description = ColumnDescription.read(_entry(entries, column))
            self._known[source, column] += 1
            value = self._parse(name, text, description, (source, column), codes)
            if value is not None:
                values.setdefault(name, value)
        return values

    def _parse(
        self,
        name: str,
        text: str,
        description: ColumnDescription,
        where: tuple[str, str],
        codes: frozenset[str] | None,
    ) -> Any:
        """Parse a value of one of `STANDARD_COLUMNS`; None if it is missing or cannot be used."""
        expected = f"an age of 0 to {MAX_AGE:.0f} years" if name == "age" else "a sex"
        try:
            if name == "age":
                age, exact = parse_age(text, description)
                if not exact:
                    self._inexact[where].append(text)
                return age
            if name == "sex":
                codes = self._sex_codes if codes is None else codes
                sex = parse_sex(text, description, codes=codes)
                if is_number(text) and is_coded_1_2(text, description, codes):
                    self._coded[where].append(text)
                return sex
            return text if name == "scanner" else parse_group(text, description)
        except UnusableValueError:
            if name in HEALTHY_COLUMNS:
                self._undescribed[where].append(text)
                return text
            self._unusable[*where, expected].append(text)
            return None

    def _add(
        self, path: Path, subject: str, by_session: Mapping[str | None, Sequence[Mapping[str, Any]]]
    ) -> None:
        """Store the rows of a participant; values (not age) that all sessions share apply to any session."""
        sessions = {
            session: self._merge(path, f"{subject} {session or ''}".strip(), rows)
            for session, rows in by_session.items()
        }
        own = sessions.pop(None, {})
        common, _ = merge_rows(list(sessions.values()))
        common.pop("age", None)
        everywhere = common | {column: value for column, value in own.items() if value is not None}
        self.rows[subject][None] = everywhere
        for session, row in sessions.items():
            self.rows[subject][session] = {
                column: value for column, value in row.items() if everywhere.get(column, None) != value
            }

    def _merge(self, path: Path, name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Merge the rows of one participant and session; contradictory values become None, with a note."""
        values, contradictory = merge_rows(rows)
        if contradictory:
            self._note(
                path,
                f"{name} is listed more than once, with different "
                f"{truncate_list(contradictory, MAX_LISTED)}, which are treated as missing",
                "keep one row, or add a column session_id",
            )
        return {**values, **dict.fromkeys(contradictory)}


def _common_name(column: str) -> str:
    """Return the standard name of a column; other columns keep their names."""
    return next((fact for fact, names in STANDARD_COLUMNS.items() if column.lower() in names), column)


def _rank(column: str) -> int:
    """Return the preference of a column among those with the same standard name, 0 for the first."""
    names = STANDARD_COLUMNS.get(_common_name(column), ())
    return names.index(column.lower()) if names else 0


def _values(rows: Iterable[Mapping[str, str]], columns: Iterable[str], fact: str) -> frozenset[str]:
    """Return all values of the columns with a standard name."""
    own = [column for column in columns if _common_name(column) == fact]
    return frozenset(row[column] for row in rows for column in own if column in row)


def _entry(entries: Mapping[str, Any], column: str) -> Any:
    """Return the entry of a column in a sidecar, in any case; None without one."""
    if column in entries:
        return entries[column]
    return next((entry for name, entry in entries.items() if name.lower() == column.lower()), None)


def _listed(values: Iterable[str]) -> str:
    return truncate_list(dict.fromkeys(values), MAX_LISTED)


def _prefixed(label: str, prefix: str) -> str:
    """Return a label with its prefix, which it may have already, in any case."""
    label = label.strip()
    return prefix + (label[len(prefix) :] if label.lower().startswith(prefix) else label)


def merge_rows(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """Merge several rows of one participant.

    Parameters
    ----------
    rows : sequence of mapping
        Values by column; None is unknown.

    Returns
    -------
    merged : dict
        Values on which all rows agree.
    contradictory : list of str
        Columns with different values.
    """
    values: dict[str, list[Any]] = {}
    for row in rows:
        for column, value in row.items():
            different = values.setdefault(column, [])
            if value is not None and value not in different:
                different.append(value)
    merged = {column: different[0] for column, different in values.items() if len(different) == 1}
    return merged, [column for column, different in values.items() if len(different) > 1]


def describe_columns(participants: Participants, columns: Iterable[str]) -> dict[str, Any]:
    """Return the JSON descriptions of columns for a derivative table.

    Parameters
    ----------
    participants : Participants
        Participants of the source dataset.
    columns : iterable of str
        Columns of the table.

    Returns
    -------
    dict
        Descriptions of the source dataset, with units and levels in standard form.
    """
    described = {}
    for column in columns:
        usual = {"Description": f"{column}, from the source dataset"}
        usual = _DESCRIPTIONS.get(column.lower(), usual)
        own = dict(participants.descriptions.get(column, usual))
        if column in ("age", "sex"):
            own = {"Description": own.get("Description", usual["Description"])} | {
                key: value for key, value in usual.items() if key != "Description"
            }
        if column in HEALTHY_COLUMNS and any(map(is_number, own.get("Levels") or ())):
            own.pop("Levels")  # numbers are replaced by their descriptions
        described[column] = own
    return described


def write_participants(
    folder: Path, participants: Participants, subjects: Iterable[str], description: str
) -> None:
    """Write `participants.tsv`, and `sessions.tsv` of participants whose values differ between sessions.

    :func:`read_participants` reads the same values from these tables.

    Parameters
    ----------
    folder : pathlib.Path
        Root of a derivative dataset.
    participants : Participants
        Participants of the source dataset.
    subjects : iterable of str
        Participants (`sub-<label>`) with a folder in the derivatives. Those not listed in the source are
        added to the table; their `sessions.tsv` of earlier calls are removed if no longer needed.
    description : str
        Description of the table for its sidecar.
    """
    subjects = sorted(set(subjects))
    columns = ["participant_id", *participants.columns]
    labels = [*participants.labels, *(name for name in subjects if name not in set(participants.labels))]
    everywhere = [participants.rows.get(label, {}).get(None, {}) for label in labels]
    rows = [
        [label, *(_cell(row.get(name)) for name in participants.columns)]
        for label, row in zip(labels, everywhere, strict=True)
    ]
    _write(folder / "participants.tsv", rows, columns)
    described = describe_columns(participants, columns)
    write_json(folder / "participants.json", {"Description": description, **described})
    of_sessions: dict[str, None] = {}
    for subject in subjects:
        sessions = {key: row for key, row in participants.rows.get(subject, {}).items() if key is not None}
        names = list(dict.fromkeys(name for row in sessions.values() for name in row))
        target = folder / subject / f"{subject}_sessions.tsv"
        if names:
            rows = [[key, *(_cell(row.get(name)) for name in names)] for key, row in sessions.items()]
            _write(target, rows, ["session_id", *names])
            of_sessions |= dict.fromkeys(["session_id", *names])
        else:
            target.unlink(missing_ok=True)
    if of_sessions:
        described = describe_columns(participants, of_sessions)
        write_json(
            folder / "sessions.json", {"Description": "Values that differ between sessions", **described}
        )
    else:
        (folder / "sessions.json").unlink(missing_ok=True)


def _write(path: Path, rows: Sequence[Sequence[Any]], columns: Sequence[str]) -> None:
    write_tsv(path, pd.DataFrame(rows, columns=list(columns), dtype=object))


def _cell(value: Any) -> Any:
    """Return whole ages as int, so that they are written without a decimal point."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def subject_hash(dataset: str, subject: str) -> str:
    """Return the hash that identifies a participant by dataset and label.

    Parameters
    ----------
    dataset : str
        Name of the source dataset.
    subject : str
        Participant, ``sub-<label>``.

    Returns
    -------
    str
        16 hexadecimal digits.
    """
    return _hash(f"subject\n{dataset}\n{subject}")


def image_hash(sha256: str) -> str:
    """Return the hash that identifies a participant by a raw image, given the SHA-256 of the file."""
    return _hash(f"image\n{sha256}")


def source_name(folder: Path) -> str | None:
    """Return the name of the source dataset of a folder.

    Parameters
    ----------
    folder : pathlib.Path
        Raw dataset, or derivative dataset whose description links to the raw dataset as ``raw``.

    Returns
    -------
    str or None
        Name of the raw dataset; None if it is not stated.
    """
    metadata = read_json(folder / "dataset_description.json")
    link = metadata.get("DatasetLinks", {}).get("raw", "")
    return unquote(link.removeprefix(_URN)) if link.startswith(_URN) else metadata.get("Name")


def subject_hashes(folder: Path, subjects: Iterable[str]) -> set[str]:
    """Return the hashes of participants, by label and by raw image.

    Parameters
    ----------
    folder : pathlib.Path
        Dataset of the participants. Hashes of raw images are read from the completion records of the
        participant level, if there are any.
    subjects : iterable of str
        Participants, ``sub-<label>``.

    Returns
    -------
    set of str
        Results of :func:`subject_hash` and :func:`image_hash`.
    """
    name = source_name(folder)
    hashes = set()
    for subject in subjects:
        if name:
            hashes.add(subject_hash(name, subject))
        for record in (folder / subject).glob("**/log/*.json"):
            fingerprint = read_json(record).get("fingerprint", {})
            if "input_sha256" in fingerprint:
                hashes.add(image_hash(fingerprint["input_sha256"]))
    return hashes


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_HASH_DIGITS]
