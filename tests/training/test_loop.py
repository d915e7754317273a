"""The training loop on slices small enough to learn in seconds."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import lru_cache

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import ndimage

from bids_uad import space
from bids_uad.engine.bundle import CORRECTED, PUBLISHED
from bids_uad.methods.base import FitStage, GradientStage, OptimiserConfig, Scan
from bids_uad.methods.disyre import Disyre, DisyreHyper
from bids_uad.methods.patchcore import PatchCore
from bids_uad.methods.uniad import UniAD
from bids_uad.networks.backbones import BackboneConfig
from bids_uad.networks.synthetic_anomalies import AnomalyConfig
from bids_uad.training import loop
from bids_uad.training.checkpoint import moving_average
from bids_uad.training.loop import (
    TrainingData,
    TrainingSettings,
    _PaintedSlices,
    _StageTrainer,
    _StoredSlices,
    learning_rate_factor,
    start_fabric,
    train_detector,
)
from bids_uad.training.store import SliceStore, TrainingScan
from tests.methods.tiny import TINY_NETWORK

from .train_toy import PaintedToy, Toy, ToyHyper

CPU = torch.device("cpu")
TINY = DisyreHyper(
    network=TINY_NETWORK,
    window=(64, 64),
    stride=64,
    labels=(74,),
    anomaly=AnomalyConfig(size=(8, 30)),
    steps=50,
    batch_size=4,
    learning_rate=3e-3,
)


@lru_cache(maxsize=2)
def brain_volume(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A two-tissue ellipsoid in 30 slices."""
    axes = np.ogrid[tuple(slice(0, size) for size in space.SHAPE)]
    radius = sum(((a - c) / r) ** 2 for a, c, r in zip(axes, (120, 120, 75), (40, 44, 15), strict=True))
    tissue = np.where(radius < 0.4, 2, 1) * (radius < 1)
    noise = np.random.default_rng(seed).normal(0, 0.02, space.SHAPE)
    return (np.take([0, 0.4, 0.8], tissue) + noise).clip(0, 1) * (tissue > 0), tissue.astype(np.uint8)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    subjects = []
    for seed in range(2):
        volume, tissue = brain_volume(seed)
        paths = [folder / f"{seed}_{name}.nii.gz" for name in ("scan", "brain", "tissue")]
        nib.save(space.to_image(volume), paths[0])
        nib.save(space.to_image(tissue > 0, np.uint8), paths[1])
        nib.save(space.to_image(tissue, np.uint8), paths[2])
        subjects.append(TrainingScan(*paths, name=f"sub-{seed}"))
    return SliceStore.build(subjects, folder / "store")


def learn(detector, store, folder, report=None, held_out=0):
    """Train on all slices but the first `held_out`."""
    data = TrainingData(store, np.arange(held_out, len(store)), np.arange(held_out))
    return train_detector(
        detector, data, TrainingSettings(seed=3), folder, fabric=start_fabric(CPU), report=report
    )


def test_slice_store_returns_the_stored_slices(store):
    volume, tissue = brain_volume(1)
    kept = [k for k in range(155) if (tissue[..., k] > 0).sum() >= 400]
    assert len(store) == 2 * len(kept)
    batch = store.batch(np.array([len(store) - 1]), CPU)
    expected = torch.from_numpy(volume[8:232, 8:232, kept[-1]]).float()
    torch.testing.assert_close(batch.slices[0, 0], expected, atol=1e-3, rtol=0)
    assert torch.equal(batch.brain[0, 0], expected > 0)
    assert torch.equal(batch.tissue[0], torch.from_numpy(tissue[8:232, 8:232, kept[-1]]).long())


def test_scan_returns_the_stored_slices_at_their_places(store):
    for number in range(2):
        volume, tissue = (torch.from_numpy(space.to_slices(part)) for part in brain_volume(number))
        scan = store.scan(number)
        kept = (tissue > 0).sum((1, 2)) >= 400
        expected = volume.float() * kept[:, None, None]
        torch.testing.assert_close(scan.slices, expected, atol=1e-3, rtol=0)
        assert torch.equal(scan.brain, (tissue > 0) & kept[:, None, None])
        assert torch.equal(scan.tissue, tissue * kept[:, None, None])
        assert (scan.slices.dtype, scan.tissue.dtype) == (torch.float32, torch.uint8)


