from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from scipy import ndimage, stats

from bids_uad.simulation import ageing
from bids_uad.simulation import pathology as lesions
from bids_uad.simulation.acquisition import draw_scan_settings, draw_scanner, simulate_preprocessed_scan
from bids_uad.simulation.anatomy import CLASSES, template_source
from bids_uad.simulation.contrast import CONTRASTS, class_means, simulate_signal
from bids_uad.simulation.pathology import KINDS, LesionTarget, make_lesion
from bids_uad.simulation.spatial import BOX_SHAPE, box_points, smooth
from bids_uad.simulation.subject import (
    Population,
    draw_subject_info,
    make_signal,
    random_stream,
)
from bids_uad.space import icbm_to_sri24

from .conftest import INDEX, POPULATION, SEED


@pytest.fixture(scope="module")
def signal(subject, healthy, stroke):
    """Return `make_signal` of a healthy subject or one with a stroke, each scan simulated once."""
    anatomies = {"healthy": healthy, "stroke": stroke}

    @cache
    def simulated(anatomy: str, modality: str):
        with torch.no_grad():
            return make_signal(POPULATION, INDEX, subject, anatomies[anatomy], modality)

    return simulated


def region_mean(image: torch.Tensor, share: torch.Tensor) -> float:
    return float(image[share > 0.9].mean())


@pytest.mark.parametrize("modality", CONTRASTS)
def test_tissue_order_of_means(modality, healthy, signal):
    image, settings, _ = signal("healthy", modality)
    with torch.no_grad():
        image = simulate_preprocessed_scan(
            image, settings, healthy.brain, random_stream(SEED, INDEX, f"{modality}-scan")
        )
    fluid, grey, white = (
        region_mean(image, healthy.fractions[CLASSES.index(name)])
        for name in ("ventricle", "cortex", "white")
    )
    order = {
        "T1w": fluid < grey < white,
        "T2w": white < grey < fluid,
        "FLAIR": 1.5 * fluid < white < grey,
    }
    assert order[modality]


def test_class_means_of_flair_are_those_of_fluid_attenuated_scans():
    drawn = [class_means("FLAIR", "gradient_echo", np.random.default_rng(seed)) for seed in range(200)]
    for means in drawn:
        assert 0.08 <= means["ventricle"] <= 0.25
        assert 0.70 <= means["white"] <= 0.88
        assert means["ventricle"] * 0.9 < means["csf"] < 0.5 * means["white"]
    average = {name: np.mean([means[name] for means in drawn]) for name in CLASSES}
    assert average["pallidum"] < average["white"] < average["brainstem"] < average["thalamus"]
    assert average["thalamus"] < average["striatum"] < average["cortex"] < average["hippocampus"]


def test_flair_leaves_t1w_and_t2w_scans_unchanged(subject, signal):
    """The figures were computed before FLAIR was added to the simulator."""
    means = subject.scanner.means
    assert means["T1w"]["choroid"] == pytest.approx(0.8191710347577735, rel=1e-12)
    assert means["T2w"]["choroid"] == pytest.approx(0.5750535051675547, rel=1e-12)
    for modality, noise, total in (
        ("T1w", 0.0062410816179348655, 3579388.72590816),
        ("T2w", 0.0052672789405525935, 2888351.931238681),
    ):
        image, settings, _ = signal("stroke", modality)
        assert settings.noise == pytest.approx(noise, rel=1e-12)
        assert settings.thickness == 3.5
        assert float(image.double().sum()) == pytest.approx(total, rel=1e-6)


def test_thick_slices_are_most_frequent_in_flair_scans():
    scanner = replace(draw_scanner(0, False, np.random.default_rng(0)), thick=0.1)
    thickness = {}
    for modality in CONTRASTS:
        rng = np.random.default_rng(1)
        thickness[modality] = np.array(
            [draw_scan_settings(scanner, modality, rng).thickness for _ in range(500)]
        )
    shares = [np.mean(thickness[modality] > 1) for modality in CONTRASTS]
    np.testing.assert_allclose(shares, [0.1, 0.35, 0.6], atol=0.06)
    thick = thickness["FLAIR"][thickness["FLAIR"] > 1]
    assert 3.0 <= thick.min() < 3.3
    assert 5.7 < thick.max() <= 6.0


