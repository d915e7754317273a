"""Quality control: coverage, image quality metrics, warnings and failures."""

from __future__ import annotations

import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.stats import norm, truncnorm
from statsmodels.robust.scale import mad

from bids_uad import space
from bids_uad.preprocessing.interfaces import ResampleToSRI24
from bids_uad.preprocessing.quality import (
    assess_quality,
    cjv,
    cnr,
    coverage_mask,
    efc,
    image_quality_metrics,
    no_signal_mask,
    snr,
    tissue_intensities,
    wm2max,
)
from bids_uad.preprocessing.registration import Volume
from bids_uad.preprocessing.resampling import resample, rotation_about, translation, write_itk

from .conftest import NATIVE_AFFINE, NATIVE_SHAPE, draw, known_move, save, t2w_like
from .test_brain_masks import head_around

MEANS = {
    "T1w": {"csf": 200.0, "gm": 600.0, "wm": 900.0},
    "T2w": {"csf": 900.0, "gm": 450.0, "wm": 250.0},
    "FLAIR": {"csf": 150.0, "gm": 900.0, "wm": 650.0},
}
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


@pytest.mark.parametrize("modality", MEANS)
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
@pytest.mark.parametrize("modality", MEANS)
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


SHAPE = (90, 100, 90)
AFFINE = nib.affines.from_matvec(np.diag([2.0, 2.0, 2.0]), [-89, -99, -89])


def distance(shape: tuple[int, ...] = SHAPE, affine: np.ndarray = AFFINE) -> np.ndarray:
    """From the origin of the world, mm."""
    return np.linalg.norm(nib.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1)), axis=-1)


def head(background: float = 0.0, noise: float = 0.0) -> np.ndarray:
    """A ball of 70 mm in a shell up to 84 mm."""
    values = np.where(distance() < 70, 400.0, np.where(distance() < 84, 900.0, background))
    return values + np.abs(np.random.default_rng(0).normal(0, noise, SHAPE)).round()


BRAIN = distance() < 70


def found(data: np.ndarray, stripped: bool = False, affine: np.ndarray = AFFINE) -> np.ndarray:
    """Ask for the coverage of the grid of `head`."""
    return coverage_mask(Volume(data.astype(np.float32), affine), stripped, SHAPE, AFFINE, np.eye(4))


@pytest.mark.parametrize("stripped", [True, False])
def test_coverage_mask_of_a_smaller_grid_is_its_inside(stripped: bool) -> None:
    move = rotation_about(np.zeros(3), (5.0, -8.0, 12.0)) @ translation(np.array([3.0, -2.0, 1.0]))
    smaller = (90, 100, 60)
    data = np.random.default_rng(0).uniform(100, 200, smaller)
    result = coverage_mask(Volume(data, AFFINE), stripped, SHAPE, AFFINE, move)
    points = nib.affines.apply_affine(np.linalg.inv(AFFINE) @ move @ AFFINE, np.argwhere(BRAIN))
    inside = ((points > -0.5) & (points < np.array(smaller) - 0.5)).all(axis=1)
    assert 0.3 < inside.mean() < 0.8
    assert (result[BRAIN] != inside).mean() < 1e-4  # rounding at the edge


@pytest.mark.parametrize("noise", [0.0, 20.0])
@pytest.mark.parametrize("background", [0.0, -5.0])
def test_coverage_mask_includes_the_brain_of_a_whole_head(background: float, noise: float) -> None:
    assert found(head(background, noise))[BRAIN].all()


def test_coverage_mask_includes_cavities_inside_a_head() -> None:
    data = head()
    data[BRAIN & (np.random.default_rng(1).random(SHAPE) < 0.1)] = 0.0
    data[40:50, 40:50, 40:50] = 0.0
    assert found(data)[BRAIN].all()


def test_coverage_mask_excludes_wedges_of_reslicing() -> None:
    """A slab of 80 mm that was brought to an oblique grid."""
    slab, slab_affine = head()[:, :, 25:65], AFFINE @ translation(np.array([0.0, 0.0, 25.0]))
    move = rotation_about(np.zeros(3), (12.0, 6.0, 0.0))
    resliced = resample(slab, slab_affine, SHAPE, AFFINE, move)
    points = nib.affines.apply_affine(np.linalg.inv(slab_affine) @ move @ AFFINE, np.argwhere(BRAIN))
    inside = (points[:, 2] > -0.5) & (points[:, 2] < 39.5)
    result = found(resliced)[BRAIN]
    assert 0.5 < inside.mean() < 0.8
    assert result[inside].all()
    assert result[~inside].mean() < 0.01


