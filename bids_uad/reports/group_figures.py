"""The figures of the group report, as SVG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy.ndimage import gaussian_filter1d

from bids_uad.evaluation.benchmark import ALL, Evaluation
from bids_uad.evaluation.curves import Curves
from bids_uad.evaluation.metrics import precision_recall
from bids_uad.evaluation.subjects import HEALTHY, LESION
from bids_uad.reports.group_svg import (
    INK,
    MUTED,
    Linear,
    Log,
    Scale,
    Svg,
    number,
    quartiles,
    round_up,
)
from bids_uad.reports.group_text import DETECTOR_NAMES, detector_name, with_interval

WIDTH = 1080
# Okabe and Ito's palette, which colour-blind readers can tell apart; no yellow, which paper swallows.
_PALETTE = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00",
    "#56B4E9", "#4D4D4D", "#8C564B", "#7A5FB5", "#9AA60A",
)  # fmt: skip
_HEALTHY, _LESION = "#0072B2", "#D55E00"
_NAMED_DOTS = 12  # up to this many participants every dot carries its name
_DISPLAY_BINS = 72
MAX_DOTS = 300
"""Scans of one detector that are drawn one by one."""
_VOLUME_GROUPS = 20


@dataclass(frozen=True)
class Figure:
    """One figure with the words around it."""

    name: str
    title: str
    caption: str
    svg: str


def detector_colours(evaluation: Evaluation) -> dict[str, str]:
    """Give every detector of a cohort its colour, the same in all figures.

    Known detectors have one for all cohorts; who comes where it is taken gets another, while there is one.
    """
    present = {detector for detector, _ in evaluation.curves}
    order = [*DETECTOR_NAMES, *sorted(present - set(DETECTOR_NAMES))]
    free = list(_PALETTE)
    colours = {}
    for place, detector in enumerate(order):
        if detector in present:
            own = _PALETTE[place % len(_PALETTE)]
            colours[detector] = own if own in free or not free else free[0]
            free = [colour for colour in free if colour != colours[detector]]
    return colours


def group_figures(evaluation: Evaluation) -> list[Figure]:
    """Draw every figure that the cohort has data for.

    Parameters
    ----------
    evaluation : Evaluation
        The cohort.

    Returns
    -------
    list of Figure
        Those that have a row or panel for each detector come once for each modality, so that ten detectors
        fit a printed page.
    """
    figures = [dice_by_volume(evaluation), precision_recall_curves(evaluation)]
    for modality in sorted({modality for _, modality in evaluation.curves}):
        part = replace(
            evaluation,
            subjects=evaluation.subjects[evaluation.subjects["modality"] == modality],
            curves={key: curves for key, curves in evaluation.curves.items() if key[1] == modality},
        )
        figures += [
            of_modality(figure, modality)
            for figure in (
                dice_strip(part),
                fpr_strip(part),
                dice_by_threshold(part),
                score_histograms(part),
            )
        ]
    return [figure for figure in figures if figure is not None]


def of_modality(figure: Figure | None, modality: str) -> Figure | None:
    """Say in name and title which modality a figure is of."""
    if figure is None:
        return None
    return replace(figure, name=f"{figure.name}_{modality}", title=f"{figure.title}: {modality}")


def dice_strip(evaluation: Evaluation) -> Figure | None:
    """Draw the Dice of every lesion scan at the fixed threshold; None without lesion scans."""
    svg = _strip(
        evaluation,
        role=LESION,
        column="dice",
        mean="dice_mean",
        interval="dice",
        label="Dice at the fixed threshold",
    )
    if svg is None:
        return None
    return Figure(
        "dice",
        "Dice at the fixed threshold",
        f"One dot per lesion scan, or, where a detector has more than {MAX_DOTS}, their density. Box: "
        "quartiles and median; whiskers: within 1.5 interquartile ranges; diamond and bar: mean and 95 % "
        "interval over participants.",
        svg,
    )


def fpr_strip(evaluation: Evaluation) -> Figure | None:
    """Draw the false-positive rate of every healthy scan; None without healthy scans."""
    svg = _strip(
        evaluation,
        role=HEALTHY,
        column="fpr",
        mean="fpr_healthy_mean",
        interval="fpr_healthy_mean",
        label="brain voxels called anomalous, %",
        percent=True,
    )
    if svg is None:
        return None
    return Figure(
        "fpr_healthy",
        "False positives in healthy brains",
        f"One dot per healthy scan, or, where a detector has more than {MAX_DOTS}, their density: share of "
        "the brain voxels above the fixed threshold. Lower is better.",
        svg,
    )


def _strip(
    evaluation: Evaluation,
    *,
    role: str,
    column: str,
    mean: str,
    interval: str,
    label: str,
    percent: bool = False,
) -> str | None:
    scans = evaluation.subjects
    scans = scans[(scans["role"] == role) & scans[column].notna()]
    if scans.empty:
        return None
    scale, digits = (100, 2) if percent else (1, 3)
    unit = " %" if percent else ""
    groups = list(scans.groupby(["modality", "detector"], sort=True))
    named = scans["participant_id"].nunique() <= _NAMED_DOTS
    row_height = 84 if named else 62
    top, left, right = 30, 150, WIDTH - 215
    high = scans[column].max() * scale
    limit = round_up(high * 1.02) if high > 0 else 1.0
    x = Linear(0, limit if percent else min(limit, 1.0), left, right)
    bottom = top + row_height * len(groups)
    svg = Svg(WIDTH, bottom + 48, f"{label}, per detector")
    for value in x.ticks(6):
        svg.line(x(value), top - 6, x(value), bottom)
        svg.text(x(value), bottom + 17, number(value), size=11, colour=MUTED, anchor="middle")
    svg.text((left + right) / 2, bottom + 38, label, size=12, colour=MUTED, anchor="middle")
    svg.text(right + 16, top - 12, "mean [95 % interval]", size=11, colour=MUTED)

    colours = detector_colours(evaluation)
    overall = evaluation.benchmark[evaluation.benchmark["cohort"] == ALL]
    rows = overall.set_index(["modality", "detector"]).to_dict(orient="index")
    for index, ((modality, detector), group) in enumerate(groups):
        ceiling = top + row_height * index
        y = ceiling + row_height * (0.54 if named else 0.44)
        colour = colours[detector]
        if index:
            svg.line(20, ceiling, WIDTH - 20, ceiling)
        svg.text(left - 16, y - 1, detector_name(detector), size=14, weight=600, anchor="end")
        svg.text(left - 16, y + 15, modality, size=11.5, colour=MUTED, anchor="end")
        values = group[column].to_numpy(float) * scale
        if len(group) > MAX_DOTS:
            _density(svg, x, y, values, colour)
        _box(svg, x, y, values, colour)
        if len(group) <= MAX_DOTS:
            _dots(svg, x, y, group, values, colour, unit, named)
        row = rows[modality, detector]
        low, top_value = row[f"{interval}_ci_low"] * scale, row[f"{interval}_ci_high"] * scale
        ymean = y + 24
        if np.isfinite(low):
            svg.line(x(low), ymean, x(top_value), ymean, INK, 1.6)
        tip = f"mean {with_interval(row, mean, interval, scale, digits)}{unit}"
        svg.diamond(x(row[mean] * scale), ymean, 4.5, INK, tip)
        text = with_interval(row, mean, interval, scale, digits)
        svg.text(right + 16, y - 1, text, size=13, weight=600)
        svg.text(right + 16, y + 15, _plural(len(group), "scan"), size=11.5, colour=MUTED)
    return svg.render()


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _box(svg: Svg, x: Scale, y: float, values: np.ndarray, colour: str) -> None:
    if len(values) < 4:  # quartiles of three numbers say less than the three dots
        return
    bottom, low, middle, high, top = quartiles(values)
    svg.line(x(bottom), y, x(low), y, colour, 1.4)
    svg.line(x(high), y, x(top), y, colour, 1.4)
    svg.rect(x(low), y - 13, max(x(high) - x(low), 1), 26, colour, 0.16, 3)
    svg.line(x(middle), y - 13, x(middle), y + 13, colour, 2.6)


def _density(svg: Svg, x: Linear, y: float, values: np.ndarray, colour: str) -> None:
    """Draw how many scans lie where, as the width of a shape about the row's middle."""
    counts, edges = np.histogram(values, bins=200, range=(x.low, x.high))
    smooth = gaussian_filter1d(counts.astype(float), 2, mode="reflect")
    places = [x(value) for value in (edges[:-1] + edges[1:]) / 2]
    half = 20 * smooth / smooth.max()
    upper = list(zip(places, y - half, strict=True))
    lower = list(zip(places, y + half, strict=True))
    svg.path([*upper, *lower[::-1]], "none", fill=colour, opacity=0.35)


