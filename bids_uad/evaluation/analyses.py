"""Secondary analyses of a cohort: detectors compared, subgroups, bias, thresholds, lesions, deviations."""

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
    """Results of the secondary analyses.

    Parameters
    ----------
    comparison : pandas.DataFrame
        Result of :func:`bids_uad.evaluation.comparison.compare_detectors`.
    subgroups, disparities : pandas.DataFrame
        Results of :func:`bids_uad.evaluation.subgroups.compare_subgroups`.
    bias : Bias
        Result of :func:`bids_uad.evaluation.bias.model_bias`.
    thresholds : pandas.DataFrame
        Result of :func:`bids_uad.evaluation.threshold_transfer.transfer_thresholds`.
    lesions : pandas.DataFrame
        Result of :func:`bids_uad.evaluation.lesion_detection.lesion_sensitivity`.
    missed : pandas.DataFrame
        Result of :func:`bids_uad.evaluation.lesion_detection.missed_by_all`.
    deviations : pandas.DataFrame
        Result of :func:`bids_uad.evaluation.deviations.compare_deviations`.
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
        """Each table by name, with its description and the descriptions of its columns."""
        return {
            "comparison": (self.comparison, "Paired comparison of detectors", COMPARISON_COLUMNS),
            "subgroups": (self.subgroups, "Metrics in subgroups of the cohort", SUBGROUP_COLUMNS),
            "disparities": (self.disparities, "Largest differences between subgroups", DISPARITY_COLUMNS),
            "thresholds": (self.thresholds, "Threshold transfer between cohorts", THRESHOLD_COLUMNS),
            "lesions": (self.lesions, "Lesion detection by lesion size and contrast", LESION_COLUMNS),
            "missed": (self.missed, "Lesions missed by all detectors", MISSED_COLUMNS),
            "bias": (self.bias.coefficients, "Coefficients of the bias models", BIAS_COLUMNS),
            "deviations": (self.deviations, "Scores and their normative deviations", DEVIATION_COLUMNS),
        }


def analyse(
    subjects: pd.DataFrame,
    curves: Mapping[tuple[str, str, str], Curves],
    variables: Sequence[str],
    *,
    seed: int,
    lesions: Lesions | None = None,
) -> Analyses:
    """Run all secondary analyses.

    Parameters
    ----------
    subjects : pandas.DataFrame
        One row per image and detector, with the columns of participants.tsv.
    curves : mapping
        `Curves` by detector, modality and cohort.
    variables : sequence of str
        Subgroup variables, see :func:`bids_uad.evaluation.subgroups.levels_of`.
    seed : int
        Seed of the bootstrap.
    lesions : Lesions, optional
        Volume, contrast and detection of each lesion; none by default.

    Returns
    -------
    Analyses
        Results of all analyses.
    """
    table = (lesions or Lesions()).table
    subgroups, disparities = compare_subgroups(subjects, variables, seed=seed)
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
