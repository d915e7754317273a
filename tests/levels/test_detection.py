"""Detection in a process that stays: one for all images, replaced if it ends; failures of one detector."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from nipype.pipeline.engine import Node

from bids_uad import space
from bids_uad.engine.bundle import PACKAGED, load_bundle, load_detector, save_bundle
from bids_uad.engine.execution import DEFAULT_EXECUTION
from bids_uad.engine.inference import anomaly_map
from bids_uad.images import save_image
from bids_uad.levels.participant import executors, interfaces
from bids_uad.levels.participant import workflow as writing
from bids_uad.levels.participant.completion_records import read_record
from bids_uad.levels.participant.interfaces import Detect
from bids_uad.methods.registry import DETECTORS
from bids_uad.resources import RequestProcess
from tests.levels.fakes import fake_bundle
from tests.levels.test_participant_run import T1W, T2W, Bench, reference, stand_ins  # noqa: F401
from tests.levels.toy_detector import TOY, Toy
from tests.test_workers import runs

ROOT = Path(__file__).parents[2]
INTENSITY = str(PACKAGED / "intensity-T1w-lite")


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Return a dataset, and the models `toy` and `intensity`, applied by the real `Detect`."""
    for name, value in {"TOY": str(tmp_path), "PYTHONPATH": str(ROOT)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(DETECTORS, "toy", TOY)
    monkeypatch.setattr(executors, "START_METHOD", "fork")
    monkeypatch.setattr(writing, "Detect", Detect)
    monkeypatch.setattr(interfaces, "DETECTION", RequestProcess("tests.levels.toy_detector"))
    bench = Bench(tmp_path)
    toy = fake_bundle(tmp_path / "toy-T1w", "toy", "T1w")
    calibration = (toy / "calibration.json").read_text()
    save_bundle(toy, Toy(Toy.presets["lite"]), preset="lite", modality="T1w", training={}, card="")
    (toy / "calibration.json").write_text(calibration)
    (tmp_path / "log").unlink()
    bench.models = [str(toy), INTENSITY]
    return bench


def noted(bench, what):
    """Return the numbers of the processes in which `toy` was loaded, or has scored."""
    lines = [line.split() for line in (bench.folder / "log").read_text().splitlines()]
    return [int(number) for word, number in lines if word == what]


def record(bench):
    return read_record(bench.out / "sub-01" / "log" / "sub-01_T1w.json")


def outputs(bench, detector):
    return {path.name: path.stat().st_mtime_ns for path in bench.out.rglob(f"*_desc-T1w{detector}_*")}


def test_one_process_takes_all_images_and_loads_each_model_once(bench):
    bench.dataset(*(f"sub-0{number}/anat/sub-0{number}_T1w.nii.gz" for number in (1, 2)))
    assert bench.run("--nprocs", "2") == 0
    (number,) = noted(bench, "load")
    assert set(noted(bench, "score")) == {number}
    assert len(list(bench.out.rglob("*_metrics.tsv"))) == 4
    assert not runs(number)


@pytest.mark.slow
def test_killed_process_is_replaced_and_its_image_scored_again(bench):
    bench.dataset(T1W)
    (bench.folder / "orders").write_text("SIGKILL")
    assert bench.run() == 0
    assert len(set(noted(bench, "load"))) == 2
    assert set(record(bench).models) == {"toy", "intensity"}


@pytest.mark.parametrize(
    ("orders", "cause"),
    [
        ("SIGKILL SIGKILL", "RuntimeError: detection failed: the process was killed (SIGKILL), most likely"),
        pytest.param(
            "SIGSEGV SIGSEGV",
            "RuntimeError: detection failed: the process was ended by SIGSEGV",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "fail",
            "RuntimeError: detection failed: ZeroDivisionError: nothing to divide by",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "nan",
            "toy gave NaN or infinite scores for sub-01_T1w in axial slices 60, 61, 62, 63, 64 and",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_failing_detector_loses_only_its_own_map(bench, capfd, monkeypatch, orders, cause):
    monkeypatch.setenv("COLUMNS", "400")
    bench.dataset(T1W)
    (bench.folder / "orders").write_text(orders)
    assert bench.run() == 1
    said = " ".join(capfd.readouterr().err.split())
    assert f"sub-01_T1w: detect_toy: {cause}" in said
    assert "Traceback" not in said
    assert not outputs(bench, "Toy")
    assert set(record(bench).models) == {"intensity"}
    written = outputs(bench, "Intensity")
    assert written
    scored = len(noted(bench, "score"))
    assert bench.run() == 0
    assert outputs(bench, "Intensity") == written
    assert len(noted(bench, "score")) == scored + 4  # batches of 8 of 30 slices
    assert set(record(bench).models) == {"toy", "intensity"}
    on_disk = {path.relative_to(bench.out).as_posix() for path in (bench.out / T1W).parent.iterdir()}
    assert on_disk == record(bench).files
    assert bench.run() == 0
    assert outputs(bench, "Intensity") == written


@pytest.mark.slow
def test_maps_of_later_images_equal_those_of_the_first(tmp_path, monkeypatch):
    """Nothing of an image, a seed or another detector stays in the process."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(interfaces, "DETECTION", RequestProcess("bids_uad.engine.inference"))
    brain = np.zeros(space.SHAPE, bool)
    brain[90:130, 80:140, 70:76] = True
    save_image(space.to_image(brain, np.uint8), tmp_path / "brain.nii")
    volumes = {}
    for number, key in enumerate(("first", "second")):
        volumes[key] = np.random.default_rng(number).random(space.SHAPE).astype(np.float32) * brain
        save_image(space.to_image(volumes[key]), tmp_path / f"{key}.nii")
    models = [load_bundle(PACKAGED / name) for name in ("pls-T1w-default", "ddpmpp-T1w-lite")]
    found = {}
    for seed, (key, bundle) in enumerate((key, bundle) for key in volumes for bundle in models):
        inputs = {"image": tmp_path / f"{key}.nii", "brain": tmp_path / "brain.nii", "key": key, "seed": seed}
        detect = Detect(bundle=str(bundle.folder), sha256=bundle.sha256, **inputs)
        node = Node(detect, name=f"detect_{key}_{bundle.detector}", base_dir=str(tmp_path))
        found[key, bundle.detector] = nib.load(node.run().outputs.out_file).get_fdata()
    number = interfaces.DETECTION._process.pid
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for seed, (key, bundle) in enumerate((key, bundle) for key in volumes for bundle in models):
        detector = DEFAULT_EXECUTION.prepare(load_detector(bundle))
        options = {"key": key, "seed": seed, "protocol": bundle.protocol}
        expected = anomaly_map(detector, volumes[key], brain, **options)
        np.testing.assert_array_equal(found[key, bundle.detector], expected)
        assert expected.max() > 0
    torch.set_num_threads(threads)
    assert interfaces.DETECTION._process.pid == number
    interfaces.DETECTION.stop()
