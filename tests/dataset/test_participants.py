from __future__ import annotations

import json

import pytest

from bids_uad.dataset.participants import (
    cohort_of,
    derivative_participants,
    healthy_flag,
    read_participants,
)
from bids_uad.errors import InputError


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"group": "Control"}, True),
        ({"diagnosis": "HC"}, True),
        ({"Group": "CN"}, True),
        ({"group": "patient"}, False),
        ({"group": "patient", "diagnosis": "healthy"}, False),
        ({"diagnosis": "MS"}, False),
        ({"age": "40"}, None),
        ({}, None),
    ],
)
def test_healthy_is_what_the_table_says(row, expected):
    assert healthy_flag(row) is expected


def test_cohorts():
    assert cohort_of({"group": "control", "pathology": "none"}) == "healthy"
    assert cohort_of({"group": "patient", "pathology": "stroke"}) == "stroke"
    assert cohort_of({"group": "patient"}) == "unspecified"


def test_reads_the_first_folder_that_has_one(tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    out.mkdir()
    assert read_participants(raw, out).path is None
    (out / "participants.tsv").write_text("participant_id\tage\nsub-9\t9\n")
    assert read_participants(None, raw, out).labels == ["sub-9"]
    # A byte order mark, labels without sub- and stray blanks are common.
    (raw / "participants.tsv").write_text(
        "\ufeffparticipant_id\tgroup\tage\n01\tcontrol \tn/a\nsub-02\tpatient\t44\n"
    )
    people = read_participants(raw, out)
    assert people.labels == ["sub-01", "sub-02"]
    assert people.row("sub-01") == {"group": "control"}
    assert people.row("sub-02") == {"group": "patient", "age": "44"}
    assert people.row("sub-03") == {}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("subject\tage\nsub-1\t3\n", "no column participant_id"),
        ("participant_id\tage\nsub-1\t3\n1\t4\n", "sub-1 listed more than once"),
        ("", "not a tab-separated table"),
    ],
)
def test_damaged_tables_are_refused_by_name(tmp_path, text, problem):
    (tmp_path / "participants.tsv").write_text(text)
    with pytest.raises(InputError, match=problem) as caught:
        read_participants(tmp_path)
    assert "participants.tsv" in str(caught.value)


def test_derivative_table_is_a_superset_and_describes_every_column(tmp_path):
    (tmp_path / "participants.tsv").write_text("participant_id\tage\tiq\nsub-1\t3\tn/a\n")
    (tmp_path / "participants.json").write_text(json.dumps({"iq": {"Description": "own words"}}))
    table, columns = derivative_participants(read_participants(tmp_path), ["sub-1", "sub-7"])
    assert list(table["participant_id"]) == ["sub-1", "sub-7"]
    assert columns["iq"] == {"Description": "own words"}
    assert columns["age"]["Units"] == "year"
    assert set(columns) == set(table.columns)