def test_scans_without_tissue_are_stored_beside_scans_with_tissue(store, tmp_path):
    folder = store.folder.parent
    scans = [
        TrainingScan(*(folder / f"{seed}_{name}.nii.gz" for name in parts), name="sub-0")
        for seed, parts in ((0, ("scan", "brain")), (1, ("scan", "brain", "tissue")))
    ]
    mixed = SliceStore.build(scans, tmp_path / "mixed")
    assert store.has_tissue
    assert not mixed.has_tissue
    assert mixed.scan(0).tissue is None
    assert torch.equal(mixed.scan(1).tissue, store.scan(1).tissue)
    for number in range(2):  # although both belong to one subject
        assert torch.equal(mixed.scan(number).slices, store.scan(number).slices)
    assert set(mixed.owners) == {0}
    plain = SliceStore.build(scans[:1], tmp_path / "mixed")
    assert plain.tissue is None
    assert not plain.has_tissue


def test_each_slice_is_used_once_per_epoch(store, monkeypatch):
    data = TrainingData.all_of(store)
    stage = GradientStage("x", torch.nn.Linear(1, 1), lambda *_: None, 10, 4, 1e-3)
    settings, fabric = TrainingSettings(seed=0), start_fabric(CPU)
    source = _StoredSlices(Disyre(TINY), 0, stage, len(store) // 2, data, settings, fabric)
    chosen, read = [], store.batch
    monkeypatch.setattr(store, "batch", lambda index, device: chosen.append(index) or read(index, device))
    for step in range(1, 5):
        source.batch(step, np.random.default_rng(step))
    passes = [np.concatenate(chosen[:2]), np.concatenate(chosen[2:])]
    for order in passes:
        assert sorted(order) == list(range(len(store)))
    assert not np.array_equal(*passes)


def test_split_gives_nested_training_fractions_and_fixed_held_out_subjects(tmp_path):
    store = SliceStore.__new__(SliceStore)
    store.names = [f"sub-{k}" for k in range(40)]
    store.owners = np.repeat(np.arange(40), 3)
    sets = [store.split(fraction, 0.05) for fraction in (0.03, 0.1, 0.3, 1)]
    asides = {tuple(aside) for _, aside in sets}
    assert len(asides) == 1
    (aside,) = asides
    assert len(aside) == 2 * 3
    for (smaller, _), (larger, _) in itertools.pairwise(sets):
        assert set(smaller) < set(larger)
    assert len(sets[0][0]) == 3
    assert sorted([*sets[-1][0], *aside]) == list(range(120))


def test_open_or_build_reuses_a_store_of_the_same_scans(store, tmp_path):
    folder = store.folder.parent
    scans = [TrainingScan(folder / "0_scan.nii.gz", folder / "0_brain.nii.gz", name="sub-0")]
    first = SliceStore.open_or_build(scans, tmp_path, CORRECTED)
    written = (first.folder / "pixels.f16").stat().st_mtime_ns
    again = SliceStore.open_or_build(scans, tmp_path, CORRECTED)
    assert again.folder == first.folder
    assert (again.folder / "pixels.f16").stat().st_mtime_ns == written
    assert SliceStore.open_or_build(scans, tmp_path, PUBLISHED).folder != first.folder
    assert len(list(tmp_path.iterdir())) == 2  # nothing unfinished is left


def test_a_store_is_compact(store):
    """Three thousand scans of a brain's size must fit into 25 GB."""
    brain_pixels = int(store.starts[-1])
    size = sum(path.stat().st_size for path in store.folder.iterdir())
    assert size < 3.1 * brain_pixels + len(store) * 224**2 / 8 + 10_000
    whole_brain = 1.6e6 * 3.1 + 140 * 224**2 / 8
    assert 3_000 * whole_brain < 25e9


def test_learning_rate_factor_rises_and_decays():
    rates = [learning_rate_factor(step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(0.05)
    assert max(rates) == pytest.approx(1, abs=0.01)
    assert int(np.argmax(rates)) == 19
    assert rates[-1] < 1e-4


@pytest.mark.parametrize(
    ("schedule", "decay", "norm"),
    [("constant", 0.9999, None), ("constant", None, 0.1), ("constant", None, None), ("cosine", 0.9, 1.0)],
)
def test_train_detector_follows_the_optimiser_settings(store, tmp_path, schedule, decay, norm):
    """Against AdamW in double precision (Loshchilov and Hutter 2019, algorithm 2); the loss has no data."""
    rate, steps, start = 0.05, 12, np.array([1.0, -2.0, 0.5])
    targets = np.random.default_rng(0).normal(0, 2, (steps, 3))

    class Distance(Toy):
        """Half the squared distance of three weights to a target that moves from step to step."""

        def __init__(self):
            super().__init__(ToyHyper())
            self.network = torch.nn.Linear(3, 1, bias=False)
            self.network.weight.data[0] = torch.from_numpy(start)
            self.step = 0

        def stages(self):
            settings = OptimiserConfig(schedule, decay, norm)
            return [GradientStage("toy", self.network, self.loss, steps, 4, rate, settings)]

        def loss(self, batch, generator):
            self.step += 1
            return (self.network.weight[0] - torch.from_numpy(targets[self.step - 1])).square().sum() / 2

    detector = Distance()
    learn(detector, store, tmp_path)
    weights, mean, square, average = start.copy(), np.zeros(3), np.zeros(3), None
    for step, target in enumerate(targets, start=1):
        gradient = weights - target
        if norm is not None:
            gradient *= min(1, norm / np.linalg.norm(gradient))
        # The warm-up of 2 % of the steps is the first step.
        factor = 1 if schedule == "constant" else (1 + np.cos(np.pi * (step - 1) / steps)) / 2
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        change = mean / (1 - 0.9**step) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
        weights = weights - rate * factor * (change + 0.01 * weights)
        kept = 0 if step == 1 or decay is None else min(decay, (1 + step) / (10 + step))
        average = weights if average is None else kept * average + (1 - kept) * weights
    np.testing.assert_allclose(detector.network.weight[0].detach(), average, rtol=1e-5)


def test_fit_stage_uses_held_out_slices_if_there_are_any(store, tmp_path, caplog):
    seen = []

    class Fitted(Toy):
        def stages(self):
            return [FitStage("fit", self.fit, slices=100, batch_size=100, held_out=True)]

        def fit(self, batches, generator):
            seen.append(next(batches).brain.sum().item())

    for held_out in (5, 0):
        learn(Fitted(ToyHyper()), store, tmp_path / str(held_out), held_out=held_out)
    pixels = np.diff(store.starts)
    assert seen == [pixels[:5].sum(), pixels.sum()]
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_store_of_preset_paper_has_all_slices_in_single_precision(tmp_path):
    """Volumes are scaled by minimum and maximum, of which the brain is what is not 0."""
    volume = np.zeros(space.SHAPE, np.float32)
    volume[100:140, 100:150, 70:74] = np.random.default_rng(0).uniform(0.1, 1.3, (40, 50, 4))
    volume[120, 120, 90] = 0.7  # the only pixel of its slice
    for name, image in (("scan", volume), ("brain", volume > 0)):
        nib.save(space.to_image(image, np.float32), tmp_path / f"{name}.nii.gz")
    scan = TrainingScan(tmp_path / "scan.nii.gz", tmp_path / "brain.nii.gz")
    published = SliceStore.build([scan], tmp_path / "store", PUBLISHED)
    scaled = space.to_slices(volume / volume.max())
    kept = scaled.any((1, 2))
    assert published.numbers.tolist() == [70, 71, 72, 73, 90]
    batch = published.batch(np.arange(len(published)), CPU)
    assert np.array_equal(batch.slices[:, 0], scaled[kept])
    assert np.array_equal(batch.brain[:, 0], scaled[kept] != 0)


def test_train_detector_lowers_the_restoration_loss(store, tmp_path):
    torch.manual_seed(0)
    detector = Disyre(TINY)
    losses: list[float] = []
    found = learn(detector, store, tmp_path, lambda stage, step, steps, loss: losses.append(loss), held_out=8)
    assert np.mean(losses[-10:]) < 0.4 * np.mean(losses[:5])
    assert found.training["restoration"] == pytest.approx(np.mean(losses[-5:]))
    assert detector.codebook.min() < 0.5 < detector.codebook.max()
    assert not detector.network.training
    table = pd.read_csv(tmp_path / "training.csv")
    assert table["step"].tolist() == list(range(1, 51))
    checked = table["held_out_loss"].dropna()
    assert len(checked) == 25
    assert checked.iloc[-1] < 0.5 * checked.iloc[0]
    assert found.held_out["restoration"] == checked.iloc[-1]


class _KilledError(Exception):
    pass


def trained_in_six_steps(store, folder, report=None):
    """Return the weights; the only checkpoint is that of the fourth step."""
    torch.manual_seed(0)
    network = replace(TINY.network, dropout=0.3, dropout_at=TINY.network.size)
    detector = Disyre(replace(TINY, network=network, steps=6))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "MIN_STEPS_BETWEEN_CHECKPOINTS", 4)
        learn(detector, store, folder, report, held_out=4)
    return detector.state_dict()


@pytest.fixture(scope="module")
def uninterrupted(store, tmp_path_factory):
    """Weights and log of a training that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    return trained_in_six_steps(store, folder), (folder / "training.csv").read_text()


@pytest.mark.parametrize("when", [1, pytest.param(3, marks=pytest.mark.slow), 5])
def test_train_detector_resumes_with_equal_weights(store, tmp_path, uninterrupted, when):
    def stop(stage, step, steps, loss):
        if step == when:
            raise _KilledError

    with pytest.raises(_KilledError):
        trained_in_six_steps(store, tmp_path, stop)
    resumed, (whole, log) = trained_in_six_steps(store, tmp_path), uninterrupted
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
    assert (tmp_path / "training.csv").read_text() == log


@pytest.fixture
def small_pools(monkeypatch):
    """Pools of two painted scans and ten slices of each, which make five batches of four."""
    monkeypatch.setattr(loop, "SCANS_PER_POOL", 2)
    monkeypatch.setattr(loop, "SLICES_PER_SCAN", 10)


def painted_source(data, batch_size=4):
    toy = PaintedToy(ToyHyper())
    (stage,) = toy.stages()
    return _PaintedSlices(toy, 0, stage, batch_size, data, TrainingSettings(seed=2), start_fabric(CPU))


def test_each_scan_is_painted_once_per_epoch(monkeypatch):
    class Five:
        """Five scans of four slices."""

        scans = np.repeat(np.arange(5), 4)

        def scan(self, number):
            return Scan(torch.full((1, 2, 2), float(number)), torch.ones(1, 2, 2, dtype=torch.bool))

    monkeypatch.setattr(loop, "SCANS_PER_POOL", 3)
    source = painted_source(TrainingData(Five(), np.arange(20), np.arange(0)))
    painted = []
    source.stage = replace(
        source.stage, paint=lambda scan, generator: painted.append(int(scan.slices[0, 0, 0]))
    )
    for pool in range(5):
        source._paint_pool(pool)
    epochs = np.array(painted).reshape(3, 5)
    assert np.array_equal(np.sort(epochs, 1), np.tile(np.arange(5), (3, 1)))
    assert not (epochs[0] == epochs[1]).all()
    # A pool can be painted again after an interruption.
    painted.clear()
    source._paint_pool(1)
    assert painted == [*epochs[0, 3:], epochs[1, 0]]


def test_painted_batches_hold_the_slices_of_a_pool(store, small_pools):
    data = TrainingData.all_of(store)
    source = painted_source(data)
    batches = [source.batch(step, np.random.default_rng(step)) for step in range(1, 6)]
    _, scans, order = source.pool
    assert len(set(map(tuple, order.tolist()))) == len(order) == 20
    assert np.bincount(order[:, 0]).tolist() == [10, 10]
    for number, at in order:
        assert scans[number].brain[at].sum() >= 400
    for step, batch in enumerate(batches):
        pairs = order[4 * step : 4 * step + 4]
        assert batch.inputs.shape == (4, 1, 224, 224)
        for part, name in ((batch.inputs, "slices"), (batch.target, "target"), (batch.weight, "weight")):
            expected = torch.stack([getattr(scans[number], name)[at] for number, at in pairs])
            assert torch.equal(part[:, 0], expected)
    before = source.pool
    source.batch(6, np.random.default_rng(6))
    assert source.pool[0] == 1
    assert not torch.equal(source.pool[1][0].slices, before[1][0].slices)


def test_held_out_loss_of_painted_scans_repeats(store, small_pools):
    data = TrainingData(store, np.flatnonzero(store.scans == 0), np.flatnonzero(store.scans == 1))
    torch.manual_seed(0)
    toy = PaintedToy(ToyHyper())
    (stage,) = toy.stages()
    trainers = [
        _StageTrainer(toy, 0, stage, data, TrainingSettings(seed=seed), start_fabric(CPU))
        for seed in (2, 2, 3)
    ]
    for trainer in trainers:
        trainer.average.update_parameters(toy.network)
    losses = [trainer._held_out_loss() for trainer in (trainers[0], *trainers)]
    assert losses[0] == losses[1] == losses[2] != losses[3]
    (painted,) = trainers[0].source.held_out_scans
    brightness = painted.slices.max() / store.scan(1).slices.max()
    assert torch.allclose(painted.slices, brightness * store.scan(1).slices)


@pytest.mark.parametrize("when", [1, 11])
def test_painted_training_resumes_within_a_pool_with_equal_weights(store, small_pools, tmp_path, when):
    """The checkpoint is written after the first of three steps of the fourth pool."""

    def trained(folder, report=None):
        torch.manual_seed(0)
        toy = PaintedToy(ToyHyper())
        data = TrainingData(store, np.flatnonzero(store.scans == 0), np.flatnonzero(store.scans == 1))
        settings = TrainingSettings(seed=3, batch_size=6)  # three steps of each pool
        train_detector(toy, data, settings, folder, fabric=start_fabric(CPU), report=report)
        return toy.state_dict()

    def stop(stage, step, steps, loss):
        if step == when:
            raise _KilledError

    with pytest.raises(_KilledError):
        trained(tmp_path / "stopped", stop)
    stopped, whole = trained(tmp_path / "stopped"), trained(tmp_path / "whole")
    for name, value in whole.items():
        assert torch.equal(value, stopped[name]), name
    logs = [(tmp_path / folder / "training.csv").read_text() for folder in ("stopped", "whole")]
    assert logs[0] == logs[1]


def test_trained_patchcore_scores_a_patch_of_unseen_intensity(store, tmp_path):
    torch.manual_seed(0)
    backbone = BackboneConfig(classes=3, widths=(4, 8, 16, 16), window=(96, 96), steps=40, batch_size=4)
    hyper = replace(
        PatchCore.presets["lite"], backbone=backbone, bank_size=128, candidates=4_000, bank_slices=40
    )
    detector = PatchCore(hyper)
    learn(detector, store, tmp_path)
    batch = store.batch(np.array([10]), CPU)
    altered = batch.slices.clone()
    altered[..., 108:118, 90:100] = 0.05
    with torch.no_grad():
        before, after = (detector.score(x, batch.brain, [])[0, 0] for x in (batch.slices, altered))
    # The change of the scores is centred on the patch, within a cell of the feature grid, not on the brain.
    centre = ndimage.center_of_mass(np.maximum((after - before).numpy(), 0))
    np.testing.assert_allclose(centre, (112.5, 94.5), atol=6)


def test_train_detector_without_tissue_classes_is_an_error(tmp_path, store):
    folder = store.folder.parent
    scans = [TrainingScan(folder / "0_scan.nii.gz", folder / "0_brain.nii.gz")]
    plain = SliceStore.build(scans, tmp_path / "plain")
    with pytest.raises(ValueError, match="tissue classes"):
        learn(PatchCore(replace(PatchCore.presets["lite"], backbone=BackboneConfig())), plain, tmp_path)


def test_moving_average_by_hand():
    module = torch.nn.Linear(1, 1, bias=False)
    average = moving_average(module, decay=0.3)
    expected = 5.0  # the first update copies
    for step, value in enumerate((5.0, 1.0, -2.0, 4.0), start=1):
        module.weight.data.fill_(value)
        average.update_parameters(module)
        if step > 1:
            decay = min(0.3, (1 + step) / (10 + step))  # 3/12, 4/13, then 0.3
            expected = decay * expected + (1 - decay) * value
    assert average.module.weight.item() == pytest.approx(expected)


def test_moving_average_keeps_batch_statistics():
    module = torch.nn.BatchNorm1d(2)
    average = moving_average(module, decay=0.999)
    module(torch.randn(8, 2) + 5)
    average.update_parameters(module)
    assert torch.equal(average.module.running_mean, module.running_mean)


def test_resumed_later_stage_keeps_features_unchanged(store, tmp_path):
    """What is not being trained keeps its batch statistics, whether or not the run was broken off."""
    backbone = BackboneConfig(widths=(4, 8, 8, 16), window=(96, 96), steps=3, batch_size=2)
    hyper = replace(UniAD.presets["lite"], backbone=backbone, steps=3, batch_size=2)

    def detector():
        torch.manual_seed(0)
        return UniAD(hyper)

    def stop(stage, step, steps, loss):
        if stage == "transformer":
            raise KeyboardInterrupt

    whole, broken, gone_on = detector(), detector(), detector()
    learn(whole, store, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        learn(broken, store, tmp_path / "broken", stop)
    learn(gone_on, store, tmp_path / "broken")
    for name, value in whole.state_dict().items():
        assert torch.equal(gone_on.state_dict()[name], value), name


class Diverging(Disyre):
    """A loss, or a gradient, that is no number from the fourth step on."""

    def __init__(self, what: str) -> None:
        super().__init__(TINY)
        self.what, self.step = what, 0

    def stages(self) -> list:
        stage = next(stage for stage in super().stages() if isinstance(stage, GradientStage))

        def loss(batch, generator):
            self.step += 1
            value = stage.loss(batch, generator)
            if self.step < 4:
                return value
            # The square root of 0 is finite, and its slope is not.
            return value * torch.nan if self.what == "loss" else value + (value - value).sqrt()

        return [replace(stage, loss=loss)]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_diverging_training_is_an_error_with_stage_and_step(store, tmp_path, what):
    torch.manual_seed(0)
    detector = Diverging(what)
    with pytest.raises(ValueError, match=rf"the {what} of stage '\w+' is nan at step 4"):
        learn(detector, store, tmp_path, None)
    assert all(bool(value.isfinite().all()) for value in detector.state_dict().values())


def test_a_stage_that_leaves_nan_behind_is_named(store, tmp_path):
    class Damaged(PatchCore):
        def stages(self) -> list:
            *_, stage = super().stages()
            return [replace(stage, fit=lambda batches, generator: self.bank.fill_(torch.nan))]

    backbone = BackboneConfig(widths=(4, 8, 8, 16))
    detector = Damaged(replace(PatchCore.presets["lite"], backbone=backbone, bank_size=16))
    with pytest.raises(ValueError, match="NaN or infinite values in bank after stage"):
        learn(detector, store, tmp_path, None)
