"""The networks that the default detector is compared with: other output heads, and patches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import expit, log_expit, log_softmax
from torch import nn

from benchmarks import depth, heads, mirror
from bids_uad.dataset.sri24_scans import PreprocessedScan
from bids_uad.methods.base import PaintedBatch, PaintedScan, Scan
from bids_uad.methods.pls.detector import PLS
from bids_uad.space import CROP, SHAPE, to_image, to_slices

HYPER = PLS.presets["lite"]
CHANNELS = HYPER.intensity_channels + 9


class _Logits(nn.Module):
    """Network with given outputs."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, x):
        return self.logits


def _batch(coded, weight):
    shape = (*coded.shape[:1], CHANNELS, *coded.shape[2:])
    return PaintedBatch(torch.zeros(shape), torch.ones(coded.shape, dtype=bool), coded, weight)


@pytest.mark.parametrize("kind", [heads.SizeHeads, heads.TissueHead])
def test_heads_start_with_the_scores_of_a_single_output(kind):
    torch.manual_seed(0)
    single = PLS(HYPER).eval()
    nn.init.normal_(single.network.leave.weight, std=0.1)
    detector = kind(HYPER).eval()
    detector.continue_from({f"network.{name}": w for name, w in single.network.state_dict().items()})
    inputs, brain = torch.rand(2, CHANNELS, 160, 192), torch.rand(2, 1, 160, 192) < 0.9
    with torch.inference_mode():
        expected = single.score(inputs, brain, None)
        assert expected.std() > 0.01
        assert torch.equal(detector.score(inputs, brain, None), expected)


def test_mirror_images_are_processed_as_named():
    torch.manual_seed(0)
    alternating = PLS(HYPER).eval()
    nn.init.normal_(alternating.network.leave.weight, std=0.1)
    unsmoothed, both, straight = (
        kind(hyper).eval()
        for kind, hyper in (
            (PLS, replace(HYPER, slice_smoothing=0.0)), (mirror.Both, HYPER), (mirror.Straight, HYPER)
        )
    )  # fmt: skip
    for other in (unsmoothed, both, straight):
        other.load_state_dict(alternating.state_dict())
    inputs = alternating.inputs(torch.rand(SHAPE[2], CROP, CROP), [70, 71], slice(32, 192), slice(16, 208))
    brain = torch.rand(2, 1, 160, 192) < 0.9
    with torch.inference_mode():
        expected = unsmoothed.score(inputs, brain, None)
        torch.testing.assert_close(both.score(inputs, brain, None), expected)
        one = straight.score(inputs, brain, None)
        assert torch.equal(one[0], alternating.score(inputs, brain, None)[0])
        assert (one - expected).abs().max() > 0.01


def test_the_size_of_a_lesion_is_that_of_all_its_slices():
    target = torch.zeros(60, 80, 80, dtype=torch.float16)
    target[2:7, 2:12, 2:12] = 1  # 0.5 mL
    target[10:30, 20:40, 20:40] = 0.5  # 8 mL
    target[10:50, 45:75, 45:75] = 1  # 36 mL
    scan = PaintedScan(target, target >= 0, target, target)
    found = heads.SizeHeads(HYPER).classes(None, scan)
    assert torch.equal(found > 0, target > 0)
    assert [found[k].item() for k in ((5, 5, 5), (20, 30, 30), (45, 60, 60))] == [1, 2, 3]


def test_each_head_is_trained_on_lesions_of_its_size():
    rng = np.random.default_rng(0)
    shape = (2, 1, 6, 8)
    size = rng.integers(0, 4, shape)
    target = np.where(size > 0, rng.choice([0.25, 1.0], shape), 0.0)
    weight, logits = rng.random(shape), rng.normal(size=(2, 3, 6, 8))
    detector = heads.SizeHeads(HYPER)
    detector.network = _Logits(torch.tensor(logits))
    coded = torch.tensor(target + 2 * size).half().double()  # stored as float16
    loss = detector.loss(_batch(coded, torch.tensor(weight)), torch.Generator().manual_seed(0))
    expected = []
    for head in range(3):
        t, w = target * (size == head + 1), weight * np.isin(size, (0, head + 1))
        x = logits[:, [head]]
        expected.append((w * -(t * log_expit(x) + (1 - t) * log_expit(-x))).sum() / max(1, w.sum()))
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-6)


