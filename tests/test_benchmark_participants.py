"""The benchmark of participants: what it measures of a program with known time, memory and files."""

from __future__ import annotations

import json

import pytest

from benchmarks import participants
from benchmarks.participants import count_finished, has_begun, write_dataset

PROGRAM = """
import os, sys, time
from pathlib import Path

_, data, out, level, _, work = sys.argv[:6]
out, work = Path(out), Path(work)
assert level == "participant" and "--nprocs" in sys.argv
if os.fork() == 0:  # a process that outlives its parent, as do those of a server of workers
    if os.fork() == 0:
        while time.process_time() < 0.6:
            pass
        time.sleep(1)
    os._exit(0)
os.wait()
memory = b"1" * 200_000_000
(work / "wf" / "sub_00001_wf" / "step").mkdir(parents=True)
(work / "wf" / "sub_00001_wf" / "step" / "file").write_bytes(b"1" * 20_000_000)
time.sleep(STEP)
for folder in sorted(Path(data).glob("sub-*")):
    (out / folder.name / "log").mkdir(parents=True)
    (out / folder.name / "log" / f"{folder.name}_T1w.json").touch()
    (out / f"{folder.name}.html").touch()
    time.sleep(STEP)
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Two source trees with a program instead of bids_uad, and an empty file as scan."""
    (tmp_path / "T1w.nii.gz").touch()
    images = {"T1w.nii.gz": tmp_path / "T1w.nii.gz"}
    monkeypatch.setattr(participants, "simulated_images", lambda folder, modalities: images)
    arguments = ["--output", str(tmp_path / "participants.json")]
    for name in ("slow", "fast"):
        (tmp_path / name / "bids_uad").mkdir(parents=True)
        (tmp_path / name / "bids_uad" / "__init__.py").touch()  # else an installed package goes first
        program = PROGRAM.replace("STEP", "0.6" if name == "slow" else "0.3")
        (tmp_path / name / "bids_uad" / "__main__.py").write_text(program)
        arguments += ["--tree", str(tmp_path / name)]
    monkeypatch.setattr(participants.tempfile, "tempdir", str(tmp_path))
    return arguments


def test_participants_benchmark_measures_all_processes(toy, tmp_path):
    participants.main([*toy, "--participants", "2"])
    found = json.loads((tmp_path / "participants.json").read_text())["scaling"]
    slow, fast = found["rows"]
    assert (slow["tree"], fast["tree"]) == ("before", "after")
    for row in (slow, fast):
        assert row["finished"] == 2
        assert row["cpu_seconds"] >= 0.6  # of a process whose parent has ended
        assert row["first_seconds"] <= row["seconds"]  # equal when both end within a poll
        assert min(row["peak_mb"], row["main_mb"]) >= 200
        assert 20 <= row["work_mb"] <= 21
        hours = row["cpu_seconds"] / 3600
        assert row["per_core_hour"] == pytest.approx(2 / hours, rel=0.1)
    assert slow["first_seconds"] >= 0.6
    assert slow["seconds"] >= 1.8
    (ratio,) = found["ratios"]
    assert ratio["per_core_hour"] == pytest.approx(fast["per_core_hour"] / slow["per_core_hour"], abs=1e-3)


def test_participants_benchmark_stops_at_its_limit(toy, tmp_path):
    participants.main([*toy[:4], "--participants", "9", "--limit", "4"])
    found = json.loads((tmp_path / "participants.json").read_text())["scaling"]
    (row,) = found["rows"]
    assert 1 <= row["finished"] < 9
    assert found["ratios"] == []


@pytest.mark.slow
def test_participants_benchmark_measures_start_and_keeps_other_results(toy, tmp_path):
    (tmp_path / "participants.json").write_text('{"scaling": {"rows": []}}')
    participants.main([*toy, "--stub", "3"])
    found = json.loads((tmp_path / "participants.json").read_text())
    assert found["scaling"] == {"rows": []}
    assert [row["participants"] for row in found["start"]["rows"]] == [3, 3, 1, 1]
    assert all(row["first_seconds"] < 60 and row["main_mb"] >= 200 for row in found["start"]["rows"])


def test_participants_benchmark_names_a_run_that_fails(toy, tmp_path):
    (tmp_path / "slow" / "bids_uad" / "__main__.py").write_text("raise SystemExit('no usable image')")
    with pytest.raises(SystemExit, match=r"slow: exit code 1\nno usable image"):
        participants.main([*toy, "--participants", "1"])


def test_participant_is_finished_with_its_report_and_all_records(tmp_path):
    images = {"sub-01": ["sub-01_T1w", "sub-01_T2w"], "sub-02": ["sub-02_T1w"]}
    (tmp_path / "sub-01" / "log").mkdir(parents=True)
    (tmp_path / "sub-01" / "log" / "sub-01_T1w.json").touch()
    (tmp_path / "sub-01.html").touch()
    (tmp_path / "sub-02.html").touch()
    assert count_finished(tmp_path, images) == 0
    (tmp_path / "sub-01" / "log" / "sub-01_T2w.json").touch()
    assert count_finished(tmp_path, images) == 1


def test_first_step_is_a_folder_of_an_image(tmp_path):
    (tmp_path / "reference").mkdir()
    (tmp_path / "images.lock").mkdir()
    assert not has_begun(tmp_path)
    (tmp_path / "wf" / "sub_01_wf").mkdir(parents=True)
    assert not has_begun(tmp_path)
    (tmp_path / "wf" / "sub_01_wf" / "sub_01_T1w_preproc_wf").mkdir()
    assert has_begun(tmp_path)


def test_dataset_has_all_participants_without_copies_of_the_scan(tmp_path):
    (tmp_path / "scan").write_bytes(b"1")
    data = write_dataset(tmp_path / "data", {"T2w.nii.gz": tmp_path / "scan"}, 3)
    images = participants.images_of(data)
    assert images == {f"sub-0000{number}": [f"sub-0000{number}_T2w"] for number in (1, 2, 3)}
    assert (tmp_path / "scan").stat().st_nlink == 4
    assert len((data / "participants.tsv").read_text().splitlines()) == 4
