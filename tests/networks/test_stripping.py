"""What imperfect skull-stripping leaves on a brain and takes off it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.ndimage import binary_dilation, binary_erosion, label
from scipy.optimize import brentq
from scipy.stats import kstest

from bids_uad.methods.pls.training_samples import (
    cut_edge,
    leave_remnants,
    shrink_rim,
    soil_rim,
)
from tests.networks.conftest import seeded


def test_only_the_rim_is_soiled(slices):
    images, brain = slices
    soiled = soil_rim(images, brain, seeded(), 1.0)
    inner = torch.from_numpy(binary_erosion(brain[0, 0].numpy(), np.ones((5, 5))))
    changed = soiled != images
    assert changed.any()
    assert not (changed & (inner | ~brain)).any()
    assert 0 <= soiled.min() <= soiled.max() <= 1
    assert torch.equal(soil_rim(images, brain, seeded(), 0.0), images)


def test_the_rim_shrinks_as_in_scipy(slices):
    _, brain = slices
    shrunk = shrink_rim(brain, seeded(3))
    whole = brain[0, 0].numpy()
    expected = [whole, *(binary_erosion(whole, np.ones((3, 3)), iterations=n) for n in (1, 2))]
    depths = [[np.array_equal(one[0].numpy(), mask) for mask in expected] for one in shrunk]
    assert all(sum(matches) == 1 for matches in depths)
    assert np.any(depths, axis=0).all()


def test_remnants_lie_on_the_brain_from_outside(slices):
    images, brain = slices
    soiled, whole = leave_remnants(images, brain, seeded(), 1.0)
    pieces = whole & ~brain
    assert (whole & brain).equal(brain)
    assert torch.equal(soiled[~pieces], images[~pieces])
    assert 0 <= soiled.min() <= soiled.max() <= 1
    assert pieces.flatten(1).any(1).all()
    # Half of a disc of 50 pixels, twice, is the most.
    assert pieces.sum((1, 2, 3)).max() < 2 * np.pi * 25**2
    for one, piece in zip(brain[:, 0].numpy(), pieces[:, 0].numpy(), strict=True):
        assert (piece & binary_dilation(one, np.ones((3, 3)))).any()
    again, _ = leave_remnants(images, brain, seeded(), 1.0)
    assert torch.equal(again, soiled)


def test_remnants_come_as_often_as_asked_for(slices):
    images, brain = (x[:1].expand(400, -1, -1, -1) for x in slices)
    _, whole = leave_remnants(images, brain, seeded(), 0.3)
    often = (whole & ~brain).flatten(1).any(1).float().mean()
    assert 0.4 < often < 0.6  # 1 - 0.7^2 = 0.51, and a piece may be too small to leave the brain
    same, none = leave_remnants(images, brain, seeded(), 0.0)
    assert same is images
    assert none is brain


def test_a_straight_edge_is_cut_off(slices):
    _, brain = slices
    brain = brain[:1].expand(200, -1, -1, -1)
    left = cut_edge(brain, seeded(), 1.0)
    gone = brain & ~left
    assert not (left & ~brain).any()
    # Caps of a disc, as high as 0 to a third of its radius.
    share = (gone.sum((1, 2, 3)) / brain.sum((1, 2, 3))).numpy()

    def cap(height):
        return (np.arccos(1 - height) - (1 - height) * np.sqrt(2 * height - height**2)) / np.pi

    assert share.max() == pytest.approx(cap(1 / 3), abs=0.01)
    expected = quad(lambda height: 3 * cap(height), 0, 1 / 3)[0]
    assert share.mean() == pytest.approx(expected, abs=4 * share.std() / np.sqrt(200))
    heights = [brentq(lambda h, s=s: cap(h) - s, 0, 0.5) for s in share]
    assert kstest(heights, "uniform", args=(0, 1 / 3)).pvalue > 1e-3
    for cap, rest in zip(gone[:40, 0].numpy(), left[:40, 0].numpy(), strict=True):
        assert label(rest)[1] == 1
        if cap.sum() > 50:  # enough to tell the direction of the cut
            far = np.argwhere(cap).mean(0) - (48, 56)
            far /= np.linalg.norm(far)
            assert (np.argwhere(cap) @ far).min() > (np.argwhere(rest) @ far).max() - 2
    often = (cut_edge(brain, seeded(), 0.25) != brain).flatten(1).any(1).float().mean()
    assert 0.15 < often < 0.35
    assert cut_edge(brain, seeded(), 0.0) is brain
