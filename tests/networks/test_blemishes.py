"""What blemishes change and what they leave."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt

from bids_uad.methods.pls.training_samples import (
    BlemishConfig,
    paint_blemishes,
    ventricles,
    white_matter,
)
from tests.networks.conftest import seeded

BRIGHT = torch.tensor(True)


class TestBlemishes:
    def test_stay_inside_the_brain_and_repeat(self, slices):
        images, brain = slices
        painted, _ = paint_blemishes(images, brain, BRIGHT, BlemishConfig(), seeded())
        assert torch.equal(painted[~brain], images[~brain])
        assert painted.min() >= 0
        assert painted.max() <= 1
        assert not torch.equal(painted, images)
        again, _ = paint_blemishes(images, brain, BRIGHT, BlemishConfig(), seeded())
        assert torch.equal(painted, again)

    def test_none_by_chance_none_painted(self, slices):
        images, brain = slices
        config = BlemishConfig(chance=(0.0, 0.0, 0.0))
        painted, small = paint_blemishes(images, brain, BRIGHT, config, seeded())
        assert torch.equal(painted, images)
        assert not small.any()

    @pytest.mark.parametrize(("bright", "sign"), [(True, 1), (False, -1)])
    def test_wet_ones_look_like_fluid(self, slices, bright, sign):
        images, brain = slices
        config = BlemishConfig(chance=(1.0, 0.0, 0.0), wet=1.0, texture=0.0)
        painted, _ = paint_blemishes(images, brain, torch.tensor(bright), config, seeded())
        change = (painted - images)[(painted - images).abs() > 0.05]
        assert len(change) > 500
        assert (change.sign() == sign).float().mean() > 0.95

    def test_small_ones_are_small_and_scattered(self, slices):
        images, brain = slices
        config = BlemishConfig(chance=(0.0, 0.0, 1.0), small=(4.0, 4.1), opacity=(1.0, 1.0))
        painted, _ = paint_blemishes(images, brain, BRIGHT, config, seeded())
        changed = ((painted - images).abs() > 0.02).flatten(1).sum(1)
        # Four blobs of 1.6 times the side, softened by a pixel.
        assert 0 < changed.max() < config.most_small * (1.6 * 4 + 6) ** 2

    def test_small_ones_are_told_from_large_ones(self, slices):
        images, brain = slices
        config = BlemishConfig(chance=(0.0, 0.0, 1.0))
        painted, small = paint_blemishes(images, brain, BRIGHT, config, seeded())
        assert torch.equal(small, painted != images)
        config = BlemishConfig(chance=(1.0, 1.0, 0.0))
        painted, small = paint_blemishes(images, brain, BRIGHT, config, seeded())
        assert not torch.equal(painted, images)
        assert not small.any()

    @pytest.mark.parametrize("bright", [True, False])
    def test_small_ones_can_be_kept_to_white_matter(self, slices, bright):
        _, brain = slices
        left = torch.arange(112) < (52 if bright else 60)  # white matter is the smaller half
        images = torch.where(left, 0.3, 0.6) * brain
        white = brain & (left if bright else ~left)
        fluid = torch.tensor(bright)
        assert torch.equal(white_matter(images, brain, fluid), white)
        config = BlemishConfig(chance=(0.0, 0.0, 1.0), small=(3.0, 3.1), blur=0.0, in_white=1.0)
        _, small = paint_blemishes(images, brain, fluid, config, seeded())
        assert small.sum() > 50
        assert (small & white).sum() > 0.9 * small.sum()


@pytest.fixture(params=[True, False], ids=["T2w", "T1w"])
def heads(request):
    """Brains of a ventricle, white matter, grey matter and fluid, from within; whether fluid is bright."""
    y, x = np.ogrid[:128, :128]
    radius = torch.from_numpy(np.hypot(y - 64, x - 64)).float()
    bright = radius.new_full(radius.shape, 0.3)
    for limit, value in ((34, 0.5), (50, 0.95)):
        bright[radius > limit] = value
    ventricle = radius < 12
    bright[ventricle] = 0.95
    brain = (radius < 56).expand(8, 1, 128, 128).clone()
    images = (bright if request.param else 1 - bright).expand(brain.shape) * brain
    return images, brain, ventricle, torch.tensor(request.param)


def test_ventricles_are_the_fluid_within(heads):
    images, brain, ventricle, bright_fluid = heads
    assert torch.equal(ventricles(images, brain, bright_fluid), ventricle.expand(brain.shape))


def test_a_lining_lies_along_the_ventricles(heads):
    images, brain, ventricle, bright_fluid = heads
    config = BlemishConfig(
        chance=(0.0, 0.0, 0.0),
        lining=1.0,
        thickness=(2.0, 4.0),
        opacity=(0.5, 1.0),
        wet=1.0,
        texture=0.0,
        blur=0.0,
    )
    painted, small = paint_blemishes(images, brain, bright_fluid, config, seeded())
    change = (painted - images) * (1 if bright_fluid else -1)
    changed = change.abs() > 0.02
    assert changed.flatten(1).any(1).all()
    assert (change[changed] > 0).float().mean() > 0.95  # towards fluid
    assert not (changed & ventricle).any()
    assert torch.equal(small, painted != images)
    away = torch.from_numpy(distance_transform_edt(~ventricle.numpy())).expand(changed.shape)[changed]
    # Where the field is 3 standard deviations low, the edge is 2.5 of the blur's away from the wall.
    assert away.min() < 1.5
    assert away.max() < 2.5 * 4
    assert 1 < away.mean() < 4
    none, _ = paint_blemishes(images, brain, bright_fluid, replace(config, lining=0.0), seeded())
    assert torch.equal(none, images)
