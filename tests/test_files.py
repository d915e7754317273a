"""Files that are whole or not there, and what a kill leaves behind."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import time

import pytest

from bids_uad.files import (
    atomic_path,
    atomic_paths,
    remove_unfinished,
    temporary_folder,
    write_json,
    write_text,
)


def test_failed_write_keeps_the_old_file(tmp_path):
    target = write_text(tmp_path / "table.tsv", "old")

    def fail():
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["table.tsv"]
    assert target.read_text() == "old"


def test_remove_unfinished_removes_only_files_of_killed_processes(tmp_path):
    process = mp.get_context("fork").Process(target=leave_half, args=(tmp_path,))
    process.start()
    process.join()
    left = {path.name for path in tmp_path.rglob(".*")}
    assert len(left) == 3
    (tmp_path / ".bidsignore").write_text("")
    (tmp_path / ".8f58ce-old.txt").write_text("another program's")
    with atomic_path(tmp_path / "sub-02_T1w.nii.gz") as mine:
        mine.write_text("half")
        remove_unfinished(tmp_path, below=True)
        remove_unfinished(tmp_path / "missing")
        assert mine.is_file()
    names = [".8f58ce-old.txt", ".bidsignore", "anat", "sub-02_T1w.nii.gz"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == names


def leave_half(folder):
    """Be killed while two files and a folder are being written."""
    with atomic_path(folder / "sub-01_T1w.nii.gz") as first, atomic_path(folder / "anat" / "x.tsv") as second:
        first.write_text("half")
        second.write_text("half")
        with temporary_folder(folder, "slices") as third:
            (third / "pixels").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("hours", "held", "removed"), [(0, False, False), (23, False, False), (25, False, True), (0, True, True)]
)
def test_remove_unfinished_of_another_host_after_a_day_or_under_a_lock(tmp_path, hours, held, removed):
    path = tmp_path / ".abcdef-1-012345.sub-01_T1w.nii.gz"
    path.write_text("half")
    os.utime(path, (time.time() - 3600 * hours,) * 2)
    remove_unfinished(tmp_path, lambda name: held and name == "sub-01_T1w.nii.gz")
    assert path.exists() is not removed


def test_atomic_paths_replace_all_files_or_none(tmp_path):
    targets = [write_text(tmp_path / name, "old") for name in ("weights", "card", "bundle.json")]
    write_text(tmp_path / "calibration.json", "old")

    def write(fail):
        with atomic_paths(targets, [targets[2], tmp_path / "calibration.json"]) as paths:
            assert [path.name.rpartition(".")[2] for path in paths] == ["weights", "card", "json"]
            for path in paths:
                path.write_text("new")
            if fail:
                raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write(fail=True)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(
        ("weights", "card", "bundle.json", "calibration.json"), "old"
    )
    write(fail=False)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(
        ("weights", "card", "bundle.json"), "new"
    )


def test_temporary_folder_is_removed_unless_renamed(tmp_path):
    with temporary_folder(tmp_path, "slices") as folder:
        (folder / "pixels").write_text("x")
    assert list(tmp_path.iterdir()) == []
    with temporary_folder(tmp_path, "slices") as folder:
        folder.rename(tmp_path / "slices")
    assert [path.name for path in tmp_path.iterdir()] == ["slices"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_write_json_refuses_nan_and_infinity(tmp_path, value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "sidecar.json", {"Threshold": [1.0, value]})
    assert not list(tmp_path.iterdir())
