"""Windows, clustering, coreset and corruptions against independent references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_closing, gaussian_filter, label

from bids_uad.methods import disyre
from bids_uad.methods.disyre import intensity_centres, window_starts, window_weight
from bids_uad.methods.patchcore import farthest_points
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


@pytest.mark.parametrize(
    ("extent", "window", "stride", "expected"),
    [(224, 128, 32, [0, 32, 64, 96]), (160, 128, 64, [0, 32]), (192, 192, 80, [0]), (192, 128, 64, [0, 64])],
)
def test_window_starts(extent, window, stride, expected):
    assert window_starts(extent, window, stride) == expected


def test_importance_is_gaussian_with_a_floor():
    weight = window_weight(128, 128, torch.device("cpu"))
    assert weight[64, 64] == pytest.approx(np.exp(-0.5 * 2 * (0.5 / 16) ** 2), rel=1e-5)
    assert weight.min() == pytest.approx(1e-3)


def test_intensity_centres_are_those_of_the_mixture():
    rng = np.random.default_rng(0)
    values = np.concatenate(
        [rng.normal(m, 0.02, n) for m, n in ((0.1, 500), (0.35, 900), (0.6, 600), (0.9, 400))]
    )
    centres = intensity_centres(rng.permutation(values), 4)
    np.testing.assert_allclose(centres, [0.1, 0.35, 0.6, 0.9], atol=3e-3)
    assert centres.dtype == np.float32


def test_intensity_centres_of_many_values_are_those_of_their_quantiles(monkeypatch):
    values = np.random.default_rng(0).beta(2, 5, 20_000)
    every = intensity_centres(values, 3)
    monkeypatch.setattr(disyre, "CODEBOOK_SAMPLES", 5_000)
    np.testing.assert_allclose(intensity_centres(values, 3), every, atol=2e-3)


@pytest.mark.parametrize("channels", [5, 128, 300])
def test_farthest_points_are_the_greedy_choice_in_all_channels(channels):
    points = torch.randn(200, channels, generator=torch.Generator().manual_seed(1))
    chosen = farthest_points(points, 12, torch.Generator().manual_seed(2)).tolist()
    cloud = points.numpy()
    expected = [chosen[0]]
    for _ in range(11):
        distance = np.linalg.norm(cloud[:, None] - cloud[expected][None], axis=2).min(1)
        expected.append(int(distance.argmax()))
    assert chosen == expected


def test_coreset_needs_enough_points():
    with pytest.raises(ValueError, match="cannot select 5 of 4"):
        farthest_points(torch.zeros(4, 2), 5, torch.Generator())


def test_gaussian_blur_is_scipys():
    images = torch.rand(3, 1, 40, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.7, 2.0, 3.0])
    ours = gaussian_blur(images, sigma)
    for image, blurred, width in zip(images, ours, sigma, strict=True):
        expected = gaussian_filter(image[0].numpy(), float(width), mode="nearest", radius=9)
        np.testing.assert_allclose(blurred[0], expected, atol=1e-6)


def test_no_blur_leaves_the_image():
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


def test_shapes_keep_to_their_size():
    centres = torch.full((600, 2), 48.0)
    shapes = random_shapes(centres, 96, 96, AnomalyConfig(size=(10, 44)), torch.Generator().manual_seed(0))
    area = shapes.sum((1, 2, 3))
    assert set(shapes.unique().tolist()) == {0.0, 1.0}
    assert area.median() > 0.5 * 27**2 * 0.5
    assert area.max() <= (1.6 * 44) ** 2


def test_an_anomaly_may_have_several_shapes(healthy):
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


def test_anomalies_stay_in_the_brain_and_know_their_severity(healthy):
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


def test_components_of_anomalies_are_switched_off_one_by_one(healthy):
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


def test_edges_and_shapes_are_switched_off(healthy):
    images, brain = healthy
    sharp, _ = paint(images, brain, ("rectangle", "texture"))
    soft, _ = paint(images, brain, ("rectangle", "texture", "blur"))
    assert (sharp != images).sum() < (soft != images).sum()
    centres = torch.full((60, 2), 48.0)
    config = AnomalyConfig(size=(30, 30.001))
    for kind, area in (("rectangle", 900), ("disc", np.pi * 15**2)):
        shapes = random_shapes(centres, 96, 96, config, torch.Generator().manual_seed(0), (kind,))
        torch.testing.assert_close(shapes.sum((1, 2, 3)), torch.full((60,), float(area)), rtol=0.08, atol=0.0)


def test_painting_repeats_with_its_generator(healthy):
    images, brain = healthy
    codebook = torch.linspace(0.1, 0.9, 5)
    first, again, other = (
        paint_anomalies(images, brain, codebook, AnomalyConfig(), torch.Generator().manual_seed(seed))[0]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_unturned_windows_are_copies(healthy):
    images, brain = healthy
    config = AugmentationConfig(spatial=0.0, intensity=0.0)
    cut, region = cut_windows(images, brain, (96, 96), config, torch.Generator().manual_seed(0))
    for window, source in zip(cut, images, strict=True):
        flips = [source, source.flip(-1), source.flip(-2), source.flip((-1, -2))]
        assert any(torch.allclose(window, flipped, atol=1e-5) for flipped in flips)
    assert region.dtype == torch.bool


def test_windows_stay_upright_and_centred_if_asked(healthy):
    images, brain = (part[..., :80] for part in healthy)  # the disc is cut at one end
    config = AugmentationConfig(spatial=0.0, shift=0.0, flip_front_back=False)
    cut, _ = cut_windows(images, brain, (96, 80), config, torch.Generator().manual_seed(0))
    as_they_were = [torch.allclose(a, b, atol=1e-5) for a, b in zip(cut, images, strict=True)]
    mirrored = [torch.allclose(a, b.flip(-2), atol=1e-5) for a, b in zip(cut, images, strict=True)]
    assert all(a or b for a, b in zip(as_they_were, mirrored, strict=True))
    assert any(as_they_were)
    assert any(mirrored)


def test_turned_labels_follow_the_image(healthy):
    images, brain = healthy
    tissue = torch.where(images > 0.6, 2, 1) * brain
    config = AugmentationConfig(spatial=1.0)
    cut, classes = cut_windows(images, tissue, (80, 80), config, torch.Generator().manual_seed(0))
    assert classes.dtype == tissue.dtype
    inner = cut[classes == 2]
    assert inner.mean() > 0.65
    assert cut[classes == 1].mean() < 0.5


def test_intensities_vary_but_background_stays(healthy):
    images, brain = healthy
    varied = vary_intensity(
        images, brain, AugmentationConfig(intensity=1.0), torch.Generator().manual_seed(0)
    )
    assert varied[~brain].abs().max() == 0
    assert (varied - images).abs().mean() > 0.01
    same = vary_intensity(images, brain, AugmentationConfig(intensity=0.0), torch.Generator().manual_seed(0))
    torch.testing.assert_close(same, images)
