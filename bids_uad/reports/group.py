"""The group report: one HTML page that needs no other file and no network."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, StrictUndefined

import bids_uad
from bids_uad.atomic import write_text
from bids_uad.dataset.participants import Participants
from bids_uad.evaluation.absences import Absence
from bids_uad.evaluation.analyses import Analyses
from bids_uad.evaluation.benchmark import ALL, Evaluation
from bids_uad.evaluation.benchmark import COLUMNS as BENCHMARK_COLUMNS
from bids_uad.evaluation.subjects import HEALTHY, LESION, MISSING_MASK
from bids_uad.reports.bibliography import methods_html
from bids_uad.reports.boilerplate import bibliography
from bids_uad.reports.group_analyses import ALPHA, analysis_figures
from bids_uad.reports.group_figures import detector_colours, group_figures
from bids_uad.reports.group_text import detector_name, fixed, interval

OUTCOMES = {"dice": "Dice", "auprc": "AUPRC", "fpr": "false positives", "sensitivity": "sensitivity"}
MAX_SCAN_ROWS = 1000
"""Rows of the table of scans; the rest is in group_subjects.tsv only."""


def write_group_report(
    out_dir: str | Path, evaluation: Evaluation, analyses: Analyses, participants: Participants
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

    Returns
    -------
    pathlib.Path
        The page.
    """
    root = Path(out_dir)
    folder = root / "group" / "figures"
    text = root / "logs" / "CITATION_group.md"
    colours = detector_colours(evaluation)
    further = analysis_figures(evaluation.subjects, analyses, colours)
    alone = [*further, *group_figures(evaluation, link_prefix="../../")]
    for figure in alone:
        write_text(folder / f"{figure.name}.svg", figure.svg + "\n")
    for stale in set(folder.glob("*.svg")) - {folder / f"{figure.name}.svg" for figure in alone}:
        stale.unlink()

    whole = evaluation.benchmark["cohort"] == ALL
    overall, cohorts = evaluation.benchmark[whole], evaluation.benchmark[~whole]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"fixed": fixed, "detector_name": detector_name}
    environment.globals |= {"interval": interval}
    template = resources.files(bids_uad).joinpath("data/reports/group.html.j2")
    page = environment.from_string(template.read_text(encoding="utf-8")).render(
        version=bids_uad.__version__,
        colours=colours,
        figures=[*further, *group_figures(evaluation)],
        overview=_overview(evaluation, participants),
        benchmark=_records(overall),
        cohorts=_records(cohorts.sort_values(["cohort", "modality", "detector"])),
        best=_best(overall),
        comparison=_records(analyses.comparison),
        n_different=int((analyses.comparison["p_holm"] < ALPHA).sum()),
        strata=_records(analyses.strata),
        disparities=_records(analyses.disparities),
        n_gaps=int((analyses.disparities["gap_ci_low"] > 0).sum()),
        n_biased=int((analyses.bias.coefficients["p_fdr"] < ALPHA).sum()),
        bias=_bias(analyses.bias.coefficients),
        remarks=analyses.bias.remarks,
        tables=list(analyses.tables),
        outcomes=OUTCOMES,
        scans=_records(evaluation.subjects.head(MAX_SCAN_ROWS)),
        n_scan_rows=len(evaluation.subjects),
        roles={LESION: "lesion", HEALTHY: "healthy", MISSING_MASK: "no mask"},
        absences=_by_reason(evaluation.absences),
        unreadable=evaluation.unreadable,
        warnings=evaluation.warnings,
        definitions=[
            (name, column["Description"]) for name, column in BENCHMARK_COLUMNS.items() if "_ci_" not in name
        ],
        methods=methods_html(text.read_text(encoding="utf-8"), bibliography()) if text.is_file() else "",
    )
    return write_text(root / "group.html", page + "\n")


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return table.to_dict(orient="records")


def _bias(coefficients: pd.DataFrame) -> list[dict[str, Any]]:
    """Write coefficients as factors on the odds where they are log odds."""
    shown = coefficients.copy()
    ratio = shown["odds_ratio"].notna()
    for name, source in {"shown": "estimate", "shown_ci_low": "ci_low", "shown_ci_high": "ci_high"}.items():
        values = shown[source].astype(float)
        shown[name] = np.where(ratio, np.exp(values), values)
    return _records(shown)


def _overview(evaluation: Evaluation, participants: Participants) -> dict[str, Any]:
    scans = evaluation.subjects
    images = scans.drop_duplicates("source_image")
    return {
        "participants": scans["participant_id"].nunique(),
        "known": len({*participants.labels, *scans["participant_id"]}),
        "has_participants": participants.path is not None,
        "images": len(images),
        "lesion": int((images["role"] == LESION).sum()),
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


def _by_reason(absences: list[Absence]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str, str], list[Absence]] = defaultdict(list)
    for absence in absences:
        detector = detector_name(absence.detector) if absence.detector else ""
        groups[absence.reason, absence.modality or "", detector].append(absence)
    return [
        {"reason": reason, "what": f"{detector} {modality}".strip(), "absences": members}
        for (reason, modality, detector), members in sorted(groups.items())
    ]
