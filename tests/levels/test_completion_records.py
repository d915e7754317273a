"""Completion records: outputs listed in them are up to date, and outdated files are removed."""

from __future__ import annotations

import errno
import multiprocessing as mp
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from bids_uad.config import RunConfig
from bids_uad.dataset.naming import Problem
from bids_uad.errors import unreadable
from bids_uad.levels.participant import plan
from bids_uad.levels.participant.completion_records import (
    CompletionRecord,
    ModelRecord,
    all_exist,
    read_record,
    withdraw_outputs,
    write_record,
)

OLD, NEW = {"random_seed": 0}, {"random_seed": 1}
KEY = "sub-01_T1w"
PREPROC = "sub-01/anat/preproc.nii.gz"


def path_in(out: Path) -> Path:
    return out / "sub-01" / "log" / f"{KEY}.json"


def outputs_of(name: str) -> list[str]:
    return [f"sub-01/anat/{name}_map.nii.gz", f"sub-01/anat/{name}_metrics.tsv"]


def finish(out: Path, name: str, identity: str = "first", fingerprint: dict = OLD) -> None:
    """Write outputs and then the record, as a run with one model does."""
    for file in (PREPROC, *outputs_of(name)):
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        (out / file).write_text(identity)
    models = {name: ModelRecord(f"{name}-T1w", identity, outputs=outputs_of(name))}
    record = CompletionRecord(KEY, "run", "sub-01/anat/sub-01_T1w.nii.gz", fingerprint, [PREPROC], models)
    write_record(path_in(out), out, record)


def on_disk(out: Path) -> set[str]:
    return {path.relative_to(out).as_posix() for path in out.rglob("anat/*")}


def test_record_round_trip(tmp_path):
    finish(tmp_path, "rd")
    record = read_record(path_in(tmp_path))
    assert record.files == {PREPROC, *outputs_of("rd")} == on_disk(tmp_path)
    assert record.models["rd"].identity == "first"
    assert all_exist(record.files, tmp_path)
    (tmp_path / PREPROC).write_text("")
    assert not all_exist(record.files, tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", '{"models": []}', '{"models": {"rd": 3}}', '{"models": {}, "x": 1}']
)
def test_damaged_record_is_read_as_none(tmp_path, text):
    path_in(tmp_path).parent.mkdir(parents=True)
    path_in(tmp_path).write_text(text)
    assert read_record(path_in(tmp_path)) is None
    withdraw_outputs(path_in(tmp_path), tmp_path, NEW, {})  # nothing is known, so nothing is removed
    finish(tmp_path, "rd")
    assert set(read_record(path_in(tmp_path)).models) == {"rd"}


def test_write_record_keeps_models_of_earlier_runs(tmp_path):
    finish(tmp_path, "rd")
    finish(tmp_path, "pls")
    assert set(read_record(path_in(tmp_path)).models) == {"rd", "pls"}


@pytest.mark.parametrize(
    ("fingerprint", "identities", "left", "removed"),
    [
        pytest.param(OLD, {}, {"rd", "pls"}, set(), id="nothing has changed"),
        pytest.param(OLD, {"rd": "first"}, {"rd", "pls"}, set(), id="the same model again"),
        pytest.param(OLD, {"uniad": "first"}, {"rd", "pls"}, set(), id="a further model"),
        pytest.param(OLD, {"rd": "second"}, {"pls"}, set(outputs_of("rd")), id="another model"),
        pytest.param(
            NEW, {"rd": "first"}, set(), {PREPROC, *outputs_of("rd"), *outputs_of("pls")}, id="other inputs"
        ),
    ],
)
def test_withdraw_outputs_removes_outdated_files(tmp_path, fingerprint, identities, left, removed):
    finish(tmp_path, "rd")
    finish(tmp_path, "pls")
    foreign = tmp_path / "sub-01" / "anat" / "notes.txt"
    foreign.write_text("not ours")
    before = on_disk(tmp_path)
    withdraw_outputs(path_in(tmp_path), tmp_path, fingerprint, identities)
    assert before - on_disk(tmp_path) == removed
    assert set(read_record(path_in(tmp_path)).models) == left
    assert foreign.exists()


