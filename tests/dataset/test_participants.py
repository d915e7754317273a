from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pandas as pd
import pytest

from bids_uad.dataset.participants import (
    Person,
    image_hash,
    read_participants,
    source_name,
    subject_hash,
    subject_hashes,
    write_participants,
)
from bids_uad.errors import InputError


def write(
    folder: Path, text: str | bytes = "", sidecar: dict | None = None, sessions: dict | None = None
) -> Path:
    """Write participants.tsv, its sidecar, and sessions.tsv by participant."""
    folder.mkdir(exist_ok=True)
    if text:
        content = text.encode() if isinstance(text, str) else text
        (folder / "participants.tsv").write_bytes(content)
    if sidecar is not None:
        (folder / "participants.json").write_text(json.dumps(sidecar))
    for subject, table in (sessions or {}).items():
        (folder / subject).mkdir(exist_ok=True)
        (folder / subject / f"{subject}_sessions.tsv").write_text(table)
    return folder


def column(name: str, *values: str) -> str:
    """Write participants.tsv with one column."""
    rows = [f"sub-{number}\t{value}\n" for number, value in enumerate(values, start=1)]
    return f"participant_id\t{name}\n{''.join(rows)}"


def levels(**described: str) -> dict:
    return {"Levels": described}


AGES = {
    "whole": (["34"], {}, [34.0], None),
    "decimals": (["34.5", "34,5"], {}, [34.5, 34.5], None),
    "newborn": (["0"], {}, [0.0], None),
    "bound": (
        ["89+", ">89", "≥ 90", "30"],
        {},
        [89.0, 89.0, 90.0, 30.0],
        "3 of 4 ages are bounds or ranges (89+, >89",
    ),
    "range": (
        ["18-38", "18 \u2013 38", "35 to 40"],
        {},
        [28.0, 28.0, 37.5],
        "3 of 3 ages are bounds or ranges (18-38",
    ),
    "missing": (["-", "", "N/A", "n/a", "NaN", "nan", "unknown", "?", "NA"], {}, [None] * 9, None),
    "own unit": (["34 years", "34y", "6 months", "034Y", "006M"], {}, [34.0, 34.0, 0.5, 34.0, 0.5], None),
    "months": (["408", "6"], {"Units": "months"}, [34.0, 0.5], None),
    "weeks": (["40"], {"Units": "week"}, [280 / 365.25], None),
    "days": (["7"], {"Units": "days"}, [7 / 365.25], None),
    "years": (["34"], {"Units": "years (rounded)"}, [34.0], None),
    "months in the description": (["18"], {"Description": "Age in months at scan"}, [1.5], None),
    "range of months": (["12-24"], {"Units": "months"}, [1.5], "1 of 1 ages are bounds or ranges (12-24)"),
    "levels": (
        ["1", "2"],
        levels(**{"1": "18-29", "2": "30 to 39 years"}),
        [23.5, 34.5],
        "2 of 2 ages are bounds",
    ),
    "unknown level": (["9", "30"], levels(**{"9": "not reported"}), [None, 30.0], None),
    "negative": (
        ["-5", "30"],
        {},
        [None, 30.0],
        "column age: 1 of 2 values are not an age of 0 to 120 years",
    ),
    "too old": (
        ["408", "30"],
        {},
        [None, 30.0],
        "column age: 1 of 2 values are not an age of 0 to 120 years",
    ),
    "words": (["old", "30"], {}, [None, 30.0], "not an age of 0 to 120 years, and not used (old)"),
    "reversed range": (
        ["38-18", "30"],
        {},
        [None, 30.0],
        "not an age of 0 to 120 years, and not used (38-18)",
    ),
    "date": (
        ["1985-03-12", "30"],
        {},
        [None, 30.0],
        "not an age of 0 to 120 years, and not used (1985-03-12)",
    ),
    "birth year": (["1985", "30"], {}, [None, 30.0], "not an age of 0 to 120 years, and not used (1985)"),
    "infinite": (["inf", "30"], {}, [None, 30.0], "not an age of 0 to 120 years, and not used (inf)"),
    "unknown unit": (
        ["34"],
        {"Units": "parsec"},
        [None],
        "column age cannot be used: none of its values is an age",
    ),
    "no age at all": (
        ["a", "b", "c", "d", "e", "f"],
        {},
        [None] * 6,
        "column age cannot be used: none of its values is an age of 0 to 120 years (a, b, c, d, e and 1",
    ),
}
SEXES = {
    "words": (
        ["male", "Female", "MALE", "woman", "Boy"],
        {},
        ["male", "female", "male", "female", "male"],
        None,
    ),
    "letters": (["m", "F", "o", "O"], {}, ["male", "female", "other", "other"], None),
    "missing": (["n/a", "-", "", "U", "unknown"], {}, [None] * 5, None),
    "1 and 2": (
        ["1", "2", "n/a"],
        {},
        ["male", "female", None],
        "column sex: 2 values are 1 or 2 without a description, read as 1 = male and 2 = female",
    ),
    "1.0 and 2.0": (["1.0", "2.0"], {}, ["male", "female"], "column sex: 2 values are 1 or 2 without"),
    "0 and 1": (
        ["0", "1", "1"],
        {},
        [None] * 3,
        "column sex cannot be used: none of its values is a sex (0, 1)",
    ),
    "1, 2 and 9": (["1", "2", "9"], {}, ["male", "female", None], "column sex: 1 of 3 values are not a sex"),
    "levels of numbers": (["1", "2"], levels(**{"1": "Female", "2": "Male"}), ["female", "male"], None),
    "levels of 0 and 1": (["0", "1"], levels(**{"0": "female", "1": "male"}), ["female", "male"], None),
    "levels in objects": (["1"], levels(**{"1": {"Description": "Female participant"}}), ["female"], None),
    "levels the wrong way round": (["1", "2"], levels(female="1", male="2"), ["female", "male"], None),
    "levels win": (["M"], levels(M="female"), ["female"], None),
    "levels in another case": (["f"], levels(F="female", M="male"), ["female"], None),
    "foreign level": (["F"], levels(F="weiblich"), ["female"], None),
    "levels without this number": (
        ["1", "3"],
        levels(**{"1": "male"}),
        ["male", None],
        "not a sex, and not used (3)",
    ),
    "level not known": (["9"], levels(**{"9": "unknown"}), [None], None),
    "level of both": (["1"], levels(**{"1": "male or female"}), [None], "column sex cannot be used"),
    "other letters": (
        ["D", "F"],
        {},
        [None, "female"],
        "column sex: 1 of 2 values are not a sex, and not used (D)",
    ),
}
GROUPS = {
    **{
        text: ([text], {}, [True], None)
        for text in (
            *(
                "control",
                "Controls",
                "CONTROL",
                "healthy",
                "Healthy control",
                "healthy_control",
                "Healthy-Controls",
            ),
            *(
                "HC",
                "hc",
                "TDC",
                "TD",
                "CN",
                "CTRL",
                "normal",
                "typically developing",
                "Typically Developing Children",
            ),
            *("healthy volunteer", "Healthy adults", "control group", "cognitively normal", "neurotypical"),
            *("age-matched healthy controls", "Healthy control (no history of stroke)", "HC 1"),
        )
    },
    **{
        text: ([text], {}, [False], None)
        for text in (
            *("patient", "MS", "stroke", "unhealthy", "not healthy", "non-healthy", "disease control"),
            *(
                "patient control",
                "normal pressure hydrocephalus",
                "healthy sibling",
                "abnormal",
                "depression",
            ),
        )
    },
    **{text or "empty": ([text], {}, [None], None) for text in ("", "n/a", "N/A", "-", "unknown", "None")},
    "numbers": (
        ["1", "2"],
        {},
        [None, None],
        "column group: 2 of 2 values are numbers without a description (1, 2)",
    ),
    "levels": (["1", "2"], levels(**{"1": "Healthy control", "2": "Patient"}), [True, False], None),
    "levels with a sentence": (
        ["0"],
        levels(**{"0": "Healthy controls, no neurological disease"}),
        [True],
        None,
    ),
    "levels name a disease": (
        ["HC", "MS"],
        levels(HC="hydrocephalus", MS="multiple sclerosis"),
        [False, False],
        None,
    ),
    "levels say patient": (["control"], levels(control="patients with epilepsy"), [False], None),
    "levels say healthy": (["A", "B"], levels(A="healthy volunteers", B="stroke"), [True, False], None),
    "levels say no lesion": (["control"], levels(control="no lesion", patient="with lesion"), [True], None),
}


