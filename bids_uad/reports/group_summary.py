"""Summary of the group report: one or two sentences per topic, generated from the tables."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import pandas as pd

from bids_uad.evaluation.analyses import Analyses
from bids_uad.evaluation.benchmark import ALL, EXCLUDED, Evaluation
from bids_uad.evaluation.comparison import mean_ranks, participant_scores
from bids_uad.evaluation.experiments import REFERENCE
from bids_uad.evaluation.missing import MissingData
from bids_uad.evaluation.subjects import HEALTHY, LESION, MISSING_MASK
from bids_uad.methods.registry import detector_name
from bids_uad.reports.charts import ALPHA

FEW = 10
"""Number of participants below which the summary warns about the sample size."""
_FPR_THRESHOLD = re.compile(r"fpr_(\d+)pct")


def summarise(
    evaluation: Evaluation, analyses: Analyses, experiments: pd.DataFrame | None = None
) -> list[tuple[str, str]]:
    """Summarise the results of a cohort in sentences.

    Parameters
    ----------
    evaluation : Evaluation
        Benchmark table, scores per scan, and scans that are missing or unreadable.
    analyses : Analyses
        Comparison of detectors and bias models.
    experiments : pandas.DataFrame, optional
        Of :func:`bids_uad.evaluation.experiments.compare_variants`.

    Returns
    -------
    list of (str, str)
        Topic and sentences.
    """
    benchmark = evaluation.benchmark[evaluation.benchmark["cohort"] == ALL]
    n_by_role = {
        role: rows["participant_id"].nunique()
        for role, rows in evaluation.subjects.groupby("role", sort=True)
    }
    topics = [("Data", _data(evaluation.subjects, n_by_role))]
    for modality, rows in benchmark.groupby("modality", sort=True):
        scans = evaluation.subjects[evaluation.subjects["modality"] == modality]
        pairs = analyses.comparison[analyses.comparison["modality"] == modality]
        topics.append((f"Lesions, {modality}", _lesions(rows, scans, pairs[pairs["outcome"] == "dice"])))
        topics.append((f"False positives, {modality}", _false_positives(rows, scans)))
    topics.append(("Bias", _bias(analyses)))
    if experiments is not None:
        topics.append(("Experiments", _experiments(experiments)))
    missing = _missing(evaluation.subjects, evaluation.missing_data, len(evaluation.unreadable))
    topics.append(("Excluded or missing", missing))
    few = [
        count(n_by_role[role], *nouns)
        for role, nouns in (
            (LESION, ("participant with a lesion mask", "participants with a lesion mask")),
            (HEALTHY, ("healthy control",)),
        )
        if 0 < n_by_role.get(role, 0) < FEW
    ]
    if few:
        text = f"Only {join_words(few)}: means and the order of detectors may differ in other samples."
        topics.append(("Sample size", text))
    return topics


def count(number: int, one: str, many: str | None = None) -> str:
    """Return a number with its noun: `1 scan`, `2 scans`."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def join_words(words: Iterable[str]) -> str:
    """Join words as in a sentence: `a, b and c`."""
    words = list(words)
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def _number(value: float) -> str:
    return f"{value:.3f}" if value >= 0.0005 or value == 0 else "less than 0.001"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2g} %" if fraction >= 0.00005 or fraction == 0 else "less than 0.01 %"


def _data(scans: pd.DataFrame, n_by_role: dict[str, int]) -> str:
    if scans.empty:
        return "No usable image."
    images = scans.drop_duplicates("source_image")
    n_empty, n_neither = _count_empty(images), n_by_role.get(MISSING_MASK, 0)
    return (
        f"{count(scans['detector'].nunique(), 'detector')}, {count(len(images), 'image')} "
        f"({join_words(sorted(set(images['modality'])))}) "
        f"of {count(scans['participant_id'].nunique(), 'participant')}: "
        f"{n_by_role.get(LESION, 0)} with a lesion mask"
        + (f" (empty in {count(n_empty, 'image')})" if n_empty else "")
        + f", {count(n_by_role.get(HEALTHY, 0), 'healthy control')}"
        + (f", {n_neither} neither" if n_neither else "")
        + "."
    )


def most_scans(benchmark: pd.DataFrame, counted: str) -> pd.DataFrame:
    """Return the rows of the detectors with the most scans, since means of others are not comparable.

    Parameters
    ----------
    benchmark : pandas.DataFrame
        Rows of the benchmark of one modality and cohort.
    counted : {"n_lesion_scans", "n_healthy_scans"}
        Column with the number of scans.

    Returns
    -------
    pandas.DataFrame
        Some rows of `benchmark`, in their order.
    """
    return benchmark[benchmark[counted] == benchmark[counted].max()]


