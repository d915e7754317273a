"""Statuses of images, their log, the last run that a report describes, and left-right swaps."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from rich.text import Text
from scipy import ndimage

from bids_uad import space
from bids_uad.config import RunConfig
from bids_uad.dataset.naming import ImageUnit, detection_outputs
from bids_uad.files import write_tsv
from bids_uad.images import save_image
from bids_uad.levels.participant import summary
from bids_uad.levels.participant.executors import NodeFailure
from bids_uad.levels.participant.summary import (
    DONE,
    FAILED,
    PARTICIPANT,
    UNUSABLE,
    UP_TO_DATE,
    ImageStatus,
    Progress,
    collect_statuses,
    find_left_right_swaps,
    last_run_file,
    print_summary,
    print_table,
    rewrite_reports,
    save_last_run,
    summarize,
)
from bids_uad.preprocessing.reference import resolve_reference
from bids_uad.preprocessing.resampling import resample, rotation_about, translation
from tests.dataset.skeleton import write_dataset

A, B = "sub-01_ses-a_T1w", "sub-01_ses-b_T1w"
OTHER, GONE = "sub-01_ses-b_T2w", "sub-01_ses-z_T1w"
FAILED_A = (A, FAILED, ("a",), "failed")
NO_IMAGE = (PARTICIPANT, UNUSABLE, ("a",), "no image")


@pytest.mark.parametrize(
    ("runs", "remembered"),
    [
        pytest.param([FAILED_A, (B, DONE, ("b",), "")], {A: FAILED, B: DONE}, id="another session succeeds"),
        pytest.param([(B, DONE, ("b",), ""), FAILED_A], {A: FAILED, B: DONE}, id="the other order"),
        pytest.param([FAILED_A, (A, DONE, ("a",), "")], {A: DONE}, id="the same session succeeds"),
        pytest.param([FAILED_A, (A, DONE, (), "")], {A: DONE}, id="a run on everything"),
        pytest.param([FAILED_A, (A, UP_TO_DATE, (), "")], {A: UP_TO_DATE}, id="up to date"),
        pytest.param(
            [FAILED_A, (OTHER, DONE, (), "")],
            {A: FAILED, OTHER: DONE},
            id="modality",
        ),
        pytest.param([(GONE, FAILED, (), "x"), (B, DONE, (), "")], {B: DONE}, id="image is gone"),
        pytest.param([NO_IMAGE, (B, DONE, ("b",), "")], {PARTICIPANT: UNUSABLE, B: DONE}, id="session empty"),
        pytest.param([NO_IMAGE, (B, DONE, ("a", "b"), "")], {B: DONE}, id="session not empty any more"),
        pytest.param([NO_IMAGE, (A, DONE, (), "")], {A: DONE}, id="participant not empty any more"),
        pytest.param(
            [(PARTICIPANT, UNUSABLE, (), "mask"), (B, DONE, ("b",), "")],
            {PARTICIPANT: UNUSABLE, B: DONE},
            id="what a run on everything said",
        ),
    ],
)
def test_last_run_keeps_statuses_of_images_that_other_runs_processed(tmp_path, runs, remembered):
    names = ("sub-01/ses-a/anat/sub-01_ses-a_T1w", "sub-01/ses-b/anat/sub-01_ses-b_T1w")
    write_dataset(tmp_path / "raw", {f"{name}.nii.gz": None for name in names})
    for number, (image, status, sessions, message) in enumerate(runs):
        config = RunConfig(
            bids_dir=tmp_path / "raw",
            output_dir=tmp_path / "out",
            work_dir=tmp_path / "work",
            levels=("participant",),
            sessions=sessions,
            run_id=f"run{number}",
        )
        save_last_run(config, "01", [ImageStatus("01", image, status, message=message)], "cpu")
    last_run = json.loads(last_run_file(tmp_path / "out", "01").read_text())
    assert last_run["run_id"] == f"run{len(runs) - 1}"
    assert {image["image"]: image["status"] for image in last_run["images"]} == remembered


def node(name: str, image: str = "sub_01_T1w") -> SimpleNamespace:
    full = f"bids_uad_wf.sub_01_wf.{image}_derivatives_wf.{name}"
    return SimpleNamespace(name=name, fullname=full)


def exit_with_code(*_: object) -> None:  # these replace `write_report` and are imported by its process
    os._exit(3)


def be_killed(*_: object) -> None:
    signal.raise_signal(signal.SIGKILL)


def raise_error(*_: object) -> None:
    raise ValueError("no template")


@pytest.mark.parametrize(
    ("act", "cause"),
    [
        (exit_with_code, "the step ended with exit code 3; see the error above"),
        (be_killed, "the step was killed (SIGKILL), most likely because memory ran out"),
        (raise_error, "ValueError: no template"),
    ],
)
def test_failed_report_is_named_with_its_cause(tmp_path, monkeypatch, act, cause):
    monkeypatch.setattr(summary, "write_report", act)
    (tmp_path / "sub-01").mkdir()
    (line,) = rewrite_reports(run_config(tmp_path))
    assert line.startswith(f"sub-01: report not written: {cause}")


def run_config(folder: Path, **options) -> RunConfig:
    return RunConfig(folder, folder, ("participant",), folder / "work", **options)


def test_progress_is_logged_after_each_participant(caplog, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(summary.time, "monotonic", lambda: now[0])
    progress = Progress(4, Console(file=io.StringIO()))
    with caplog.at_level(logging.INFO, logger="bids_uad"), progress:
        for subject in ("01", "02"):
            progress.begin(subject)
        progress.watch(node("detect"), "start")
        progress.watch(node("detect", "sub_02_T1w"), "start")
        now[0] += summary.LOG_INTERVAL / 2
        progress.watch(node("detect"), "end")
        assert progress.seconds["sub_01_wf", "sub_01_T1w"] == summary.LOG_INTERVAL / 2
        progress.end("01", [ImageStatus("01", "sub-01_T1w", DONE)])
        now[0] += summary.LOG_INTERVAL + 1
        progress.watch(node("conform", "sub_02_T2w"), "start")
        progress.watch(node("conform", "sub_02_T2w"), "exception")
        progress.end("02", [ImageStatus("02", "a", DONE), ImageStatus("02", "b", FAILED)])
        progress.begin("03")
        progress.end("03", [ImageStatus("03", "a", UP_TO_DATE)])
    running = "running: sub_02_T1w detect"
    assert list(dict.fromkeys(caplog.messages)) == [
        f"sub-01 done (1 image(s)); 1 of 4 participants done; {running}; about 8 min left",
        f"1 of 4 participants done; {running}, sub_02_T2w conform; about 23 min left",
        f"sub-02 failed (1 of 2 images); 1 of 4 participants done, 1 failed; {running}; about 8 min left",
    ]


def test_progress_on_a_terminal_is_one_line_that_is_removed():
    stream = io.StringIO()
    progress = Progress(4, Console(file=stream, force_terminal=True, width=100))
    with progress:
        progress.begin("01")
        progress.watch(node("detect"), "start")
        progress._live.refresh()
    text = stream.getvalue()
    assert "0 of 4 participants done; running: sub_01_T1w detect" in text
    assert text.endswith("\x1b[2K") or "\x1b[2K" in text.rsplit("detect", 1)[1]


def test_summary_of_many_images_shows_those_that_failed():
    stream = io.StringIO()
    rows = [(f"image-{number}", Text(DONE), "1", "", "") for number in range(summary.MAX_ROWS)]
    rows[7] = ("image-x", Text(FAILED), "1", "", "")
    print_summary(rows, Console(file=stream, width=100))
    assert "image-8" in stream.getvalue()
    stream = io.StringIO()
    print_summary([*rows, rows[0]], Console(file=stream, width=100))
    assert "image-x" in stream.getvalue()
    assert "image-8" not in stream.getvalue()
    assert "and 200 more images" in stream.getvalue()


def test_long_names_are_not_truncated():
    stream = io.StringIO()
    rows = [("x" * 70, "y" * 30), ("x", "y")]
    print_table(("image", "detectors"), rows, Console(file=stream, width=40), title="table", numbers=[1])
    text = stream.getvalue()
    assert (text.count("x"), text.count("y")) == (71, 31)
    assert max(map(len, text.splitlines())) == 40


def test_marked_fractions_far_above_those_of_healthy_scans_are_in_table_and_log(tmp_path, monkeypatch):
    unit = ImageUnit(Path("sub-01_T1w.nii.gz"), "01", None, "T1w", {"subject": "01"})
    task = SimpleNamespace(unit=unit, is_control=False)
    for detector, volume in (("disyre", 40.0), ("uniad", 20.0)):
        row = {"brain_volume_mm3": 1000, "anomaly_volume_mm3": volume, "lesion_volume_mm3": None}
        row |= {"healthy_mean": 0.004, "healthy_p95": 0.012}
        write_tsv(tmp_path / detection_outputs(unit, detector)["metrics"], pd.DataFrame([row]))
    statuses = [ImageStatus("01", unit.key, DONE)]
    read_csv, read = pd.read_csv, []
    monkeypatch.setattr(
        pd, "read_csv", lambda path, **options: read.append(path) or read_csv(path, **options)
    )
    rows, warnings = summarize(statuses, [task], tmp_path)
    assert len(read) == len(set(read)) == 2
    assert rows[0][4] == "Disyre 0.0!, UniAD 0.0"
    stream = io.StringIO()
    print_summary(rows, Console(file=stream, width=100))
    assert "!: far more than in healthy validation scans" in stream.getvalue()
    (line,) = warnings
    assert line.startswith("sub-01_T1w: Disyre marks 4 % of the brain")


def test_all_detectors_that_failed_are_named(tmp_path):
    unit = SimpleNamespace(subject="01", key="sub-01_T1w", session_folder=Path("sub-01"))
    task = SimpleNamespace(unit=unit, done=False, anchor_only=False)
    failures = [
        NodeFailure(node("detect_fae").fullname, "ValueError: no", "crash-1.txt"),
        NodeFailure(node("detect_fae", "sub_01_T2w").fullname, "ValueError: another image", "crash-2.txt"),
        NodeFailure(node("detect_rd").fullname, "ProcessKilled: the step was killed", "crash-3.txt"),
    ]
    config = SimpleNamespace(output_dir=tmp_path, run_id="run")
    (status,) = collect_statuses([task], [], failures, {}, config)
    assert status.status == FAILED
    assert status.message == (
        "sub-01_T1w: detect_fae: ValueError: no (details: crash-1.txt); "
        "detect_rd: the step was killed (details: crash-3.txt)"
    )


CENTRE = np.array([-119.0, 116.0, 76.0])


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, np.ndarray]:
    """The built-in reference, which is symmetric, and its mask."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TEMPLATEFLOW_HOME", raising=False)
        found = resolve_reference(None, tmp_path_factory.mktemp("cache"))
    return nib.load(found.t1w).get_fdata(dtype=np.float32) / 1000, nib.load(found.brain_mask).get_fdata() > 0


