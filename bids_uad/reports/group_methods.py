"""Methods text of the group level: the analyses that were made of a cohort."""

from __future__ import annotations

import pandas as pd

from bids_uad import __version__
from bids_uad.evaluation.analyses import Analyses
from bids_uad.evaluation.benchmark import ALL, Evaluation
from bids_uad.evaluation.bias import (
    CROSSED,
    LINEAR,
    MIXED,
    PRIOR_VOXELS,
    REPEATED,
)
from bids_uad.evaluation.bootstrap import N_RESAMPLES
from bids_uad.evaluation.experiments import REFERENCE
from bids_uad.evaluation.subjects import HEALTHY, LESION
from bids_uad.methods.registry import detector_name
from bids_uad.reports.boilerplate import UsedModel, fragment, threshold_list
from bids_uad.reports.group_summary import join_words


def group_methods_text(
    evaluation: Evaluation, analyses: Analyses, experiments: pd.DataFrame | None = None, *, seed: int
) -> str:
    """Write the methods section of a group analysis.

    Parameters
    ----------
    evaluation : Evaluation
        Benchmark table and scores per scan.
    analyses : Analyses
        Secondary analyses; those without results are not described.
    experiments : pandas.DataFrame, optional
        Columns of :data:`bids_uad.evaluation.experiments.COLUMNS`.
    seed : int
        Seed of the bootstrap.

    Returns
    -------
    str
        Markdown with `[@key]` citations of ``bids_uad.bib``.
    """
    images = evaluation.subjects.drop_duplicates("source_image")
    roles = images["role"].value_counts()
    empty = int(((images["role"] == LESION) & (images["n_lesion_voxels"] == 0)).sum())
    parts = [
        fragment(
            "group_introduction",
            version=__version__,
            images=str(len(images)),
            participants=str(images["participant_id"].nunique()),
            lesion=f"{roles.get(LESION, 0)} with a lesion mask"
            + (f" of which {empty} had no voxel in the brain" if empty else ""),
            healthy=str(roles.get(HEALTHY, 0)),
        ),
        fragment(
            "group_benchmark",
            thresholds=threshold_list(_models(evaluation.benchmark)),
            tuned=_tuned(evaluation.subjects),
            resamples=f"{N_RESAMPLES}",
            seed=str(seed),
        ),
    ]
    if evaluation.min_lesion_volume is not None:
        parts.append(fragment("group_lesion_wise", volume=f"{evaluation.min_lesion_volume:g}"))
    if len(analyses.comparison):
        parts.append(fragment("group_comparison"))
    if len(analyses.lesions):
        parts.append(fragment("group_lesions"))
    if len(analyses.subgroups):
        factors = list(dict.fromkeys(analyses.subgroups["factor"]))
        parts.append(fragment("group_subgroups", factors=join_words(factors)))
    if len(analyses.disparities):
        parts.append(fragment("group_disparities"))
    if len(analyses.thresholds):
        parts.append(fragment("group_thresholds"))
    if experiments is not None:
        variants = [name for name in dict.fromkeys(experiments["variant"]) if name != REFERENCE]
        parts += [fragment("group_experiments", variants=join_words(variants))] if variants else []
    parts += _bias(analyses.bias.coefficients)
    parts += [fragment("group_software"), fragment("copyright")]
    return "\n\n".join(parts) + "\n"


def _tuned(subjects: pd.DataFrame) -> str:
    """Return a sentence on whether participants were among the validation scans of models."""
    seen = subjects[subjects["seen_in_training"].astype(str).str.contains("validation")]
    if seen.empty:
        return "No participant was among the validation scans."
    pairs = seen.drop_duplicates(["detector", "modality"])
    models = [f"{detector_name(row.detector)} on {row.modality}" for row in pairs.itertuples()]
    text = "Participants were among the validation scans of"
    return f"{text} {join_words(models)}, for which results are therefore optimistic."


def _models(benchmark: pd.DataFrame) -> list[UsedModel]:
    overall = benchmark[benchmark["cohort"] == ALL]
    names = ["detector", "modality", "preset", "threshold", "threshold_name"]
    return [UsedModel(**row) for row in overall[names].to_dict(orient="records")]


def _bias(coefficients: pd.DataFrame) -> list[str]:
    if coefficients.empty:
        return []
    # 'scanner: A' and 'scanner (SD)' are both the scanner.
    covariates = list(dict.fromkeys(coefficients["term"].str.replace(r"^scanner\b.*", "scanner", regex=True)))
    parts = [fragment("group_bias", prior=f"{PRIOR_VOXELS:g}", covariates=join_words(covariates))]
    for models, name in (
        ((LINEAR,), "group_bias_linear"),
        ((MIXED, CROSSED), "group_bias_mixed"),
        ((REPEATED, CROSSED), "group_bias_repeated"),
    ):
        if coefficients["model"].isin(models).any():
            parts.append(fragment(name))
    return parts