def _count_empty(scans: pd.DataFrame) -> int:
    """Count the lesion scans whose mask is empty."""
    return int(((scans["role"] == LESION) & (scans["n_lesion_voxels"] == 0)).sum())


def _lesions(rows: pd.DataFrame, scans: pd.DataFrame, pairs: pd.DataFrame) -> str:
    """Name the detectors with the highest mean Dice, and the significant differences."""
    lesions = scans[(scans["role"] == LESION) & (scans["n_lesion_voxels"] > 0)]
    n_participants = count(lesions["participant_id"].nunique(), "participant")
    ranked = rows[rows["dice_mean"].notna()].sort_values("dice_mean", ascending=False, kind="stable")
    if lesions.empty or ranked.empty:
        return "No lesion mask with a voxel in the brain: Dice and sensitivity cannot be computed."
    compared = most_scans(ranked, "n_lesion_scans")
    best, several = compared.iloc[0], len(compared) > 1
    name = detector_name(best["detector"])
    if (ranked["dice_nonempty_mean"] == 0).all():
        verb = "No detector marks" if len(ranked) > 1 else f"{name} does not mark"
        return f"{verb} any lesion voxel at the fixed threshold ({n_participants} with lesions)."
    interval = "too few participants for an interval"
    if not math.isnan(best["dice_ci_low"]):
        interval = f"95 % interval {_number(best['dice_ci_low'])} to {_number(best['dice_ci_high'])}"
        interval += ", not corrected for the selection of the best" if several else ""
    # The Dice of scans with an empty mask (1 without a finding, else 0) is part of the mean.
    n_empty = _count_empty(scans.drop_duplicates("source_image"))
    empty = f" and {count(n_empty, 'scan')} with an empty mask" if n_empty else ""
    start = "Highest mean Dice" if several else "Mean Dice"
    text = f"{start}: {name}, {_number(best['dice_mean'])} ({interval}; {n_participants} with lesions{empty})"
    fewer = [detector_name(name) for name in ranked["detector"] if name not in set(compared["detector"])]
    left_out = f" {join_words(fewer)} scored fewer scans." if fewer else ""
    if not several:
        return f"{text}.{left_out}"
    second = compared.iloc[1]
    text += f", followed by {detector_name(second['detector'])} with {_number(second['dice_mean'])}."
    text += left_out
    ranks = mean_ranks(participant_scores(lesions, lesions["modality"].iloc[0], "dice"), "dice")
    if len(ranks) and ranks.index[0] != best["detector"]:
        text += f" {detector_name(ranks.index[0])} has the best mean rank within participants."
    return f"{text} {_differences(best['detector'], pairs)}"


def _differences(best: str, pairs: pd.DataFrame) -> str:
    tested = pairs[pairs["p_holm"].notna()]
    own = tested[(tested["detector_a"] == best) | (tested["detector_b"] == best)]
    if own.empty:
        return "Too few participants to test differences between detectors."
    similar = own[own["p_holm"] >= ALPHA]
    others = [
        detector_name(row.detector_b if row.detector_a == best else row.detector_a)
        for row in similar.itertuples()
    ]
    if len(own) == 1:
        return f"The difference between the two is {'not ' if others else ''}significant."
    start = f"{detector_name(best)} differs significantly from"
    if not others:
        text = f"{start} all {len(own)} others."
    elif len(others) == len(own):
        text = f"{start} none of the others."
    else:
        text = f"{start} {len(own) - len(others)} of {len(own)} others"
        text += f", but not from {join_words(others)}." if len(others) <= 3 else "."
    n_significant = int((tested["p_holm"] < ALPHA).sum())
    return f"{text} {n_significant} of all {len(tested)} pairs of detectors differ significantly."


def _false_positives(rows: pd.DataFrame, scans: pd.DataFrame) -> str:
    """Report the false-positive rates of healthy controls, and compare them with those of the thresholds."""
    healthy = scans[scans["role"] == HEALTHY]
    known = rows[rows["fpr_healthy_mean"].notna()].sort_values("fpr_healthy_mean", kind="stable")
    if known.empty:
        return "No healthy controls: the false-positive rate cannot be computed."
    low, high = known.iloc[0], known.iloc[-1]
    if len(known) == 1:
        text = f"{detector_name(low['detector'])} marks {_percent(low['fpr_healthy_mean'])} of the brain"
    else:
        text = (
            f"The detectors mark {_percent(low['fpr_healthy_mean'])} ({detector_name(low['detector'])}) to "
            f"{_percent(high['fpr_healthy_mean'])} ({detector_name(high['detector'])}) of the brain"
        )
    text += f" on average ({count(healthy['participant_id'].nunique(), 'healthy control')})."
    nominal = known["threshold_name"].str.extract(_FPR_THRESHOLD, expand=False).astype(float)
    for percent, models in known.groupby(nominal):
        above = models[models["fpr_healthy_mean"] > percent / 100]
        lows = above["fpr_healthy_mean_ci_low"]
        n_clearly = None if lows.isna().all() else int((lows > percent / 100).sum())
        text += f" {_nominal_rate(percent, len(models), len(known), len(above), n_clearly)}"
    return text