def test_flair_of_healthy_subjects_is_bright_beside_ventricles_and_where_fluid_pulsates(healthy):
    means = class_means("FLAIR", "gradient_echo", np.random.default_rng(0))
    fractions, none = healthy.fractions, torch.zeros(BOX_SHAPE)
    ventricle = fractions[CLASSES.index("ventricle")]
    white = fractions[CLASSES.index("white")] > 0.95
    near = smooth(ventricle, 1.5)
    fluid = ventricle + fractions[CLASSES.index("csf")] > 0.9
    places = torch.tensor(icbm_to_sri24() @ np.array([[0, -46, -32, 1], [0, 10, 20, 1]]).T)[:3].T
    fourth, lateral = ((box_points() - place).norm(dim=-1) < 12 for place in places)
    bands, flow = [], []
    with torch.no_grad():
        for seed in (0, 1, 5):
            image = simulate_signal("FLAIR", fractions, means, None, none, np.random.default_rng(seed))
            bands.append(float(image[white & (near > 0.05)].mean() / image[white & (near < 1e-4)].mean()))
            flow.append(float(image[fourth & fluid].mean() / image[lateral & fluid].mean()))
        aged = simulate_signal("FLAIR", fractions, means, None, 0.5 * white, np.random.default_rng(5))
    assert min(bands) > 1.02
    assert max(bands) < 1.5
    assert max(flow) > 1.5
    assert min(flow) < 1.3
    assert (aged[white] - image[white]).min() > 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_lesions_are_bright_in_flair_scans_except_for_free_fluid(kind):
    means = class_means("FLAIR", "gradient_echo", np.random.default_rng(0))
    grey, white, fluid = means["cortex"], means["white"], means["ventricle"]
    shape = torch.zeros(BOX_SHAPE)
    shape[60:100, 60:100, 60:100] = 1.0
    core = torch.zeros(BOX_SHAPE)
    core[70:90, 70:90, 70:90] = 1.0
    lesion = lesions.Lesion(kind, shape, core if kind in ("stroke", "tumour") else 0 * core, 1.0, {})
    image = torch.full(BOX_SHAPE, white)
    image[60:100, 60:64], image[60:100, 96:100] = grey, fluid
    seen = []
    for seed in range(8):
        after = lesions.add_lesion_signal("FLAIR", image, lesion, means, np.random.default_rng(seed))
        in_white, in_grey = after[60:100, 64:70, 60:100], after[60:100, 60:64, 60:100]
        assert in_white.mean() > 1.2 * white
        assert in_grey.mean() > 1.1 * grey
        assert after.max() < lesions.MAX_FLAIR * grey * 1.2
        torch.testing.assert_close(after[60:100, 96:100], image[60:100, 96:100])
        seen.append(float(after[core > 0].mean()))
        assert (after[shape == 0] == image[shape == 0]).all()
    if kind == "stroke":
        assert max(seen) < 0.5 * white
    if kind == "tumour":
        assert min(seen) < grey < max(seen)


def test_template_fractions_sum_to_at_most_1(healthy):
    total = healthy.fractions.sum(0)
    assert healthy.fractions.min() >= 0
    assert total.max() <= 1 + 1e-4


def test_draw_brain_mask_is_connected_and_contains_the_brain(healthy):
    mask = healthy.brain.numpy()
    assert ndimage.label(mask)[1] == 1
    white = healthy.fractions[CLASSES.index("white")] > 0.9
    assert healthy.brain[white].float().mean() > 0.98
    assert 0.9e6 < mask.sum() < 2.0e6