def test_coverage_mask_excludes_an_empty_thick_slice() -> None:
    data = head()[:, :, 10:70:3].copy()
    affine = AFFINE @ translation(np.array([0.0, 0.0, 11.0])) @ np.diag([1.0, 1.0, 3.0, 1.0])
    full = found(data, affine=affine)
    data[:, :, -1] = 0.0
    difference = full & ~found(data, affine=affine)
    assert set(np.flatnonzero(difference[45, 50])) == {67, 68, 69}


def test_coverage_mask_of_a_stripped_brain_includes_the_background() -> None:
    data = np.where(BRAIN, 400.0, 0.0)
    assert found(data, stripped=True).all()
    thick = data[:, :, ::3]
    assert coverage_mask(
        Volume(thick, AFFINE @ np.diag([1.0, 1, 3, 1])), True, (90, 100, 88), AFFINE, np.eye(4)
    ).all()


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("upper", [True, False])
def test_coverage_mask_ends_at_the_cut_of_a_stripped_brain(axis: int, upper: bool) -> None:
    data = np.where(BRAIN, 400.0, 0.0)
    cut = np.moveaxis(np.zeros(SHAPE, bool), axis, 0)
    cut[-30 if upper else slice(30)] = True
    if upper:
        cut[-30:] = True
    cut = np.moveaxis(cut, 0, axis)
    data[cut] = 0.0
    np.testing.assert_array_equal(found(data, stripped=True), ~cut)


def test_coverage_mask_of_a_distant_scan_is_empty() -> None:
    far = translation(np.array([500.0, 0.0, 0.0]))
    assert not coverage_mask(Volume(head(), AFFINE), False, space.SHAPE, space.AFFINE, far).any()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("stripped", [False, True])
def test_resample_to_sri24_limits_the_brain_mask_to_the_coverage(
    stripped: bool, padded: bool, reference_volume: Volume, tmp_path: Path
) -> None:
    """A T2w image that lacks the lowest third of the brain, with the brain mask of its T1w image."""
    brain = draw(reference_volume, known_move(), NATIVE_SHAPE, NATIVE_AFFINE)
    t2w = t2w_like(brain) if stripped else t2w_like(brain) + head_around(brain) * (brain == 0)
    first = 30
    affine = NATIVE_AFFINE @ translation(np.array([0.0, 0.0, 0.0 if padded else first]))
    t2w = np.where(np.arange(NATIVE_SHAPE[2]) < first, 0, t2w) if padded else t2w[:, :, first:]
    files = {
        "in_file": save(tmp_path / "T2w.nii.gz", t2w.astype(np.float32), affine),
        "native_mask": save(tmp_path / "mask.nii.gz", (t2w > 0).astype(np.uint8), affine),
        "to_sri24": write_itk(tmp_path / "to_sri24.txt", known_move()),
        "brain_mask": save(tmp_path / "anchor_mask.nii.gz", (brain > 0).astype(np.uint8), NATIVE_AFFINE),
    }
    files |= {"conformed": files["in_file"], "brain_xfm": files["to_sri24"]}
    interface = ResampleToSRI24(skull_stripped=stripped, **{name: str(path) for name, path in files.items()})
    outputs = interface.run(cwd=str(tmp_path)).outputs
    to_voxel = np.linalg.inv(NATIVE_AFFINE) @ known_move() @ space.AFFINE
    height = nib.affines.apply_affine(to_voxel, np.argwhere(reference_volume.mask))[:, 2]
    found = np.asarray(nib.load(outputs.out_mask).dataobj)[reference_volume.mask] > 0
    assert 0.2 < (height < first).mean() < 0.5
    assert found[height < first - 1].mean() < 0.001
    assert found[height > first].mean() > 0.97
    image = np.asarray(nib.load(outputs.out_file).dataobj)[reference_volume.mask]
    assert image[height < first - 1].max() == 0
    seen = np.asarray(nib.load(outputs.coverage).dataobj)[reference_volume.mask]
    assert 1 - seen.mean() == pytest.approx((height < first - 0.5).mean(), abs=0.02)


def ball(centre: tuple[float, float, float], radius: float) -> np.ndarray:
    """A ball in the world of `head`, mm."""
    moved = AFFINE.copy()
    moved[:3, 3] -= centre
    return distance(affine=moved) < radius


HEIGHT = nib.affines.apply_affine(AFFINE, np.moveaxis(np.indices(SHAPE), 0, -1))[..., 2]
VENTRICLES = ball((0, 0, 0), 20.0)
NO_SIGNAL = {
    "cut top": BRAIN & (HEIGHT > 45),
    "thin cut": BRAIN & (HEIGHT > 62),
    "dark base": BRAIN & ball((0, 45, -50), 25.0),
}
"""Regions of the brain, of 1 to 14 % of it."""


