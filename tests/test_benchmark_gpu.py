"""The benchmark of GPUs: counted operations, its time budget, and its comparison with the CPU."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import gpu, gpu_models
from benchmarks.scan import Scan
from bids_uad.space import SHAPE


@pytest.fixture
def toy(monkeypatch):
    """An ellipsoid instead of a scan, of which two slices are computed on a CPU."""
    axes = np.ogrid[tuple(slice(size) for size in SHAPE)]
    brain = sum(((axis - size / 2) / (size / 4)) ** 2 for axis, size in zip(axes, SHAPE, strict=True)) < 1
    volume = np.where(brain, np.random.default_rng(0).uniform(0.2, 1.0, SHAPE), 0.0).astype(np.float32)
    monkeypatch.setattr(gpu, "load_scan", lambda folder: Scan("ellipsoid", volume, brain))
    return ["--device", "cpu", "--detectors", "fae", "--presets", "lite", "--slices", "2", "--runs", "2"]


@pytest.mark.parametrize("without_data", [False, True])
def test_count_work_of_a_convolution_is_that_of_the_formula(without_data):
    convolution, x = nn.Conv2d(3, 5, 3, padding=1, bias=False), torch.zeros(2, 3, 16, 16)
    if without_data:
        convolution.forward = gpu.without_data(convolution)
    with torch.inference_mode(), gpu.count_work() as work:
        assert convolution(x).shape == (2, 5, 16, 16)
    assert work["flops"] == 2 * 2 * 16 * 16 * 9 * 3 * 5
    numbers = x.numel() + 9 * 3 * 5 + 2 * 5 * 16 * 16
    # The zeros that stand for the output of the network are written once more.
    assert work["bytes"] == 2 * (numbers + (2 * 5 * 16 * 16 if without_data else 0))


def test_limits_are_those_of_the_slower_of_arithmetic_and_memory():
    flops, speed = gpu.CHIPS["H200"]
    found = gpu.limits({"flops": flops, "bytes": 3 * speed}, slices=2)
    assert (found["compute_s"], found["memory_s"], found["bound"]) == (2, 6, "memory")
    assert gpu.limits({"flops": flops, "bytes": 0}, slices=1)["bound"] == "compute"


def test_gpu_benchmark_writes_time_speed_and_agreement(toy, tmp_path):
    paths = ["--roofline-file", str(tmp_path / "roofline.json"), "--output", str(tmp_path / "gpu.json")]
    gpu.main([*toy, *paths, "--roofline"])
    roofline = json.loads((tmp_path / "roofline.json").read_text())
    gpu.main([*toy, *paths])
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["detector"] for row in results["rows"]] == ["default model", "fae"]
    for counted, row in zip(roofline["rows"], results["rows"], strict=True):
        assert counted["flops_per_slice"] > 0
        assert row["runs"] == 2
        assert row["fp32_difference"] == 0  # the same device
        assert row["within_tolerance"]
    assert results["sums_s"]["lite"] == pytest.approx(results["rows"][1]["seconds"], abs=0.01)


def test_gpu_benchmark_without_time_skips_and_says_so(toy, tmp_path):
    gpu.main([*toy, "--budget", "0", "--output", str(tmp_path / "gpu.json")])
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["sums_s"] == {}
    for row in results["rows"]:
        assert row["skipped"] == row["comparison_skipped"] == "not enough time"


def test_affordable_estimates_from_the_network_before(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: clock[0])
    small, medium, large, unknown = (gpu.Network(name, "paper") for name in ("a", "b", "c", "d"))
    found = {}
    work = {large: 100.0, medium: 4.0, small: 1.0}
    for network, fits in gpu.affordable([large, unknown, medium, small], work, gpu.Budget(20.0)):
        found[network] = fits
        clock[0] += 3.0 if fits else 0.0
    assert list(found) == [unknown, small, medium, large]
    # The small one takes 3 s, so that 12 s are estimated for the medium one, and 75 s for the large one.
    assert list(found.values()) == [True, True, True, False]


def test_gpu_benchmark_fails_if_a_map_differs(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "relative_difference", lambda scores, reference: 2 * gpu.TOLERANCE)
    with pytest.raises(SystemExit, match=r"differ from those of the CPU: .*fae \(lite\)"):
        gpu.main([*toy, "--output", str(tmp_path / "gpu.json")])
    assert not any(row["within_tolerance"] for row in json.loads((tmp_path / "gpu.json").read_text())["rows"])


def test_relative_difference_is_a_fraction_of_the_mean():
    assert gpu.relative_difference(np.array([1.0, 3.5]), np.array([1.5, 2.5])) == 0.375


def test_speed_is_that_of_the_steps_without_what_each_training_does_besides():
    lengths = []

    def train(steps):
        lengths.append(steps)
        return 3 + 0.1 * steps + (50 if len(lengths) == 1 else 0)  # the first prepares the scans

    assert gpu_models.speed(train, enough=5) == pytest.approx((0.1, 3))
    assert lengths == [2, 4, 16, 64]


@pytest.mark.parametrize(
    ("options", "steps", "scans"),
    [
        ({}, 0.9 * (300 - 10 - 80) / 0.1, 40),
        ({"most_steps": 500}, 500, 40),
        ({"per_scan": 5}, 0.9 * (300 - 10 - 100) / 0.1, 20),  # a third of the time
        ({"per_scan": 20}, 0, 5),
        ({"overhead": 250}, 0, 40),
    ],
)
def test_time_of_a_model_is_divided_between_training_and_calibration(options, steps, scans):
    given = {"rate": 0.1, "overhead": 10, "per_scan": 2, "scans": 40, "most_steps": 10_000}
    plan = gpu_models.make_plan(300, **given | options)
    assert (plan.steps, plan.scans) == (pytest.approx(steps, abs=1), scans)


@pytest.mark.parametrize("detector", ["pls", "disyre", "andi"])
def test_default_models_are_small_enough(tmp_path, monkeypatch, detector):
    args = SimpleNamespace(device="cpu", output=tmp_path, preset="default", hyper=[])
    models = gpu_models.Models(args, [])
    assert models.check(detector, "T2w") >= 4000
    monkeypatch.setattr(gpu_models, "MAX_BYTES", 2e6)
    with pytest.raises(ValueError, match="MB in float16; choose a smaller network"):
        models.check(detector, "T2w")