def _dots(
    svg: Svg,
    x: Scale,
    y: float,
    group: pd.DataFrame,
    values: np.ndarray,
    colour: str,
    unit: str,
    named: bool,
) -> None:
    radius = 4.2 if named else 2.6
    opacity = 0.95 if named else 0.6
    lane_y = (-19, -31)
    lanes = [float("-inf")] * len(lane_y)  # where the last name of each lane ends
    offsets = _swarm([x(value) for value in values], radius)
    reports = group["report"].where(group["report"].notna(), "")
    names = group["participant_id"].str.cat(group["session_id"].fillna(""), sep=" ").str.strip()
    for index in np.argsort(values, kind="stable"):
        place = x(values[index])
        tip = f"{names.iloc[index]}: {number(values[index])}{unit}"
        report = reports.iloc[index]
        svg.dot(place, y + offsets[index], radius, colour, opacity=opacity, tip=tip, href=report)
        if named:
            name = names.iloc[index].removeprefix("sub-")
            half = 3.2 * len(name) + 3
            free = [lane for lane in range(len(lane_y)) if lanes[lane] <= place - half]
            if free:
                svg.text(place, y + lane_y[free[0]], name, size=10.5, colour=MUTED, anchor="middle")
                lanes[free[0]] = place + half


def _swarm(places: Sequence[float], radius: float) -> list[float]:
    """Vertical offsets (pixels) that keep neighbouring dots apart as far as the row allows."""
    steps = [0, 1, -1, 2, -2, 3, -3, 4, -4]
    taken: list[tuple[float, float]] = []
    offsets = [0.0] * len(places)
    for index in np.argsort(places, kind="stable"):
        place = places[index]
        near = {offset for other, offset in taken[-len(steps) :] if place - other < 1.7 * radius}
        free = [step for step in steps if step not in near]
        # A full column starts again in the middle, shifted through all levels.
        step = free[0] if free else steps[len(taken) % len(steps)]
        taken.append((place, step))
        offsets[index] = step * radius * (1.0 if radius < 4 else 0.9)
    return offsets


