"""PLS: input channels, loss, score and a short training."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import expit, xlogy
from scipy.stats import kstest

from bids_uad import space
from bids_uad.engine.inference import anomaly_map, covering_fields, masked_median
from bids_uad.methods.base import PaintedBatch, Scan
from bids_uad.methods.pls import detector as module
from bids_uad.methods.pls.detector import PLS, tversky_loss
from bids_uad.networks.ddpmpp import DDPMppConfig
from bids_uad.networks.synthetic_anomalies import (
    reduce_contrast,
    smooth_random_field,
    vary_contrast,
    vary_intensities,
)
from tests.methods.pseudo_trained import phantom, pseudo_trained
from tests.networks.conftest import seeded
from tests.simulation.test_atlas import POSITIONS

SMALL = replace(
    PLS.presets["lite"],
    network=DDPMppConfig(
        size=64, width=8, multipliers=(1, 2), blocks=(1, 1), attention=(), middle_attention=False,
        dropout=0.0, time_embedding=False, fold=2,
    ),
    field_of_view=(64, 64),
)  # fmt: skip
WHOLE = slice(0, space.CROP)
GRID = (space.SHAPE[2], space.CROP, space.CROP)


def random_weights(hyper, seed=0):
    torch.manual_seed(seed)
    detector = PLS(hyper)
    torch.nn.init.normal_(detector.network.leave.weight, std=0.5)
    return detector.eval()


def painted_batch(count=4, hyper=SMALL):
    """Discs of brain with noise in all intensities, and a lesion in the middle of every other one."""
    rows, columns = torch.meshgrid(torch.arange(64) - 31.5, torch.arange(64) - 31.5, indexing="ij")
    radius = (rows**2 + columns**2).sqrt().expand(count, 1, 64, 64)
    brain = radius < 28
    target = ((radius < 8) & (torch.arange(count) % 2 == 0)[:, None, None, None]).float()
    generator = seeded(1)
    places = module.PLACE_CHANNELS * hyper.place
    noise = 0.02 * torch.randn(count, hyper.intensity_channels, 64, 64, generator=generator)
    intensities = (0.4 + 0.5 * target + noise).clamp(0, 1) * brain
    place = torch.rand(count, places, 64, 64, generator=generator)
    return PaintedBatch(torch.cat([intensities, place], 1), brain, target, (1 + 2 * target) * brain)


class TestInputs:
    def test_slices_come_from_below_to_above_and_are_repeated_at_the_border(self):
        slices = (torch.arange(GRID[0]) / 200)[:, None, None].expand(GRID)
        channels = PLS(SMALL).inputs(slices, [80, 1, 154], WHOLE, WHOLE)[:, :5, 0, 0]
        expected = [[78, 79, 80, 81, 82], [0, 0, 1, 2, 3], [152, 153, 154, 154, 154]]
        torch.testing.assert_close(channels * 200, torch.tensor(expected).float(), atol=1e-4, rtol=0)

    def test_numbers_and_window_select_a_part_of_all_channels(self):
        slices = torch.rand(GRID, generator=seeded())
        detector = PLS(SMALL)
        some = detector.inputs(slices, [70, 90], slice(20, 84), slice(30, 94))
        whole = detector.inputs(slices, range(60, 95), WHOLE, WHOLE)
        assert some.shape == (2, 14, 64, 64)
        assert torch.equal(some, whole[[10, 30], :, 20:84, 30:94])

    @pytest.mark.parametrize("side", [-1, 1])
    @pytest.mark.parametrize("name", ["thalamus", "centrum semiovale", "trigone", "pons", "precuneus"])
    def test_coordinates_and_priors_belong_to_the_voxel(self, name, side):
        """A bright voxel at a known position, and what the network sees there."""
        tissue, (x, y, z) = POSITIONS[name]
        world = space.icbm_to_sri24() @ [side * x, y, z, 1]
        volume = np.zeros(space.SHAPE, dtype=np.float32)
        voxel = tuple(np.rint(np.linalg.inv(space.AFFINE) @ world)[:3].astype(int))
        volume[voxel] = 1
        slices = torch.from_numpy(space.to_slices(volume).copy())
        number, row, column = map(int, slices.nonzero()[0])
        inputs = PLS(SMALL).inputs(slices, [number], WHOLE, WHOLE)[0]
        assert inputs[2, row, column] == 1
        place = inputs[5:, row, column]
        # The atlas is symmetric about x = -119.5 mm of the grid; y and z run forwards and upwards.
        centre = space.AFFINE @ [119.5, 120.0, 77.5, 1]
        across, along, up = world[:3] - centre[:3]
        assert place[:3].tolist() == pytest.approx([abs(across) / 70, -along / 90, up / 75], abs=0.01)
        assert space.TISSUES[int(place[3:].argmax())] == tissue

    @pytest.mark.parametrize(
        ("changes", "channels"),
        [({}, 14), ({"place": False}, 5), ({"neighbours": 0}, 10)],
    )
    def test_number_of_channels_is_that_of_the_network(self, changes, channels):
        detector = PLS(replace(SMALL, **changes))
        slices = torch.rand(5, 64, 64)
        inputs = detector.inputs(slices, [0, 3], slice(0, 64), slice(0, 64))
        assert inputs.shape == (2, channels, 64, 64)
        with torch.no_grad():
            assert detector.network(inputs).shape == (2, 1, 64, 64)


class TestContinueFrom:
    def test_a_network_of_one_slice_continues_with_equal_output(self):
        single = random_weights(replace(SMALL, neighbours=0, place=False))
        detector = random_weights(SMALL, seed=1)
        detector.continue_from(single.state_dict() | {"polarity": torch.ones(())})
        x = torch.randn(2, 14, 64, 64, generator=seeded())
        with torch.no_grad():
            torch.testing.assert_close(detector.network(x), single.network(x[:, 2:3]), atol=1e-5, rtol=1e-5)
            assert single.network(x[:, 2:3]).std() > 0.1

    def test_a_network_of_the_same_inputs_is_copied(self):
        first, second = random_weights(SMALL), random_weights(SMALL, seed=1)
        second.continue_from(first.state_dict())
        for name, value in first.state_dict().items():
            assert torch.equal(second.state_dict()[name], value)

    @pytest.mark.parametrize(
        ("weights", "error"),
        [
            (PLS(replace(SMALL, place=False)).state_dict(), RuntimeError),
            (PLS(replace(SMALL, network=replace(SMALL.network, width=16))).state_dict(), RuntimeError),
            ({"backbone.weight": torch.zeros(3)}, KeyError),
        ],
        ids=["other inputs", "other width", "another detector"],
    )
    def test_other_networks_are_refused(self, weights, error):
        with pytest.raises(error):
            PLS(SMALL).continue_from(weights)


def test_stage_paints_with_the_shapes_of_the_detector(monkeypatch):
    detector = PLS(replace(SMALL, steps=7))
    (stage,) = detector.stages()
    assert (stage.name, stage.steps, stage.module) == ("segmentation", 7, detector.network)
    given = []
    monkeypatch.setattr(module, "paint_scan", lambda *arguments: given.append(arguments))
    detector.shapes = [torch.ones(2, 2, 2, dtype=torch.bool)]
    scan, generator = Scan(torch.zeros(2, 4, 4), torch.ones(2, 4, 4, dtype=torch.bool)), seeded()
    stage.paint(scan, generator)
    assert given == [(scan, SMALL.painting, generator, detector.shapes)]


@pytest.mark.parametrize("tversky", [0.0, 0.7])
@pytest.mark.parametrize("changes", [{}, {"place": False}, {"place_dropout": 1.0}])
def test_loss_is_the_weighted_cross_entropy_with_the_target(changes, tversky):
    """The steps are repeated with the same seed; cross-entropy and weighted mean are NumPy's and SciPy's."""
    hyper = replace(SMALL, tversky_weight=tversky, **changes)
    detector, batch = random_weights(hyper), painted_batch(hyper=hyper)
    seen, outputs = [], []

    def record(_, inputs, output):
        seen.extend(inputs)
        outputs.append(output)

    detector.network.register_forward_hook(record)
    with torch.no_grad():
        loss = detector.loss(batch, seeded()).item()

    count, generator = hyper.intensity_channels, seeded()
    clean, place = batch.inputs[:, :count], batch.inputs[:, count:]
    varied = vary_intensities(clean, 0.5, hyper.fine_bias_strength, generator)
    varied = varied * (clean > 0)
    drop = torch.rand((len(clean), 1, 1, 1), generator=generator)
    expected = torch.cat([2 * varied - 1, place * (drop >= hyper.place_dropout)], 1)
    torch.testing.assert_close(seen[0], expected, atol=1e-6, rtol=0)

    p, target, weight = (
        part.double().numpy() for part in (outputs[0].double().sigmoid(), batch.target, batch.weight)
    )
    entropy = -(xlogy(target, p) + xlogy(1 - target, 1 - p))
    reference = np.average(entropy, weights=weight)
    inside = weight > 0
    p, target = p[inside], target[inside]
    hit, missed, false = (p * target).sum(), ((1 - p) * target).sum(), (p * (1 - target)).sum()
    reference += tversky * (1 - (hit + 1) / (hit + 0.7 * missed + 0.3 * false + 1))
    assert loss == pytest.approx(reference, rel=1e-5)


def test_dropout_leaves_out_the_place():
    hyper = replace(SMALL, place_dropout=0.3)
    detector = PLS(hyper)
    seen = []
    detector.network.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    with torch.no_grad():
        detector.loss(painted_batch(200), seeded())
    (x,) = seen
    assert (x[:, 5:] == 0).flatten(1).all(1).float().mean() == pytest.approx(0.3, abs=0.11)
    assert (x[:, :5] > -1).flatten(1).any(1).all()


def test_tversky_loss_weighs_missed_and_false_pixels():
    brain = torch.ones(1, 1, 10, 10, dtype=torch.bool)
    target = torch.zeros(1, 1, 10, 10)
    target[..., :4, :] = 1
    assert tversky_loss(target, target, brain).item() == 0
    half = target.clone()
    half[..., :2, :] = 0
    # 20 hits and 20 missed pixels, or 40 hits and 20 false ones.
    assert tversky_loss(half, target, brain).item() == pytest.approx(1 - 21 / (20 + 14 + 1))
    more = target.clone()
    more[..., 4:6, :] = 1
    assert tversky_loss(more, target, brain).item() == pytest.approx(1 - 41 / (40 + 6 + 1))
    brain[..., 4:6, :] = False
    assert tversky_loss(more, target, brain).item() == 0


class TestIntensities:
    def test_neighbouring_slices_are_varied_alike(self):
        channels = torch.rand(6, 1, 40, 48, generator=seeded()).expand(-1, 4, -1, -1)
        varied = vary_intensities(channels, 0.0, 0.06, seeded(3))
        for channel in range(1, 4):
            assert torch.equal(varied[:, channel], varied[:, 0])
        assert not torch.allclose(varied, channels, atol=1e-2)

    @pytest.mark.parametrize("fine", [0.0, 0.2])
    def test_bias_field_multiplies_by_a_smooth_field(self, fine):
        flat = torch.full((60, 1, 64, 64), 0.4)
        varied = vary_intensities(flat, 0.0, fine, seeded())
        log_bias = (varied / varied.mean((2, 3), keepdim=True)).log()
        spread = log_bias.std((1, 2, 3))
        assert spread.max() < 0.3 + fine
        assert spread.mean() > 0.02
        steps = log_bias.diff(dim=-1).abs().mean() / log_bias.abs().mean()
        assert bool(steps > 0.1) is (fine > 0)

    def test_each_change_has_its_probability(self):
        images = torch.rand(300, 1, 16, 16, generator=seeded()) * 0.5 + 0.2
        shaded = vary_intensities(images, 0.0, 0.0, seeded())
        always = vary_intensities(images, 1.0, 0.0, seeded())
        assert 0 <= always.min() <= always.max() <= 1
        changed = ((always - shaded).abs() > 1e-4).flatten(1).any(1)
        assert changed.float().mean() > 0.95
        seldom = vary_intensities(images, 0.1, 0.0, seeded())
        # None of six changes: 0.9^6 = 0.53.
        same = ((seldom - shaded).abs() < 1e-6).flatten(1).all(1).float().mean()
        assert float(same) == pytest.approx(0.53, abs=0.1)

    def test_reduce_contrast_keeps_the_order_and_the_relative_differences(self):
        """Fluid, grey and white matter of an MPRAGE scan get the contrast of a spin-echo scan."""
        images = torch.tensor([[0.3, 0.6, 0.9, 1.0, 0.0]]).view(1, 1, 1, 5)
        fluid, grey, white, top, _ = reduce_contrast(images, images > 0, torch.tensor(0.35))[0, 0, 0]
        assert top == 1
        assert float((grey - fluid) / (white - grey)) == pytest.approx(1.0, abs=1e-5)
        # The mean is 0.7, so that the brightest intensity becomes 0.7 + 0.35 * 0.3.
        assert float(white) == pytest.approx((0.7 + 0.35 * 0.2) / 0.805)
        assert float((white - grey) / white) == pytest.approx(0.105 / 0.77, abs=1e-5)
        unchanged = reduce_contrast(images, images > 0, torch.tensor(1.0))
        torch.testing.assert_close(unchanged, images)

    def test_vary_contrast_adds_three_sines_and_is_increasing(self):
        ramp = torch.linspace(0, 1, 500, dtype=torch.float64)
        bent = vary_contrast(ramp.float().expand(1000, 1, 1, 500), seeded())[:, 0, 0].double().numpy()
        assert (np.diff(bent) > 0).all()
        sines = np.sin(np.pi * np.outer([1, 2, 3], ramp))
        heights, *_ = np.linalg.lstsq(sines.T, (bent - ramp.numpy()).T, rcond=None)
        np.testing.assert_allclose(heights.T @ sines, bent - ramp.numpy(), atol=1e-6)
        for wave, drawn in enumerate(heights, start=1):
            assert kstest(drawn * wave / 0.08, "uniform", args=(-1, 2)).pvalue > 1e-3

    def test_smooth_random_field_interpolates_standard_normal_numbers(self):
        """With aligned corners, the nodes of the grid have the drawn values."""
        field = smooth_random_field(50, 4, (81, 61), seeded())
        drawn = torch.randn((50, 1, 5, 5), generator=seeded())
        torch.testing.assert_close(field[..., ::20, ::15], drawn, atol=1e-5, rtol=0)
        steps = field.diff(dim=-1).abs().amax((1, 2, 3))
        assert (steps < 2 * drawn.diff(dim=-1).abs().amax((1, 2, 3)) / 15).all()


def test_score_is_the_mean_probability_of_a_slice_and_its_mirror_image():
    detector = pseudo_trained("pls")
    volume = torch.rand(GRID, generator=seeded())
    x = detector.inputs(volume, [66, 67], slice(32, 192), slice(16, 208))
    brain = torch.zeros(2, 1, 160, 192, dtype=torch.bool)
    brain[..., 20:130, 30:150] = True
    scaled = x.clone()
    scaled[:, :5] = 2 * x[:, :5] - 1  # coordinates and priors are not scaled
    with torch.inference_mode():
        alternating = detector.score(x, brain, []).numpy()
        detector.hyper = replace(detector.hyper, slice_smoothing=0.0)
        score = detector.score(x, brain, []).numpy()
        # Left and right lie along the rows.
        straight, mirrored = (
            detector.network(y).double().numpy() for y in (scaled, scaled[:, :, range(159, -1, -1)])
        )
    one, other = expit(straight), expit(mirrored)[:, :, ::-1]
    expected = (one + other) / 2
    np.testing.assert_allclose(score, np.where(brain, expected, 0), rtol=1e-5)
    # With smoothing across slices, only the mirror image of a slice with an odd number is processed.
    expected_alternating = np.where(brain, np.stack([one[0], other[1]]), 0)
    np.testing.assert_allclose(alternating, expected_alternating, rtol=1e-5)
    assert np.ptp(expected[brain.numpy()]) > 0.5
    # The two directions differ, so that a missing flip would be found.
    assert np.abs(one - other).max() > 0.1


def test_scores_of_a_volume_are_those_of_its_slices():
    detector = pseudo_trained("pls")
    detector.hyper = replace(detector.hyper, slice_smoothing=0.0)
    volume, brain = phantom(70, 76)
    together = anomaly_map(detector, volume, brain, key="a")
    slices, inside = (torch.from_numpy(space.to_slices(part).copy()) for part in (volume, brain))
    slices = slices.clamp(0, 1)
    (field,) = covering_fields(inside, detector.field_of_view)
    scores = torch.zeros(GRID)
    with torch.inference_mode():
        for number in range(70, 76):
            x = detector.inputs(slices, [number], field.rows, field.columns)
            mask = field.cut(inside)[number, None, None]
            field.cut(scores)[number] = detector.score(x, mask, [])[0, 0]
    expected = space.from_slices(masked_median(scores, inside).numpy())
    np.testing.assert_allclose(together, expected, atol=1e-4)
    assert expected.max() > 0.1


def test_training_beats_the_best_constant_prediction():
    """On other slices, the loss is below 75 % of that of the best constant probability."""
    torch.manual_seed(0)
    detector = PLS(replace(SMALL, intensity=0.0))
    batch, fresh = painted_batch(8), painted_batch(4)

    def mean_loss() -> float:
        generator = seeded(1)
        with torch.inference_mode():
            return float(np.mean([detector.loss(fresh, generator) for _ in range(4)]))

    constants = []
    for logit in np.linspace(-5, 1, 7):  # the weights of the last layer are 0
        detector.network.leave.bias.data.fill_(logit)
        constants.append(mean_loss())
    assert 0 < np.argmin(constants) < 6
    detector.network.leave.bias.data.zero_()
    generator = seeded()
    optimiser = torch.optim.AdamW(detector.network.parameters(), lr=3e-3)
    for _ in range(40):
        optimiser.zero_grad()
        detector.loss(batch, generator).backward()
        optimiser.step()
    assert mean_loss() < 0.75 * min(constants)
    assert min(constants) < math.log(2)
