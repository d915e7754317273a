"""Jobs that know nothing of each other work on one output folder, as the tasks of a cluster's array do."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import pandas as pd

from bids_uad.cli.main import main
from bids_uad.dataset.describe import ModelEntry, describe_dataset
from tests.dataset.skeleton import write_dataset
from tests.levels.fakes import fake_bundle, fake_reference

LABELS = [f"{number:02d}" for number in range(1, 7)]


def start(raw: Path, out: Path, work: Path, models: list[Path], *labels: str) -> subprocess.Popen:
    """Start the program, with stand-ins, on some participants."""
    command = [sys.executable, "-m", "tests.levels.with_fakes", raw, out, "participant", "-w", work]
    command += ["--participant-label", *labels, "--clean-workdir", "--device", "cpu", "--nprocs", "1"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "REFERENCE": str(raw.parent)}
    return subprocess.Popen(
        [*map(str, command), "--models", *map(str, models)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def content(out: Path) -> dict[str, bytes]:
    """Every file that does not carry the run's identity; where it lies, which a report tells, taken out."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes().replace(bytes(out.parent), b"HERE")
        for path in sorted(out.rglob("*"))
        if path.is_file() and not {"log", "dataset.lock"} & set(path.parts) and path.suffix != ".toml"
    }


def test_six_jobs_at_once_and_then_the_group_leave_what_one_run_leaves(tmp_path):
    raw = tmp_path / "raw"
    write_dataset(
        raw, {f"sub-{label}/anat/sub-{label}_T1w.nii.gz": {"SkullStripped": True} for label in LABELS}
    )
    fake_reference(tmp_path)
    models = [fake_bundle(tmp_path / "disyre-T1w", "disyre", "T1w")]
    together, alone = tmp_path / "together" / "out", tmp_path / "alone" / "out"

    # All share even the working folder, and each cleans it.
    jobs = [start(raw, together, tmp_path / "together" / "work", models, label) for label in LABELS]
    said = [job.communicate(timeout=600)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0] * 6, "\n".join(said)
    with start(raw, alone, tmp_path / "alone" / "work", models, *LABELS) as one:
        assert one.wait(timeout=600) == 0
    for out in (together, alone):
        assert main([str(raw), str(out), "group"]) == 0

    assert content(together) == content(alone)
    assert len(list((together / "logs").glob("bids_uad-*.toml"))) == 6
    assert len(pd.read_csv(together / "group_subjects.tsv", sep="\t")) == 6
    assert not list((tmp_path / "together" / "work").glob("*_wf/*"))
    calls = (tmp_path / "together" / "calls.txt").read_text().split("\n")
    assert sorted(calls) == sorted((tmp_path / "alone" / "calls.txt").read_text().split("\n"))


def describe(raw: Path, out: Path, number: int) -> None:
    """Add one job's entries to the dataset-level files."""
    model = ModelEntry(f"model{number}", "1", "0" * 64)
    describe_dataset(out, raw, {f"given{number}": raw}, [model], {f"label{number}": "text"})


def test_no_job_loses_what_another_adds(tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_dataset(raw, {})
    with ProcessPoolExecutor(8, mp.get_context("fork")) as pool:
        list(pool.map(partial(describe, raw, out), range(40)))
    described = json.loads((out / "dataset_description.json").read_text())
    assert len(described["GeneratedBy"]) == 1 + 40
    assert len(described["DatasetLinks"]) == 1 + 40
    assert len(pd.read_csv(out / "descriptions.tsv", sep="\t")) == 40
