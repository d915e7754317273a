"""Charts of the group report, one function for each."""

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
from bids_uad.evaluation.bias import Effect
from bids_uad.evaluation.bootstrap import MAX_SHARE_WIDTH, MIN_SUBJECTS
from bids_uad.evaluation.comparison import mean_ranks, participant_scores
from bids_uad.evaluation.curves import Curves
from bids_uad.evaluation.experiments import REFERENCE
from bids_uad.evaluation.lesion_detection import (
    CONTRAST,
    CONTRASTS,
    VOLUME,
    VOLUMES,
)
from bids_uad.evaluation.metrics import precision_recall
from bids_uad.evaluation.subjects import HEALTHY, LESION
from bids_uad.evaluation.threshold_transfer import VALIDATION
from bids_uad.methods.registry import DETECTORS
from bids_uad.reports.charts import (
    DASHES,
    INK,
    MUTED,
    WIDTH,
    Chart,
    ChartCanvas,
    detector_panels,
    dot_handle,
    log_axis,
    modality_panels,
    round_up,
)
from bids_uad.reports.group_text import (
    detector_name,
    number,
    with_interval,
)

_HEALTHY, _LESION, _SHADE = "#0072B2", "#D55E00", "#56B4E9"
MAX_DOTS = 300
"""Maximum number of scans of a detector that are drawn as dots."""
MAX_NAMED_PARTICIPANTS = 12
"""Maximum number of participants whose dots are labelled."""
_VOLUME_GROUPS = 20
_DISPLAY_BINS = 72
_LOG_SCORE_RANGE = 60
"""Ratio of the limits above which score axes are logarithmic."""
ALPHA = 0.05
MIN_RANKED_DETECTORS = 3
"""Minimum number of detectors of the rank plot; for two, the comparison of the pair suffices."""
EXPERIMENT_OUTCOMES = {"dice": "Dice", "auprc": "AUPRC", "fpr": "healthy FPR, %"}

Key = tuple[str, str]
"""Detector and modality."""


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
    canvas.legend(_detector_handles(scans["detector"], colours))
    return Chart(
        "dice_by_volume",
        "Dice and lesion size",
        "One dot per lesion scan and detector, at the fixed threshold; for detectors with more than "
        f"{MAX_DOTS} scans, medians of {_VOLUME_GROUPS} groups of equal size, sorted by lesion volume. Small "
        "lesions are harder to detect: mean Dice is not comparable between cohorts with different lesion "
        "sizes.",
        canvas.svg(),
    )


def _detector_handles(detectors: pd.Series, colours: dict[str, str]) -> list[Line2D]:
    """Return the legend entries of the detectors in a column."""
    return [dot_handle(detector_name(detector), colours[detector]) for detector in sorted(set(detectors))]


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
    low = max(positive[0], min(middle, *(mark for mark in marks if mark > 0)) / 3)
    if high / low > _LOG_SCORE_RANGE:
        log_axis(axes, "x", low, high)
    else:
        axes.set_xlim(float(curve.edges[0]), high)


def _by_modality(keys: Sequence[Key]) -> tuple[list[Key], list[str]]:
    """Sort detectors within modalities; return the keys and the titles of their panels."""
    keys = sorted(keys, key=lambda key: key[::-1])
    return keys, [f"{detector_name(detector)} · {modality}" for detector, modality in keys]


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
        axes.axvline(best_threshold, **dashed)
        axes.axvline(curve.threshold, **solid)
        canvas.markers(axes, [best_threshold], [best], colour, radius=5, hollow=True)
        canvas.markers(axes, [curve.threshold], [fixed], INK, radius=5)
        left, y = corner[0], corner[1] + 41
        canvas.line((left, left + 16), (y - 4, y - 4), **solid)
        canvas.text(left + 21, y, f"fixed {number(curve.threshold)}: Dice {fixed:.3f}", fontsize=12)
        canvas.line((left + 200, left + 216), (y - 4, y - 4), **dashed)
        words = f"best {number(best_threshold)}: [Dice] {best:.3f}"
        canvas.text(left + 221, y, words, fontsize=12, color=MUTED)

    keys, titles = _by_modality(curves)
    labels = {"xlabel": "threshold on the anomaly score", "ylabel": "mean Dice"}
    canvas = detector_panels(keys, titles, 58, 162, 52, "Mean Dice at every threshold", draw, **labels)
    return Chart(
        "dice_by_threshold",
        "Dice at every threshold",
        "Mean Dice of the lesion scans at each threshold. Solid: fixed threshold, chosen on validation data. "
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
        axes.axvline(curve.threshold, color=INK, linewidth=1.6)
        words = "above the threshold: " + ", ".join(above)
        canvas.text(corner[0], corner[1] + 38, words, fontsize=11.5, color=MUTED)

    keys, titles = _by_modality(curves)
    labels = {"xlabel": "anomaly score", "ylabel": "fraction of voxels"}
    canvas = detector_panels(
        keys, titles, 54, 172, 56, "Histograms of anomaly scores", draw, legend=26, **labels
    )
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

    keys, titles = _by_modality(matrices)
    canvas = detector_panels(
        keys, titles, 58, 24 * n_rows, 26, "Thresholds between cohorts", draw, left=62 + 96
    )
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
    canvas.legend(_detector_handles(lesions["detector"], colours))
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

    keys, titles = _by_modality(shown)
    labels = {"xlabel": "age, years", "ylabel": "FPR, %"}
    canvas = detector_panels(keys, titles, 34, 182, 56, "False positives and age", draw, **labels)
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
    canvas.legend(_detector_handles(rows["detector"], colours))
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