def magnitude(stripped: bool, noise: float, fluid: float, empty: np.ndarray | None = None) -> Volume:
    """A head with fluid in its middle and at the edge of the brain, and noise in magnitude."""
    signal = np.where(VENTRICLES | (BRAIN & (distance() > 66)), fluid, head())
    if empty is not None:
        lowest = HEIGHT[empty].min()
        cut = empty if lowest < 0 else lowest <= HEIGHT
        signal = np.where(cut, 0, signal)
    channels = np.random.default_rng(5).normal(0, noise, (2, *SHAPE))
    data = np.hypot(signal + channels[0], channels[1])
    return Volume(np.where(BRAIN, data, 0.0 if stripped else data).astype(np.float32), AFFINE, BRAIN)


@pytest.mark.parametrize("noise", [0.0, 20.0])
@pytest.mark.parametrize("stripped", [True, False])
@pytest.mark.parametrize("fluid", [60.0, 1200.0], ids=["dark fluid", "bright fluid"])
def test_scans_with_signal_everywhere_lose_no_voxel(fluid: float, stripped: bool, noise: float) -> None:
    assert not no_signal_mask(magnitude(stripped, noise, fluid)).any()


@pytest.mark.parametrize("noise", [4.0, 15.0])
@pytest.mark.parametrize("region", NO_SIGNAL)
def test_regions_without_signal_are_found(region: str, noise: float) -> None:
    empty = NO_SIGNAL[region]
    found = no_signal_mask(magnitude(False, noise, 60.0, empty))
    assert 0.008 < empty.sum() / BRAIN.sum() < 0.15
    assert (found & empty).sum() > 0.93 * empty.sum()
    assert (found & ~empty).sum() < 0.03 * empty.sum()  # dark fluid next to it


def test_regions_without_signal_are_found_in_stripped_scans_with_remnants_of_interpolation() -> None:
    """Voxels near 0 are not background, so that the brain mask includes them."""
    empty = NO_SIGNAL["cut top"]
    scan = magnitude(True, 0.0, 60.0, empty)
    scan.data[empty] = np.random.default_rng(6).uniform(1e-4, 0.5, int(empty.sum()))
    found = no_signal_mask(scan)
    assert found[empty].mean() > 0.95


@pytest.mark.parametrize("contrast", ["FLAIR", "T1w"])
def test_voids_inside_the_brain_and_dark_edges_remain(contrast: str) -> None:
    """Suppressed fluid without any signal in FLAIR, a haemorrhage, and a dark edge of 2 mm."""
    scan = magnitude(True, 3.0, 0.0 if contrast == "FLAIR" else 60.0)
    scan.data[ball((40, 0, 20), 12.0)] = 0.0
    scan.data[BRAIN & (distance() > 68)] = 0.0
    assert not no_signal_mask(scan).any()


def test_a_scan_without_signal_in_most_of_its_brain_mask_is_left_to_other_checks() -> None:
    assert not no_signal_mask(Volume(np.zeros(SHAPE, np.float32), AFFINE, BRAIN)).any()


def test_resample_to_sri24_removes_voxels_without_signal(reference_volume: Volume, tmp_path: Path) -> None:
    brain = draw(reference_volume, known_move(), NATIVE_SHAPE, NATIVE_AFFINE)
    noise = np.random.default_rng(7).uniform(0.001, 1.0, NATIVE_SHAPE)
    empty = (brain > 0) & (np.arange(NATIVE_SHAPE[2]) < 30)
    values = np.where(empty, noise, brain).astype(np.float32)
    files = {
        "in_file": save(tmp_path / "T1w.nii.gz", values, NATIVE_AFFINE),
        "native_mask": save(tmp_path / "mask.nii.gz", (brain > 0).astype(np.uint8), NATIVE_AFFINE),
        "to_sri24": write_itk(tmp_path / "to_sri24.txt", known_move()),
    }
    files["conformed"] = files["in_file"]
    interface = ResampleToSRI24(skull_stripped=True, **{name: str(path) for name, path in files.items()})
    outputs = interface.run(cwd=str(tmp_path)).outputs
    mask = np.asarray(nib.load(outputs.out_mask).dataobj) > 0
    image = np.asarray(nib.load(outputs.out_file).dataobj)
    moved = resample(empty.astype(np.float32), NATIVE_AFFINE, space.SHAPE, space.AFFINE, known_move())
    whole = resample((brain > 0).astype(np.float32), NATIVE_AFFINE, space.SHAPE, space.AFFINE, known_move())
    assert mask[moved > 0.99].mean() < 0.08  # a layer of one voxel at the tissue
    assert mask[(whole > 0.99) & (moved < 0.01)].mean() > 0.99
    assert not image[~mask].any()
    assert outputs.unscored == pytest.approx(1 - mask.sum() / (whole > 0.5).sum(), abs=0.005)
    assert outputs.unscored > 0.1


