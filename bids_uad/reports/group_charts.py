"""Charts of the group report: scores per scan and curves; and the list of all charts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from bids_uad.evaluation.analyses import Analyses
from bids_uad.evaluation.benchmark import ALL, Evaluation
from bids_uad.evaluation.curves import Curves
from bids_uad.evaluation.metrics import precision_recall
from bids_uad.evaluation.subjects import HEALTHY, LESION
from bids_uad.methods.registry import DETECTORS, detector_name
from bids_uad.reports.analysis_charts import (
    age_effects,
    experiment_charts,
    lesion_sizes,
    rank_plot,
    threshold_matrix,
)
from bids_uad.reports.charts import (
    DASHES,
    INK,
    MAX_DOTS,
    MUTED,
    WIDTH,
    Chart,
    ChartCanvas,
    Key,
    detector_handles,
    detector_panels,
    dot_handle,
    log_axis,
    modality_panels,
    round_up,
)
from bids_uad.reports.group_text import number, with_interval

_HEALTHY, _LESION = "#0072B2", "#D55E00"
MAX_NAMED_PARTICIPANTS = 12
"""Maximum number of participants whose dots are labelled."""
_VOLUME_GROUPS = 20
_DISPLAY_BINS = 72
_LOG_SCORE_RANGE = 60
"""Ratio of the limits above which score axes are logarithmic."""


def detector_colours(evaluation: Evaluation) -> dict[str, str]:
    """Return the colour of each detector of a cohort, the same in all charts.

    Parameters
    ----------
    evaluation : Evaluation
        Its curves name the detectors, for example ``pls`` or ``pls+normative``.

    Returns
    -------
    dict of str to str
        ``#RRGGBB`` by detector. Registered detectors have a fixed colour; the others get those of the
        registered detectors that are absent, and repeat colours when none is left.
    """
    present = {detector for detector, _ in evaluation.curves}
    known = {name: entry.colour for name, entry in DETECTORS.items()}
    colours = {name: known[name] for name in known if name in present}
    free = [colour for name, colour in known.items() if name not in present] or list(known.values())
    return colours | dict(zip(sorted(present - set(known)), cycle(free), strict=False))


def group_charts(
    evaluation: Evaluation, analyses: Analyses, experiments: pd.DataFrame | None = None
) -> list[Chart]:
    """Draw every chart that the cohort has data for.

    Parameters
    ----------
    evaluation : Evaluation
        Benchmark table, scores per scan and curves.
    analyses : Analyses
        Comparison of detectors, thresholds, bias and lesions.
    experiments : pandas.DataFrame, optional
        Columns of :data:`bids_uad.evaluation.experiments.COLUMNS`.

    Returns
    -------
    list of Chart
        Those with a row or panel per detector come once per modality, so that ten detectors fit a page.
    """
    colours = detector_colours(evaluation)
    subjects = evaluation.subjects
    charts = [
        dice_by_volume(evaluation, colours),
        precision_recall_curves(evaluation, colours),
        rank_plot(subjects, analyses.comparison, colours),
    ]
    for modality in sorted(subjects["modality"].unique()):
        part = replace(
            evaluation,
            subjects=subjects[subjects["modality"] == modality],
            curves={key: curves for key, curves in evaluation.curves.items() if key[1] == modality},
        )
        own = [
            dice_strip(part, colours),
            fpr_strip(part, colours),
            dice_by_threshold(part, colours),
            score_histograms(part),
            threshold_matrix(analyses.thresholds[analyses.thresholds["modality"] == modality]),
            age_effects([effect for effect in analyses.bias.effects if effect.modality == modality], colours),
            lesion_sizes(analyses.lesions[analyses.lesions["modality"] == modality], colours),
        ]
        if experiments is not None:
            own += experiment_charts(experiments[experiments["modality"] == modality], colours)
        charts += [chart.of_modality(modality) for chart in own if chart is not None]
    return [chart for chart in charts if chart is not None]


def dice_strip(evaluation: Evaluation, colours: dict[str, str]) -> Chart | None:
    """Draw the Dice of every lesion scan at the fixed threshold; None without lesion scans."""
    canvas = _strip(evaluation, colours, LESION, "dice", ("dice_mean", "dice"), "Dice at the fixed threshold")
    if canvas is None:
        return None
    return Chart(
        "dice",
        "Dice at the fixed threshold",
        f"One dot per lesion scan; density for detectors with more than {MAX_DOTS} scans. Box: quartiles and "
        "median; whiskers: within 1.5 interquartile ranges; diamond and bar: mean and 95 % interval over "
        "participants.",
        canvas.svg(),
    )


def fpr_strip(evaluation: Evaluation, colours: dict[str, str]) -> Chart | None:
    """Draw the false-positive rate of every healthy scan; None without healthy scans."""
    canvas = _strip(
        evaluation,
        colours,
        HEALTHY,
        "fpr",
        ("fpr_healthy_mean", "fpr_healthy_mean"),
        "brain voxels above the threshold, %",
        percent=True,
    )
    if canvas is None:
        return None
    return Chart(
        "fpr_healthy",
        "False positives in healthy brains",
        "Percentage of brain voxels above the fixed threshold. One dot per healthy scan; density for "
        f"detectors with more than {MAX_DOTS} scans. Lower is better.",
        canvas.svg(),
    )


def _strip(
    evaluation: Evaluation,
    colours: dict[str, str],
    role: str,
    column: str,
    summary: tuple[str, str],
    label: str,
    *,
    percent: bool = False,
) -> ChartCanvas | None:
    """Draw one row per detector; `summary` names the columns of the mean and of its interval."""
    scans = evaluation.subjects
    scans = scans[(scans["role"] == role) & scans[column].notna()]
    if scans.empty:
        return None
    scale, digits, unit = (100, 2, " %") if percent else (1, 3, "")
    groups = list(scans.groupby(["modality", "detector"], sort=True))
    named = scans["participant_id"].nunique() <= MAX_NAMED_PARTICIPANTS
    row_height = 84 if named else 62
    top, left, right = 30, 150, WIDTH - 215
    highest = scans[column].max() * scale
    limit = round_up(highest * 1.02) if highest > 0 else 1.0
    canvas = ChartCanvas(top + row_height * len(groups) + 48, f"{label}, per detector")
    axes = canvas.rows(left, top, right - left, row_height, len(groups))
    axes.set(xlim=(0, limit if percent else min(limit, 1.0)), xlabel=label)
    canvas.text(right + 16, top - 12, "mean [95 % interval]", fontsize=11, color=MUTED)
    overall = evaluation.benchmark[evaluation.benchmark["cohort"] == ALL]
    rows = overall.set_index(["modality", "detector"]).to_dict(orient="index")
    mean, interval = summary
    for index, ((modality, detector), group) in enumerate(groups):
        y = row_height * (index + (0.54 if named else 0.44))
        colour, values, row = (
            colours[detector],
            group[column].to_numpy(float) * scale,
            rows[modality, detector],
        )
        note_of_mean = _plural(len(group), "scan")
        if np.isnan(row[f"{interval}_ci_low"]):
            note_of_mean += f", n = {group['participant_id'].nunique()}: no interval"
        if index:
            border = top + row_height * index
            canvas.line((20, WIDTH - 20), (border, border), color="#e3e8ed", linewidth=1)
        for x, words, note in (
            (left - 16, detector_name(detector), modality),
            (right + 16, with_interval(row, mean, interval, scale, digits), note_of_mean),
        ):
            side = "right" if x < left else "left"
            canvas.text(x, top + y - 1, words, fontsize=13.5, fontweight="bold", ha=side)
            canvas.text(x, top + y + 15, note, fontsize=11.5, color=MUTED, ha=side)
        if len(group) > MAX_DOTS:
            _violin(axes, values, y, colour)
        if len(values) >= 4:  # three scans are shown by their dots alone
            _box(axes, values, y, colour)
        if len(group) <= MAX_DOTS:
            _scan_dots(canvas, axes, group, values, y, colour, unit, named=named)
        low, high = row[f"{interval}_ci_low"] * scale, row[f"{interval}_ci_high"] * scale
        if np.isfinite(low):
            axes.plot([low, high], [y + 24, y + 24], color=INK, linewidth=1.6)
        tip = f"mean {with_interval(row, mean, interval, scale, digits)}{unit}"
        canvas.markers(axes, [row[mean] * scale], [y + 24], INK, radius=3.6, marker="D", tips=[tip])
    return canvas


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _box(axes: Axes, values: np.ndarray, y: float, colour: str) -> None:
    """Draw quartiles, median and whiskers of one row."""
    line = {"color": colour, "linewidth": 1.4}
    axes.boxplot(
        values,
        positions=[y],
        widths=26,
        orientation="horizontal",
        manage_ticks=False,
        showfliers=False,
        showcaps=False,
        patch_artist=True,
        boxprops={"facecolor": colour, "alpha": 0.16, "linewidth": 0},
        whiskerprops=line,
        medianprops=line | {"linewidth": 2.6},
    )


def _violin(axes: Axes, values: np.ndarray, y: float, colour: str) -> None:
    """Draw the density of the scans of one row."""
    drawn = axes.violinplot(
        [values], positions=[y], widths=40, orientation="horizontal", showextrema=False, points=200
    )
    for body in drawn["bodies"]:
        body.set(facecolor=colour, alpha=0.35)


def _scan_dots(
    canvas: ChartCanvas,
    axes: Axes,
    group: pd.DataFrame,
    values: np.ndarray,
    y: float,
    colour: str,
    unit: str,
    *,
    named: bool,
) -> None:
    """Draw the scans of one row, with vertical offsets against overlap."""
    radius, opacity = (4.2, 0.95) if named else (2.6, 0.6)
    low, high = axes.get_xlim()
    pixels = (values - low) / (high - low) * axes.get_position().width * WIDTH
    names = group["participant_id"].str.cat(group["session_id"].fillna(""), sep=" ").str.strip().tolist()
    tips = [f"{name}: {number(value)}{unit}" for name, value in zip(names, values, strict=True)]
    links = group["report"].where(group["report"].notna(), "").tolist()
    heights = y + np.array(_swarm(pixels, radius))
    canvas.markers(axes, values, heights, colour, radius=radius, opacity=opacity, tips=tips, links=links)
    if not named:
        return
    label_rows = {-19: -np.inf, -31: -np.inf}  # height of a row of labels: where its last label ends
    for index in np.argsort(values, kind="stable"):
        label = names[index].removeprefix("sub-")
        half = 3.2 * len(label) + 3
        free = [row for row, end in label_rows.items() if end <= pixels[index] - half]
        if free:
            axes.text(values[index], y + free[0], label, fontsize=10.5, color=MUTED, ha="center")
            label_rows[free[0]] = pixels[index] + half


def _swarm(positions: Sequence[float], radius: float) -> list[float]:
    """Return vertical offsets, in pixels, that keep neighbouring dots apart as far as the row allows."""
    steps = [0, 1, -1, 2, -2, 3, -3, 4, -4]
    drawn: list[tuple[float, float]] = []
    offsets = [0.0] * len(positions)
    for index in np.argsort(positions, kind="stable"):
        position = positions[index]
        near = {offset for other, offset in drawn[-len(steps) :] if position - other < 1.7 * radius}
        free = [step for step in steps if step not in near]
        # A full column starts again in the middle, shifted through all levels.
        step = free[0] if free else steps[len(drawn) % len(steps)]
        drawn.append((position, step))
        offsets[index] = step * radius * (1.0 if radius < 4 else 0.9)
    return offsets


def dice_by_volume(evaluation: Evaluation, colours: dict[str, str]) -> Chart | None:
    """Draw Dice against lesion volume; None when no lesion has a volume."""
    scans = evaluation.subjects
    scans = scans[(scans["role"] == LESION) & (scans["lesion_volume_mm3"] > 0)]
    if scans.empty:
        return None
    volumes = scans["lesion_volume_mm3"] / 1000
    limit = min(1.0, round_up(max(scans["dice"].max(), 0.05) * 1.02))

    def draw(canvas: ChartCanvas, axes: Axes, modality: str) -> None:
        log_axis(axes, "x", volumes.min() / 1.4, volumes.max() * 1.4)
        axes.set_ylim(0, limit)
        chosen = scans[scans["modality"] == modality]
        sizes = chosen["detector"].value_counts()
        for detector in sizes.index[sizes > MAX_DOTS]:
            line = np.array(_medians_by_volume(chosen[chosen["detector"] == detector]))
            axes.plot(line[:, 0] / 1000, line[:, 1], color=colours[detector], linewidth=2.2)
        dots = chosen[chosen["detector"].map(sizes) <= MAX_DOTS].sample(frac=1, random_state=0)
        if dots.empty:
            return
        tips = [
            f"{scan.participant_id} {detector_name(scan.detector)}: {scan.dice:.3f}, "
            f"{scan.lesion_volume_mm3 / 1000:.3g} mL"
            for scan in dots.itertuples()
        ]
        canvas.markers(
            axes,
            dots["lesion_volume_mm3"].to_numpy() / 1000,
            dots["dice"].to_numpy(),
            dots["detector"].map(colours).tolist(),
            radius=4.2 if len(dots) <= 60 else 2.8,
            opacity=0.75,
            tips=tips,
            links=dots["report"].where(dots["report"].notna(), "").tolist(),
        )

    modalities = sorted(set(scans["modality"]))
    labels = {"xlabel": "lesion volume, mL (log scale)", "ylabel": "Dice"}
    canvas = modality_panels(modalities, 290, 82, "Dice against lesion volume", draw, **labels)
    canvas.legend(detector_handles(scans["detector"], colours))
    return Chart(
        "dice_by_volume",
        "Dice and lesion size",
        "One dot per lesion scan and detector, at the fixed threshold; for detectors with more than "
        f"{MAX_DOTS} scans, medians of {_VOLUME_GROUPS} groups of equal size, sorted by lesion volume. Small "
        "lesions are harder to detect: mean Dice is not comparable between cohorts with different lesion "
        "sizes.",
        canvas.svg(),
    )


def _medians_by_volume(scans: pd.DataFrame) -> list[tuple[float, float]]:
    """Return median lesion volume (mm3) and median Dice of `_VOLUME_GROUPS` groups, small lesions first."""
    ordered = scans.sort_values("lesion_volume_mm3", kind="stable")[["lesion_volume_mm3", "dice"]]
    groups = np.array_split(ordered.to_numpy(float), _VOLUME_GROUPS)
    return [tuple(np.median(group, axis=0)) for group in groups]


def precision_recall_curves(evaluation: Evaluation, colours: dict[str, str]) -> Chart | None:
    """Draw the pooled precision-recall curves; None without lesions."""
    curves = {key: value for key, value in evaluation.curves.items() if value.lesion.any()}
    if not curves:
        return None

    def draw(canvas: ChartCanvas, axes: Axes, modality: str) -> None:
        axes.set(xlim=(0, 1), ylim=(0, 1))
        chosen = {detector: curve for (detector, kind), curve in curves.items() if kind == modality}
        handles = []
        for detector, curve in sorted(chosen.items(), key=lambda item: -item[1].pooled_auprc):
            precision, recall = precision_recall(curve.nonlesion, curve.lesion)
            kept = np.isfinite(precision) & (recall > 0)
            axes.plot(recall[kept], precision[kept], color=colours[detector], linewidth=2)
            label = f"{detector_name(detector)}  {curve.pooled_auprc:.3f}"
            handles.append(dot_handle(label, colours[detector]))
            edge = curve.threshold_edge
            if np.isfinite(precision[edge]):
                tip = (
                    f"{detector_name(detector)} at the fixed threshold: precision "
                    f"{precision[edge]:.3f}, recall {recall[edge]:.3f}"
                )
                canvas.markers(
                    axes, [recall[edge]], [precision[edge]], colours[detector], radius=5.5, tips=[tip]
                )
        prevalence = next(iter(chosen.values())).prevalence
        chance = axes.axhline(prevalence, color=MUTED, linewidth=1.2, linestyle=DASHES)
        chance.set_label(f"chance  {number(prevalence, 2)}")
        legend = axes.legend(
            handles=[*handles, chance],
            title="pooled AUPRC",
            edgecolor="none",
            loc="upper left",
            bbox_to_anchor=(0, -0.15),
            ncols=2,
            alignment="left",
            fontsize=12,
            handletextpad=0.4,
        )
        legend.get_title().set(fontsize=11, color=MUTED)

    modalities = sorted({modality for _, modality in curves})
    labels = {"xlabel": "recall (voxels)", "ylabel": "precision (voxels)"}
    n_rows = -(-(len({detector for detector, _ in curves}) + 1) // 2)
    margin = 76 + 18 * n_rows  # axis labels, and the legend with its title
    canvas = modality_panels(modalities, 290, margin, "Pooled precision-recall curves", draw, **labels)
    return Chart(
        "precision_recall",
        "Precision and recall, all lesion scans pooled",
        "Over the brain voxels of all lesion scans together, which gives large lesions more weight. Dot: "
        "fixed threshold; dashed: fraction of lesion voxels, the precision of a random detector.",
        canvas.svg(),
    )


def _set_score_axis(axes: Axes, curve: Curves) -> None:
    """Set the limits and scale of the x axis to show the scores of all classes and the thresholds."""
    quantiles = []
    for counts in (curve.lesion, curve.nonlesion, curve.healthy):
        if counts.any():
            cumulative = np.cumsum(counts) / counts.sum()
            quantiles.append([curve.edges[np.searchsorted(cumulative, q)] for q in (0.5, 0.9995)])
    marks = [curve.threshold, *([curve.optimal[1]] if curve.lesion.any() else [])]
    high = 1.04 * max(*marks, *(upper for _, upper in quantiles))
    positive = curve.edges[curve.edges > 0]
    middle = min(lower for lower, _ in quantiles)
    low = max(positive[0], min([middle, *(mark for mark in marks if mark > 0)]) / 3)
    if high / low > _LOG_SCORE_RANGE:
        log_axis(axes, "x", low, high)
    else:
        axes.set_xlim(float(curve.edges[0]), high)


def _position(axes: Axes, threshold: float) -> float:
    """Return where a threshold is drawn: one of 0 at the left limit, since a logarithmic axis has no 0."""
    return max(threshold, axes.get_xlim()[0])


def dice_by_threshold(evaluation: Evaluation, colours: dict[str, str]) -> Chart | None:
    """Draw the mean Dice at every threshold; None without lesions."""
    curves = {key: value for key, value in evaluation.curves.items() if value.lesion.any()}
    if not curves:
        return None
    highest = max(float(np.max(curve.mean_dice)) for curve in curves.values())
    limit = min(1.0, round_up(highest * 1.1)) if highest > 0 else 1.0

    def draw(canvas: ChartCanvas, axes: Axes, key: Key, corner: tuple[float, float]) -> None:
        curve, colour = curves[key], colours[key[0]]
        _set_score_axis(axes, curve)
        axes.set_ylim(0, limit)
        dice = curve.mean_dice
        axes.plot(curve.edges, dice, color=colour, linewidth=2.4)
        best, best_threshold = curve.optimal
        fixed = dice[curve.threshold_edge]
        solid = {"color": INK, "linewidth": 1.6}
        dashed = {"color": MUTED, "linewidth": 1.4, "linestyle": DASHES}
        best_x, fixed_x = (_position(axes, threshold) for threshold in (best_threshold, curve.threshold))
        axes.axvline(best_x, **dashed)
        axes.axvline(fixed_x, **solid)
        canvas.markers(axes, [best_x], [best], colour, radius=5, hollow=True)
        canvas.markers(axes, [fixed_x], [fixed], INK, radius=5)
        left, y = corner[0], corner[1] + 41
        canvas.line((left, left + 16), (y - 4, y - 4), **solid)
        canvas.text(left + 21, y, f"fixed {number(curve.threshold)}: Dice {fixed:.3f}", fontsize=12)
        canvas.line((left + 200, left + 216), (y - 4, y - 4), **dashed)
        words = f"best {number(best_threshold)}: [Dice] {best:.3f}"
        canvas.text(left + 221, y, words, fontsize=12, color=MUTED)

    labels = {"xlabel": "threshold on the anomaly score", "ylabel": "mean Dice"}
    canvas = detector_panels(curves, 58, 162, 52, "Mean Dice at every threshold", draw, **labels)
    return Chart(
        "dice_by_threshold",
        "Dice at every threshold",
        "Mean Dice of the lesion scans at each threshold alone; the masks of detectors with a decision rule "
        "(hysteresis, minimum volume, filled holes) have another Dice, see the table. Solid: fixed "
        "threshold, chosen on validation data. "
        "Dashed: best threshold for this test set, an optimistic upper bound.",
        canvas.svg(),
    )


def score_histograms(evaluation: Evaluation) -> Chart | None:
    """Draw the distribution of the scores of healthy brains, healthy tissue and lesions; None without any."""
    curves = {
        key: curve
        for key, curve in evaluation.curves.items()
        if curve.lesion.any() or curve.nonlesion.any() or curve.healthy.any()
    }
    if not curves:
        return None
    styles = {
        "healthy": (_HEALTHY, "solid", "brains of healthy participants"),
        "outside": (MUTED, DASHES, "outside the lesions of lesion scans"),
        "lesions": (_LESION, "solid", "lesions"),
    }

    def draw(canvas: ChartCanvas, axes: Axes, key: Key, corner: tuple[float, float]) -> None:
        curve = curves[key]
        _set_score_axis(axes, curve)
        log_axis(axes, "y", 1e-6, 1, ticks=4)
        classes = {"healthy": curve.healthy, "outside": curve.nonlesion, "lesions": curve.lesion}
        above = []
        for name, counts in classes.items():
            if not counts.any():
                continue
            colour, dash, _ = styles[name]
            edges, fractions = _display_bins(curve.edges, counts, axes.get_xlim(), axes.get_xscale())
            fractions = np.maximum(fractions, 1e-6)
            if dash == "solid":
                axes.stairs(fractions, edges, baseline=1e-6, fill=True, color=colour, alpha=0.16)
            axes.stairs(fractions, edges, baseline=None, color=colour, linewidth=1.7, linestyle=dash)
            above.append(f"{name} {100 * counts[curve.threshold_edge :].sum() / counts.sum():.2g} %")
        axes.axvline(_position(axes, curve.threshold), color=INK, linewidth=1.6)
        words = "above the threshold: " + ", ".join(above)
        canvas.text(corner[0], corner[1] + 38, words, fontsize=11.5, color=MUTED)

    labels = {"xlabel": "anomaly score", "ylabel": "fraction of voxels"}
    canvas = detector_panels(curves, 54, 172, 56, "Histograms of anomaly scores", draw, legend=26, **labels)
    canvas.legend(
        [
            Line2D([], [], color=colour, linewidth=2.2, linestyle=dash, label=label)
            for colour, dash, label in styles.values()
        ]
    )
    return Chart(
        "score_histograms",
        "Scores of healthy and of lesion voxels",
        "Fraction of the voxels of each class per bin, on a logarithmic axis; each class adds up to 1. "
        "Vertical line: fixed threshold. The less the lesions overlap with the other classes, the better.",
        canvas.svg(),
    )


def _display_bins(
    edges: np.ndarray, counts: np.ndarray, limits: tuple[float, float], scale: str
) -> tuple[np.ndarray, np.ndarray]:
    """Rebin counts for display: edges, shape (n + 1,), and the fraction of voxels in each bar, shape (n,).

    Scores are assumed to be uniform within a source bin; scores beyond the axis are not shown.
    """
    spaced = np.geomspace if scale == "log" else np.linspace
    display_edges = spaced(*limits, _DISPLAY_BINS + 1)
    ends = np.append(edges, edges[-1] * 1.05 if edges[-1] > 0 else 1.0)
    cumulative = np.concatenate([[0], np.cumsum(counts)]) / counts.sum()
    return display_edges, np.diff(np.interp(display_edges, ends, cumulative))
