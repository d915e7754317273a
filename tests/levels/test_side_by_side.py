"""Concurrent jobs with one output folder, such as the tasks of an array job."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import pandas as pd
import pytest

from bids_uad.cli.main import main
from bids_uad.config import RunConfig
from bids_uad.dataset.describe import ModelEntry, describe_dataset
from bids_uad.dataset.participants import Participants
from bids_uad.files import NameLocks, write_json
from bids_uad.levels.participant import run, workflow
from bids_uad.levels.participant import summary as reporting
from bids_uad.levels.participant.summary import DONE, FAILED, ImageStatus
from bids_uad.reports import participant
from tests.dataset.skeleton import write_dataset
from tests.levels.fakes import FakeDetect, fake_bundle, fake_reference, init_fake_preproc_wf, write_page

LABELS = ["01", "02", "03"]


def arguments(
    raw: Path, out: Path, work: Path, models: list[Path], *labels: str, sessions: tuple[str, ...] = ()
) -> list[str]:
    """Return the arguments of a run on some participants, and perhaps on some of their sessions only."""
    chosen = ["--participant-label", *labels, *(["--session-label", *sessions] if sessions else [])]
    options = ["--clean-workdir", "--device", "cpu", "--nprocs", "1", "--models", *models]
    return [str(word) for word in (raw, out, "participant", "-w", work, *chosen, *options)]


def start(words: list[str]) -> subprocess.Popen:
    """Start the program with stand-ins."""
    folder = Path(words[0]).parent
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "REFERENCE": str(folder)}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.levels.with_fakes", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """Make the program run with the same stand-ins in this process."""
    monkeypatch.setattr(workflow, "init_preproc_wf", init_fake_preproc_wf)
    monkeypatch.setattr(workflow, "Detect", FakeDetect)
    monkeypatch.setattr(run, "resolve_reference", lambda *_: fake_reference(tmp_path))
    monkeypatch.setattr(reporting, "write_report", write_page)


def content(out: Path) -> dict[str, bytes]:
    """Every file that does not carry the run's identity; where it lies, which a report tells, taken out."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes().replace(bytes(out.parent), b"HERE")
        for path in sorted(out.rglob("*"))
        if path.is_file()
        and not {"log", "dataset.lock", "images.lock"} & set(path.parts)
        and path.suffix != ".toml"
    }


@pytest.mark.slow
def test_concurrent_jobs_and_the_group_level_equal_one_run(tmp_path, stand_ins):
    raw = tmp_path / "raw"
    write_dataset(
        raw, {f"sub-{label}/anat/sub-{label}_T1w.nii.gz": {"SkullStripped": True} for label in LABELS}
    )
    fake_reference(tmp_path)
    models = [fake_bundle(tmp_path / "disyre-T1w", "disyre", "T1w")]
    together, alone = tmp_path / "together" / "out", tmp_path / "alone" / "out"

    # All share even the working folder, and each cleans it.
    shared = tmp_path / "together" / "work"
    jobs = [start(arguments(raw, together, shared, models, label)) for label in LABELS]
    said = [job.communicate(timeout=600)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0] * 3, "\n".join(said)
    assert main(arguments(raw, alone, tmp_path / "alone" / "work", models, *LABELS)) == 0
    for out in (together, alone):
        assert main([str(raw), str(out), "group"]) == 0

    assert content(together) == content(alone)
    assert len(list((together / "logs").glob("bids_uad-*.toml"))) == 3
    assert len(pd.read_csv(together / "group_subjects.tsv", sep="\t")) == 3
    assert not list((tmp_path / "together" / "work").glob("*_wf/*/*"))
    calls = (tmp_path / "together" / "calls.txt").read_text().split("\n")
    assert sorted(calls) == sorted((tmp_path / "alone" / "calls.txt").read_text().split("\n"))


def describe(raw: Path, out: Path, number: int) -> None:
    """Add one job's entries to the dataset-level files."""
    model = ModelEntry(f"model{number}", "1", "0" * 64)
    describe_dataset(out, raw, {f"given{number}": raw}, [model], {f"label{number}": "text"})


