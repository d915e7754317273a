"""Precision, layout and batch size of a run."""

from __future__ import annotations

from copy import deepcopy
from itertools import product

import nibabel as nib
import numpy as np
import pytest
import torch

from bids_uad.dataset.sri24_scans import find_preprocessed
from bids_uad.engine import execution
from bids_uad.engine.bundle import PACKAGED, load_bundle, load_detector
from bids_uad.engine.execution import Execution, resolve_device, resolve_precision
from bids_uad.engine.inference import anomaly_map
from bids_uad.errors import UnavailableError
from bids_uad.methods import registry
from bids_uad.methods.registry import build_detector
from bids_uad.networks.counter_rng import SliceGenerator
from bids_uad.simulation.__main__ import main as simulate

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")
GIB = 2**30
NO_NETWORK = torch.nn.Module()


@pytest.fixture
def gpu(monkeypatch):
    """A GPU with 40 GiB free, on which a slice takes 1.5 GiB."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: GIB)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: int(2.5 * GIB))


def test_auto_precision_is_bf16_only_on_gpus_that_support_it(monkeypatch):
    monkeypatch.setattr(registry, "has_native_bf16", lambda: True)
    assert resolve_precision("auto", CPU) == "fp32"
    for has, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated, has=has: has)
        assert resolve_precision("auto", CUDA) == expected
        assert resolve_precision("auto", CUDA, published=True) == "fp32"
    assert resolve_precision("bf16", CPU, published=True) == "bf16"
    with pytest.raises(UnavailableError, match="bfloat16"):
        resolve_precision("bf16", CUDA)
    assert resolve_precision("auto", MPS) == "fp32"
    with pytest.raises(UnavailableError, match="--device mps"):
        resolve_precision("bf16", MPS)


def test_bf16_on_a_cpu_without_instructions_for_it_is_reported(monkeypatch, caplog):
    for native, device, precision in product((True, False), (CPU, CUDA), ("fp32", "bf16")):
        monkeypatch.setattr(registry, "has_native_bf16", lambda native=native: native)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated: True)
        caplog.clear()
        assert resolve_precision(precision, device) == precision
        slow = (native, device, precision) == (False, CPU, "bf16")
        assert ["--precision bf16: no bfloat16" in line for line in caplog.messages] == [True] * slow


@pytest.mark.parametrize("native", [True, False])
def test_auto_precision_on_a_cpu_depends_on_detector_and_cpu(monkeypatch, native):
    monkeypatch.setattr(registry, "has_native_bf16", lambda: native)
    assert resolve_precision("auto", CPU, "andi") == ("bf16" if native else "fp32")
    assert resolve_precision("auto", CPU, "itermask") == "fp32"
    assert resolve_precision("fp32", CPU, "andi") == "fp32"


def test_a_gpu_that_is_not_available_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == CPU
    with pytest.raises(UnavailableError, match="--gpus all"):
        resolve_device("cuda:1")
    for available in (False, True):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda available=available: available)
        if available:
            assert resolve_device("mps") == MPS
        else:
            with pytest.raises(UnavailableError, match=r"--device mps: .*; use --device cpu"):
                resolve_device("mps")
    assert resolve_device("auto") == CPU


def test_batch_size_follows_from_the_measured_memory_per_slice(gpu):
    run = Execution("bf16")
    assert run.first_batch(CUDA, NO_NETWORK) == 1
    assert run.next_batch(CUDA, 1) == int(0.7 * 40 / 1.5)
    assert run.next_batch(CUDA, 18) == 18


def test_batch_size_is_bounded(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: GIB + 1)
    assert Execution("bf16").next_batch(CUDA, 1) == execution.LARGEST_BATCH
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 60 * GIB)
    assert Execution("bf16").next_batch(CUDA, 1) == 1


def test_batch_size_in_fp32_or_given_does_not_depend_on_free_memory(gpu):
    for run in (Execution("fp32"), Execution("bf16", batch_size=3)):
        assert (
            run.next_batch(CUDA, run.first_batch(CUDA, NO_NETWORK)) == run.first_batch(CUDA, NO_NETWORK) > 1
        )
    assert Execution().first_batch(CPU, NO_NETWORK) == 8


@pytest.mark.parametrize(("preset", "expected"), [("lite", 8), ("default", 2)])
def test_batches_of_large_networks_are_small_on_a_cpu(preset, expected):
    with torch.device("meta"):
        detector = build_detector("andi", preset)
    assert Execution().first_batch(CPU, detector) == expected


def test_networks_run_in_bfloat16_but_features_and_scores_do_not():
    torch.manual_seed(0)
    exact = build_detector("fae", "lite").eval()
    brain = torch.ones(1, 1, 224, 224, dtype=torch.bool)
    slices = torch.rand(brain.shape, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = exact.score(slices, brain, [])
        calls = []
        for name, module in exact.named_modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(
                    lambda module, inputs, output, name=name: calls.append((name, output.dtype))
                )
        scores = Execution("bf16").prepare(exact).score(slices, brain, [])
    found = {(name.split(".")[0], dtype) for name, dtype in calls}
    assert found == {("autoencoder", torch.bfloat16), ("backbone", torch.float32)}
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, expected)
    torch.testing.assert_close(scores, expected, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("name", ["andi", "itermask", "riad"])
def test_prepared_networks_give_the_same_images(name):
    torch.manual_seed(0)
    plain = build_detector(name, "lite").eval()
    for layer in plain.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.normal_(layer.weight, std=0.1)
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(layer.running_mean)
            torch.nn.init.uniform_(layer.running_var, 0.5, 2)
            torch.nn.init.normal_(layer.weight)
    prepared = Execution().prepare(deepcopy(plain))
    for first, second in zip(plain.children(), prepared.children(), strict=True):
        images = torch.randn(2, first.enter.in_channels // 16, 160, 192)
        label = [torch.tensor([300.0])] * first.config.time_embedding
        with torch.inference_mode():
            expected, found = first(images, *label), second(images, *label)
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """Twenty slices through a simulated tumour in a T2w scan."""
    folder = tmp_path_factory.mktemp("simulated")
    simulate([str(folder), "--tumour", "1", "--modalities", "T2w", "--seed", "5", "--derivatives"])
    (scan,) = find_preprocessed(folder, "T2w")
    volume, brain, lesion = (
        np.asarray(nib.load(path).dataobj, dtype=np.float32) for path in (scan.image, scan.brain, scan.lesion)
    )
    centre = int(np.flatnonzero(lesion.any((0, 1))).mean())
    kept = np.zeros_like(brain, dtype=bool)
    kept[..., centre - 10 : centre + 10] = brain[..., centre - 10 : centre + 10] > 0
    return volume, kept


@pytest.mark.skipif(not registry.has_native_bf16(), reason="auto selects fp32 on this CPU")
@pytest.mark.parametrize("name", sorted(registry.CPU_BF16))
def test_masks_in_bf16_on_a_cpu_have_a_dice_of_0_99_with_fp32(name, simulated):
    (folder,) = PACKAGED.glob(f"{name}-T2w-*")
    bundle = load_bundle(folder)
    maps = []
    for precision in ("fp32", "bf16"):
        run = Execution(precision)
        detector = run.prepare(load_detector(bundle, "cpu"))
        maps.append(anomaly_map(detector, *simulated, key="scan", protocol=bundle.protocol, execution=run))
    first, second = (scores > bundle.default_threshold[1] for scores in maps)
    assert not np.array_equal(*maps)
    assert second.any()
    assert 2 * (first & second).sum() / (first.sum() + second.sum()) >= 0.99


def test_is_out_of_memory_recognises_errors_of_gpu_and_cpu():
    assert execution.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert execution.is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"))
    assert not execution.is_out_of_memory(RuntimeError("shape mismatch"))


@pytest.mark.slow
def test_compiled_networks_score_the_same():
    torch.manual_seed(0)
    detector = build_detector("riad", "lite").eval()
    torch.nn.init.normal_(detector.network.leave.weight, std=0.1)
    brain = torch.ones(2, 1, 160, 192, dtype=torch.bool)
    slices = torch.rand(brain.shape, generator=torch.Generator().manual_seed(1))

    def score():
        with torch.inference_mode():
            return detector.score(slices, brain, SliceGenerator(torch.arange(2)))

    plain = score()
    Execution(compiled=True).prepare(detector)
    torch.testing.assert_close(score(), plain, atol=1e-4, rtol=1e-3)
    assert detector.network._compiled_call_impl is not None
