"""Charts of the analyses in the group report: ranks, thresholds, lesions, age and experiments."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from bids_uad.evaluation.bias import Effect
from bids_uad.evaluation.bootstrap import MAX_SHARE_WIDTH, MIN_SUBJECTS
from bids_uad.evaluation.comparison import mean_ranks, participant_scores
from bids_uad.evaluation.experiments import REFERENCE
from bids_uad.evaluation.lesion_detection import CONTRAST, CONTRASTS, VOLUME, VOLUMES
from bids_uad.evaluation.threshold_transfer import VALIDATION
from bids_uad.methods.registry import detector_name
from bids_uad.reports.charts import (
    ALPHA,
    INK,
    MAX_DOTS,
    MUTED,
    WIDTH,
    Chart,
    ChartCanvas,
    Key,
    detector_handles,
    detector_panels,
    log_axis,
    round_up,
)
from bids_uad.reports.group_text import number

_SHADE = "#56B4E9"
MIN_RANKED_DETECTORS = 3
"""Minimum number of detectors of the rank plot; for two, the comparison of the pair suffices."""
EXPERIMENT_OUTCOMES = {"dice": "Dice", "auprc": "AUPRC", "fpr": "healthy FPR, %"}


def rank_plot(subjects: pd.DataFrame, comparison: pd.DataFrame, colours: dict[str, str]) -> Chart | None:
    """Draw mean ranks by Dice, with bars that connect equal detectors; None for fewer than three."""
    ranks = {
        modality: mean_ranks(participant_scores(subjects, modality, "dice"), "dice")
        for modality in sorted(subjects["modality"].unique())
    }
    ranks = {modality: found for modality, found in ranks.items() if len(found) >= MIN_RANKED_DETECTORS}
    if not ranks:
        return None
    row, head, gap = 24, 54, 38
    heights = {modality: head + row * len(found) + gap for modality, found in ranks.items()}
    canvas = ChartCanvas(sum(heights.values()), "Mean rank of each detector by Dice")
    top = 0.0
    for modality, found in ranks.items():
        canvas.text(24, top + 26, modality, fontsize=14, fontweight="bold")
        axes = canvas.rows(250, top + head, WIDTH - 580, row, len(found))
        axes.set(xlim=(1, len(found)), xticks=range(1, len(found) + 1))
        axes.xaxis.tick_top()
        heights_of_rows = row * (np.arange(len(found)) + 0.5)
        for y, (detector, rank) in zip(heights_of_rows, found.items(), strict=True):
            canvas.text(230, top + head + y + 4, detector_name(detector), fontsize=13, ha="right")
            tip = f"{detector_name(detector)}: mean rank {rank:.2f}"
            canvas.markers(axes, [rank], [y], colours[detector], radius=6, tips=[tip])
            axes.annotate(
                f"{rank:.2f}", (rank, y), (12, -4), textcoords="offset pixels", fontsize=11.5, color=MUTED
            )
        pairs = comparison[(comparison["modality"] == modality) & (comparison["outcome"] == "dice")]
        for k, (first, last) in enumerate(cliques(list(found.index), pairs)):
            x = WIDTH - 270 + 14 * k
            ends = top + head + heights_of_rows[[first, last]] + (-7, 7)
            canvas.line((x, x), tuple(ends), color=INK, linewidth=4)
        top += heights[modality]
    return Chart(
        "ranks",
        "Mean ranks by Dice",
        "Detectors are ranked within each participant with a lesion; rank 1 is best. A black bar on the "
        "right connects detectors without significant differences (Wilcoxon signed-rank test, "
        "Holm-corrected, 0.05).",
        canvas.svg(),
    )


def cliques(ranked: Sequence[str], pairs: pd.DataFrame) -> list[tuple[int, int]]:
    """Find the groups of detectors with neighbouring ranks and without significant differences.

    Parameters
    ----------
    ranked : sequence of str
        Detectors, best first.
    pairs : pandas.DataFrame
        Columns `detector_a`, `detector_b` and `p_holm`; missing pairs and NaN count as no difference.

    Returns
    -------
    list of (int, int)
        First and last position of each maximal group of at least two.
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


