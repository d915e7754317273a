"""Bootstrap samples of the participants: means of strata, Dice by threshold, and percentile intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from benchmarks.paper.study import Study
from bids_uad.evaluation.bootstrap import CONFIDENCE, MIN_SUBJECTS, N_RESAMPLES


def resampling_weights(n: int, stratum: int = 0) -> np.ndarray:
    """Draw participants with replacement.

    Parameters
    ----------
    n : int
        Number of participants.
    stratum : int, default=0
        Position of the stratum; strata are drawn independently.

    Returns
    -------
    numpy.ndarray, shape (1 + N_RESAMPLES, n)
        Weight of each participant; the first row is the sample itself, rows sum to 1.
    """
    drawn = np.random.default_rng([0, stratum, n]).multinomial(n, np.full(n, 1 / n), size=N_RESAMPLES)
    return np.vstack([np.ones(n), drawn]) / n


def stratum_means(values: pd.DataFrame, strata: pd.Series) -> tuple[np.ndarray, list]:
    """Compute the means of each stratum in the sample and in bootstrap samples of its participants.

    Parameters
    ----------
    values : pandas.DataFrame
        Participants (rows) by columns.
    strata : pandas.Series
        Stratum of each participant.

    Returns
    -------
    means : numpy.ndarray, shape (1 + N_RESAMPLES, n_strata, n_columns)
        Means; the first is that of the sample. NaN in all but the first if a stratum has fewer than
        `MIN_SUBJECTS` participants.
    names : list
        Strata, sorted.
    """
    names = sorted(set(strata))
    means = np.empty((1 + N_RESAMPLES, len(names), values.shape[1]))
    for position, name in enumerate(names):
        own = values[(strata == name).to_numpy()].to_numpy()
        means[:, position] = resampling_weights(len(own), position) @ own
        if len(own) < MIN_SUBJECTS:
            means[1:, position] = np.nan
    return means, names


def two_means(values: pd.DataFrame, second: pd.Series) -> tuple[np.ndarray, np.ndarray] | None:
    """Compute the means of two strata, see :func:`stratum_means`.

    Parameters
    ----------
    values : pandas.DataFrame
        Participants (rows) by columns.
    second : pandas.Series of bool
        Whether each participant belongs to the second stratum.

    Returns
    -------
    tuple of numpy.ndarray, shape (1 + N_RESAMPLES, n_columns)
        Means of the first and the second stratum; None if one of them is empty.
    """
    means, names = stratum_means(values, second)
    return (means[:, 0], means[:, 1]) if len(names) == 2 else None


class DiceByThreshold(NamedTuple):
    """Dice of pathologies and detectors at two thresholds.

    Parameters
    ----------
    best, fixed : numpy.ndarray, shape (1 + N_RESAMPLES, n_pathologies, n_detectors)
        Mean Dice at the best threshold of each sample, and of the masks of the model; see
        :func:`stratum_means`.
    counts : dict of str to int
        Number of participants by pathology.
    detectors : list of str
        Detectors.
    """

    best: np.ndarray
    fixed: np.ndarray
    counts: dict[str, int]
    detectors: list[str]


def dice_by_threshold(study: Study, modality: str, detectors: Sequence[str]) -> DiceByThreshold:
    """Compute Dice at the best threshold and of the masks, of participants that all detectors have scored.

    Parameters
    ----------
    study : Study
        Score tables.
    modality : str
        Contrast.
    detectors : sequence of str
        Detectors; those without any scores are left out.

    Returns
    -------
    DiceByThreshold
        Without pathologies if no participant is shared.
    """
    names = [name for name in detectors if (name, modality) in study.dice]
    pathologies = study.pathologies(modality)
    scored = [set(study.dice[name, modality].index) for name in names]
    shared = set(pathologies).intersection(*scored) if scored else set()
    members = {
        pathology: sorted(name for name in shared if pathologies[name] == pathology)
        for pathology in sorted({pathologies[name] for name in shared})
    }
    of_masks = study.scores(modality, "dice", names)
    best = np.empty((1 + N_RESAMPLES, len(members), len(names)))
    fixed = np.empty_like(best)
    for i, own in enumerate(members.values()):
        weights = resampling_weights(len(own), i)
        for j, name in enumerate(names):
            best[:, i, j] = (weights @ study.dice[name, modality].loc[own].to_numpy()).max(1)
            fixed[:, i, j] = weights @ of_masks.loc[own, name].to_numpy()
        if len(own) < MIN_SUBJECTS:
            best[1:, i], fixed[1:, i] = np.nan, np.nan
    return DiceByThreshold(best, fixed, {name: len(own) for name, own in members.items()}, names)


def interval(samples: np.ndarray) -> tuple[float, float, float]:
    """Return the estimate and its percentile interval.

    Parameters
    ----------
    samples : numpy.ndarray, shape (1 + N_RESAMPLES,)
        Statistic of the sample and of the bootstrap samples.

    Returns
    -------
    value, low, high : float
        The limits are NaN if any sample has no value.
    """
    tail = (1 - CONFIDENCE) / 2
    low, high = (
        np.quantile(samples[1:], [tail, 1 - tail]) if np.isfinite(samples[1:]).all() else (np.nan, np.nan)
    )
    return float(samples[0]), float(low), float(high)
