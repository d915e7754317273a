"""Synthetic anomalies and augmentations against SciPy and literal values."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_closing, fourier_gaussian, gaussian_filter, label

from bids_uad.networks.synthetic_anomalies import (
    COMPONENTS,
    AnomalyConfig,
    AugmentationConfig,
    _boxes,
    cut_out,
    cut_windows,
    elastic_offsets,
    gaussian_blur,
    paint_anomalies,
    random_shapes,
    vary_intensity,
    window_shapes,
)


def test_gaussian_blur_equals_scipys():
    images = torch.rand(3, 1, 40, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.7, 2.0, 3.0])
    ours = gaussian_blur(images, sigma)
    for image, blurred, width in zip(images, ours, sigma, strict=True):
        expected = gaussian_filter(image[0].numpy(), float(width), mode="nearest", radius=9)
        np.testing.assert_allclose(blurred[0], expected, atol=1e-6)


def test_gaussian_blur_of_sigma_zero_returns_the_image():
    image = torch.rand(1, 1, 9, 9)
    torch.testing.assert_close(gaussian_blur(image, torch.zeros(1)), image)


@pytest.fixture
def healthy():
    """Sixteen two-tissue discs."""
    rows, columns = torch.meshgrid(torch.arange(96), torch.arange(96), indexing="ij")
    radius = ((rows - 48) ** 2 + (columns - 48) ** 2).sqrt()
    brain = (radius < 40)[None, None].expand(16, 1, 96, 96)
    image = torch.where(radius < 20, 0.7, 0.4)[None, None].expand(16, 1, 96, 96) * brain
    noise = torch.rand(image.shape, generator=torch.Generator().manual_seed(0)) * 0.05
    return (image + noise * brain), brain


def test_random_shapes_have_the_given_sizes():
    centres = torch.full((600, 2), 48.0)
    shapes = random_shapes(centres, 96, 96, AnomalyConfig(size=(10, 44)), torch.Generator().manual_seed(0))
    area = shapes.sum((1, 2, 3))
    assert set(shapes.unique().tolist()) == {0.0, 1.0}
    assert area.median() > 0.5 * 27**2 * 0.5
    assert area.max() <= (1.6 * 44) ** 2


def test_paint_anomalies_draws_several_shapes(healthy):
    images, brain = healthy
    codebook = torch.tensor([0.1, 0.3, 0.42, 0.6, 0.72])

    def parts(most: int) -> list[int]:
        config = AnomalyConfig(size=(5, 6), max_shapes=most, blur_probability=0.0)
        counts = []
        for seed in range(10):
            corrupted, _ = paint_anomalies(
                images, brain, codebook, config, torch.Generator().manual_seed(seed)
            )
            changed = ((corrupted - images).abs() > 1e-6)[:, 0].numpy()
            counts += [label(binary_closing(one, iterations=2))[1] for one in changed]
        return counts

    # Two shapes may touch, and the blobs of one shape may lie apart.
    assert np.mean(parts(1)) < 1.5
    assert 2 < np.mean(parts(4)) < 3.5


def test_paint_anomalies_stays_in_the_brain_and_returns_the_severity(healthy):
    images, brain = healthy
    codebook = torch.tensor([0.1, 0.3, 0.42, 0.6, 0.72])
    corrupted, severity = paint_anomalies(
        images, brain, codebook, AnomalyConfig(), torch.Generator().manual_seed(3)
    )
    change = (corrupted - images).abs()
    assert change[~brain].max() == 0
    assert corrupted.min() >= 0
    assert corrupted.max() <= 1
    assert ((severity >= 0) & (severity <= 1)).all()
    assert (change.flatten(1).amax(1) > 0).float().mean() > 0.8
    # Texture opacity and bias each change a pixel by at most their strength.
    assert (change.flatten(1).amax(1) <= 2 * severity + 1e-6).all()


def paint(images, brain, components):
    codebook = torch.tensor([0.1, 0.3, 0.42, 0.6, 0.72])
    config = AnomalyConfig(blur_probability=1.0)
    generator = torch.Generator().manual_seed(3)
    return paint_anomalies(images, brain, codebook, config, generator, components)


def test_paint_anomalies_without_a_component_keeps_the_others(healthy):
    images, brain = healthy
    whole, severity = paint(images, brain, COMPONENTS)
    texture, opacity = paint(images, brain, ("rectangle", "disc", "blobs", "texture", "blur"))
    bias, strength = paint(images, brain, ("rectangle", "disc", "blobs", "bias", "blur"))
    # The whole severity is the larger of the two, since what is left is drawn as before.
    assert torch.equal(severity >= opacity, torch.ones(len(images), dtype=torch.bool))
    assert (opacity < severity).any()
    # Texture mixes two images of a range: it leaves the values within. A bias does not.
    assert texture.max() <= images.max() + 1e-6
    assert bias.max() > images.max() + 0.1
    assert not torch.equal(whole, texture)
    torch.testing.assert_close(strength, (bias - images).abs().flatten(1).amax(1))


def test_paint_anomalies_without_soft_edges_or_shapes(healthy):
    images, brain = healthy
    sharp, _ = paint(images, brain, ("rectangle", "texture"))
    soft, _ = paint(images, brain, ("rectangle", "texture", "blur"))
    assert (sharp != images).sum() < (soft != images).sum()
    centres = torch.full((60, 2), 48.0)
    config = AnomalyConfig(size=(30, 30.001))
    for kind, area in (("rectangle", 900), ("disc", np.pi * 15**2)):
        shapes = random_shapes(centres, 96, 96, config, torch.Generator().manual_seed(0), (kind,))
        torch.testing.assert_close(shapes.sum((1, 2, 3)), torch.full((60,), float(area)), rtol=0.08, atol=0.0)


def test_paint_anomalies_repeats_for_a_seed(healthy):
    images, brain = healthy
    codebook = torch.linspace(0.1, 0.9, 5)
    first, again, other = (
        paint_anomalies(images, brain, codebook, AnomalyConfig(), torch.Generator().manual_seed(seed))[0]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_cut_windows_without_rotation_copies_pixels(healthy):
    images, brain = healthy
    config = AugmentationConfig(spatial=0.0, intensity=0.0)
    cut, region = cut_windows(images, brain, (96, 96), config, torch.Generator().manual_seed(0))
    for window, source in zip(cut, images, strict=True):
        flips = [source, source.flip(-1), source.flip(-2), source.flip((-1, -2))]
        assert any(torch.allclose(window, flipped, atol=1e-5) for flipped in flips)
    assert region.dtype == torch.bool


def test_cut_windows_without_shift_and_flip_are_centred(healthy):
    images, brain = (part[..., :80] for part in healthy)  # the disc is cut at one end
    config = AugmentationConfig(spatial=0.0, shift=0.0, flip_front_back=False)
    cut, _ = cut_windows(images, brain, (96, 80), config, torch.Generator().manual_seed(0))
    as_they_were = [torch.allclose(a, b, atol=1e-5) for a, b in zip(cut, images, strict=True)]
    mirrored = [torch.allclose(a, b.flip(-2), atol=1e-5) for a, b in zip(cut, images, strict=True)]
    assert all(a or b for a, b in zip(as_they_were, mirrored, strict=True))
    assert any(as_they_were)
    assert any(mirrored)


def test_cut_windows_transforms_labels_with_the_image(healthy):
    images, brain = healthy
    tissue = torch.where(images > 0.6, 2, 1) * brain
    config = AugmentationConfig(spatial=1.0)
    cut, classes = cut_windows(images, tissue, (80, 80), config, torch.Generator().manual_seed(0))
    assert classes.dtype == tissue.dtype
    inner = cut[classes == 2]
    assert inner.mean() > 0.65
    assert cut[classes == 1].mean() < 0.5


PUBLISHED = AugmentationConfig(spatial=0.0, intensity=0.0, published=True)


def test_published_windows_lie_in_the_bounding_box_of_the_brain(healthy):
    images, brain = (part.repeat(12, 1, 1, 1) for part in healthy)
    cut, region = cut_windows(images, brain, (72, 75), PUBLISHED, torch.Generator().manual_seed(0))
    box = images[:16, 0, 9:88, 9:88].numpy()  # of a disc with a radius below 40 around (48, 48)
    windows = np.lib.stride_tricks.sliding_window_view(box, (72, 75), (1, 2))
    starts = set()
    for number, window in enumerate(cut[:, 0].numpy()):
        variants = (window, window[::-1], window[:, ::-1], window[::-1, ::-1])
        found = [np.argwhere((windows[number % 16] == each).all((2, 3))) for each in variants]
        (where,) = np.concatenate(found)
        starts.add(tuple(where.tolist()))
    # The last position is left out, as by the published code.
    assert starts == {(row, column) for row in range(79 - 72) for column in range(79 - 75)}
    assert torch.equal(region, cut > 0)
    whole, _ = cut_windows(images, brain, (95, 97), PUBLISHED, torch.Generator().manual_seed(0))
    assert _boxes(whole > 0)[0][0].eq(8).all()  # centred
    assert _boxes(whole > 0)[1][0].eq(9).all()


def test_published_transforms_are_drawn_separately(healthy):
    images, brain = (part.repeat(12, 1, 1, 1) for part in healthy)
    config = replace(PUBLISHED, spatial=0.1)
    cut, region = cut_windows(images, brain, (80, 80), config, torch.Generator().manual_seed(0))
    copied = torch.isin(cut.flatten(1), images.unique()).all(1)
    assert copied.float().mean().item() == pytest.approx(0.9**3, abs=0.08)
    area = region[~copied].sum((1, 2, 3)) / brain[0].sum()
    assert area.min() < 0.9
    assert area.max() > 0.99
    assert cut.min() < 0  # cubic interpolation overshoots at the edge


def test_elastic_offsets_equal_a_filtered_field_of_scipy():
    size, generator = (40, 64), torch.Generator().manual_seed(3)
    ours = elastic_offsets(3, size, generator).numpy()
    generator.manual_seed(3)
    scales = 0.25 * torch.rand((3, 1, 1, 1), generator=generator).flatten().numpy()
    noise = 2 * torch.rand((3, 2, *size), generator=generator).double().numpy() - 1
    for offsets, scale, fields in zip(ours, scales, noise, strict=True):
        sigma = scale * np.array(size)
        for offset, deviation, field in zip(offsets, sigma, fields, strict=True):
            smooth = np.fft.ifft2(fourier_gaussian(np.fft.fft2(field), sigma)).real
            largest = np.abs(offset).max()
            assert deviation / 8 <= largest <= deviation / 2
            np.testing.assert_allclose(offset / largest, smooth / np.abs(smooth).max(), atol=1e-4)


def test_published_intensities_reach_the_background(healthy):
    images, brain = (part.repeat(20, 1, 1, 1) for part in healthy)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(vary_intensity(images, brain, PUBLISHED, generator), images)
    varied = vary_intensity(images, brain, replace(PUBLISHED, intensity=0.15), generator)
    background = (varied * ~brain).flatten(1).amax(1) > 0
    # Noise, or blur with half the probability of noise.
    assert background.float().mean().item() == pytest.approx(1 - 0.85 * 0.925, abs=0.06)
    # Brightness, noise and blur change the largest intensity, gamma keeps it.
    kept = (varied.amax((1, 2, 3)) - images.amax((1, 2, 3))).abs() < 1e-6
    assert kept.float().mean().item() == pytest.approx(0.85**2 * 0.925, abs=0.08)
    assert ((varied - images).abs().flatten(1).amax(1) > 0.01)[kept].float().mean().item() == pytest.approx(
        1 - 0.85**2, abs=0.1
    )


def test_published_shapes_have_the_published_sizes_and_places():
    generator = torch.Generator().manual_seed(0)
    sizes = np.arange(10, 45) // 2  # half a side, or a radius
    points = np.linspace(0, 64, 64)
    disc = [((points[:, None] - 32) ** 2 + (points - 32) ** 2 <= radius**2).sum() for radius in sizes]
    for kind, area in (("rectangle", (2 * sizes).mean() ** 2), ("disc", np.mean(disc))):
        shapes = window_shapes(1000, AnomalyConfig(published=True), generator, (kind,))
        assert shapes.shape == (1000, 1, 64, 64)
        assert shapes.sum((1, 2, 3)).mean().item() == pytest.approx(area, rel=0.07)
        covered = shapes.sum((0, 1)) > 0
        assert covered[4:-4, 4:-4].all() == (kind == "rectangle")
        assert covered[:9].any() == (kind == "rectangle")


def test_published_anomalies_lie_in_a_window_inside_the_image(healthy):
    images, brain = healthy
    codebook = torch.tensor([0.1, 0.3, 0.42, 0.6, 0.72])
    config = AnomalyConfig(matching="mean", published=True)
    generator = torch.Generator().manual_seed(0)
    corrupted, severity = paint_anomalies(images, brain, codebook, config, generator)
    change = (corrupted - images).abs()
    assert change[images == 0].max() == 0
    assert (change.flatten(1).amax(1) <= 2 * severity + 1e-6).all()
    for first, length in _boxes(change > 0):
        assert (length <= 64).all()
        assert (first >= 0).all()
        assert (first + length <= 96).all()
    # A patch of the same intensity as the slice changes nothing, once means are matched.
    flat = torch.full((8, 1, 96, 96), 0.5)
    same, strength = paint_anomalies(flat, flat > 0, codebook, config, generator, ("disc", "texture"))
    torch.testing.assert_close(same, flat)
    # A patch of two intensities keeps the mean of what it replaces.
    halves = flat.clone()
    halves[..., 48:] = 0.3
    mixed, strength = paint_anomalies(halves, halves > 0, codebook, config, generator, ("disc", "texture"))
    changed = (mixed - halves).abs().sum((1, 2, 3)) > 1e-3
    assert changed.any()
    torch.testing.assert_close(mixed.sum((1, 2, 3)), halves.sum((1, 2, 3)), rtol=1e-5, atol=0)
    assert (strength[changed] > 0).all()


def test_cut_out_pads_with_zeros():
    images = torch.arange(1, 31).view(2, 1, 3, 5)
    cut = cut_out(images, torch.tensor([-1, 2]), torch.tensor([3, -2]), (2, 4))
    assert cut[:, 0].tolist() == [[[0, 0, 0, 0], [4, 5, 0, 0]], [[0, 0, 26, 27], [0, 0, 0, 0]]]


def test_vary_intensity_keeps_the_background(healthy):
    images, brain = healthy
    varied = vary_intensity(
        images, brain, AugmentationConfig(intensity=1.0), torch.Generator().manual_seed(0)
    )
    assert varied[~brain].abs().max() == 0
    assert (varied - images).abs().mean() > 0.01
    same = vary_intensity(images, brain, AugmentationConfig(intensity=0.0), torch.Generator().manual_seed(0))
    torch.testing.assert_close(same, images)
