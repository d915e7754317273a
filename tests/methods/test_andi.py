"""ANDi and partial diffusion against closed forms and literal loops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.literal import scales
from bids_uad.methods import andi
from bids_uad.methods.andi import ANDi, ANDiHyper, aggregation_constant, noise_levels
from bids_uad.methods.base import Batch
from bids_uad.methods.ddpmpp import PartialDiffusion, PartialDiffusionHyper
from bids_uad.networks.counter_rng import SliceGenerator
from tests.methods.tiny import TINY_NETWORK

TINY = replace(TINY_NETWORK, size=32)


def trained_looking(kind, hyper):
    torch.manual_seed(0)
    detector = kind(hyper).eval()
    torch.nn.init.normal_(detector.network.leave.weight, std=0.1)
    return detector


def generator():
    return SliceGenerator(torch.arange(3))


@pytest.fixture
def slices():
    brain = torch.zeros(3, 1, 32, 32, dtype=torch.bool)
    brain[:, :, 4:28, 6:25] = True
    return torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(9)) * brain, brain


def test_published_levels_and_constant():
    times = noise_levels(1)
    assert len(times) == 100
    assert [float(times[0]), float(times[-1])] == pytest.approx([0.125, 0.026])
    assert aggregation_constant(times) == pytest.approx(6.644e-4, rel=1e-3)


def test_score_is_the_geometric_mean_of_the_literal_differences(slices):
    detector = trained_looking(ANDi, ANDiHyper(network=TINY, stride=25, residual_floor=0.0))
    x, brain = slices
    with torch.no_grad():
        ours = detector.score(x, brain, generator())
        differences = []
        for time in (0.125, 0.1, 0.075, 0.05):
            alpha, sigma = scales(time)
            earlier_alpha, earlier_sigma = scales(time - 0.001)
            noise = generator().normal(round(1000 * time), 1, 32, 32)
            image = 2 * x - 1
            z = alpha * image + sigma * noise
            velocity = detector.network(z, torch.full((3,), 1000 * time))
            restored = (alpha * z - sigma * velocity).clamp(-1, 1)
            # Both posterior means at the earlier time contain the same multiple of z.
            added = sigma**2 - (alpha / earlier_alpha * earlier_sigma) ** 2
            means = [earlier_alpha * added / sigma**2 * clean.double() for clean in (image, restored)]
            differences.append((means[0] - means[1]) ** 2)
    expected = torch.stack(differences).log().mean(0).exp().float() * brain
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-9)


def test_residual_floor_keeps_scores_of_exactly_restored_pixels_finite(slices):
    """A background of -1 that is restored as -1 has residual 0."""
    x, brain = slices
    for floor, silenced in ((0.0, True), (1e-8, False)):
        detector = ANDi(ANDiHyper(network=TINY, stride=50, residual_floor=floor))
        calls = []

        def restore(noised, time, x=x, calls=calls):
            calls.append(time)
            return 2 * x - 1 if len(calls) == 1 else torch.zeros_like(x)

        detector.predictor.restore = restore
        scores = detector.score(x, brain, generator())[brain]
        assert bool((scores == 0).all()) == silenced


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("discount", [0.0, 0.8])
def test_partial_diffusion_with_a_perfect_network_restores_its_image(slices, steps, discount):
    x, brain = slices
    healthy = 0.5 * x
    hyper = PartialDiffusionHyper(network=TINY, denoising_steps=steps, discount=discount)
    detector = PartialDiffusion(hyper)

    def network(z, label):
        (time,) = set(label.tolist())
        alpha, sigma = scales(time / 1000)
        image = 2 * healthy - 1
        return (alpha * z - image) / sigma

    detector.predictor.network = network
    scores = detector.score(x, brain, generator())
    torch.testing.assert_close(scores, (0.5 * x).abs(), atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("kind", "hyper"),
    [
        (ANDi, ANDiHyper(network=TINY, stride=50)),
        (PartialDiffusion, PartialDiffusionHyper(network=TINY, denoising_steps=2)),
        (PartialDiffusion, PartialDiffusionHyper(network=TINY, denoising_steps=2, discount=0.9)),
    ],
)
def test_map_does_not_depend_on_the_batch(slices, kind, hyper):
    detector = trained_looking(kind, hyper)
    x, brain = slices
    with torch.no_grad():
        together = detector.score(x, brain, generator())
        order = [2, 0, 1]
        shuffled = detector.score(x[order], brain[order], generator()[order])
        alone = detector.score(x[1:2], brain[1:2], generator()[1:2])
    torch.testing.assert_close(shuffled, together[order], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(alone, together[1:2], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("published", [True, False])
def test_loss_of_an_untrained_network_is_that_of_velocity_zero(slices, published, monkeypatch):
    """With v = 0, the predicted noise is sigma z."""
    noise = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(7))

    def pyramid_noise(images, discount, generator, *, published):
        drawn.append((discount, published))
        return noise

    drawn = []
    monkeypatch.setattr(andi, "pyramid_noise", pyramid_noise)
    detector = ANDi(replace(ANDi.presets["lite"], network=TINY, published_noise=published))
    loss = detector.loss(Batch(*slices), torch.Generator().manual_seed(0))
    assert drawn == [(0.9, published)]
    times = torch.rand(3, generator=torch.Generator().manual_seed(0)).tolist()
    alpha, sigma = torch.tensor([scales(time) for time in times]).T[..., None, None, None]
    image = 2 * slices[0] - 1
    by_hand = (sigma * (alpha * image + sigma * noise) - noise).square().mean()
    torch.testing.assert_close(loss.detach(), by_hand)
    loss.backward()
    assert detector.network.leave.weight.grad.abs().sum() > 0
