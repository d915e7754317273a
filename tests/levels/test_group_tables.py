"""Selection of the score tables that the group level reads, and the message about the others."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from bids_uad.dataset.participants import read_participants
from bids_uad.evaluation.tables import find_metrics_tables
from bids_uad.levels.group_tables import current_tables
from tests.evaluation.fake_tables import Scan, write_participants
from tests.levels.test_group import group

AGES = {"01": 40.0, "02": 50.0}


@pytest.fixture
def study(tmp_path):
    """Two participants with T1w and T2w; the T1w of the first has deviations, too. Raw files of 352 bytes."""
    rows = [{"participant_id": f"sub-{label}", "age": age, "sex": "F"} for label, age in AGES.items()]
    write_participants(tmp_path / "raw", rows)
    for label in AGES:
        for modality in ("T1w", "T2w"):
            Scan(label, modality).write(tmp_path / "out")
            raw = tmp_path / "raw" / f"sub-{label}" / "anat" / f"sub-{label}_{modality}.nii.gz"
            raw.parent.mkdir(parents=True, exist_ok=True)
            raw.write_bytes(bytes(352))
    Scan("01", "T1w", "disyre+normative", sha256="d" * 64, covariates={"age": 40.0, "sex": -0.5}).write(
        tmp_path / "out"
    )
    return tmp_path


def tables(study: Path) -> tuple[set[str], str]:
    """Subject, modality and detector of the tables that are read, and what is said about the others."""
    paths = find_metrics_tables(study / "out")
    current, message = current_tables(study / "out", paths, study / "raw", read_participants(study / "raw"))
    names = {f"{path.name[4:6]} {path.name.split('desc-')[1].split('_')[0]}" for path in current}
    return names, message


ALL = {"01 T1wDisyre", "01 T1wDisyre+normative", "01 T2wDisyre", "02 T1wDisyre", "02 T2wDisyre"}
OF_T1W = {"01 T1wDisyre", "01 T1wDisyre+normative"}


def record(study: Path) -> Path:
    return study / "out" / "sub-01" / "log" / "sub-01_T1w.json"


def raw(study: Path) -> Path:
    return study / "raw" / "sub-01" / "anat" / "sub-01_T1w.nii.gz"


def edit_record(study: Path, **changes) -> None:
    content = json.loads(record(study).read_text())
    record(study).write_text(json.dumps(content | changes))


def forget_a_model(study: Path) -> None:
    content = json.loads(record(study).read_text())
    del content["models"]["disyre"]
    record(study).write_text(json.dumps(content))


def drop_content(study: Path) -> None:
    """Replace a file by a dangling link, as `datalad drop` does."""
    raw(study).unlink()
    raw(study).symlink_to("../.git/annex/objects/x")


def rename_session(study: Path) -> None:
    raw(study).rename(raw(study).with_name("sub-01_acq-b_T1w.nii.gz"))


def change_age(study: Path, age: str) -> None:
    path = study / "raw" / "participants.tsv"
    table = pd.read_csv(path, sep="\t", dtype=str)
    table.loc[0, "age"] = age
    table.to_csv(path, sep="\t", index=False)


@pytest.mark.parametrize(
    ("change", "left_out", "reason"),
    [
        pytest.param(lambda study: None, set(), "", id="nothing"),
        pytest.param(lambda study: record(study).unlink(), OF_T1W, "not listed", id="record deleted"),
        pytest.param(lambda study: record(study).write_text("{"), OF_T1W, "not listed", id="record damaged"),
        pytest.param(lambda study: record(study).write_text("[]"), OF_T1W, "not listed", id="record foreign"),
        pytest.param(lambda study: edit_record(study, models={}), OF_T1W, "not listed", id="withdrawn"),
        pytest.param(
            lambda study: edit_record(study, models={"disyre": "identity"}),
            OF_T1W,
            "not listed",
            id="older form",
        ),
        pytest.param(forget_a_model, {"01 T1wDisyre"}, "not listed", id="one model withdrawn"),
        pytest.param(lambda study: raw(study).unlink(), OF_T1W, "no longer in BIDS_DIR", id="image removed"),
        pytest.param(rename_session, OF_T1W, "no longer in BIDS_DIR", id="image renamed"),
        pytest.param(
            lambda study: raw(study).write_bytes(bytes(9)), OF_T1W, "have changed", id="image changed"
        ),
        pytest.param(drop_content, set(), "", id="content dropped"),
        pytest.param(
            lambda study: change_age(study, "41"), {"01 T1wDisyre+normative"}, "age or sex", id="age changed"
        ),
        pytest.param(lambda study: change_age(study, "n/a"), set(), "", id="age not given here"),
    ],
)
def test_outdated_tables_are_left_out_with_the_reason_in_one_line(study, change, left_out, reason):
    change(study)
    current, message = tables(study)
    assert current == ALL - left_out
    assert reason in message
    assert "\n" not in message
    assert message.startswith(f"{len(left_out)} score table" if left_out else "")
    for name in left_out:
        assert f"sub-{name[:2]}_space-SRI24_desc-{name[3:]}_metrics.tsv" in message


def test_message_truncates_names(tmp_path):
    for number in range(20):
        Scan(f"{number:02d}").write(tmp_path / "out")
        (tmp_path / "out" / f"sub-{number:02d}" / "log" / f"sub-{number:02d}_T1w.json").unlink()
    _, message = tables(tmp_path)
    assert message.startswith("20 score tables are left out: 20 not listed")
    assert "and 17 more" in message
    assert len(message) < 500


def test_tables_without_a_record_are_left_out_and_kept(study):
    """A copied table belongs to no model of the participant level."""
    table = next(iter((study / "out").rglob("sub-02*T2wDisyre_metrics.tsv")))
    copy = table.with_name(table.name.replace("T2wDisyre", "T2wPatchcore"))
    copy.write_text(table.read_text().replace("disyre", "patchcore"))
    current, message = tables(study)
    assert current == ALL
    assert copy.name in message
    assert copy.exists()


def test_group_logs_left_out_tables_once_and_evaluates_the_others(study, caplog):
    raw(study).unlink()
    assert group(study)[0] == 0
    lines = [line for line in caplog.text.splitlines() if "left out: 2 of images" in line]
    assert len(lines) == 1
    assert "left out: 2 of images" in (study / "out" / "group.html").read_text()
    subjects = pd.read_csv(study / "out" / "group_subjects.tsv", sep="\t")
    assert len(subjects) == 3


def test_group_without_current_tables_returns_no_input(study, caplog):
    for path in (study / "out").rglob("log/*.json"):
        path.unlink()
    assert group(study)[0] == 66
    assert "no score table is up to date; run the participant level again" in caplog.text
