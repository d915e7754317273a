"""Paired comparison of detectors on the same participants."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.multitest import multipletests

from bids_uad.evaluation.bootstrap import MIN_SUBJECTS, bootstrap_interval, interval_columns
from bids_uad.evaluation.subjects import HEALTHY, LESION

OUTCOMES = {"dice": LESION, "auprc": LESION, "fpr": HEALTHY}
"""Compared outcomes, and the role of the scans they are defined for."""
HIGHER_IS_BETTER = {"dice": True, "auprc": True, "fpr": False}
MIN_PARTICIPANTS = 6
"""Minimum number of pairs for a test: with fewer, a two-sided signed-rank test cannot reach p < 0.05."""

COLUMNS: dict[str, dict[str, Any]] = {
    "modality": {"Description": "Modality of the images"},
    "outcome": {
        "Description": "Compared outcome",
        "Levels": {
            "dice": "Dice at the fixed threshold, lesion scans",
            "auprc": "Average precision, lesion scans",
            "fpr": "False-positive rate at the fixed threshold, healthy scans",
        },
    },
    "detector_a": {"Description": "First detector"},
    "detector_b": {"Description": "Second detector"},
    "n_participants": {
        "Description": "Number of participants scored by both detectors; scans of a participant are averaged"
    },
    "difference": {"Description": "Mean over these participants of detector_a minus detector_b"},
    **interval_columns("difference", "difference, not corrected for the number of pairs"),
    "statistic": {"Description": "Wilcoxon signed-rank statistic, zero differences ranked (Pratt)"},
    "p": {
        "Description": f"Two-sided p value of the test; n/a with fewer than {MIN_PARTICIPANTS} participants "
        "or if all differences are zero"
    },
    "p_holm": {"Description": "p, corrected (Holm) over all pairs of the modality and outcome"},
}


def participant_scores(subjects: pd.DataFrame, modality: str, outcome: str) -> pd.DataFrame:
    """Return one outcome by participant and detector.

    Parameters
    ----------
    subjects : pandas.DataFrame
        One row per image and detector, columns of :data:`bids_uad.evaluation.subjects.COLUMNS`.
    modality : str
        Modality of the images.
    outcome : {"dice", "auprc", "fpr"}
        Outcome to compare.

    Returns
    -------
    pandas.DataFrame
        Index: participants; columns: detectors, in alphabetical order; values: mean over the images of the
        participant, NaN without images.
    """
    chosen = subjects[(subjects["modality"] == modality) & (subjects["role"] == OUTCOMES[outcome])]
    return chosen.pivot_table(index="participant_id", columns="detector", values=outcome, aggfunc="mean")


def mean_ranks(scores: pd.DataFrame, outcome: str) -> pd.Series:
    """Compute the mean rank of each detector over participants (Demšar 2006, JMLR 7).

    Parameters
    ----------
    scores : pandas.DataFrame
        Outcome by participant and detector, from :func:`participant_scores`.
    outcome : {"dice", "auprc", "fpr"}
        Outcome, which decides whether high or low values rank first.

    Returns
    -------
    pandas.Series
        Mean rank by detector, the best (lowest) first, over the participants scored by all detectors; tied
        detectors share the mean of their ranks. Empty without such participants.
    """
    complete = scores.dropna()
    if complete.empty:
        return pd.Series(dtype=float)
    ranks = complete.rank(axis=1, ascending=not HIGHER_IS_BETTER[outcome])
    return ranks.mean().sort_values(kind="stable")


def compare_detectors(subjects: pd.DataFrame, *, seed: int) -> pd.DataFrame:
    """Compare each pair of detectors of a modality on the participants that both have scored.

    Parameters
    ----------
    subjects : pandas.DataFrame
        One row per image and detector, columns of :data:`bids_uad.evaluation.subjects.COLUMNS`.
    seed : int
        Seed of the bootstrap.

    Returns
    -------
    pandas.DataFrame
        Columns of `COLUMNS`.
    """
    tables = []
    for modality in sorted(subjects["modality"].unique()):
        for outcome in OUTCOMES:
            scores = participant_scores(subjects, modality, outcome)
            rows = [
                {"modality": modality, "outcome": outcome, "detector_a": a, "detector_b": b}
                | compare_pair(scores[[a, b]].dropna(), seed)
                for a, b in combinations(scores.columns, 2)
            ]
            table = pd.DataFrame([row for row in rows if row["n_participants"] >= MIN_SUBJECTS])
            if len(table):
                table["p_holm"] = corrected(table["p"], "holm")
                tables.append(table)
    return (
        pd.concat(tables, ignore_index=True)[list(COLUMNS)] if tables else pd.DataFrame(columns=list(COLUMNS))
    )


def corrected(p: pd.Series, method: str) -> np.ndarray:
    """Correct p values for multiple testing; NaN values are not counted as tests.

    Parameters
    ----------
    p : pandas.Series
        Uncorrected p values.
    method : str
        Method of :func:`statsmodels.stats.multitest.multipletests`, such as `holm` or `fdr_bh`.

    Returns
    -------
    numpy.ndarray
        Corrected p values, float64, of the length of `p`.
    """
    values = p.to_numpy(float)
    result = np.full(len(values), np.nan)
    known = np.isfinite(values)
    if known.any():
        result[known] = multipletests(values[known], method=method)[1]
    return result


def compare_pair(pair: pd.DataFrame, seed: int) -> dict[str, Any]:
    """Compare two columns of values of the same participants.

    Parameters
    ----------
    pair : pandas.DataFrame
        Index: participants; two columns without missing values.
    seed : int
        Seed of the bootstrap.

    Returns
    -------
    dict
        `n_participants`, `difference` (first minus second column) with its interval, `statistic` and `p`; see
        `COLUMNS`.
    """
    difference = pair.iloc[:, 0] - pair.iloc[:, 1]
    low, high = bootstrap_interval(difference.to_numpy(), pair.index, seed=seed)
    statistic = p = np.nan
    if len(pair) >= MIN_PARTICIPANTS and (difference != 0).any():
        statistic, p = stats.wilcoxon(difference.to_numpy(), zero_method="pratt")
    return {
        "n_participants": len(pair),
        "difference": difference.mean(),
        "difference_ci_low": low,
        "difference_ci_high": high,
        "statistic": statistic,
        "p": p,
    }
