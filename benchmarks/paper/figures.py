"""Figures of docs/benchmark.md, drawn from the tables of the study."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.paper.claims import CLAIMS
from benchmarks.paper.published import EIGHT
from bids_uad.evaluation.deviations import NORMATIVE
from bids_uad.methods.registry import DETECTORS

STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.hashsalt": "bids_uad",
}
"""Settings of matplotlib. With the salt, the same tables give the same files."""
MODALITY_COLOURS = {"T1w": "#0072B2", "T2w": "#D55E00"}
FOREST = {
    "threshold": "Loss of Dice\nby the fixed threshold",
    "scanner": "Dice, seen minus\nunseen scanners",
    "age": "Odds ratio of a false\npositive per 10 years",
    "sex": "Odds ratio of a false\npositive, male to female",
    "load": "Voxels found, small\nminus larger loads",
    "contrast": "Lesions found, low\nminus higher contrast",
    "deviation": "AUPRC, deviations\nminus scores",
}
"""Claims with an estimate for each detector, and titles of their panels."""


def detector_title(detector: str) -> str:
    """Return the name of a detector in text.

    Parameters
    ----------
    detector : str
        Name in tables, such as ``disyre+normative``.

    Returns
    -------
    str
        Title, such as ``Disyre, deviations``.
    """
    name = detector.removesuffix(NORMATIVE)
    text = DETECTORS[name].title if name in DETECTORS else name
    return f"{text}, deviations" if detector.endswith(NORMATIVE) else text


def draw_figures(tables: dict[str, pd.DataFrame], folder: Path) -> None:
    """Draw the figures of the page.

    Parameters
    ----------
    tables : dict of str to pandas.DataFrame
        Tables of the study.
    folder : pathlib.Path
        Folder of the SVG files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    claims = tables["claims"]
    drawings = {
        "detectors": (_draw_detectors, claims[claims["detector"].notna()]),
        "dice": (_draw_dice, tables["dice"]),
        "lesions": (_draw_lesions, tables["lesions"]),
        "ranks": (_draw_ranks, tables["ranks"]),
    }
    with matplotlib.rc_context(STYLE):
        for name, (draw, table) in drawings.items():
            path = folder / f"{name}.svg"
            path.unlink(missing_ok=True)
            if len(table):
                draw(table).savefig(path, metadata={"Date": None}, bbox_inches="tight")


def _name_detectors(axis: Axes, names: Iterable[str]) -> None:
    """Label the vertical axis with detectors, the first at the top."""
    titles = [detector_title(name) for name in names]
    axis.set_yticks(range(len(titles)), titles)
    axis.invert_yaxis()


def _draw_legend(figure: Figure, handles: Sequence[Artist], labels: Iterable[str], columns: int) -> None:
    """Draw a legend below the axes."""
    figure.legend(handles, labels, loc="lower center", ncols=columns, bbox_to_anchor=(0.5, -0.08))


def _draw_detectors(claims: pd.DataFrame) -> Figure:
    """Draw the estimates of each detector, one panel for each claim."""
    figure = Figure(figsize=(12, 3.2))
    axes = figure.subplots(1, len(FOREST), sharey=True)
    names = list(EIGHT)
    for axis, (claim, text) in zip(axes, FOREST.items(), strict=True):
        ratio = CLAIMS[claim].ratio
        for shift, (modality, colour) in zip((-0.15, 0.15), MODALITY_COLOURS.items(), strict=True):
            own = claims[(claims["claim"] == claim) & (claims["modality"] == modality)]
            for row in own[own["detector"].isin(names)].to_dict("records"):
                place = names.index(row["detector"]) + shift
                numbers = np.array([row["value"], row["low"], row["high"]])
                value, low, high = np.exp(numbers) if ratio else numbers
                axis.plot([low, high], [place, place], color=colour, linewidth=1.2)
                axis.plot(value, place, "o", color=colour, markersize=3.5)
        axis.axvline(1.0 if ratio else 0.0, color="#888888", linewidth=0.8)
        axis.set_title(text)
    _name_detectors(axes[0], names)
    handles = [Line2D([], [], color=c, marker="o", markersize=3.5) for c in MODALITY_COLOURS.values()]
    _draw_legend(figure, handles, MODALITY_COLOURS, 2)
    return figure


