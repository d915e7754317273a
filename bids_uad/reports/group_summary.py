"""The group report in a few plain sentences, each of which is true of any cohort."""

from __future__ import annotations

import re
from collections.abc import Iterable

import pandas as pd

from bids_uad.evaluation.analyses import Analyses
from bids_uad.evaluation.benchmark import ALL, EXCLUDED, Evaluation
from bids_uad.evaluation.comparison import mean_ranks, participant_scores
from bids_uad.evaluation.experiments import REFERENCE
from bids_uad.evaluation.missing import MissingData
from bids_uad.evaluation.subjects import HEALTHY, LESION, MISSING_MASK
from bids_uad.reports.group_charts import ALPHA
from bids_uad.reports.group_text import detector_name

FEW = 10
"""Numbers that rest on fewer people are called so."""
_PROMISE = re.compile(r"fpr_(\d+)pct")


def summarise(
    evaluation: Evaluation, analyses: Analyses, experiments: pd.DataFrame | None = None
) -> list[tuple[str, str]]:
    """Say what came out.

    Parameters
    ----------
    evaluation : Evaluation
    analyses : Analyses
    experiments : pandas.DataFrame, optional
        Of :func:`bids_uad.evaluation.experiments.compare_variants`.

    Returns
    -------
    list of (str, str)
        Topic and sentences.
    """
    benchmark = evaluation.benchmark[evaluation.benchmark["cohort"] == ALL]
    people = {
        role: rows["participant_id"].nunique()
        for role, rows in evaluation.subjects.groupby("role", sort=True)
    }
    told = [("Who", _who(evaluation.subjects, people))]
    for modality, rows in benchmark.groupby("modality", sort=True):
        scans = evaluation.subjects[evaluation.subjects["modality"] == modality]
        pairs = analyses.comparison[analyses.comparison["modality"] == modality]
        told.append((f"Lesions in {modality}", _lesions(rows, scans, pairs[pairs["outcome"] == "dice"])))
        told.append((f"False alarms in {modality}", _false_alarms(rows, scans)))
    told.append(("Bias", _bias(analyses)))
    if experiments is not None:
        told.append(("Experiments", _experiments(experiments)))
    told.append(
        ("Left out", _left_out(evaluation.subjects, evaluation.missing_data, len(evaluation.unreadable)))
    )
    few = [
        f"{count(people[role], 'person', 'people')} {words}"
        for role, words in ((LESION, "with a lesion mask"), (HEALTHY, "known to be healthy"))
        if 0 < people.get(role, 0) < FEW
    ]
    if few:
        told.append(
            (
                "How sure",
                f"There are only {truncate_list(few)}: numbers may be quite different in other people, and "
                "so may the order of the detectors.",
            )
        )
    return told


