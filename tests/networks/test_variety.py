"""The ways in which healthy brains and scanners vary."""

from __future__ import annotations

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt

from bids_uad.networks.variety import bend_contrast, darken_nuclei, darken_sinuses, shade, swell_middle
from tests.networks.conftest import seeded

BRIGHT = torch.tensor(True)


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
