"""Normal findings: their place and their effect on tissue maps and brain mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from bids_uad.simulation import variants
from bids_uad.simulation.anatomy import CLASSES
from bids_uad.simulation.deformation import MIDLINE
from bids_uad.simulation.spatial import BOX_SHAPE, box_points
from bids_uad.simulation.variants import PREVALENCE, stamp_tube


@pytest.fixture(scope="module")
def where(healthy) -> variants._Brain:
    return variants._Brain(healthy.fractions, healthy.brain, box_points()[..., 0] - MIDLINE)


@pytest.fixture(scope="module", autouse=True)
def every_finding_present():
    """Draw every finding, unless a test is about frequency."""
    kept = dict(PREVALENCE)
    PREVALENCE.update(dict.fromkeys(PREVALENCE, (1.0, 1.0, 1.0)))
    yield kept
    PREVALENCE.update(kept)


@pytest.fixture(scope="module")
def found(healthy) -> variants.Findings:
    side = box_points()[..., 0] - MIDLINE
    with torch.no_grad():
        return variants.draw_findings(
            healthy.fractions, healthy.change, healthy.brain, side, 70.0, np.random.default_rng(1)
        )


def fraction(anatomy, *names: str) -> np.ndarray:
    return sum(anatomy.fractions[CLASSES.index(name)] for name in names).numpy()


def weight_of(found: variants.Findings, kind: str) -> np.ndarray:
    return next(finding.weight.numpy() for finding in found.findings if finding.kind == kind)


@pytest.mark.parametrize(("radius", "tolerance"), [(0.4, 0.25), (1.0, 0.15), (3.0, 0.1)])
def test_stamp_tube_has_the_volume_of_a_capsule(radius, tolerance):
    volume = np.zeros((40, 40, 40), np.float32)
    start, end = np.array([10.2, 20.0, 19.7]), np.array([29.8, 20.3, 20.1])
    stamp_tube(volume, start, end, radius)
    length = np.linalg.norm(end - start)
    expected = np.pi * radius**2 * length + 4 / 3 * np.pi * radius**3
    assert volume.sum() == pytest.approx(expected, rel=tolerance)
    spread = np.argwhere(volume > 0.2).std(0)
    assert spread[0] > 3 * spread[1:].max()


def test_stamp_tube_is_cut_at_the_edge_of_the_volume():
    volume = np.zeros((10, 10, 10), np.float32)
    stamp_tube(volume, np.array([-4.0, 5, 5]), np.array([2.0, 5, 5]), 1.5)
    stamp_tube(volume, np.array([-9.0, 5, 5]), np.array([-5.0, 5, 5]), 1.5)
    assert volume[:2, 5, 5].min() == 1
    assert not volume[5:].any()


@pytest.mark.parametrize(
    ("kind", "classes"),
    [
        ("perivascular", ("white", "striatum", "pallidum")),
        ("iron", ("pallidum", "striatum", "brainstem", "cerebellar_white")),
        ("calcified", ("pallidum", "white")),
        ("choroid", ("ventricle", "choroid")),
        ("artery", ("csf",)),
    ],
)
def test_findings_lie_in_their_tissue(kind, classes, healthy, found):
    weight = weight_of(found, kind)
    assert weight.min() >= 0
    assert weight.max() <= 1
    assert weight.sum() > 20
    inside = (weight * fraction(healthy, *classes)).sum() / weight.sum()
    # Tissue fractions of the template are blurred, so that they are below 1 within a tissue.
    assert inside > 0.6


def test_choroid_plexus_lies_behind_the_thalami_on_both_sides(where, found):
    places = np.argwhere(weight_of(found, "choroid") > 0.3)
    behind = places[:, 1] - where.centre[1]
    assert 5 < behind.mean() < 40
    lateral = places[:, 0] - where.middle
    assert (lateral > 8).any()
    assert (lateral < -8).any()
    assert np.abs(lateral).min() > 4


def test_remnants_and_sinuses_extend_the_brain_mask_at_its_edge(healthy, found):
    before, after = healthy.brain.numpy(), found.brain.numpy()
    assert (after | ~before).all()
    assert ndimage.label(after)[1] == 1
    added = after & ~before
    outside = ndimage.distance_transform_edt(~before)
    assert added.sum() > 200
    assert outside[added].max() <= 5.5
    shown = sum(weight_of(found, kind) for kind in ("sinus", "dura", "fat"))
    assert (shown[added] > 0.3).mean() > 0.95


def test_sinus_lies_at_the_midline_or_at_the_tentorium(where, found):
    places = np.argwhere(weight_of(found, "sinus") > 0.5)
    height, behind = places[:, 2] - where.centre[2], places[:, 1] - where.centre[1]
    at_midline = np.abs(places[:, 0] - where.middle) < 7
    assert at_midline.mean() > 0.2
    assert (behind[~at_midline] > 20).all()
    assert height[at_midline].max() > 40


def test_white_matter_findings_only_add_change_in_white_matter(healthy, found):
    added = (found.change - healthy.change).numpy()
    assert added.min() >= 0
    assert found.change.max() <= 1
    assert added.sum() > 50
    assert (added * fraction(healthy, "white")).sum() / added.sum() > 0.6


def test_cavum_is_fluid_between_two_leaves_of_tissue(healthy, where, found):
    assert found.drawn["cavum_mm"] > 2
    difference = (found.fractions - healthy.fractions).numpy()
    np.testing.assert_allclose(difference.sum(0), 0, atol=1e-4)
    fluid, white = difference[CLASSES.index("ventricle")], difference[CLASSES.index("white")]
    places = np.argwhere(np.abs(difference).sum(0) > 0.1)
    assert np.abs(places[:, 0] - where.middle).max() <= found.drawn["cavum_mm"] / 2 + 3
    assert (places[:, 1] < where.centre[1] + 10).all()
    across = np.abs(np.arange(BOX_SHAPE[0]) - where.middle)
    middle = found.fractions[CLASSES.index("ventricle")].numpy()[where.middle]
    assert middle[places[:, 1], places[:, 2]].mean() > 0.5
    assert (fluid * (across < 1.5)[:, None, None]).sum() > 0
    assert (white * (across > 1.5)[:, None, None]).sum() > 0
