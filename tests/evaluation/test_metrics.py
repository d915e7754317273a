"""Metrics from score histograms against scikit-learn and loops over voxels."""

from __future__ import annotations

from itertools import chain, permutations, product

import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import average_precision_score, f1_score, precision_recall_curve

from bids_uad.calibration.thresholds import ThresholdEstimator, score_counts
from bids_uad.evaluation.metrics import (
    average_precision,
    confusion,
    dice_curve,
    edge_index,
    precision_recall,
)

EDGES = np.array([0.0, 0.25, 0.5, 1.0, 2.0])


def binned(scores, truth, edges=EDGES):
    brain = np.ones(scores.shape, bool)
    return score_counts(scores, brain, truth, np.append(edges, np.inf))


@pytest.fixture
def volume():
    generator = np.random.default_rng(3)
    scores = generator.choice([0, 0.1, 0.25, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 9.0], (6, 5, 4))
    return scores, generator.random((6, 5, 4)) < 0.3


def test_confusion_agrees_with_a_loop_over_voxels_at_each_edge(volume):
    scores, truth = volume
    counts = binned(scores, truth)
    curve = dice_curve(*counts)
    for edge, threshold in enumerate(EDGES):
        if threshold == 0:
            continue  # the lowest bin also holds the zeros
        hit = false = missed = rest = 0
        for score, lesion in zip(scores.ravel(), truth.ravel(), strict=True):
            positive = score > threshold
            hit += positive and lesion
            false += positive and not lesion
            missed += lesion and not positive
            rest += not positive and not lesion
        result = confusion(*counts, edge)
        assert (
            result.true_positive,
            result.false_positive,
            result.false_negative,
            result.true_negative,
        ) == (hit, false, missed, rest)
        assert result.dice == pytest.approx(f1_score(truth.ravel(), scores.ravel() > threshold))
        assert curve[edge] == pytest.approx(result.dice)
        assert result.sensitivity == pytest.approx(hit / (hit + missed))
        assert result.precision == pytest.approx(hit / (hit + false))
        assert result.false_positive_rate == pytest.approx(false / (false + rest))


def test_dice_of_two_empty_masks_is_one():
    counts = np.array([7, 2, 0]), np.zeros(3, int)
    result = confusion(*counts, 2)
    assert result.both_empty
    assert result.dice == 1
    assert np.isnan(result.sensitivity)
    assert np.isnan(result.precision)
    np.testing.assert_array_equal(dice_curve(*counts), [0, 0, 1])
    assert not confusion(*counts, 1).both_empty
    assert confusion(*counts, 1).dice == 0


def test_average_precision_is_the_expectation_over_orders_within_bins():
    n_lesion, n_nonlesion = np.array([1, 2, 1, 2]), np.array([2, 2, 0, 1])
    bins = [[True] * k + [False] * rest for k, rest in zip(n_lesion, n_nonlesion, strict=True)]
    found = []
    for orders in product(*(set(permutations(truth)) for truth in bins[1:])):
        truth = [*bins[0], *chain.from_iterable(orders)]
        # The lowest bin is tied, all others are strictly ordered.
        scores = [0.0] * len(bins[0]) + list(range(1, len(truth) - len(bins[0]) + 1))
        found.append(average_precision_score(truth, scores))
    assert len(found) == 6 * 1 * 3
    assert average_precision(n_nonlesion, n_lesion) == pytest.approx(np.mean(found), abs=1e-12)


def test_average_precision_with_one_voxel_per_bin_agrees_with_scikit_learn():
    truth = np.random.default_rng(0).random(300) < 0.2
    expected = average_precision_score(truth, np.arange(300))
    assert average_precision((~truth).astype(int), truth.astype(int)) == pytest.approx(expected, abs=1e-12)