def _draw_dice(dice: pd.DataFrame) -> Figure:
    """Draw Dice at the fixed and best threshold, and the published one."""
    cells = list(dict.fromkeys(zip(dice["modality"], dice["pathology"], strict=True)))
    figure = Figure(figsize=(2.1 * max(len(cells), 2), 3.6))
    axes = np.atleast_1d(figure.subplots(1, len(cells), sharey=True, sharex=True))
    names = [*EIGHT, *sorted({name for name in dice["detector"] if NORMATIVE not in name} - set(EIGHT))]
    for axis, (modality, pathology) in zip(axes, cells, strict=True):
        own = dice[(dice["modality"] == modality) & (dice["pathology"] == pathology)]
        for row in own[own["detector"].isin(names)].to_dict("records"):
            place, colour = names.index(row["detector"]), DETECTORS[row["detector"]].colour
            axis.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=1.2)
            axis.plot(row["dice"], place, "o", color=colour, markersize=4)
            axis.plot(row["dice_best"], place, "o", color=colour, markersize=4, fillstyle="none")
            axis.plot(row["published"], place, "x", color="#444444", markersize=4)
        axis.set_title(f"{modality}\n{pathology}")
        axis.set_xlabel("Dice")
    _name_detectors(axes[0], names)
    marks = {
        "fixed threshold (95 % interval)": ("o", "full"),
        "best threshold": ("o", "none"),
        "published": ("x", "full"),
    }
    handles = [
        Line2D([], [], color="#444444", marker=marker, fillstyle=fill, linestyle="none", markersize=4)
        for marker, fill in marks.values()
    ]
    _draw_legend(figure, handles, marks, 3)
    return figure


def _draw_lesions(lesions: pd.DataFrame) -> Figure:
    """Draw the fraction of lesions found by lesion load, volume and contrast."""
    factors = [
        name for name in ("lesion load", "lesion volume", "lesion contrast") if name in set(lesions["factor"])
    ]
    modalities = sorted(set(lesions["modality"])) or ["T2w"]
    figure = Figure(figsize=(9, 2.6 * len(modalities)))
    axes = figure.subplots(len(modalities), max(len(factors), 1), sharey=True, squeeze=False)
    for line, modality in zip(axes, modalities, strict=True):
        for axis, factor in zip(line, factors, strict=False):
            own = lesions[(lesions["modality"] == modality) & (lesions["factor"] == factor)]
            levels = list(dict.fromkeys(own["level"]))
            for name in EIGHT:
                part = own[own["detector"] == name].set_index("level")["lesion_sensitivity"].reindex(levels)
                if part.notna().any():
                    axis.plot(
                        range(len(levels)),
                        part,
                        "o-",
                        color=DETECTORS[name].colour,
                        markersize=3,
                        label=detector_title(name),
                    )
            axis.set_xticks(range(len(levels)), [text.replace(" ", "\n", 1) for text in levels], fontsize=7)
            axis.set_title(f"{modality}, {factor}")
        line[0].set_ylabel("lesions found")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if handles:
        _draw_legend(figure, handles, labels, 8)
    figure.tight_layout()
    return figure


def _draw_ranks(ranks: pd.DataFrame) -> Figure:
    """Draw mean ranks, with a bar of the length of the critical difference from the best."""
    modalities = sorted(set(ranks["modality"]))
    figure = Figure(figsize=(8, 2.4 * len(modalities)))
    axes = np.atleast_1d(figure.subplots(len(modalities), 1, sharex=True))
    for axis, modality in zip(axes, modalities, strict=True):
        own = ranks[ranks["modality"] == modality].sort_values("mean_rank").reset_index(drop=True)
        best, distance = own["mean_rank"].iloc[0], own["cd"].iloc[0]
        axis.axvspan(best, best + distance, color="#DDDDDD", label="not significantly worse than the first")
        for place, row in own.iterrows():
            colour = DETECTORS[row["detector"]].colour
            axis.plot(row["mean_rank"], place, "o", color=colour, markersize=5)
        _name_detectors(axis, own["detector"])
        axis.set_title(f"{modality}, {own['n'].iloc[0]} participants")
    axes[-1].set_xlabel("mean rank in Dice")
    axes[0].legend(loc="lower left", fontsize=7)
    figure.tight_layout()
    return figure
