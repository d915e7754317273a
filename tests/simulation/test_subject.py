from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from bids_uad.simulation import ageing, lesions
from bids_uad.simulation.acquisition import scan_on_grid
from bids_uad.simulation.anatomy import CLASSES, built_in_source, icbm_to_sri24
from bids_uad.simulation.lesions import KINDS, make_lesion
from bids_uad.simulation.subject import draw_person, make_signal, stream

from .conftest import INDEX, SEED


def region_mean(image: torch.Tensor, share: torch.Tensor) -> float:
    return float(image[share > 0.9].mean())


@pytest.mark.parametrize("modality", ["T1w", "T2w"])
def test_tissue_order_of_means(modality, person, healthy):
    with torch.no_grad():
        image, protocol, _ = make_signal(SEED, INDEX, person, healthy, modality)
        image = scan_on_grid(image, protocol, healthy.brain, stream(SEED, INDEX, f"{modality}-scan"))
    fluid, grey, white = (
        region_mean(image, healthy.fractions[CLASSES.index(name)])
        for name in ("ventricle", "cortex", "white")
    )
    assert (fluid < grey < white) if modality == "T1w" else (white < grey < fluid)


def test_fractions_are_shares_of_a_voxel(healthy):
    total = healthy.fractions.sum(0)
    assert healthy.fractions.min() >= 0
    assert total.max() <= 1 + 1e-4


def test_brain_mask_is_one_piece_and_holds_the_brain(healthy):
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
def test_lesion_twin_differs_only_where_the_lesion_is(modality, person, healthy, stroke):
    torch.testing.assert_close(healthy.fractions, stroke.fractions, rtol=0, atol=0)
    with torch.no_grad():
        before, protocol, _ = make_signal(SEED, INDEX, person, healthy, modality)
        after, again, _ = make_signal(SEED, INDEX, person, stroke, modality)
    assert protocol == again
    mask = (stroke.lesion.share > 0.5).numpy()
    changed = (before != after).numpy()
    assert mask.sum() > 500
    # The soft edge is about one voxel wide.
    assert not changed[~ndimage.binary_dilation(mask, iterations=4)].any()
    assert changed[mask].mean() > 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_lesion_is_soft_bounded_and_inside_the_brain(kind, healthy):
    rng = np.random.default_rng(3)
    site = lesions.mass_site(rng) if kind == "tumour" else None
    lesion = make_lesion(kind, healthy.fractions, healthy.brain, rng, site)
    assert lesion.share.min() >= 0
    assert lesion.share.max() <= 1
    assert (lesion.core <= lesion.share).all()
    assert not lesion.share[~healthy.brain].any()
    assert (lesion.share > 0.5).sum() > 50


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
    assert old > young + 1.5


def test_template_lands_on_the_sri24_brain():
    affine = icbm_to_sri24()
    assert affine.shape == (4, 4)
    # The anterior commissure, the origin of ICBM152, lies near the middle of the SRI24 grid.
    assert np.linalg.norm(affine[:3, 3] - [-119, 126, 72]) < 6
    source = built_in_source()
    indices = np.argwhere(source.fractions[CLASSES.index("white")].numpy() > 0.9)
    world = indices @ source.affine[:3, :3].T + source.affine[:3, 3]
    assert np.linalg.norm(world.mean(0) - [-119, 107, 85]) < 12


def test_people_differ_and_repeat():
    people = [draw_person(1, index, ()) for index in range(40)]
    assert people == [draw_person(1, index, ()) for index in range(40)]
    assert len({p.age for p in people}) > 30
    assert len({p.scanner.name for p in people}) >= 4
    assert {p.sex for p in people} == {"F", "M"}
    assert all(20 <= p.age <= 85 for p in people)


def test_streams_differ_by_seed_subject_and_purpose():
    keys = [(1, 0, "T1w"), (2, 0, "T1w"), (1, 1, "T1w"), (1, 0, "T2w"), (1, 0, "T1w-lesion")]
    assert len({stream(*key).integers(2**62) for key in keys}) == len(keys)
    assert stream(1, 0, "T1w").integers(2**62) == stream(1, 0, "T1w").integers(2**62)
