"""The preset `paper` against what the published code computed for the same slice, weights and noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bids_uad.methods.base import Batch
from bids_uad.methods.disyre import severity_table
from bids_uad.methods.itermask import frequency_condition, worst_pixels
from bids_uad.methods.riad import RIAD
from bids_uad.networks.ddpmpp import log_snr
from bids_uad.networks.similarity import ssim_map
from tests.published import Case, FixedNoise


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def assert_same(ours: torch.Tensor | float, published: np.ndarray, relative: float = 1e-5) -> None:
    """Compare, with a tolerance relative to the largest published value."""
    published = np.asarray(published, dtype=np.float64)
    ours = np.asarray(ours, dtype=np.float64)
    assert ours.shape == published.shape
    np.testing.assert_allclose(ours, published, rtol=0, atol=relative * np.abs(published).max())


def filled(name: str, **changes: object):
    case = Case(name)
    detector = case.detector(**changes)
    if name in ("andi", "ddpmpp", "disyre", "riad"):
        case.fill(detector.network)
    elif name == "itermask":
        case.fill(detector.first, "first_", "weight_seed_first")
        case.fill(detector.filler, "filler_", "weight_seed_filler")
    else:
        case.fill(detector)
    return case, detector


class TestDiffusion:
    def test_schedule(self):
        case = Case("andi")
        times = torch.from_numpy(case["times"].astype(np.float64))
        assert_same(log_snr(times), case["log_snr"])

    @pytest.mark.parametrize("name", ["andi", "ddpmpp"])
    def test_network_and_loss(self, name):
        case, detector = filled(name)
        time = torch.tensor([float(case["network_time"])])
        assert_same(detector.network(case.noise(0), time)[:, 0], case["network_output"])
        assert_same(detector.predictor.loss(2 * case.grey() - 1, case.noise(0), time), case["loss"])

    @pytest.mark.slow
    def test_andi_map(self):
        """Where the published map is 0, float32 numbers that are nearly equal cancel."""
        case, detector = filled("andi")
        slices = case.grey()
        ours = detector.score(slices, slices > 0, FixedNoise(case))[:, 0].numpy()
        published, brain = case["anomaly_map"], case["slices_u8"] > 0
        np.testing.assert_array_equal(ours[~brain], 0)
        there = published > 0
        assert (brain & ~there).sum() <= 2
        np.testing.assert_allclose(np.log(ours[there]), np.log(published[there]), atol=0.01)

    def test_ddpmpp_map(self):
        case, detector = filled("ddpmpp")
        slices = case.grey()
        ours = detector.score(slices, slices > 0, FixedNoise(case))[:, 0]
        assert_same(ours, case["map_noise_after_clipping"])


class TestDisyre:
    def test_severities(self):
        assert_same(severity_table(), Case("disyre")["severities"], 1e-6)

    def test_network(self):
        case, detector = filled("disyre")
        label = torch.tensor([int(case["network_label"])])
        ours = detector.network((2 * case.grey() - 1)[..., :128], label)
        assert_same(ours[:, 0], case["network_output"])

    def test_loss(self):
        """Restoring what white noise of a known severity has changed."""
        case, detector = filled("disyre")
        clean = (2 * case.grey() - 1)[..., 40:168]
        corrupted = (clean + 0.2 * case.noise(0, tuple(clean.shape))).clamp(-1, 1)
        label = detector.severity_label(torch.from_numpy(case["loss_severity"]))
        assert_same((detector.restore(corrupted, label) - clean).square().mean(), case["loss"])

    @pytest.mark.slow
    def test_map(self):
        case, detector = filled("disyre")
        slices = case.grey()
        assert_same(detector.score(slices, slices > 0, None)[:, 0], case["anomaly_map"])


class TestIterMask:
    def test_networks(self):
        case, detector = filled("itermask")
        condition = torch.from_numpy(case["condition"])[:, None]
        assert_same(detector.first(condition)[:, 0], case["first_output"])
        stacked = torch.cat([case.noise(900), condition], 1)
        assert_same(detector.filler(stacked)[:, 0], case["filler_output"])

    def test_first_mask_and_losses(self):
        case, detector = filled("itermask")
        slices = case.grey()
        images, condition = 6 * slices - 3, torch.from_numpy(case["condition"])[:, None]
        published = torch.from_numpy(np.unpackbits(case["first_mask"]).reshape(1, 1, 224, 224).astype(bool))
        errors = (images - detector.first(condition)).square()
        assert torch.equal(worst_pixels(errors, slices > 0, detector.hyper.initial_mask_fraction), published)
        assert_same(detector.first_loss(Batch(slices, slices > 0), None), case["loss_first"])
        filled_in = detector.fill(images, condition, published, case.noise(901))
        assert_same((filled_in - images).square().mean(), case["loss_filler"])

    def test_condition(self):
        case = Case("itermask")
        ours = frequency_condition(6 * case.grey() - 3, case.detector().hyper.radius)
        assert_same(ours[:, 0], case["condition"])

    def test_size_of_an_odd_mask(self):
        case = Case("itermask")
        brain = case.grey() > 0
        brain[0, 0, 112, 60] = False
        mask = worst_pixels(case.noise(902).square(), brain, 0.6)
        assert int(mask.sum()) == int(case["odd_mask_pixels"])

    @pytest.mark.parametrize(("number", "name"), [(0, "anomaly_map"), (1, "anomaly_map_one_round")])
    def test_map(self, number, name):
        case, detector = filled("itermask")
        slices = case.grey()
        detector.threshold.fill_(float(case["thresholds"][number]))
        assert_same(detector.score(slices, slices > 0, FixedNoise(case))[:, 0], case[name])


class TestRIAD:
    @staticmethod
    def parts(case: Case, side: int) -> torch.Tensor:
        """The set that each pixel belongs to, shape (1, 1, 224, 224)."""
        sets = torch.from_numpy(case[f"sets_{side}"].astype(np.int64))
        return sets.repeat_interleave(side, 0).repeat_interleave(side, 1)[None, None]

    def test_network_inpainting_and_loss(self):
        case, detector = filled("riad")
        slices = case.grey()
        assert_same(detector.network(slices)[:, 0], case["network_output"])
        restored = detector.inpaint(slices, self.parts(case, 32))
        assert_same(restored[:, 0], case["filled_32"])
        detector.inpaint = lambda *_: restored
        assert_same(detector.loss(Batch(slices, slices > 0), torch.Generator()), case["loss_32"])

    @pytest.mark.slow
    def test_map(self):
        """Random numbers whose ranks are the published sets; a constant is subtracted there."""
        case, detector = filled("riad")
        slices = case.grey()

        class Ranks:
            def uniform(self, side: int, *shape: int) -> torch.Tensor:
                sets = torch.from_numpy(case[f"sets_{side}"].astype(np.float32)).flatten()
                order = torch.argsort(sets, stable=True)
                ranks = torch.empty_like(sets)
                ranks[order] = torch.arange(len(sets), dtype=torch.float32)
                return ranks.view(1, *shape)

        assert isinstance(detector, RIAD)
        ours = detector.score(slices, slices > 0, Ranks())[:, 0].numpy()
        brain = case["slices_u8"] > 0
        assert_same(ours[brain] - float(case["subtracted"]), case["anomaly_map"][brain])


class TestFeatures:
    def test_fae(self):
        case, detector = filled("fae")
        slices = case.grey()
        features = detector.feature_stack(slices)
        restored = detector.autoencoder(features)
        assert_same(features[:, ::16], case["features_every_16th"])
        assert_same(restored[:, ::16], case["network_output_every_16th"])
        assert_same(restored.mean(1), case["network_output_mean"])
        assert_same(detector.loss(Batch(slices, slices > 0), None), case["loss"])
        assert_same(detector.score(slices, slices > 0, None)[:, 0], case["anomaly_map"])

    def test_ssim_of_features_that_resemble_each_other(self):
        case, detector = filled("fae")
        features = detector.feature_stack(case.grey())
        perturbed = 0.9 * features + 3 * case.noise(0, tuple(features.shape))
        assert_same(1 - ssim_map(perturbed, features, window=11).mean(1), case["perturbed_map"], 2e-5)
        loss = 1 - ssim_map(perturbed, features, window=5, valid=True).mean()
        assert_same(loss, case["perturbed_loss"])

    def test_rd(self):
        case, detector = filled("rd")
        slices = case.grey()
        teacher_maps = detector.features(slices)
        student_maps = detector.student(detector.embedding(teacher_maps))
        for k in range(3):
            assert_same(teacher_maps[k].mean(1), case[f"teacher_mean_{k}"])
            assert_same(student_maps[k].mean(1), case[f"network_output_mean_{k}"])
            assert_same(student_maps[k][:, :: 16 * 2**k], case[f"network_output_some_{k}"])
        assert_same(detector.loss(Batch(slices, slices > 0), None), case["loss"])
        assert_same(detector.score(slices, slices > 0, None)[:, 0], case["anomaly_map"])

    def test_uniad(self):
        case, detector = filled("uniad")
        slices = case.grey()
        tokens = detector.tokens(slices)

        def grid(values: torch.Tensor) -> torch.Tensor:
            return values.transpose(1, 2).reshape(1, -1, 14, 14)

        assert_same(grid(tokens), case["features"])
        assert_same(grid(detector.transformer(tokens)), case["network_output"])
        jitter = case.noise(0, (196, 224))[None] * tokens.norm(dim=2, keepdim=True)
        restored = detector.transformer(tokens + jitter * (detector.hyper.jitter / 224))
        assert_same((restored - tokens).square().mean(), case["loss"])
        assert_same(detector.score(slices, slices > 0, None)[:, 0], case["anomaly_map"])
        _, still = filled("uniad", jitter=0.0)
        expected = np.square(case["network_output"] - case["features"]).mean(dtype=np.float64)
        assert_same(still.loss(Batch(slices, slices > 0), torch.Generator()), expected)

    def test_patchcore(self):
        case, detector = filled("patchcore", bank_size=len(Case("patchcore")["bank"]))
        slices = case.grey()
        assert_same(detector.descriptors(slices)[0, ..., ::32], case["descriptors_every_32nd"])
        detector.bank = torch.from_numpy(case["bank"])
        # Squared distances are the differences of much larger numbers.
        assert_same(detector.score(slices, slices > 0, None)[:, 0], case["anomaly_map"], 5e-4)

    def test_patchcore_with_all_places_in_the_bank(self):
        healthy = Case("patchcore").grey("healthy_u8")
        places = len(healthy) * 28**2
        case, detector = filled("patchcore", bank_size=places, candidates=places, bank_slices=len(healthy))
        detector.fit_bank(iter([Batch(healthy, healthy > 0)]), torch.Generator().manual_seed(0))
        slices = case.grey()
        ours = detector.score(slices, slices > 0, None)[:, 0]
        assert_same(ours, case["anomaly_map_every_place_kept"], 2e-3)
