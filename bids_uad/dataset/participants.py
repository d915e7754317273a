"""What `participants.tsv` says about the people behind the scans."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from bids_uad.errors import InputError

HEALTHY_COLUMNS = ("group", "diagnosis")
HEALTHY_VALUES = frozenset({"control", "controls", "healthy", "hc", "cn", "normal"})
COHORT_COLUMN = "pathology"
SEXES = {"m": 0.5, "male": 0.5, "f": -0.5, "female": -0.5}
"""Sexes as numbers that sum to zero; others are not told."""

_DESCRIPTIONS: dict[str, dict[str, Any]] = {
    "participant_id": {"Description": "Unique participant identifier"},
    "age": {"Description": "Age of the participant", "Units": "year"},
    "sex": {"Description": "Sex of the participant as given in the source dataset"},
    "group": {
        "Description": "Group of the participant; control, controls, healthy, hc, cn and normal "
        "(any case) mean healthy, any other value means not healthy"
    },
    "diagnosis": {"Description": "Diagnosis of the participant"},
    "pathology": {"Description": "Kind of lesion; names the cohorts of the benchmark"},
    "scanner": {"Description": "Scanner the participant was imaged with"},
}


@dataclass(frozen=True)
class Participants:
    """One `participants.tsv`, looked up by `sub-<label>`.

    Parameters
    ----------
    table : pandas.DataFrame
        All columns as text, missing values as NaN, `participant_id` (with `sub-`) first.
    path : pathlib.Path or None
        Where it was read; None when there is no such file.
    descriptions : dict
        The column dictionary of the file's JSON sidecar (empty without one).
    cohort_column : str
        Column that names the cohorts of those who are not healthy.
    """

    table: pd.DataFrame
    path: Path | None = None
    descriptions: dict[str, Any] = field(default_factory=dict)
    cohort_column: str = COHORT_COLUMN
    _rows: dict[str, dict[str, str]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        records = self.table.to_dict(orient="records")
        rows = {
            record["participant_id"]: {
                key: value for key, value in record.items() if key != "participant_id" and not pd.isna(value)
            }
            for record in records
        }
        object.__setattr__(self, "_rows", rows)

    @property
    def labels(self) -> list[str]:
        """All participants of the file, as `sub-<label>`, in its order."""
        return list(self._rows)

    @property
    def columns(self) -> list[str]:
        """The columns beside `participant_id`, in the order of the file."""
        return [column for column in self.table.columns if column != "participant_id"]

    def __contains__(self, subject: object) -> bool:
        return subject in self._rows

    def row(self, subject: str) -> dict[str, str]:
        """Return what is known of `sub-<label>`, without missing values (empty if unknown)."""
        return self._rows.get(subject, {})

    def cohort(self, subject: str) -> str:
        """Return the benchmark cohort of `sub-<label>`, see :func:`cohort_of`."""
        return cohort_of(self.row(subject), self.cohort_column)

    def divided_by(self, column: str) -> Participants:
        """Name cohorts by another column.

        Raises
        ------
        InputError
            If there is no such column.
        """
        if column not in self.columns:
            raise InputError(
                self.path or "participants.tsv",
                f"no column {column} to name cohorts by",
                f"choose one of {', '.join(self.columns)}" if self.columns else "add it",
            )
        return replace(self, cohort_column=column)


def read_participants(*folders: str | Path | None) -> Participants:
    """Read the first `participants.tsv` found in `folders`.

    Parameters
    ----------
    *folders : path-like or None
        Where to look, in this order (the raw dataset, then the derivatives).

    Returns
    -------
    Participants
        An empty one when no folder has the file.

    Raises
    ------
    InputError
        If the file lacks `participant_id`, cannot be read as a table or names someone twice.
    """
    for folder in folders:
        path = None if folder is None else Path(folder) / "participants.tsv"
        if path is not None and path.is_file():
            return _read(path)
    return Participants(pd.DataFrame({"participant_id": pd.Series(dtype=str)}))


def _read(path: Path) -> Participants:
    try:
        table = pd.read_csv(
            path,
            sep="\t",
            dtype=str,
            encoding="utf-8-sig",
            keep_default_na=False,
            na_values=["n/a", "", "nan", "NaN"],
        )
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise InputError(path, f"not a tab-separated table ({error})", "repair it") from error
    if "participant_id" not in table.columns:
        raise InputError(path, "no column participant_id", "add it, or separate columns by tabs")
    table = table.dropna(subset=["participant_id"])
    labels = table["participant_id"].str.strip()
    labels = labels.where(labels.str.startswith("sub-"), "sub-" + labels)
    others = [column for column in table.columns if column != "participant_id"]
    table = table[others].map(lambda text: text.strip() if isinstance(text, str) else text)
    table.insert(0, "participant_id", labels)
    twice = labels[labels.duplicated()].unique()
    if len(twice):
        raise InputError(path, f"{', '.join(twice)} listed more than once", "keep one row each")
    sidecar = path.with_suffix(".json")
    descriptions = {}
    if sidecar.is_file():
        try:
            descriptions = json.loads(sidecar.read_text(encoding="utf-8-sig"))
        except json.JSONDecodeError as error:
            raise InputError(sidecar, f"not valid JSON ({error})", "repair or remove it") from error
    return Participants(table.reset_index(drop=True), path, descriptions)


def healthy_flag(row: Mapping[str, str]) -> bool | None:
    """Say whether a participant is healthy.

    Parameters
    ----------
    row : mapping
        The participant's row; the first of the columns `group` and `diagnosis` with a value
        decides.

    Returns
    -------
    bool or None
        None when nothing is said: nobody is healthy by omission.
    """
    by_name = {key.lower(): value for key, value in row.items()}
    for column in HEALTHY_COLUMNS:
        if column in by_name:
            return by_name[column].lower() in HEALTHY_VALUES
    return None


def cohort_of(row: Mapping[str, str], column: str = COHORT_COLUMN) -> str:
    """Return the benchmark cohort of a participant.

    Parameters
    ----------
    row : mapping
        The participant's row.
    column : str
        Name of a column, in any case.

    Returns
    -------
    str
        `healthy`, else the value of the column, else `unspecified`.
    """
    if healthy_flag(row):
        return "healthy"
    by_name = {key.lower(): value for key, value in row.items()}
    return by_name.get(column.lower(), "unspecified")


def age_and_sex(row: Mapping[str, str]) -> dict[str, float | None]:
    """Return what models of healthy people ask about a participant.

    Parameters
    ----------
    row : mapping
        The participant's row.

    Returns
    -------
    dict
        `age` in years (`89+` is 89) and `sex` as in `SEXES`; None where it is not known.
    """
    by_name = {key.lower(): value for key, value in row.items()}
    try:
        age = float(by_name.get("age", "nan").rstrip("+"))
    except ValueError:
        age = math.nan
    return {
        "age": age if math.isfinite(age) else None,
        "sex": SEXES.get(by_name.get("sex", "").lower()),
    }


def derivative_participants(
    participants: Participants, subjects: Iterable[str]
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Make the `participants.tsv` of the derivatives.

    Parameters
    ----------
    participants : Participants
        Those of the source dataset.
    subjects : iterable of str
        Every `sub-<label>` that has a folder in the derivatives.

    Returns
    -------
    table : pandas.DataFrame
        All rows of the source and one more for each subject that it does not list.
    descriptions : dict
        A description for every column.
    """
    extra = sorted(set(subjects) - set(participants.labels))
    table = participants.table
    if extra:
        table = pd.concat([table, pd.DataFrame({"participant_id": extra})], ignore_index=True)
    descriptions = {}
    for column in table.columns:
        known = participants.descriptions.get(column)
        descriptions[column] = known or _DESCRIPTIONS.get(
            column.lower(), {"Description": f"{column}, as given by the source dataset"}
        )
    return table, descriptions
