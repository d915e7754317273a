from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage, stats

from bids_uad.simulation import ageing
from bids_uad.simulation import pathology as lesions
from bids_uad.simulation.acquisition import draw_scanner, simulate_preprocessed_scan
from bids_uad.simulation.anatomy import CLASSES, icbm_to_sri24, template_source
from bids_uad.simulation.pathology import KINDS, LesionTarget, make_lesion
from bids_uad.simulation.subject import (
    Population,
    draw_subject_info,
    make_signal,
    random_stream,
)

from .conftest import INDEX, POPULATION, SEED


def region_mean(image: torch.Tensor, share: torch.Tensor) -> float:
    return float(image[share > 0.9].mean())


@pytest.mark.parametrize("modality", ["T1w", "T2w"])
def test_tissue_order_of_means(modality, subject, healthy):
    with torch.no_grad():
        image, settings, _ = make_signal(POPULATION, INDEX, subject, healthy, modality)
        image = simulate_preprocessed_scan(
            image, settings, healthy.brain, random_stream(SEED, INDEX, f"{modality}-scan")
        )
    fluid, grey, white = (
        region_mean(image, healthy.fractions[CLASSES.index(name)])
        for name in ("ventricle", "cortex", "white")
    )
    assert (fluid < grey < white) if modality == "T1w" else (white < grey < fluid)


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


@pytest.mark.parametrize("modality", ["T1w", "T2w"])
def test_subject_with_lesion_differs_only_inside_the_lesion(modality, subject, healthy, stroke):
    torch.testing.assert_close(healthy.fractions, stroke.fractions, rtol=0, atol=0)
    with torch.no_grad():
        before, settings, _ = make_signal(POPULATION, INDEX, subject, healthy, modality)
        after, again, _ = make_signal(POPULATION, INDEX, subject, stroke, modality)
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


@pytest.mark.parametrize("modality", ["T1w", "T2w"])
def test_lesion_contrast_scales_the_signal_change_to_zero(modality, subject, healthy, stroke):
    with torch.no_grad():
        before = make_signal(POPULATION, INDEX, subject, healthy, modality)[0]
        changes = []
        for contrast in (0.0, 0.5, 1.0):
            lesion = replace(stroke.lesion, contrast=contrast)
            after = make_signal(POPULATION, INDEX, subject, replace(stroke, lesion=lesion), modality)[0]
            changes.append(after - before)
    assert not changes[0].any()
    torch.testing.assert_close(2 * changes[1], changes[2], atol=1e-5, rtol=1e-4)


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
