"""What is asked of a cohort beyond the benchmark: which detector is better, for whom, and where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from bids_uad.evaluation.bias import COLUMNS as BIAS_COLUMNS
from bids_uad.evaluation.bias import Bias, model_bias
from bids_uad.evaluation.comparison import COLUMNS as COMPARISON_COLUMNS
from bids_uad.evaluation.comparison import compare_detectors
from bids_uad.evaluation.curves import Curves
from bids_uad.evaluation.deviations import COLUMNS as DEVIATION_COLUMNS
from bids_uad.evaluation.deviations import compare_deviations
from bids_uad.evaluation.lesion_detection import COLUMNS as LESION_COLUMNS
from bids_uad.evaluation.lesion_detection import (
    MISSED_COLUMNS,
    Lesions,
    lesion_sensitivity,
    missed_by_all,
)
from bids_uad.evaluation.subgroups import COLUMNS as SUBGROUP_COLUMNS
from bids_uad.evaluation.subgroups import DISPARITY_COLUMNS, compare_subgroups
from bids_uad.evaluation.threshold_transfer import COLUMNS as THRESHOLD_COLUMNS
from bids_uad.evaluation.threshold_transfer import transfer_thresholds


@dataclass(frozen=True)
class Analyses:
    """Answers as tables.

    Parameters
    ----------
    comparison : pandas.DataFrame
        Of :func:`bids_uad.evaluation.comparison.compare_detectors`.
    subgroups, disparities : pandas.DataFrame
        Of :func:`bids_uad.evaluation.subgroups.compare_subgroups`.
    bias : Bias
    thresholds : pandas.DataFrame
        Of :func:`bids_uad.evaluation.threshold_transfer.transfer_thresholds`.
    lesions : pandas.DataFrame
        Of :func:`bids_uad.evaluation.lesion_detection.lesion_sensitivity`.
    missed : pandas.DataFrame
        Of :func:`bids_uad.evaluation.lesion_detection.missed_by_all`.
    deviations : pandas.DataFrame
        Of :func:`bids_uad.evaluation.deviations.compare_deviations`.
    """

    comparison: pd.DataFrame
    subgroups: pd.DataFrame
    disparities: pd.DataFrame
    bias: Bias
    thresholds: pd.DataFrame
    lesions: pd.DataFrame
    missed: pd.DataFrame
    deviations: pd.DataFrame

    @property
    def tables(self) -> dict[str, tuple[pd.DataFrame, str, dict[str, Any]]]:
        """Each table by name, with what it is and what its columns are."""
        return {
            "comparison": (self.comparison, "Paired comparisons of detectors", COMPARISON_COLUMNS),
            "subgroups": (self.subgroups, "Numbers for parts of the cohort", SUBGROUP_COLUMNS),
            "disparities": (self.disparities, "Largest gaps between parts of the cohort", DISPARITY_COLUMNS),
            "thresholds": (self.thresholds, "Thresholds of one cohort on another", THRESHOLD_COLUMNS),
            "lesions": (self.lesions, "Lesions found, by size and contrast", LESION_COLUMNS),
            "missed": (self.missed, "Lesions that every detector misses", MISSED_COLUMNS),
            "bias": (self.bias.coefficients, "Models of bias", BIAS_COLUMNS),
            "deviations": (self.deviations, "Scores beside their normative deviation", DEVIATION_COLUMNS),
        }


def analyse(
    subjects: pd.DataFrame,
    curves: Mapping[tuple[str, str, str], Curves],
    factors: Sequence[str],
    *,
    seed: int,
    lesions: Lesions | None = None,
) -> Analyses:
    """Ask all of it.

    Parameters
    ----------
    subjects : pandas.DataFrame
        One row per image and detector, with the columns of participants.tsv.
    curves : mapping
        (detector, modality, cohort) -> `Curves` over the scans of one cohort.
    factors : sequence of str
        What divides the cohort, see :func:`bids_uad.evaluation.subgroups.levels_of`.
    seed : int
        Seed of the bootstrap.
    lesions : Lesions, optional
        What was measured of each lesion.

    Returns
    -------
    Analyses
    """
    table = (lesions or Lesions()).table
    subgroups, disparities = compare_subgroups(subjects, factors, seed=seed)
    bias = model_bias(subjects)
    return Analyses(
        comparison=compare_detectors(subjects, seed=seed),
        subgroups=subgroups,
        disparities=disparities,
        bias=bias,
        thresholds=transfer_thresholds(curves),
        lesions=lesion_sensitivity(table, subjects, seed=seed),
        missed=missed_by_all(table, seed=seed),
        deviations=compare_deviations(subjects, bias.coefficients),
    )
