"""Metrics against formulas written out by hand, and on phantoms whose noise is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from statsmodels.robust.scale import mad

from bids_uad.preprocessing.quality import (
    cjv,
    cnr,
    efc,
    image_quality_metrics,
    snr,
    tissue_intensities,
    wm2max,
)

MEANS = {"T1w": {"csf": 200.0, "gm": 600.0, "wm": 900.0}, "T2w": {"csf": 900.0, "gm": 450.0, "wm": 250.0}}
SHARES = {"csf": 0.2, "gm": 0.45, "wm": 0.35}


def voxels(modality: str, noise: float, n: int = 100_000) -> np.ndarray:
    rng = np.random.default_rng(0)
    parts = [rng.normal(MEANS[modality][name], noise, int(n * share)) for name, share in SHARES.items()]
    return np.concatenate(parts)


def test_each_metric_is_its_formula() -> None:
    rng = np.random.default_rng(1)
    wm, gm = rng.normal(900, 30, 501), rng.normal(600, 40, 601)
    n = len(wm)
    sample_std = math.sqrt(sum((value - sum(wm) / n) ** 2 for value in wm) / (n - 1))
    assert snr(wm) == pytest.approx(sorted(wm)[250] / sample_std)
    contrast = sorted(wm)[250] - sorted(gm)[300]
    assert cnr(wm, gm, 7.0) == pytest.approx(contrast / math.sqrt(49 + np.std(wm) ** 2 + np.std(gm) ** 2))
    assert cjv(wm, gm) == pytest.approx((mad(wm) + mad(gm)) / contrast)
    image = np.abs(rng.normal(0, 100, (8, 9, 10)))
    assert wm2max(wm, image) == pytest.approx(sorted(wm)[250] / np.percentile(image, 99.95))


def test_entropy_focus_lies_between_one_voxel_and_all_alike() -> None:
    assert efc(np.full((5, 6, 7), 3.0)) == pytest.approx(1.0)
    one = np.zeros((5, 6, 7))
    one[2, 3, 4] = 9.0
    assert efc(one) == pytest.approx(0.0)
    image = np.random.default_rng(2).random((4, 4, 4)) + 0.1
    energy = math.sqrt(sum(v**2 for v in image.flat))
    entropy = -sum(v / energy * math.log(v / energy) for v in image.flat)
    assert efc(image) == pytest.approx(entropy / (64 / 8 * math.log(8)))


@pytest.mark.parametrize("modality", ["T1w", "T2w"])
def test_tissues_are_told_apart(modality: str) -> None:
    found = tissue_intensities(voxels(modality, noise=35.0), modality)
    for name, share in SHARES.items():
        assert np.median(getattr(found, name)) == pytest.approx(MEANS[modality][name], rel=0.03)
        assert found.shares[name] == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("modality", ["T1w", "T2w"])
def test_noise_lowers_the_ratios_and_raises_the_joint_variation(modality: str) -> None:
    rng = np.random.default_rng(3)
    smooth = gaussian_filter(rng.normal(size=(40, 40, 40)), 3)
    cuts = np.quantile(smooth, [0.2, 0.65])
    order = sorted(MEANS[modality], key=MEANS[modality].get)
    levels = np.array([MEANS[modality][name] for name in order])[np.digitize(smooth, cuts)]
    mask = np.zeros(levels.shape, bool)
    mask[5:-5, 5:-5, 5:-5] = True
    none = np.zeros_like(mask)
    quiet, loud = (
        image_quality_metrics(
            np.abs(np.where(mask, levels, 0) + rng.normal(0, s, mask.shape)), mask, air, modality
        )
        for s, air in ((20.0, ~mask), (60.0, ~mask))
    )
    for name in ("snr_csf", "snr_gm", "snr_wm", "snr_total", "cnr"):
        assert quiet[name] > 1.5 * loud[name], name
    assert quiet["cjv"] < 0.7 * loud["cjv"]
    assert quiet["efc"] < loud["efc"]
    stripped = image_quality_metrics(
        np.where(mask, levels, 0) + rng.normal(0, 20, mask.shape) * mask, mask, none, modality
    )
    assert stripped["cnr"] > quiet["cnr"]


def test_an_image_without_three_tissues_has_no_ratios() -> None:
    image = np.zeros((20, 20, 20))
    image[5:-5, 5:-5, 5:-5] = 100 + np.random.default_rng(4).normal(0, 1e-3, (10, 10, 10))
    assert set(image_quality_metrics(image, image > 0, np.zeros_like(image, bool), "T1w")) == {"efc"}


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_metrics_without_a_value_are_left_out() -> None:
    """Three tissues of one intensity each have no noise, so that their ratio to it is infinite."""
    image = np.repeat([100.0, 500.0, 900.0], 1000).reshape(30, 10, 10)
    mask = np.ones(image.shape, bool)
    found = image_quality_metrics(image, mask, ~mask, "T1w")
    assert "efc" in found
    assert not {"snr_csf", "snr_total", "cnr"} & set(found)
    assert all(math.isfinite(value) for value in found.values())
