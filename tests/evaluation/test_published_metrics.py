"""Metrics, median filter and thresholds against reference outputs of the published code for three maps."""

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


def test_dice_curve_agrees_with_the_published_code():
    edges = np.concatenate([[0.0], CASE["grid"], [np.inf]])
    ours = np.stack([dice_curve(*pair)[1:] for pair in counts(edges)], axis=1)
    np.testing.assert_allclose(ours, CASE["subject_dice"], atol=1e-7)
    np.testing.assert_allclose(ours.mean(axis=1), CASE["mean_dice"], atol=1e-7)


def test_average_precision_agrees_up_to_the_bin_width():
    each = counts(FINE_EDGES)
    found = [average_precision(*pair) for pair in each]
    np.testing.assert_allclose(found, CASE["average_precision_brain"], atol=1e-4)
    pooled = average_precision(*(sum(parts) for parts in zip(*each, strict=True)))
    assert pooled == pytest.approx(float(CASE["average_precision_pooled_brain"]), abs=1e-4)


def test_pooled_false_positive_rate_agrees():
    pooled = [sum(parts) for parts in zip(*counts(np.array([0.0, 0.05, np.inf])), strict=True)]
    assert confusion(*pooled, 1).false_positive_rate == pytest.approx(float(CASE["fpr_at_0_05"]), abs=5e-6)


def test_thresholds_at_false_positive_rates_agree_up_to_the_bin_width():
    estimator = ThresholdEstimator()
    estimator.add(CASE["maps"], CASE["brain"], None)
    levels, thresholds = CASE["threshold_at_fpr"].T
    assert levels.tolist() == [0.01, 0.05]
    found = estimator.thresholds()
    assert [found["fpr_1pct"], found["fpr_5pct"]] == pytest.approx(thresholds, rel=1.1e-3)


def test_median_filter_of_even_size_is_equal():
    ours = [published_median(torch.from_numpy(scores.copy())).numpy() for scores in CASE["maps"]]
    np.testing.assert_array_equal(ours, CASE["median_4"])


def test_lesion_hits_agree():
    """Numbers of lesions, detected lesions and false-positive components; 26-connected."""
    threshold = float(CASE["hits_threshold"])
    for (scores, brain, lesion), expected in zip(VOLUMES, CASE["hits"], strict=True):
        hits = count_lesions(label_components((scores > threshold) & brain), lesion)
        assert [hits.n_lesions, hits.n_detected, hits.n_false] == expected.tolist()
