"""PLS: its loss and its score by hand, and what it has learnt to see."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import expit, xlogy

from bids_uad.methods.base import Batch
from bids_uad.methods.pls.detector import PLS, Course
from bids_uad.methods.pls.training_samples import (
    BlemishConfig,
    bend_contrast,
    cut_edge,
    darken_nuclei,
    darken_sinuses,
    leave_remnants,
    paint_blemishes,
    shade,
    shrink_rim,
    soil_rim,
    swell_middle,
)
from bids_uad.networks.ddpmpp import DDPMppConfig
from bids_uad.networks.synthetic_anomalies import cut_windows, vary_intensity
from tests.methods.looking_trained import looking_trained

SMALL = replace(
    PLS.presets["lite"],
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


def literal_loss(detector: PLS, course: Course, batch: Batch, seen: list, outputs: list) -> float:
    """Repeat the steps of the loss with a generator of the same seed; the sums are NumPy's and SciPy's."""
    hyper, generator = detector.hyper, torch.Generator().manual_seed(0)
    bright = detector.polarity > 0
    clean, brain = cut_windows(batch.slices, batch.brain, (64, 64), hyper.augmentation, generator)
    brain = cut_edge(shrink_rim(brain, generator), generator, course.cut)
    clean, brain = swell_middle(clean * brain, brain, generator, hyper.swollen)
    clean = soil_rim(clean, brain, generator, hyper.soiled)
    clean, brain = leave_remnants(clean, brain, generator, course.remnants)
    clean = darken_nuclei(clean, brain, bright, generator, course.iron)
    clean = darken_sinuses(clean, brain, bright, generator, course.flow)
    painted, small = paint_blemishes(clean, brain, bright, course.blemish, generator)
    shaded = shade(bend_contrast(painted, generator), generator)
    shaded = shade(shaded, generator, hyper.mottled, bumps=8)
    varied = vary_intensity(shaded, brain, hyper.augmentation, generator)
    np.testing.assert_allclose(seen[0], 2 * varied - 1, atol=1e-6)

    target = np.minimum(np.abs((painted.double() - clean.double()).numpy()) / hyper.visible, 1)
    assert target[brain.numpy()].max() == 1
    assert 0 < target[brain.numpy()].mean() < 1
    p = expit(outputs[0].double().numpy())
    entropy = -(xlogy(target, p) + xlogy(1 - target, 1 - p))
    weight = np.where(small.numpy(), course.small_weight, 1.0) * brain.numpy()
    assert len(np.unique(weight)) == 2 + (course.small_weight != 1)
    return float(np.average(entropy, weights=weight))


COURSES = {
    "blemishes": Course(),
    "small ones count more": Course(small_weight=12.0),
    "everything": Course(
        blemish=BlemishConfig(lining=0.5, in_white=0.5),
        small_weight=3.0,
        iron=0.9,
        flow=0.9,
        remnants=0.5,
        cut=0.5,
    ),
}


@pytest.mark.parametrize("course", COURSES.values(), ids=COURSES)
@pytest.mark.parametrize("polarity", [1.0, -1.0])
def test_the_loss_is_the_weighted_cross_entropy_with_what_was_painted(course, polarity):
    torch.manual_seed(0)
    detector = PLS(replace(SMALL, soiled=0.5, swollen=0.5, mottled=0.06))
    detector.polarity.fill_(polarity)
    torch.nn.init.normal_(detector.network.leave.weight, std=0.5)
    seen, outputs = [], []

    def record(_, inputs, output):
        seen.extend(inputs)
        outputs.append(output)

    detector.network.register_forward_hook(record)
    batch = brains()
    with torch.no_grad():
        loss = detector.loss(course, batch, torch.Generator().manual_seed(0)).item()
        assert loss == pytest.approx(literal_loss(detector, course, batch, seen, outputs), rel=1e-5)


def test_nothing_painted_is_nothing_foreign():
    """A network that always gives the logit -5 pays log(1 + e^-5) for every pixel that was left as it is."""
    torch.manual_seed(0)
    detector = PLS(SMALL)
    detector.network.leave.bias.data.fill_(-5.0)
    nothing = Course(blemish=BlemishConfig(chance=(0.0, 0.0, 0.0)))
    loss = detector.loss(nothing, brains(), torch.Generator().manual_seed(0)).item()
    assert loss == pytest.approx(math.log1p(math.exp(-5.0)), rel=1e-5)


def test_the_score_is_the_mean_probability_of_a_slice_and_its_mirror_image():
    detector = looking_trained("pls")
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 1, 160, 192, generator=generator)
    brain = torch.zeros(x.shape, dtype=torch.bool)
    brain[..., 20:130, 30:150] = True
    x = x * brain
    with torch.inference_mode():
        score = detector.score(x, brain, []).numpy()
        # Left and right lie along the rows.
        straight, mirrored = (
            detector.network(2 * y - 1).double().numpy() for y in (x, x[:, :, range(159, -1, -1)])
        )
    expected = (expit(straight) + expit(mirrored)[:, :, ::-1]) / 2
    np.testing.assert_allclose(score, np.where(brain, expected, 0), rtol=1e-5)
    assert np.ptp(expected[brain.numpy()]) > 0.5
    # Slices may not be mixed up, nor the two directions of a slice.
    assert np.abs(expit(straight) - expit(mirrored)[:, :, ::-1]).max() > 0.1


def test_fluid_is_learnt_first():
    detector = PLS(SMALL)
    fit, descent = detector.stages()
    assert (fit.name, descent.name) == ("polarity", "blemishes")
    batch = brains()
    fit.fit(iter([batch]), torch.Generator())
    assert detector.polarity > 0
    fit.fit(iter([Batch((1 - batch.slices) * batch.brain, batch.brain)]), torch.Generator())
    assert detector.polarity < 0


def test_small_blemishes_have_a_course_of_their_own():
    hyper = PLS.presets["default"]
    _, first, second, third, fourth = PLS(hyper).stages()
    assert (first.name, first.steps) == ("blemishes", hyper.steps)
    assert (second.name, second.steps) == ("small blemishes", hyper.second.steps)
    assert (third.name, third.steps) == ("linings", hyper.third.steps)
    assert third.learning_rate == hyper.third.learning_rate
    assert (fourth.name, fourth.steps) == ("remnants", hyper.fourth.steps)


def test_training_beats_the_best_answer_that_does_not_look():
    """On other draws of large blemishes, the loss is well below that of the best constant probability."""
    torch.manual_seed(0)
    steady = replace(SMALL.augmentation, spatial=0.0, intensity=0.0)
    blemish = BlemishConfig(chance=(1.0, 0.0, 0.0), opacity=(0.8, 1.0), texture=0.0)
    hyper = replace(SMALL, augmentation=steady, blemish=blemish)
    detector = PLS(hyper)
    batch, fresh = brains(), brains(4)

    def mean_loss() -> float:
        generator = torch.Generator().manual_seed(1)
        with torch.inference_mode():
            return float(np.mean([detector.loss(hyper, fresh, generator) for _ in range(8)]))

    constants = []
    for logit in np.linspace(-4, 0, 9):  # the last layer's weights are still 0
        detector.network.leave.bias.data.fill_(logit)
        constants.append(mean_loss())
    assert 0 < np.argmin(constants) < 8
    detector.network.leave.bias.data.zero_()
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(detector.network.parameters(), lr=3e-3)
    for _ in range(60):
        optimiser.zero_grad()
        detector.loss(hyper, batch, generator).backward()
        optimiser.step()
    assert mean_loss() < 0.75 * min(constants)