def score_field(seed, size, contrast, floor):
    """A median-filtered map as detectors make it: smooth noise, bright edges, a lesion of uneven scores."""
    generator = np.random.default_rng(seed)
    shape = (48, 48, 48)
    noise = ndimage.gaussian_filter(generator.normal(size=shape), 1.5) * 6
    edges = ndimage.gaussian_gradient_magnitude(ndimage.gaussian_filter(generator.normal(size=shape), 6), 1)
    distance = ndimage.gaussian_filter(generator.normal(size=shape), 3) * 8
    distance += np.linalg.norm(np.indices(shape) - generator.integers(16, 32, (3, 1, 1, 1)), axis=0)
    lesion = distance <= np.sort(distance, axis=None)[size - 1]
    raised = lesion * contrast * generator.gamma(2, 0.5, shape)
    scores = np.exp(0.7 * noise + edges / edges.std() / 4 + raised) / 20
    return ndimage.median_filter(np.maximum(scores - floor, 0).astype(np.float32), 3), lesion


@pytest.mark.parametrize("floor", [0.0, 0.15], ids=["no zeros", "mostly zeros"])
def test_metrics_from_the_bins_of_a_bundle_agree_with_voxel_wise_metrics(floor):
    """Compare with scikit-learn and a loop over thresholds (1e-3), on scans not used for calibration."""
    estimator = ThresholdEstimator()
    for seed in range(3):
        healthy, _ = score_field(seed, 10, 0.0, floor)
        estimator.add(healthy, np.ones(healthy.shape, bool), None)
        scores, lesion = score_field(10 + seed, 1500, 1.0 + seed / 2, floor)
        estimator.add(scores, np.ones(scores.shape, bool), lesion)
    edges = estimator.bin_edges()[:-1]
    fixed = estimator.thresholds()["max_dice"]
    maps = [
        score_field(20 + k, *how, floor) for k, how in enumerate([(3000, 1.6), (6000, 1.4), (12000, 1.2)])
    ]
    assert (floor > 0) == (np.mean([np.mean(scores == 0) for scores, _ in maps]) > 0.5)
    counts = [binned(*volume, edges) for volume in maps]
    for (scores, lesion), count in zip(maps, counts, strict=True):
        expected = average_precision_score(lesion.ravel(), scores.ravel())
        assert 0.05 < expected < 0.95
        assert average_precision(*count) == pytest.approx(expected, abs=1e-3)
        found = confusion(*count, edge_index(edges, fixed)).dice
        assert found == pytest.approx(f1_score(lesion.ravel(), scores.ravel() > fixed), abs=1e-12)
    candidates = np.unique(np.concatenate([scores[lesion] for scores, lesion in maps]))
    literal = [
        np.mean([2 * ((s > t) & m).sum() / ((s > t).sum() + m.sum()) for s, m in maps])
        for t in candidates[:: max(1, len(candidates) // 300)]
    ]
    best = max(literal)
    assert 0.1 < best < 0.95
    assert np.mean([dice_curve(*count) for count in counts], axis=0).max() == pytest.approx(best, abs=1e-3)


def test_precision_recall_agrees_with_scikit_learn():
    generator = np.random.default_rng(2)
    truth = generator.random(500) < 0.3
    bins = generator.integers(0, len(EDGES), 500)
    n_lesion = np.bincount(bins[truth], minlength=len(EDGES))
    n_nonlesion = np.bincount(bins[~truth], minlength=len(EDGES))
    precision, recall, _ = precision_recall_curve(truth, EDGES[bins])
    ours = precision_recall(n_nonlesion, n_lesion)
    np.testing.assert_allclose(ours[0], precision[:-1])
    np.testing.assert_allclose(ours[1], recall[:-1])


def test_average_precision_without_lesion_is_nan():
    assert np.isnan(average_precision(np.array([5, 1]), np.array([0, 0])))
    assert average_precision(np.array([5, 0, 0]), np.array([0, 0, 2])) == 1


def test_edge_index_tolerates_rounding_only():
    assert edge_index(EDGES, 0.5) == 2
    assert edge_index(EDGES, 0.5000001) == 2
    assert edge_index(EDGES, 0.0) == 0
    for between in (0.6, 0.50001, 0.4999, 1.001):
        with pytest.raises(ValueError, match="is not one of"):
            edge_index(EDGES, between)