def test_tissue_labels_follow_the_largest_fraction(healthy):
    labels = healthy.tissue_labels()
    assert set(labels.unique().tolist()) == {0, 1, 2, 3, 4, 5}
    assert not labels[~healthy.brain].any()
    sure = (healthy.fractions[CLASSES.index("white")] > 0.9) & healthy.brain
    assert (labels[sure] == 3).all()


@pytest.mark.parametrize("modality", CONTRASTS)
def test_subject_with_lesion_differs_only_inside_the_lesion(modality, healthy, stroke, signal):
    torch.testing.assert_close(healthy.fractions, stroke.fractions, rtol=0, atol=0)
    before, settings, _ = signal("healthy", modality)
    after, again, _ = signal("stroke", modality)
    assert settings == again
    mask = (stroke.lesion.fraction > 0.5).numpy()
    changed = (before != after).numpy()
    assert mask.sum() > 500
    # The soft edge is about one voxel wide.
    assert not changed[~ndimage.binary_dilation(mask, iterations=4)].any()
    assert changed[mask].mean() > 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_make_lesion_is_bounded_and_inside_the_brain(kind, healthy):
    site = lesions.draw_tumour_site(np.random.default_rng(3)) if kind == "tumour" else None
    lesion = make_lesion(kind, healthy.fractions, healthy.brain, lambda: np.random.default_rng(3), site)
    assert lesion.fraction.min() >= 0
    assert lesion.fraction.max() <= 1
    assert (lesion.core <= lesion.fraction).all()
    assert not lesion.fraction[~healthy.brain].any()
    assert (lesion.fraction > 0.5).sum() > 50


def test_sulci_widen_with_age(healthy):
    fluid = CLASSES.index("csf")
    volumes = []
    for age in (25.0, 80.0):
        aged, _ = ageing.widen_sulci(healthy.fractions, np.random.default_rng(0), age)
        torch.testing.assert_close(aged.sum(0), healthy.fractions.sum(0), atol=1e-4, rtol=0)
        volumes.append(float(aged[fluid].sum()))
    assert volumes[1] > 1.05 * volumes[0]


def test_ventricles_grow_with_age_on_average():
    young, old = (
        np.mean([ageing.ventricle_growth(np.random.default_rng(i), age, 50.0) for i in range(20)])
        for age in (25.0, 80.0)
    )
    # 0.045 mm per year; both ages have the same noise.
    assert old - young == pytest.approx(0.045 * 55, abs=0.05)


def test_template_lands_on_the_sri24_brain():
    affine = icbm_to_sri24()
    assert affine.shape == (4, 4)
    # The anterior commissure, the origin of ICBM152, lies near the middle of the SRI24 grid.
    assert np.linalg.norm(affine[:3, 3] - [-119, 126, 72]) < 6
    source = template_source()
    indices = np.argwhere(source.fractions[CLASSES.index("white")].numpy() > 0.9)
    world = indices @ source.affine[:3, :3].T + source.affine[:3, 3]
    assert np.linalg.norm(world.mean(0) - [-119, 107, 85]) < 12


def test_draw_subject_info_is_random_and_reproducible():
    subjects = [draw_subject_info(Population(1), index) for index in range(40)]
    assert subjects == [draw_subject_info(Population(1), index) for index in range(40)]
    assert len({p.age for p in subjects}) > 30
    assert len({p.scanner.name for p in subjects}) >= 4
    assert {p.sex for p in subjects} == {"F", "M"}
    assert all(20 <= p.age <= 85 for p in subjects)


def test_a_scanner_is_shared_by_its_subjects_and_belongs_to_its_seed():
    subjects = [draw_subject_info(Population(1, scanners=3), index) for index in range(30)]
    by_name = {}
    for subject in subjects:
        assert by_name.setdefault(subject.scanner.name, subject.scanner) == subject.scanner
    assert sorted(by_name) == ["scanner01", "scanner02", "scanner03"]
    assert len({scanner.noise for scanner in by_name.values()}) == 3
    elsewhere = draw_scanner(0, False, random_stream(2, 0, "scanner"))
    assert elsewhere.means != by_name["scanner01"].means