@pytest.mark.parametrize(
    ("fact", "values", "sidecar", "expected", "note"),
    [
        pytest.param(fact, *case, id=f"{fact}: {name}")
        for fact, cases in (("age", AGES), ("sex", SEXES), ("group", GROUPS))
        for name, case in cases.items()
    ],
)
def test_ages_sexes_and_groups_are_standardised(tmp_path, fact, values, sidecar, expected, note):
    participants = read_participants(write(tmp_path, column(fact, *values), {fact: sidecar}))
    name = "healthy" if fact == "group" else fact
    found = [getattr(participants.person(subject), name) for subject in participants.labels]
    assert found == (pytest.approx(expected) if fact == "age" and None not in expected else expected)
    if note is None:
        assert participants.notes == ()
    else:
        (line,) = [line for line in participants.notes if note in line]
        assert line.startswith(f"{tmp_path}/participants.tsv: column {fact}")
        assert "\n" not in line
    # The derivative table gives the same values, without further notes about ages and sexes.
    out = tmp_path / "out"
    write_participants(out, participants, [], "Participants")
    again = read_participants(out)
    assert [again.person(subject) for subject in participants.labels] == [
        participants.person(s) for s in participants.labels
    ]
    if fact != "group":
        assert again.notes == ()


ODD_TABLES = {
    "byte order mark": (b"\xef\xbb\xbfparticipant_id\tage\nsub-1\t3\n", {"sub-1": Person(3.0)}, None),
    "CRLF": (b"participant_id\tage\r\nsub-1\t3\r\n", {"sub-1": Person(3.0)}, None),
    "CR": (b"participant_id\tage\rsub-1\t3\r", {"sub-1": Person(3.0)}, None),
    "latin-1": (
        "participant_id\tage\tplace\nsub-1\t3\tMünchen\x85\n".encode("latin-1"),
        {"sub-1": Person(3.0)},
        "not UTF-8, read as Latin-1; save it as UTF-8",
    ),
    "UTF-16": ("participant_id\tage\nsub-1\t3\n".encode("utf-16"), {"sub-1": Person(3.0)}, "read as UTF-16"),
    "columns in any case": (
        b"Participant_ID\tAGE\tGender\tGroup\tScanner\nsub-1\t3\tF\tHC\t7\n",
        {"sub-1": Person(3.0, "female", True, "7")},
        None,
    ),
    "sex before gender": (
        b"participant_id\tgender\tsex\nsub-1\tF\tM\nsub-2\tF\tn/a\n",
        {"sub-1": Person(sex="male"), "sub-2": Person(sex="female")},
        None,
    ),
    "diagnosis where there is no group": (
        b"participant_id\tdiagnosis\tgroup\nsub-1\tHC\tpatient\nsub-2\tHC\tn/a\nsub-3\tMS\t2\n",
        {"sub-1": Person(healthy=False), "sub-2": Person(healthy=True), "sub-3": Person(healthy=False)},
        "column group: 1 of 2 values are numbers without a description (2)",
    ),
    "unknown scanner": (b"participant_id\tscanner\nsub-1\tunknown\n", {"sub-1": Person()}, None),
    "ids without sub-": (
        b"participant_id\tage\n01\t3\nSUB-2\t4\n",
        {"sub-01": Person(3.0), "sub-2": Person(4.0)},
        None,
    ),
    "blank lines and stray blanks": (
        b"participant_id\tage\n\nsub-1 \t 3 \n\t\n",
        {"sub-1": Person(3.0)},
        None,
    ),
    "missing id": (b"participant_id\tage\nn/a\t3\nsub-1\t3\n", {"sub-1": Person(3.0)}, None),
    "same row twice": (b"participant_id\tage\nsub-1\t3\nsub-1\t3.0\n", {"sub-1": Person(3.0)}, None),
    "twice, one of them with more": (
        b"participant_id\tage\tsex\nsub-1\t3\tn/a\nsub-1\tn/a\tM\n",
        {"sub-1": Person(3.0, "male")},
        None,
    ),
    "contradictory rows": (
        b"participant_id\tage\tsex\nsub-1\t3\tM\nsub-1\t4\tmale\nsub-2\t5\tF\n",
        {"sub-1": Person(None, "male"), "sub-2": Person(5.0, "female")},
        "sub-1 is listed more than once, with different age, which are treated as missing; keep one row",
    ),
    "a cell too many": (
        b"participant_id\tage\nsub-1\t3\t4\nsub-2\t5\n",
        {"sub-1": Person(), "sub-2": Person(5.0)},
        "rows with more or fewer cells than the header are not used (sub-1)",
    ),
    "a cell too few": (
        b"participant_id\tsex\tage\nsub-1\t3\nsub-2\tM\t5\n",
        {"sub-1": Person(), "sub-2": Person(5.0, "male")},
        "rows with more or fewer cells than the header are not used (sub-1)",
    ),
    "empty cells at the end": (
        b"participant_id\tage\t\t\nsub-1\t3\t\t\nsub-2\t5\n",
        {"sub-1": Person(3.0), "sub-2": Person(5.0)},
        None,
    ),
    "blanks in place of one tab": (
        b"participant_id\tsex\tage\nsub-1  M\t3\nsub-2\tM\t5\n",
        {"sub-2": Person(5.0, "male")},
        "not a participant_id: sub-1  M; separate columns by tabs",
    ),
    "commas": (b"participant_id,age\nsub-1,3\n", {"sub-1": Person(3.0)}, "columns are separated by commas"),
    "semicolons": (
        b"participant_id;age\nsub-1;3,5\n",
        {"sub-1": Person(3.5)},
        "columns are separated by semicolons",
    ),
    "blanks": (b"participant_id age\nsub-1   3\n", {"sub-1": Person(3.0)}, "columns are separated by blanks"),
    "quoted cells": (b'participant_id\tnotes\tage\nsub-1\t"a ""b"""\t3\n', {"sub-1": Person(3.0)}, None),
    "a stray quotation mark": (
        b'participant_id\tnotes\tage\nsub-1\t"5 inch\t3\nsub-2\tn/a\t4\n',
        {"sub-1": Person(3.0), "sub-2": Person(4.0)},
        None,
    ),
    "a column twice": (
        b"participant_id\tage\tage\nsub-1\t3\t4\n",
        {"sub-1": Person(3.0)},
        "several columns named age; the first is used",
    ),
    "only ids": (b"participant_id\nsub-1\n", {"sub-1": Person()}, None),
    "only a header": (b"participant_id\tage\n", {}, None),
}


