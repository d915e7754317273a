"""Bootstrap intervals against SciPy and a literal bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from bids_uad.evaluation import bootstrap
from bids_uad.evaluation.bootstrap import (
    MIN_SUBJECTS,
    _median_of_repeats,
    _resamples,
    bootstrap_interval,
    share_interval,
)


def names(count, repeats=1):
    return [f"sub-{index:03d}" for index in range(count) for _ in range(repeats)]


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_bootstrap_interval_agrees_with_scipy(statistic):
    values = np.random.default_rng(0).beta(2, 5, 301)
    low, high = bootstrap_interval(values, names(301), seed=1, statistic=statistic, n_resamples=20_000)
    reference = stats.bootstrap(
        (values,),
        getattr(np, statistic),
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(5),
    ).confidence_interval
    width = reference.high - reference.low
    assert low == pytest.approx(reference.low, abs=0.06 * width)
    assert high == pytest.approx(reference.high, abs=0.06 * width)


def test_duplicated_images_do_not_narrow_the_interval():
    values = np.random.default_rng(0).normal(size=40)
    once = bootstrap_interval(values, names(40), seed=0)
    twice = bootstrap_interval(np.repeat(values, 2), names(40, 2), seed=0)
    assert twice == pytest.approx(once)
    as_if_independent = bootstrap_interval(np.repeat(values, 2), names(80), seed=0)
    width = as_if_independent[1] - as_if_independent[0]
    assert width == pytest.approx((once[1] - once[0]) / np.sqrt(2), rel=0.05)


def test_weighted_interval_is_that_of_a_ratio_of_totals():
    generator = np.random.default_rng(0)
    total = generator.integers(1, 30, 50)
    found = generator.binomial(total, 0.4)
    low, high = bootstrap_interval(found / total, names(50), weights=total, seed=0, n_resamples=20_000)
    reference = stats.bootstrap(
        (found, total),
        lambda part, whole, axis=-1: part.sum(axis) / whole.sum(axis),
        paired=True,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(5),
    ).confidence_interval
    assert low == pytest.approx(reference.low, abs=0.005)
    assert high == pytest.approx(reference.high, abs=0.005)


def test_draws_depend_on_seed_and_participants_only():
    values = np.random.default_rng(0).normal(size=20)
    first = bootstrap_interval(values, names(20), seed=0)
    assert first == bootstrap_interval(values, names(20), seed=0)
    assert first != bootstrap_interval(values, names(20), seed=1)
    doubled = bootstrap_interval(2 * values, names(20), seed=0)
    assert doubled == pytest.approx(2 * np.array(first))
    backwards = bootstrap_interval(values[::-1], names(20)[::-1], seed=0)
    assert backwards == pytest.approx(first)


def test_too_few_participants_have_no_interval():
    assert np.isnan(bootstrap_interval([], [], seed=0)).all()
    assert np.isnan(bootstrap_interval([1, 2, 3], names(1, 3), seed=0)).all()
    assert np.isnan(bootstrap_interval([1, np.nan, 3], names(3), seed=0)).all()
    assert np.isnan(bootstrap_interval([1, 2, 3, 4], names(4), seed=0)).all()
    assert not np.isnan(bootstrap_interval([1, 2, 3, 4, 5], names(5), seed=0)).any()


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 9])
def test_min_subjects_is_the_lowest_number_without_intervals_from_0_to_1(n, monkeypatch):
    monkeypatch.setattr(bootstrap, "MIN_SUBJECTS", 2)
    whole = 0
    for n_ones in range(n + 1):
        low, high = bootstrap_interval([1.0] * n_ones + [0.0] * (n - n_ones), names(n), seed=0)
        whole += (low, high) == (0, 1)
    assert (whole > 0) == (n < MIN_SUBJECTS)


def test_share_interval_is_missing_if_too_wide():
    # The fraction depends almost entirely on one participant with most of the lesions.
    found, lesions = [0, 1, 1, 1, 1, 1], [200, 1, 1, 1, 1, 1]
    low, high = bootstrap_interval(np.divide(found, lesions), names(6), weights=lesions, seed=0)
    assert high - low > 0.95
    assert np.isnan(share_interval(found, lesions, names(6), seed=0)).all()


def test_share_interval_agrees_with_scipy():
    parts, wholes = np.array([1, 2, 1, 0, 2, 1, 0]), np.array([2, 4, 3, 1, 3, 2, 0])
    found = share_interval(parts, wholes, names(7), seed=0)
    reference = stats.bootstrap(
        (parts[:6], wholes[:6]),  # the last has no lesions
        lambda part, whole, axis=-1: part.sum(axis) / whole.sum(axis),
        paired=True,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(5),
    ).confidence_interval
    assert found == pytest.approx(tuple(reference), abs=0.03)


def test_median_of_repeats_agrees_with_numpy():
    generator = np.random.default_rng(0)
    value = np.sort(generator.normal(size=9))
    repeats = generator.multinomial(9, np.full(9, 1 / 9), size=30)
    repeats[::2, 0] += 1  # even and odd totals
    expected = [np.median(np.repeat(value, row)) for row in repeats]
    np.testing.assert_allclose(_median_of_repeats(value, repeats), expected)


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_interval_agrees_with_a_literal_bootstrap_of_participants(statistic):
    generator = np.random.default_rng(4)
    images = generator.integers(1, 4, 30)
    subjects = np.repeat(names(30), images)
    values = generator.gamma(1, size=30).repeat(images) + generator.normal(0, 0.1, images.sum())
    found = bootstrap_interval(values, subjects, seed=0, statistic=statistic, n_resamples=20_000)
    literal = []
    for _ in range(4000):
        drawn = []
        for subject in generator.choice(names(30), 30):
            drawn += list(values[subjects == subject])
        literal.append(getattr(np, statistic)(drawn))
    reference = np.quantile(literal, [0.025, 0.975])
    np.testing.assert_allclose(found, reference, atol=0.08 * (reference[1] - reference[0]))


def test_resamples_have_the_binomial_distribution_of_draws():
    drawn = _resamples(0, 50, 4000)
    assert (drawn.sum(axis=1) == 50).all()
    np.testing.assert_allclose(drawn.mean(axis=0), 1, atol=0.08)
    shares = [(drawn == times).mean() for times in range(4)]
    np.testing.assert_allclose(shares, stats.binom.pmf(range(4), 50, 1 / 50), atol=0.005)
