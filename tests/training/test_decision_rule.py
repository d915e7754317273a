"""Choice of a decision rule, against masks made and counted one by one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage
from scipy.stats import sem

from bids_uad.calibration.deviation import ValidationMap
from bids_uad.calibration.thresholds import DecisionRule, ThresholdEstimator
from bids_uad.levels.participant.postprocess import count_lesions, label_components
from bids_uad.training import decision_rule
from bids_uad.training.decision_rule import (
    MAX_MEDIAN_MARKED,
    ChosenRule,
    _Results,
    by_class,
    candidate_rules,
    candidate_thresholds,
    choose_rule,
    outcomes,
    outcomes_of_masks,
)

SHAPE = (40, 40, 30)
PERSON = {"age": None, "sex": None}


def scan_of(number, *, lesions=(), subject=None, kind="tumour"):
    """Return a map of smooth noise; each lesion is (centre, radius, score in the middle, score around).

    Scans with lesions have a false positive with a score between the two.
    """
    noise = np.random.default_rng(number).normal(size=SHAPE)
    scores = ndimage.gaussian_filter(noise, 1.0)
    scores = (0.1 * scores / scores.std()).clip(0)
    brain = np.zeros(SHAPE, bool)
    brain[2:-2, 2:-2, 2:-2] = True
    truth = np.zeros(SHAPE, bool)
    for centre, radius, middle, around in lesions:
        axes = np.ogrid[tuple(slice(0, size) for size in SHAPE)]
        distance = np.sqrt(sum((axis - c) ** 2 for axis, c in zip(axes, centre, strict=True)))
        truth |= distance <= radius
        scores = np.where(distance <= radius, around + scores / 3, scores)
        scores = np.where(distance <= radius / 3, middle, scores)
    healthy = not lesions
    if not healthy:
        scores[32:37, 32:37, 22:27] = 0.3
    scores = np.where(brain, scores, 0).astype(np.float32)
    return ValidationMap(subject or f"sub-{number}", PERSON, kind, scores, brain, None if healthy else truth)


LARGE = ((20, 20, 15), 8, 0.9, 0.22)
SMALL = ((8, 30, 8), 2.5, 0.8, 0.25)


@pytest.fixture(scope="module")
def scans():
    sick = [(LARGE,), (SMALL,), (LARGE, SMALL), (SMALL, ((30, 8, 22), 3, 0.7, 0.25))]
    return [scan_of(k) for k in range(4)] + [
        scan_of(10 + k, lesions=lesions, kind="ms" if k % 2 else "tumour") for k, lesions in enumerate(sick)
    ]


def stored(scans, folder):
    return [scan.store(folder / f"{number}.npz") for number, scan in enumerate(scans)]


def estimator_of(scans):
    estimator = ThresholdEstimator()
    for scan in scans:
        estimator.add(scan.scores, scan.brain, scan.lesion, scan.kind)
    return estimator


def literal(scan, rule, min_volume):
    """Return marked fraction, Dice and lesion-wise F1 of a mask."""
    mask = rule.mask(scan.scores, scan.brain)
    truth = np.zeros_like(mask) if scan.lesion is None else scan.lesion & scan.brain
    marked = (mask & ~truth).sum() / (scan.brain & ~truth).sum()
    if scan.lesion is None:
        return marked, np.nan, np.nan
    counts = count_lesions(label_components(mask), truth, min_volume)
    f1 = 2 * counts.n_detected / (counts.n_lesions + counts.n_detected + counts.n_false)
    return marked, 2 * (mask & truth).sum() / (mask.sum() + truth.sum()), f1


def test_stored_maps_are_read_back_exactly(scans, tmp_path):
    for scan, file in zip(scans, stored(scans, tmp_path), strict=True):
        again = file.load()
        np.testing.assert_array_equal(again.scores, scan.scores)
        np.testing.assert_array_equal(again.brain, scan.brain)
        assert (again.lesion is None) == (scan.lesion is None) == file.healthy
        if scan.lesion is not None:
            np.testing.assert_array_equal(again.lesion, scan.lesion)


def test_outcomes_equal_those_of_masks_made_one_by_one(scans):
    rules = candidate_rules(np.array([0.15, 0.2, 0.3, 0.5, 0.75]))
    assert len(rules) == 15 * len(decision_rule.MIN_VOLUMES)
    for scan in scans:
        for found in (outcomes(scan, rules, 3.0), outcomes_of_masks(scan, rules, 3.0)):
            columns = zip(found.marked, found.dice, found.f1, strict=True)
            for rule, values in zip(rules, columns, strict=True):
                assert values == pytest.approx(literal(scan, rule, 3.0), nan_ok=True)


def test_outcomes_of_masks_include_filled_holes(scans):
    scan = scans[-1]
    rules = [DecisionRule(0.3, 0.02, 10, holes) for holes in ("none", "3d", "axial")]
    found = outcomes_of_masks(scan, rules, 3.0)
    assert found.dice == pytest.approx([literal(scan, rule, 3.0)[1] for rule in rules])
    assert found.marked[0] < found.marked[2]


def test_candidate_thresholds_have_the_stated_healthy_rates(scans):
    estimator = estimator_of(scans)
    thresholds = candidate_thresholds(estimator)
    assert estimator.thresholds()["max_dice"] in thresholds
    healthy = np.concatenate([scan.scores[scan.brain] for scan in scans if scan.lesion is None])
    rates = [np.mean(healthy > threshold) for threshold in thresholds]
    for level in decision_rule.HEALTHY_RATES:
        assert min(abs(rate - level) for rate in rates) < 0.1 * level + 2 / healthy.size


def test_chosen_rule_keeps_the_limits(scans, tmp_path):
    estimator = estimator_of(scans)
    chosen = choose_rule(stored(scans, tmp_path), estimator, 3.0)
    results = [literal(scan, chosen.rule, 3.0) for scan in scans]
    marked = [result[0] for result, scan in zip(results, scans, strict=True) if scan.lesion is None]
    assert np.median(marked) <= MAX_MEDIAN_MARKED
    assert chosen.figures["within_limits"] == (
        np.median(marked) <= 0.003 and np.percentile(marked, 95) <= 0.02
    )
    assert chosen.figures["healthy_median"] == pytest.approx(np.median(marked))
    assert chosen.figures["healthy_p95"] == pytest.approx(np.percentile(marked, 95))
    assert chosen.healthy_fpr == pytest.approx(np.mean(marked))
    sick = [result for result, scan in zip(results, scans, strict=True) if scan.lesion is not None]
    assert chosen.figures["dice"] == pytest.approx(np.mean([result[1] for result in sick]))
    assert chosen.figures["lesion_f1"] == pytest.approx(np.mean([result[2] for result in sick]))
    assert chosen.figures["criterion"] == pytest.approx(np.mean([np.mean(result[1:]) for result in sick]))
    assert chosen.mean_dice["ms"] == pytest.approx(np.mean([sick[1][1], sick[3][1]]))
    assert chosen.mean_dice[None] == pytest.approx(chosen.figures["dice"])


def test_hysteresis_is_better_than_a_plain_threshold(scans):
    """The lesions are dim around bright middles: one threshold misses the edges or marks others."""
    rules = candidate_rules(candidate_thresholds(estimator_of(scans)))
    criterion = np.mean([outcomes(scan, rules, 3.0).criterion for scan in scans[4:]], axis=0)
    plain = np.array([rule.threshold == rule.low for rule in rules])
    assert criterion[~plain].max() > criterion[plain].max() + 0.02


def literal_choice(rules, tables, healthy):
    """Return the index of the most sensitive rule within a standard error of the best, rule by rule."""
    eligible = {}
    for index in range(len(rules)):
        marked = [table.marked[index] for table, control in zip(tables, healthy, strict=True) if control]
        if np.median(marked) <= 0.003 and np.percentile(marked, 95) <= 0.02:
            own = [table for table, control in zip(tables, healthy, strict=True) if not control]
            eligible[index] = {
                name: np.array([getattr(table, name)[index] for table in own])
                for name in ("dice", "criterion")
            }
    highest = max(results["dice"].mean() for results in eligible.values())
    eligible = {k: results for k, results in eligible.items() if results["dice"].mean() >= 0.95 * highest}
    best = max((results["criterion"] for results in eligible.values()), key=np.mean)
    losses = {index: best - results["criterion"] for index, results in eligible.items()}
    eligible = {
        index: results
        for index, results in eligible.items()
        if losses[index].mean() <= (sem(losses[index]) if losses[index].any() else 0)
    }
    near = [
        (rules[index].threshold, -results["criterion"].mean(), index) for index, results in eligible.items()
    ]
    return min(near)[-1]


def test_the_most_sensitive_rule_within_a_standard_error_is_chosen(scans, tmp_path):
    rules = candidate_rules(candidate_thresholds(estimator_of(scans)))
    tables = [outcomes(scan, rules, 3.0) for scan in scans]
    expected = rules[literal_choice(rules, tables, [scan.lesion is None for scan in scans])]
    chosen = choose_rule(stored(scans, tmp_path), estimator_of(scans), 3.0)
    assert replace(chosen.rule, holes="none") == expected


@pytest.mark.parametrize(("losses", "expected"), [([0.3, -0.1], 0), ([0.11, 0.09], 1), ([0.1, 0.1], 1)])
def test_a_lower_threshold_may_cost_a_standard_error(losses, expected):
    """The mean loss is 0.1; its standard error is 0.2, 0.01 and 0."""
    best = np.array([0.9, 0.5])
    criterion = np.stack([best - losses, best, best - 0.1 * np.array(losses)], axis=1)
    marked = np.zeros_like(criterion)
    dice = np.ones_like(criterion)
    results = _Results(criterion, marked, dice, criterion, np.array([0.1, 0.2, 0.3]), np.zeros(2, bool))
    assert results.best(np.ones(2, bool), [1, 2]) == 1
    assert results.best(np.ones(2, bool), [0, 1, 2]) == expected


def test_a_higher_lesion_wise_f1_does_not_make_up_for_a_lower_dice():
    """A rule that joins lesions by marking their surroundings is not chosen if it costs over 5 % of Dice."""
    dice = np.array([[0.6, 0.5], [0.7, 0.61], [0.5, 0.42]])
    f1 = np.array([[0.2, 0.6], [0.3, 0.7], [0.2, 0.5]])
    thresholds, healthy, marked = np.array([0.5, 0.4]), np.zeros(3, bool), np.zeros_like(dice)
    used = np.ones(3, bool)
    results = _Results((dice + f1) / 2, marked, dice, f1, thresholds, healthy)
    assert results.best(used, [0, 1]) == 0
    dice[:, 1] = 0.96 * dice[:, 0]
    results = _Results((dice + f1) / 2, marked, dice, f1, thresholds, healthy)
    assert results.best(used, [0, 1]) == 1


def test_left_out_figures_are_those_of_rules_chosen_without_the_subject(scans, tmp_path):
    files = stored(scans, tmp_path)
    chosen = choose_rule(files, estimator_of(scans), 3.0)
    rules = candidate_rules(candidate_thresholds(estimator_of(scans)))
    tables = [outcomes(scan, rules, 3.0) for scan in scans]
    healthy = np.array([scan.lesion is None for scan in scans])
    dice = []
    for number in np.flatnonzero(~healthy):
        rest = [k for k in range(len(scans)) if k != number]
        rule = rules[literal_choice(rules, [tables[k] for k in rest], healthy[rest])]
        dice.append(literal(scans[number], rule, 3.0)[1])
    if chosen.rule.holes == "none":
        assert chosen.figures["left_out"]["dice"] == pytest.approx(np.mean(dice))
    assert chosen.figures["left_out"]["criterion"] <= chosen.figures["criterion"] + 1e-12


@pytest.mark.parametrize(
    ("dice", "within", "expected"),
    [
        (0.2, (True, False), True),
        (0.9, (False, True), False),
        (0.51, (True, True), True),
        (0.476, (True, True), True),
        (0.474, (True, True), False),
        (0.476, (False, False), True),
    ],
)
def test_rules_of_two_kinds_are_compared_by_limits_and_then_by_dice(dice, within, expected):
    one, other = (
        ChosenRule(DecisionRule(0.5), {"within_limits": is_within, "dice": value}, None, {})
        for value, is_within in zip((dice, 0.5), within, strict=True)
    )
    assert one.is_as_good_as(other) is expected


def test_the_rule_that_exceeds_the_limits_least_is_used_if_none_keeps_them(scans, tmp_path, monkeypatch):
    monkeypatch.setattr(decision_rule, "HEALTHY_RATES", (0.3, 0.2, 0.1))
    bright = [
        ValidationMap(scan.subject, PERSON, "", scan.scores.copy(), scan.brain, None) for scan in scans[:4]
    ]
    for scan in bright:
        scan.scores[10:20, 10:20, 10:20] = 0.95  # above every candidate, 3 % of the brain
    used = [*bright, *scans[4:]]
    chosen = choose_rule(stored(used, tmp_path), estimator_of(used), 3.0)
    assert not chosen.figures["within_limits"]
    marked = [literal(scan, chosen.rule, 3.0)[0] for scan in bright]
    assert np.median(marked) == pytest.approx(1000 / bright[0].brain.sum(), rel=0.2)


def test_without_lesions_there_is_no_rule_and_without_controls_no_limit(scans, tmp_path):
    assert choose_rule(stored(scans[:4], tmp_path), estimator_of(scans[:4]), 3.0) is None
    sick = scans[4:]
    chosen = choose_rule(stored(sick, tmp_path), estimator_of(sick), 3.0)
    assert chosen.figures["healthy_median"] is None
    assert chosen.healthy_fpr is None
    assert chosen.figures["within_limits"]


def test_empty_lesion_masks_are_not_used(scans, tmp_path):
    empty = ValidationMap("sub-99", PERSON, "ms", scans[0].scores, scans[0].brain, np.zeros(SHAPE, bool))
    files = stored([*scans, empty], tmp_path)
    estimator = estimator_of(scans)
    assert choose_rule(files, estimator, 3.0) == choose_rule(files[:-1], estimator, 3.0)


def test_by_class_averages_the_scans_of_each_class():
    volumes = np.array([0.5, 3.0, 1.0, 50.0, np.nan])
    results = {
        "dice": np.array([0.1, 0.4, 0.6, 0.9, np.nan]),
        "lesion_f1": np.array([np.nan, 1.0, np.nan, 0.25, np.nan]),
    }
    small, medium, large = by_class(volumes, (0, 1, 5, 20), results)
    assert small == {
        "from": 0, "to": 1, "n": 1,
        "mean_dice": 0.1, "median_dice": 0.1, "mean_lesion_f1": None, "median_lesion_f1": None,
    }  # fmt: skip
    assert (medium["from"], medium["to"], medium["n"]) == (1, 5, 2)
    assert medium["mean_dice"] == pytest.approx(0.5)
    assert medium["mean_lesion_f1"] == 1.0
    assert (large["from"], large["to"], large["n"], large["mean_dice"]) == (20, None, 1, 0.9)