def dice_by_volume(evaluation: Evaluation) -> Figure | None:
    """Draw Dice against lesion volume; None when no lesion has a volume."""
    scans = evaluation.subjects
    scans = scans[(scans["role"] == LESION) & (scans["lesion_volume_mm3"] > 0)]
    if scans.empty:
        return None
    volumes = scans["lesion_volume_mm3"] / 1000
    low, high = volumes.min() / 1.4, volumes.max() * 1.4
    limit = min(1.0, round_up(max(scans["dice"].max(), 0.05) * 1.02))
    colours = detector_colours(evaluation)

    def draw(svg: Svg, left: float, right: float, modality: str) -> None:
        x, y = Log(low, high, left, right), Linear(0, limit, 330, 40)
        svg.axes(x, y, xlabel="lesion volume, mL (log scale)", ylabel="Dice")
        chosen = scans[scans["modality"] == modality]
        sizes = chosen["detector"].value_counts()
        for detector in sizes.index[sizes > MAX_DOTS]:
            line = _medians_by_volume(chosen[chosen["detector"] == detector])
            svg.path([(x(volume / 1000), y(dice)) for volume, dice in line], colours[detector], 2.2)
        chosen = chosen[chosen["detector"].map(sizes) <= MAX_DOTS]
        radius = 4.2 if len(chosen) <= 60 else 2.8
        for row in chosen.sample(frac=1, random_state=0).to_dict(orient="records"):
            millilitres = row["lesion_volume_mm3"] / 1000
            detector = detector_name(row["detector"])
            tip = f"{row['participant_id']} {detector}: {row['dice']:.3f}, {millilitres:.3g} mL"
            href = row["report"] if isinstance(row["report"], str) else ""
            svg.dot(
                x(millilitres),
                y(row["dice"]),
                radius,
                colours[row["detector"]],
                opacity=0.75,
                tip=tip,
                href=href,
            )

    svg = _modality_panels(sorted(set(scans["modality"])), draw, "Dice against lesion volume", 404)
    legend(svg, sorted(set(scans["detector"])), colours)
    return Figure(
        "dice_by_volume",
        "Dice and lesion size",
        "One dot per lesion scan and detector, at the fixed threshold; where a detector has more than "
        f"{MAX_DOTS}, a line through the medians of {_VOLUME_GROUPS} groups of equally many, from small to "
        "large lesions. Small lesions are harder: cohorts with other lesion sizes are not comparable by "
        "their mean Dice.",
        svg.render(),
    )


