"""Disyre against closed forms and a literal sliding window."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from bids_uad.methods import disyre
from bids_uad.methods.base import Batch
from bids_uad.methods.disyre import (
    Disyre,
    DisyreHyper,
    intensity_centres,
    severity_table,
    window_starts,
    window_weight,
)
from tests.methods.tiny import TINY_NETWORK

TINY = DisyreHyper(
    network=TINY_NETWORK,
    window=(64, 64),
    stride=32,
)
TWO_LABELS = replace(TINY, labels=(74, 24))


def with_random_output(hyper=TINY):
    torch.manual_seed(0)
    detector = Disyre(hyper).eval()
    torch.nn.init.normal_(detector.network.leave.weight, std=0.1)
    return detector


@pytest.fixture
def slices():
    generator = torch.Generator().manual_seed(0)
    brain = torch.zeros(3, 1, 224, 224, dtype=torch.bool)
    brain[:, :, 50:150, 60:190] = True
    return torch.rand(3, 1, 224, 224, generator=generator) * brain, brain


def test_severity_table_is_the_published_one():
    table = severity_table()
    severity = 1.0
    for label in range(100):
        severity *= 1 - (0.001 + 0.199 * label / 99)
        assert float(table[label]) == pytest.approx(severity**0.5, rel=1e-6)
    printed = {0: 0.9995, 24: 0.7266, 49: 0.2724, 74: 0.0508, 99: 0.0045}
    assert table[list(printed)].tolist() == pytest.approx(list(printed.values()), abs=5e-5)


def test_severity_label_decreases_with_severity():
    labels = with_random_output().severity_label(torch.tensor([1.0, 0.7266, 0.2724, 0.0]))
    assert labels.tolist() == [0, 24, 49, 99]


def test_score_is_the_mean_change_of_blended_windows_over_labels(slices):
    detector = with_random_output(TWO_LABELS)
    x, brain = (part[:2] for part in slices)
    with torch.no_grad():
        ours = detector.score(x, brain, [])
        # One window position and label at a time, one slice at a time.
        rows = columns = [0, 32, 64, 96, 128, 160]
        offset = torch.arange(64) - 31.5
        profile = torch.exp(-0.5 * (offset / 8) ** 2)
        weight = (profile[:, None] * profile[None]).clamp_min(1e-3)
        for index in range(2):
            total = torch.zeros(224, 224)
            for label in (74, 24):
                top, bottom = torch.zeros(224, 224), torch.zeros(224, 224)
                for row in rows:
                    for column in columns:
                        patch = 2 * x[index : index + 1, :, row : row + 64, column : column + 64] - 1
                        restored = detector.network(patch, torch.tensor([label]))[0, 0]
                        top[row : row + 64, column : column + 64] += weight * restored
                        bottom[row : row + 64, column : column + 64] += weight
                total += (2 * x[index, 0] - 1 - top / bottom).abs()
            expected = torch.where(brain[index, 0], total / 2, 0)
            torch.testing.assert_close(ours[index, 0], expected, atol=1e-5, rtol=1e-4)


def test_an_untrained_network_with_predict_residual_is_the_identity():
    detector = Disyre(replace(TINY, predict_residual=True)).eval()
    x = torch.rand(1, 1, 64, 64)
    assert torch.equal(detector.restore(x, torch.tensor([24])), x)


def test_foreground_weighting_multiplies_by_the_fraction_of_brain(slices):
    x, brain = (part[:1] for part in slices)
    plain = with_random_output(TWO_LABELS)
    weighted = with_random_output(replace(TWO_LABELS, foreground_weighting=True))
    with torch.no_grad():
        ratio = weighted.score(x, brain, [])[brain] / plain.score(x, brain, [])[brain]
    torch.testing.assert_close(ratio, torch.full_like(ratio, 100 * 130 / 224**2))


def test_score_does_not_depend_on_the_chunk_size(slices, monkeypatch):
    detector = with_random_output(TWO_LABELS)
    x, brain = (part[:1] for part in slices)
    with torch.no_grad():
        whole = detector.score(x, brain, [])
        monkeypatch.setattr(disyre, "CPU_PATCHES", 7)
        torch.testing.assert_close(detector.score(x, brain, []), whole, atol=1e-6, rtol=1e-5)


def test_fit_codebook_finds_the_tissue_intensities():
    detector = Disyre(replace(TINY, codebook_size=2))
    x = torch.zeros(2, 1, 224, 224)
    x[:, :, 40:80, 40:80], x[:, :, 80:120, 40:80] = 0.3, 0.8
    detector.fit_codebook(iter([Batch(x, x > 0)]), torch.Generator())
    torch.testing.assert_close(detector.codebook, torch.tensor([0.3, 0.8]))


def test_presets_that_ship():
    assert set(Disyre.presets) == {"paper", "default", "lite"}
    paper = Disyre.presets["paper"]
    assert paper.network.causal
    assert not paper.network.activate_second
    assert paper.stride == 32
    with torch.device("meta"):
        lite = sum(p.numel() for p in Disyre(Disyre.presets["lite"]).parameters())
    assert lite * 4 < 5e6  # bytes: a bundle stays below 5 MB


@pytest.mark.parametrize(
    ("extent", "window", "stride", "expected"),
    [(224, 128, 32, [0, 32, 64, 96]), (160, 128, 64, [0, 32]), (192, 192, 80, [0]), (192, 128, 64, [0, 64])],
)
def test_window_starts_cover_the_axis(extent, window, stride, expected):
    assert window_starts(extent, window, stride) == expected


def test_window_weight_is_gaussian_with_a_floor():
    weight = window_weight(128, 128, torch.device("cpu"))
    assert weight[64, 64] == pytest.approx(np.exp(-0.5 * 2 * (0.5 / 16) ** 2), rel=1e-5)
    assert weight.min() == pytest.approx(1e-3)


def test_intensity_centres_are_the_means_of_a_mixture():
    rng = np.random.default_rng(0)
    values = np.concatenate(
        [rng.normal(m, 0.02, n) for m, n in ((0.1, 500), (0.35, 900), (0.6, 600), (0.9, 400))]
    )
    centres = intensity_centres(rng.permutation(values), 4)
    np.testing.assert_allclose(centres, [0.1, 0.35, 0.6, 0.9], atol=3e-3)
    assert centres.dtype == np.float32


def test_intensity_centres_of_many_values_are_computed_from_quantiles(monkeypatch):
    values = np.random.default_rng(0).beta(2, 5, 20_000)
    every = intensity_centres(values, 3)
    monkeypatch.setattr(disyre, "CODEBOOK_SAMPLES", 5_000)
    np.testing.assert_allclose(intensity_centres(values, 3), every, atol=2e-3)
