"""What the report of a participant remembers of earlier runs."""

from __future__ import annotations

import json

import pytest

from bids_uad.config import RunConfig
from bids_uad.levels.participant.summary import (
    DONE,
    FAILED,
    PARTICIPANT,
    UNUSABLE,
    UP_TO_DATE,
    ImageStatus,
    last_run_file,
    save_last_run,
)
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
def test_what_a_run_says_of_its_images_replaces_what_was_said_of_them(tmp_path, runs, remembered):
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
    told = json.loads(last_run_file(tmp_path / "out", "01").read_text())
    assert told["run_id"] == f"run{len(runs) - 1}"
    assert {image["image"]: image["status"] for image in told["images"]} == remembered
