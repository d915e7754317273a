"""Synthetic anomalies and augmentations against SciPy and literal values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_closing, gaussian_filter, label

from bids_uad.networks.synthetic_anomalies import (
    COMPONENTS,
    AnomalyConfig,
    AugmentationConfig,
    cut_windows,
    gaussian_blur,
    paint_anomalies,
    random_shapes,
    vary_intensity,
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


def test_vary_intensity_keeps_the_background(healthy):
    images, brain = healthy
    varied = vary_intensity(
        images, brain, AugmentationConfig(intensity=1.0), torch.Generator().manual_seed(0)
    )
    assert varied[~brain].abs().max() == 0
    assert (varied - images).abs().mean() > 0.01
    same = vary_intensity(images, brain, AugmentationConfig(intensity=0.0), torch.Generator().manual_seed(0))
    torch.testing.assert_close(same, images)
