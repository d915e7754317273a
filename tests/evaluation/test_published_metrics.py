"""Metrics, median filter and thresholds against what the published code computed for the same three maps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bids_uad.calibration.thresholds import FINE_EDGES, ThresholdEstimator, score_counts
from bids_uad.engine.inference import published_median
from bids_uad.evaluation.metrics import average_precision, confusion, dice_curve
from bids_uad.levels.participant.postprocess import count_lesions, label_components
from tests.published import Case

CASE = Case("metrics")
VOLUMES = list(zip(CASE["maps"], CASE["brain"], CASE["lesion"], strict=True))


def counts(edges: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    return [score_counts(*volume, edges) for volume in VOLUMES]


def test_dice_at_every_threshold_of_the_grid():
    edges = np.concatenate([[0.0], CASE["grid"], [np.inf]])
    ours = np.stack([dice_curve(*pair)[1:] for pair in counts(edges)], axis=1)
    np.testing.assert_allclose(ours, CASE["subject_dice"], atol=1e-7)
    np.testing.assert_allclose(ours.mean(axis=1), CASE["mean_dice"], atol=1e-7)


def test_average_precision_up_to_the_width_of_a_bin():
    each = counts(FINE_EDGES)
    found = [average_precision(*pair) for pair in each]
    np.testing.assert_allclose(found, CASE["average_precision_brain"], atol=1e-4)
    pooled = average_precision(*(sum(parts) for parts in zip(*each, strict=True)))
    assert pooled == pytest.approx(float(CASE["average_precision_pooled_brain"]), abs=1e-4)


def test_false_positive_rate_of_all_brains_together():
    pooled = [sum(parts) for parts in zip(*counts(np.array([0.0, 0.05, np.inf])), strict=True)]
    assert confusion(*pooled, 1).false_positive_rate == pytest.approx(float(CASE["fpr_at_0_05"]), abs=5e-6)


def test_thresholds_at_a_false_positive_rate_up_to_the_width_of_a_bin():
    estimator = ThresholdEstimator()
    estimator.add(CASE["maps"], CASE["brain"], None)
    levels, thresholds = CASE["threshold_at_fpr"].T
    assert levels.tolist() == [0.01, 0.05]
    found = estimator.thresholds()
    assert [found["fpr_1pct"], found["fpr_5pct"]] == pytest.approx(thresholds, rel=1.1e-3)


def test_even_median_filter():
    ours = [published_median(torch.from_numpy(scores.copy())).numpy() for scores in CASE["maps"]]
    np.testing.assert_array_equal(ours, CASE["median_4"])


def test_lesion_wise_counts():
    """Lesions, those found, and components that touch none; 26-connected."""
    threshold = float(CASE["hits_threshold"])
    for (scores, brain, lesion), expected in zip(VOLUMES, CASE["hits"], strict=True):
        hits = count_lesions(label_components((scores > threshold) & brain), lesion)
        assert [hits.n_lesions, hits.n_detected, hits.n_false] == expected.tolist()