def threshold_matrix(thresholds: pd.DataFrame) -> Chart | None:
    """Draw the Dice of each cohort at the thresholds of the others; None with fewer than two cohorts."""
    if thresholds.empty:
        return None
    matrices = {
        key: rows.pivot(index="fixed_on", columns="tested_on", values="dice_mean")
        for key, rows in thresholds.groupby(["detector", "modality"])
    }
    matrices = {key: matrix.loc[[VALIDATION, *matrix.columns]] for key, matrix in matrices.items()}
    most = max(float(matrix.max(axis=None)) for matrix in matrices.values())
    n_rows = max(len(matrix) for matrix in matrices.values())

    def draw(canvas: ChartCanvas, axes: Axes, key: Key, corner: tuple[float, float]) -> None:
        matrix = matrices[key]
        values = matrix.to_numpy()
        opacity = 0.08 + 0.72 * (values / most if most > 0 else np.zeros_like(values))
        columns, rows = np.meshgrid(np.arange(values.shape[1]), np.arange(values.shape[0]))
        axes.bar(
            columns.ravel(),
            0.92,
            0.98,
            rows.ravel() - 0.46,
            color=[(_SHADE, share) for share in opacity.ravel()],
        )
        for (row, column), value in np.ndenumerate(values):
            own = matrix.index[row] == matrix.columns[column]
            weight = "bold" if own else "normal"
            axes.text(column, row, f"{value:.3f}", fontsize=11.5, ha="center", va="center", fontweight=weight)
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
        axes.set(xlim=(-0.5, values.shape[1] - 0.5), ylim=(n_rows - 0.5, -0.5))
        axes.set_xticks(range(values.shape[1]), [_abbreviation(name) for name in matrix.columns])
        axes.set_yticks(range(values.shape[0]), [_abbreviation(name) for name in matrix.index])
        axes.xaxis.tick_top()
        axes.tick_params(length=0, labelsize=10.5)

    canvas = detector_panels(matrices, 58, 24 * n_rows, 26, "Thresholds between cohorts", draw, left=62 + 96)
    return Chart(
        "thresholds",
        "Thresholds between cohorts",
        "Mean Dice of a cohort (column) at a threshold (row): fixed on validation data, or the best of one "
        "cohort here. Bold: threshold and cohort are the same, an optimistic upper bound. Little variation "
        "within a column means that the threshold generalises.",
        canvas.svg(),
    )


def _abbreviation(cohort: str) -> str:
    """Abbreviate a long name of several words to its initials."""
    words = cohort.split()
    return cohort if len(cohort) <= 14 else "".join(word[0].upper() for word in words)


def lesion_sizes(lesions: pd.DataFrame, colours: dict[str, str]) -> Chart | None:
    """Draw the percentage of lesions found by volume and by contrast, of one modality; None without any."""
    panels = {VOLUME: list(VOLUMES), CONTRAST: list(CONTRASTS)}
    if not lesions["factor"].isin(panels).any():
        return None
    detectors = sorted(lesions["detector"].unique())
    canvas = ChartCanvas(380, "Percentage of lesions found, by volume and contrast")
    for position, (factor, levels) in enumerate(panels.items()):
        table = lesions[lesions["factor"] == factor]
        counts = table.groupby("level", observed=True)["n_lesions"].max()
        levels = [level for level in levels if level in counts.index]
        axes = canvas.panel(
            position * WIDTH / 2 + 62,
            40,
            WIDTH / 2 - 84,
            256,
            title=f"By {factor}",
            ylabel="lesions found, %",
        )
        axes.set(xlim=(-0.5, max(len(levels), 1) - 0.5), ylim=(0, 100))
        axes.set_xticks(range(len(levels)), [f"{level}\nn = {counts[level]:,}" for level in levels])
        axes.tick_params(axis="x", length=0, pad=8)
        for k, detector in enumerate(detectors):
            rows = table[table["detector"] == detector].set_index("level").reindex(levels)
            shown = rows["lesion_sensitivity"].notna().to_numpy()
            if not shown.any():
                continue
            x = (np.arange(len(levels)) + 0.74 * ((k + 0.5) / len(detectors) - 0.5))[shown]
            columns = ["lesion_sensitivity", "lesion_sensitivity_ci_low", "lesion_sensitivity_ci_high"]
            found, low, high = 100 * rows.loc[shown, columns].to_numpy(float).T
            axes.vlines(x, low, high, colors=colours[detector], linewidth=1.6)
            tips = [
                f"{detector_name(detector)}: {share:.0f} % of {n:.0f} lesions of {people:.0f} participants"
                + (", no interval" if np.isnan(end) else "")
                for share, n, people, end in zip(
                    found, rows.loc[shown, "n_lesions"], rows.loc[shown, "n_participants"], low, strict=True
                )
            ]
            canvas.markers(axes, x, found, colours[detector], radius=4, tips=tips)
    canvas.legend(detector_handles(lesions["detector"], colours))
    return Chart(
        "lesion_size",
        "Lesions found by size and contrast",
        "Percentage of the 26-connected lesions that the prediction touches at the fixed threshold, with the "
        f"95 % interval over participants (none with fewer than {MIN_SUBJECTS} participants, or if wider "
        f"than {100 * MAX_SHARE_WIDTH:g} %). n: lesions. Contrast: absolute difference between the lesion "
        "and the surrounding brain, in standard deviations of the latter.",
        canvas.svg(),
    )


