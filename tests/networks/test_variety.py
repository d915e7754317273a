"""The ways in which healthy brains and scanners vary."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt, gaussian_filter, map_coordinates
from scipy.stats import kstest

from bids_uad.methods.pls.training_samples import (
    bend_contrast,
    darken_nuclei,
    darken_sinuses,
    shade,
    smooth_field,
    swell_middle,
)
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


def test_the_middle_swells_as_the_formula_says():
    """Random numbers are drawn again in their order; SciPy interpolates at the positions of the formula."""
    rows, columns = np.mgrid[:96, :112].astype(float)
    whole = ((rows - 46) / 40) ** 2 + ((columns - 60) / 45) ** 2 < 1
    brain = torch.from_numpy(whole).expand(12, 1, 96, 112)
    image = gaussian_filter(np.random.default_rng(0).random((96, 112)), 2) + 1
    moved, inside = swell_middle(torch.from_numpy(image).float().expand(12, 1, 96, 112), brain, seeded(), 0.7)

    generator = seeded()
    jitter = 6 * torch.randn((2, 12), generator=generator).numpy()
    amount = (-0.3 + 0.9 * torch.rand(12, generator=generator)).numpy()
    amount = np.where(torch.rand(12, generator=generator).numpy() < 0.7, amount, 0)
    spread = 12 + 28 * torch.rand(12, generator=generator).numpy()
    assert 0 < (amount == 0).sum() < 12
    for k in range(12):
        down, right = rows - rows[whole].mean() - jitter[0, k], columns - columns[whole].mean() - jitter[1, k]
        scale = 1 - amount[k] * np.exp(-(down**2 + right**2) / (2 * spread[k] ** 2))
        places = np.stack([rows + (scale - 1) * down, columns + (scale - 1) * right])
        expected = map_coordinates(image, places, order=1)
        # Positions beyond the border are mixed with 0 by torch and not by SciPy.
        inner = ((places >= 0) & (places <= [[[95]], [[111]]])).all(axis=0)
        np.testing.assert_allclose(moved[k, 0].numpy()[inner], expected[inner], atol=1e-3)
        nearest = map_coordinates(whole.astype(np.uint8), places, order=0) > 0
        assert (inside[k, 0].numpy() != nearest).mean() < 5e-4  # halves are rounded either way


def test_contrast_bends_by_three_sines_that_keep_the_order():
    ramp = torch.linspace(0, 1, 500, dtype=torch.float64)
    bent = bend_contrast(ramp.float().expand(1000, 1, 1, 500), seeded())[:, 0, 0].double().numpy()
    assert (np.diff(bent) > 0).all()
    sines = np.sin(np.pi * np.outer([1, 2, 3], ramp))
    heights, *_ = np.linalg.lstsq(sines.T, (bent - ramp.numpy()).T, rcond=None)
    np.testing.assert_allclose(heights.T @ sines, bent - ramp.numpy(), atol=1e-6)
    for wave, drawn in enumerate(heights, start=1):
        assert kstest(drawn * wave / 0.08, "uniform", args=(-1, 2)).pvalue > 1e-3


def test_smooth_fields_interpolate_standard_normal_numbers():
    """With the corners aligned, every twentieth pixel is one of the numbers drawn."""
    field = smooth_field(50, 4, (81, 61), seeded())
    drawn = torch.randn((50, 1, 5, 5), generator=seeded())
    torch.testing.assert_close(field[..., ::20, ::15], drawn, atol=1e-5, rtol=0)
    steps = field.diff(dim=-1).abs().amax((1, 2, 3))
    assert (steps < 2 * drawn.diff(dim=-1).abs().amax((1, 2, 3)) / 15).all()


@pytest.mark.parametrize(("strength", "bumps"), [(0.12, 2), (0.06, 8)])
def test_shading_is_the_exponential_of_a_smooth_field(strength, bumps):
    size = 10 * bumps + 1
    image = torch.full((20, 1, size, size), 0.3)
    image[:, :, :10] = 0
    shaded = shade(image, seeded(), strength, bumps)
    generator = seeded()
    field = torch.randn((20, 1, bumps + 1, bumps + 1), generator=generator)
    amount = strength * torch.rand((20, 1, 1, 1), generator=generator)
    expected = (image[..., ::10, ::10] * (amount * field).exp()).clamp(0, 1)
    torch.testing.assert_close(shaded[..., ::10, ::10], expected, atol=1e-6, rtol=1e-5)
    assert shaded[:, :, :10].abs().max() == 0
