"""What blemishes change and what they leave; the ways in which scanners vary."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_erosion, distance_transform_edt

from bids_uad.networks.blemishes import (
    BlemishConfig,
    bend_contrast,
    darken_nuclei,
    darken_sinuses,
    paint_blemishes,
    shade,
    shrink_rim,
    smooth_field,
    soil_rim,
    swell_middle,
    ventricles,
    white_matter,
)

BRIGHT = torch.tensor(True)


@pytest.fixture
def slices():
    """Eight grey discs, and the brain they are."""
    y, x = np.ogrid[:96, :112]
    disc = torch.from_numpy((y - 48) ** 2 + (x - 56) ** 2 < 40**2)
    brain = disc.expand(8, 1, 96, 112).clone()
    return torch.rand(
        brain.shape, generator=torch.Generator().manual_seed(5)
    ) * 0.1 * brain + 0.4 * brain, brain


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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


def test_only_the_rim_is_soiled(slices):
    images, brain = slices
    soiled = soil_rim(images, brain, seeded(), 1.0)
    inner = torch.from_numpy(binary_erosion(brain[0, 0].numpy(), np.ones((5, 5))))
    changed = soiled != images
    assert changed.any()
    assert not (changed & (inner | ~brain)).any()
    assert 0 <= soiled.min() <= soiled.max() <= 1
    assert torch.equal(soil_rim(images, brain, seeded(), 0.0), images)


def test_iron_darkens_pairs_of_spots_where_fluid_is_bright(slices):
    images, brain = slices
    dark = darken_nuclei(images, brain, BRIGHT, seeded(), 1.0)
    changed = dark != images
    assert changed.any()
    assert (dark <= images).all()
    assert (dark >= 0.3 * images - 1e-6).all()
    assert not (changed & ~brain).any()
    # The disc's middle row is 48; what is left of it has a counterpart on the right.
    upper, lower = changed[..., :48, :].sum((1, 2, 3)), changed[..., 49:, :].sum((1, 2, 3))
    assert ((upper > 0) == (lower > 0)).all()
    assert changed.float().mean() < 0.2
    for untouched in (
        darken_nuclei(images, brain, torch.tensor(False), seeded(), 1.0),
        darken_nuclei(images, brain, BRIGHT, seeded(), 0.0),
    ):
        assert torch.equal(untouched, images)


def test_sinuses_are_dark_spots_of_the_rim_where_fluid_is_bright(slices):
    images, brain = slices
    dark = darken_sinuses(images, brain, BRIGHT, seeded(), 1.0)
    assert (dark <= images).all()
    assert not ((dark != images) & ~brain).any()
    changed = (dark < 0.8 * images) & brain
    # A spot is centred on the rim; its half-width is 0.8 of its side of at most 24 pixels, and its edge soft.
    within = torch.from_numpy(distance_transform_edt(brain[0, 0].numpy())).expand(changed.shape)
    assert within[changed].max() < 0.8 * 24 + 4
    assert within[changed].mean() < 8
    # The disc's middle row is 48, and its rim 40 away from it.
    assert changed[..., 38:58, :].flatten(1).any(1).all()
    for untouched in (
        darken_sinuses(images, brain, torch.tensor(False), seeded(), 1.0),
        darken_sinuses(images, brain, BRIGHT, seeded(), 0.0),
    ):
        assert torch.equal(untouched, images)


def test_the_middle_swells_without_folds(slices):
    _, brain = slices
    ramp = torch.arange(112.0).expand(8, 1, 96, 112)
    moved, inside = swell_middle(ramp, brain, seeded(), 1.0)
    ramp, moved = ramp[..., 8:-8], moved[..., 8:-8]  # what comes from beyond the image is 0
    assert (moved.diff(dim=-1) > -1e-4).all()
    shift = (moved - ramp).abs()
    assert shift.amax((1, 2, 3)).min() > 0.3
    assert shift.max() < 0.6 * 40 * np.exp(-0.5)  # the formula's largest, one spread from the centre
    assert not torch.equal(inside, brain)
    still, same = swell_middle(brain.float(), brain, seeded(), 0.0)
    torch.testing.assert_close(still, brain.float(), atol=1e-4, rtol=0)
    assert torch.equal(same, brain)


def test_ventricles_grow_as_the_formula_says():
    """A disc in the middle: its edge at radius r comes from r (1 - a exp(-r^2 / 2 s^2))."""
    y, x = np.ogrid[:160, :192]
    brain = torch.from_numpy((y - 80) ** 2 + (x - 96) ** 2 < 70**2).expand(40, 1, 160, 192)
    ventricle = torch.from_numpy(((y - 80) ** 2 + (x - 96) ** 2 < 14**2).astype(np.float32))
    swollen, _ = swell_middle(ventricle.expand(40, 1, 160, 192), brain, seeded(), 1.0)
    growth = swollen.sum((1, 2, 3)) / ventricle.sum()
    assert 0.55 < growth.min() < 0.9
    # At most 1 / (1 - 0.6)^2, were the whole of it in the very middle.
    assert 2 < growth.max() < 6.25


def test_smooth_fields_have_unit_spread_and_few_bumps():
    field = smooth_field(200, 6, (48, 60), seeded())
    assert field.std() == pytest.approx(1, abs=0.35)
    assert field.diff(dim=-1).abs().mean() < 0.2 * field.abs().mean()


def test_the_rim_shrinks_as_in_scipy(slices):
    _, brain = slices
    shrunk = shrink_rim(brain, seeded(3))
    whole = brain[0, 0].numpy()
    expected = [whole, *(binary_erosion(whole, np.ones((3, 3)), iterations=n) for n in (1, 2))]
    depths = [[np.array_equal(one[0].numpy(), mask) for mask in expected] for one in shrunk]
    assert all(sum(matches) == 1 for matches in depths)
    assert np.any(depths, axis=0).all()


def test_contrast_bends_but_keeps_order_and_ends():
    ramp = torch.linspace(0, 1, 500).expand(50, 1, 1, 500)
    bent = bend_contrast(ramp, seeded())
    assert (bent.diff(dim=-1) > 0).all()
    assert bent[..., 0].abs().max() == 0
    torch.testing.assert_close(bent[..., -1], torch.ones(50, 1, 1), atol=1e-6, rtol=0)
    assert (bent - ramp).abs().amax() > 0.05


def test_shading_is_smooth_and_keeps_background(slices):
    images, brain = slices
    shaded = shade(images, seeded())
    assert shaded[~brain].abs().max() == 0
    ratio = torch.where(brain, shaded / images.clamp_min(1e-6), 1.0).log()
    assert 0.02 < ratio[brain].abs().mean() < 0.12
    inside = brain[..., 1:] & brain[..., :-1]
    assert ratio.diff(dim=-1)[inside].abs().max() < 0.05
