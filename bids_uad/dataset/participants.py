"""Age, sex, group and scanner of participants at each session, from `participants.tsv` and `sessions.tsv`.

Every level reads them here, by one set of rules (:mod:`bids_uad.dataset.raw_metadata`). At a session,
`sub-<label>_sessions.tsv` is first, then a row of `participants.tsv` with that `session_id`, then the row of
the participant. What is missing or contradictory stays missing.
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
FACTS = {
    "age": ("age",),
    "sex": ("sex", "gender"),
    "scanner": ("scanner",),
    "group": ("group",),
    "diagnosis": ("diagnosis",),
}
"""Columns with one meaning and form, and their names, in any case; the first with a value counts."""
HEALTHY, UNSPECIFIED = "healthy", "unspecified"
MOST_VALUES = 5

_DESCRIPTIONS: dict[str, dict[str, Any]] = {
    "participant_id": {"Description": "Unique participant identifier"},
    "session_id": {"Description": "Session of the participant"},
    "age": {"Description": "Age of the participant", "Units": "year"},
    "sex": {
        "Description": "Sex of the participant",
        "Levels": {MALE: "Male", FEMALE: "Female", OTHER: "Neither of the two"},
    },
    "group": {
        "Description": "Group of the participant; the usual names of healthy controls, such as control, "
        "healthy, HC, TDC and CN, mean healthy, any other value means not healthy"
    },
    "diagnosis": {"Description": "Diagnosis of the participant"},
    "pathology": {"Description": "Kind of lesion; names the cohorts of the benchmark"},
    "scanner": {"Description": "Scanner the participant was imaged with"},
}


@dataclass(frozen=True)
class Person:
    """What is known about a participant at one session; None where it is not known.

    Parameters
    ----------
    age : float, optional
        Years.
    sex : {"male", "female", "other"}, optional
    healthy : bool, optional
        By the columns `group` and `diagnosis`; nobody is healthy without one of them.
    scanner : str, optional
    """

    age: float | None = None
    sex: str | None = None
    healthy: bool | None = None
    scanner: str | None = None

    @property
    def covariates(self) -> dict[str, float | None]:
        """Age in years and sex as in `SEXES`, as normative models take them."""
        return {"age": self.age, "sex": SEXES.get(self.sex)}


@dataclass(frozen=True)
class Participants:
    """The participants of a dataset, looked up by `sub-<label>` and session.

    Parameters
    ----------
    rows : dict of str to dict
        By `sub-<label>`, then by `ses-<label>` (None for what holds at any session), the values that are
        known: `age` as float in years, all others as text. None is a contradictory value of a session.
    labels : tuple of str
        Participants that `participants.tsv` lists, as `sub-<label>`, in its order.
    columns : tuple of str
        Columns of `participants.tsv` apart from `participant_id` and `session_id`, in its order; those of
        `FACTS` have their common name.
    path : pathlib.Path, optional
        The `participants.tsv`; None if there is none.
    descriptions : dict
        Descriptions of the columns, from the JSON sidecars.
    notes : tuple of str
        What was read by a convention or could not be used, as ``path: problem; remedy``.
    cohort_column : str, default="pathology"
        Column that names the cohorts of those who are not healthy.
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
            `sub-<label>`.
        session : str, optional
            Label of the session, with or without `ses-`. Without one, the values of the participant's own row
            count, and beside them those that no two sessions contradict.

        Returns
        -------
        dict
            Values by column, without missing ones; empty if the participant is not known.
        """
        own = self.rows.get(subject, {})
        everywhere = own.get(None, {})
        if session is None:
            return agreed([row for key, row in own.items() if key is not None])[0] | everywhere
        row = {**everywhere, **own.get(_prefixed(session, "ses-"), {})}
        return {column: value for column, value in row.items() if value is not None}

    def person(self, subject: str, session: str | None = None) -> Person:
        """Return age, sex, health and scanner of a participant; parameters as in :meth:`row`."""
        row = self.row(subject, session)
        known = [row[name] for name in HEALTHY_COLUMNS if name in row and not is_number(row[name])]
        healthy = is_healthy(known[0]) if known else None
        return Person(row.get("age"), row.get("sex"), healthy, row.get("scanner"))

    def cohort(self, subject: str, session: str | None = None) -> str:
        """Return `healthy`, else the value of the column that names cohorts, else `unspecified`."""
        if self.person(subject, session).healthy:
            return HEALTHY
        row = self.row(subject, session)
        return str(row.get(self.column(self.cohort_column), UNSPECIFIED))

    def cohorts(self, subject: str) -> set[str]:
        """Return the cohorts that a participant belongs to at any session."""
        sessions = [session for session in self.rows.get(subject, {}) if session is not None]
        return {self.cohort(subject, session) for session in sessions or [None]}

    def column(self, name: str) -> str:
        """Return how a column is called here that may be spelt in any case, or be called `gender`."""
        if name in self.columns:
            return name
        common = next((fact for fact, names in FACTS.items() if name.lower() in names), None)
        return common or next((own for own in self.columns if own.lower() == name.lower()), name)

    def divided_by(self, column: str) -> Participants:
        """Name cohorts by another column.

        Parameters
        ----------
        column : str
            In any case.

        Raises
        ------
        InputError
            If there is no such column.
        """
        name = self.column(column)
        if name not in self.columns:
            raise InputError(
                self.path or "participants.tsv",
                f"no column {column} to name cohorts by",
                f"choose one of {', '.join(self.columns)}" if self.columns else "add it",
            )
        return replace(self, cohort_column=name)

    def only(self, subjects: Iterable[str]) -> Participants:
        """Return the same for some of the participants."""
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
        A raw or derivative dataset.
    subjects : iterable of str, optional
        The `sub-<label>` whose `sessions.tsv` are looked for; all of the dataset by default.

    Returns
    -------
    Participants
        An empty one without `folder`, or if it has none of the files.

    Raises
    ------
    InputError
        If `participants.tsv` or its sidecar cannot be read, or it has no column `participant_id`. A
        `sessions.tsv` that cannot be read is left out, with a note.
    """
    if folder is None:
        return Participants()
    root = Path(folder)
    path = root / "participants.tsv"
    reader = _Reader()
    labels: tuple[str, ...] = ()
    is_there = path.is_symlink() or path.exists()
    if is_there:
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
        path=path if is_there else None,
        descriptions=reader.descriptions,
        notes=tuple(reader.finish()),
    )


