"""FPI: its loss by hand, the symmetry of its score, and what it has learnt to see."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from bids_uad.methods.base import Batch
from bids_uad.methods.fpi import FPI, Course
from bids_uad.networks.blemishes import BlemishConfig
from bids_uad.networks.ddpmpp import DDPMppConfig
from tests.methods.looking_trained import looking_trained

SMALL = replace(
    FPI.presets["lite"],
    network=DDPMppConfig(
        size=64, width=8, multipliers=(1, 2), blocks=(1, 1), attention=(), middle_attention=False,
        dropout=0.0, time_embedding=False, fold=2,
    ),
    field_of_view=(64, 64),
    visible=0.1,
)  # fmt: skip


def brains(count: int = 8) -> Batch:
    """Discs of grey with a bright centre."""
    rows, columns = torch.meshgrid(torch.arange(64) - 31.5, torch.arange(64) - 31.5, indexing="ij")
    radius = (rows**2 + columns**2).sqrt().expand(count, 1, 64, 64)
    brain = radius < 28
    noise = 0.02 * torch.randn(brain.shape, generator=torch.Generator().manual_seed(1))
    return Batch((torch.where(radius < 8, 0.9, 0.4) + noise).clamp(0, 1) * brain, brain)


def test_an_untrained_network_is_undecided_everywhere():
    """Its last layer is zero, so every pixel gets 1/2, and cross-entropy with any target is log 2."""
    torch.manual_seed(0)
    detector = FPI(SMALL)
    loss = detector.loss(SMALL, brains(), torch.Generator().manual_seed(0))
    assert loss.item() == pytest.approx(math.log(2), rel=1e-5)


def test_the_loss_is_cross_entropy_with_what_was_painted():
    """A network that always says 'clean' pays in proportion to the change, up to what counts as visible."""
    torch.manual_seed(0)
    detector = FPI(replace(SMALL, blemish=BlemishConfig(chance=(0.0, 0.0, 0.0))))
    detector.network.leave.bias.data.fill_(-5.0)
    batch = brains()
    clean = detector.loss(detector.hyper, batch, torch.Generator().manual_seed(0)).item()
    assert clean == pytest.approx(math.log1p(math.exp(-5.0)), rel=1e-4)
    everything = Course(blemish=BlemishConfig(chance=(1.0, 1.0, 1.0)))
    painted = detector.loss(everything, batch, torch.Generator().manual_seed(0)).item()
    # log(1 + e^-5) + 5 * (mean target)
    assert 0.02 < (painted - clean) / 5 < 0.8


def test_the_score_does_not_depend_on_left_and_right():
    detector = looking_trained("fpi")
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 1, 160, 192, generator=generator)
    brain = torch.zeros(x.shape, dtype=torch.bool)
    brain[..., 20:130, 30:150] = True
    with torch.inference_mode():
        score = detector.score(x * brain, brain, [])
        mirrored = detector.score((x * brain).flip(-2), brain.flip(-2), [])
    torch.testing.assert_close(mirrored.flip(-2), score)
    assert score[~brain].abs().max() == 0
    assert 0 < score[brain].min() < score.max() < 1


def test_fluid_is_learnt_first():
    detector = FPI(SMALL)
    fit, descent = detector.stages()
    assert (fit.name, descent.name) == ("polarity", "blemishes")
    batch = brains()
    fit.fit(iter([batch]), torch.Generator())
    assert detector.polarity > 0
    fit.fit(iter([Batch((1 - batch.slices) * batch.brain, batch.brain)]), torch.Generator())
    assert detector.polarity < 0


def test_small_blemishes_have_a_course_of_their_own():
    """The weight of small blemishes does what the formula of a weighted mean says."""
    hyper = FPI.presets["default"]
    _, first, second, third, fourth = FPI(hyper).stages()
    assert (first.name, first.steps) == ("blemishes", hyper.steps)
    assert (second.name, second.steps) == ("small blemishes", hyper.second.steps)
    assert (third.name, third.steps) == ("linings", hyper.third.steps)
    assert third.learning_rate == hyper.third.learning_rate
    assert (fourth.name, fourth.steps) == ("remnants", hyper.fourth.steps)

    detector = FPI(SMALL)
    detector.network.leave.bias.data.fill_(-5.0)  # pays for blemishes alone
    only_small = BlemishConfig(chance=(0.0, 0.0, 1.0), small=(4.0, 8.0), opacity=(1.0, 1.0))
    loss = {
        weight: detector.loss(
            Course(blemish=only_small, small_weight=weight), brains(), torch.Generator().manual_seed(0)
        ).item()
        for weight in (1.0, 2.0, 5.0, 1e6)
    }
    # sum(w l) / sum(w) with w = 1 + (weight - 1) small: three weights tell the share of the small ones.
    share = (loss[2.0] - loss[1.0]) / (loss[1e6] - loss[2.0])
    assert 0 < share < 0.5
    assert loss[5.0] == pytest.approx((loss[1.0] + 4 * share * loss[1e6]) / (1 + 4 * share), rel=1e-3)


def test_it_learns_to_see_what_does_not_belong():
    torch.manual_seed(0)
    detector = FPI(SMALL)
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(detector.network.parameters(), lr=5e-3)
    batch = brains()
    for _ in range(60):
        optimiser.zero_grad()
        detector.loss(SMALL, batch, generator).backward()
        optimiser.step()
    seen = brains(1)
    seen.slices[..., 40:48, 40:48] = 0.85
    with torch.inference_mode():
        score = detector.eval().score(seen.slices, seen.brain, [])[0, 0]
    rest = seen.brain[0, 0].clone()
    rest[36:52, 36:52] = False
    assert score[42:46, 42:46].mean() > 3 * score[rest].mean()