@pytest.mark.parametrize(("content", "expected", "note"), ODD_TABLES.values(), ids=list(ODD_TABLES))
def test_tables_that_deviate_from_bids_are_read(tmp_path, content, expected, note):
    participants = read_participants(write(tmp_path, content))
    assert {subject: participants.person(subject) for subject in participants.labels} == expected
    if note is None:
        assert participants.notes == ()
    else:
        (line,) = [line for line in participants.notes if note in line]
        assert line.startswith(f"{tmp_path}/participants.tsv: ")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"subject\tage\nsub-1\t3\n", r"no column participant_id \(columns: subject, age\)"),
        (b"", "an empty file"),
        (b"\n \n", "an empty file"),
        (b"participant_id\tage\0\nsub-1\t3\n", "not a text file"),
        (b"participant_id,age\nsub-1,3,4\n", "columns are separated by commas; separate them by tabs"),
        (b"participant_id age sex\nsub-1 3\n", "columns are separated by blanks; separate them by tabs"),
        (b"/annex/objects/MD5E-s9--a.tsv\n", "a pointer to content that is not here; fetch it .datalad get"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "a pointer to content that is not here",
        ),
        (None, "the file is a link to content that is not here; fetch it with `datalad get`"),
        ("folder", "the file cannot be read"),
    ],
)
def test_unreadable_table_raises(tmp_path, content, problem):
    path = tmp_path / "participants.tsv"
    if content is None:
        path.symlink_to("nowhere.tsv")
    elif content == "folder":
        path.mkdir()
    else:
        write(tmp_path, content or b"\n")
    with pytest.raises(InputError, match=problem) as caught:
        read_participants(tmp_path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(("text", "problem"), [("{", "not valid JSON"), ("[1]", "not a JSON object")])
def test_unreadable_sidecar_raises(tmp_path, text, problem):
    write(tmp_path, column("sex", "1"))
    (tmp_path / "participants.json").write_text(text)
    with pytest.raises(InputError, match=f"participants.json: {problem}"):
        read_participants(tmp_path)


@pytest.mark.parametrize(
    "entry", [None, 3, "Age of the participant", [], {"Levels": ["a"]}, {"Levels": None, "Units": None}]
)
def test_sidecar_entries_that_bids_does_not_define_are_ignored(tmp_path, entry):
    participants = read_participants(write(tmp_path, column("age", "3"), {"age": entry}))
    assert participants.person("sub-1").age == 3
    assert participants.notes == ()


def test_sidecar_spells_columns_in_any_case(tmp_path):
    participants = read_participants(write(tmp_path, column("AGE", "24"), {"Age": {"Units": "months"}}))
    assert participants.person("sub-1").age == 2


def test_participants_are_empty_without_tables(tmp_path):
    for participants in (read_participants(), read_participants(tmp_path)):
        assert participants.path is None
        assert participants.labels == ()
        assert participants.row("sub-1") == {}
        assert participants.person("sub-1") == Person()
        assert participants.cohort("sub-1") == "unspecified"


PER_SESSION = """participant_id\tsession_id\tAge\tsex\tgroup\tscanner
sub-1\tses-1\t60\tM\tHC\tA
sub-1\t2\t62\tM\tMS\tA
sub-2\tses-1\t40\tF\tHC\tA
sub-3\tn/a\t70\tF\tMS\tB
sub-3\tses-1\t71\tn/a\tn/a\tn/a
sub-4\tses-1\t30\tF\tHC\tA
sub-4\tses-1\t31\tF\tHC\tA
"""
SESSIONS = {
    "sub-1": "session_id\tage\nses-2\t63\nses-3\t64.5\n",
    "sub-5": "session_id\tage\tscanner\n1\t50\tn/a\nses-2\t89+\tC\n",
}


@pytest.mark.parametrize(
    ("subject", "session", "expected"),
    [
        ("sub-1", "ses-1", Person(60.0, "male", True, "A")),
        ("sub-1", "1", Person(60.0, "male", True, "A")),
        ("sub-1", "ses-2", Person(63.0, "male", False, "A")),  # sessions.tsv comes first
        ("sub-1", "ses-3", Person(64.5, "male", None, "A")),  # healthy at one session, not at another
        ("sub-1", "ses-4", Person(None, "male", None, "A")),
        ("sub-1", None, Person(None, "male", None, "A")),
        ("sub-2", "ses-1", Person(40.0, "female", True, "A")),
        ("sub-2", "ses-2", Person(None, "female", True, "A")),  # the age at another session is not used
        (
            "sub-2",
            None,
            Person(40.0, "female", True, "A"),
        ),  # without a session, the only age is used
        ("sub-3", "ses-1", Person(71.0, "female", False, "B")),
        ("sub-3", "ses-2", Person(70.0, "female", False, "B")),
        ("sub-4", "ses-1", Person(None, "female", True, "A")),
        ("sub-5", "ses-1", Person(50.0)),
        ("sub-5", "ses-2", Person(89.0, scanner="C")),
    ],
)
def test_values_depend_on_the_session(tmp_path, subject, session, expected):
    participants = read_participants(write(tmp_path / "raw", PER_SESSION, sessions=SESSIONS))
    assert participants.person(subject, session) == expected
    assert participants.labels == ("sub-1", "sub-2", "sub-3", "sub-4")
    assert [line.removeprefix(f"{tmp_path}/raw/") for line in participants.notes] == [
        "participants.tsv: sub-4 ses-1 is listed more than once, with different age, which are treated as "
        "missing; keep one row, or add a column session_id",
        "sub-*/sub-*_sessions.tsv: column age: 1 of 4 ages are bounds or ranges (89+); the bound, or the "
        "middle of the range, is used",
    ]
    out = tmp_path / "out"
    (out / "sub-5").mkdir(parents=True)
    write_participants(out, participants, [f"sub-{number}" for number in range(1, 6)], "Participants")
    again = read_participants(out)
    assert again.person(subject, session) == expected
    assert again.notes == ()
    assert pd.read_csv(out / "participants.tsv", sep="\t")["participant_id"].is_unique


def test_latin_1_table_with_rows_per_session_and_other_column_names(tmp_path):
    text = (
        "participant_id\tsession_id\tAge\tGender\tgroup\nsub-good\tses-1\t89+\tM\tHealthy control\n"
        "sub-good\tses-2\t91\tM\tHealthy control\nsub-2\tses-1\t18-38\t1\tMüller\n"
    )
    participants = read_participants(write(tmp_path, text.encode("latin-1")))
    assert participants.person("sub-good", "1") == Person(89.0, "male", True)
    assert participants.person("sub-good", "2") == Person(91.0, "male", True)
    assert participants.person("sub-2", "1") == Person(28.0, "male", False)
    assert participants.row("sub-2")["group"] == "Müller"
    assert [
        line.removeprefix(f"{tmp_path}/participants.tsv: ").split(";")[0] for line in participants.notes
    ] == [
        "not UTF-8, read as Latin-1",
        "column Age: 2 of 3 ages are bounds or ranges (89+, 18-38)",
        "column Gender: 1 values are 1 or 2 without a description, read as 1 = male and 2 = female",
    ]


def test_cohort_depends_on_the_session(tmp_path):
    text = (
        "participant_id\tsession_id\tgroup\tPathology\nsub-1\tses-1\tHC\tn/a\nsub-1\tses-2\tpatient\tstroke\n"
        "sub-2\tn/a\tpatient\tMS\n"
    )
    participants = read_participants(write(tmp_path, text))
    assert [participants.cohort("sub-1", session) for session in ("1", "2")] == ["healthy", "stroke"]
    assert participants.cohorts("sub-1") == {"healthy", "stroke"}
    assert participants.cohorts("sub-2") == {"MS"}
    assert participants.cohorts("sub-3") == {"unspecified"}
    assert participants.with_cohort_column("PATHOLOGY").cohort("sub-2") == "MS"
    assert participants.with_cohort_column("Group").cohort("sub-2") == "patient"
    with pytest.raises(InputError, match="no column site for cohorts; choose one of group, Pathology"):
        participants.with_cohort_column("site")


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ("session\tage\nses-1\t30\n", "no column session_id"),
        ("", "an empty file"),
        ("session_id,age\nses-1,30,4\n", "columns are separated by commas"),
    ],
)
def test_unreadable_sessions_table_is_skipped(tmp_path, table, problem):
    sessions = {"sub-1": table, "sub-2": "session_id\tage\nses-1\t30\n"}
    write(tmp_path, column("age", "20", "21"), sessions={"sub-2": sessions["sub-2"]})
    (tmp_path / "sub-1").mkdir()
    (tmp_path / "sub-1" / "sub-1_sessions.tsv").write_text(table)
    participants = read_participants(tmp_path)
    assert participants.person("sub-2", "1").age == 30
    assert participants.person("sub-1", "1").age == 20
    (line,) = participants.notes
    assert line.startswith(f"{tmp_path}/sub-1/sub-1_sessions.tsv: {problem}")


