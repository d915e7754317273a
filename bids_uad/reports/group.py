"""The group report: one HTML page that needs no other file and no network."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

import bids_uad
from bids_uad.dataset.participants import Participants
from bids_uad.evaluation.analyses import Analyses
from bids_uad.evaluation.benchmark import ALL, Evaluation
from bids_uad.evaluation.benchmark import COLUMNS as BENCHMARK_COLUMNS
from bids_uad.evaluation.experiments import COLUMNS as EXPERIMENT_COLUMNS
from bids_uad.evaluation.missing import MissingData
from bids_uad.evaluation.provenance import Origin
from bids_uad.evaluation.subjects import COLUMNS as SUBJECT_COLUMNS
from bids_uad.evaluation.subjects import HEALTHY, LESION, MISSING_MASK
from bids_uad.files import read_json, write_text
from bids_uad.reports.bibliography import methods_html
from bids_uad.reports.boilerplate import bibliography
from bids_uad.reports.charts import Chart
from bids_uad.reports.group_charts import detector_colours, group_charts
from bids_uad.reports.group_panel import example_figures
from bids_uad.reports.group_summary import count, summarise
from bids_uad.reports.group_text import (
    detector_name,
    fixed,
    interval,
    no_interval,
)

OUTCOMES = {"dice": "Dice", "auprc": "AUPRC", "fpr": "false positives", "sensitivity": "sensitivity"}
MAX_SCAN_ROWS = 1000
"""Rows of the table of scans; the rest is in group_subjects.tsv only."""
MOST_NAMED = 50
"""Participants that are named for one reason; the rest is counted."""
CONTENTS = {
    "summary": "In short",
    "benchmark": "Benchmark",
    "examples": "Examples",
    "false_alarms": "False alarms",
    "comparison": "Comparison of detectors",
    "thresholds": "Thresholds and scores",
    "lesions": "Size and contrast of lesions",
    "subgroups": "Parts of the cohort",
    "bias": "Bias",
    "experiments": "Experiments",
    "further": "Further figures",
    "scans": "Scans",
    "problems": "Problems",
    "provenance": "Provenance",
    "definitions": "Definitions",
    "methods": "Methods text",
}
CHAPTERS = {
    "dice": "benchmark",
    "dice_by_volume": "benchmark",
    "precision_recall": "benchmark",
    "examples": "examples",
    "fpr_healthy": "false_alarms",
    "ranks": "comparison",
    "dice_by_threshold": "thresholds",
    "thresholds": "thresholds",
    "score_histograms": "thresholds",
    "lesion_size": "lesions",
    "bias_age": "bias",
    "scaling": "experiments",
    "ablation": "experiments",
}
"""Where each figure is shown, by its name without the modality."""


@dataclass(frozen=True)
class Provenance:
    """How a page came about.

    Parameters
    ----------
    command : sequence of str
        What was asked for.
    date : str
        When.
    origins : dict
        (detector, modality) -> :class:`bids_uad.evaluation.provenance.Origin`.
    """

    command: tuple[str, ...]
    date: str
    origins: dict[tuple[str, str], Origin]


def write_group_report(
    out_dir: str | Path,
    evaluation: Evaluation,
    analyses: Analyses,
    participants: Participants,
    provenance: Provenance,
    experiments: pd.DataFrame | None = None,
) -> Path:
    """Write `group.html` and the single figures in `group/figures`; the methods text is taken from `logs`.

    Parameters
    ----------
    out_dir : path-like
        Root of the derivatives.
    evaluation : Evaluation
        The numbers.
    analyses : Analyses
        What more was asked.
    participants : Participants
        Who was expected.
    provenance : Provenance
        How the page came about.
    experiments : pandas.DataFrame, optional
        Of :func:`bids_uad.evaluation.experiments.compare_variants`.

    Returns
    -------
    pathlib.Path
        The page.
    """
    root = Path(out_dir)
    colours = detector_colours(evaluation)
    examples, no_examples = example_figures(root, evaluation.subjects)
    figures = [*group_charts(evaluation, analyses, experiments), *examples]
    _write_alone(root / "group" / "figures", figures)
    chapters: dict[str, list[Chart]] = {chapter: [] for chapter in CONTENTS}
    for figure in sorted(figures, key=_place):
        chapters[CHAPTERS.get(_without_modality(figure.name), "further")].append(figure)

    text = root / "logs" / "CITATION_group.md"
    whole = evaluation.benchmark["cohort"] == ALL
    tables = {
        "benchmark": ("Benchmark", BENCHMARK_COLUMNS),
        "subjects": ("Numbers of each image and detector", SUBJECT_COLUMNS),
        **{name: (what, columns) for name, (_, what, columns) in analyses.tables.items()},
    }
    if experiments is not None:
        tables["experiments"] = ("Models compared on the same images", EXPERIMENT_COLUMNS)
    environment = Environment(
        loader=PackageLoader("bids_uad", "data/reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= {"fixed": fixed, "detector_name": detector_name}
    environment.globals |= {"interval": interval, "no_interval": no_interval, "colours": colours}
    content = {
        "figures": chapters,
        "comparison": _parts(analyses.comparison, ["modality", "outcome"]),
        "disparities": _parts(analyses.disparities, ["modality", "factor"]),
        "experiments": [] if experiments is None else _parts(experiments, ["modality", "detector"]),
        "lesions": _parts(analyses.lesions, ["modality", "factor"]),
        "min_lesion_volume": evaluation.min_lesion_volume,
        "lesions_untold": evaluation.lesions.without,
        "subgroups": _by_modality(analyses.subgroups),
        "no_examples": no_examples,
        "methods": methods_html(text.read_text(encoding="utf-8"), bibliography()) if text.is_file() else "",
    }
    page = environment.get_template("group.html.j2").render(
        **content,
        version=bids_uad.__version__,
        contents=[(name, title) for name, title in CONTENTS.items() if _has(name, content)],
        summary=summarise(evaluation, analyses, experiments),
        overview=_overview(evaluation, participants),
        benchmark=_by_modality(_ranked(evaluation.benchmark[whole])),
        cohorts=_cohorts(evaluation.benchmark[~whole]),
        cohort_column=participants.cohort_column,
        best=_best(evaluation.benchmark[whole]),
        missed=_records(analyses.missed),
        bias=_parts(_odds(analyses.bias.coefficients), ["modality", "outcome"]),
        deviations=_by_modality(_factors(analyses.deviations)),
        remarks=analyses.bias.remarks,
        outcomes=OUTCOMES,
        scans=_records(evaluation.subjects.head(MAX_SCAN_ROWS)),
        n_scan_rows=len(evaluation.subjects),
        has_sessions=bool(evaluation.subjects["session_id"].notna().any()),
        roles={LESION: "lesion", HEALTHY: "healthy", MISSING_MASK: "no mask"},
        missing_data=_by_reason(evaluation.missing_data),
        most_named=MOST_NAMED,
        unreadable=evaluation.unreadable,
        warnings=evaluation.warnings,
        origins=provenance.origins,
        provenance=_provenance(root, provenance, participants),
        about={name: columns for name, (_, columns) in tables.items()},
        definitions=[
            (
                name,
                what,
                [(key, column["Description"]) for key, column in columns.items() if "_ci_" not in key],
            )
            for name, (what, columns) in tables.items()
        ],
    )
    return write_text(root / "group.html", page + "\n")


def _write_alone(folder: Path, figures: Iterable[Chart]) -> None:
    """Write each figure as a file; those of earlier runs go."""
    names = set()
    for figure in figures:
        # Links of the page start at the root of the derivatives.
        alone = figure.svg.replace('<a href="sub-', '<a href="../../sub-')
        names.add(write_text(folder / f"{figure.name}.svg", alone + "\n"))
    for stale in set(folder.glob("*.svg")) - names:
        stale.unlink()


def _place(figure: Chart) -> int:
    """Say where a figure comes among the others; one without a chapter comes last."""
    order = list(CHAPTERS)
    name = _without_modality(figure.name)
    return order.index(name) if name in order else len(order)


def _without_modality(name: str) -> str:
    return name.removesuffix("_T1w").removesuffix("_T2w")


def _has(chapter: str, content: dict[str, Any]) -> bool:
    """Say whether a chapter has something to show."""
    if chapter in ("comparison", "experiments", "subgroups", "methods"):
        return bool(content[chapter])
    if chapter == "lesions":
        return bool(content[chapter] or content["lesions_untold"])
    if chapter == "examples":
        return bool(content["figures"][chapter] or content["no_examples"])
    if chapter in ("false_alarms", "thresholds", "further"):
        return bool(content["figures"][chapter])
    return True


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return table.to_dict(orient="records")


def _parts(table: pd.DataFrame, keys: list[str]) -> list[tuple[tuple[str, ...], list[dict[str, Any]]]]:
    """Divide a table by the values of its columns `keys`."""
    return [(key, _records(rows)) for key, rows in table.groupby(keys, sort=True)]


def _by_modality(table: pd.DataFrame) -> dict[str, list[dict[str, Any]]]:
    return {modality: _records(rows) for modality, rows in table.groupby("modality", sort=True)}


def _factors(deviations: pd.DataFrame) -> pd.DataFrame:
    """Write log odds as factors on the odds."""
    effects = [column for column in deviations if column.startswith(("age_", "sex_"))]
    return deviations.assign(**{column: np.exp(deviations[column].astype(float)) for column in effects})


def _ranked(benchmark: pd.DataFrame) -> pd.DataFrame:
    """Put the best Dice first, or the fewest false positives where there is no Dice."""
    return benchmark.sort_values(
        ["dice_mean", "fpr_healthy_mean"], ascending=[False, True], kind="stable", ignore_index=True
    )


def _cohorts(benchmark: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Arrange the rows of cohorts by modality, detector and cohort."""
    parts = {}
    for modality, rows in benchmark.groupby("modality", sort=True):
        scans = rows.groupby("cohort", sort=True)["n_lesion_scans"].agg(["min", "max"])
        names = [
            (cohort, count(high, "scan") if low == high else f"{low} to {high} scans")
            for cohort, low, high in scans.itertuples()
            if high
        ]
        records = [
            {"detector": detector, "of": {row["cohort"]: row for row in _records(own)}}
            for detector, own in rows.groupby("detector", sort=True)
        ]
        highest = rows["dice_mean"] == rows.groupby("cohort")["dice_mean"].transform("max")
        rivals = rows.groupby("cohort")["dice_mean"].transform("nunique") > 1
        winners = rows[highest & rivals].groupby("cohort")["detector"].agg(set).to_dict()
        best = {cohort: winners.get(cohort, set()) for cohort, _ in names}
        if names:
            parts[modality] = {"names": names, "rows": records, "best": best}
    return parts


