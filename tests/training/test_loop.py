"""The training loop on slices small enough to learn in seconds."""

from __future__ import annotations

import itertools
from dataclasses import replace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import ndimage

from bids_uad import space
from bids_uad.engine.protocol import CORRECTED, PUBLISHED
from bids_uad.methods.base import GradientStage
from bids_uad.methods.disyre import Disyre, DisyreHyper
from bids_uad.methods.patchcore import PatchCore
from bids_uad.methods.uniad import UniAD
from bids_uad.networks.backbones import BackboneConfig
from bids_uad.networks.synthetic_anomalies import AnomalyConfig
from bids_uad.training.checkpoint import moving_average
from bids_uad.training.loop import (
    TrainingData,
    TrainingSettings,
    _StageTrainer,
    learning_rate_factor,
    start_fabric,
    train_detector,
)
from bids_uad.training.store import SliceStore, TrainingScan
from tests.methods.tiny import TINY_NETWORK

CPU = torch.device("cpu")
TINY = DisyreHyper(
    network=replace(TINY_NETWORK, size=96),
    window=(96, 96),
    stride=96,
    labels=(74,),
    anomaly=AnomalyConfig(size=(8, 30)),
    steps=50,
    batch_size=4,
    learning_rate=3e-3,
)


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


def test_each_slice_is_used_once_per_epoch(store):
    data = TrainingData(store, np.arange(len(store)), np.arange(0))
    schedule = TrainingSettings(seed=0, steps=10, batch_size=len(store) // 2)
    stage = GradientStage("x", torch.nn.Linear(1, 1), lambda *_: None, 10, 4, 1e-3)
    descent = _StageTrainer(Disyre(TINY), 0, stage, data, schedule, start_fabric(CPU))
    passes = [np.concatenate([descent._slices(step) for step in steps]) for steps in ((1, 2), (3, 4))]
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


@pytest.mark.parametrize("when", [("restoration", 1), ("restoration", 8), ("restoration", 12)])
def test_train_detector_resumes_with_equal_weights(store, tmp_path, when):
    def trained(folder, report=None):
        torch.manual_seed(0)
        network = replace(TINY.network, dropout=0.3, dropout_at=96)
        detector = Disyre(replace(TINY, network=network, steps=12))
        learn(detector, store, folder, report, held_out=8)
        return detector.state_dict()

    def stop(stage, step, steps, loss):
        if (stage, step) == when:
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
        learn(PatchCore(PatchCore.presets["lite"]), plain, tmp_path)


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