def test_many_notes_about_sessions_are_truncated(tmp_path):
    write(
        tmp_path, column("age", "20"), sessions={f"sub-{k}": "session_id,age\nses-1,3\n" for k in range(20)}
    )
    notes = read_participants(tmp_path).notes
    assert len(notes) == 6
    assert notes[-1] == "15 more notes of this kind about files sub-*_sessions.tsv"


def test_sidecars_of_sessions_describe_their_columns(tmp_path):
    write(
        tmp_path,
        column("sex", "1", "1"),
        {"sex": levels(**{"1": "female"}), "age": {"Units": "weeks"}},
        {f"sub-{k}": "session_id\tage\tsex\nses-1\t24\t1\n" for k in (1, 2, 3)},
    )
    (tmp_path / "sessions.json").write_text(json.dumps({"age": {"Units": "months"}}))
    own = {"age": {"Units": "years"}, "sex": levels(**{"1": "male"})}
    (tmp_path / "sub-2" / "sub-2_sessions.json").write_text(json.dumps(own))
    participants = read_participants(tmp_path)
    assert [participants.person(f"sub-{k}", "1").age for k in (1, 2, 3)] == [2, 24, 2]
    assert [participants.person(f"sub-{k}", "1").sex for k in (1, 2, 3)] == ["female", "male", "female"]
    only = read_participants(tmp_path, ["sub-1", "sub-9"])
    assert only.person("sub-1", "1").age == 2
    assert only.person("sub-2", "1").age is None