def person(template: tuple[np.ndarray, np.ndarray], seed: int) -> np.ndarray:
    """The reference with an asymmetry of its own: smooth changes by a fifth."""
    image, mask = template
    random = np.random.default_rng(seed).normal(size=[n // 4 + 1 for n in space.SHAPE]).astype(np.float32)
    field = ndimage.zoom(ndimage.gaussian_filter(random, 2.0), 4, order=1)
    field = field[: space.SHAPE[0], : space.SHAPE[1], : space.SHAPE[2]]
    return np.where(mask, image * (1 + 0.2 * field / field.std()), 0.0)


def write(out: Path, name: str, image: np.ndarray, modality: str = "T1w", brain: str = "brain") -> None:
    """Write an image as preprocessing leaves it: a degree and a millimetre away from its ideal place."""
    move = rotation_about(CENTRE, (1.0, -0.5, 0.5)) @ translation(np.array([1.0, 0.5, -0.5]))
    moved = resample(image, space.AFFINE, space.SHAPE, space.AFFINE, move)
    mask = moved > 0.05
    noise = np.random.default_rng(sum(name.encode())).normal(0, 0.03, mask.sum())
    start = out / "sub-01" / "anat" / f"{name}_space-SRI24_desc-"
    moved = np.where(mask, moved, 0.0)
    moved[mask] = np.maximum(moved[mask] + noise, 0.01)
    save_image(space.to_image(moved), f"{start}preproc_{modality}.nii.gz")
    save_image(space.to_image(mask, np.uint8), f"{start}{brain}_mask.nii.gz")


def test_left_right_swap_is_found(template, tmp_path: Path, caplog, monkeypatch) -> None:
    image = person(template, 0)
    write(tmp_path, "sub-01", image)
    write(tmp_path, "sub-01_rec-flipped", image[::-1])
    found = find_left_right_swaps(tmp_path, "01")
    assert list(found) == [("sub-01_rec-flipped", "T1w")]
    text = found["sub-01_rec-flipped", "T1w"]
    assert text.startswith("Left and right are swapped between sub-01_T1w and sub-01_rec-flipped_T1w: ")
    monkeypatch.setattr(logging.getLogger("bids_uad"), "propagate", True)
    with caplog.at_level(logging.WARNING, "bids_uad"):
        assert rewrite_reports(run_config(tmp_path)) == []
    assert text in caplog.messages
    assert (tmp_path / "sub-01.html").read_text().count(text) == 1


def test_images_of_equal_orientation_are_not_reported(template, tmp_path: Path) -> None:
    """The same brain again, in another contrast, the brain of another person, and a T2w of its session."""
    image = person(template, 0)
    write(tmp_path, "sub-01_run-1", image)
    write(tmp_path, "sub-01_run-2", image)
    write(tmp_path, "sub-01_run-3", np.where(image > 0, 1.3 - image, 0.0), "T2w")
    write(tmp_path, "sub-01_run-4", person(template, 1))
    write(tmp_path, "sub-01_run-1", np.where(image > 0, 1.3 - image, 0.0)[::-1], "T2w", "T2wBrain")
    assert find_left_right_swaps(tmp_path, "01") == {}


@pytest.mark.slow
def test_swaps_are_found_relative_to_an_image_without_failures(template, tmp_path: Path) -> None:
    image = person(template, 0)
    for run, mirrored in (("1", True), ("2", False), ("3", False)):
        write(tmp_path, f"sub-01_run-{run}", image[::-1] if mirrored else image)
    sidecar = tmp_path / "sub-01" / "anat" / "sub-01_run-1_space-SRI24_desc-preproc_T1w.json"
    sidecar.write_text(json.dumps({"PreprocessingQuality": {"failures": ["turned"]}}))
    assert list(find_left_right_swaps(tmp_path, "01")) == [("sub-01_run-1", "T1w")]
