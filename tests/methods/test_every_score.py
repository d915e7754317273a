"""What holds for the maps of every detector: they depend on subject, slice and step only.

What they should be is held by `test_published` and by the tests of each detector.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.literal import LITERAL
from bids_uad.engine.execution import Execution
from bids_uad.engine.inference import anomaly_map, default_field
from bids_uad.methods.registry import DETECTORS
from bids_uad.networks.counter_rng import SliceGenerator
from bids_uad.space import to_slices
from tests.methods.pseudo_trained import phantom, pseudo_trained

of_slices = SliceGenerator.of_slices
# A score is the difference of two numbers near 1, in single precision; which sums are taken first depends on
# the batch and on where its tensors lie in memory.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
FIRST, LAST = 70, 75
CPU = torch.device("cpu")


def shown(detector) -> tuple[Tensor, Tensor]:
    """Inputs of the slices of the phantom and their brain masks, cut as by the engine."""
    field = default_field(detector.field_of_view)
    volume, brain = (torch.from_numpy(to_slices(part).copy()) for part in phantom(FIRST, LAST))
    inputs = detector.inputs(volume.clamp(0, 1), range(FIRST, LAST), field.rows, field.columns)
    return inputs.contiguous(), field.cut(brain[FIRST:LAST, None]).contiguous()


@pytest.mark.parametrize("name", DETECTORS)
def test_maps_do_not_depend_on_batch_size_and_order(name):
    detector = pseudo_trained(name)
    maps = [
        torch.from_numpy(
            anomaly_map(detector, *phantom(FIRST, LAST), key="a", execution=Execution(batch_size=size))
        )
        for size in (1, 3, 155)
    ]
    assert maps[0].max() > 0
    for other in maps[1:]:
        torch.testing.assert_close(other, maps[0], **CLOSE)

    slices, brain = shown(detector)
    order = torch.randperm(len(slices), generator=torch.Generator().manual_seed(0)).tolist()
    numbers = range(FIRST, LAST)
    with torch.inference_mode():
        straight = detector.score(slices, brain, of_slices("a", 0, numbers, CPU))
        shuffled = detector.score(
            slices[order], brain[order], of_slices("a", 0, [numbers[k] for k in order], CPU)
        )
    torch.testing.assert_close(shuffled, straight[order], **CLOSE)


@pytest.mark.parametrize("name", DETECTORS)
def test_maps_in_fp32_repeat_to_the_bit(name):
    first, again = (
        anomaly_map(Execution("fp32").prepare(pseudo_trained(name)), *phantom(FIRST, FIRST + 2), key="a")
        for _ in range(2)
    )
    assert first.tobytes() == again.tobytes()


PUBLISHED_RULES = {
    "riad": {"weight_by_cells": True, "cell_sizes": (28, 32), "n_sets": 4},
    "itermask": {"whole_brain": True},
    "disyre": {"foreground_weighting": True, "window": (96, 96), "stride": 48, "labels": (99, 24)},
    "patchcore": {"squared_distance": True, "score_outside_brain": True, "neighbourhood": 5},
}
"""Options of preset `paper` that the others do not have, for small networks."""


@pytest.mark.parametrize(("name", "changes"), [*((name, {}) for name in LITERAL), *PUBLISHED_RULES.items()])
def test_scores_equal_the_literal_implementation(name, changes):
    """One slice, one step and one window at a time, as in the published scripts."""
    detector = pseudo_trained(name)
    detector.hyper = replace(detector.hyper, **changes)
    slices, brain = (part[:4] for part in shown(detector))
    # The third slice has no brain, the last one a single pixel.
    brain[2] = False
    brain[3].view(-1)[brain[3].flatten().nonzero()[1:]] = False
    slices = slices * brain
    with torch.inference_mode():
        ours = detector.score(slices, brain, of_slices("a", 0, range(4), CPU))
        for k in range(4):
            one = slice(k, k + 1)
            literal = LITERAL[name](detector, slices[one], brain[one], of_slices("a", 0, [k], CPU))
            expected = torch.where(brain[one], literal, 0)
            near = 3e-4 * float(expected.max())
            torch.testing.assert_close(ours[one], expected, rtol=1e-3, atol=near)


class _LargestTensor(TorchDispatchMode):
    """Record the size of the largest tensor that an operation returns."""

    largest = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        output = function(*arguments, **(options or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return output


def largest_tensor(name: str, count: int, **changes: object) -> int:
    detector = pseudo_trained(name)
    detector.hyper = replace(detector.hyper, **changes)
    slices, brain = (part[:count] for part in shown(detector))
    with torch.no_grad(), _LargestTensor() as mode:
        detector.score(slices, brain, of_slices("a", 0, range(count), CPU))
    return mode.largest


@pytest.mark.parametrize("name", DETECTORS)
def test_memory_grows_at_most_linearly_with_the_batch(name):
    assert largest_tensor(name, 4) <= 2 * largest_tensor(name, 2)


def test_memory_does_not_depend_on_noise_levels_or_labels():
    assert largest_tensor("andi", 2, stride=20) == largest_tensor("andi", 2, stride=50)
    many = largest_tensor("disyre", 2, labels=tuple(range(0, 100, 2)))
    assert many <= largest_tensor("disyre", 2, labels=tuple(range(0, 64, 2)))