def test_write_participants_adds_participants_and_describes_columns(tmp_path):
    sidecar = {
        "iq": {"Description": "own words"},
        "Age": {"Description": "at scan", "Units": "months"},
        "group": levels(**{"1": "Healthy control"}),
    }
    text = "participant_id\tAge\tiq\tgroup\tgender\nsub-1\t408\tn/a\t1\tF\nsub-2\t6\t100\t1\tM\n"
    participants = read_participants(write(tmp_path / "raw", text, sidecar))
    out = tmp_path / "out"
    write_participants(out, participants, ["sub-1", "sub-7"], "Participants")
    assert (out / "participants.tsv").read_text() == (
        "participant_id\tage\tiq\tgroup\tsex\nsub-1\t34\tn/a\tHealthy control\tfemale\n"
        "sub-2\t0.5\t100\tHealthy control\tmale\nsub-7\tn/a\tn/a\tn/a\tn/a\n"
    )
    columns = json.loads((out / "participants.json").read_text())
    assert columns.pop("Description") == "Participants"
    assert list(columns) == ["participant_id", "age", "iq", "group", "sex"]
    assert columns["iq"] == {"Description": "own words"}
    assert columns["age"] == {"Description": "at scan", "Units": "year"}
    assert set(columns["sex"]["Levels"]) == {"male", "female", "other"}


