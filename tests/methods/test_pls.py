"""PLS: loss, score, curriculum and a short training."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import expit, xlogy

from bids_uad.methods.base import Batch
from bids_uad.methods.pls.detector import PLS, CurriculumStage
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
    vary_contrast,
)
from bids_uad.networks.ddpmpp import DDPMppConfig
from bids_uad.networks.synthetic_anomalies import cut_windows, vary_intensity
from tests.methods.pseudo_trained import pseudo_trained

SMALL = replace(
    PLS.presets["lite"],
    network=DDPMppConfig(
        size=64, width=8, multipliers=(1, 2), blocks=(1, 1), attention=(), middle_attention=False,
        dropout=0.0, time_embedding=False, fold=2,
    ),
    field_of_view=(64, 64),
    full_target_change=0.1,
)  # fmt: skip


def brains(count: int = 8) -> Batch:
    """Grey discs with a bright centre."""
    rows, columns = torch.meshgrid(torch.arange(64) - 31.5, torch.arange(64) - 31.5, indexing="ij")
    radius = (rows**2 + columns**2).sqrt().expand(count, 1, 64, 64)
    brain = radius < 28
    noise = 0.02 * torch.randn(brain.shape, generator=torch.Generator().manual_seed(1))
    return Batch((torch.where(radius < 8, 0.9, 0.4) + noise).clamp(0, 1) * brain, brain)


def literal_loss(detector: PLS, stage: CurriculumStage, batch: Batch, seen: list, outputs: list) -> float:
    """Repeat the steps with the same seed; cross-entropy and weighted mean are NumPy's and SciPy's."""
    hyper, generator = detector.hyper, torch.Generator().manual_seed(0)
    bright = detector.polarity > 0
    clean, brain = cut_windows(batch.slices, batch.brain, (64, 64), hyper.augmentation, generator)
    brain = cut_edge(erode_edge(brain, generator), generator, stage.edge_cut_prob)
    clean, brain = scale_ventricles(clean * brain, brain, generator, hyper.ventricle_scaling_prob)
    clean = add_rim_artifacts(clean, brain, generator, hyper.rim_artifact_prob)
    clean, brain = add_strip_remnants(clean, brain, generator, stage.strip_remnant_prob)
    clean = darken_nuclei(clean, brain, bright, generator, stage.dark_nuclei_prob)
    clean = add_flow_voids(clean, brain, bright, generator, stage.flow_void_prob)
    painted, small = paint_lesions(clean, brain, bright, stage.lesion, generator)
    shaded = add_bias_field(vary_contrast(painted, generator), generator)
    shaded = add_bias_field(shaded, generator, hyper.fine_bias_strength, periods=8)
    varied = vary_intensity(shaded, brain, hyper.augmentation, generator)
    np.testing.assert_allclose(seen[0], 2 * varied - 1, atol=1e-6)

    target = np.minimum(np.abs((painted.double() - clean.double()).numpy()) / hyper.full_target_change, 1)
    assert target[brain.numpy()].max() == 1
    assert 0 < target[brain.numpy()].mean() < 1
    p = expit(outputs[0].double().numpy())
    entropy = -(xlogy(target, p) + xlogy(1 - target, 1 - p))
    weight = np.where(small.numpy(), stage.small_lesion_weight, 1.0) * brain.numpy()
    assert len(np.unique(weight)) == 2 + (stage.small_lesion_weight != 1)
    return float(np.average(entropy, weights=weight))


STAGES = {
    "defaults": CurriculumStage(),
    "weighted small lesions": CurriculumStage(small_lesion_weight=12.0),
    "all options": CurriculumStage(
        lesion=SyntheticLesionConfig(periventricular_prob=0.5, white_matter_prob=0.5),
        small_lesion_weight=3.0,
        dark_nuclei_prob=0.9,
        flow_void_prob=0.9,
        strip_remnant_prob=0.5,
        edge_cut_prob=0.5,
    ),
}


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
@pytest.mark.parametrize("polarity", [1.0, -1.0])
def test_loss_is_the_weighted_cross_entropy_with_the_painted_change(stage, polarity):
    torch.manual_seed(0)
    detector = PLS(replace(SMALL, rim_artifact_prob=0.5, ventricle_scaling_prob=0.5, fine_bias_strength=0.06))
    detector.polarity.fill_(polarity)
    torch.nn.init.normal_(detector.network.leave.weight, std=0.5)
    seen, outputs = [], []

    def record(_, inputs, output):
        seen.extend(inputs)
        outputs.append(output)

    detector.network.register_forward_hook(record)
    batch = brains()
    with torch.no_grad():
        loss = detector.loss(stage, batch, torch.Generator().manual_seed(0)).item()
        assert loss == pytest.approx(literal_loss(detector, stage, batch, seen, outputs), rel=1e-5)


def test_loss_without_lesions_has_target_zero():
    """With a constant logit of -5, the loss of an unchanged pixel is log(1 + e^-5)."""
    torch.manual_seed(0)
    detector = PLS(SMALL)
    detector.network.leave.bias.data.fill_(-5.0)
    nothing = CurriculumStage(lesion=SyntheticLesionConfig(probabilities=(0.0, 0.0, 0.0)))
    loss = detector.loss(nothing, brains(), torch.Generator().manual_seed(0)).item()
    assert loss == pytest.approx(math.log1p(math.exp(-5.0)), rel=1e-5)


def test_score_is_the_mean_probability_of_a_slice_and_its_mirror_image():
    detector = pseudo_trained("pls")
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
    # The two directions differ, so that a missing flip would be found.
    assert np.abs(expit(straight) - expit(mirrored)[:, :, ::-1]).max() > 0.1


def test_first_stage_fits_the_polarity_of_fluid():
    detector = PLS(SMALL)
    fit, descent = detector.stages()
    assert (fit.name, descent.name) == ("polarity", "large lesions")
    batch = brains()
    fit.fit(iter([batch]), torch.Generator())
    assert detector.polarity > 0
    fit.fit(iter([Batch((1 - batch.slices) * batch.brain, batch.brain)]), torch.Generator())
    assert detector.polarity < 0


def test_default_preset_has_a_curriculum_of_four_stages():
    hyper = PLS.presets["default"]
    _, first, second, third, fourth = PLS(hyper).stages()
    assert (first.name, first.steps) == ("large lesions", hyper.steps)
    assert (second.name, second.steps) == ("small lesions", hyper.stage2.steps)
    assert (third.name, third.steps) == ("periventricular lesions", hyper.stage3.steps)
    assert third.learning_rate == hyper.stage3.learning_rate
    assert (fourth.name, fourth.steps) == ("strip remnants", hyper.stage4.steps)


def test_training_beats_the_best_constant_prediction():
    """On other slices, the loss is below 75 % of that of the best constant probability."""
    torch.manual_seed(0)
    steady = replace(SMALL.augmentation, spatial=0.0, intensity=0.0)
    lesion = SyntheticLesionConfig(
        probabilities=(1.0, 0.0, 0.0), opacity=(0.8, 1.0), foreign_texture_prob=0.0
    )
    hyper = replace(SMALL, augmentation=steady, lesion=lesion)
    detector = PLS(hyper)
    batch, fresh = brains(), brains(4)

    def mean_loss() -> float:
        generator = torch.Generator().manual_seed(1)
        with torch.inference_mode():
            return float(np.mean([detector.loss(hyper, fresh, generator) for _ in range(8)]))

    constants = []
    for logit in np.linspace(-4, 0, 9):  # the weights of the last layer are 0
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