def test_concurrent_jobs_keep_each_others_additions(tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_dataset(raw, {})
    with ProcessPoolExecutor(8, mp.get_context("fork")) as pool:
        list(pool.map(partial(describe, raw, out), range(40)))
    described = json.loads((out / "dataset_description.json").read_text())
    assert len(described["GeneratedBy"]) == 1 + 40
    assert len(described["DatasetLinks"]) == 1 + 40
    assert len(pd.read_csv(out / "descriptions.tsv", sep="\t")) == 40


def files_of(out: Path) -> dict[str, bytes]:
    """Outputs of participants and their descriptions, without the logs of runs."""
    said = ("sub-", "README", "descriptions", "dataset_description", "logs/CITATION")
    return {name: text for name, text in content(out).items() if name.startswith(said)}


@pytest.mark.slow
def test_one_job_per_session_equals_one_run(tmp_path, stand_ins):
    """Session b has no T1w image: its T2w image goes to the atlas through that of session a, in any order."""
    raw = tmp_path / "raw"
    names = ["ses-a/anat/sub-01_ses-a_T1w", "ses-a/anat/sub-01_ses-a_T2w", "ses-b/anat/sub-01_ses-b_T2w"]
    write_dataset(raw, {f"sub-01/{name}.nii.gz": {"SkullStripped": True} for name in names})
    fake_reference(tmp_path)
    models = [fake_bundle(tmp_path / f"disyre-{kind}", "disyre", kind) for kind in ("T1w", "T2w")]

    def call(name: str, *jobs: tuple[str, ...]) -> Path:
        """Run jobs, several at the same time; each is for the sessions named."""
        out, work = tmp_path / name / "out", tmp_path / name / "work"
        calls = [arguments(raw, out, work, models, "01", sessions=sessions) for sessions in jobs]
        if len(calls) == 1:
            assert main(calls[0]) == 0
            return out
        running = [start(words) for words in calls]
        said = [job.communicate(timeout=600)[0] for job in running]
        assert [job.returncode for job in running] == [0] * len(jobs), "\n".join(said)
        return out

    together = call("together", ("a",), ("b",))
    call("backwards", ("b",))
    assert not list((tmp_path / "backwards" / "out").rglob("ses-a"))  # nobody has asked for it
    backwards = call("backwards", ("a",))
    alone = call("alone", ())
    assert files_of(together) == files_of(alone) == files_of(backwards)
    for out in (together, backwards):
        saved = json.loads((out / "sub-01" / "log" / "last_run.json").read_text())
        assert [image["image"] for image in saved["images"]] == [
            "sub-01_ses-a_T1w",
            "sub-01_ses-a_T2w",
            "sub-01_ses-b_T2w",
        ]
        quality = out / "sub-01/ses-b/anat/sub-01_ses-b_space-SRI24_desc-T2wPreproc_qc.tsv"
        assert pd.read_csv(quality, sep="\t")["depends_on"].tolist() == ["sub-01_ses-a_T1w"]
    assert not list((tmp_path / "together" / "work").glob("*_wf/*/*"))


def end(out: Path, session: str) -> None:
    """End a job for one session as the program does: its outputs, what became of them, and the page."""
    config = RunConfig(
        bids_dir=out.parent,
        output_dir=out,
        work_dir=out,
        levels=("participant",),
        sessions=(session,),
        run_id=session,
    )
    (out / f"ses-{session}").mkdir(parents=True)
    name = f"sub-01_ses-{session}_T1w"
    outcome = (
        ImageStatus("01", name, FAILED, message=f"{name}: failed")
        if session == "0"
        else ImageStatus("01", name, DONE)
    )
    reporting.save_last_run(config, "01", [outcome], "cpu")
    reporting.write_report(out, "01", Participants())


def write_slowly(out_dir: Path, subject: str, *, errors: list[str], run_info: dict, **others: object) -> None:
    """Stand in for the report: list what is there at first, and take a while to write it."""
    found = sorted(path.name for path in out_dir.glob("ses-*"))
    images = sorted(image["image"] for image in run_info["images"])
    time.sleep(int(run_info["run_id"]) % 5 / 50)
    write_json(out_dir / "page.json", {"found": found, "images": images, "errors": errors})


def test_report_includes_all_sessions_of_concurrent_jobs(tmp_path, monkeypatch):
    monkeypatch.setattr(participant, "write_subject_report", write_slowly)
    sessions = [str(number) for number in range(12)]
    for session in sessions:
        write_dataset(tmp_path, {f"sub-01/ses-{session}/anat/sub-01_ses-{session}_T1w.nii.gz": None})
    with ProcessPoolExecutor(6, mp.get_context("fork")) as pool:
        list(pool.map(partial(end, tmp_path / "out"), sessions))
    page = json.loads((tmp_path / "out" / "page.json").read_text())
    assert page["found"] == sorted(f"ses-{session}" for session in sessions)
    assert page["images"] == sorted(f"sub-01_ses-{session}_T1w" for session in sessions)
    assert page["errors"] == ["sub-01_ses-0_T1w: failed"]


def hold(path: Path, names: list[str], log: Path) -> None:
    """Note when the names are held and when no longer."""
    locks = NameLocks(path)
    while locks.acquire(names) is not None:
        time.sleep(0.01)
    with log.open("a") as stream:
        stream.write(f"+{','.join(names)}\n")
    time.sleep(0.1)
    with log.open("a") as stream:
        stream.write(f"-{','.join(names)}\n")
    locks.release(names)
    assert locks.acquire(["e"]) is None  # the file is still open
    locks.close()


def test_jobs_wait_only_for_shared_images(tmp_path):
    log = tmp_path / "log"
    jobs = [["a", "b"], ["b", "c"], ["c", "a"], ["d"]]
    processes = [mp.get_context("fork").Process(target=hold, args=(tmp_path / "lock", j, log)) for j in jobs]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    held: set[str] = set()
    for line in log.read_text().splitlines():
        names = set(line[1:].split(","))
        assert line[0] == "-" or not held & names
        held = held | names if line[0] == "+" else held - names


def test_killed_job_holds_no_lock(tmp_path):
    process = mp.get_context("fork").Process(target=hold_forever, args=(tmp_path,))
    process.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    locks = NameLocks(tmp_path / "lock")
    assert locks.acquire(["c", "a"]) == "a"
    locks.close()
    other = NameLocks(tmp_path / "lock")
    assert other.acquire(["c"]) is None  # was not kept
    other.close()
    process.kill()
    process.join(timeout=60)
    locks = NameLocks(tmp_path / "lock")
    assert locks.acquire(["a"]) is None
    locks.close()


def hold_forever(folder: Path) -> None:
    """Hold a name until killed."""
    locks = NameLocks(folder / "lock")
    assert locks.acquire(["b", "a"]) is None
    (folder / "held").touch()
    time.sleep(600)