def test_write_participants_removes_obsolete_sessions_tables(tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "out"
    participants = read_participants(
        write(raw, column("age", "20", "21"), sessions={"sub-1": SESSIONS["sub-1"]})
    )
    write_participants(out, participants, ["sub-1", "sub-2"], "Participants")
    assert [path.name for path in sorted(out.rglob("*sessions*"))] == ["sessions.json", "sub-1_sessions.tsv"]
    (raw / "sub-1" / "sub-1_sessions.tsv").unlink()
    write_participants(out, read_participants(raw), ["sub-1", "sub-2"], "Participants")
    assert not list(out.rglob("*sessions*"))


def dataset(folder, **description):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset_description.json").write_text(json.dumps(description))
    return folder


def test_source_name_of_a_derivative_is_that_of_its_raw_dataset(tmp_path):
    raw = dataset(tmp_path / "raw", Name="A study (2)")
    link = "urn:bids-dataset:A%20study%20%282%29"
    derived = dataset(tmp_path / "derived", Name="bids_uad: A study", DatasetLinks={"raw": link})
    assert source_name(raw) == source_name(derived) == "A study (2)"
    assert (
        subject_hashes(raw, ["sub-1"])
        == subject_hashes(derived, ["sub-1"])
        == {subject_hash("A study (2)", "sub-1")}
    )
    assert source_name(tmp_path) is None
    assert subject_hashes(tmp_path, ["sub-1"]) == set()


def test_subject_hashes_include_the_hashes_of_raw_images(tmp_path):
    sha256 = hashlib.sha256(b"scan").hexdigest()
    log = dataset(tmp_path / "derived", Name="B") / "sub-9" / "ses-1" / "log"
    log.mkdir(parents=True)
    (log / "sub-9_ses-1_T1w.json").write_text(json.dumps({"fingerprint": {"input_sha256": sha256}}))
    assert subject_hashes(tmp_path / "derived", ["sub-9"]) == {subject_hash("B", "sub-9"), image_hash(sha256)}


def test_hashes_of_participants_and_images_differ():
    hashes = {subject_hash(*name) for name in (("A", "sub-1"), ("A", "sub-2"), ("B", "sub-1"))}
    hashes.add(image_hash("sub-1"))
    assert len(hashes) == 4
    expected = hashlib.sha256(b"subject\nA\nsub-1").hexdigest()[:16]
    assert subject_hash("A", "sub-1") == expected
