"""Files that are whole or not there, and what a kill leaves behind."""

from __future__ import annotations

import pytest

from bids_uad.atomic import atomic_path, remove_unfinished, write_json, write_text


def test_a_failed_write_leaves_what_was_there(tmp_path):
    target = write_text(tmp_path / "table.tsv", "old")

    def fail():
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["table.tsv"]
    assert target.read_text() == "old"


def test_what_a_killed_run_left_is_removed_and_nothing_else(tmp_path):
    with atomic_path(tmp_path / "sub-01_T1w.nii.gz") as temporary:
        temporary.write_text("whole")
        (tmp_path / temporary.name.replace("sub-01", "sub-02")).write_text("half")
    (tmp_path / ".bidsignore").write_text("")
    remove_unfinished(tmp_path)
    remove_unfinished(tmp_path / "missing")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".bidsignore", "sub-01_T1w.nii.gz"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_that_no_other_program_could_read_is_not_written(tmp_path, value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "sidecar.json", {"Threshold": [1.0, value]})
    assert not list(tmp_path.iterdir())
