"""The figures of comparison and bias."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from bids_uad.evaluation.analyses import Analyses
from bids_uad.evaluation.bias import Effect
from bids_uad.evaluation.comparison import mean_ranks, participant_scores
from bids_uad.evaluation.lesions import CONTRAST, CONTRASTS, VOLUME, VOLUMES
from bids_uad.evaluation.thresholds import VALIDATION
from bids_uad.reports.group_figures import MAX_DOTS, WIDTH, Figure, legend, of_modality, panel_grid
from bids_uad.reports.group_svg import INK, MUTED, Linear, Svg, number, round_up
from bids_uad.reports.group_text import detector_name

ALPHA = 0.05
SHADE = "#56B4E9"
MIN_DETECTORS = 3
"""Two detectors are compared by one number; ranks say nothing more."""


def analysis_figures(subjects: pd.DataFrame, analyses: Analyses, colours: dict[str, str]) -> list[Figure]:
    """Draw every figure that the cohort has data for.

    Parameters
    ----------
    subjects : pandas.DataFrame
        One row per image and detector.
    analyses : Analyses
    colours : dict of str to str
        Colour of each detector.

    Returns
    -------
    list of Figure
    """
    figures = [rank_plot(subjects, analyses.comparison, colours)]
    for modality in sorted(subjects["modality"].unique()):
        thresholds = analyses.thresholds[analyses.thresholds["modality"] == modality]
        effects = [effect for effect in analyses.bias.effects if effect.modality == modality]
        figures += [
            of_modality(figure, modality)
            for figure in (threshold_matrix(thresholds), age_effects(effects, colours))
        ]
        lesions = analyses.lesions[analyses.lesions["modality"] == modality]
        figures.append(of_modality(lesion_sizes(lesions, colours), modality))
    return [figure for figure in figures if figure is not None]


def rank_plot(subjects: pd.DataFrame, comparison: pd.DataFrame, colours: dict[str, str]) -> Figure | None:
    """Draw mean ranks by Dice, bars joining detectors that do not differ; None with fewer than three."""
    ranks = {
        modality: mean_ranks(participant_scores(subjects, modality, "dice"), "dice")
        for modality in sorted(subjects["modality"].unique())
    }
    ranks = {modality: found for modality, found in ranks.items() if len(found) >= MIN_DETECTORS}
    if not ranks:
        return None
    row, head, gap = 24, 62, 30
    heights = {modality: head + row * len(found) + gap for modality, found in ranks.items()}
    svg = Svg(WIDTH, sum(heights.values()), "Mean rank of each detector by Dice")
    top = 0.0
    for modality, found in ranks.items():
        x = Linear(1, len(found), 250, WIDTH - 330)
        svg.text(24, top + 26, modality, size=14, weight=600)
        for value in range(1, len(found) + 1):
            svg.line(x(value), top + head - 12, x(value), top + head + row * len(found) - 8)
            svg.text(x(value), top + head - 18, str(value), size=11, colour=MUTED, anchor="middle")
        for place, (detector, rank) in enumerate(found.items()):
            y = top + head + row * place + 4
            svg.text(230, y + 4, detector_name(detector), size=13, anchor="end")
            svg.dot(x(rank), y, 6, colours[detector], tip=f"{detector_name(detector)}: mean rank {rank:.2f}")
            svg.text(x(rank) + 12, y + 4, f"{rank:.2f}", size=11.5, colour=MUTED)
        pairs = comparison[(comparison["modality"] == modality) & (comparison["outcome"] == "dice")]
        left = WIDTH - 270
        for k, (first, last) in enumerate(cliques(list(found.index), pairs)):
            bar = left + 14 * k
            start, stop = (top + head + row * place + 4 for place in (first, last))
            svg.line(bar, start - 7, bar, stop + 7, INK, 4)
        top += heights[modality]
    return Figure(
        "ranks",
        "Mean ranks by Dice",
        "Detectors are ranked within each participant with a lesion; rank 1 is best. A black bar on the "
        "right joins detectors of which no two differ (Wilcoxon signed-rank test, Holm-corrected, 0.05).",
        svg.render(),
    )


def cliques(ranked: Sequence[str], pairs: pd.DataFrame) -> list[tuple[int, int]]:
    """Find the runs of neighbours in rank of which no two differ.

    Parameters
    ----------
    ranked : sequence of str
        Detectors, best first.
    pairs : pandas.DataFrame
        `detector_a`, `detector_b` and `p_holm`; a pair that is missing or NaN does not differ.

    Returns
    -------
    list of (int, int)
        First and last place of each longest run, of at least two.
    """
    differ = {
        frozenset((pair.detector_a, pair.detector_b)) for pair in pairs.itertuples() if pair.p_holm < ALPHA
    }
    runs: list[tuple[int, int]] = []
    for first in range(len(ranked)):
        last = first
        while last + 1 < len(ranked) and all(
            frozenset((ranked[last + 1], other)) not in differ for other in ranked[first : last + 1]
        ):
            last += 1
        if last > first and (not runs or last > runs[-1][1]):
            runs.append((first, last))
    return runs


def threshold_matrix(thresholds: pd.DataFrame) -> Figure | None:
    """Draw what the thresholds of one cohort are worth on the others; None with fewer than two cohorts."""
    if thresholds.empty:
        return None
    matrices = {
        key: rows.pivot(index="fixed_on", columns="tested_on", values="dice_mean")
        for key, rows in thresholds.groupby(["detector", "modality"])
    }
    most = max(float(matrix.max(axis=None)) for matrix in matrices.values())
    rows_of = {key: [VALIDATION, *matrix.columns] for key, matrix in matrices.items()}
    height = 64 + 24 * max(len(rows) for rows in rows_of.values()) + 20

    def draw(svg: Svg, key: tuple[str, str], left: float, right: float, top: float) -> None:
        matrix, rows = matrices[key], rows_of[key]
        start = left + 96
        width = (right - start) / len(matrix.columns)
        for column, cohort in enumerate(matrix.columns):
            middle = start + width * (column + 0.5)
            svg.text(middle, top + 50, _short(cohort), size=10.5, colour=MUTED, anchor="middle")
            for row, source in enumerate(rows):
                value = matrix.loc[source, cohort]
                y = top + 58 + 24 * row
                share = value / most if most > 0 else 0.0
                svg.rect(start + width * column + 1, y, width - 2, 22, SHADE, 0.08 + 0.72 * share, 2)
                weight = 700 if source == cohort else 400
                svg.text(middle, y + 15, f"{value:.3f}", size=11.5, anchor="middle", weight=weight)
        for row, source in enumerate(rows):
            svg.text(start - 8, top + 73 + 24 * row, _short(source), size=10.5, colour=MUTED, anchor="end")

    svg = panel_grid(sorted(matrices, key=lambda key: key[::-1]), height, "Thresholds between cohorts", draw)
    return Figure(
        "thresholds",
        "Thresholds between cohorts",
        "Mean Dice of a cohort (column) at a threshold (row): the model's own, fixed on validation data, or "
        "the best of one cohort here. Bold: a cohort's own best, which looks at the answers. Columns that "
        "vary little from top to bottom stand for thresholds that generalise.",
        svg.render(),
    )


def _short(cohort: str) -> str:
    """Abbreviate a name of several words, for which a cell has no room."""
    words = cohort.split()
    return cohort if len(cohort) <= 14 else "".join(word[0].upper() for word in words)


def lesion_sizes(lesions: pd.DataFrame, colours: dict[str, str]) -> Figure | None:
    """Draw the share of lesions found by volume and by contrast, for one modality; None without lesions."""
    panels = {VOLUME: list(VOLUMES), CONTRAST: list(CONTRASTS)}
    shown = {factor: lesions[lesions["factor"] == factor] for factor in panels}
    if all(table.empty for table in shown.values()):
        return None
    detectors = sorted(lesions["detector"].unique())
    height, bottom = 380.0, 296.0
    svg = Svg(WIDTH, height, "Share of lesions found, by volume and contrast")
    for place, (factor, levels) in enumerate(panels.items()):
        table = shown[factor]
        counts = table.groupby("level", observed=True)["n_lesions"].max()
        levels = [level for level in levels if level in counts.index]
        left, right = place * WIDTH / 2 + 62, (place + 1) * WIDTH / 2 - 22
        y = Linear(0, 100, bottom, 40)
        svg.text(left, 22, f"By {factor}", size=14, weight=600)
        for tick in y.ticks(4):
            svg.line(left, y(tick), right, y(tick))
            svg.text(left - 7, y(tick) + 4, number(tick), size=11, colour=MUTED, anchor="end")
        svg.text(
            left - 44,
            (bottom + 40) / 2,
            "lesions found, %",
            size=12,
            colour=MUTED,
            anchor="middle",
            rotate=-90,
        )
        width = (right - left) / max(len(levels), 1)
        for column, level in enumerate(levels):
            middle = left + width * (column + 0.5)
            svg.text(middle, bottom + 18, level, size=11, colour=MUTED, anchor="middle")
            svg.text(middle, bottom + 34, f"n = {counts[level]:,}", size=11, colour=MUTED, anchor="middle")
            rows = table[table["level"] == level].set_index("detector")
            for k, detector in enumerate(detectors):
                if detector not in rows.index:
                    continue
                row = rows.loc[detector]
                x = middle + 0.74 * width * ((k + 0.5) / len(detectors) - 0.5)
                share, low, high = (
                    100 * row[f"lesion_sensitivity{end}"] for end in ("", "_ci_low", "_ci_high")
                )
                if np.isfinite(low):
                    svg.line(x, y(low), x, y(high), colours[detector], 1.6)
                tip = f"{detector_name(detector)}: {share:.0f} % of {row['n_lesions']} lesions"
                svg.dot(x, y(share), 4, colours[detector], tip=tip)
    legend(svg, detectors, colours)
    return Figure(
        "lesion_size",
        "Lesions found by size and contrast",
        "Share of the 26-connected lesions that the prediction touches at the fixed threshold, with the 95 % "
        "interval over participants (none with fewer than three). n: lesions. Contrast: how far the lesion "
        "is from the brain around it, in standard deviations of that tissue, dark or bright.",
        svg.render(),
    )


def age_effects(effects: Sequence[Effect], colours: dict[str, str]) -> Figure | None:
    """Draw false positives against age with all else held; None where age was not modelled."""
    shown = {
        (effect.detector, effect.modality): effect
        for effect in effects
        if effect.outcome == "fpr" and effect.term == "age"
    }
    if not shown:
        return None

    def draw(svg: Svg, key: tuple[str, str], left: float, right: float, top: float) -> None:
        effect = shown[key]
        low, high = effect.values.min(), effect.values.max()
        limit = 100 * max(np.quantile(effect.partial, 0.98), effect.line[:, 3].max())
        x, y = Linear(low - 1, high + 1, left, right), Linear(0, round_up(limit), top + 216, top + 34)
        svg.axes(x, y, xlabel="age, years", ylabel="FPR, %", yticks=4)
        order = np.random.default_rng(0).permutation(len(effect.values))[:MAX_DOTS]
        for age, share in zip(effect.values[order], effect.partial[order], strict=True):
            if 100 * share <= y.high:
                svg.dot(x(age), y(100 * share), 2.4, colours[effect.detector], opacity=0.45)
        upper = [(x(age), y(100 * share)) for age, share in effect.line[:, [0, 3]]]
        lower = [(x(age), y(100 * share)) for age, share in effect.line[::-1][:, [0, 2]]]
        svg.path([*upper, *lower], "none", fill=INK, opacity=0.15)
        svg.path([(x(age), y(100 * share)) for age, share in effect.line[:, [0, 1]]], INK, 2)
        ends = effect.line[[0, -1], 1] * 100
        svg.text(
            right,
            top + 20,
            f"{number(ends[0], 2)} to {number(ends[1], 2)} %",
            size=12,
            colour=MUTED,
            anchor="end",
        )

    svg = panel_grid(sorted(shown, key=lambda key: key[::-1]), 272, "False positives and age", draw)
    return Figure(
        "bias_age",
        "False positives and age",
        "Healthy brains: share of voxels above the fixed threshold against age, as the model of bias has it "
        "when sex, brain volume and scanner are held at their means. Band: 95 % confidence. A dot is a "
        f"participant, {MAX_DOTS} drawn by lot where there are more; the highest fiftieth may lie beyond the "
        "top.",
        svg.render(),
    )
