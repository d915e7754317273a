"""Maps on a GPU against those on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bids_uad.engine.execution import Execution
from bids_uad.engine.inference import anomaly_map
from bids_uad.methods.registry import DETECTORS
from bids_uad.networks.counter_rng import SliceGenerator
from tests.methods.pseudo_trained import phantom, pseudo_trained

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("name", DETECTORS)
def test_maps_in_fp32_equal_those_on_the_cpu(name):
    execution = Execution("fp32")
    detector = execution.prepare(pseudo_trained(name))
    volume, brain = phantom(70, 76)
    on_cpu = anomaly_map(detector, volume, brain, key="a", execution=execution)
    on_gpu = anomaly_map(detector.to("cuda"), volume, brain, key="a", execution=execution)
    difference = np.abs(on_gpu - on_cpu)[brain] / on_cpu.max()
    # IterMask compares with thresholds, so that rounding can change the round in which a pixel is removed.
    assert np.quantile(difference, 0.99 if name == "itermask" else 1.0) < 1e-3


@pytest.mark.parametrize("name", DETECTORS)
def test_masks_in_bf16_have_a_dice_above_0_9_with_fp32(name):
    volume, brain = phantom(70, 76)
    maps = []
    for precision in ("fp32", "bf16"):
        execution = Execution(precision)
        detector = execution.prepare(pseudo_trained(name).to("cuda"))
        maps.append(anomaly_map(detector, volume, brain, key="a", execution=execution))
    threshold = np.quantile(maps[0][brain], 0.9)
    exact, half = (scores > threshold for scores in maps)
    assert 2 * (exact & half).sum() / (exact.sum() + half.sum()) > 0.9


def test_random_numbers_equal_those_on_the_cpu():
    on_cpu, on_gpu = (
        SliceGenerator.of_slices("a", 0, [3, 4], torch.device(device)) for device in ("cpu", "cuda")
    )
    assert torch.equal(on_cpu.uniform(7, 100), on_gpu.uniform(7, 100).cpu())
    torch.testing.assert_close(on_cpu.normal(7, 100), on_gpu.normal(7, 100).cpu())
