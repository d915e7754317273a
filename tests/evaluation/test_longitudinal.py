"""Matching of the components of two sessions, on painted lesions with known fates."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from bids_uad.config import MODALITIES
from bids_uad.evaluation.longitudinal import (
    CHANGE_LIMITS,
    ChangeLimit,
    Match,
    match_components,
    number_lesions,
    residual_misalignment,
)
from bids_uad.preprocessing.registration import Volume

SHAPE = (40, 20, 8)


def paint(*boxes):
    """Label boxes (start and end along the first two axes) 1, 2, ... on four slices."""
    labels = np.zeros(SHAPE, np.int32)
    for number, (x0, x1, y0, y1) in enumerate(boxes, start=1):
        labels[x0:x1, y0:y1, 2:6] = number
    return labels


GROWN, GROWN_LATER = (0, 4, 0, 4), (0, 8, 0, 4)
SPLIT, PARTS = (0, 9, 6, 8), ((0, 3, 6, 8), (5, 8, 6, 8))
MERGED, WHOLE = ((12, 15, 0, 2), (17, 20, 0, 2)), (12, 22, 0, 2)
GONE, NEW, TOUCHING = (30, 32, 0, 2), (30, 34, 10, 15), (32, 34, 0, 2)


def test_components_have_their_known_fates():
    before = paint(GROWN, SPLIT, *MERGED, GONE)
    # A component that only touches another does not overlap with it.
    after = paint(NEW, *PARTS, GROWN_LATER, WHOLE, TOUCHING)
    matches = match_components(before, after)
    found = {
        (match.before, match.after): (match.volume_before, match.volume_after, match.overlap)
        for match in matches
    }
    assert found == {
        ((1,), (4,)): (64, 128, 64),
        ((2,), (2, 3)): (72, 48, 48),
        ((3, 4), (5,)): (48, 80, 48),
        ((5,), ()): (16, 0, 0),
        ((), (1,)): (0, 80, 0),
        ((), (6,)): (0, 16, 0),
    }
    assert [match.change(10) for match in matches] == ["grown", "new", "grown", "shrunk", "new", "gone"]
    mirrored = match_components(after, before)
    assert {(match.after, match.before) for match in mirrored} == set(found)


def test_matching_agrees_with_components_of_the_union():
    """Lesions are the connected components of the union of two masks, if components that touch overlap."""
    random = np.random.default_rng(3)
    masks = [ndimage.binary_dilation(random.random((30, 30, 30)) < 0.002, iterations=1) for _ in range(2)]
    before, after = (ndimage.label(mask)[0] for mask in masks)
    union, count = ndimage.label(masks[0] | masks[1])
    matches = match_components(before, after)
    by_union = [
        (set(np.unique(before[union == k])) - {0}, set(np.unique(after[union == k])) - {0})
        for k in range(1, count + 1)
    ]
    lesions = [(set(match.before), set(match.after)) for match in matches]
    touching = [own for own in by_union if own not in lesions]
    assert len(touching) < len(by_union) / 4
    for one, other in touching:  # parts that touch without overlap
        parts = [lesion for lesion in lesions if lesion[0] <= one and lesion[1] <= other]
        assert set().union(*(part[0] for part in parts)) == one
        assert set().union(*(part[1] for part in parts)) == other
    assert sum(match.volume_before for match in matches) == masks[0].sum()
    assert sum(match.volume_after for match in matches) == masks[1].sum()
    assert sum(match.overlap for match in matches) == (masks[0] & masks[1]).sum()


@pytest.mark.parametrize("empty", [0, 1])
def test_no_component_in_one_or_both_sessions(empty):
    sessions = [paint(GROWN, SPLIT), paint(GROWN, SPLIT)]
    sessions[empty] = paint()
    assert {match.change(1) for match in match_components(*sessions)} == {["new", "gone"][empty]}
    assert match_components(paint(), paint()) == []


@pytest.mark.parametrize(
    ("before", "after", "change"),
    [
        (1000, 1100, "unchanged"),
        (1000, 1101, "grown"),
        (1100, 1000, "unchanged"),
        (1101, 1000, "shrunk"),
        (0, 100, "unchanged"),
        (0, 101, "new"),
        (100, 0, "unchanged"),
        (101, 0, "gone"),
    ],
)
def test_change_is_beyond_the_limit(before, after, change):
    match = Match((1,) if before else (), (1,) if after else (), before, after)
    assert match.change(100) == change


def test_limit_depends_on_the_volumes():
    limit = ChangeLimit(volume=300, fraction=0.5, single=700)
    assert [limit.at(500, 700), limit.at(2000, 3000), limit.at(0, 90_000), limit.at(90_000, 0)] == [
        300,
        1250,
        700,
        700,
    ]
    assert set(CHANGE_LIMITS) == set(MODALITIES)


def test_lesions_have_one_number_in_all_sessions():
    """The second and third lesion merge in the last session; the gap in the middle ends a lesion."""
    sessions = [
        paint(GROWN, *MERGED, GONE),
        paint(GROWN_LATER, *MERGED),
        paint(WHOLE, GROWN_LATER, GONE),
    ]
    pairs = [match_components(*sessions[:2]), match_components(*sessions[1:])]
    numbers = number_lesions(pairs)
    grown, merged = numbers[0, 1], numbers[0, 2]
    assert (grown, merged) == (1, 2)
    assert {node: number for node, number in numbers.items() if number in (1, 2)} == {
        (0, 1): 1,
        (1, 1): 1,
        (2, 2): 1,
        (0, 2): 2,
        (0, 3): 2,
        (1, 2): 2,
        (1, 3): 2,
        (2, 1): 2,
    }
    assert {numbers[0, 4], numbers[2, 3]} == {3, 4}


@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_residual_is_the_displacement_of_the_brain(shift):
    x, y, z = np.meshgrid(*[np.arange(-30.0, 30.0)] * 3, indexing="ij")

    def scan(offset):
        place = x - offset
        brain = (place / 24) ** 2 + (y / 20) ** 2 + (z / 18) ** 2 < 1
        texture = 1 + 0.4 * np.sin(place / 3) * np.cos(y / 4) * np.sin(z / 3.5 + place / 9)
        return Volume((brain * texture).astype(np.float32), np.eye(4), brain)

    assert residual_misalignment(scan(0.0), scan(shift)) == pytest.approx(shift, abs=0.1)
