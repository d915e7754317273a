"""Claims of the publication as statements about one number each, their verdicts and published figures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from benchmarks.paper.published import (
    DIFFUSE,
    DIFFUSION,
    EIGHT,
    FEATURES,
    PATHOLOGIES,
    PUBLISHED,
    RECONSTRUCTION,
    family_difference,
    published_dice,
)

REPRODUCED, NOT_REPRODUCED, UNDECIDED = "reproduced", "not reproduced", "cannot be told"
Region = tuple[tuple[float, float], ...]
POSITIVE: Region = ((0.0, np.inf),)
NEGATIVE: Region = ((-np.inf, 0.0),)
SMALL_DICE = 0.05
"""Largest difference in Dice that counts as small: about the largest published loss by a fixed threshold."""
SMALL_ODDS = float(np.log(1.05))
"""Largest log odds ratio that counts as no effect."""


def verdict(low: float, high: float, holds: Region, fails: Region) -> str:
    """Compare a confidence interval with the values that agree and that disagree with a claim.

    Parameters
    ----------
    low, high : float
        Limits of the interval; NaN if it is not known.
    holds, fails : tuple of (float, float)
        Ranges of the values with which the claim holds (open), and fails (closed).

    Returns
    -------
    str
        `NOT_REPRODUCED` if the interval is within a range of `fails`, `REPRODUCED` if it is within one of
        `holds`, `UNDECIDED` otherwise.
    """
    if not (np.isfinite(low) and np.isfinite(high)):
        return UNDECIDED
    if any(start <= low and high <= end for start, end in fails):
        return NOT_REPRODUCED
    if any(start < low and high < end for start, end in holds):
        return REPRODUCED
    return UNDECIDED


@dataclass(frozen=True)
class Claim:
    """Claim of the publication as a statement about one number.

    Parameters
    ----------
    title : str
        Subject of the claim.
    claim : str
        What is claimed.
    measure : str
        Number that is estimated.
    holds, fails : tuple of (float, float)
        See :func:`verdict`.
    ratio : bool, default=False
        Whether the number is a logarithm, shown as a ratio.
    """

    title: str
    claim: str
    measure: str
    holds: Region
    fails: Region
    ratio: bool = False


SMALL_LOSS = {"holds": ((-np.inf, SMALL_DICE),), "fails": ((SMALL_DICE, np.inf),)}
LARGER = {"holds": POSITIVE, "fails": NEGATIVE}
SMALLER = {"holds": NEGATIVE, "fails": POSITIVE}
EITHER = {"holds": (*NEGATIVE, *POSITIVE), "fails": ((-SMALL_ODDS, SMALL_ODDS),), "ratio": True}
CLAIMS = {
    "families": Claim(
        "Families of detectors",
        "Diffusion-inspired reconstruction segments lesions best.",
        "mean Dice of ANDi and Disyre minus that of the four feature-based detectors",
        **LARGER,
    ),
    "threshold": Claim(
        "Threshold ablation (experiment 1)",
        "Thresholds fixed on validation scans are nearly as good as the best ones of the test scans.",
        "mean Dice at the best threshold minus at the fixed one",
        **SMALL_LOSS,
    ),
    "scanner": Claim(
        "Domain shift (experiment 2)",
        "Dice is lower on scanners that are not in the training data.",
        "mean Dice on seen minus on unseen scanners",
        **LARGER,
    ),
    "scanner_family": Claim(
        "Domain shift, families",
        "Feature-based detectors are more robust to a domain shift than reconstruction-based ones.",
        "loss of Dice on unseen scanners, reconstruction minus feature-based",
        **LARGER,
    ),
    "scanner_fpr": Claim(
        "Domain shift, false positives",
        "Scanners have systematic effects.",
        "false-positive rate of healthy scans, unseen against seen scanners",
        **EITHER,
    ),
    "scaling": Claim(
        "Data scaling (experiment 3)",
        "More healthy training data yield modest gains only.",
        "mean Dice of models trained on all scans minus of those trained on 3 %",
        **SMALL_LOSS,
    ),
    "ablation": Claim(
        "Synthetic anomalies of Disyre",
        "Disyre depends on the variety of its synthetic anomalies.",
        "mean Dice with all kinds of anomalies minus with the best smaller set of kinds",
        **LARGER,
    ),
    "independent": Claim(
        "Thresholds, independent cohort",
        "Thresholds carry over to a cohort of other scanners.",
        "mean Dice on unseen scanners at their best threshold minus at that of the seen scanners",
        **SMALL_LOSS,
    ),
    "transfer": Claim(
        "Thresholds, other pathologies",
        "A fixed threshold loses a larger part of the Dice of small, diffuse lesions than of gliomas.",
        "relative loss against the best threshold, multiple sclerosis and white matter hyperintensities "
        "minus glioma",
        **LARGER,
    ),
    "age": Claim(
        "False positives and age",
        "False positives vary with age.",
        "odds ratio of a false positive per 10 years, mean of the detectors",
        **EITHER,
    ),
    "sex": Claim(
        "False positives and sex",
        "False positives vary with sex.",
        "odds ratio of a false positive, male against female, mean of the detectors",
        **EITHER,
    ),
    "load": Claim(
        "Misses, small lesion load",
        "Lesions are missed more often below the 25th percentile of lesion load.",
        "fraction of lesion voxels found, scans up to the 25th percentile of their pathology minus others",
        **SMALLER,
    ),
    "contrast": Claim(
        "Misses, low contrast",
        "Low-contrast lesions are missed more often.",
        "fraction of lesions found, lowest quarter of contrast minus others",
        **SMALLER,
    ),
    "ranking": Claim(
        "Ranking of the detectors",
        "The eight detectors rank as published.",
        "Kendall's tau between the published and our mean Dice",
        **LARGER,
    ),
    "winner": Claim(
        "No detector is best throughout",
        "No detector is consistently superior across lesion types and contrasts.",
        "largest fraction of pathologies and contrasts in which one detector is best",
        holds=((-np.inf, 1.0),),
        fails=((1.0, 1.0),),
    ),
    "deviation": Claim(
        "Normative deviation against residual (open question 1)",
        "Deviations from a normative reference detect lesions better than the scores.",
        "mean AUPRC of deviations minus of scores",
        **LARGER,
    ),
}


def published_value(claim: str, modality: str) -> float:
    """Return the number of a claim that follows from the published Dice.

    Parameters
    ----------
    claim : str
        Key of `CLAIMS`.
    modality : str
        Contrast, or ``T1w and T2w``.

    Returns
    -------
    float
        NaN if it does not follow from the published figures.
    """
    fixed, best = PUBLISHED["fixed"], PUBLISHED["best"]
    if claim == "winner":
        return float(fixed.idxmax().value_counts(normalize=True).max())
    fixed, best = fixed[modality], best[modality]
    if claim == "families":
        figures = pd.DataFrame({p: [published_dice(modality, p, d) for d in EIGHT] for p in PATHOLOGIES})
        return float(figures.mean(axis=1).to_numpy() @ family_difference(EIGHT, DIFFUSION, FEATURES))
    if claim == "threshold":
        return float((best - fixed).to_numpy().mean())
    if claim == "transfer":
        lost = 1 - fixed / best
        diffuse = [name for each in DIFFUSE for name in PATHOLOGIES[each].cohorts if name in lost]
        return float(lost[diffuse].to_numpy().mean() - lost["BraTS"].mean())
    if claim in ("scanner", "scanner_family") and modality == "T1w":
        drop = (fixed["ATLAS-I"] - fixed["ATLAS-O"]).to_numpy()
        by_family = drop @ family_difference(EIGHT, RECONSTRUCTION, FEATURES)
        return float(drop.mean() if claim == "scanner" else by_family)
    return float("nan")