REGISTRATION = {
    "similarity": 0.3,
    "mirrored_similarity": 0.29,
    "local_correlation": 0.5,
    "mask_overlap": 0.95,
    "restarted": False,
}


def box(low: int, high: int) -> np.ndarray:
    """A cube of (high - low)^3 mm3."""
    mask = np.zeros(space.SHAPE, bool)
    mask[low:high, low:high, 20 : 20 + high - low] = True
    return mask


REFERENCE = box(60, 172)  # 1.4 L


def seen_up_to(height: int) -> np.ndarray:
    """A field of view that ends below a slice."""
    covered = np.ones(space.SHAPE, bool)
    covered[:, :, height:] = False
    return covered


def judged(**changes):
    inputs = {
        "registration": REGISTRATION,
        "skull_stripped": True,
        "mask_origin": "background",
        "rotation": 8.0,
        "brain": REFERENCE,
        "reference": REFERENCE,
        "covered": np.ones(space.SHAPE, bool),
        "unscored": 0.0,
        "lesion": None,
        "image": {"cjv": 0.43219},
        "warnings": {},
    }
    inputs |= {"native_volume_mm3": float(changes.get("brain", REFERENCE).sum())}
    return assess_quality(**inputs | changes)


def test_assess_quality_of_a_good_scan_has_no_warnings() -> None:
    found = judged()
    assert (found["warnings"], found["failures"]) == ([], [])
    assert found["mask_overlap"] == 1.0
    assert found["brain_volume_mm3"] == 112**3
    assert found["cjv"] == 0.4322
    assert judged(unscored=0.009)["warnings"] == []
    assert judged(unscored=0.012345)["unscored_fraction"] == 0.01235


@pytest.mark.parametrize(
    ("changes", "word", "failed"),
    [
        ({"brain": np.roll(REFERENCE, 25, axis=0)}, "only 0.78 (Dice)", False),  # 87 / 112 by hand
        ({"brain": np.roll(REFERENCE, 40, axis=0)}, "check the registration", True),
        ({"brain": box(70, 164)}, "831 mL", False),
        ({"brain": box(76, 152)}, "439 mL", True),
        ({"brain": box(72, 160)}, "681 mL", True),
        ({"covered": seen_up_to(128)}, "4 % of the reference brain lie outside", False),  # 4 of 112 slices
        ({"covered": seen_up_to(90)}, "38 % of the reference brain lie outside", True),  # 42 of 112
        ({"unscored": 0.034}, "3.4 % of the brain mask lie outside", False),
        ({"native_volume_mm3": 1.25 * REFERENCE.sum()}, "Only 80 %", False),
        ({"native_volume_mm3": 2.0 * REFERENCE.sum()}, "Only 50 %", True),
        ({"rotation": 95.0}, "rotated the head by 95 degrees", True),
        ({"registration": REGISTRATION | {"restarted": True}}, "restarted", False),
        ({"lesion": ~REFERENCE}, "of the lesion mask", False),
        (
            {"registration": REGISTRATION | {"similarity": 0.02, "mirrored_similarity": None}},
            "is only 0.020",
            False,
        ),
        (
            {"registration": REGISTRATION | {"similarity": 0.01, "mirrored_similarity": None}},
            "is only 0.010",
            True,
        ),
        ({"registration": REGISTRATION | {"mirrored_similarity": 0.33}}, "left and right swapped", False),
        ({"registration": REGISTRATION | {"mirrored_similarity": 0.6}}, "left and right swapped", True),
        ({"warnings": {"The forms disagree.": False}}, "forms disagree", False),
        ({"warnings": {"Left is right.": True}}, "Left is right", True),
    ],
)
def test_assess_quality_warns_and_fails(changes, word: str, failed: bool) -> None:
    found = judged(**changes)
    assert any(word in text for text in found["warnings"])
    assert bool(found["failures"]) == failed
    assert set(found["failures"]) <= set(found["warnings"])


def test_assess_quality_fails_a_nan_similarity() -> None:
    found = judged(registration=REGISTRATION | {"similarity": float("nan")})
    assert found["similarity"] is None
    assert any("similarity of the scan and its registration target" in text for text in found["failures"])