def test_random_contrast_is_a_fraction_of_subjects_and_changes_no_other():
    realistic = [draw_subject_info(Population(1), index) for index in range(300)]
    mixed = [draw_subject_info(Population(1, random_contrast=0.3), index) for index in range(300)]
    changed = [(a, b) for a, b in zip(realistic, mixed, strict=True) if a != b]
    assert stats.binomtest(len(changed), 300, 0.3).pvalue > 0.01
    assert all(replace(b, scanner=a.scanner) == a for a, b in changed)
    assert all(
        replace(b.scanner, name=a.scanner.name, style=a.scanner.style, means=a.scanner.means) == a.scanner
        for a, b in changed
    )
    # Two subjects of one scanner have different contrasts.
    assert len({b.scanner.means["T1w"]["white"] for _, b in changed}) == len(changed)
    darker = [b.scanner.means["T1w"]["white"] < b.scanner.means["T1w"]["cortex"] for _, b in changed]
    assert stats.binomtest(sum(darker), len(darker), 0.5).pvalue > 0.01


def test_class_means_random_have_no_fixed_order():
    scanners = [draw_scanner(0, True, np.random.default_rng(seed)) for seed in range(30)]
    darker = [s.means["T1w"]["white"] < s.means["T1w"]["cortex"] for s in scanners]
    assert 5 < sum(darker) < 25


@pytest.mark.parametrize("modality", CONTRASTS)
def test_lesion_contrast_scales_the_signal_change_to_zero(modality, subject, stroke, signal):
    before, whole = signal("healthy", modality)[0], signal("stroke", modality)[0]
    assert stroke.lesion.contrast == 1.0
    changes = []
    for contrast in (0.0, 0.5):
        lesion = replace(stroke.lesion, contrast=contrast)
        with torch.no_grad():
            after = make_signal(POPULATION, INDEX, subject, replace(stroke, lesion=lesion), modality)[0]
        changes.append(after - before)
    assert not changes[0].any()
    torch.testing.assert_close(2 * changes[1], whole - before, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("kind", "volume"), [("stroke", 2.0), ("ms", 8.0), ("wmh", 12.0), ("tumour", 30.0)])
def test_make_lesion_reaches_the_requested_volume(kind, volume, healthy):
    site = lesions.draw_tumour_site(np.random.default_rng(8), volume) if kind == "tumour" else None
    lesion = make_lesion(
        kind,
        healthy.fractions,
        healthy.brain,
        lambda: np.random.default_rng(8),
        site,
        LesionTarget(volume=volume),
    )
    measured = float((lesion.fraction > 0.5).sum()) / 1000
    assert measured == pytest.approx(volume, rel=0.1)
    assert lesion.drawn["volume_ml"] == pytest.approx(measured)


def test_lesion_volumes_are_within_the_requested_range():
    population = Population(1, lesion_volume=(0.5, 50.0))
    volumes = [population.volume(index) for index in range(200)]
    assert 0.5 <= min(volumes) < 1
    assert 25 < max(volumes) <= 50
    logarithms = stats.uniform(np.log(0.5), np.log(50 / 0.5))
    assert stats.kstest(np.log(volumes), logarithms.cdf).pvalue > 0.01


def test_streams_differ_by_seed_subject_and_purpose():
    keys = [(1, 0, "T1w"), (2, 0, "T1w"), (1, 1, "T1w"), (1, 0, "T2w"), (1, 0, "T1w-lesion")]
    assert len({random_stream(*key).integers(2**62) for key in keys}) == len(keys)
    assert random_stream(1, 0, "T1w").integers(2**62) == random_stream(1, 0, "T1w").integers(2**62)
