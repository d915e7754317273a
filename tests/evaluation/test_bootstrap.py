from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from bids_uad.evaluation.bootstrap import _median_of_repeats, bootstrap_interval


def names(count, repeats=1):
    return [f"sub-{index:03d}" for index in range(count) for _ in range(repeats)]


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_agrees_with_scipy(statistic):
    values = np.random.default_rng(0).beta(2, 5, 60)
    low, high = bootstrap_interval(
        values, names(60), seed=1, key="x", statistic=statistic, n_resamples=20_000
    )
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


def test_a_second_identical_image_of_everyone_adds_no_certainty():
    values = np.random.default_rng(0).normal(size=40)
    once = bootstrap_interval(values, names(40), seed=0, key="x")
    twice = bootstrap_interval(np.repeat(values, 2), names(40, 2), seed=0, key="x")
    assert twice == pytest.approx(once)
    as_if_independent = bootstrap_interval(np.repeat(values, 2), names(80), seed=0, key="x")
    assert as_if_independent[1] - as_if_independent[0] < 0.85 * (once[1] - once[0])


def test_weights_make_a_ratio_of_totals():
    generator = np.random.default_rng(0)
    total = generator.integers(1, 30, 50)
    found = generator.binomial(total, 0.4)
    low, high = bootstrap_interval(
        found / total, names(50), weights=total, seed=0, key="x", n_resamples=20_000
    )
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


def test_seed_and_name_decide_the_draw():
    values = np.random.default_rng(0).normal(size=20)
    first = bootstrap_interval(values, names(20), seed=0, key="dice")
    assert first == bootstrap_interval(values, names(20), seed=0, key="dice")
    assert first != bootstrap_interval(values, names(20), seed=1, key="dice")
    assert first != bootstrap_interval(values, names(20), seed=0, key="fpr")
    backwards = bootstrap_interval(values[::-1], names(20)[::-1], seed=0, key="dice")
    assert backwards == pytest.approx(first)


def test_too_few_people_have_no_interval():
    assert np.isnan(bootstrap_interval([], [], seed=0, key="x")).all()
    assert np.isnan(bootstrap_interval([1, 2, 3], names(1, 3), seed=0, key="x")).all()
    assert np.isnan(bootstrap_interval([1, np.nan, 3], names(3), seed=0, key="x")).all()
    assert not np.isnan(bootstrap_interval([1, 2, 3], names(3), seed=0, key="x")).any()


def test_median_of_repeats_is_numpys():
    generator = np.random.default_rng(0)
    value = np.sort(generator.normal(size=9))
    repeats = generator.multinomial(9, np.full(9, 1 / 9), size=30)
    repeats[::2, 0] += 1  # even and odd totals
    expected = [np.median(np.repeat(value, row)) for row in repeats]
    np.testing.assert_allclose(_median_of_repeats(value, repeats), expected)