def test_tissue_is_learnt_outside_of_lesions():
    rng = np.random.default_rng(1)
    shape = (2, 1, 6, 8)
    tissue, weight = rng.integers(0, 6, shape), rng.random(shape)
    target = rng.choice([0.0, 0.5, 1.0], shape)
    logits = rng.normal(size=(2, 6, 6, 8))
    detector = heads.TissueHead(HYPER)
    detector.network = _Logits(torch.tensor(logits))
    coded = torch.tensor(target + 2 * tissue).half().double()
    loss = detector.loss(_batch(coded, torch.tensor(weight)), torch.Generator().manual_seed(0))
    x = logits[:, :1]
    lesions = (weight * -(target * log_expit(x) + (1 - target) * log_expit(-x))).sum() / max(1, weight.sum())
    logs = log_softmax(logits[:, 1:], axis=1)
    of_class = np.take_along_axis(logs, np.maximum(tissue - 1, 0), 1)
    known = (tissue > 0) & (target == 0)
    assert loss.item() == pytest.approx(lesions - 0.3 * of_class[known].mean(), rel=1e-6)


def test_a_tissue_head_needs_tissue_maps():
    scan = Scan(torch.zeros(2, 4, 4), torch.ones(2, 4, 4, dtype=bool))
    with pytest.raises(ValueError, match="no tissue maps"):
        heads.TissueHead(HYPER).classes(scan, None)


def test_folding_moves_neighbouring_voxels_to_channels():
    x = torch.rand(2, 1, 8, 6, 4)
    folded = depth._fold(x)
    assert folded.shape == (2, 8, 4, 3, 2)
    block = x[0, 0, 2:4, 4:6, 2:4].flatten()
    assert torch.equal(folded[0, :, 1, 2, 1].sort().values, block.sort().values)
    assert torch.equal(depth._unfold(folded), x)


def test_patches_are_cut_at_their_place_and_centred_in_the_brain(monkeypatch):
    brain = torch.zeros(155, CROP, CROP, dtype=bool)
    brain[60:120, 90:150, 80:160] = True
    index = torch.arange(brain.numel()).view(brain.shape) / brain.numel()
    detector = PLS(HYPER)
    monkeypatch.setattr(
        detector, "paint", lambda scan, generator: PaintedScan(index * brain, brain, brain * 1.0, index)
    )
    store = type("Store", (), {"scans": np.array([0, 0, 1]), "scan": lambda self, number: None})()
    for _, (image, place, target, weight, _) in zip(
        range(12), depth.patches(detector, store, 0), strict=False
    ):
        assert image.shape == target.shape == (1, 1, 96, 96, 96)
        start = np.unravel_index(round(weight[0, 0, 0, 0, 0].item() * brain.numel()), brain.shape)
        box = tuple(slice(first, first + 96) for first in start)
        assert torch.equal(target[0, 0] > 0, brain[box])
        assert torch.equal(image[0, 0], (index * brain)[box])
        assert (target > 0).any()
        across = abs(np.arange(start[1], start[1] + 96) - (CROP - 1) / 2) / 70
        np.testing.assert_allclose(place[0, 0, 0, :, 0], across, rtol=1e-5)


def test_the_whole_volume_is_scored_and_every_third_slice_returned(tmp_path):
    rng = np.random.default_rng(0)
    brain = np.zeros(SHAPE, np.float32)
    brain[100:140, 100:150, 40:130] = 1
    lesion = brain * (rng.random(SHAPE) < 0.1)
    files = {"image": brain * rng.random(SHAPE), "brain": brain, "lesion": lesion}
    for name, volume in files.items():
        to_image(volume.astype(np.float32)).to_filename(tmp_path / f"{name}.nii.gz")
    scan = PreprocessedScan("sub-1", *(tmp_path / f"{name}.nii.gz" for name in files), None)
    scores, labels = depth.score_whole(PLS(HYPER), lambda image, place: image, scan)
    chosen = to_slices(brain) > 0
    chosen[np.arange(155) % 3 > 0] = False
    intensity = np.clip(to_slices(files["image"]), 0, None)[chosen]
    top = np.percentile(files["image"][brain > 0], 99.5)
    np.testing.assert_allclose(scores, expit(2 * np.clip(intensity / top, 0, 1) - 1), atol=2e-3)
    assert np.array_equal(labels, to_slices(lesion)[chosen] > 0)
