"""Choice of a decision rule on validation scans.

The criterion is the mean over lesion scans of the mean of Dice and lesion-wise F1, in which a small lesion
counts as much as a large one. The fraction of healthy brains that is marked is limited, and mean Dice may not
be more than 5 % lower than that of the rule with the highest Dice, since a low threshold that joins lesions
raises the lesion-wise F1 but marks their surroundings. Of the rules that are not worse than the
best one by more than a standard error, the most sensitive one is chosen, since lesions of real scans have
lower scores than those of simulated ones (the one-standard-error rule of Breiman et al. 1984, "Classification
and regression trees", which prefers the simplest one). Low and high thresholds
and minimum volumes are searched together, on a table of the components of each scan; ways of filling holes
are compared afterwards, for the best of these rules. The performance on other scans is estimated by leaving
out one subject at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Any

import numpy as np
from scipy import ndimage

from bids_uad.calibration.deviation import StoredMap, ValidationMap
from bids_uad.calibration.thresholds import (
    CONNECTIVITY,
    FILLING,
    FINE_EDGES,
    DecisionRule,
    ThresholdEstimator,
    above,
    reaches_volume,
)
from bids_uad.evaluation.metrics import lesion_wise
from bids_uad.images import bounding_box
from bids_uad.space import VOXEL_MM3

ML_VOXELS = 1000 / VOXEL_MM3
"""Voxels of one mL."""

HEALTHY_RATES = (0.03, 0.02, 0.014, 0.01, 0.007, 0.005, 0.0035, 0.0025, 0.0015, 0.001, 0.0005, 0.0002, 0.0001)
"""Fractions of healthy voxels above the thresholds that are tried."""
MIN_VOLUMES = (0.0, 10.0, 30.0, 60.0, 100.0)
"""Minimum volumes of a component in mm3 that are tried."""
MIN_RELATIVE_DICE = 0.95
"""Mean Dice of rules that are accepted, divided by the highest."""
MAX_MEDIAN_MARKED, MAX_P95_MARKED = 0.003, 0.02
"""Limits of the marked fraction of healthy brains: median and 95th percentile over scans."""


VOLUME_LIMITS_ML = (0, 1, 5, 20)
"""Lesion volumes at which scans are divided into classes, for the model card."""
AGE_LIMITS = (0, 40, 60, 75)
"""The same for the ages of healthy controls in years."""


@dataclass(frozen=True)
class Outcome:
    """Results of rules for one scan; those of lesions are NaN for healthy controls.

    Parameters
    ----------
    marked : numpy.ndarray, shape (n,)
        Marked fraction of the brain outside the lesions.
    dice, f1 : numpy.ndarray, shape (n,)
        Dice, and lesion-wise F1 (NaN if all lesions are below the minimum volume).
    """

    marked: np.ndarray
    dice: np.ndarray
    f1: np.ndarray

    @property
    def criterion(self) -> np.ndarray:
        """Mean of Dice and lesion-wise F1; Dice alone if F1 is not defined."""
        return np.where(np.isnan(self.f1), self.dice, (self.dice + self.f1) / 2)


@dataclass(frozen=True)
class ChosenRule:
    """A decision rule and its results.

    Parameters
    ----------
    rule : DecisionRule
        The rule.
    figures : dict
        `criterion`, `dice` and `lesion_f1` (means over lesion scans), `healthy_median` and `healthy_p95`
        (marked fraction of healthy brains), `within_limits`, and the same figures in `left_out`, where each
        subject is scored by the rule that is chosen without it; NaN and empty sets of scans are None.
        `by_volume` and `by_age` list results by volume of the lesions and by age of healthy controls, see
        :func:`by_class`.
    healthy_fpr : float or None
        Mean marked fraction of healthy brains; None without healthy controls.
    mean_dice : dict of str or None to float
        Mean Dice by type of lesion; the key None for all lesion scans.
    """

    rule: DecisionRule
    figures: dict[str, Any]
    healthy_fpr: float | None
    mean_dice: dict[str | None, float]

    def is_as_good_as(self, other: ChosenRule) -> bool:
        """Compare with the rule for another kind of maps of the same scans.

        A rule within the limits is better than one that is not. Otherwise it is as good if its mean Dice is
        at most 5 % lower.
        """
        within_limits = self.figures["within_limits"]
        if within_limits != other.figures["within_limits"]:
            return within_limits
        return self.figures["dice"] >= MIN_RELATIVE_DICE * other.figures["dice"]


def candidate_thresholds(estimator: ThresholdEstimator) -> np.ndarray:
    """Return the thresholds that are tried, in increasing order.

    Parameters
    ----------
    estimator : ThresholdEstimator
        Histograms of the validation scans.

    Returns
    -------
    numpy.ndarray of float64
        Lowest edges at which the fraction of healthy voxels (of all voxels without healthy controls) above
        is at most each of `HEALTHY_RATES`, and ``max_dice``; positive.
    """
    counts = estimator.healthy if estimator.n_healthy else estimator.all_voxels
    rate = above(counts) / counts.sum()
    edges = {float(FINE_EDGES[np.argmax(rate <= level)]) for level in HEALTHY_RATES}
    edges |= {estimator.thresholds().get("max_dice", 0.0)}
    return np.array(sorted(edge for edge in edges if edge > 0))


def candidate_rules(thresholds: np.ndarray) -> list[DecisionRule]:
    """Return the rules without filling that are tried, the simplest first."""
    pairs = [(high, low) for high in thresholds for low in thresholds if low <= high]
    pairs.sort(key=lambda pair: pair[0] != pair[1])
    return [
        DecisionRule(float(high), float(low), volume) for volume, (high, low) in product(MIN_VOLUMES, pairs)
    ]


def outcomes(scan: ValidationMap, rules: Sequence[DecisionRule], min_lesion_volume: float) -> Outcome:
    """Compute the results of rules without filling for one scan, from tables of its components.

    Parameters
    ----------
    scan : ValidationMap
        The scan.
    rules : sequence of DecisionRule
        Rules that do not fill holes.
    min_lesion_volume : float
        Minimum volume in mm3 of counted lesions and false components.

    Returns
    -------
    Outcome
        One value per rule.
    """
    lows = sorted({rule.low for rule in rules})
    box = bounding_box((scan.scores > np.float64(lows[0])) & scan.brain)
    lesions, n_counted, n_lesion, truth = _lesions(scan, min_lesion_volume)
    tables = {
        low: _component_table(scan.scores[box], scan.brain[box], truth[box], lesions[box], low)
        for low in lows
    }
    n_brain = int(scan.brain.sum())
    rows = []
    for rule in rules:
        table = tables[rule.low]
        kept = (table["peak"] > rule.threshold) & reaches_volume(table["size"], rule.min_volume)
        found = np.unique(table["lesion"][kept[table["owner"]]])
        false = kept & (table["overlap"] == 0) & reaches_volume(table["size"], min_lesion_volume)
        counts = (table["size"][kept].sum(), table["overlap"][kept].sum(), found.size, false.sum())
        rows.append(_figures(scan, n_brain, n_lesion, n_counted, *map(int, counts)))
    return Outcome(*(np.array(column) for column in zip(*rows, strict=True)))


def outcomes_of_masks(
    scan: ValidationMap, rules: Sequence[DecisionRule], min_lesion_volume: float
) -> Outcome:
    """Compute the results of any rules for one scan by applying them; parameters as in :func:`outcomes`."""
    lesions, n_counted, n_lesion, truth = _lesions(scan, min_lesion_volume)
    n_brain = int(scan.brain.sum())
    rows = []
    for rule in rules:
        mask = rule.mask(scan.scores, scan.brain)
        box = bounding_box(mask)
        table = _component_table(mask[box].astype(np.float32), mask[box], truth[box], lesions[box], 0.5)
        false = (table["overlap"] == 0) & reaches_volume(table["size"], min_lesion_volume)
        counts = (table["size"].sum(), table["overlap"].sum(), np.unique(table["lesion"]).size, false.sum())
        rows.append(_figures(scan, n_brain, n_lesion, n_counted, *map(int, counts)))
    return Outcome(*(np.array(column) for column in zip(*rows, strict=True)))


def _lesions(scan: ValidationMap, min_volume: float) -> tuple[np.ndarray, int, int, np.ndarray]:
    """Return counted lesions (labels 1..n), n, number of lesion voxels and the lesion mask, in the brain."""
    truth = np.zeros_like(scan.brain) if scan.lesion is None else scan.lesion & scan.brain
    labels, count = ndimage.label(truth, structure=CONNECTIVITY)
    counted = reaches_volume(np.bincount(labels.ravel(), minlength=count + 1), max(min_volume, VOXEL_MM3))
    counted[0] = False
    numbers = np.where(counted, np.cumsum(counted), 0)
    return numbers[labels], int(numbers.max()), int(truth.sum()), truth


def _component_table(
    scores: np.ndarray, brain: np.ndarray, truth: np.ndarray, lesions: np.ndarray, low: float
) -> dict[str, np.ndarray]:
    """Measure the components of the voxels above a threshold.

    Returns
    -------
    dict
        `size`, `overlap` with `truth` (voxels) and `peak` score of each component, shape (n,); `owner` and
        `lesion`: pairs of a component (from 0) and a counted lesion that overlap.
    """
    labels, count = ndimage.label((scores > np.float64(low)) & brain, structure=CONNECTIVITY)
    voxels = np.flatnonzero(labels)
    owner = labels.ravel()[voxels] - 1
    peak = np.zeros(count)
    np.maximum.at(peak, owner, scores.ravel()[voxels].astype(np.float64))
    lesion = lesions.ravel()[voxels]
    pairs = np.unique(np.stack([owner[lesion > 0], lesion[lesion > 0]]), axis=1)
    return {
        "size": np.bincount(owner, minlength=count),
        "overlap": np.bincount(owner[truth.ravel()[voxels]], minlength=count),
        "peak": peak,
        "owner": pairs[0],
        "lesion": pairs[1],
    }


def _figures(
    scan: ValidationMap,
    n_brain: int,
    n_lesion: int,
    n_counted: int,
    positive: int,
    overlap: int,
    found: int,
    false: int,
) -> tuple[float, float, float]:
    """Return marked fraction, Dice and lesion-wise F1 from counts of voxels and components."""
    marked = (positive - overlap) / (n_brain - n_lesion)
    if scan.lesion is None:
        return marked, np.nan, np.nan
    f1 = lesion_wise(n_counted, found, false)["lesion_f1"] if n_counted else np.nan
    return marked, 2 * overlap / (positive + n_lesion), f1


@dataclass(frozen=True)
class _Results:
    """Results of all rules for all scans: arrays of shape (scans, rules), thresholds and the scans' roles."""

    criterion: np.ndarray
    marked: np.ndarray
    dice: np.ndarray
    f1: np.ndarray
    thresholds: np.ndarray
    healthy: np.ndarray

    @classmethod
    def of(cls, found: Sequence[Outcome], rules: Sequence[DecisionRule], healthy: np.ndarray) -> _Results:
        names = ("criterion", "marked", "dice", "f1")
        columns = (np.stack([getattr(each, name) for each in found]) for name in names)
        return cls(*columns, np.array([rule.threshold for rule in rules]), healthy)

    def best(self, used: np.ndarray, columns: Sequence[int]) -> int:
        """Return the best of some rules on some scans.

        Of the rules within the limits, those whose mean Dice is at most 5 % lower than the highest; of these,
        those whose criterion is not lower than the highest by more than the standard error of the paired
        difference; of these, that with the lowest threshold, and then the highest criterion. If no rule is
        within the limits, that which exceeds them least.
        """
        columns, lesion = np.asarray(columns), used & ~self.healthy
        if (used & self.healthy).any():
            excess = _excess(self.marked[np.ix_(used & self.healthy, columns)])
            if excess.min() > 1:
                return int(columns[excess.argmin()])
            columns = columns[excess <= 1]
        dice = self.dice[np.ix_(lesion, columns)].mean(axis=0)
        columns = columns[dice >= MIN_RELATIVE_DICE * dice.max()]
        criterion = self.criterion[np.ix_(lesion, columns)]
        loss = criterion[:, [criterion.mean(axis=0).argmax()]] - criterion
        columns = columns[loss.mean(axis=0) <= _standard_error(loss)]
        thresholds = self.thresholds[columns]
        columns = columns[thresholds == thresholds.min()]
        mean = self.criterion[np.ix_(lesion, columns)].mean(axis=0)
        return int(columns[mean.argmax()])

    def figures(self, rules: np.ndarray) -> dict[str, Any]:
        """Summarise the results of one rule per scan, given their indices, shape (scans,)."""
        own = np.arange(len(rules)), rules
        lesion, marked = ~self.healthy, self.marked[own][self.healthy]
        return {
            "criterion": float(self.criterion[own][lesion].mean()),
            "dice": float(self.dice[own][lesion].mean()),
            "lesion_f1": _mean(self.f1[own][lesion]),
            "healthy_median": float(np.median(marked)) if marked.size else None,
            "healthy_p95": float(np.percentile(marked, 95)) if marked.size else None,
            "within_limits": bool(_excess(marked[:, None])[0] <= 1) if marked.size else True,
        }


