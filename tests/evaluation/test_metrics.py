from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, precision_recall_curve

from bids_uad.calibration.histogram import score_counts
from bids_uad.calibration.thresholds import ThresholdEstimator
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


def test_every_edge_agrees_with_a_loop_over_voxels(volume):
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


def test_nothing_there_and_nothing_found_is_dice_one_and_reported():
    counts = np.array([7, 2, 0]), np.zeros(3, int)
    result = confusion(*counts, 2)
    assert result.both_empty
    assert result.dice == 1
    assert np.isnan(result.sensitivity)
    assert np.isnan(result.precision)
    np.testing.assert_array_equal(dice_curve(*counts), [0, 0, 1])
    assert not confusion(*counts, 1).both_empty
    assert confusion(*counts, 1).dice == 0


def test_average_precision_is_scikit_learns_on_bin_values():
    generator = np.random.default_rng(0)
    edges = np.linspace(0, 1, 12)
    truth = generator.random(4000) < 0.05
    scores = generator.choice(edges[1:], 4000) * np.where(truth, 1, generator.random(4000) < 0.6)
    values = edges[np.maximum(np.searchsorted(edges, scores, side="left") - 1, 0)]
    found = average_precision(*binned(scores, truth, edges))
    assert found == pytest.approx(average_precision_score(truth, values), abs=1e-12)


def test_the_bins_of_a_bundle_give_average_precision_of_the_continuous_scores():
    generator = np.random.default_rng(1)
    truth = generator.random(60_000) < 0.02
    scores = np.where(truth, generator.beta(4, 6, 60_000), generator.beta(1.2, 9, 60_000))
    estimator = ThresholdEstimator()
    estimator.add(scores[:20_000], np.ones(20_000, bool), truth[:20_000])
    edges = estimator.bin_edges()[:-1]
    found = average_precision(*binned(scores, truth, edges))
    # Voxels of a bin are tied, which can only cost precision.
    reference = average_precision_score(truth, scores)
    assert reference - 2e-3 < found < reference


def test_precision_recall_is_scikit_learns():
    generator = np.random.default_rng(2)
    truth = generator.random(500) < 0.3
    bins = generator.integers(0, len(EDGES), 500)
    n_lesion = np.bincount(bins[truth], minlength=len(EDGES))
    n_nonlesion = np.bincount(bins[~truth], minlength=len(EDGES))
    precision, recall, _ = precision_recall_curve(truth, EDGES[bins])
    ours = precision_recall(n_nonlesion, n_lesion)
    np.testing.assert_allclose(ours[0], precision[:-1])
    np.testing.assert_allclose(ours[1], recall[:-1])


def test_average_precision_without_lesion_is_undefined():
    assert np.isnan(average_precision(np.array([5, 1]), np.array([0, 0])))
    assert average_precision(np.array([5, 0, 0]), np.array([0, 0, 2])) == 1


def test_thresholds_are_edges_up_to_the_digits_of_a_table():
    assert edge_index(EDGES, 0.5) == 2
    assert edge_index(EDGES, 0.5000001) == 2
    assert edge_index(EDGES, 0.0) == 0
    with pytest.raises(ValueError, match=r"0\.6 is not one of"):
        edge_index(EDGES, 0.6)
