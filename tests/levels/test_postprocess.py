"""Masks, components, histograms, metrics and lesions of an anomaly map, against independent computations."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from scipy import ndimage
from scipy.spatial.distance import cdist
from skimage import measure

from bids_uad import space
from bids_uad.calibration.thresholds import DecisionRule
from bids_uad.dataset.naming import LOOK_UP_TABLES
from bids_uad.dataset.sidecars import COMPONENT_COLUMNS, LESION_COLUMNS
from bids_uad.levels.participant import postprocess as maps
from bids_uad.levels.participant.postprocess import (
    MIN_SHELL_VOXELS,
    lesion_contrasts,
    lesion_table,
    look_up_tables,
)
from tests.preprocessing.conftest import MNI_TO_SRI24


@pytest.fixture
def random():
    return np.random.default_rng(4)


def test_rescaled_scores_are_monotone_and_half_at_the_threshold(random):
    scores = np.sort(random.gamma(1, 3, 500)).astype(np.float32)
    squashed = maps.rescale_scores(scores, 2.0)
    assert maps.rescale_scores(np.array([2.0], np.float32), 2.0)[0] == 0.5
    assert (np.diff(squashed) >= 0).all()
    assert squashed.min() >= 0
    assert squashed.max() < 1
    np.testing.assert_allclose(2.0 * squashed / (1 - squashed), scores, rtol=1e-5)
    assert maps.rescale_scores(np.array([-1.0], np.float32), 2.0)[0] == 0
    with pytest.raises(ValueError, match="must be positive"):
        maps.rescale_scores(scores, 0.0)


def test_components_touch_at_corners_and_are_ordered_by_size():
    mask = np.zeros((6, 6, 6), bool)
    mask[0, 0, 0] = True
    mask[3:5, 3:5, 3:5] = True
    mask[5, 5, 5] = True  # corner of the cube
    labels = maps.label_components(mask)
    assert labels.dtype == np.int32
    assert labels[0, 0, 0] == 2
    assert labels[5, 5, 5] == labels[3, 3, 3] == 1
    assert labels.max() == 2


def test_components_agree_with_flood_fill(random):
    mask = random.random((12, 12, 12)) < 0.1
    labels = maps.label_components(mask)
    points = {tuple(p) for p in np.argwhere(mask)}
    sizes = []
    while points:
        stack, size = [points.pop()], 0
        label = labels[stack[0]]
        while stack:
            point = stack.pop()
            size += 1
            assert labels[point] == label
            near = {p for p in points if max(abs(a - b) for a, b in zip(p, point, strict=True)) <= 1}
            points -= near
            stack += near
        sizes.append(size)
        assert (labels == label).sum() == size
    assert sorted(sizes, reverse=True) == np.bincount(labels.ravel())[1:].tolist()


def test_component_table_against_hand_numbers():
    labels = np.zeros(space.SHAPE, np.int32)
    labels[100:102, 50, 30] = 1
    labels[10, 20, 40] = 2
    scores = np.zeros(space.SHAPE, np.float32)
    scores[100, 50, 30], scores[101, 50, 30], scores[10, 20, 40] = 1.0, 3.0, 5.0
    table = maps.component_table(labels, scores)
    assert table["index"].tolist() == [1, 2]
    assert table["volume_mm3"].tolist() == [2.0, 1.0]
    assert table["peak_score"].tolist() == [3.0, 5.0]
    assert table["mean_score"].tolist() == [2.0, 5.0]
    # x = -i, y = 239 - j, z = k
    assert table[["centroid_x", "centroid_y", "centroid_z"]].to_numpy().tolist() == [
        [-100.5, 189.0, 30.0],
        [-10.0, 219.0, 40.0],
    ]
    back = table[["mni_x", "mni_y", "mni_z"]].to_numpy() @ MNI_TO_SRI24[:3, :3].T + MNI_TO_SRI24[:3, 3]
    np.testing.assert_allclose(back, table[["centroid_x", "centroid_y", "centroid_z"]], atol=0.1)


def test_component_table_on_other_voxels_than_a_cubic_millimetre():
    labels = np.zeros((6, 6, 6), np.int32)
    labels[1:3, 2, 3] = 1
    scores = np.full(labels.shape, 0.2, np.float32)
    scores[1, 2, 3] = 0.4
    affine = np.array([[0, 2.0, 0, 10], [-3.0, 0, 0, 20], [0, 0, 1.5, 30], [0, 0, 0, 1]])
    (row,) = maps.component_table(labels, scores, affine).to_dict("records")
    assert row["volume_mm3"] == pytest.approx(2 * 2 * 3 * 1.5)
    assert (row["peak_score"], row["mean_score"]) == pytest.approx((0.4, 0.3))
    assert (row["centroid_x"], row["centroid_y"], row["centroid_z"]) == (14.0, 15.5, 34.5)


def test_metrics_row_by_hand():
    """Two lesions in the brain and one outside; of two components one hits both, the other none."""
    brain = np.zeros((9, 9, 9), bool)
    brain[:7] = True
    lesion = np.zeros_like(brain)
    lesion[1, 1, 1:3] = lesion[3, 1, 1] = lesion[8, 8, 8] = True
    components = np.zeros(brain.shape, np.int32)
    components[1:4, 1, 1] = 1
    components[5, 5, 4:6] = 2
    row = maps.metrics_row({"detector": "x"}, components, brain, lesion, 0.0).iloc[0]
    assert row["detector"] == "x"
    assert row["brain_volume_mm3"] == 7 * 81
    assert row["anomaly_volume_mm3"] == 3 + 2
    assert row["lesion_volume_mm3"] == 3
    assert (row["n_components"], row["n_lesions"]) == (2, 2)
    assert (row["n_lesions_detected"], row["n_false_components"]) == (2, 1)


def test_component_table_without_components_is_empty():
    table = maps.component_table(np.zeros((3, 3, 3), np.int32), np.zeros((3, 3, 3), np.float32))
    assert len(table) == 0
    assert list(table)[:3] == ["index", "name", "volume_mm3"]


def test_count_lesions_against_hand_numbers():
    lesion = np.zeros((10, 10, 10), bool)
    lesion[1:3, 1, 1] = lesion[5, 5, 5] = lesion[8, 8, 8] = True
    mask = np.zeros_like(lesion)
    mask[2, 1, 1] = mask[5, 5, 5:7] = True  # two hits
    mask[0, 9, 9] = mask[9, 0, 0] = True  # two false
    hits = maps.count_lesions(maps.label_components(mask), lesion)
    assert (hits.n_lesions, hits.n_detected, hits.n_false) == (3, 2, 2)


def test_one_component_over_two_lesions_detects_both():
    lesion = np.zeros((10, 3, 3), bool)
    lesion[1] = lesion[5] = True
    hits = maps.count_lesions(maps.label_components(np.ones_like(lesion)), lesion)
    assert (hits.n_lesions, hits.n_detected, hits.n_false) == (2, 2, 0)


def test_lesion_counts_agree_with_scipy_on_random_masks(random):
    lesion, mask = random.random((2, 14, 14, 14)) < 0.05
    components = maps.label_components(mask)
    truth, n_truth = ndimage.label(lesion, np.ones((3, 3, 3)))
    detected = sum(bool(mask[truth == k].any()) for k in range(1, n_truth + 1))
    false = sum(not lesion[components == k].any() for k in range(1, components.max() + 1))
    hits = maps.count_lesions(components, lesion)
    assert (hits.n_lesions, hits.n_detected, hits.n_false) == (n_truth, detected, false)


def bars(volumes):
    """Draw bars of these volumes in mm3, far from each other."""
    mask = np.zeros((11, 3, 3 * len(volumes)), bool)
    for k, volume in enumerate(volumes):
        mask[1 : 1 + volume, 1, 3 * k] = True
    return mask


@pytest.mark.parametrize(
    ("lesions", "components", "least", "counted"),
    [
        # volumes of lesions; volumes of components at the same places; (lesions, detected, false)
        ((5, 3, 2, 1), (5, 3, 2, 1), 0, (4, 4, 0)),
        ((5, 3, 2, 1), (5, 3, 2, 1), 3, (2, 2, 0)),
        ((5, 3, 2, 1), (5, 3, 2, 1), 3.5, (1, 1, 0)),
        ((5, 3, 2, 1), (5, 3, 2, 1), 50, (0, 0, 0)),
        ((5, 0, 0, 0), (0, 5, 3, 2), 3, (1, 0, 2)),  # a false component of 2 mm3 is not counted
        ((5, 2, 0, 0), (0, 9, 0, 0), 3, (1, 0, 0)),  # one that touches a lesion of 2 mm3 alone is not false
        ((5, 0, 0, 0), (1, 0, 0, 0), 3, (1, 1, 0)),  # a lesion is found by a component of any size
        ((0, 0, 0, 0), (5, 3, 2, 1), 3, (0, 0, 2)),
        ((5, 3, 2, 1), (0, 0, 0, 0), 3, (2, 0, 0)),
    ],
)
def test_lesions_and_components_are_counted_from_the_minimum_volume(lesions, components, least, counted):
    lesion, mask = bars(lesions), bars(components)
    labels = maps.label_components(mask)
    hits = maps.count_lesions(labels, lesion, least)
    assert (hits.n_lesions, hits.n_detected, hits.n_false) == counted
    row = maps.metrics_row({}, labels, np.ones_like(mask), lesion, least).iloc[0]
    assert row["min_lesion_volume_mm3"] == least
    assert row["n_components"] == sum(volume > 0 for volume in components)
    assert row["n_counted_components"] == sum(volume >= max(least, 1) for volume in components)
    assert row["lesion_volume_mm3"] == sum(lesions)  # of all lesions


@pytest.mark.parametrize("least", [0, 3, 50])
def test_lesion_counts_agree_with_scikit_image(random, least):
    """Lesions and components as sets of voxels, without any labels of ours."""
    smooth = ndimage.gaussian_filter(random.normal(size=(2, 40, 40, 40)), (0, 1.2, 1.2, 1.2))
    lesion, mask = smooth > np.quantile(smooth, 0.96)
    mask &= random.random(mask.shape) < 0.9

    def components(volume):
        regions = measure.regionprops(measure.label(volume, connectivity=3))
        return [{tuple(voxel) for voxel in region.coords} for region in regions]

    lesions, found = components(lesion), components(mask)
    inside, marked = set().union(*lesions), set().union(*found)
    counted = [voxels for voxels in lesions if len(voxels) >= least]
    hits = maps.count_lesions(maps.label_components(mask), lesion, least)
    assert hits.n_lesions == len(counted)
    assert hits.n_detected == sum(bool(voxels & marked) for voxels in counted)
    assert hits.n_false == sum(not voxels & inside for voxels in found if len(voxels) >= least)
    assert len(lesions) > 60
    assert least > 30 or (0 < hits.n_detected < hits.n_lesions and hits.n_false > 0)


PANOPTICA = {
    0: ((8, 18, 21), (8, 16, 19), (5, 2, 5)),
    1: ((10, 17, 18), (10, 15, 17), (6, 3, 2)),
    2: ((6, 24, 24), (6, 23, 23), (4, 6, 6)),
    3: ((10, 19, 18), (10, 18, 17), (8, 1, 1)),
    4: ((3, 25, 25), (3, 23, 23), (3, 1, 5)),
    5: ((5, 24, 24), (5, 22, 23), (1, 6, 4)),
    6: ((6, 22, 21), (6, 19, 16), (4, 4, 4)),
    7: ((8, 20, 20), (8, 19, 19), (4, 3, 3)),
    8: ((10, 19, 18), (10, 18, 18), (7, 1, 5)),
    9: ((7, 22, 21), (7, 22, 21), (5, 4, 6)),
    10: ((7, 23, 23), (7, 20, 20), (4, 6, 4)),
    11: ((9, 21, 19), (9, 20, 17), (5, 5, 3)),
}
"""True positives, false positives and false negatives of panoptica 2.1.7 for the masks of each seed, counted
from 0, 3 and 20 mm3: connected components, matched at any overlap, several to one lesion. Smaller lesions
were removed before true positives and false negatives were counted, smaller components before false positives
were counted against all lesions. (That release cannot be installed beside numpy 2.3 or pandas 3.)"""


@pytest.mark.parametrize("seed", PANOPTICA)
def test_lesion_counts_agree_with_panoptica(seed):
    generator = np.random.default_rng(seed)
    lesion, mask = np.zeros((2, 48, 48, 48), bool)
    for k in range(
        40
    ):  # lesions and findings, shifted by 0 to 2 voxels, one of them missing in half of the cases
        corner, size, shift = (generator.integers(*ends, 3) for ends in ((2, 42), (1, 5), (-2, 3)))
        for volume, start, absent in ((lesion, corner, 0), (mask, corner + shift, 1)):
            if k % 4 != absent:
                volume[tuple(slice(a, a + b) for a, b in zip(start, size, strict=True))] = True
    labels = maps.label_components(mask)
    for least, (hit, false, missed) in zip((0, 3, 20), PANOPTICA[seed], strict=True):
        hits = maps.count_lesions(labels, lesion, least)
        assert (hits.n_detected, hits.n_false, hits.n_lesions) == (hit, false, hit + missed)


def test_metrics_without_truth_are_missing_not_zero():
    brain = np.ones((4, 4, 4), bool)
    row = maps.metrics_row({"detector": "x"}, np.zeros((4, 4, 4), np.int32), brain, None, 3.0).iloc[0]
    assert row["brain_volume_mm3"] == 64
    for column in ("lesion_volume_mm3", "n_lesions", "n_lesions_detected", "n_false_components"):
        assert row[column] is None


def test_lesion_outside_the_brain_does_not_count():
    brain = np.zeros((6, 6, 6), bool)
    brain[:3] = True
    lesion = np.zeros_like(brain)
    lesion[1, 1, 1] = lesion[5, 5, 5] = True
    row = maps.metrics_row({}, np.zeros((6, 6, 6), np.int32), brain, lesion, 0.0).iloc[0]
    assert (row["lesion_volume_mm3"], row["n_lesions"], row["n_lesions_detected"]) == (1, 1, 0)


def test_histogram_table():
    edges = np.array([0.0, 0.1, 1 / 3, np.inf])
    table = maps.histogram_table(edges, np.array([5, 0, 1]), None)
    assert [float(text) for text in table["score_lower"]] == edges[:-1].tolist()
    assert table["score_upper"].iloc[-1] == "inf"
    assert table["n_lesion"].tolist() == ["n/a"] * 3
    with pytest.raises(ValueError, match="do not make"):
        maps.histogram_table(edges, np.array([5, 0]), None)


def test_rescaled_scores_above_the_threshold_stay_above_one_half():
    threshold = 0.1611
    scores = np.float32(threshold) * np.ones(5, dtype=np.float32)
    for k in range(5):
        scores[k:] = np.nextafter(scores[k:], np.float32(1))
    scores = np.append(scores, np.nextafter(np.float32(threshold), np.float32(0)))
    np.testing.assert_array_equal(
        maps.rescale_scores(scores, threshold) > 0.5, scores > np.float64(threshold)
    )


def test_region_names_are_those_with_most_voxels(random):
    labels = maps.label_components(random.random((14, 14, 14)) < 0.08)
    parcellation = (random.integers(0, 4, (14, 14, 14)) * (random.random((14, 14, 14)) < 0.7)).astype(
        np.uint8
    )
    names = {1: "cortex", 2: "thalamus"}
    found = maps.region_names(labels, parcellation, names)
    assert len(found) == labels.max()
    assert {"cortex", "thalamus", "3", None} == set(found)
    for number, name in enumerate(found, start=1):
        counts = np.bincount(parcellation[labels == number], minlength=4)[1:]
        best = 1 + int(np.argmax(counts))
        assert name == (names.get(best, str(best)) if counts.any() else None)


def test_detected_components_have_regions_of_the_built_in_atlas():
    scores = np.zeros(space.SHAPE, np.float32)
    thalamus, cerebellum = np.s_[128:134, 128:134, 72:78], np.s_[78:86, 160:168, 24:30]
    scores[thalamus], scores[cerebellum], scores[2:4, 2:4, 2:4] = 2.0, 3.0, 4.0
    found = maps.detect_anomalies(
        scores,
        np.ones(space.SHAPE, bool),
        rule=DecisionRule(1.0),
        edges=np.linspace(0, 5, 11),
        provenance={},
        min_lesion_volume=0,
        parcellations={},
    )
    table = found.component_table
    assert table["region"].tolist()[:2] == ["right cerebellum", "left thalamus"]
    assert table["region"].isna().tolist() == [False, False, True]
    assert table["region_probability"].iloc[:2].between(0.5, 1).all()
    assert table["region_probability"].iloc[2] == 0
    assert table["location_class"].tolist()[:2] == ["infratentorial", "deep grey matter"]
    assert table["location_class"].isna().tolist() == [False, False, True]
    assert set(table["location_class"].dropna()) <= set(COMPONENT_COLUMNS["location_class"]["Levels"])
    assert set(COMPONENT_COLUMNS) | {"index", "name"} == set(table)


def test_look_up_tables_have_the_formats_of_the_viewers():
    table = pd.DataFrame(
        {"index": [1, 2], "name": ["anomaly0001", "anomaly0002"], "region": ["left insula", None]}
    )
    text = look_up_tables(table)
    assert text.keys() == LOOK_UP_TABLES.keys()
    names, found = {1: "anomaly0001 left insula", 2: "anomaly0002"}, {}
    # FSLeyes: label, colour from 0 to 1, name; it reads the numbers as here, and tells the format by line 2.
    lines = text["FSLeyes"].splitlines()
    colours = np.genfromtxt(lines, usecols=(0, 1, 2, 3))
    assert {int(k): line.split(None, 4)[4] for k, line in enumerate(lines)} == {0: "background"} | names
    found["FSLeyes"] = {int(k): [round(255 * value) for value in rgb] for k, *rgb in colours if k}
    assert len(look_up_tables(table[:1])["FSLeyes"].splitlines()) == 2
    # FreeSurferColorLUT.txt: index, name without spaces, colour, alpha of 0. 3D Slicer: opacity of 255.
    for program, alpha in (("Freeview", "0"), ("3D Slicer", "255")):
        fields = [line.split() for line in text[program].splitlines() if line[0] not in "#0"]
        assert {int(k): name.replace("_", " ") for k, name, *_ in fields} == names
        assert {field[5] for field in fields} == {alpha}
        found[program] = {int(k): list(map(int, rgb)) for k, _, *rgb, _ in fields}
    assert text["3D Slicer"].startswith("# Color table file\n# 3 values\n0 background 0 0 0 0\n")
    # ITK-SNAP: index, colour, opacity, two switches, name in quotes.
    lines = re.findall(r'^(\d+) (\d+) (\d+) (\d+) 1 1 1 "(.*)"$', text["ITK-SNAP"], re.MULTILINE)
    assert {int(k): name for k, *_, name in lines} == names
    assert '\n0 0 0 0 0 0 0 "Clear Label"\n' in text["ITK-SNAP"]
    found["ITK-SNAP"] = {int(k): list(map(int, rgb)) for k, *rgb, _ in lines}
    assert all(colours == found["FSLeyes"] for colours in found.values())
    assert found["FSLeyes"][1] != found["FSLeyes"][2]
    assert look_up_tables(table[:0])["FSLeyes"] == "0 0.00000 0.00000 0.00000 background\n"


def test_region_names_without_components_are_empty():
    assert maps.region_names(np.zeros((3, 3, 3), np.int32), np.ones((3, 3, 3), np.uint8), {1: "a"}) == []


@pytest.fixture
def scan():
    random = np.random.default_rng(3)
    shape = (44, 40, 36)
    brain = np.zeros(shape, bool)
    brain[3:-3, 3:-3, 3:-3] = True
    lesion = np.zeros(shape, bool)
    lesion[8:12, 8:14, 8:12] = True
    lesion[14, 9, 9] = True  # its shell lacks what is near the first
    lesion[12, 14, 12] = True  # corner of the first
    lesion[30:32, 20, 20] = True
    lesion[1:5, 30:33, 20] = True  # partly outside the brain
    lesion[0, 0, 0] = True  # wholly outside
    image = random.normal(1.0, 0.1, shape) + 0.4 * lesion
    found = random.random(shape) < 0.3
    found[30:32, 20, 20] = False
    return lesion, found, image.astype(np.float32), brain


def test_lesion_table_agrees_with_loops_over_voxels(scan):
    lesion, found, image, brain = scan
    table = lesion_table(*scan)
    assert list(table) == list(LESION_COLUMNS)
    truth, n = ndimage.label(lesion & brain, np.ones((3, 3, 3)))
    assert len(table) == n == 4
    points = {k: np.argwhere(truth == k) for k in range(1, n + 1)}
    order = sorted(points, key=lambda k: -len(points[k]))
    everywhere = np.argwhere(brain)
    apart = cdist(everywhere, np.argwhere(truth > 0)).min(axis=1) > 2
    for row, k in zip(table.itertuples(), order, strict=True):
        own = points[k]
        hits = sum(bool(found[tuple(point)]) for point in own)
        assert row.volume_mm3 == len(own)
        assert row.detected_fraction == pytest.approx(hits / len(own))
        assert row.detected == (hits > 0)
        shell = image[tuple(everywhere[apart & (cdist(everywhere, own).min(axis=1) <= 6)].T)].astype(float)
        inside = image[tuple(own.T)].astype(float)
        assert row.contrast == pytest.approx((inside.mean() - shell.mean()) / shell.std(ddof=1), rel=1e-6)
        x, y, z = own.mean(axis=0)
        assert (row.centroid_x, row.centroid_y, row.centroid_z) == pytest.approx((-x, 239 - y, z), abs=0.006)
    assert 0 in table["detected"].tolist()
    assert 1 in table["detected"].tolist()


def test_lesion_contrast_is_nan_without_a_shell():
    labels = np.zeros((20, 20, 20), int)
    labels[5:15, 5:15, 5:15] = 1
    assert np.isnan(lesion_contrasts(labels, np.ones(labels.shape), labels > 0)).all()
    assert np.isnan(lesion_contrasts(labels, np.ones(labels.shape), np.ones(labels.shape, bool))).all()
    few = labels > 0
    few[2, : MIN_SHELL_VOXELS - 1, 10] = True
    image = np.random.default_rng(0).random(labels.shape)
    assert np.isnan(lesion_contrasts(labels, image, few)).all()
    few[2, :, 11] = True
    assert np.isfinite(lesion_contrasts(labels, image, few)).all()


def test_lesion_table_without_lesions_is_empty(scan):
    nothing = np.zeros_like(scan[0])
    table = lesion_table(nothing, *scan[1:])
    assert len(table) == 0
    assert list(table) == list(LESION_COLUMNS)