def age_effects(effects: Sequence[Effect], colours: dict[str, str]) -> Chart | None:
    """Draw the false-positive rate against age, adjusted for the other covariates; None without a model."""
    shown = {
        (effect.detector, effect.modality): effect
        for effect in effects
        if effect.outcome == "fpr" and effect.term == "age"
    }
    if not shown:
        return None

    def draw(canvas: ChartCanvas, axes: Axes, key: Key, corner: tuple[float, float]) -> None:
        effect = shown[key]
        age, expected, low, high = effect.line.T * np.array([[1], [100], [100], [100]])
        limit = round_up(max(100 * np.quantile(effect.partial, 0.98), high.max()))
        axes.set(xlim=(effect.values.min() - 1, effect.values.max() + 1), ylim=(0, limit))
        order = np.random.default_rng(0).permutation(len(effect.values))[:MAX_DOTS]
        x, y = effect.values[order], 100 * effect.partial[order]
        inside = y <= limit
        canvas.markers(axes, x[inside], y[inside], colours[effect.detector], radius=2.4, opacity=0.45)
        axes.fill_between(age, low, high, color=INK, alpha=0.15, linewidth=0, zorder=4)
        axes.plot(age, expected, color=INK, linewidth=2, zorder=5)
        words = f"{number(expected[0], 2)} to {number(expected[-1], 2)} %"
        canvas.text(corner[0] + WIDTH / 2 - 84, corner[1] + 20, words, fontsize=12, color=MUTED, ha="right")

    labels = {"xlabel": "age, years", "ylabel": "FPR, %"}
    canvas = detector_panels(shown, 34, 182, 56, "False positives and age", draw, **labels)
    return Chart(
        "bias_age",
        "False positives and age",
        "Percentage of voxels of healthy brains above the fixed threshold against age, predicted by the bias "
        "model at the means of sex, brain volume and scanner. Band: 95 % confidence interval. One dot per "
        f"participant and scanner (a random sample of {MAX_DOTS} if there are more); the highest 2 % may be "
        "outside the axis.",
        canvas.svg(),
    )


def experiment_charts(experiments: pd.DataFrame, colours: dict[str, str]) -> list[Chart | None]:
    """Draw the experiments of one modality.

    Parameters
    ----------
    experiments : pandas.DataFrame
        Columns of :data:`bids_uad.evaluation.experiments.COLUMNS`.
    colours : dict of str to str
        Colour of each detector.

    Returns
    -------
    list of Chart or None
        Variants that differ from the reference only in the number of training subjects are drawn as a curve,
        the others next to it.
    """
    nested = _differ_only_in_number(experiments)
    curves = experiments[nested]
    others = experiments[~nested | (experiments["variant"] == REFERENCE)]
    varied = curves.groupby("detector")["n_training_subjects"].transform("nunique") > 1
    compared = others.groupby("detector")["variant"].transform("nunique") > 1
    return [scaling(curves[varied], colours), ablation(others[compared], colours)]


def _differ_only_in_number(rows: pd.DataFrame) -> pd.Series:
    """Mark the reference and the variants with its hyper-parameters and steps; bool, index of `rows`."""
    settings = rows[["detector", "outcome", "changes", "n_steps"]].astype(object)
    keys = settings.where(settings.notna(), "").astype(str).agg("|".join, axis=1)
    own = set(keys[rows["variant"] == REFERENCE])
    return keys.isin(own) & rows["n_training_subjects"].notna()


