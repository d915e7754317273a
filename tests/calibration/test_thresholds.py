"""Histograms and thresholds against literal voxel counts; decision rules against scikit-image and SciPy."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from scipy import ndimage
from skimage.filters import apply_hysteresis_threshold
from skimage.morphology import reconstruction, remove_small_objects

from bids_uad.calibration.thresholds import (
    FINE_EDGES,
    DecisionRule,
    HealthyMarked,
    ThresholdEstimator,
    above,
    count_scores,
    fill_holes,
    score_counts,
)
from bids_uad.errors import ModelError
from bids_uad.images import bounding_box


def test_count_scores_includes_the_upper_edge_of_a_bin():
    edges = np.array([0.0, 1.0, 2.0, np.inf])
    assert count_scores(np.array([0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 9.0]), edges).tolist() == [3, 2, 2]


def test_above_counts_the_voxels_above_each_edge():
    rng = np.random.default_rng(0)
    scores = rng.gamma(2, 0.1, 5_000).astype(np.float32)
    edges = np.concatenate([[0.0], np.sort(rng.random(50)), [np.inf]])
    literal = [np.count_nonzero(scores.astype(np.float64) > edge) for edge in edges[:-1]]
    assert above(count_scores(scores, edges))[1:].tolist() == literal[1:]


def test_score_counts_separates_lesion_and_rest_inside_the_brain():
    scores = np.array([[0.2, 0.8], [0.9, 0.1]])
    brain = np.array([[True, True], [True, False]])
    lesion = np.array([[False, False], [True, True]])
    edges = np.array([0.0, 0.5, np.inf])
    rest, inside = score_counts(scores, brain, lesion, edges)
    assert rest.tolist() == [1, 1]
    assert inside.tolist() == [0, 1]
    assert score_counts(scores, brain, None, edges)[1] is None


@pytest.fixture
def volumes():
    rng = np.random.default_rng(0)
    healthy = [rng.gamma(2, 0.1, (20, 20, 20)) for _ in range(5)]
    sick = []
    for size in (3, 6, 9):
        scores = rng.gamma(2, 0.1, (20, 20, 20))
        lesion = np.zeros(scores.shape, dtype=bool)
        lesion[:size, :size, :size] = True
        scores[lesion] += rng.normal(0.6, 0.2, lesion.sum()).clip(0)
        sick.append((scores, lesion))
    return healthy, sick


def test_summary_reports_dice_by_lesion_type(volumes):
    _, sick = volumes
    estimator = ThresholdEstimator()
    brain = np.ones((20, 20, 20), dtype=bool)
    for kind, (scores, lesion) in zip(("stroke", "ms", "ms"), sick, strict=True):
        estimator.add(scores, brain, lesion, kind)
    found = estimator.summary()
    threshold = found["thresholds"]["max_dice"]

    def dice(scores, lesion):
        return 2 * ((scores > threshold) & lesion).sum() / ((scores > threshold).sum() + lesion.sum())

    literal = [dice(*volume) for volume in sick]
    by_kind = found["validation"]["by_kind"]
    assert by_kind["stroke"] == {"n": 1, "mean_dice": {"max_dice": pytest.approx(literal[0])}}
    assert by_kind["ms"] == {"n": 2, "mean_dice": {"max_dice": pytest.approx(np.mean(literal[1:]))}}
    assert found["validation"]["mean_dice"]["max_dice"] == pytest.approx(np.mean(literal))


def estimate(volumes):
    healthy, sick = volumes
    estimator = ThresholdEstimator()
    brain = np.ones((20, 20, 20), dtype=bool)
    for scores in healthy:
        estimator.add(scores, brain, None)
    for scores, lesion in sick:
        estimator.add(scores, brain, lesion)
    return estimator


def test_fpr_thresholds_are_quantiles(volumes):
    found = estimate(volumes).thresholds()
    pooled = np.concatenate([scores.ravel() for scores in volumes[0]])
    for name, level in (("fpr_1pct", 0.01), ("fpr_5pct", 0.05)):
        assert found[name] == pytest.approx(np.quantile(pooled, 1 - level), rel=2e-3)
        assert (pooled > found[name]).mean() <= level


def test_max_dice_equals_a_literal_search(volumes):
    _, sick = volumes

    def mean_dice(threshold):
        return np.mean([2 * ((s > threshold) & m).sum() / ((s > threshold).sum() + m.sum()) for s, m in sick])

    found = estimate(volumes).thresholds()["max_dice"]
    best = max(mean_dice(threshold) for threshold in np.linspace(0, 1.5, 1501))
    assert mean_dice(found) >= best - 1e-3
    # The lowest edge among those with the highest Dice.
    near = FINE_EDGES[np.abs(FINE_EDGES / found - 1) < 0.05]
    dice = np.array([mean_dice(edge) for edge in near])
    assert found == near[np.flatnonzero(dice > dice.max() - 1e-12)[0]]


def test_every_threshold_is_a_bin_edge(volumes):
    estimator = estimate(volumes)
    edges = estimator.bin_edges()
    assert edges[0] == 0
    assert np.isinf(edges[-1])
    assert (np.diff(edges) > 0).all()
    assert set(estimator.thresholds().values()) <= set(edges.tolist())
    # Zero, infinity, the thresholds and at most 500 others; half of these end at twice the highest score.
    healthy, sick = volumes
    highest = max(scores.max() for scores in (*healthy, *(scores for scores, _ in sick)))
    assert edges[-2] == pytest.approx(2 * highest, rel=2.5e-3)
    assert 250 < len(edges) <= 500 + 2 + 3


def test_half_of_the_edges_are_quantiles(volumes):
    """The fraction of voxels above the edges decreases geometrically."""
    edges = estimate(volumes).bin_edges()
    healthy, sick = volumes
    pooled = np.concatenate([scores.ravel() for scores in (*healthy, *(scores for scores, _ in sick))])
    tails = np.geomspace(1, 1e-6, 250)
    for tail in tails[(tails > 1e-3) & (tails < 0.99)]:
        expected = np.quantile(pooled, 1 - tail)
        assert np.abs(edges[:-1] / expected - 1).min() < 4e-3


def test_summary_reports_fpr_and_dice_of_the_thresholds(volumes):
    summary = estimate(volumes).summary()
    assert summary["default_threshold"] == "max_dice"
    pooled = np.concatenate([scores.ravel() for scores in volumes[0]])
    literal = {name: (pooled > threshold).mean() for name, threshold in summary["thresholds"].items()}
    assert summary["validation"]["healthy_fpr"] == pytest.approx(literal, abs=1e-12)
    p95 = {
        name: np.percentile([(scores > threshold).mean() for scores in volumes[0]], 95)
        for name, threshold in summary["thresholds"].items()
    }
    assert summary["validation"]["healthy_p95"] == pytest.approx(p95, rel=1e-6)
    assert summary["validation"]["mean_dice"]["max_dice"] == max(summary["validation"]["mean_dice"].values())
    assert np.isfinite(summary["bin_edges"]).all()


def test_a_threshold_with_high_fpr_is_not_the_default():
    """With random scores, a mask of the whole brain has the highest Dice."""
    rng = np.random.default_rng(0)
    brain = np.ones((20, 20, 20), dtype=bool)
    estimator = ThresholdEstimator()
    estimator.add(rng.random(brain.shape), brain, None)
    estimator.add(rng.random(brain.shape), brain, np.arange(8000).reshape(brain.shape) % 2 == 0)
    summary = estimator.summary()
    assert summary["validation"]["healthy_fpr"]["max_dice"] > 0.5
    assert summary["default_threshold"] == "fpr_1pct"


@pytest.mark.parametrize(("rate", "default"), [(0.018, "max_dice"), (0.022, "fpr_1pct")])
def test_default_threshold_has_an_fpr_of_at_most_two_percent(rate, default):
    rng = np.random.default_rng(0)
    brain = np.ones((20, 20, 20), dtype=bool)
    lesion = np.zeros_like(brain)
    lesion[:6] = True
    healthy = np.where(np.arange(8000).reshape(brain.shape) < 8000 * rate, 0.9, 0.1)
    estimator = ThresholdEstimator()
    estimator.add(healthy, brain, None)
    estimator.add(np.where(lesion, 0.8, 0.2) + 0.01 * rng.random(brain.shape), brain, lesion)
    summary = estimator.summary()
    assert summary["validation"]["healthy_fpr"]["max_dice"] == pytest.approx(rate)
    assert summary["default_threshold"] == default


def test_without_lesions_the_default_is_the_one_percent_threshold(volumes):
    estimator = ThresholdEstimator()
    estimator.add(volumes[0][0], np.ones((20, 20, 20), dtype=bool), None)
    assert estimator.summary()["default_threshold"] == "fpr_1pct"


def test_empty_masks_are_counted_and_do_not_change_thresholds(volumes):
    """Any threshold above the highest score would give these scans a Dice of 1."""
    brain = np.ones((20, 20, 20), dtype=bool)
    plain, with_empty = estimate(volumes), estimate(volumes)
    for scores, _ in volumes[1] * 5:
        with_empty.add(scores, brain, np.zeros_like(brain))
    assert with_empty.thresholds() == plain.thresholds()
    counts = with_empty.summary()["validation"]
    assert counts == plain.summary()["validation"] | {"n_empty_mask": 5 * len(volumes[1])}


def test_a_lesion_outside_the_brain_is_an_empty_mask():
    brain = np.zeros((4, 4, 4), dtype=bool)
    brain[0, 0, 0] = True
    estimator = ThresholdEstimator()
    estimator.add(np.zeros((4, 4, 4)), brain, ~brain)
    assert (estimator.n_lesion, estimator.n_empty_mask) == (0, 1)
    assert estimator.thresholds() == {}


def test_fine_edges_have_a_resolution_of_one_per_mille():
    steps = FINE_EDGES[2:-1] / FINE_EDGES[1:-2]
    assert steps.max() < 1.0011


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused(value):
    scores = np.array([0.1, value, 0.3])
    with pytest.raises(ValueError, match="NaN or infinite scores"):
        count_scores(scores, FINE_EDGES)
    estimator = ThresholdEstimator()
    with pytest.raises(ValueError, match="NaN or infinite scores"):
        estimator.add(scores, np.ones(3, dtype=bool), None)
    estimator.add(scores, np.array([True, False, True]), None)  # outside the brain they are ignored
    assert estimator.n_healthy == 1


def test_an_empty_brain_mask_is_refused():
    with pytest.raises(ValueError, match="the brain mask is empty"):
        ThresholdEstimator().add(np.ones(3), np.zeros(3, dtype=bool), None)


def test_scores_that_are_all_zero_are_refused():
    estimator = ThresholdEstimator()
    estimator.add(np.zeros(9), np.ones(9, dtype=bool), None)
    with pytest.raises(ModelError, match="all anomaly scores of the validation scans are 0"):
        estimator.summary()


@pytest.mark.parametrize(
    ("healthy", "limit", "words"),
    [
        (HealthyMarked(0.004, 0.012), 0.036, "marks 22 % of the brain, .* 1.2 % or less in 95 % of them"),
        (HealthyMarked(0.01, None), 0.1, "marks 22 % of the brain, .* 1 % on average"),
        (HealthyMarked(0.001, 0.0), 0.01, "marks 22 % of the brain, .* 0 % or less"),
        (HealthyMarked(), None, ""),
    ],
)
def test_marked_fraction_far_above_that_of_healthy_scans_is_described(healthy, limit, words):
    assert healthy.limit == pytest.approx(limit)
    assert re.search(words, healthy.warning(0.22, "UniAD"))
    if limit:
        assert healthy.warning(1.01 * limit, "UniAD")
        assert not healthy.warning(0.99 * limit, "UniAD")
    assert not healthy.warning(float("nan"), "UniAD")
    assert HealthyMarked.read(pd.Series(healthy.columns(), dtype=object)) == healthy
    assert HealthyMarked.read({"healthy_mean": "n/a", "healthy_p95": np.nan}) == HealthyMarked()


def test_plain_threshold_is_strictly_above_and_inside_the_brain():
    scores = np.array([[[0.1, 0.2, 0.3, 0.3]]], np.float32)
    brain = np.array([[[True, True, True, False]]])
    assert DecisionRule(float(np.float32(0.2))).mask(scores, brain).tolist() == [
        [[False, False, True, False]]
    ]


def test_plain_threshold_agrees_with_counts_between_single_precision_numbers():
    scores = np.random.default_rng(4).random((10, 10, 10)).astype(np.float32)
    threshold = float(np.sort(scores.ravel())[500]) - 1e-12
    expected = sum(float(score) > threshold for score in scores.ravel())
    assert DecisionRule(threshold).mask(scores, np.ones_like(scores, bool)).sum() == expected


@pytest.fixture(params=range(3))
def smooth(request):
    """Return smooth random scores with components of many sizes, and a brain mask."""
    noise = np.random.default_rng(request.param).normal(size=(40, 36, 30))
    scores = ndimage.gaussian_filter(noise, 1.2)
    brain = ndimage.gaussian_filter(np.random.default_rng(9).normal(size=noise.shape), 4) > -0.02
    return (scores / scores.std()).clip(0).astype(np.float32), brain


def test_hysteresis_equals_morphological_reconstruction(smooth):
    scores, brain = smooth
    low, high = (scores > 0.8) & brain, (scores > 2.2) & brain
    expected = reconstruction(high, low, footprint=np.ones((3, 3, 3))) > 0
    mask = DecisionRule(2.2, 0.8).mask(scores, brain)
    np.testing.assert_array_equal(mask, expected)
    assert high.sum() < mask.sum() < low.sum()
    # scikit-image connects voxels by faces only, so that its mask is a subset.
    faces = apply_hysteresis_threshold(np.where(brain, scores, 0), 0.8, 2.2)
    assert not (faces & ~mask).any()
    assert faces.sum() > 0.9 * mask.sum()


def test_mask_contains_the_voxels_above_the_threshold_and_none_below_the_low_one(smooth):
    scores, brain = smooth
    for low in (0.5, 1.0, 1.8):
        mask = DecisionRule(1.8, low).mask(scores, brain)
        assert not ((scores > 1.8) & brain & ~mask).any()
        assert not (mask & ~((scores > low) & brain)).any()
    np.testing.assert_array_equal(mask, DecisionRule(1.8).mask(scores, brain))


def test_minimum_volume_equals_remove_small_objects(smooth):
    scores, brain = smooth
    plain = (scores > 1.5) & brain
    for volume in (1, 2, 10, 30.0):
        expected = remove_small_objects(plain, max_size=int(volume) - 1, connectivity=3)
        np.testing.assert_array_equal(DecisionRule(1.5, min_volume=volume).mask(scores, brain), expected)


def test_holes_equal_those_of_scipy(smooth):
    scores, _ = smooth
    mask = scores < 1.0
    filled = ndimage.binary_fill_holes(mask)
    np.testing.assert_array_equal(fill_holes(mask, "3d"), filled)
    axial = np.stack([ndimage.binary_fill_holes(layer) for layer in np.moveaxis(mask, 2, 0)], axis=2)
    np.testing.assert_array_equal(fill_holes(mask, "axial"), axial)
    np.testing.assert_array_equal(fill_holes(mask, "none"), mask)
    assert mask.sum() < filled.sum() < axial.sum()


def test_a_shell_is_filled_in_the_brain_and_an_open_tube_only_in_axial_slices():
    scores = np.zeros((30, 30, 30), np.float32)
    scores[2:9, 2:9, 2:9] = 1
    scores[4:7, 4:7, 4:7] = 0  # a shell around 27 voxels
    scores[15:24, 15:24, 10:20] = 1
    scores[18:21, 18:21, 10:20] = 0  # a tube along the last axis, open at both ends
    brain = np.ones(scores.shape, bool)
    brain[5, 5, 5] = False
    n_above = int((scores > 0.5).sum())
    found = {holes: DecisionRule(0.5, holes=holes).mask(scores, brain) for holes in ("none", "3d", "axial")}
    assert {holes: int(mask.sum()) - n_above for holes, mask in found.items()} == {
        "none": 0,
        "3d": 26,
        "axial": 26 + 90,
    }


def test_crumbs_of_one_lesion_grow_together_and_others_disappear():
    scores = np.zeros((30, 30, 30), np.float32)
    scores[5:15, 5:15, 5:15] = 0.4
    scores[6:8, 6:8, 6:8] = scores[12:14, 12:14, 12:14] = 0.9  # two crumbs of one lesion
    scores[20:24, 20:24, 20:24] = 0.4  # never above the threshold
    scores[27, 27, 27] = 0.9  # too small
    mask = DecisionRule(0.8, 0.3, min_volume=10).mask(scores, np.ones(scores.shape, bool))
    expected = np.zeros(scores.shape, bool)
    expected[5:15, 5:15, 5:15] = True
    np.testing.assert_array_equal(mask, expected)


def test_empty_mask_stays_empty():
    scores, brain = np.zeros((5, 5, 5), np.float32), np.ones((5, 5, 5), bool)
    assert not DecisionRule(0.8, 0.3, 10, "axial").mask(scores, brain).any()
    assert bounding_box(np.zeros((5, 5, 5), bool)) == (slice(0, 0),) * 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"low": 0.6}, "low threshold 0.6 exceeds the threshold 0.5"),
        ({"min_volume": -1}, "min_volume must be at least 0"),
        ({"holes": "some"}, "none, 3d, axial, got 'some'"),
    ],
)
def test_impossible_rules_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        DecisionRule(0.5, **options)


def test_bin_edges_include_both_thresholds_of_a_rule(volumes):
    rule = DecisionRule(0.61803, 0.31415)
    found = estimate(volumes).summary(rule)
    assert {0.61803, 0.31415} <= set(found["bin_edges"])
    assert np.diff(found["bin_edges"]).min() > 0
