"""Training samples of PLS: augmentations of healthy slices, and synthetic lesions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.ndimage import (
    binary_dilation,
    binary_erosion,
    distance_transform_edt,
    gaussian_filter,
    label,
    map_coordinates,
)
from scipy.optimize import brentq
from scipy.stats import kstest

from bids_uad.methods.pls.training_samples import (
    SyntheticLesionConfig,
    add_bias_field,
    add_flow_voids,
    add_rim_artifacts,
    add_strip_remnants,
    cut_edge,
    darken_nuclei,
    erode_edge,
    paint_lesions,
    scale_ventricles,
    smooth_random_field,
    vary_contrast,
    ventricle_mask,
    white_matter_mask,
)
from tests.networks.conftest import seeded

BRIGHT = torch.tensor(True)


def test_add_rim_artifacts_changes_only_the_outermost_two_pixels(slices):
    images, brain = slices
    changed_images = add_rim_artifacts(images, brain, seeded(), 1.0)
    inner = torch.from_numpy(binary_erosion(brain[0, 0].numpy(), np.ones((5, 5))))
    changed = changed_images != images
    assert changed.any()
    assert not (changed & (inner | ~brain)).any()
    assert 0 <= changed_images.min() <= changed_images.max() <= 1
    assert torch.equal(add_rim_artifacts(images, brain, seeded(), 0.0), images)


def test_erode_edge_equals_scipys_erosion(slices):
    _, brain = slices
    shrunk = erode_edge(brain, seeded(3))
    whole = brain[0, 0].numpy()
    expected = [whole, *(binary_erosion(whole, np.ones((3, 3)), iterations=n) for n in (1, 2))]
    depths = [[np.array_equal(one[0].numpy(), mask) for mask in expected] for one in shrunk]
    assert all(sum(matches) == 1 for matches in depths)
    assert np.any(depths, axis=0).all()


def test_add_strip_remnants_adds_pieces_that_touch_the_brain_from_outside(slices):
    images, brain = slices
    changed_images, whole = add_strip_remnants(images, brain, seeded(), 1.0)
    pieces = whole & ~brain
    assert (whole & brain).equal(brain)
    assert torch.equal(changed_images[~pieces], images[~pieces])
    assert 0 <= changed_images.min() <= changed_images.max() <= 1
    assert pieces.flatten(1).any(1).all()
    # At most two half discs with a diameter of 50 pixels.
    assert pieces.sum((1, 2, 3)).max() < 2 * np.pi * 25**2
    for one, piece in zip(brain[:, 0].numpy(), pieces[:, 0].numpy(), strict=True):
        assert (piece & binary_dilation(one, np.ones((3, 3)))).any()
    again, _ = add_strip_remnants(images, brain, seeded(), 1.0)
    assert torch.equal(again, changed_images)


def test_add_strip_remnants_has_the_given_probability(slices):
    images, brain = (x[:1].expand(400, -1, -1, -1) for x in slices)
    _, whole = add_strip_remnants(images, brain, seeded(), 0.3)
    often = (whole & ~brain).flatten(1).any(1).float().mean()
    assert 0.4 < often < 0.6  # 1 - 0.7^2 = 0.51; a small piece may lie inside the brain
    same, none = add_strip_remnants(images, brain, seeded(), 0.0)
    assert same is images
    assert none is brain


def test_cut_edge_removes_a_cap_of_uniform_height(slices):
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
        if cap.sum() > 50:  # enough pixels to estimate the direction of the cut
            far = np.argwhere(cap).mean(0) - (48, 56)
            far /= np.linalg.norm(far)
            assert (np.argwhere(cap) @ far).min() > (np.argwhere(rest) @ far).max() - 2
    often = (cut_edge(brain, seeded(), 0.25) != brain).flatten(1).any(1).float().mean()
    assert 0.15 < often < 0.35
    assert cut_edge(brain, seeded(), 0.0) is brain


def test_darken_nuclei_darkens_pairs_of_spots_if_fluid_is_bright(slices):
    images, brain = slices
    dark = darken_nuclei(images, brain, BRIGHT, seeded(), 1.0)
    changed = dark != images
    assert changed.any()
    assert (dark <= images).all()
    assert (dark >= 0.3 * images - 1e-6).all()
    assert not (changed & ~brain).any()
    # The midline of the disc is row 48; each spot has a counterpart on the other side.
    upper, lower = changed[..., :48, :].sum((1, 2, 3)), changed[..., 49:, :].sum((1, 2, 3))
    assert ((upper > 0) == (lower > 0)).all()
    assert changed.float().mean() < 0.2
    for untouched in (
        darken_nuclei(images, brain, torch.tensor(False), seeded(), 1.0),
        darken_nuclei(images, brain, BRIGHT, seeded(), 0.0),
    ):
        assert torch.equal(untouched, images)


def test_add_flow_voids_darkens_spots_of_the_edge_if_fluid_is_bright(slices):
    images, brain = slices
    dark = add_flow_voids(images, brain, BRIGHT, seeded(), 1.0)
    assert (dark <= images).all()
    assert not ((dark != images) & ~brain).any()
    changed = (dark < 0.8 * images) & brain
    # A spot is centred on the edge, with a half-width of 0.8 times at most 24 pixels and a soft border.
    within = torch.from_numpy(distance_transform_edt(brain[0, 0].numpy())).expand(changed.shape)
    assert within[changed].max() < 0.8 * 24 + 4
    assert within[changed].mean() < 8
    # The disc's middle row is 48, and its edge is 40 pixels away.
    assert changed[..., 38:58, :].flatten(1).any(1).all()
    for untouched in (
        add_flow_voids(images, brain, torch.tensor(False), seeded(), 1.0),
        add_flow_voids(images, brain, BRIGHT, seeded(), 0.0),
    ):
        assert torch.equal(untouched, images)


def test_scale_ventricles_does_not_fold(slices):
    _, brain = slices
    ramp = torch.arange(112.0).expand(8, 1, 96, 112)
    moved, inside = scale_ventricles(ramp, brain, seeded(), 1.0)
    ramp, moved = ramp[..., 8:-8], moved[..., 8:-8]  # samples from outside the image are 0
    assert (moved.diff(dim=-1) > -1e-4).all()
    shift = (moved - ramp).abs()
    assert shift.amax((1, 2, 3)).min() > 0.3
    assert shift.max() < 0.6 * 40 * np.exp(-0.5)  # maximum of the formula, at r = s
    assert not torch.equal(inside, brain)
    still, same = scale_ventricles(brain.float(), brain, seeded(), 0.0)
    torch.testing.assert_close(still, brain.float(), atol=1e-4, rtol=0)
    assert torch.equal(same, brain)


def test_scale_ventricles_follows_its_formula():
    """Positions from the same random numbers, interpolated by SciPy."""
    rows, columns = np.mgrid[:96, :112].astype(float)
    whole = ((rows - 46) / 40) ** 2 + ((columns - 60) / 45) ** 2 < 1
    brain = torch.from_numpy(whole).expand(12, 1, 96, 112)
    image = gaussian_filter(np.random.default_rng(0).random((96, 112)), 2) + 1
    moved, inside = scale_ventricles(
        torch.from_numpy(image).float().expand(12, 1, 96, 112), brain, seeded(), 0.7
    )

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
        # Outside the border, torch interpolates with 0 and SciPy does not.
        inner = ((places >= 0) & (places <= [[[95]], [[111]]])).all(axis=0)
        np.testing.assert_allclose(moved[k, 0].numpy()[inner], expected[inner], atol=1e-3)
        nearest = map_coordinates(whole.astype(np.uint8), places, order=0) > 0
        assert (inside[k, 0].numpy() != nearest).mean() < 5e-4  # halves are rounded differently


def test_vary_contrast_adds_three_sines_and_is_increasing():
    ramp = torch.linspace(0, 1, 500, dtype=torch.float64)
    bent = vary_contrast(ramp.float().expand(1000, 1, 1, 500), seeded())[:, 0, 0].double().numpy()
    assert (np.diff(bent) > 0).all()
    sines = np.sin(np.pi * np.outer([1, 2, 3], ramp))
    heights, *_ = np.linalg.lstsq(sines.T, (bent - ramp.numpy()).T, rcond=None)
    np.testing.assert_allclose(heights.T @ sines, bent - ramp.numpy(), atol=1e-6)
    for wave, drawn in enumerate(heights, start=1):
        assert kstest(drawn * wave / 0.08, "uniform", args=(-1, 2)).pvalue > 1e-3


def test_smooth_random_field_interpolates_standard_normal_numbers():
    """With aligned corners, the nodes of the grid have the drawn values."""
    field = smooth_random_field(50, 4, (81, 61), seeded())
    drawn = torch.randn((50, 1, 5, 5), generator=seeded())
    torch.testing.assert_close(field[..., ::20, ::15], drawn, atol=1e-5, rtol=0)
    steps = field.diff(dim=-1).abs().amax((1, 2, 3))
    assert (steps < 2 * drawn.diff(dim=-1).abs().amax((1, 2, 3)) / 15).all()


@pytest.mark.parametrize(("strength", "periods"), [(0.12, 2), (0.06, 8)])
def test_add_bias_field_multiplies_by_the_exponential_of_a_smooth_field(strength, periods):
    size = 10 * periods + 1
    image = torch.full((20, 1, size, size), 0.3)
    image[:, :, :10] = 0
    shaded = add_bias_field(image, seeded(), strength, periods)
    generator = seeded()
    field = torch.randn((20, 1, periods + 1, periods + 1), generator=generator)
    amount = strength * torch.rand((20, 1, 1, 1), generator=generator)
    expected = (image[..., ::10, ::10] * (amount * field).exp()).clamp(0, 1)
    torch.testing.assert_close(shaded[..., ::10, ::10], expected, atol=1e-6, rtol=1e-5)
    assert shaded[:, :, :10].abs().max() == 0


class TestPaintLesions:
    def test_lesions_stay_inside_the_brain_and_repeat_for_a_seed(self, slices):
        images, brain = slices
        painted, _ = paint_lesions(images, brain, BRIGHT, SyntheticLesionConfig(), seeded())
        assert torch.equal(painted[~brain], images[~brain])
        assert painted.min() >= 0
        assert painted.max() <= 1
        assert not torch.equal(painted, images)
        again, _ = paint_lesions(images, brain, BRIGHT, SyntheticLesionConfig(), seeded())
        assert torch.equal(painted, again)

    def test_zero_probabilities_leave_slices_unchanged(self, slices):
        images, brain = slices
        config = SyntheticLesionConfig(probabilities=(0.0, 0.0, 0.0))
        painted, small = paint_lesions(images, brain, BRIGHT, config, seeded())
        assert torch.equal(painted, images)
        assert not small.any()

    @pytest.mark.parametrize(("bright", "sign"), [(True, 1), (False, -1)])
    def test_fluid_like_lesions_change_towards_fluid(self, slices, bright, sign):
        images, brain = slices
        config = SyntheticLesionConfig(
            probabilities=(1.0, 0.0, 0.0), fluid_like_prob=1.0, foreign_texture_prob=0.0
        )
        painted, _ = paint_lesions(images, brain, torch.tensor(bright), config, seeded())
        change = (painted - images)[(painted - images).abs() > 0.05]
        assert len(change) > 500
        assert (change.sign() == sign).float().mean() > 0.95

    def test_small_lesions_have_at_most_their_size(self, slices):
        images, brain = slices
        config = SyntheticLesionConfig(
            probabilities=(0.0, 0.0, 1.0), small_size=(4.0, 4.1), opacity=(1.0, 1.0)
        )
        painted, _ = paint_lesions(images, brain, BRIGHT, config, seeded())
        changed = ((painted - images).abs() > 0.02).flatten(1).sum(1)
        # Four blobs of 1.6 times the side, blurred by a pixel.
        assert 0 < changed.max() < config.max_small * (1.6 * 4 + 6) ** 2

    def test_small_lesions_are_reported_apart_from_large_ones(self, slices):
        images, brain = slices
        config = SyntheticLesionConfig(probabilities=(0.0, 0.0, 1.0))
        painted, small = paint_lesions(images, brain, BRIGHT, config, seeded())
        assert torch.equal(small, painted != images)
        config = SyntheticLesionConfig(probabilities=(1.0, 1.0, 0.0))
        painted, small = paint_lesions(images, brain, BRIGHT, config, seeded())
        assert not torch.equal(painted, images)
        assert not small.any()

    @pytest.mark.parametrize("bright", [True, False])
    def test_small_lesions_can_be_restricted_to_white_matter(self, slices, bright):
        _, brain = slices
        left = torch.arange(112) < (52 if bright else 60)  # white matter is the smaller half
        images = torch.where(left, 0.3, 0.6) * brain
        white = brain & (left if bright else ~left)
        fluid = torch.tensor(bright)
        assert torch.equal(white_matter_mask(images, brain, fluid), white)
        config = SyntheticLesionConfig(
            probabilities=(0.0, 0.0, 1.0), small_size=(3.0, 3.1), max_blur=0.0, white_matter_prob=1.0
        )
        _, small = paint_lesions(images, brain, fluid, config, seeded())
        assert small.sum() > 50
        assert (small & white).sum() > 0.9 * small.sum()


@pytest.fixture(params=[True, False], ids=["T2w", "T1w"])
def heads(request):
    """Discs of ventricle, white matter, grey matter and outer fluid, with and without bright fluid."""
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


def test_ventricle_mask_is_the_fluid_away_from_the_edge(heads):
    images, brain, ventricle, bright_fluid = heads
    assert torch.equal(ventricle_mask(images, brain, bright_fluid), ventricle.expand(brain.shape))


def test_periventricular_lesions_lie_along_the_ventricles(heads):
    images, brain, ventricle, bright_fluid = heads
    config = SyntheticLesionConfig(
        probabilities=(0.0, 0.0, 0.0),
        periventricular_prob=1.0,
        periventricular_thickness=(2.0, 4.0),
        opacity=(0.5, 1.0),
        fluid_like_prob=1.0,
        foreign_texture_prob=0.0,
        max_blur=0.0,
    )
    painted, small = paint_lesions(images, brain, bright_fluid, config, seeded())
    change = (painted - images) * (1 if bright_fluid else -1)
    changed = change.abs() > 0.02
    assert changed.flatten(1).any(1).all()
    assert (change[changed] > 0).float().mean() > 0.95  # towards fluid
    assert not (changed & ventricle).any()
    assert torch.equal(small, painted != images)
    away = torch.from_numpy(distance_transform_edt(~ventricle.numpy())).expand(changed.shape)[changed]
    # If the field is 3 SD low, the edge is 2.5 SD of the blur away from the wall.
    assert away.min() < 1.5
    assert away.max() < 2.5 * 4
    assert 1 < away.mean() < 4
    none, _ = paint_lesions(images, brain, bright_fluid, replace(config, periventricular_prob=0.0), seeded())
    assert torch.equal(none, images)