def _medians_by_volume(scans: pd.DataFrame) -> list[tuple[float, float]]:
    """Median lesion volume (mm3) and median Dice of `_VOLUME_GROUPS` groups from small to large lesions."""
    ordered = scans.sort_values("lesion_volume_mm3", kind="stable")[["lesion_volume_mm3", "dice"]]
    groups = np.array_split(ordered.to_numpy(float), _VOLUME_GROUPS)
    return [tuple(np.median(group, axis=0)) for group in groups]


def _modality_panels(
    modalities: Sequence[str],
    draw: Callable[[Svg, float, float, str], None],
    title: str,
    height: float,
) -> Svg:
    """Lay out one panel per modality side by side; a single one does not fill the whole page."""
    svg = Svg(WIDTH, height, title)
    width = WIDTH / 2 if len(modalities) > 1 else 720
    offset = 0 if len(modalities) > 1 else (WIDTH - width) / 2
    for index, modality in enumerate(modalities):
        left, right = offset + index * width + 62, offset + (index + 1) * width - 22
        svg.text(left, 22, modality, size=14, weight=600)
        draw(svg, left, right, modality)
    return svg


def legend(svg: Svg, detectors: Sequence[str], colours: dict[str, str]) -> None:
    """Say at the bottom which colour is which detector."""
    widths = [34 + 8.8 * len(detector_name(detector)) for detector in detectors]
    place = (svg.width - sum(widths)) / 2
    for detector, width in zip(detectors, widths, strict=True):
        svg.dot(place + 6, svg.height - 14, 5, colours[detector])
        svg.text(place + 17, svg.height - 10, detector_name(detector), size=12.5)
        place += width


