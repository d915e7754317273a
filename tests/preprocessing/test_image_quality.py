"""Image quality metrics against their formulas, and on phantoms of known noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.stats import norm, truncnorm
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
FRACTIONS = {"csf": 0.2, "gm": 0.45, "wm": 0.35}


def voxels(modality: str, noise: float, n: int = 100_000) -> np.ndarray:
    rng = np.random.default_rng(0)
    parts = [
        rng.normal(MEANS[modality][name], noise, int(n * fraction)) for name, fraction in FRACTIONS.items()
    ]
    return np.concatenate(parts)


def test_metrics_equal_their_formulas() -> None:
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


def test_efc_is_0_for_one_voxel_and_1_for_a_uniform_image() -> None:
    assert efc(np.full((5, 6, 7), 3.0)) == pytest.approx(1.0)
    one = np.zeros((5, 6, 7))
    one[2, 3, 4] = 9.0
    assert efc(one) == pytest.approx(0.0)
    image = np.random.default_rng(2).random((4, 4, 4)) + 0.1
    energy = math.sqrt(sum(v**2 for v in image.flat))
    entropy = -sum(v / energy * math.log(v / energy) for v in image.flat)
    assert efc(image) == pytest.approx(entropy / (64 / 8 * math.log(8)))


@pytest.mark.parametrize("modality", ["T1w", "T2w"])
def test_tissue_intensities_segments_three_tissues(modality: str) -> None:
    found = tissue_intensities(voxels(modality, noise=35.0), modality)
    for name, fraction in FRACTIONS.items():
        assert np.median(getattr(found, name)) == pytest.approx(MEANS[modality][name], rel=0.03)
        assert found.fractions[name] == pytest.approx(fraction, abs=0.03)


def expected_intensities(modality: str, std: float, fractions: dict[str, float]) -> dict:
    """Distributions of the tissues between the 1st and the 99th percentile of the brain."""
    order = sorted(fractions, key=MEANS[modality].get)
    low = {order[0]: norm.ppf(0.01 / fractions[order[0]])}
    high = {order[-1]: norm.ppf(1 - 0.01 / fractions[order[-1]])}
    return {
        name: truncnorm(low.get(name, -np.inf), high.get(name, np.inf), loc=MEANS[modality][name], scale=std)
        for name in order
    }


@pytest.mark.parametrize("std", [10.0, 30.0])
@pytest.mark.parametrize("modality", ["T1w", "T2w"])
def test_image_quality_metrics_of_a_phantom_equal_those_of_its_noise(modality: str, std: float) -> None:
    rng = np.random.default_rng(3)
    smooth = gaussian_filter(rng.normal(size=(40, 40, 40)), 3)
    cuts = np.quantile(smooth, [0.2, 0.65])
    order = sorted(MEANS[modality], key=MEANS[modality].get)
    tissue = np.digitize(smooth, cuts)
    mask = np.zeros(tissue.shape, bool)
    mask[5:-5, 5:-5, 5:-5] = True
    levels = np.where(mask, np.array([MEANS[modality][name] for name in order])[tissue], 0)
    fractions = {name: float(np.mean(tissue[mask] == k)) for k, name in enumerate(order)}
    noise = rng.normal(0, std, mask.shape)
    whole = image_quality_metrics(np.abs(levels + noise), mask, ~mask, modality)
    stripped = image_quality_metrics(levels + noise * mask, mask, np.zeros_like(mask), modality)

    tissues = expected_intensities(modality, std, fractions)
    snr_of = {name: dist.median() / dist.std() for name, dist in tissues.items()}
    wm, gm = tissues["wm"], tissues["gm"]
    contrast = abs(wm.median() - gm.median())
    air = std**2 * (1 - 2 / math.pi)  # variance of the half-normal distribution
    deviation = sum(mad(dist.rvs(200_000, random_state=0)) for dist in (wm, gm))
    for name, value in snr_of.items():
        assert whole[f"snr_{name}"] == pytest.approx(value, rel=0.05), name
        trimmed = 0.01 * (name != order[1])  # only the darkest and the brightest tissue lose voxels
        assert whole[f"icvs_{name}"] == pytest.approx((fractions[name] - trimmed) / 0.98, abs=0.002)
    assert whole["snr_total"] == pytest.approx(np.mean(list(snr_of.values())), rel=0.03)
    assert whole["cnr"] == pytest.approx(contrast / math.sqrt(air + wm.var() + gm.var()), rel=0.03)
    assert stripped["cnr"] == pytest.approx(contrast / math.sqrt(wm.var() + gm.var()), rel=0.03)
    assert whole["cjv"] == pytest.approx(deviation / contrast, rel=0.03)
    assert whole["efc"] == pytest.approx(efc(np.abs(levels + noise)))
    assert stripped["efc"] < whole["efc"]


def test_image_quality_metrics_without_three_tissues_has_only_efc() -> None:
    image = np.zeros((20, 20, 20))
    image[5:-5, 5:-5, 5:-5] = 100 + np.random.default_rng(4).normal(0, 1e-3, (10, 10, 10))
    assert set(image_quality_metrics(image, image > 0, np.zeros_like(image, bool), "T1w")) == {"efc"}


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_image_quality_metrics_leaves_out_infinite_ratios() -> None:
    """Three tissues of one intensity each have no noise, so that their SNR is infinite."""
    image = np.repeat([100.0, 500.0, 900.0], 1000).reshape(30, 10, 10)
    mask = np.ones(image.shape, bool)
    found = image_quality_metrics(image, mask, ~mask, "T1w")
    assert "efc" in found
    assert not {"snr_csf", "snr_total", "cnr"} & set(found)
    assert all(math.isfinite(value) for value in found.values())
