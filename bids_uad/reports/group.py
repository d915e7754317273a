"""Group report: a single HTML page without external resources, and its figures as files."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

import bids_uad
from bids_uad.config import MODALITIES
from bids_uad.dataset.participants import Participants
from bids_uad.evaluation.analyses import Analyses
from bids_uad.evaluation.benchmark import ALL, Evaluation
from bids_uad.evaluation.benchmark import COLUMNS as BENCHMARK_COLUMNS
from bids_uad.evaluation.experiments import COLUMNS as EXPERIMENT_COLUMNS
from bids_uad.evaluation.missing import MissingData
from bids_uad.evaluation.provenance import ModelProvenance
from bids_uad.evaluation.subjects import COLUMNS as SUBJECT_COLUMNS
from bids_uad.evaluation.subjects import HEALTHY, LESION, MISSING_MASK
from bids_uad.files import read_json, write_text
from bids_uad.methods.registry import detector_name
from bids_uad.reports.bibliography import methods_html
from bids_uad.reports.boilerplate import bibliography
from bids_uad.reports.charts import Chart
from bids_uad.reports.group_charts import detector_colours, group_charts
from bids_uad.reports.group_panel import example_figures
from bids_uad.reports.group_summary import count, most_scans, summarise
from bids_uad.reports.group_text import fixed, interval, no_interval

OUTCOMES = {"dice": "Dice", "auprc": "AUPRC", "fpr": "false positives", "sensitivity": "sensitivity"}
MAX_SCAN_ROWS = 1000
"""Rows of the table of scans; group_subjects.tsv has all of them."""
MAX_LISTED = 50
"""Images or participants that are listed per reason; the others are counted."""


@dataclass(frozen=True)
class Chapter:
    """Chapter of the report.

    Parameters
    ----------
    name : str
        HTML id.
    title : str
        Entry in the list of contents.
    figures : tuple of str, default=()
        Names of its figures without modality, in order of display.
    contents : tuple of str or None, default=None
        Names of its contents besides the figures (keys of `_optional_contents`); the chapter is omitted if
        these and the figures are empty. None for chapters that are always shown.
    """

    name: str
    title: str
    figures: tuple[str, ...] = ()
    contents: tuple[str, ...] | None = None


CHAPTERS = (
    Chapter("summary", "Summary"),
    Chapter("benchmark", "Benchmark", ("dice", "dice_by_volume", "precision_recall")),
    Chapter("examples", "Examples", ("examples",), ("no_examples",)),
    Chapter("false_positives", "False positives", ("fpr_healthy",), ()),
    Chapter("comparison", "Comparison of detectors", ("ranks",), ("comparison",)),
    Chapter(
        "thresholds", "Thresholds and scores", ("dice_by_threshold", "thresholds", "score_histograms"), ()
    ),
    Chapter("lesions", "Lesion size and contrast", ("lesion_size",), ("lesions", "n_without_lesion_table")),
    Chapter("subgroups", "Subgroups", (), ("subgroups",)),
    Chapter("bias", "Bias", ("bias_age",)),
    Chapter("experiments", "Experiments", ("scaling", "ablation"), ("experiments",)),
    Chapter("scans", "Scans"),
    Chapter("problems", "Missing and failed"),
    Chapter("provenance", "Provenance"),
    Chapter("definitions", "Definitions"),
    Chapter("methods", "Methods text", (), ("methods",)),
)


@dataclass(frozen=True)
class Provenance:
    """Command, date and models of a group report.

    Parameters
    ----------
    command : tuple of str
        Command line, printed in the report.
    date : str
        Date of the run.
    origins : dict
        Provenance of the model of each (detector, modality).
    """

    command: tuple[str, ...]
    date: str
    origins: dict[tuple[str, str], ModelProvenance]


def write_group_report(
    out_dir: str | Path,
    evaluation: Evaluation,
    analyses: Analyses,
    participants: Participants,
    provenance: Provenance,
    experiments: pd.DataFrame | None = None,
) -> Path:
    """Write `group.html` and its figures in `group/figures`; the methods text is read from `logs`.

    Parameters
    ----------
    out_dir : path-like
        Root of the derivative dataset.
    evaluation : Evaluation
        Benchmark table, scores per scan, and the scans that are missing or unreadable.
    analyses : Analyses
        Secondary analyses: comparison of detectors, subgroups, bias, thresholds, lesions, deviations.
    participants : Participants
        Contents of participants.tsv; listed participants without scores are reported as missing.
    provenance : Provenance
        Command line, date and model bundles.
    experiments : pandas.DataFrame, optional
        Of :func:`bids_uad.evaluation.experiments.compare_variants`.

    Returns
    -------
    pathlib.Path
        Path of `group.html`.
    """
    root = Path(out_dir)
    examples, no_examples = example_figures(root, evaluation.subjects)
    charts = [*group_charts(evaluation, analyses, experiments), *examples]
    _write_figures(root / "group" / "figures", charts)
    figures = _by_chapter(charts)
    contents = _optional_contents(root, evaluation, analyses, experiments) | {"no_examples": no_examples}
    definitions = _definitions(analyses, experiments)
    overall = evaluation.benchmark["cohort"] == ALL
    page = _load_template(detector_colours(evaluation)).render(
        **contents,
        figures=figures,
        version=bids_uad.__version__,
        chapters=[chapter for chapter in CHAPTERS if _is_shown(chapter, figures, contents)],
        summary=summarise(evaluation, analyses, experiments),
        overview=_overview(evaluation, participants),
        benchmark=_by_modality(_ranked(evaluation.benchmark[overall])),
        cohorts=_cohorts(evaluation.benchmark[~overall]),
        cohort_column=participants.cohort_column,
        best=_best(evaluation.benchmark[overall]),
        min_lesion_volume=evaluation.min_lesion_volume,
        missed=_records(analyses.missed),
        disparities=_split(analyses.disparities, ["modality", "factor"]),
        bias=_split(_odds_ratios(analyses.bias.coefficients), ["modality", "outcome"]),
        deviations=_by_modality(_exponentiate_effects(analyses.deviations)),
        remarks=analyses.bias.remarks,
        outcomes=OUTCOMES,
        scans=_records(evaluation.subjects.head(MAX_SCAN_ROWS)),
        n_scan_rows=len(evaluation.subjects),
        has_sessions=bool(evaluation.subjects["session_id"].notna().any()),
        roles={LESION: "lesion", HEALTHY: "healthy", MISSING_MASK: "no mask"},
        missing_data=_by_reason(evaluation.missing_data),
        max_listed=MAX_LISTED,
        unreadable=evaluation.unreadable,
        warnings=evaluation.warnings,
        origins=provenance.origins,
        provenance=_provenance(root, provenance, participants),
        definitions=definitions,
        about={name: columns for name, (_, columns) in definitions.items()},
    )
    return write_text(root / "group.html", page + "\n")


def _load_template(colours: dict[str, str]) -> Template:
    """Load the template of the page, with its filters and functions."""
    environment = Environment(
        loader=PackageLoader("bids_uad", "data/reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= {"fixed": fixed, "detector_name": detector_name}
    environment.globals |= {"interval": interval, "no_interval": no_interval, "colours": colours}
    return environment.get_template("group.html.j2")


def _optional_contents(
    root: Path, evaluation: Evaluation, analyses: Analyses, experiments: pd.DataFrame | None
) -> dict[str, Any]:
    """Return the contents whose chapters are omitted if they are empty."""
    text = root / "logs" / "CITATION_group.md"
    return {
        "comparison": _split(analyses.comparison, ["modality", "outcome"]),
        "experiments": [] if experiments is None else _split(experiments, ["modality", "detector"]),
        "lesions": _split(analyses.lesions, ["modality", "factor"]),
        "n_without_lesion_table": evaluation.lesions.without,
        "subgroups": _by_modality(analyses.subgroups),
        "methods": methods_html(text.read_text(encoding="utf-8"), bibliography()) if text.is_file() else "",
    }


def _definitions(analyses: Analyses, experiments: pd.DataFrame | None) -> dict[str, tuple[str, Any]]:
    """Return title and columns of each table in the outputs, by the name of the table."""
    tables = {
        "benchmark": ("Benchmark", BENCHMARK_COLUMNS),
        "subjects": ("Scores of each image and detector", SUBJECT_COLUMNS),
        **{name: (title, columns) for name, (_, title, columns) in analyses.tables.items()},
    }
    if experiments is not None:
        tables["experiments"] = ("Models compared on the same images", EXPERIMENT_COLUMNS)
    return tables


def _write_figures(folder: Path, figures: Iterable[Chart]) -> None:
    """Write each figure as a file, and remove those of earlier runs."""
    names = set()
    for figure in figures:
        # Links in the report are relative to the root of the derivatives.
        svg = figure.svg.replace('<a href="sub-', '<a href="../../sub-')
        names.add(write_text(folder / f"{figure.name}.svg", svg + "\n"))
    for stale in set(folder.glob("*.svg")) - names:
        stale.unlink()


def _by_chapter(charts: Iterable[Chart]) -> dict[str, list[Chart]]:
    """Sort charts into chapters, in order of display; chapters without charts have an empty list."""
    charts = list(charts)
    return {
        chapter.name: [
            chart
            for name in chapter.figures
            for chart in charts
            if chart.name == name or chart.name in {f"{name}_{modality}" for modality in MODALITIES}
        ]
        for chapter in CHAPTERS
    }


def _is_shown(chapter: Chapter, figures: dict[str, list[Chart]], contents: dict[str, Any]) -> bool:
    """Return whether a chapter is always shown or has contents."""
    if chapter.contents is None:
        return True
    return bool(figures[chapter.name]) or any(contents[name] for name in chapter.contents)


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return table.to_dict(orient="records")


def _split(table: pd.DataFrame, keys: list[str]) -> list[tuple[tuple[str, ...], list[dict[str, Any]]]]:
    """Split a table by the values of its columns `keys`."""
    return [(key, _records(rows)) for key, rows in table.groupby(keys, sort=True)]


def _by_modality(table: pd.DataFrame) -> dict[str, list[dict[str, Any]]]:
    return {modality: _records(rows) for modality, rows in table.groupby("modality", sort=True)}


def _exponentiate_effects(deviations: pd.DataFrame) -> pd.DataFrame:
    """Turn log odds ratios of age and sex into odds ratios."""
    effects = [column for column in deviations if column.startswith(("age_", "sex_"))]
    return deviations.assign(**{column: np.exp(deviations[column].astype(float)) for column in effects})


def _ranked(benchmark: pd.DataFrame) -> pd.DataFrame:
    """Sort by mean Dice, best first; without Dice, by false-positive rate."""
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
        best = {}
        for cohort, of_cohort in rows.groupby("cohort"):
            compared = most_scans(of_cohort, "n_lesion_scans")
            highest = compared["dice_mean"] == compared["dice_mean"].max()
            several = compared["dice_mean"].nunique() > 1
            best[cohort] = set(compared.loc[highest, "detector"]) if several else set()
        if names:
            parts[modality] = {"names": names, "rows": records, "best": best}
    return parts


def _odds_ratios(coefficients: pd.DataFrame) -> pd.DataFrame:
    """Add columns `shown*`: odds ratios of models of false positives, coefficients of models of Dice."""
    shown = coefficients.copy()
    ratio = shown["odds_ratio"].notna()
    for name, source in {"shown": "estimate", "shown_ci_low": "ci_low", "shown_ci_high": "ci_high"}.items():
        values = shown[source].astype(float)
        shown[name] = np.where(ratio, np.exp(values), values)
    return shown


def _provenance(root: Path, provenance: Provenance, participants: Participants) -> list[tuple[str, str]]:
    """Return terms and texts of the list at the end of the chapter on provenance."""
    atlas = read_json(root / "tpl-SRI24" / "anat" / "tpl-SRI24_desc-brain_T1w.json")
    name = "unknown (no tpl-SRI24 in the outputs)"
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
    """Return (detector, modality, column) of the best values over all scans, unless all are equal.

    Detectors that scored fewer scans than others are not compared.
    """
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
            counted = "n_healthy_scans" if column == "fpr_healthy_mean" else "n_lesion_scans"
            compared = most_scans(rows, counted)
            if compared[column].nunique() > 1:
                detectors = compared.loc[compared[column] == extreme(compared[column]), "detector"]
                best |= {(detector, modality, column) for detector in detectors}
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