def _outcome_panels(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame, float]]:
    """Split experiments by outcome: name, rows in the unit of the axis, limit of the axis."""
    parts = []
    for outcome in EXPERIMENT_OUTCOMES:
        part = rows[rows["outcome"] == outcome].copy()
        if len(part):
            numbers = ["mean", "mean_ci_low", "mean_ci_high"]
            part[numbers] = part[numbers].astype(float) * (100 if outcome == "fpr" else 1)
            most = np.nanmax(part[["mean", "mean_ci_high"]].to_numpy(float))
            parts.append((outcome, part, round_up(most) if most > 0 else 1.0))
    return parts


def scaling(rows: pd.DataFrame, colours: dict[str, str]) -> Chart | None:
    """Draw each outcome against the number of training subjects; None without any."""
    if rows.empty:
        return None
    sizes = rows["n_training_subjects"].astype(float)
    parts = _outcome_panels(rows)
    width = min(WIDTH / len(parts), 480)
    canvas = ChartCanvas(330, "Outcomes against training subjects")
    for position, (outcome, part, most) in enumerate(parts):
        axes = canvas.panel(
            position * width + 62,
            30,
            width - 84,
            220,
            xlabel="training subjects (log scale)",
            ylabel=EXPERIMENT_OUTCOMES[outcome],
        )
        log_axis(axes, "x", sizes.min() / 1.25, sizes.max() * 1.25, ticks=4)
        axes.set_ylim(0, most)
        for detector, points in part.groupby("detector", sort=True):
            points = points.sort_values("n_training_subjects", kind="stable")
            x, y = points["n_training_subjects"].to_numpy(float), points["mean"].to_numpy()
            axes.plot(x, y, color=colours[detector], linewidth=2)
            axes.vlines(
                x, points["mean_ci_low"], points["mean_ci_high"], colors=colours[detector], linewidth=1.3
            )
            tips = [
                f"{detector_name(detector)}, {row.variant}: {number(row.mean)} "
                f"({row.n_training_subjects:.0f} subjects)"
                for row in points.itertuples()
            ]
            canvas.markers(axes, x, y, colours[detector], radius=4.4, tips=tips)
    canvas.legend(detector_handles(rows["detector"], colours))
    return Chart(
        "scaling",
        "Number of training subjects",
        "Models with the same hyper-parameters and steps, trained on different numbers of subjects, each "
        "at its own fixed threshold. Bars: 95 % interval over participants.",
        canvas.svg(),
    )


def ablation(rows: pd.DataFrame, colours: dict[str, str]) -> Chart | None:
    """Draw the variants of each detector below the reference; None without any."""
    if rows.empty:
        return None
    names = rows.drop_duplicates(["detector", "variant"])[["detector", "variant"]]
    names = names.sort_values("detector", kind="stable")
    order = {tuple(name): position for position, name in enumerate(names.itertuples(index=False))}
    row_height, head, margin = 30, 44, 200
    parts = _outcome_panels(rows)
    width = min((WIDTH - margin) / len(parts), 480)
    canvas = ChartCanvas(head + row_height * len(order) + 26, "Variants of each detector")
    for position, (outcome, part, most) in enumerate(parts):
        axes = canvas.rows(margin + position * width + 14, head, width - 36, row_height, len(order))
        axes.set_xlim(0, most)
        axes.set_title(EXPERIMENT_OUTCOMES[outcome], loc="center", fontsize=12.5, fontweight="bold")
        for row in part.itertuples():
            y = row_height * (order[row.detector, row.variant] + 0.5)
            axes.hlines([y], row.mean_ci_low, row.mean_ci_high, colors=INK, linewidth=1.5)
            tip = f"{detector_name(row.detector)}, {row.variant}: {number(row.mean)}"
            hollow = row.variant != REFERENCE
            canvas.markers(axes, [row.mean], [y], colours[row.detector], radius=5, hollow=hollow, tips=[tip])
    for (detector, variant), position in order.items():
        y = head + row_height * (position + 0.5) + 4
        weight = "bold" if variant == REFERENCE else "normal"
        words = f"{detector_name(detector)}, {variant}"
        canvas.text(margin - 14, y, words, fontsize=12.5, fontweight=weight, ha="right")
    return Chart(
        "ablation",
        "Other variants",
        "Models that differ from the reference (filled) in more than the number of training subjects, each "
        "at its own fixed threshold. Bars: 95 % interval over participants.",
        canvas.svg(),
    )
