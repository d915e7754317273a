"""The training loop on slices small enough to learn in seconds."""

from __future__ import annotations

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch

from bids_uad import space
from bids_uad.engine.ema import MovingAverage
from bids_uad.engine.store import SliceStore, Subject
from bids_uad.engine.training import train_detector
from bids_uad.methods.disyre import Disyre, DisyreHyper
from bids_uad.methods.patchcore import PatchCore
from bids_uad.networks.backbones import BackboneConfig
from bids_uad.networks.corruptions import AnomalyConfig
from bids_uad.networks.ddpmpp import DDPMppConfig

CPU = torch.device("cpu")
TINY = DisyreHyper(
    network=DDPMppConfig(
        size=96,
        width=16,
        multipliers=(1, 2),
        blocks=(1, 1),
        attention=(),
        middle_attention=False,
        dropout=0.0,
    ),
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
        subjects.append(Subject(*paths))
    return SliceStore.build(subjects, folder / "store")


def test_the_store_holds_the_slices(store):
    volume, tissue = brain_volume(1)
    kept = [k for k in range(155) if (tissue[..., k] > 0).sum() >= 400]
    assert len(store) == 2 * len(kept)
    batch = store.batch(np.array([len(store) - 1]), CPU)
    expected = torch.from_numpy(volume[8:232, 8:232, kept[-1]]).float()
    torch.testing.assert_close(batch.slices[0, 0], expected, atol=1e-3, rtol=0)
    assert torch.equal(batch.brain[0, 0], expected > 0)
    assert torch.equal(batch.tissue[0], torch.from_numpy(tissue[8:232, 8:232, kept[-1]]).long())


def test_every_slice_is_seen_once_a_pass(store):
    rng = np.random.default_rng(0)
    batches = store.shuffled(len(store) // 2, rng, CPU)
    both = torch.cat([next(batches).slices for _ in range(2)])
    sums = sorted(both.sum((1, 2, 3)).tolist())
    whole = store.batch(np.arange(len(store)), CPU).slices.sum((1, 2, 3))
    assert sums == pytest.approx(sorted(whole.tolist()))


def test_restoration_is_learnt_and_repeats(store):
    def trained():
        torch.manual_seed(0)
        detector = Disyre(TINY)
        losses: list[float] = []
        train_detector(
            detector, store, seed=3, device=CPU, report=lambda stage, step, steps, loss: losses.append(loss)
        )
        return detector, losses

    detector, losses = trained()
    assert np.mean(losses[-10:]) < 0.4 * np.mean(losses[:5])
    again, _ = trained()
    for name, value in detector.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert detector.codebook.min() < 0.5 < detector.codebook.max()
    assert not detector.network.training


def test_trained_patchcore_marks_what_it_has_not_seen(store):
    torch.manual_seed(0)
    backbone = BackboneConfig(classes=3, widths=(4, 8, 16, 16), window=(96, 96), steps=40, batch_size=4)
    hyper = replace(PatchCore.presets["lite"], backbone=backbone, bank=128, candidates=4_000, bank_slices=40)
    detector = PatchCore(hyper)
    train_detector(detector, store, seed=0, device=CPU)
    batch = store.batch(np.array([10]), CPU)
    odd = batch.slices.clone()
    odd[..., 108:118, 90:100] = 0.05
    with torch.no_grad():
        clean, sick = (detector.score(x, batch.brain, [])[0, 0] for x in (batch.slices, odd))
    assert sick[110:116, 92:98].mean() > 1.3 * clean[batch.brain[0, 0]].mean()


def test_missing_tissue_is_said(tmp_path, store):
    plain = SliceStore.__new__(SliceStore)
    plain.slices, plain.labels, plain.has_tissue = store.slices, store.labels, False
    with pytest.raises(ValueError, match="tissue classes"):
        train_detector(PatchCore(PatchCore.presets["lite"]), plain, seed=0, device=CPU)


def test_moving_average_by_hand():
    module = torch.nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(0.0)
    average = MovingAverage(module, decay=0.999)
    module.weight.data.fill_(1.0)
    expected = 0.0
    for step in (1, 2, 3):
        average.update(module)
        decay = min(0.999, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay)
    average.apply_to(module)
    assert module.weight.item() == pytest.approx(expected)


def test_moving_average_keeps_batch_statistics():
    module = torch.nn.BatchNorm1d(2)
    average = MovingAverage(module, decay=0.999)
    module(torch.randn(8, 2) + 5)
    average.update(module)
    assert torch.equal(average.average.running_mean, module.running_mean)