def _standard_error(values: np.ndarray) -> np.ndarray | float:
    """Return the standard error of the mean along the first axis; 0 for a single value."""
    return values.std(axis=0, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0


def _mean(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else None


def _excess(marked: np.ndarray) -> np.ndarray:
    """Return the larger ratio of median and 95th percentile to their limits; `marked` is (scans, rules)."""
    median, high = np.percentile(marked, [50, 95], axis=0)
    return np.maximum(median / MAX_MEDIAN_MARKED, high / MAX_P95_MARKED)


def choose_rule(
    maps: Sequence[StoredMap],
    estimator: ThresholdEstimator,
    min_lesion_volume: float,
) -> ChosenRule | None:
    """Choose the decision rule for one kind of maps.

    Parameters
    ----------
    maps : sequence of StoredMap
        Maps of the validation scans, which are read twice, one at a time. Scans of patients with an empty
        lesion mask are not used.
    estimator : ThresholdEstimator
        Histograms of the same maps.
    min_lesion_volume : float
        Minimum volume in mm3 of counted lesions and false components.

    Returns
    -------
    ChosenRule or None
        None without a scan with a lesion.
    """
    rules = candidate_rules(candidate_thresholds(estimator))
    used, subjects, kinds, healthy, found, volumes = [], [], [], [], [], []
    for stored in maps:
        scan = stored.load()
        if scan.lesion is None or (scan.lesion & scan.brain).any():
            used.append(stored)
            subjects.append(scan.subject)
            kinds.append(scan.kind)
            healthy.append(scan.lesion is None)
            volumes.append(np.nan if scan.lesion is None else (scan.lesion & scan.brain).sum() / ML_VOXELS)
            found.append(outcomes(scan, rules, min_lesion_volume))
    if not rules or all(healthy):
        return None
    healthy = np.array(healthy)
    results = _Results.of(found, rules, healthy)
    subjects = np.array(subjects)
    folds = _folds(subjects, healthy)
    every = range(len(rules))
    unfilled = [results.best(fold, every) for fold in folds]
    variants = {index: [replace(rules[index], holes=holes) for holes in FILLING] for index in unfilled}
    tried = [rule for group in variants.values() for rule in group]
    results = _Results.of(
        [outcomes_of_masks(stored.load(), tried, min_lesion_volume) for stored in used],
        tried,
        healthy,
    )
    chosen = [
        results.best(fold, [tried.index(rule) for rule in variants[index]])
        for fold, index in zip(folds, unfilled, strict=True)
    ]
    best = chosen[0]
    by_subject = dict(zip(_subjects_left_out(subjects), chosen[1:], strict=True))
    left_out = np.array([by_subject[subject] for subject in subjects])
    figures = results.figures(np.full(len(used), best))
    figures["left_out"] = results.figures(left_out)
    scores = {"dice": results.dice[:, best], "lesion_f1": results.f1[:, best]}
    figures["by_volume"] = by_class(np.array(volumes), VOLUME_LIMITS_ML, scores)
    ages = np.array([stored.person.get("age") if stored.healthy else None for stored in used], dtype=float)
    figures["by_age"] = by_class(ages, AGE_LIMITS, {"marked": results.marked[:, best]})
    return ChosenRule(tried[best], figures, *_means(results, best, kinds))


def by_class(
    values: np.ndarray, limits: Sequence[float], results: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Average results of scans by classes of a property.

    Parameters
    ----------
    values : numpy.ndarray, shape (scans,)
        Property; NaN if it is not known or does not apply.
    limits : sequence of float
        Lower limits of the classes, increasing.
    results : mapping of str to numpy.ndarray, shape (scans,)
        Results by name; NaN is left out.

    Returns
    -------
    list of dict
        For each class with a scan: `from`, `to` (None in the last class), the number of scans `n`, and mean
        and median of the results, named ``mean_dice`` and ``median_dice``, for example.
    """
    rows = []
    for low, high in pairwise((*limits, np.inf)):
        inside = (values >= low) & (values < high)
        if not inside.any():
            continue
        row = {"from": low, "to": high if np.isfinite(high) else None, "n": int(inside.sum())}
        for name, numbers in results.items():
            known = numbers[inside & ~np.isnan(numbers)]
            row[f"mean_{name}"] = float(known.mean()) if known.size else None
            row[f"median_{name}"] = float(np.median(known)) if known.size else None
        rows.append(row)
    return rows


def _subjects_left_out(subjects: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(subjects))


def _folds(subjects: np.ndarray, healthy: np.ndarray) -> list[np.ndarray]:
    """Return masks of all scans, and of all but those of each subject.

    If a subject has the only lesion scans, or all of the healthy ones, it is not left out.
    """
    folds = [np.ones(len(subjects), dtype=bool)]
    for subject in _subjects_left_out(subjects):
        rest = subjects != subject
        complete = (rest & ~healthy).any() and (rest & healthy).any() == healthy.any()
        folds.append(rest if complete else folds[0])
    return folds


def _means(
    results: _Results, best: int, kinds: Sequence[str]
) -> tuple[float | None, dict[str | None, float]]:
    """Return the mean marked fraction of healthy brains, and the mean Dice by type of lesion."""
    marked = results.marked[results.healthy, best]
    dice, of = results.dice[:, best], np.array(kinds)
    lesion = ~results.healthy
    by_kind = {
        kind: float(dice[lesion & (of == kind)].mean())
        for kind in sorted({kind for kind, is_lesion in zip(kinds, lesion, strict=True) if is_lesion})
    }
    return (float(marked.mean()) if marked.size else None), {None: float(dice[lesion].mean()), **by_kind}