def precision_recall_curves(evaluation: Evaluation) -> Figure | None:
    """Draw the pooled precision-recall curves; None without lesions."""
    curves = {key: value for key, value in evaluation.curves.items() if value.lesion.any()}
    if not curves:
        return None
    colours = detector_colours(evaluation)

    def draw(svg: Svg, left: float, right: float, modality: str) -> None:
        x, y = Linear(0, 1, left, right), Linear(0, 1, 330, 40)
        svg.axes(x, y, xlabel="recall (voxels)", ylabel="precision (voxels)")
        chosen = {detector: curve for (detector, kind), curve in curves.items() if kind == modality}
        prevalence = next(iter(chosen.values())).prevalence
        svg.line(x(0), y(prevalence), x(1), y(prevalence), MUTED, 1.2, "4 4")
        ranked = sorted(chosen.items(), key=lambda item: -item[1].pooled_auprc)
        names, height = x(1) - 112, 52
        svg.text(x(1), height, "pooled AUPRC", size=11, colour=MUTED, anchor="end")
        for detector, curve in ranked:
            height += 18
            svg.dot(names - 11, height - 4, 4.5, colours[detector])
            svg.text(names, height, detector_name(detector), size=12)
            svg.text(x(1), height, f"{curve.pooled_auprc:.3f}", size=12, anchor="end")
        height += 18
        svg.line(names - 18, height - 4, names - 5, height - 4, MUTED, 1.2, "4 3")
        svg.text(names, height, "guessing", size=12, colour=MUTED)
        text = number(prevalence, 2)
        svg.text(x(1), height, text, size=12, colour=MUTED, anchor="end")
        for detector, curve in chosen.items():
            precision, recall = precision_recall(curve.nonlesion, curve.lesion)
            kept = np.isfinite(precision) & (recall > 0)
            points = zip(recall[kept][::-1], precision[kept][::-1], strict=True)
            svg.path(_thin([(x(r), y(p)) for r, p in points]), colours[detector])
            edge = curve.threshold_edge
            if np.isfinite(precision[edge]):
                tip = (
                    f"{detector_name(detector)} at the fixed threshold: precision "
                    f"{precision[edge]:.3f}, recall {recall[edge]:.3f}"
                )
                svg.dot(x(recall[edge]), y(precision[edge]), 5.5, colours[detector], tip=tip)

    modalities = sorted({modality for _, modality in curves})
    svg = _modality_panels(modalities, draw, "Pooled precision-recall curves", 374)
    return Figure(
        "precision_recall",
        "Precision and recall, all lesion scans pooled",
        "Over the brain voxels of all lesion scans together, so that large lesions weigh more; dot: "
        "the fixed threshold; dashed: the lesion share of the voxels, what guessing reaches.",
        svg.render(),
    )


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Drop points that lie within half a pixel of the last one kept."""
    kept = points[:1]
    for point in points[1:]:
        if max(abs(point[0] - kept[-1][0]), abs(point[1] - kept[-1][1])) >= 0.5:
            kept.append(point)
    return kept


def _score_scale(curve: Curves, start: float, stop: float) -> Scale:
    """Choose a scale that shows where the voxels of all classes are, and the thresholds."""
    quantiles = []
    for counts in (curve.lesion, curve.nonlesion, curve.healthy):
        if counts.any():
            share = np.cumsum(counts) / counts.sum()
            quantiles.append([curve.edges[np.searchsorted(share, q)] for q in (0.5, 0.9995)])
    marks = [curve.threshold, *([curve.optimal[1]] if curve.lesion.any() else [])]
    high = 1.04 * max(*marks, *(upper for _, upper in quantiles))
    positive = curve.edges[curve.edges > 0]
    middle = min(lower for lower, _ in quantiles)
    low = max(positive[0], min(middle, *(mark for mark in marks if mark > 0)) / 3)
    if high / low > 60:
        return Log(low, high, start, stop)
    return Linear(float(curve.edges[0]), high, start, stop)


def panel_grid(
    keys: Sequence[tuple[str, str]],
    height: float,
    title: str,
    draw: Callable[[Svg, tuple[str, str], float, float, float], None],
    extra: float = 0,
) -> Svg:
    """Lay out one panel per detector and modality, two in a row."""
    rows = -(-len(keys) // 2)
    svg = Svg(WIDTH, rows * height + extra, title)
    for index, key in enumerate(keys):
        left = (index % 2) * WIDTH / 2 + 62
        if len(keys) == 1:
            left = WIDTH / 4 + 62
        top = (index // 2) * height
        detector, modality = key
        svg.text(left, top + 20, f"{detector_name(detector)} · {modality}", size=14, weight=600)
        draw(svg, key, left, left + WIDTH / 2 - 84, top)
    return svg


def dice_by_threshold(evaluation: Evaluation) -> Figure | None:
    """Draw the mean Dice at every threshold; None without lesions."""
    curves = {key: value for key, value in evaluation.curves.items() if value.lesion.any()}
    if not curves:
        return None
    colours = detector_colours(evaluation)
    highest = max(float(np.max(curve.mean_dice)) for curve in curves.values())
    limit = min(1.0, round_up(highest * 1.1)) if highest > 0 else 1.0

    def draw(svg: Svg, key: tuple[str, str], left: float, right: float, top: float) -> None:
        curve = curves[key]
        x = _score_scale(curve, left, right)
        y = Linear(0, limit, top + 220, top + 58)
        svg.axes(x, y, xlabel="threshold on the anomaly score", ylabel="mean Dice", yticks=4)
        dice = curve.mean_dice
        inside = (curve.edges >= x.low) & (curve.edges <= x.high)
        points = zip(curve.edges[inside], dice[inside], strict=True)
        svg.path(_thin([(x(edge), y(value)) for edge, value in points]), colours[key[0]], 2.4)
        best, best_threshold = curve.optimal
        fixed = dice[curve.threshold_edge]
        svg.line(x(best_threshold), y(0), x(best_threshold), y(limit), MUTED, 1.4, "5 4")
        svg.line(x(curve.threshold), y(0), x(curve.threshold), y(limit), INK, 1.6)
        svg.dot(x(best_threshold), y(best), 5, colours[key[0]], hollow=True)
        svg.dot(x(curve.threshold), y(fixed), 5, INK)
        svg.line(left, top + 37, left + 16, top + 37, INK, 1.6)
        svg.text(left + 21, top + 41, f"fixed {number(curve.threshold)}: Dice {fixed:.3f}", size=12)
        svg.line(left + 200, top + 37, left + 216, top + 37, MUTED, 1.4, "5 4")
        text = f"best {number(best_threshold)}: [Dice] {best:.3f}"
        svg.text(left + 221, top + 41, text, size=12, colour=MUTED)

    keys = sorted(curves, key=lambda key: key[::-1])
    svg = panel_grid(keys, 272, "Mean Dice at every threshold", draw)
    return Figure(
        "dice_by_threshold",
        "Dice at every threshold",
        "Mean over the scans with a lesion if one threshold served them all. Solid: the fixed threshold, "
        "chosen on validation data. Dashed: the best one for this test set, an upper bound that "
        "looks at the answers.",
        svg.render(),
    )


def score_histograms(evaluation: Evaluation) -> Figure | None:
    """Draw how the scores of healthy brains, healthy tissue and lesions are spread, if known."""
    curves = {
        key: curve
        for key, curve in evaluation.curves.items()
        if curve.lesion.any() or curve.nonlesion.any() or curve.healthy.any()
    }
    if not curves:
        return None

    def draw(svg: Svg, key: tuple[str, str], left: float, right: float, top: float) -> None:
        curve = curves[key]
        x = _score_scale(curve, left, right)
        y = Log(1e-6, 1, top + 226, top + 54)
        svg.axes(x, y, xlabel="anomaly score", ylabel="share of voxels", yticks=4)
        for counts, colour, filled in _classes(curve):
            xs, shares = _display_bins(curve.edges, counts, x)
            steps = [
                (place, y(max(share, y.low)))
                for start, end, share in zip(xs[:-1], xs[1:], shares, strict=True)
                for place in (start, end)
            ]
            if filled:
                svg.path([(xs[0], y.start), *steps, (xs[-1], y.start)], colour, 0, colour, 0.16)
            svg.path(steps, colour, 1.8 if filled else 1.5, dash="" if filled else "4 3")
        svg.line(x(curve.threshold), y.start, x(curve.threshold), y.stop - 4, INK, 1.6)
        named = (
            (curve.healthy, "healthy"),
            (curve.nonlesion, "outside"),
            (curve.lesion, "lesions"),
        )
        above = [
            f"{name} {100 * counts[curve.threshold_edge :].sum() / counts.sum():.2g} %"
            for counts, name in named
            if counts.any()
        ]
        text = "above the threshold: " + ", ".join(above)
        svg.text(left, top + 38, text, size=11.5, colour=MUTED)

    keys = sorted(curves, key=lambda key: key[::-1])
    svg = panel_grid(keys, 282, "Histograms of anomaly scores", draw, extra=22)
    place = WIDTH / 2 - 330
    labels = (
        (_HEALTHY, "", "brains of healthy participants", 230),
        (MUTED, "4 3", "outside the lesions of lesion scans", 260),
        (_LESION, "", "lesions", 80),
    )
    for colour, dash, label, width in labels:
        svg.line(place, svg.height - 12, place + 24, svg.height - 12, colour, 2.2, dash)
        svg.text(place + 31, svg.height - 8, label, size=12.5)
        place += width + 20
    return Figure(
        "score_histograms",
        "Scores of healthy and of lesion voxels",
        "Share of the voxels of each kind per bar, on a logarithmic axis; each kind adds up to 1. "
        "Vertical line: the fixed threshold. The further the lesions lie to the right of the rest, "
        "the better the detector.",
        svg.render(),
    )


def _classes(curve: Curves) -> list[tuple[np.ndarray, str, bool]]:
    classes = [
        (curve.healthy, _HEALTHY, True),
        (curve.nonlesion, MUTED, False),
        (curve.lesion, _LESION, True),
    ]
    return [item for item in classes if item[0].any()]


def _display_bins(edges: np.ndarray, counts: np.ndarray, x: Scale) -> tuple[np.ndarray, np.ndarray]:
    """Rebin counts for display: pixel edges (n + 1,) and the share of voxels in each bar (n,).

    Within a source bin voxels are taken as evenly spread; what lies beyond the axis is not shown.
    """
    if isinstance(x, Log):
        wanted = np.geomspace(x.low, x.high, _DISPLAY_BINS + 1)
    else:
        wanted = np.linspace(x.low, x.high, _DISPLAY_BINS + 1)
    ends = np.append(edges, edges[-1] * 1.05 if edges[-1] > 0 else 1.0)
    cumulative = np.concatenate([[0], np.cumsum(counts)]) / counts.sum()
    shares = np.diff(np.interp(wanted, ends, cumulative))
    return np.array([x(value) for value in wanted]), shares
