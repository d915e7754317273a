"""Masks, frequency condition and iterations of IterMask against literal loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_opening

from bids_uad.methods import itermask
from bids_uad.methods.base import Batch
from bids_uad.methods.itermask import (
    IterMask,
    IterMaskHyper,
    clustered_squares,
    frequency_condition,
    worst_pixels,
)
from bids_uad.networks.counter_rng import SliceGenerator
from tests.methods.tiny import TINY_NETWORK

TINY = IterMaskHyper(
    network=replace(TINY_NETWORK, size=32, time_embedding=False, norm="batch"),
    radius=28.0,
)


def ellipse(count, size=240):
    axes = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    centre = size / 2
    return (
        (((axes[0] - centre) / (0.36 * size)) ** 2 + ((axes[1] - centre) / (0.28 * size)) ** 2 <= 1)
        .expand(count, 1, size, size)
        .clone()
    )


@pytest.fixture
def slices():
    brain = ellipse(3, 32)
    return torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(9)) * brain, brain


def generator():
    return SliceGenerator(torch.arange(3))


def test_masks_cover_the_same_fraction_as_the_published_masks():
    """Published code: median 15 %, quartiles 6 and 29 %, maximum 52 % of an elliptic brain."""
    brain = ellipse(300)
    masks = clustered_squares(brain, torch.Generator().manual_seed(0))
    assert not (masks & ~brain).any()
    share = masks.flatten(1).sum(1) / brain.flatten(1).sum(1)
    quartiles = np.quantile(share, [0.25, 0.5, 0.75, 1.0])
    assert quartiles[0] == pytest.approx(0.06, abs=0.03)
    assert quartiles[1] == pytest.approx(0.15, abs=0.04)
    assert quartiles[2] == pytest.approx(0.29, abs=0.05)
    assert quartiles[3] < 0.6


def test_squares_are_drawn_from_a_gaussian_density():
    """Same random numbers; density and squares in NumPy, one image and one square at a time."""
    height, width = 48, 40
    brain = torch.zeros(6, 1, height, width, dtype=torch.bool)
    brain[:, :, 4:44, 6:36] = True
    masks = clustered_squares(brain, torch.Generator().manual_seed(5))

    generator = torch.Generator().manual_seed(5)
    narrow = (torch.randint(0, 3, (6,), generator=generator) == 2).numpy()
    assert 0 < narrow.sum() < 6
    c11, c22 = ((0.3 + 9.7 * torch.rand(6, generator=generator)).double().numpy() for _ in range(2))
    sign = torch.randint(0, 2, (6,), generator=generator).numpy() * 2 - 1
    extent = np.sqrt(c11 * c22)
    c12 = sign * 0.99 * extent * torch.rand(6, generator=generator).double().numpy()
    inside = brain.flatten(1).float()
    centres = torch.multinomial(inside, 1, generator=generator)[:, 0].numpy()
    density = np.zeros((6, height, width))
    for k, centre in enumerate(centres):
        offsets = np.moveaxis(np.mgrid[:height, :width], 0, -1) - divmod(centre, width)
        offsets = offsets * (0.4 if narrow[k] else 0.1)
        precision = np.linalg.inv([[c11[k], c12[k]], [c12[k], c22[k]]])
        density[k] = np.exp(-0.5 * np.einsum("hwi,ij,hwj->hw", offsets, precision, offsets))
    weights = torch.from_numpy(density).flatten(1).float() * inside
    expected = np.zeros((6, height, width), dtype=bool)
    ranges = ((np.where(narrow, 5, 100) * extent, np.where(narrow, 20, 200) * extent), (5, 10), (3, 10))
    for side, (low, high) in zip((4, 8, 16), ranges, strict=True):
        drawn = torch.rand(6, generator=generator).double().numpy()
        counts = np.floor(low + (high - low) * drawn).astype(int)
        most = max(1, counts.max())
        rows, columns = (
            torch.multinomial(weights, most, replacement=True, generator=generator).numpy() for _ in range(2)
        )
        for k in range(6):
            for row, column in zip(
                rows[k, : counts[k]] // width, columns[k, : counts[k]] % width, strict=True
            ):
                expected[k, row : row + side, column : column + side] = True
    np.testing.assert_array_equal(masks[:, 0].numpy(), expected & brain[:, 0].numpy())


def test_masks_consist_of_squares():
    brain = torch.ones(20, 1, 64, 64, dtype=torch.bool)
    for mask in clustered_squares(brain, torch.Generator().manual_seed(1))[:, 0, :-16, :-16].numpy():
        inner = mask[8:-8, 8:-8]
        assert (binary_opening(mask, np.ones((4, 4)))[8:-8, 8:-8] == inner).all()


def test_masks_of_an_empty_slice_are_empty():
    brain = torch.zeros(2, 1, 32, 32, dtype=torch.bool)
    assert not clustered_squares(brain, torch.Generator().manual_seed(0)).any()


def literal_condition(image):
    """Image of 32 x 32 pixels whose frequencies in the open disc of radius 4 have magnitude one."""
    spectrum = np.fft.fftshift(np.fft.fft2(image.numpy()), axes=(-2, -1))
    rows, columns = np.mgrid[-16:16, -16:16]
    literal = np.where(np.hypot(rows, columns) < 4, np.exp(1j * np.angle(spectrum)), spectrum)
    return torch.from_numpy(np.fft.ifft2(np.fft.ifftshift(literal, axes=(-2, -1))).real)


def test_frequency_condition_keeps_phase_and_sets_low_magnitudes_to_one(slices):
    image = slices[0].double()
    found = frequency_condition(image, 28.0)  # 4 cycles per 32 pixels
    np.testing.assert_allclose(found, literal_condition(image), atol=1e-9)
    magnitude = np.abs(np.fft.fft2(found.numpy()))[..., 0, 1:5]
    np.testing.assert_allclose(magnitude[..., :3], 1)
    assert (np.abs(magnitude[..., 3] - 1) > 0.05).all()


def test_worst_pixels_have_the_largest_errors_of_each_slice(slices):
    errors, brain = slices
    for _ in range(5):
        marked = worst_pixels(errors, brain, 0.6)
        for error, inside, found in zip(errors, brain, marked, strict=True):
            assert int(found.sum()) == -(-3 * int(inside.sum()) // 5)  # three fifths, rounded up
            assert error[found].min() > error[inside & ~found].max()
        brain[:, 0].masked_fill_(brain[:, 0].cumsum(1).cumsum(2) == 1, False)


def test_threshold_is_exceeded_by_a_fifth_of_the_masked_pixels(slices, monkeypatch):
    mask = slices[1].clone()
    mask[..., :16, :] = False
    monkeypatch.setattr(itermask, "clustered_squares", lambda brain, generator: mask)
    detector = IterMask(TINY).eval()
    detector.fit_threshold(iter([Batch(*slices)]), torch.Generator().manual_seed(3))
    errors = (6 * slices[0] - 3).square()[mask]  # an untrained network gives zero
    assert float((errors > detector.threshold).float().mean()) == pytest.approx(0.2, abs=0.005)


def literal_rounds(detector, x, brain, drawn, whole_brain):
    """Published loop for one slice."""
    image = 6 * x - 3
    condition = literal_condition(image).float()
    first = (image - detector.first(condition)) ** 2
    ordered = first[brain].sort(descending=True).values
    n = len(ordered)
    mask = brain & (first >= ordered[-(-3 * n // 5) - 1]) if n else brain
    scores, rounds = torch.minimum(first, detector.threshold), 0
    # A mask that is compared with an empty one does not shrink.
    shrinks = n > 0 and 1 - int(mask.sum()) / n >= detector.hyper.min_shrinkage
    if whole_brain and not shrinks:
        return torch.where(brain, image**2, 0), rounds
    while True:
        noise = drawn.normal(rounds, *image.shape[1:])
        filled = detector.filler(torch.cat([image * ~mask + noise * mask, condition], 1))
        error = (image - torch.where(mask, filled, image)) ** 2
        scores = torch.where(mask, error, scores)
        new = (error > detector.threshold) & brain
        shrinkage = float((mask.sum() - new.sum()) / mask.sum())
        rounds, mask = rounds + 1, new
        if not shrinkage >= detector.hyper.min_shrinkage:
            break
    return torch.where(brain, (image - filled) ** 2 if whole_brain else scores, 0), rounds


@pytest.mark.parametrize("whole_brain", [True, False])
def test_scores_equal_the_literal_loop_slice_by_slice(slices, whole_brain):
    torch.manual_seed(1)
    detector = IterMask(replace(TINY, whole_brain=whole_brain, min_shrinkage=0.02)).eval()
    for network in (detector.first, detector.filler):
        torch.nn.init.normal_(network.leave.weight, std=0.4)
    detector.threshold.fill_(0.8)
    x, brain = (torch.cat([part, part]) for part in slices)
    # No brain, two pixels, which both are in the first mask, and three, of which two are.
    for k, pixels in enumerate((0, 2, 3), start=3):
        brain[k].view(-1)[brain[k].flatten().nonzero()[pixels:]] = False
    x *= brain
    drawn = SliceGenerator(torch.arange(6))
    with torch.no_grad():
        ours = detector.score(x, brain, drawn)
        found = [
            literal_rounds(detector, x[k : k + 1], brain[k : k + 1], drawn[k : k + 1], whole_brain)
            for k in range(6)
        ]
    rounds = [number for _, number in found]
    assert max(rounds[:3]) > 2
    assert len(set(rounds[:3])) > 1
    if whole_brain:
        assert rounds[3:5] == [0, 0]
        assert rounds[5] > 0
    for k, (expected, _) in enumerate(found):
        torch.testing.assert_close(ours[k : k + 1], expected, rtol=1e-3, atol=1e-4)


def test_score_of_an_empty_slice_ends(slices):
    detector = IterMask(TINY).eval()
    empty = torch.zeros(3, 1, 32, 32)
    assert detector.score(empty, empty > 0, generator()).abs().max() == 0


def test_losses_reach_their_networks(slices):
    detector = IterMask(TINY)
    for stage, network in zip(detector.stages(), (detector.first, detector.filler), strict=False):
        torch.nn.init.normal_(network.leave.weight, std=0.1)
        stage.loss(Batch(*slices), torch.Generator().manual_seed(0)).backward()
        assert network.enter.weight.grad.abs().sum() > 0
