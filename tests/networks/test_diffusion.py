"""Diffusion process of ``ddpmpp.py`` against published values and formulas in NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from benchmarks.literal import scales
from bids_uad.networks import ddpmpp as diffusion
from bids_uad.networks.ddpmpp import (
    NoisePredictor,
    layered_noise,
    log_snr,
    pyramid_noise,
    signal_and_noise,
    transition_weight,
)


@pytest.mark.parametrize(
    ("time", "ratio", "alpha", "sigma"),
    [(0.025, 3.67, 0.987, 0.158), (0.125, 0.45, 0.782, 0.623), (0.5, -2.773, 0.242, 0.970)],
)
def test_schedule_has_the_published_values(time, ratio, alpha, sigma):
    t = torch.tensor(time, dtype=torch.float64)
    assert float(log_snr(t)) == pytest.approx(ratio, abs=0.01)
    found = [float(scale) for scale in signal_and_noise(t)]
    assert found == pytest.approx([alpha, sigma], abs=0.002)  # the digits that are published
    assert found == pytest.approx(scales(time), rel=1e-12)
    assert sum(scale**2 for scale in found) == pytest.approx(1)


def test_schedule_is_limited_at_both_ends():
    ends = log_snr(torch.tensor([0.0, 1.0], dtype=torch.float64))
    shift = 2 * math.log(56 / 224)
    assert ends.tolist() == pytest.approx([15 + shift, -15 + shift])


def test_transition_weight_is_the_derivative_of_the_posterior_mean():
    """Posterior of z_s given z_t and x: mean = alpha_s x + (...)(z_t - alpha_t x); only x matters here."""
    t, s = torch.tensor([0.1], dtype=torch.float64), torch.tensor([0.099], dtype=torch.float64)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = signal_and_noise(t), signal_and_noise(s)
    alpha_ts = alpha_t / alpha_s
    variance_ts = sigma_t**2 - alpha_ts**2 * sigma_s**2

    def mean(z: float, x: float) -> torch.Tensor:
        return alpha_ts * sigma_s**2 / sigma_t**2 * z + alpha_s * variance_ts / sigma_t**2 * x

    by_hand = (mean(0.3, 0.9) - mean(0.3, 0.4)) / 0.5
    torch.testing.assert_close(transition_weight(t, s), by_hand)


@pytest.mark.parametrize("published", [True, False])
def test_pyramid_noise_has_unit_power(published):
    images = torch.zeros(16, 1, 96, 96)
    noise = pyramid_noise(images, 0.9, torch.Generator().manual_seed(0), published=published)
    assert float(noise.square().mean()) == pytest.approx(1, abs=0.05)
    if not published:
        torch.testing.assert_close(noise.square().mean((1, 2, 3)), torch.ones(16))


def bilinear(coarse: int, fine: int) -> np.ndarray:
    """Matrix that enlarges an axis linearly between the centres of pixels; shape (fine, coarse)."""
    position = np.clip((np.arange(fine) + 0.5) * coarse / fine - 0.5, 0, coarse - 1)
    return np.clip(1 - np.abs(position[:, None] - np.arange(coarse)), 0, None)


@pytest.mark.parametrize("published", [True, False])
def test_layered_noise_is_a_weighted_sum_of_enlarged_white_noise(published):
    size, discount, drawn = (96, 80), 0.8, []
    generator = torch.Generator().manual_seed(0)

    def white(number, shape):
        drawn.append(torch.randn((4, 1, *shape), generator=generator, dtype=torch.float64))
        return drawn[-1]

    noise = layered_noise(white, size, discount, lambda: 2.5, published=published).numpy()
    assert [part.shape[-2:] for part in drawn[1:]] == [
        *([size] if published else []), (38, 32), (6, 5), (1, 1)
    ]  # fmt: skip
    first = 0 if published else 1
    expected = drawn[0].numpy().copy()
    for level, part in enumerate(drawn[1:], start=first):
        rows, columns = (bilinear(coarse, fine) for coarse, fine in zip(part.shape[-2:], size, strict=True))
        expected += discount**level * (rows @ part.numpy() @ columns.T)
    if published:
        expected /= expected.std(ddof=1)
    else:
        expected /= np.sqrt(np.square(expected).mean(axis=(1, 2, 3), keepdims=True))
    np.testing.assert_allclose(noise, expected, atol=1e-6)


def test_pyramid_noise_draws_each_ratio_uniformly_between_two_and_four(monkeypatch):
    ratios = []

    def layered(white, size, discount, ratio, *, published):
        ratios.extend(ratio() for _ in range(2000))
        return torch.zeros(1)

    monkeypatch.setattr(diffusion, "layered_noise", layered)
    pyramid_noise(torch.zeros(1, 1, 8, 8), 0.9, torch.Generator().manual_seed(0), published=False)
    assert kstest(ratios, "uniform", args=(2, 2)).pvalue > 1e-3


def test_layered_noise_draws_the_expected_layers():
    sizes = []

    def white(number, size):
        sizes.append(size)
        return torch.full((1, 1, *size), float(number + 1))

    noise = layered_noise(white, (160, 192), 0.5, lambda: 3.0)
    assert sizes == [(160, 192), (53, 64), (5, 7), (1, 1)]
    # 1 + 2 / 2 + 3 / 4 + 4 / 8, then scaled to unit power.
    torch.testing.assert_close(noise, torch.ones(1, 1, 160, 192))
    sizes.clear()
    layered_noise(white, (224, 224), 0.5, lambda: 3.0, published=True)
    assert sizes == [(224, 224), (224, 224), (74, 74), (8, 8), (1, 1)]


def test_the_true_velocity_has_loss_zero_and_restores_the_image():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 1, 8, 8, generator=generator) * 2 - 1
    noise = torch.randn(4, 1, 8, 8, generator=generator)
    alpha, sigma = (scale[:, None, None, None] for scale in signal_and_noise(torch.full((4,), 0.3)))
    seen = []

    def network(z, label):
        seen.append(label)
        return alpha * noise - sigma * images

    predictor = NoisePredictor(network, 1000.0)
    assert float(predictor.loss(images, noise, torch.full((4,), 0.3))) == pytest.approx(0, abs=1e-10)
    restored, implied = predictor.denoise(alpha * images + sigma * noise, 0.3)
    torch.testing.assert_close(restored, images, atol=1e-5, rtol=0)
    torch.testing.assert_close(implied, noise, atol=1e-4, rtol=0)
    torch.testing.assert_close(seen[0], torch.full((4,), 300.0))
    assert seen[1].tolist() == pytest.approx([300.0])  # one label for the whole batch