def _nominal_rate(percent: float, n: int, n_detectors: int, n_above: int, n_clearly: int | None) -> str:
    """Compare false-positive rates with the rate at which the thresholds were fixed.

    Parameters
    ----------
    percent : float
        False-positive rate on validation data, in percent.
    n, n_detectors : int
        Number of detectors whose threshold was fixed at that rate, and of all detectors.
    n_above : int
        Number of those `n` with a higher mean rate.
    n_clearly : int or None
        Number of those `n_above` whose 95 % interval lies above the rate; None without intervals.
    """
    of = "" if n == n_detectors else f" of {n} of {n_detectors} detectors"
    subject, verb = ("The thresholds", "were") if n > 1 else ("The threshold", "was")
    start = f"{subject}{of} {verb} fixed at {percent:g} % on validation data; this rate is"
    if n_above == 0:
        return f"{start} not exceeded."
    if n_clearly is None:
        interval = "too few participants for an interval"
    elif n == 1:
        interval = f"its 95 % interval {'lies above it' if n_clearly else 'includes it'}"
    else:
        interval = f"the 95 % intervals of {n_clearly} lie above it, without correction for their number"
    return f"{start} exceeded{'' if n == 1 else f' by {n_above} of {n}'} ({interval})."


def _bias(analyses: Analyses) -> str:
    coefficients = analyses.bias.coefficients
    if coefficients.empty:
        return "No model could be fitted to this cohort; see the section Bias."
    texts = []
    for outcome, words in (("fpr", "False-positive rate of healthy controls"), ("dice", "Dice on lesions")):
        rows = coefficients[coefficients["outcome"] == outcome]
        if rows.empty:
            continue
        n_models = len(rows.drop_duplicates(["detector", "modality"]))
        significant = rows[rows["p_fdr"] < ALPHA].drop_duplicates(["detector", "modality", "term"])
        terms = join_words(f"{term} in {n}" for term, n in significant["term"].value_counts().items())
        if terms:
            texts.append(f"{words}: associated with {terms} of {count(n_models, 'model')}.")
        else:
            texts.append(
                f"{words}: no significant association with {join_words(sorted(rows['term'].unique()))} "
                f"(up to {int(rows['n_participants'].max())} participants), which does not exclude one."
            )
    return " ".join(texts)


def _experiments(experiments: pd.DataFrame) -> str:
    others = experiments[experiments["variant"] != REFERENCE]
    if others.empty:
        return "The other outputs have no detector and modality in common with these."
    names = [detector_name(detector) for detector in sorted(others["detector"].unique())]
    text = f"{count(others['variant'].nunique(), 'variant')} of {join_words(names)} on the same images."
    tested = others[others["p_holm"].notna()]
    if tested.empty:
        return f"{text} Too few participants to test differences."
    n_significant = int((tested["p_holm"] < ALPHA).sum())
    return (
        f"{text} {n_significant} of {count(len(tested), 'comparison')} with the models of this report (Dice, "
        f"AUPRC, false-positive rate) {'is' if n_significant == 1 else 'are'} significant."
    )


def _missing(scans: pd.DataFrame, missing_data: list[MissingData], n_unreadable: int) -> str:
    excluded = [missing for missing in missing_data if missing.reason.startswith(EXCLUDED)]
    rest = [missing for missing in missing_data if not missing.reason.startswith(EXCLUDED)]
    unused = scans.loc[scans["role"] == MISSING_MASK, "source_image"].nunique()
    parts = [
        (
            len({missing.image + (missing.modality or "") for missing in excluded}),
            "scan",
            "excluded by quality control",
        ),
        (
            len({missing.subject for missing in rest if missing.modality is None}),
            "participant",
            "without a preprocessed scan",
        ),
        (sum(missing.modality is not None for missing in rest), "score table", "missing"),
        (n_unreadable, "table", "not readable"),
        (unused, "scan", "without lesion mask, of participants not known to be healthy"),
    ]
    found = [f"{count(number, noun)} {reason}" for number, noun, reason in parts if number]
    return f"{join_words(found)}." if found else "None."