def count(number: int, one: str, many: str | None = None) -> str:
    """Write a number with its noun: `1 scan`, `2 scans`."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def truncate_list(words: Iterable[str]) -> str:
    """Join words as in a sentence: `a, b and c`."""
    words = list(words)
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def _number(value: float) -> str:
    return f"{value:.3f}" if value >= 0.0005 or value == 0 else "less than 0.001"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share >= 0.00005 or share == 0 else "less than 0.01 %"


def _who(scans: pd.DataFrame, people: dict[str, int]) -> str:
    if scans.empty:
        return "No image could be used."
    detectors = count(scans["detector"].nunique(), "detector")
    images = scans.drop_duplicates("source_image")
    empty = _count_empty(images)
    empty = f" ({count(empty, 'scan')} with an empty one)" if empty else ""
    text = (
        f"{detectors} scored {count(len(images), 'scan')} ({truncate_list(sorted(set(images['modality'])))}) "
        f"of {count(scans['participant_id'].nunique(), 'person', 'people')}: "
        f"{people.get(LESION, 0)} with a lesion mask{empty}, {people.get(HEALTHY, 0)} known to be healthy"
    )
    neither = people.get(MISSING_MASK, 0)
    return f"{text}{f', {neither} neither' if neither else ''}."


def _count_empty(scans: pd.DataFrame) -> int:
    """Count the lesion scans whose mask is empty."""
    return int(((scans["role"] == LESION) & (scans["n_lesion_voxels"] == 0)).sum())


def _lesions(rows: pd.DataFrame, scans: pd.DataFrame, pairs: pd.DataFrame) -> str:
    """Say who finds most, and from whom that is told."""
    lesions = scans[(scans["role"] == LESION) & (scans["n_lesion_voxels"] > 0)]
    people = count(lesions["participant_id"].nunique(), "person", "people")
    ranked = rows[rows["dice_mean"].notna()].sort_values("dice_mean", ascending=False, kind="stable")
    if lesions.empty or ranked.empty:
        return "No scan has a lesion in its mask, so nothing is known about finding lesions."
    best = ranked.iloc[0]
    if (ranked["dice_nonempty_mean"] == 0).all():
        verb = "No detector marks" if len(ranked) > 1 else f"{detector_name(best['detector'])} does not mark"
        return f"{verb} any lesion voxel of {people} at the fixed threshold."
    name = detector_name(best["detector"])
    picked = ", not corrected for its being the best," if len(ranked) > 1 else ""
    interval = (
        f"95 % interval{picked} {_number(best['dice_ci_low'])} to {_number(best['dice_ci_high'])}"
        if best["dice_ci_low"] == best["dice_ci_low"]
        else "too few people for an interval"
    )
    # Their Dice, 1 where nothing is found and 0 elsewhere, is part of the mean.
    empty = _count_empty(scans.drop_duplicates("source_image"))
    empty = f" and {count(empty, 'scan')} with an empty mask" if empty else ""
    verb = "finds most: its" if len(ranked) > 1 else "was tried alone: its"
    text = (
        f"{name} {verb} mean Dice is {_number(best['dice_mean'])} ({interval}; {people} with lesions{empty})."
    )
    if len(ranked) == 1:
        return text
    second = ranked.iloc[1]
    text += f" Next is {detector_name(second['detector'])} with {_number(second['dice_mean'])}."
    first = mean_ranks(participant_scores(lesions, lesions["modality"].iloc[0], "dice"), "dice")
    if len(first) and first.index[0] != best["detector"]:
        text += f" Ranked within each person, {detector_name(first.index[0])} comes first."
    return f"{text} {_differences(best['detector'], pairs)}"


def _differences(best: str, pairs: pd.DataFrame) -> str:
    tested = pairs[pairs["p_holm"].notna()]
    own = tested[(tested["detector_a"] == best) | (tested["detector_b"] == best)]
    if own.empty:
        return "Whether detectors differ by more than chance cannot be told from so few people."
    alike = own[own["p_holm"] >= ALPHA]
    others = [
        detector_name(row.detector_b if row.detector_a == best else row.detector_a)
        for row in alike.itertuples()
    ]
    name = detector_name(best)
    if len(own) == 1:
        return f"The difference between the two is {'not ' if others else ''}told from chance."
    if not others:
        text = f"{name} differs from all {len(own)} others by more than chance."
    elif len(others) == len(own):
        text = f"{name} differs from none of the others by more than chance."
    else:
        text = f"{name} differs from {len(own) - len(others)} of {len(own)} others by more than chance"
        text += f", but not from {truncate_list(others)}." if len(others) <= 3 else "."
    told = int((tested["p_holm"] < ALPHA).sum())
    return f"{text} Of all {len(tested)} pairs of detectors {told} differ so."


def _false_alarms(rows: pd.DataFrame, scans: pd.DataFrame) -> str:
    """Say how much of healthy brains is marked, and whether that is what the thresholds promised."""
    healthy = scans[scans["role"] == HEALTHY]
    known = rows[rows["fpr_healthy_mean"].notna()].sort_values("fpr_healthy_mean", kind="stable")
    if known.empty:
        return "No scan is known to be of a healthy person, so nothing is known about false alarms in them."
    people = count(healthy["participant_id"].nunique(), "healthy person", "healthy people")
    low, high = known.iloc[0], known.iloc[-1]
    if len(known) == 1:
        text = f"{detector_name(low['detector'])} marks {_percent(low['fpr_healthy_mean'])} of the brain"
    else:
        text = (
            f"The detectors mark between {_percent(low['fpr_healthy_mean'])} "
            f"({detector_name(low['detector'])}) and {_percent(high['fpr_healthy_mean'])} "
            f"({detector_name(high['detector'])}) of the brain"
        )
    text += f" on average over {people}."
    promises = known["threshold_name"].str.extract(_PROMISE, expand=False).astype(float)
    for promise, kept in known.groupby(promises):
        above = kept[kept["fpr_healthy_mean"] > promise / 100]
        lows = above["fpr_healthy_mean_ci_low"]
        n_surely = None if lows.isna().all() else int((lows > promise / 100).sum())
        text += f" {_promise(promise, len(kept), len(known), len(above), n_surely)}"
    return text


def _promise(percent: float, n: int, n_detectors: int, n_above: int, n_surely: int | None) -> str:
    if n == n_detectors:
        whose = "Its threshold" if n == 1 else "Their thresholds"
    else:
        whose = f"The threshold{'s' if n > 1 else ''} of {n} of them"
    start = f"{whose} promised {percent:g} % on validation data:"
    surely = f"the 95 % intervals of {n_surely} lie above it (each alone, not corrected for their number)"
    if n_surely is None:
        surely = "too few people for an interval"
    if n_above == 0:
        return f"{start} {'it keeps' if n == 1 else 'all keep'} to that."
    if n == 1:
        chance = f"{'by' if n_surely else 'not by'} more than chance"
        return f"{start} it marks more, {surely if n_surely is None else chance}."
    if n_above == n:
        return f"{start} all mark more, {surely}."
    keep, mark = "keeps" if n - n_above == 1 else "keep", "marks" if n_above == 1 else "mark"
    return f"{start} {n - n_above} {keep} to that, {n_above} {mark} more, {surely}."


def _bias(analyses: Analyses) -> str:
    coefficients = analyses.bias.coefficients
    if coefficients.empty:
        return "Could not be modelled in this cohort; the section on bias says why."
    texts = []
    for outcome, words in (("fpr", "False alarms in healthy brains"), ("dice", "Dice on lesions")):
        rows = coefficients[coefficients["outcome"] == outcome]
        if rows.empty:
            continue
        models = len(rows.drop_duplicates(["detector", "modality"]))
        found = rows[rows["p_fdr"] < ALPHA].drop_duplicates(["detector", "modality", "term"])
        terms = truncate_list(f"{term} in {n}" for term, n in found["term"].value_counts().items())
        people = int(rows["n_participants"].max())
        if terms:
            verb = "depends" if outcome == "dice" else "depend"
            texts.append(f"{words} {verb} on {terms} of {count(models, 'model')}.")
        else:
            texts.append(
                f"{words}: no dependence on {truncate_list(sorted(rows['term'].unique()))} was found in "
                f"up to {people} people, which does not prove that there is none."
            )
    return " ".join(texts)


def _experiments(experiments: pd.DataFrame) -> str:
    others = experiments[experiments["variant"] != REFERENCE]
    if others.empty:
        return "The other outputs have no scan of a detector and modality of these."
    names = [detector_name(detector) for detector in sorted(others["detector"].unique())]
    text = (
        f"{count(others['variant'].nunique(), 'variant')} of {truncate_list(names)} scored the same images."
    )
    tested = others[others["p_holm"].notna()]
    if tested.empty:
        return f"{text} Whether they differ by more than chance cannot be told from so few people."
    told = int((tested["p_holm"] < ALPHA).sum())
    return (
        f"{text} Of {count(len(tested), 'comparison')} with the models of this page (Dice, AUPRC, "
        f"false alarms) {told} differ{'s' if told == 1 else ''} by more than chance."
    )


def _left_out(scans: pd.DataFrame, missing_data: list[MissingData], n_unreadable: int) -> str:
    excluded = {absence.image + (absence.modality or "") for absence in missing_data if _ruled_out(absence)}
    rest = [absence for absence in missing_data if not _ruled_out(absence)]
    nothing = {absence.subject for absence in rest if absence.modality is None}
    tables = [absence for absence in rest if absence.modality is not None]
    unused = scans.loc[scans["role"] == MISSING_MASK].drop_duplicates("source_image")
    parts = [
        (len(excluded), "scan", "by quality control"),
        (len(nothing), "person", "without any preprocessed scan"),
        (len(tables), "score table", "missing"),
        (n_unreadable, "table", "not readable"),
        (len(unused), "scan", "without a lesion mask of people not known to be healthy"),
    ]
    found = [
        f"{count(number, noun, 'people' if noun == 'person' else None)} {why}"
        for number, noun, why in parts
        if number
    ]
    return f"{truncate_list(found)}." if found else "Nothing."


def _ruled_out(absence: MissingData) -> bool:
    return absence.reason.startswith(EXCLUDED)