def read_if_usable(folder: str | Path, subjects: Iterable[str] | None = None) -> Participants:
    """Do as :func:`read_participants`, but know nobody, with a note, if `participants.tsv` cannot be used."""
    try:
        return read_participants(folder, subjects)
    except InputError as error:
        return Participants(notes=(f"{error}; until then nothing is known of the participants",))


def agreed(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """Unite rows about the same.

    Parameters
    ----------
    rows : sequence of mapping
        A value of None is not known.

    Returns
    -------
    united : dict
        Values that no other row contradicts.
    contradictory : list of str
        Columns with several values.
    """
    values: dict[str, list[Any]] = {}
    for row in rows:
        for column, value in row.items():
            seen = values.setdefault(column, [])
            if value is not None and value not in seen:
                seen.append(value)
    united = {column: seen[0] for column, seen in values.items() if len(seen) == 1}
    return united, [column for column, seen in values.items() if len(seen) > 1]


def describe_columns(participants: Participants, columns: Iterable[str]) -> dict[str, Any]:
    """Return a JSON description of each column, as it is in `Participants`.

    Parameters
    ----------
    participants : Participants
    columns : iterable of str

    Returns
    -------
    dict
        That of the source dataset, with the units and levels of the common form.
    """
    described = {}
    for column in columns:
        usual = {"Description": f"{column}, as given by the source dataset"}
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
    """Write `participants.tsv`, and the `sessions.tsv` of participants whose values differ between sessions.

    :func:`read_participants` reads the same values from them.

    Parameters
    ----------
    folder : pathlib.Path
        A derivative dataset.
    participants : Participants
        Those of the source dataset.
    subjects : iterable of str
        Every `sub-<label>` that has a folder in the derivatives. Those that the source does not list are
        added; `sessions.tsv` of earlier calls that hold no longer are removed.
    description : str
        What the table is, for its sidecar.
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
    """Write whole ages without a point."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


class _Reader:
    """Reads the tables of one dataset, and keeps count of what could not be used."""

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
        """Read `participants.tsv`, and return whom it lists."""
        table = read_table(path, "participant_id")
        self._notes += table.notes
        self._entries = entries = read_json_object(path.with_suffix(".json"))
        session_key = next((name for name in table.columns if name.lower() == "session_id"), None)
        others = [name for name in table.columns if name not in (table.key, session_key)]
        self._sex_codes = _values(table.rows, others, "sex")
        self.columns = list(dict.fromkeys(_common_name(name) for name in others))
        self._describe(others, entries)

        found: dict[str, dict[str | None, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
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
            found[subject][key].append(self._normalise(row, others, entries, str(path)))
        if malformed:
            problem = f"not a participant_id: {truncate_list(malformed, MOST_VALUES)}"
            self._note(path, problem, "separate columns by tabs")
        for subject, by_session in found.items():
            self._add(path, subject, by_session)
        return tuple(found)

    def read_sessions(self, root: Path, paths: Sequence[Path]) -> None:
        """Read `sub-<label>_sessions.tsv` files; one that cannot be read is left out with a note."""
        for path in paths:
            subject = path.parent.name
            try:
                shared = read_json_object(root / "sessions.json")
                table = read_table(path, "session_id")
                entries = {**self._entries, **shared, **read_json_object(path.with_suffix(".json"))}
            except InputError as error:
                self._session_notes.append(f"{error}; until then it is not used")
                continue
            self._session_notes += table.notes
            others = [name for name in table.columns if name not in (table.key, "participant_id")]
            codes = self._sex_codes | _values(table.rows, others, "sex")
            self._describe(others, entries)
            found: dict[str | None, list[dict[str, Any]]] = defaultdict(list)
            for row in table.rows:
                if not is_missing(row[table.key]):
                    values = self._normalise(row, others, entries, f"{root}/sub-*/sub-*_sessions.tsv", codes)
                    found[_prefixed(row[table.key], "ses-")].append(values)
            for session, rows in found.items():
                values = self._unite(path, str(session), rows)
                self.rows[subject][session] = self.rows[subject].get(session, {}) | values

    def finish(self) -> list[str]:
        """Return all notes."""
        for (source, column, expected), values in self._unusable.items():
            known = self._known[source, column]
            problem = f"column {column}: {len(values)} of {known} values are not {expected}, and not used"
            if len(values) == known:
                problem = f"column {column} cannot be used: none of its values is {expected}"
            self._note(source, f"{problem} ({_some(values)})", "state Levels or Units in the JSON sidecar")
        for (source, column), values in self._undescribed.items():
            counts = f"{len(values)} of {self._known[source, column]}"
            problem = f"column {column}: {counts} values are numbers without a description ({_some(values)})"
            remedy = "describe them under Levels in the JSON sidecar, or nobody is healthy by them"
            self._note(source, problem, remedy)
        for (source, column), values in self._inexact.items():
            counts = f"{len(values)} of {self._known[source, column]}"
            problem = f"column {column}: {counts} ages are bounds or ranges ({_some(values)})"
            self._note(source, problem, "the bound, or the middle of the range, is used")
        for (source, column), values in self._coded.items():
            self._note(
                source,
                f"column {column}: {len(values)} values are 1 or 2 without a description, "
                "read as 1 = male and 2 = female",
                "if that is wrong, describe them under Levels in the JSON sidecar",
            )
        notes = [*self._notes, *self._session_notes[:MOST_VALUES]]
        more = len(self._session_notes) - MOST_VALUES
        if more > 0:
            notes.append(f"{more} more notes of this kind about files sub-*_sessions.tsv")
        return notes

    def _note(self, source: str | Path, problem: str, remedy: str) -> None:
        self._notes.append(f"{source}: {problem}; {remedy}")

    def _describe(self, columns: Iterable[str], entries: Mapping[str, Any]) -> None:
        """Keep the descriptions of columns, those of `FACTS` in their common form."""
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
        """Return the known values of a row, those of `FACTS` in their common form."""
        values: dict[str, Any] = {}
        for column in sorted(columns, key=_rank):
            text, name = row.get(column, ""), _common_name(column)
            if is_missing(text) or (name in FACTS and is_unknown(text)):
                continue
            if name not in FACTS:
                values.setdefault(name, text)
                continue
            description = ColumnDescription.read(_entry(entries, column))
            self._known[source, column] += 1
            value = self._fact(name, text, description, (source, column), codes)
            if value is not None:
                values.setdefault(name, value)
        return values

    def _fact(
        self,
        name: str,
        text: str,
        description: ColumnDescription,
        where: tuple[str, str],
        codes: frozenset[str] | None,
    ) -> Any:
        """Read the value of a column of `FACTS`; None if it is missing or unusable."""
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
        """Keep the rows of a participant; what no session contradicts holds at any of them, age apart."""
        sessions = {
            session: self._unite(path, f"{subject} {session or ''}".strip(), rows)
            for session, rows in by_session.items()
        }
        own = sessions.pop(None, {})
        common, _ = agreed(list(sessions.values()))
        common.pop("age", None)
        everywhere = common | {column: value for column, value in own.items() if value is not None}
        self.rows[subject][None] = everywhere
        for session, row in sessions.items():
            self.rows[subject][session] = {
                column: value for column, value in row.items() if everywhere.get(column, None) != value
            }

    def _unite(self, path: Path, who: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Unite rows of one participant and session; contradictory values become None, with a note."""
        values, contradictory = agreed(rows)
        if contradictory:
            self._note(
                path,
                f"{who} is listed more than once, with different "
                f"{truncate_list(contradictory, MOST_VALUES)}, which count as missing",
                "keep one row, or add a column session_id",
            )
        return {**values, **dict.fromkeys(contradictory)}


def _common_name(column: str) -> str:
    """Return the common name of a column of `FACTS`, of another its own."""
    return next((fact for fact, names in FACTS.items() if column.lower() in names), column)


def _rank(column: str) -> int:
    """Return the place of a column among those of the same meaning."""
    names = FACTS.get(_common_name(column), ())
    return names.index(column.lower()) if names else 0


def _values(rows: Iterable[Mapping[str, str]], columns: Iterable[str], fact: str) -> frozenset[str]:
    """Return all values of the columns with one meaning."""
    own = [column for column in columns if _common_name(column) == fact]
    return frozenset(row[column] for row in rows for column in own if column in row)


def _entry(entries: Mapping[str, Any], column: str) -> Any:
    """Return the entry of a column, spelt in any case, in a sidecar."""
    if column in entries:
        return entries[column]
    return next((entry for name, entry in entries.items() if name.lower() == column.lower()), None)


def _some(values: Iterable[str]) -> str:
    return truncate_list(dict.fromkeys(values), MOST_VALUES)


def _prefixed(label: str, prefix: str) -> str:
    """Return a label with its prefix, which may be there already, in any case."""
    label = label.strip()
    return prefix + (label[len(prefix) :] if label.lower().startswith(prefix) else label)


LENGTH = 16  # hexadecimal digits
URN = "urn:bids-dataset:"


def by_name(dataset: str, subject: str) -> str:
    """Hash of a subject's name.

    Parameters
    ----------
    dataset : str
        Name of the source dataset.
    subject : str
        ``sub-<label>``.
    """
    return _hash(f"subject\n{dataset}\n{subject}")


def by_content(sha256: str) -> str:
    """Hash of a raw image, given the SHA-256 of its bytes."""
    return _hash(f"image\n{sha256}")


def source_name(folder: Path) -> str | None:
    """Name of the dataset that the subjects of a folder come from.

    Parameters
    ----------
    folder : pathlib.Path
        A raw dataset, or a derivative whose description links to it as ``raw``.

    Returns
    -------
    str or None
        None where the description does not say.
    """
    told = read_json(folder / "dataset_description.json")
    link = told.get("DatasetLinks", {}).get("raw", "")
    return unquote(link.removeprefix(URN)) if link.startswith(URN) else told.get("Name")


def identities(folder: Path, subjects: Iterable[str]) -> set[str]:
    """Hashes of subjects of a preprocessed dataset, both sorts.

    Parameters
    ----------
    folder : pathlib.Path
        As the participant level or the simulator writes it. The former leaves a record of each raw image.
    subjects : iterable of str
        ``sub-<label>``.
    """
    name = source_name(folder)
    found = set()
    for subject in subjects:
        if name:
            found.add(by_name(name, subject))
        for record in (folder / subject).glob("**/log/*.json"):
            told = read_json(record).get("fingerprint", {})
            if "input_sha256" in told:
                found.add(by_content(told["input_sha256"]))
    return found


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]
