"""Cell sets, inpainting and map of RIAD."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.signal import convolve2d

from bids_uad.methods.base import Batch
from bids_uad.methods.riad import RIAD, RIADHyper, cell_sets
from bids_uad.networks.counter_rng import SliceGenerator
from tests.methods.tiny import TINY_NETWORK

TINY = RIADHyper(
    network=replace(TINY_NETWORK, time_embedding=False),
    cell_sizes=(8, 16),
    n_sets=3,
)


@pytest.fixture
def slices():
    brain = torch.zeros(3, 1, 64, 64, dtype=torch.bool)
    brain[:, :, 10:50, 6:55] = True
    return torch.rand(3, 1, 64, 64, generator=torch.Generator().manual_seed(9)) * brain, brain


def detector_of(hyper=TINY):
    torch.manual_seed(0)
    detector = RIAD(hyper).eval()
    torch.nn.init.normal_(detector.network.leave.weight, std=0.1)
    return detector


def generator():
    return SliceGenerator(torch.arange(3))


def test_cell_sets_are_disjoint_and_equal_in_size():
    uniform = torch.rand(4, 8, 8, generator=torch.Generator().manual_seed(0))
    part_of = cell_sets(uniform, 5, 28)
    assert part_of.shape == (4, 1, 224, 224)
    cells = part_of[:, 0, ::28, ::28]
    assert torch.equal(cells.repeat_interleave(28, 1).repeat_interleave(28, 2), part_of[:, 0])
    for image in cells:
        assert np.ptp(np.bincount(image.flatten().numpy(), minlength=5)) <= 1
    assert not torch.equal(cells[0], cells[1])


@pytest.mark.parametrize(
    ("edge", "sizes"),
    [(28, [157] * 4 + [156]), (14, [40] * 4 + [36]), (8, [13] * 4 + [12]), (7, [10] * 4 + [9])],
)
def test_cell_sets_have_the_published_sizes(edge, sizes):
    """The published code fills a permutation of the cells up to a multiple of five and splits it in five."""
    uniform = torch.rand(2, edge, edge, generator=torch.Generator().manual_seed(0))
    for image in cell_sets(uniform, 5, 1)[:, 0]:
        assert np.bincount(image.flatten().numpy()).tolist() == sizes


def test_cells_at_the_border_are_smaller():
    detector = detector_of()
    x = torch.rand(3, 1, 40, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        scores = detector.score(x, torch.ones_like(x, dtype=torch.bool), generator())
    assert scores.shape == x.shape
    assert scores[..., -4:].abs().max() > 0


def test_inpaint_fills_a_cell_independently_of_its_content(slices):
    detector = detector_of()
    x, _ = slices
    part_of = cell_sets(torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(1)), 3, 8)
    hidden = part_of == 0
    with torch.no_grad():
        filled = detector.inpaint(x, part_of)
        altered = detector.inpaint(torch.where(hidden, 1 - x, x), part_of)
        literal = detector.network(x * ~hidden)
    torch.testing.assert_close(filled[hidden], altered[hidden], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(filled[hidden], literal[hidden], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(filled[~hidden], altered[~hidden])


def gms(a, b):
    """Gradient magnitude similarity of two images by Prewitt filters, without padding."""
    across = np.outer([1, 1, 1], [1, 0, -1]) / 3
    a, b = (np.hypot(convolve2d(x, across, "valid"), convolve2d(x, across.T, "valid")) for x in (a, b))
    return (2 * a * b + 0.0026) / (a**2 + b**2 + 0.0026)


def test_map_equals_the_published_map_up_to_a_constant(slices):
    """Sum over cell sizes of (1 - S) / 4 / cells, with S the sum over four scales; then less its minimum."""
    detector = detector_of(replace(TINY, weight_by_cells=True))
    x, brain = slices
    literal = torch.zeros_like(x)
    with torch.no_grad():
        ours = detector.score(x, brain, generator())
        for k, image in enumerate(x):
            for cell in (8, 16):
                edge = 64 // cell
                order = generator().uniform(cell, edge, edge)[k].flatten().argsort().numpy()
                filled = torch.zeros_like(image)
                for part in np.split(order, [len(order) // 3 + 1, 2 * (len(order) // 3 + 1)]):
                    masked = np.isin(np.arange(edge**2), part).reshape(edge, edge)
                    hidden = torch.from_numpy(np.kron(masked, np.ones((cell, cell), dtype=bool)))[None]
                    filled[hidden] = detector.network((image * ~hidden)[None])[0][hidden]
                for scale in range(4):
                    pair = (F.avg_pool2d(part, 2**scale)[0].double().numpy() for part in (filled, image))
                    similarity = torch.from_numpy(gms(*pair))[None, None]
                    enlarged = F.interpolate(similarity, size=(64, 64), mode="bilinear")[0]
                    literal[k] += (0.25 - enlarged) / 4 / edge**2
    # S is 4 where all gradients are equal, which gives the minimum of the map.
    least = sum((1 - 4) / 4 / (64 // cell) ** 2 for cell in (8, 16))
    torch.testing.assert_close(ours[brain], (literal - least)[brain], atol=1e-6, rtol=1e-4)
    assert ours[~brain].abs().max() == 0


def test_map_does_not_depend_on_the_batch(slices):
    detector = detector_of()
    x, brain = slices
    with torch.no_grad():
        together = detector.score(x, brain, generator())
        alone = detector.score(x[1:2], brain[1:2], generator()[1:2])
    torch.testing.assert_close(alone, together[1:2], rtol=1e-4, atol=1e-6)


def test_perfect_inpainting_has_loss_and_score_zero(slices):
    detector = detector_of()
    x, brain = slices
    detector.inpaint = lambda slices, part_of: slices.clone()
    assert float(detector.loss(Batch(x, brain), torch.Generator().manual_seed(0))) == pytest.approx(
        0, abs=1e-5
    )
    assert float(detector.score(x, brain, generator()).max()) == pytest.approx(0, abs=1e-6)


def test_loss_reaches_the_network(slices):
    detector = detector_of()
    detector.loss(Batch(*slices), torch.Generator().manual_seed(0)).backward()
    assert detector.network.enter.weight.grad.abs().sum() > 0