def test_withdraw_outputs_completes_an_interrupted_removal(tmp_path, monkeypatch):
    finish(tmp_path, "rd")
    unlink = Path.unlink

    def killed(self, missing_ok=False):
        if self.name == "rd_metrics.tsv":
            raise KeyboardInterrupt
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        withdraw_outputs(path_in(tmp_path), tmp_path, NEW, {})
    monkeypatch.undo()
    assert "sub-01/anat/rd_metrics.tsv" in on_disk(tmp_path)
    assert read_record(path_in(tmp_path)).files == set()  # no reader takes it for a result
    withdraw_outputs(path_in(tmp_path), tmp_path, NEW, {})
    assert on_disk(tmp_path) == set()


def test_write_record_removes_files_of_other_inputs(tmp_path):
    finish(tmp_path, "rd", fingerprint=OLD)
    finish(tmp_path, "pls", fingerprint=NEW)
    record = read_record(path_in(tmp_path))
    assert record.fingerprint == NEW
    assert on_disk(tmp_path) == record.files == {PREPROC, *outputs_of("pls")}


def test_models_of_a_run_are_recorded_one_by_one(tmp_path):
    for name in ("rd", "pls"):
        finish(tmp_path, name)
    withdraw_outputs(path_in(tmp_path), tmp_path, OLD, {"rd": "second", "pls": "second"})
    assert on_disk(tmp_path) == {PREPROC}
    for file in outputs_of("pls"):  # written, and not recorded yet
        (tmp_path / file).write_text("second")
    record = CompletionRecord(KEY, "second", "sub-01/anat/sub-01_T1w.nii.gz", OLD, [PREPROC])
    models = {name: ModelRecord(name, "second", outputs=outputs_of(name)) for name in ("rd", "pls")}
    for own, recorded, run_id in (
        ([], [], "run"),
        (["rd"], ["rd"], "run"),
        (["pls"], ["pls", "rd"], "second"),
    ):
        part = replace(record, models={name: models[name] for name in own})
        write_record(path_in(tmp_path), tmp_path, part, requested=models)
        found = read_record(path_in(tmp_path))
        assert list(found.models) == recorded
        assert found.run_id == run_id  # the last that was complete
        assert set(outputs_of("pls")) < on_disk(tmp_path)


def test_concurrent_jobs_with_different_models_are_all_recorded(tmp_path):
    names = [f"model{number}" for number in range(24)]
    with ProcessPoolExecutor(6, mp.get_context("fork")) as pool:
        list(pool.map(partial(finish, tmp_path), names))
    record = read_record(path_in(tmp_path))
    assert set(record.models) == set(names)
    assert record.files == on_disk(tmp_path)


@pytest.mark.parametrize("readable", [True, False])
def test_remove_unusable_keeps_outputs_of_unreadable_files(tmp_path, monkeypatch, readable):
    """Whether a file has changed is unknown if it cannot be read."""
    config = RunConfig(tmp_path / "raw", tmp_path / "out", ("participant",), tmp_path / "work")
    source = config.bids_dir / "sub-01" / "anat" / f"{KEY}.nii.gz"
    source.parent.mkdir(parents=True)
    source.write_bytes(b"changed")
    output = config.output_dir / PREPROC
    output.parent.mkdir(parents=True)
    output.write_bytes(b"voxels")
    name = source.relative_to(config.bids_dir).as_posix()
    record = CompletionRecord(KEY, "run", name, {"input_sha256": "0"}, [PREPROC])
    write_record(path_in(config.output_dir), config.output_dir, record)

    def refuse(path):
        raise unreadable(path, PermissionError(errno.EACCES, "Permission denied"))

    if not readable:
        monkeypatch.setattr(plan, "sha256_of", refuse)
    plan.remove_unusable([Problem("01", "damaged", KEY)], config)
    assert output.exists() != readable
