"""Estimates of the numbers of the claims, with intervals, from the score tables of a study.

Each function of `BY_MODALITY` returns the estimates of one claim or of related ones for a contrast, or none
if there are no scores for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from scipy.special import expit

from benchmarks.paper.bootstrap import (
    dice_by_threshold,
    interval,
    resampling_weights,
    stratum_means,
    two_means,
)
from benchmarks.paper.claims import CLAIMS, published_value, verdict
from benchmarks.paper.published import (
    COHORTS,
    DIFFUSE,
    DIFFUSION,
    EIGHT,
    FEATURES,
    PATHOLOGIES,
    RECONSTRUCTION,
    family_difference,
    published_dice,
)
from benchmarks.paper.study import Study
from bids_uad.evaluation.bias import PRIOR_VOXELS, model_bias
from bids_uad.evaluation.bootstrap import MIN_SUBJECTS
from bids_uad.evaluation.deviations import NORMATIVE
from bids_uad.evaluation.subjects import HEALTHY


@dataclass(frozen=True)
class Estimate:
    """Estimate of the number of a claim.

    Parameters
    ----------
    claim : str
        Key of `CLAIMS`.
    modality : str
        Contrast, or ``T1w and T2w``.
    value, low, high : float
        Estimate and limits of its interval; NaN if not measured.
    n : int
        Number of participants.
    detector : str, default=""
        Detector; empty for the mean of the detectors, on which the verdict is based.
    """

    claim: str
    modality: str
    value: float
    low: float
    high: float
    n: int
    detector: str = ""

    @property
    def row(self) -> dict[str, Any]:
        """Row of the table of claims."""
        claim = CLAIMS[self.claim]
        published = np.nan if self.detector else published_value(self.claim, self.modality)
        conclusion = verdict(self.low, self.high, claim.holds, claim.fails)
        return {**vars(self), "published": published, "verdict": conclusion}


def summarise(
    claim: str, modality: str, samples: np.ndarray, detectors: Sequence[str], n: int
) -> list[Estimate]:
    """Estimate the number of a claim for each detector and as mean of the eight.

    Parameters
    ----------
    claim : str
        Key of `CLAIMS`.
    modality : str
        Contrast.
    samples : numpy.ndarray, shape (1 + N_RESAMPLES, n_detectors)
        Statistic of the sample and of the bootstrap samples.
    detectors : sequence of str
        Detectors.
    n : int
        Number of participants.

    Returns
    -------
    list of Estimate
        The mean, if there is any of the eight, and each detector.
    """
    eight = [position for position, name in enumerate(detectors) if name in EIGHT]
    mean = [Estimate(claim, modality, *interval(samples[:, eight].mean(1)), n)] if eight else []
    return mean + [
        Estimate(claim, modality, *interval(samples[:, position]), n, detector=name)
        for position, name in enumerate(detectors)
    ]


def _published_part(study: Study, modality: str) -> tuple[pd.DataFrame, pd.Series]:
    """Return Dice and pathology of the participants whose pathology has published figures."""
    dice = study.scores(modality, "dice")
    pathology = study.column(dice.index, "cohort")
    known = pathology.isin(
        [name for name in PATHOLOGIES if np.isfinite(published_dice(modality, name, "fae"))]
    )
    return dice[known], pathology[known]


def families(study: Study, modality: str) -> list[Estimate]:
    """Compare diffusion-inspired with feature-based detectors on the pathologies with published figures."""
    dice, pathology = _published_part(study, modality)
    if dice.empty:
        return []
    means, _ = stratum_means(dice, pathology)
    difference = means.mean(1) @ family_difference(dice.columns, DIFFUSION, FEATURES)
    return [Estimate("families", modality, *interval(difference), len(dice))]


def ranking(study: Study, modality: str) -> list[Estimate]:
    """Compare the order of the detectors with the published one."""
    dice, pathology = _published_part(study, modality)
    if dice.empty or dice.shape[1] < 3:
        return []
    means, names = stratum_means(dice, pathology)
    published = np.array([[published_dice(modality, p, name) for name in dice] for p in names]).mean(0)
    ours = means.mean(1)
    samples = np.array([stats.kendalltau(own, published)[0] for own in ours])
    samples[1:][~np.isfinite(ours[1:]).all(1)] = np.nan
    return [Estimate("ranking", modality, *interval(samples), len(dice))]


def thresholds(study: Study, modality: str) -> list[Estimate]:
    """Estimate the loss by a fixed threshold, and its difference between pathologies."""
    best, fixed, counts, names = dice_by_threshold(study, modality, EIGHT)
    if not counts:
        return []
    pathologies, n = list(counts), sum(counts.values())
    rows = summarise("threshold", modality, (best - fixed).mean(1), names, n)
    diffuse = [pathologies.index(name) for name in DIFFUSE if name in counts]
    if "glioma" in counts and diffuse:
        lost = 1 - fixed / np.maximum(best, 1e-9)
        samples = lost[:, diffuse].mean(1) - lost[:, pathologies.index("glioma")]
        rows += summarise("transfer", modality, samples, names, n)
    return rows


def scanners(study: Study, modality: str) -> list[Estimate]:
    """Compare seen with unseen scanners: Dice, families, and thresholds carried over."""
    dice = study.scores(modality, "dice")
    if dice.empty:
        return []
    # Pathologies alternate between seen and unseen scanners, and are comparable relative to their means.
    centred = dice - dice.groupby(study.column(dice.index, "cohort")).transform("mean")
    is_seen = study.on_seen_scanner(modality)
    means = two_means(centred, ~is_seen.reindex(dice.index).astype(bool))
    if means is None:
        return []
    seen, unseen = means
    drop = seen - unseen
    by_family = drop @ family_difference(dice.columns, RECONSTRUCTION, FEATURES)
    return [
        *summarise("scanner", modality, drop, dice.columns, len(dice)),
        Estimate("scanner_family", modality, *interval(by_family), len(dice)),
        *_carried_thresholds(study, modality, is_seen),
    ]


def _carried_thresholds(study: Study, modality: str, is_seen: pd.Series) -> list[Estimate]:
    """Apply the best threshold of the seen scanners to the unseen ones."""
    participants = list(study.pathologies(modality))
    names = [name for name in EIGHT if (name, modality) in study.dice]
    losses = []
    for name in names:
        curves = study.dice[name, modality]
        scored = [each for each in participants if each in curves.index]
        groups = [curves.loc[[each for each in scored if is_seen[each] == own]] for own in (False, True)]
        if min(map(len, groups)) < MIN_SUBJECTS:
            return []
        unseen, seen = (resampling_weights(len(own), k) @ own.to_numpy() for k, own in enumerate(groups))
        carried = np.take_along_axis(unseen, seen.argmax(1)[:, None], 1)[:, 0]
        losses.append(unseen.max(1) - carried)
    return summarise("independent", modality, np.stack(losses, 1), names, len(participants)) if losses else []


def false_positives(study: Study, modality: str) -> list[Estimate]:
    """Compare false positives of healthy scans between seen and unseen scanners."""
    rates = study.scores(modality, "fpr")
    is_unseen = ~study.on_seen_scanner(modality).reindex(rates.index).astype(bool)
    means = two_means(rates, is_unseen)
    if means is None:
        return []
    seen, unseen = (np.log(mean + 1e-6) for mean in means)
    return summarise("scanner_fpr", modality, unseen - seen, rates.columns, len(rates))


def mean_detector(rows: pd.DataFrame) -> pd.DataFrame:
    """Average the log odds of a false positive of each healthy scan over the detectors.

    Parameters
    ----------
    rows : pandas.DataFrame
        Rows of one modality; each image has one row per detector.

    Returns
    -------
    pandas.DataFrame
        A row for each image, called detector ``mean``, whose false-positive rate has the mean log odds in
        :func:`bids_uad.evaluation.bias.model_bias`.
    """
    healthy = rows[(rows["role"] == HEALTHY) & rows["detector"].isin(EIGHT)]
    voxels = healthy["n_brain_voxels"] - healthy["n_lesion_voxels"].fillna(0)
    positive = healthy["fpr"] * voxels
    odds = np.log((positive + PRIOR_VOXELS) / (voxels - positive + PRIOR_VOXELS))
    first = healthy.drop_duplicates("source_image").set_index("source_image", drop=False)
    mean = odds.groupby(healthy["source_image"]).mean().reindex(first.index)
    total = first["n_brain_voxels"] - first["n_lesion_voxels"].fillna(0)
    first["fpr"] = ((total + 2 * PRIOR_VOXELS) * expit(mean) - PRIOR_VOXELS) / total
    first["detector"] = "mean"
    return first.reset_index(drop=True)


def demographics(study: Study, modality: str) -> list[Estimate]:
    """Estimate the effects of age and sex on false positives, adjusted for brain volume and scanner."""
    rows = study.subjects[study.subjects["modality"] == modality]
    counts = rows[rows["detector"].isin(EIGHT)].groupby("source_image")["detector"].nunique()
    complete = rows[rows["source_image"].isin(counts[counts == counts.max()].index)]
    healthy = complete[complete["role"] == HEALTHY]
    if healthy.empty:
        return []
    table = model_bias(pd.concat([mean_detector(healthy), healthy], ignore_index=True)).coefficients
    estimates = []
    for term in ("age", "sex"):
        for row in table[(table["outcome"] == "fpr") & (table["term"] == term)].to_dict("records"):
            name = "" if row["detector"] == "mean" else row["detector"]
            if name and name not in EIGHT:
                continue
            numbers = (row["estimate"], row["ci_low"], row["ci_high"], row["n_participants"])
            estimates.append(Estimate(term, modality, *numbers, detector=name))
    return estimates


def small_loads(study: Study, modality: str) -> list[Estimate]:
    """Compare the fraction of lesion voxels found between small and larger lesion loads of a pathology."""
    found = study.scores(modality, "sensitivity")
    if found.empty:
        return []
    rows = study.subjects[study.subjects["modality"] == modality]
    load = rows.groupby("participant_id")["lesion_volume_mm3"].first().reindex(found.index)
    by_pathology = load.groupby(study.column(found.index, "cohort"))
    means = two_means(found, load <= by_pathology.transform(lambda own: own.quantile(0.25)))
    if means is None:
        return []
    larger, small = means
    return summarise("load", modality, small - larger, found.columns, len(found))


def low_contrasts(study: Study, modality: str) -> list[Estimate]:
    """Compare the fraction of lesions found between low and higher contrasts."""
    lesions = study.lesions.table.astype({"modality": str, "detector": str, "participant_id": str})
    lesions = lesions[lesions["modality"] == modality]
    detectors = [name for name in EIGHT if (lesions["detector"] == name).any()]
    samples = [_found_by_contrast(lesions[lesions["detector"] == name]) for name in detectors]
    if not samples or any(each is None for each in samples):
        return []
    return summarise(
        "contrast", modality, np.stack(samples, 1), detectors, lesions["participant_id"].nunique()
    )


def _found_by_contrast(lesions: pd.DataFrame) -> np.ndarray | None:
    """Return the fraction of lesions found in the lowest quarter of contrast minus that of the others."""
    lesions = lesions[lesions["contrast"].notna()]
    contrast = lesions["contrast"].abs()
    low = (contrast <= contrast.quantile(0.25)).astype(float)
    found = lesions["detected"]
    columns = {"low": low, "found_low": low * found, "high": 1 - low, "found_high": (1 - low) * found}
    totals = pd.DataFrame(columns).groupby(lesions["participant_id"]).sum()
    if len(totals) < MIN_SUBJECTS:
        return None
    n_low, found_low, n_high, found_high = (resampling_weights(len(totals)) @ totals.to_numpy()).T
    with np.errstate(invalid="ignore"):
        return found_low / n_low - found_high / n_high


def winners(study: Study) -> list[Estimate]:
    """Estimate the largest fraction of cells (contrast and pathology) in which one detector is best."""
    best, n = [], 0
    for modality in study.modalities:
        dice = study.scores(modality, "dice")
        if dice.empty:
            continue
        n = max(n, len(dice))
        means, _ = stratum_means(dice, study.column(dice.index, "cohort"))
        names = np.array([EIGHT.index(name) for name in dice.columns])
        first = names[means.argmax(2)].astype(float)
        first[~np.isfinite(means).all(2)] = np.nan
        best.append(first)
    if len(best) < 2:
        return []
    cells = np.concatenate(best, axis=1)
    shares = np.max([(cells == k).mean(1) for k in range(len(EIGHT))], axis=0)
    shares[~np.isfinite(cells).all(1)] = np.nan
    return [Estimate("winner", "T1w and T2w", *interval(shares), n)]


def deviations(study: Study, modality: str) -> list[Estimate]:
    """Compare normative deviations with the scores they are computed from."""
    scored = sorted(set(study.subjects["detector"]))
    plain = [name for name in scored if f"{name}{NORMATIVE}" in scored]
    both = study.scores(modality, "auprc", [*plain, *(f"{name}{NORMATIVE}" for name in plain)])
    plain = [name for name in plain if name in both and f"{name}{NORMATIVE}" in both]
    if not plain or both.empty:
        return []
    gain = pd.DataFrame({name: both[f"{name}{NORMATIVE}"] - both[name] for name in plain})
    means, _ = stratum_means(gain, study.column(gain.index, "cohort"))
    return summarise("deviation", modality, means.mean(1), plain, len(gain))


def variants(study: Study, modality: str) -> list[Estimate]:
    """Compare the models with those trained on 3 % of the scans, and Disyre with single anomalies."""
    rows = []
    least = study.variants.get("scaling/3")
    if least is not None and modality in least.modalities:
        rows += gains(study, least, "scaling", modality)
    mean_dice = {}
    for name, other in study.variants.items():
        if name.startswith("ablation/") and modality in other.modalities:
            dice = other.scores(modality, "dice", ["disyre"])
            if "disyre" in dice:
                mean_dice[name] = dice["disyre"].mean()
    if mean_dice:
        best = max(mean_dice, key=mean_dice.get)
        rows += gains(study, study.variants[best], "ablation", modality, ["disyre"])
    return rows


def gains(
    study: Study, other: Study, claim: str, modality: str, detectors: Sequence[str] = EIGHT
) -> list[Estimate]:
    """Estimate the paired difference in Dice between the models and others on the same participants.

    Parameters
    ----------
    study, other : Study
        Score tables of the models, and of the others.
    claim : str
        Key of `CLAIMS`.
    modality : str
        Contrast.
    detectors : sequence of str
        Detectors; by default the published ones.

    Returns
    -------
    list of Estimate
        Empty without shared participants.
    """
    ours, theirs = (each.scores(modality, "dice", detectors) for each in (study, other))
    names = [name for name in ours if name in theirs]
    gain = (ours[names] - theirs[names]).dropna()
    if gain.empty or not names:
        return []
    means, _ = stratum_means(gain, study.column(gain.index, "cohort"))
    return summarise(claim, modality, means.mean(1), names, len(gain))


BY_MODALITY: tuple[Callable[[Study, str], list[Estimate]], ...] = (
    *(families, ranking, thresholds, scanners, false_positives),
    *(demographics, small_loads, low_contrasts, deviations, variants),
)


def estimate_claims(study: Study) -> pd.DataFrame:
    """Estimate the numbers of all claims.

    Parameters
    ----------
    study : Study
        Score tables.

    Returns
    -------
    pandas.DataFrame
        A row for each claim and contrast with its verdict, and for each detector. What is not measured has
        no value and cannot be told.
    """
    rows = [each for modality in study.modalities for part in BY_MODALITY for each in part(study, modality)]
    rows += winners(study)
    nothing = (np.nan, np.nan, np.nan, 0)
    for claim in CLAIMS:
        measured = {row.modality for row in rows if row.claim == claim and not row.detector}
        modalities = ["T1w and T2w"] if claim == "winner" else list(COHORTS)
        rows += [Estimate(claim, name, *nothing) for name in modalities if name not in measured]
    order = {name: position for position, name in enumerate(CLAIMS)}
    rows.sort(key=lambda row: (order[row.claim], row.modality, row.detector != ""))
    return pd.DataFrame([row.row for row in rows])