def _odds(coefficients: pd.DataFrame) -> pd.DataFrame:
    """Write coefficients as factors on the odds where they are log odds."""
    shown = coefficients.copy()
    ratio = shown["odds_ratio"].notna()
    for name, source in {"shown": "estimate", "shown_ci_low": "ci_low", "shown_ci_high": "ci_high"}.items():
        values = shown[source].astype(float)
        shown[name] = np.where(ratio, np.exp(values), values)
    return shown


def _provenance(root: Path, provenance: Provenance, participants: Participants) -> list[tuple[str, str]]:
    """Say how the page came about."""
    atlas = read_json(root / "tpl-SRI24" / "anat" / "tpl-SRI24_desc-brain_T1w.json")
    name = "not told: no tpl-SRI24 in the outputs"
    if atlas:
        checksum = atlas["ReferenceSHA256"][:12]
        name = f"{atlas['ReferenceName']} ({atlas['ReferenceSource']}; SHA-256 {checksum})"
    return [
        ("Date", provenance.date),
        ("Command", shlex.join(provenance.command)),
        ("Software", f"bids_uad {bids_uad.__version__}"),
        ("Atlas", name),
        ("Participants", str(participants.path) if participants.path else "no participants.tsv"),
    ]


def _overview(evaluation: Evaluation, participants: Participants) -> dict[str, Any]:
    scans = evaluation.subjects
    images = scans.drop_duplicates("source_image")
    return {
        "participants": scans["participant_id"].nunique(),
        "known": len({*participants.labels, *scans["participant_id"]}),
        "has_participants": participants.path is not None,
        "images": len(images),
        "lesion": int((images["role"] == LESION).sum()),
        "empty": int(((images["role"] == LESION) & (images["n_lesion_voxels"] == 0)).sum()),
        "healthy": int((images["role"] == HEALTHY).sum()),
        "missing_mask": int((images["role"] == MISSING_MASK).sum()),
        "modalities": sorted(set(scans["modality"])),
        "detectors": sorted(set(scans["detector"])),
        "versions": sorted(set(scans["app_version"])),
    }


