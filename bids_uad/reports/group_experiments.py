"""The figures of experiments: more training subjects, and parts of a model switched off."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from bids_uad.evaluation.experiments import REFERENCE
from bids_uad.reports.group_figures import WIDTH, Figure, legend, of_modality
from bids_uad.reports.group_svg import INK, MUTED, Linear, Log, Svg, number, round_up
from bids_uad.reports.group_text import detector_name

PANELS = {"dice": "Dice", "auprc": "AUPRC", "fpr": "healthy FPR, %"}
LEFT = 200


def experiment_figures(experiments: pd.DataFrame, colours: dict[str, str]) -> list[Figure]:
    """Draw scaling and ablation, once for each modality.

    Parameters
    ----------
    experiments : pandas.DataFrame
        Columns of :data:`bids_uad.evaluation.experiments.COLUMNS`.
    colours : dict of str to str
        Colour of each detector.

    Returns
    -------
    list of Figure
        Variants that differ from the reference in the number of training subjects alone are drawn as a curve,
        all others side by side with it.
    """
    figures = []
    for modality, rows in experiments.groupby("modality", sort=True):
        nested = _differ_in_number_alone(rows)
        curves, others = rows[nested], rows[~nested | (rows["variant"] == REFERENCE)]
        varied = curves.groupby("detector")["n_training_subjects"].transform("nunique") > 1
        compared = others.groupby("detector")["variant"].transform("nunique") > 1
        figures += [
            of_modality(scaling(curves[varied], colours), modality),
            of_modality(ablation(others[compared], colours), modality),
        ]
    return [figure for figure in figures if figure is not None]


def _differ_in_number_alone(rows: pd.DataFrame) -> pd.Series:
    """Mark the reference and the variants with its hyper-parameters and steps; bool, index of `rows`."""
    told = rows[["detector", "outcome", "changes", "n_steps"]].astype(object)
    keys = told.where(told.notna(), "").astype(str).agg("|".join, axis=1)
    own = set(keys[rows["variant"] == REFERENCE])
    return keys.isin(own) & rows["n_training_subjects"].notna()


def scaling(rows: pd.DataFrame, colours: dict[str, str]) -> Figure | None:
    """Draw each number against the number of training subjects; None without any."""
    if rows.empty:
        return None
    sizes = rows["n_training_subjects"].astype(float)
    low, high = sizes.min() / 1.25, sizes.max() * 1.25

    def draw(svg: Svg, part: pd.DataFrame, left: float, right: float, outcome: str) -> None:
        scale = 100 if outcome == "fpr" else 1
        top = scale * np.nanmax(part[["mean", "mean_ci_high"]].to_numpy(float))
        x, y = Log(low, high, left, right), Linear(0, round_up(top) if top > 0 else 1.0, 250, 44)
        svg.axes(x, y, xlabel="training subjects (log scale)", ylabel=PANELS[outcome], xticks=4)
        for detector, points in part.groupby("detector", sort=True):
            points = points.sort_values("n_training_subjects", kind="stable")
            places = [(x(row.n_training_subjects), y(scale * row.mean)) for row in points.itertuples()]
            svg.path(places, colours[detector], 2)
            for (place, height), row in zip(places, points.itertuples(), strict=True):
                if np.isfinite(row.mean_ci_low):
                    ends = (y(scale * row.mean_ci_low), y(scale * row.mean_ci_high))
                    svg.line(place, ends[0], place, ends[1], colours[detector], 1.3)
                tip = (
                    f"{detector_name(detector)}, {row.variant}: {number(scale * row.mean)} "
                    f"({row.n_training_subjects:.0f} subjects)"
                )
                svg.dot(place, height, 4.4, colours[detector], tip=tip)

    svg = _panels(rows, draw, 316, "Numbers against training subjects")
    legend(svg, sorted(rows["detector"].unique()), colours)
    return Figure(
        "scaling",
        "More training subjects",
        "Models with the same hyper-parameters and steps that have learnt from more or fewer subjects, each "
        "at its own fixed threshold. Bars: 95 % interval over participants.",
        svg.render(),
    )


def ablation(rows: pd.DataFrame, colours: dict[str, str]) -> Figure | None:
    """Draw the variants of each detector below the reference; None without any."""
    if rows.empty:
        return None
    names = rows.drop_duplicates(["detector", "variant"])[["detector", "variant"]].sort_values(
        "detector", kind="stable"
    )
    order = {tuple(name): place for place, name in enumerate(names.itertuples(index=False))}
    step, head = 30, 44
    bottom = head + step * len(order)

    def draw(svg: Svg, part: pd.DataFrame, left: float, right: float, outcome: str) -> None:
        scale = 100 if outcome == "fpr" else 1
        top = scale * np.nanmax(part[["mean", "mean_ci_high"]].to_numpy(float))
        x = Linear(0, round_up(top) if top > 0 else 1.0, left, right)
        svg.text((left + right) / 2, head - 20, PANELS[outcome], size=12.5, anchor="middle", weight=600)
        for value in x.ticks(4):
            svg.line(x(value), head - 8, x(value), bottom)
            svg.text(x(value), bottom + 16, number(value), size=11, colour=MUTED, anchor="middle")
        for row in part.itertuples():
            y = head + step * (order[row.detector, row.variant] + 0.5)
            if np.isfinite(row.mean_ci_low):
                svg.line(x(scale * row.mean_ci_low), y, x(scale * row.mean_ci_high), y, INK, 1.5)
            tip = f"{detector_name(row.detector)}, {row.variant}: {number(scale * row.mean)}"
            hollow = row.variant != REFERENCE
            svg.dot(x(scale * row.mean), y, 5, colours[row.detector], hollow=hollow, tip=tip)

    svg = _panels(rows, draw, bottom + 26, "Variants of each detector", LEFT)
    for (detector, variant), place in order.items():
        y = head + step * (place + 0.5) + 4
        words = f"{detector_name(detector)}, {variant}"
        svg.text(LEFT - 14, y, words, size=12.5, anchor="end", weight=600 if variant == REFERENCE else 400)
    return Figure(
        "ablation",
        "Other variants",
        "Models that differ from the reference (filled) in more than the number of training subjects, each "
        "at its own fixed threshold. Bars: 95 % interval over participants.",
        svg.render(),
    )


def _panels(
    rows: pd.DataFrame,
    draw: Callable[[Svg, pd.DataFrame, float, float, str], None],
    height: float,
    title: str,
    margin: float = 0,
) -> Svg:
    """Lay out one panel for each number that there is, side by side."""
    there = [outcome for outcome in PANELS if (rows["outcome"] == outcome).any()]
    svg = Svg(WIDTH, height, title)
    width = min((WIDTH - margin) / len(there), 480)
    for place, outcome in enumerate(there):
        left = margin + place * width + (14 if margin else 62)
        draw(svg, rows[rows["outcome"] == outcome], left, margin + (place + 1) * width - 22, outcome)
    return svg
