"""Shapes, fields and deformations of volumes: SciPy and formulas as references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from bids_uad.methods.pls.volumes import (
    Box,
    bounding_box,
    draw_voxels,
    ellipsoid,
    erode_in_plane,
    expand_shape,
    gaussian_smooth,
    normal_field,
    warp,
)
from tests.networks.conftest import seeded

SHAPE = (30, 41, 36)
MIDDLE = torch.tensor([(size - 1) / 2 for size in SHAPE])


def smooth_image(shape=SHAPE, sigma=3.0):
    return ndimage.gaussian_filter(np.random.default_rng(0).normal(size=shape), sigma).astype(np.float32)


def warped(image, labels=None, angles=(0, 0, 0), zoom=(1, 1, 1), shift=(0, 0, 0), pushes=(), **options):
    labels = torch.zeros(image.shape, dtype=torch.uint8) if labels is None else labels
    arguments = {"roughness": 0.0, "flip": False, "generator": seeded()} | options
    return warp(image, labels, angles, zoom, shift, pushes, **arguments)


def test_bounding_box_equals_scipys_with_a_margin():
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[4, 10:20, 30] = mask[9, 12, 7] = True
    (found,) = ndimage.find_objects(mask.numpy().astype(int))
    assert bounding_box(mask, 0) == found
    assert bounding_box(mask, 6) == (slice(0, 16), slice(4, 26), slice(1, 36))
    assert bounding_box(mask & False, 3) == Box.whole(mask)


def test_draw_voxels_draws_all_voxels_of_a_mask_equally_often():
    mask = torch.zeros(4, 5, 6, dtype=torch.bool)
    mask[1, 2, 3] = mask[3, 4, 5] = mask[0, 0, 1] = mask[2, 1, 0] = True
    drawn = draw_voxels(mask, 4000, seeded()).long()
    places, counts = drawn.unique(dim=0, return_counts=True)
    assert torch.equal(places, mask.nonzero())
    assert (counts - 1000).abs().max() < 5 * math.sqrt(4000 * 0.25 * 0.75)
    assert draw_voxels(mask, 0, seeded()).shape == draw_voxels(mask & False, 3, seeded()).shape == (0, 3)


@pytest.mark.parametrize("shape", [(60, 70, 80), (9, 40, 40)])
@pytest.mark.parametrize("spacing", [4.0, 14.0])
def test_normal_field_has_a_mean_of_0_and_a_standard_deviation_of_1(shape, spacing):
    fields = torch.stack([normal_field(shape, spacing, seeded(seed)) for seed in range(25)])
    assert fields.shape[1:] == shape
    # The number of independent values is that of the grid points.
    independent = 25 * math.prod(size / spacing + 1 for size in shape)
    assert abs(fields.mean()) < 6 / math.sqrt(independent)
    assert float(fields.std()) == pytest.approx(1, abs=0.1 + 3 / math.sqrt(independent))


def test_normal_field_is_linear_between_grid_points():
    field = normal_field((20, 30, 10), 10.0, seeded())
    drawn = torch.randn((3, 4, 2), generator=seeded()).numpy()
    steps = np.array([2 / 19, 3 / 29, 1 / 9])
    places = np.indices(field.shape) * steps[:, None, None, None]
    expected = ndimage.map_coordinates(drawn * 1.5**1.5, places, order=1, mode="nearest")
    np.testing.assert_allclose(field, expected, atol=1e-5)


@pytest.mark.parametrize("sigma", [0.4, 1.3, 6.0])
def test_gaussian_smooth_equals_scipys_filter_normalised_within_the_volume(sigma):
    volume = np.random.default_rng(1).random((12, 17, 9))
    options = {"sigma": sigma, "mode": "constant", "truncate": 9.0}
    expected = ndimage.gaussian_filter(volume, **options)
    expected /= ndimage.gaussian_filter(np.ones(volume.shape), **options)
    found = gaussian_smooth(torch.from_numpy(volume), sigma)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_gaussian_smooth_below_a_fifth_of_a_voxel_returns_the_volume():
    volume = torch.rand(SHAPE)
    assert gaussian_smooth(volume, 0.19) is volume


@pytest.mark.parametrize("pixels", [0, 1, 2, 5])
def test_erode_in_plane_equals_scipys_erosion_of_each_slice(pixels):
    mask = ndimage.gaussian_filter(np.random.default_rng(2).normal(size=SHAPE), 3) > -0.05
    found = erode_in_plane(torch.from_numpy(mask), pixels)
    square = np.ones((1, 2 * pixels + 1, 2 * pixels + 1))
    np.testing.assert_array_equal(found, ndimage.binary_erosion(mask, square, border_value=1))


@pytest.mark.parametrize("radius", [3.0, 9.0])
def test_ellipsoid_without_roughness_has_the_volume_of_the_formula(radius):
    ratios = []
    for seed in range(5):
        box, mask = ellipsoid((60, 60, 60), torch.tensor([29.3, 31.0, 28.7]), radius, 0.0, seeded(seed))
        assert float(mask.sum()) == pytest.approx(4 / 3 * math.pi * radius**3, rel=0.05)
        whole = torch.zeros(60, 60, 60)
        whole[box] = mask
        assert ndimage.center_of_mass(whole.numpy()) == pytest.approx((29.3, 31.0, 28.7), abs=0.1)
        # The second moments are proportional to the squares of the semi-axes.
        offsets = np.argwhere(whole.numpy() > 0.5) - [29.3, 31.0, 28.7]
        smallest, _, largest = np.sqrt(np.linalg.eigvalsh(offsets.T @ offsets))
        ratios.append(largest / smallest)
    assert 1.2 < max(ratios) < 1.1 * math.exp(2 * 0.35)


def test_roughness_moves_the_surface_of_an_ellipsoid():
    """By 0.45 times the radius: three times the mean distance is the fraction of the volume that differs."""
    differences, volumes = [], []
    for seed in range(12):
        smooth, rough = (
            ellipsoid((70, 70, 70), torch.tensor([35.0] * 3), 12.0, roughness, seeded(seed))[1]
            for roughness in (1e-9, 0.4)
        )
        size = [min(sizes) for sizes in zip(smooth.shape, rough.shape, strict=True)]
        trimmed = []
        for mask in (smooth, rough):
            cut = [(have - keep) // 2 for have, keep in zip(mask.shape, size, strict=True)]
            trimmed.append(mask[tuple(slice(c, c + keep) for c, keep in zip(cut, size, strict=True))])
        differences.append(float((trimmed[0] - trimmed[1]).abs().sum() / smooth.sum()))
        volumes.append(float(rough.sum() / smooth.sum()))
    mean_distance = math.sqrt(2 / math.pi) * 0.45 * 0.4
    assert np.mean(differences) == pytest.approx(3 * mean_distance, rel=0.35)
    assert np.mean(volumes) == pytest.approx(1, abs=0.35)


def test_ellipsoid_at_the_border_is_cut():
    box, mask = ellipsoid(SHAPE, torch.tensor([0.0, 20.0, 18.0]), 6.0, 0.0, seeded())
    assert mask.shape == torch.zeros(SHAPE)[box].shape
    assert float(mask.sum()) == pytest.approx(4 / 3 * math.pi * 6**3 * (0.5 + 0.5 / 8), rel=0.1)


@pytest.mark.parametrize(("radius", "scale"), [(8.0, 0.86), (12.0, 1.29), (3.0, 0.6), (40.0, 1.6)])
def test_expand_shape_scales_to_the_volume_of_a_sphere_within_limits(radius, scale):
    """A bar of 3,360 voxels has the volume of a sphere with a radius of 9.3 voxels."""
    bar = torch.ones(20, 14, 12, dtype=torch.bool)
    centre = torch.tensor([40.0, 41.5, 39.0])
    for seed in range(4):
        box, mask = expand_shape((80, 80, 80), centre, bar, radius, seeded(seed))
        assert float(mask.sum()) == pytest.approx(3360 * scale**3, rel=0.05)
        whole = torch.zeros(80, 80, 80)
        whole[box] = mask
        assert ndimage.center_of_mass(whole.numpy()) == pytest.approx(centre.tolist(), abs=0.1)


def test_expand_shape_assigns_the_axes_of_slices():
    """A bar along the front-back axis lies along columns, up to 20 degrees or so."""
    bar = torch.zeros(5, 31, 7, dtype=torch.bool)
    bar[1:4, :, 2:5] = True
    for seed in range(4):
        _, mask = expand_shape((60, 60, 60), torch.tensor([30.0] * 3), bar, 4.1, seeded(seed))
        extent = np.ptp(np.argwhere(mask.numpy() > 0.5), axis=0)
        assert extent.argmax() == 2


def test_expand_shape_keeps_a_plate_of_one_voxel_thin():
    plate = torch.ones(21, 23, 1, dtype=torch.bool)
    _, mask = expand_shape((60, 60, 60), torch.tensor([30.0] * 3), plate, 4.87, seeded())
    assert float(mask.sum()) == pytest.approx(21 * 23, rel=0.1)


def test_warp_without_changes_returns_copies():
    image = torch.from_numpy(smooth_image())
    labels = (image > 0).to(torch.uint8) * 3
    moved, classes = warped(image, labels)
    torch.testing.assert_close(moved, image, atol=1e-5, rtol=0)
    assert torch.equal(classes, labels)


def test_warp_flips_the_rows():
    image = torch.from_numpy(smooth_image())
    moved, _ = warped(image, flip=True)
    torch.testing.assert_close(moved, image.flip(1), atol=1e-5, rtol=0)


def rotation(axis, angle):
    first, second = (other for other in range(3) if other != axis)
    matrix = np.eye(3)
    matrix[first, first] = matrix[second, second] = np.cos(angle)
    matrix[first, second], matrix[second, first] = -np.sin(angle), np.sin(angle)
    return matrix


def test_warp_by_rotation_zoom_and_shift_equals_scipys_interpolation():
    image = smooth_image()
    angles, zoom, shift = (0.1, -0.07, 0.05), (1.1, 0.93, 1.04), (1.5, -2.25, 0.75)
    matrix = rotation(0, angles[0]) @ rotation(1, angles[1]) @ rotation(2, angles[2])
    places = np.indices(SHAPE)
    middle = MIDDLE.numpy()[:, None, None, None]
    offset = places - middle - np.array(shift)[:, None, None, None]
    source = np.tensordot(np.diag(1 / np.array(zoom)) @ matrix, offset, 1) + middle
    labels = (image > 0).astype(np.uint8) * 2
    moved, classes = warped(torch.from_numpy(image), torch.from_numpy(labels), angles, zoom, shift)
    inner = np.all([(part >= 0) & (part <= size - 1) for part, size in zip(source, SHAPE, strict=True)], 0)
    assert inner.mean() > 0.6
    expected = ndimage.map_coordinates(image, source, order=1)
    np.testing.assert_allclose(moved.numpy()[inner], expected[inner], atol=1e-4)
    nearest = ndimage.map_coordinates(labels, source, order=0)
    assert (classes.numpy() != nearest)[inner].mean() < 1e-3  # halves are rounded differently


def displacement(pushes, size=65, **options):
    """Return where the voxels of a warped volume come from, minus where they are."""
    places = np.indices((size, size, size), dtype=np.float32)
    sources = [warped(torch.from_numpy(part), pushes=pushes, **options)[0].numpy() for part in places]
    return np.stack(sources) - places, places


@pytest.mark.parametrize("amount", [6.0, -4.0])
def test_warp_pushes_tissue_away_from_a_point_by_the_formula(amount):
    centre, radius = torch.tensor([30.0, 33.0, 35.0]), 16.0
    moved, places = displacement([(centre, radius, amount)])
    away = places - centre.numpy()[:, None, None, None]
    ratio = np.sqrt((away**2).sum(0)) / radius
    expected = -amount * away / radius * np.exp((1 - ratio**2) / 2)
    inner = np.s_[:, 4:-4, 4:-4, 4:-4]
    # The displacement is interpolated linearly between every eighth voxel.
    assert np.abs(moved - expected)[inner].max() < 0.15 * abs(amount)
    # Tissue at the radius is displaced by the whole amount, radially; the centre stays.
    length = (moved * away).sum(0) / np.maximum(ratio * radius, 1)
    shell = np.abs(ratio - 1) < 0.05
    assert length[shell].mean() == pytest.approx(-amount, rel=0.08)
    assert np.abs(moved[:, 30, 33, 35]).max() < 0.5
    assert np.abs(length[inner[1:]]).max() < 1.01 * abs(amount)


def test_warp_pushes_from_the_given_point_of_the_result():
    """Whatever position and size of the brain, so that a lesion at this point displaces its surroundings."""
    centre = torch.tensor([42.0, 51.0, 50.0])
    options = {"angles": (0.1, -0.1, 0.1), "zoom": (1.1, 0.9, 1.05), "shift": (4.0, -4.0, 3.0), "flip": True}
    with_push, _ = displacement([(centre, 18.0, 6.0)], 97, **options)
    without, places = displacement([], 97, **options)
    change = np.sqrt(((with_push - without) ** 2).sum(0))
    ratio = np.sqrt(((places - centre.numpy()[:, None, None, None]) ** 2).sum(0)) / 18.0
    assert change[42, 51, 50] < 0.5
    rings = [change[np.abs(ratio - middle) < 0.1].mean() for middle in (0.3, 0.6, 1.0, 1.4, 1.7)]
    assert np.argmax(rings) == 2
    assert rings[2] == pytest.approx(6.0, rel=0.15)


def test_warp_by_a_rough_field_moves_by_its_standard_deviation_and_smoothly():
    moved, _ = displacement([], roughness=2.0)
    inner = moved[:, 5:-5, 5:-5, 5:-5]
    assert 0.5 < inner.std() < 2.5
    assert np.abs(np.diff(inner, axis=1)).max() < 0.6
