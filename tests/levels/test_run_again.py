"""Runs over the outputs of earlier runs: with other models, changed inputs, lost files, and after a kill."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pandas as pd
import pytest

from bids_uad.dataset.participants import read_participants
from bids_uad.evaluation.tables import find_metrics_tables
from bids_uad.levels.group_tables import current_tables
from bids_uad.levels.participant import workflow as writing
from bids_uad.levels.participant.completion_records import read_record
from tests.dataset.skeleton import write_image, write_mask
from tests.levels.fakes import FakeDetect, add_reference, fake_bundle
from tests.levels.test_participant_run import T1W, Bench, reference, stand_ins  # noqa: F401

ANAT = Path("sub-01") / "anat"
DISYRE, PATCHCORE = "T1wDisyre", "T1wPatchcore"


@pytest.fixture
def again(tmp_path):
    return Bench(tmp_path)


def patchcore_of(again: Bench) -> str:
    return str(fake_bundle(again.folder / "patchcore-T1w", "patchcore", "T1w"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, stand_ins):  # noqa: F811
    """Return finished runs by the number of their models: Disyre, and PatchCore as well; tests copy them."""
    benches = {}
    for number in (1, 2):
        benches[number] = Bench(tmp_path_factory.mktemp("finished"))
        benches[number].dataset(T1W)
        models = [patchcore_of(benches[number]), benches[number].models[0]][2 - number :]
        assert benches[number].run(models=models) == 0
    return benches


def truncate_list(again: Bench) -> set[str]:
    """Detectors whose tables the group level reads."""
    paths = find_metrics_tables(again.out)
    current, _ = current_tables(again.out, paths, again.raw, read_participants(again.raw))
    return {path.name.split("desc-")[1].split("_")[0] for path in current}


def tables(again: Bench) -> set[str]:
    """Detectors with metrics tables on disk."""
    return {path.name.split("desc-")[1].split("_")[0] for path in find_metrics_tables(again.out)}


def row(again: Bench, desc: str) -> pd.Series:
    return pd.read_csv(again.out / ANAT / f"sub-01_space-SRI24_desc-{desc}_metrics.tsv", sep="\t").iloc[0]


def record(again: Bench):
    return read_record(again.out / "sub-01" / "log" / "sub-01_T1w.json")


def on_disk(again: Bench) -> set[str]:
    return {path.relative_to(again.out).as_posix() for path in (again.out / ANAT).iterdir()}


@pytest.mark.parametrize(
    "lost",
    ["desc-brain_mask.nii.gz", pytest.param(f"desc-{DISYRE}_histogram.tsv", marks=pytest.mark.slow)],
)
def test_rerun_for_a_lost_file_keeps_other_models(finished, tmp_path, lost):
    again = finished[1].copied(tmp_path)
    patchcore = patchcore_of(again)
    (again.out / ANAT / f"sub-01_space-SRI24_{lost}").unlink()
    assert again.run(models=[patchcore]) == 0
    assert set(record(again).models) == {"disyre", "patchcore"}
    assert again.run(models=[patchcore, again.models[0]]) == 0
    assert on_disk(again) == record(again).files
    assert truncate_list(again) == {DISYRE, PATCHCORE}
    # And so they go with the inputs that they were made of, also in a run without their model.
    another_scan(again)
    assert again.run(models=[patchcore]) == 0
    assert on_disk(again) == record(again).files
    assert truncate_list(again) == tables(again) == {PATCHCORE}


def test_two_bundles_of_one_detector_replace_each_other(again):
    again.dataset(T1W)
    other = str(fake_bundle(again.folder / "disyre-other", "disyre", "T1w", threshold=1.0))
    found = []
    for model in (again.models[0], other, again.models[0]):
        assert again.run(models=[model]) == 0
        found.append((row(again, DISYRE)["threshold"], record(again).models["disyre"].label))
    assert found == [(0.5, "disyre-T1w"), (1.0, "disyre-other"), (0.5, "disyre-T1w")]


class Killed(FakeDetect):
    """Detection whose process is killed."""

    def _run_interface(self, runtime):
        raise RuntimeError("killed")


def another_model(again: Bench):
    fake_bundle(Path(again.models[0]), "disyre", "T1w", threshold=1.0)
    weights = Path(again.models[0]) / "weights.safetensors"
    weights.write_bytes(b"other")
    info = Path(again.models[0]) / "bundle.json"
    content = json.loads(info.read_text())
    content["sha256"] = {weights.name: hashlib.sha256(b"other").hexdigest()}
    info.write_text(json.dumps(content))


def another_scan(again: Bench):
    write_image(again.raw / T1W, shape=(22, 24, 24))


def another_age(again: Bench):
    (again.raw / "participants.tsv").write_text("participant_id\tage\nsub-01\t41\n")


CHANGES = {
    "model": (another_model, (), {PATCHCORE}),
    "scan": (another_scan, (), set()),
    "seed": (lambda again: None, ("--random-seed", "1"), {PATCHCORE}),
    "precision": (lambda again: None, ("--precision", "bf16"), {PATCHCORE}),
    "lesion mask": (
        lambda again: write_mask(again.folder / "lesions" / ANAT / "sub-01_label-lesion_mask.nii.gz"),
        ("-d", "lesions={folder}/lesions"),
        set(),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_failed_run_leaves_no_outdated_outputs(finished, tmp_path, monkeypatch, change):
    again = finished[2].copied(tmp_path)
    apply, options, holding = CHANGES[change]
    apply(again)
    monkeypatch.setattr(writing, "Detect", Killed)
    assert again.run(*(option.format(folder=again.folder) for option in options)) == 1
    assert truncate_list(again) == tables(again) == holding
    monkeypatch.setattr(writing, "Detect", FakeDetect)
    assert again.run(*(option.format(folder=again.folder) for option in options)) == 0
    assert truncate_list(again) == {DISYRE} | holding


def test_changed_age_outdates_deviations(again, capfd):
    again.dataset(T1W)
    (again.raw / "participants.tsv").write_text("participant_id\tage\nsub-01\t40\n")
    add_reference(Path(again.models[0]))
    assert again.run("--deviation", "normative", "none") == 0
    assert truncate_list(again) == {DISYRE, f"{DISYRE}Normative"}
    another_age(again)
    assert truncate_list(again) == {DISYRE}
    assert again.run("--deviation", "normative", "none") == 0
    assert truncate_list(again) == {DISYRE, f"{DISYRE}Normative"}
    assert record(again).models["disyre+normative"].covariates["age"] == 41


def test_outputs_of_an_image_that_became_unusable_are_removed(again):
    again.dataset(T1W, "sub-02/anat/sub-02_T1w.nii.gz")
    assert again.run() == 0
    raw = again.raw / T1W
    size = raw.stat().st_size
    raw.write_bytes(b"?" * size)
    assert again.run() == 1
    assert {path.name[:6] for path in find_metrics_tables(again.out)} == {"sub-02"}
    assert on_disk(again) == set()
    raw.unlink()  # not there is not another one: only the group level leaves it out
    assert again.run("--participant-label", "02") == 0


def test_outputs_of_unselected_images_are_kept(again):
    again.dataset(T1W, "sub-01/anat/sub-01_acq-x_T1w.nii.gz")
    assert again.run() == 0
    filters = again.folder / "filter.json"
    filters.write_text(json.dumps({"t1w": {"acquisition": None}}))
    assert again.run("--bids-filter-file", str(filters)) == 0
    assert len(find_metrics_tables(again.out)) == 2
    assert truncate_list(again) == {DISYRE}


def test_deleted_record_is_written_again(again):
    again.dataset(T1W)
    assert again.run() == 0
    path = again.out / "sub-01" / "log" / "sub-01_T1w.json"
    path.unlink()
    assert truncate_list(again) == set()
    assert again.run() == 0
    assert truncate_list(again) == {DISYRE}
    assert on_disk(again) == record(again).files


def test_report_lists_sessions_without_usable_images(again):
    names = {session: f"sub-01/ses-{session}/anat/sub-01_ses-{session}_T1w.nii.gz" for session in "ab"}
    again.dataset(*names.values())
    (again.raw / names["a"]).write_bytes(b"not an image")
    assert again.run("--session-label", "a") == 66
    assert (again.out / "sub-01.html").is_file()
    assert again.run("--session-label", "b") == 0
    saved = json.loads((again.out / "sub-01" / "log" / "last_run.json").read_text())["images"]
    assert [(image["image"], image["status"]) for image in saved] == [
        ("sub-01_ses-a_T1w", "unusable"),
        ("sub-01_ses-b_T1w", "done"),
    ]
    assert names["a"].rsplit("/", 1)[1] in saved[0]["message"]
    write_image(again.raw / names["a"])
    assert again.run("--session-label", "a") == 0
    saved = json.loads((again.out / "sub-01" / "log" / "last_run.json").read_text())["images"]
    assert [image["status"] for image in saved] == ["done", "done"]