def _best(benchmark: pd.DataFrame) -> set[tuple[str, str, str]]:
    """Mark the best number of each modality over all scans, where there are rivals."""
    directions: dict[str, Callable[[pd.Series], float]] = {
        "dice_mean": pd.Series.max,
        "auprc_mean": pd.Series.max,
        "auprc_pooled": pd.Series.max,
        "lesion_sensitivity": pd.Series.max,
        "lesion_precision": pd.Series.max,
        "lesion_f1": pd.Series.max,
        "fpr_healthy_mean": pd.Series.min,
        "false_lesions_per_lesion_scan": pd.Series.min,
    }
    best = set()
    for modality, rows in benchmark.groupby("modality"):
        for column, extreme in directions.items():
            if rows[column].nunique() > 1:
                winners = rows.loc[rows[column] == extreme(rows[column]), "detector"]
                best |= {(winner, modality, column) for winner in winners}
    return best


def _by_reason(missing_data: list[MissingData]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str, str], list[MissingData]] = defaultdict(list)
    for missing in missing_data:
        detector = detector_name(missing.detector) if missing.detector else ""
        groups[missing.reason, missing.modality or "", detector].append(missing)
    return [
        {"reason": reason, "what": f"{detector} {modality}".strip(), "images": members}
        for (reason, modality, detector), members in sorted(groups.items())
    ]
