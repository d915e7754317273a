"""Whether two detectors differ on the same people by more than chance."""

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
"""What is compared, and on which scans."""
HIGHER_IS_BETTER = {"dice": True, "auprc": True, "fpr": False}
MIN_PARTICIPANTS = 6
"""With fewer pairs no two-sided signed-rank test reaches 0.05."""

COLUMNS: dict[str, dict[str, Any]] = {
    "modality": {"Description": "Modality of the images"},
    "outcome": {
        "Description": "What is compared",
        "Levels": {
            "dice": "Dice at the fixed threshold, lesion scans",
            "auprc": "Average precision, lesion scans",
            "fpr": "False-positive rate at the fixed threshold, healthy scans",
        },
    },
    "detector_a": {"Description": "One detector"},
    "detector_b": {"Description": "The other"},
    "n_participants": {
        "Description": "Participants that both have scored; several scans of one are averaged"
    },
    "difference": {"Description": "Mean over these participants of a minus b"},
    **interval_columns(
        "difference", "difference, of this pair alone (not corrected for the number of pairs)"
    ),
    "statistic": {"Description": "Wilcoxon signed-rank statistic, zeros ranked (Pratt)"},
    "p": {
        "Description": f"Its two-sided p value; n/a with fewer than {MIN_PARTICIPANTS} participants or where "
        "all pairs are equal"
    },
    "p_holm": {"Description": "The same, corrected (Holm) over all pairs of the modality and outcome"},
}


def participant_scores(subjects: pd.DataFrame, modality: str, outcome: str) -> pd.DataFrame:
    """Arrange one outcome by participant and detector.

    Parameters
    ----------
    subjects : pandas.DataFrame
        One row per image and detector, columns of :data:`bids_uad.evaluation.subjects.COLUMNS`.
    modality : str
    outcome : {"dice", "auprc", "fpr"}

    Returns
    -------
    pandas.DataFrame
        Index: participants; columns: detectors, in alphabetical order. Mean over the images of a
        participant, NaN where there is none.
    """
    chosen = subjects[(subjects["modality"] == modality) & (subjects["role"] == OUTCOMES[outcome])]
    return chosen.pivot_table(index="participant_id", columns="detector", values=outcome, aggfunc="mean")


def mean_ranks(scores: pd.DataFrame, outcome: str) -> pd.Series:
    """Rank the detectors within each participant and average, ties sharing their ranks.

    Parameters
    ----------
    scores : pandas.DataFrame
        Of :func:`participant_scores`.
    outcome : str

    Returns
    -------
    pandas.Series
        Mean rank by detector, best first, 1 for a detector that is best everywhere; over the participants
        that every detector has scored. Empty without any. After Demšar 2006 (JMLR 7).
    """
    complete = scores.dropna()
    if complete.empty:
        return pd.Series(dtype=float)
    ranks = complete.rank(axis=1, ascending=not HIGHER_IS_BETTER[outcome])
    return ranks.mean().sort_values(kind="stable")


def compare_detectors(subjects: pd.DataFrame, *, seed: int) -> pd.DataFrame:
    """Compare every two detectors of a modality on the participants that both have scored.

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
    """Correct p values for their number; those that are NaN do not count.

    Parameters
    ----------
    p : pandas.Series
    method : str
        As in :func:`statsmodels.stats.multitest.multipletests`.

    Returns
    -------
    numpy.ndarray
        float64, of the length of `p`.
    """
    values = p.to_numpy(float)
    result = np.full(len(values), np.nan)
    known = np.isfinite(values)
    if known.any():
        result[known] = multipletests(values[known], method=method)[1]
    return result


def compare_pair(pair: pd.DataFrame, seed: int) -> dict[str, Any]:
    """Compare two columns of numbers of the same participants.

    Parameters
    ----------
    pair : pandas.DataFrame
        Index: participants; two columns without missing values.
    seed : int
        Seed of the bootstrap.

    Returns
    -------
    dict
        `n_participants`, `difference` with its interval (first minus second), `statistic` and `p`, as
        `COLUMNS` has them.
    """
    difference = pair.iloc[:, 0] - pair.iloc[:, 1]
    low, high = bootstrap_interval(difference.to_numpy(), list(pair.index), seed=seed)
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
