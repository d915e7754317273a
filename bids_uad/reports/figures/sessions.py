"""Figures of several sessions: volumes over time, and the same slices side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from scipy import ndimage

from bids_uad.files import atomic_path
from bids_uad.reports.figures.display import Volume, extent, select_slices, to_grey
from bids_uad.reports.figures.registration import WIDTH, legend
from bids_uad.reports.figures.svg import Canvas
from bids_uad.reports.figures.tiles import lay_out

COLOURS = {
    "first": "#f0e442",
    "new": "#ff5a36",
    "grown": "#E69F00",
    "shrunk": "#56B4E9",
    "gone": "#d58bff",
    "unchanged": "#ffffff",
    "not matched": "#9aa0a6",
}
"""Colour of the outlines by change; `first` are all lesions of the first session."""
CHANGED = ("new", "grown", "shrunk", "gone")
SLICES = 6
MAX_LESIONS = 8
"""Number of lesions with a line of their own."""


@dataclass(frozen=True)
class SessionView:
    """Scan of one session and its lesions by change.

    Parameters
    ----------
    name : str
        Session, printed at the left.
    scan : Volume
        Scaled to [0, 1], RAS+.
    lesions : dict of str to numpy.ndarray of bool
        Mask by change (key of `COLOURS`), on the grid of `scan`. `gone` are lesions of the session before.
    """

    name: str
    scan: Volume
    lesions: dict[str, np.ndarray]


def draw_sessions(target: Path, views: Sequence[SessionView], brain: np.ndarray, *, title: str) -> Path:
    """Draw the same axial slices of several sessions below each other, with outlines of the lesions.

    Parameters
    ----------
    target : pathlib.Path
        SVG file to write.
    views : sequence of SessionView
        Sessions in their order, on one grid.
    brain : numpy.ndarray of bool
        Brain mask of the first session.
    title : str
        Title of the figure.

    Returns
    -------
    pathlib.Path
        Path of the figure.
    """
    burden = np.zeros(brain.shape[2])
    for wanted in (CHANGED, tuple(COLOURS)):
        masks = [view.lesions[change] for view in views for change in wanted if change in view.lesions]
        burden = _volumes_at_largest_slice(np.logical_or.reduce(masks)) if masks else burden
        if burden.any():
            break
    slices, marked = select_slices(burden, *extent(brain, "axial"), SLICES, SLICES - 1, 4)
    tiles = [[("axial", index) for index in slices]]
    grids, y = [], 58.0
    for _ in views:
        grids.append(lay_out(tiles, brain.shape, 12, y + 20, WIDTH - 24))
        y = grids[-1].bottom + 8
    canvas = Canvas(WIDTH, y + 36, title)
    canvas.text(20, 34, title, 20, attributes='font-weight="bold"')
    used = set()
    for view, grid in zip(views, grids, strict=True):
        canvas.text(20, grid.y - 6, view.name, 15)
        canvas.grey(grid.picture(to_grey(view.scan.data, 1.0)), grid.x, grid.y, grid.scale)
        for change, mask in view.lesions.items():
            path = grid.contours(mask)
            used |= {change} if path else set()
            canvas.lines(path, COLOURS[change], 1.6, "4 3" if change == "gone" else "")
        grid.annotate(canvas, view.scan, 12, set(marked))
    words = {"first": "first session", "gone": "gone (outline of the session before)"}
    entries = [
        (colour, "4 3" if change == "gone" else "", words.get(change, change))
        for change, colour in COLOURS.items()
        if change in used
    ]
    legend(canvas, canvas.height - 13, entries)
    return canvas.save(target)


def _volumes_at_largest_slice(mask: np.ndarray) -> np.ndarray:
    """Return the volume of each component at the axial slice with its largest area, 0 at other slices."""
    volumes = np.zeros(mask.shape[2])
    labels, count = ndimage.label(mask)
    for label, box in zip(range(1, count + 1), ndimage.find_objects(labels), strict=True):
        areas = (labels[box] == label).sum(axis=(0, 1))
        index = box[2].start + int(areas.argmax())
        volumes[index] = max(volumes[index], areas.sum())
    return volumes


def draw_volumes(
    target: Path, names: Sequence[str], days: Sequence[float | None], volumes: pd.DataFrame
) -> Path:
    """Draw the volume of all anomalies, and of the largest lesions, over the sessions.

    Parameters
    ----------
    target : pathlib.Path
        SVG file to write.
    names : sequence of str
        Labels of the sessions.
    days : sequence of (float or None)
        Days since the first session; None if they are not known, for equal distances.
    volumes : pandas.DataFrame
        Volumes in mm3, one row per lesion and one column per session.

    Returns
    -------
    pathlib.Path
        Path of the figure.
    """
    timed = None not in days
    positions = list(days) if timed else list(range(len(names)))
    figure = Figure(figsize=(12, 3.3))
    axes = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.06, right=0.99, bottom=0.2, top=0.88, wspace=0.15)
    axes[0].plot(positions, volumes.sum() / 1000, color="#1b2733", marker="o", linewidth=2)
    axes[0].set_title("All anomalies", fontsize=10, loc="left")
    largest = volumes.max(axis=1).sort_values(ascending=False, kind="stable").index[:MAX_LESIONS]
    colours = matplotlib.colormaps["tab10"].colors
    for number, lesion in enumerate(largest):
        axes[1].plot(
            positions,
            volumes.loc[lesion] / 1000,
            marker="o",
            markersize=4,
            color=colours[number % len(colours)],
            label=f"lesion {lesion}",
        )
    several = f"The {len(largest)} largest of {len(volumes)} lesions" if len(volumes) > 1 else "Lesions"
    axes[1].set_title(several, fontsize=10, loc="left")
    if len(largest):
        axes[1].legend(frameon=False, fontsize=8.5, ncols=2, loc="best")
    for each in axes:
        each.set_ylim(bottom=0)
        each.set_ylabel("volume, mL")
        each.spines[["top", "right"]].set_visible(False)
        each.grid(axis="y", color="#000000", alpha=0.08)
        each.set_xticks(
            positions,
            [f"{name}\n{day:.0f} d" if timed else name for name, day in zip(names, days, strict=True)],
        )
        each.margins(x=0.08)
    settings = {"svg.fonttype": "none", "svg.hashsalt": "bids_uad", "font.family": "sans-serif"}
    with matplotlib.rc_context(settings), atomic_path(target) as temporary:
        FigureCanvasSVG(figure).print_svg(temporary, metadata={"Date": None})
    return target
