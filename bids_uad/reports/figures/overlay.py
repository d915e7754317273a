"""Anomaly figure: scores on the scan, in three planes through the main finding and a mosaic."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from scipy.ndimage import uniform_filter

from bids_uad.reports.figures.display import (
    Volume,
    bounding_box,
    extent,
    select_slices,
    to_grey,
)
from bids_uad.reports.figures.registration import WIDTH, legend
from bids_uad.reports.figures.svg import Canvas
from bids_uad.reports.figures.tiles import MUTED, lay_out

COLOUR_MAP = "inferno"
THRESHOLD_COLOUR = "#ffffff"
LESION_COLOUR = "#2ee6d6"
COLUMNS, ROWS = 7, 3
NEIGHBOURHOOD = 9
_HOVER = "svg:hover .overlay{opacity:0;transition:opacity .15s}.overlay{transition:opacity .15s}"


@dataclass(frozen=True)
class ColourScale:
    """Mapping of scores to colours.

    Attributes
    ----------
    low : float
        Score up to which colours are transparent.
    opaque : float
        Score from which colours have full opacity.
    high : float
        Score of the last colour.
    """

    low: float
    opaque: float
    high: float

    @classmethod
    def of(cls, scores: np.ndarray, threshold: float | None) -> ColourScale:
        """Return the scale for the scores of all brain voxels.

        Scores are transparent up to the 90th percentile or 0.9 times the threshold, whichever is lower.
        Colours end at the 99.9th percentile or 1.5 times the threshold, whichever is higher, so that a brain
        without findings is not shown in bright colours.
        """
        low, high = (float(value) for value in np.percentile(scores, (90, 99.9)))
        if threshold is None:
            opaque = float(np.percentile(scores, 99))
        else:
            low, opaque, high = min(low, 0.9 * threshold), threshold, max(high, 1.5 * threshold)
        tiny = max(abs(high), 1.0) * 1e-6
        return cls(low, max(opaque, low + tiny), max(high, low + 2 * tiny))

    def indices(self, data: np.ndarray) -> np.ndarray:
        """Return the palette index of every score; 0 is transparent."""
        position = np.clip((data - self.low) / (self.high - self.low), 0, 1)
        return np.where(data > self.low, 1 + np.round(position * 254), 0).astype(np.uint8)

    def palette(self) -> np.ndarray:
        """Return the RGBA colours of all indices, shape (256, 4), uint8."""
        position = np.linspace(0, 1, 255)
        rgba = np.zeros((256, 4))
        # The darkest quarter of the map would be invisible on dark tissue.
        rgba[1:] = matplotlib.colormaps[COLOUR_MAP](0.25 + 0.75 * position)
        rise = (self.opaque - self.low) / (self.high - self.low)
        rgba[1:, 3] = 0.08 + 0.77 * np.clip(position / rise, 0, 1)
        return (rgba * 255).round().astype(np.uint8)


def main_finding(scores: np.ndarray, components: np.ndarray | None) -> tuple[int, int, int]:
    """Return the voxel through which the three planes are drawn.

    Parameters
    ----------
    scores : numpy.ndarray, three-dimensional
        Anomaly scores, 0 outside the brain.
    components : numpy.ndarray of int, optional
        Labels of the components, 0 for background.

    Returns
    -------
    tuple of int
        Voxel with the highest score of the largest component. Without components, the centre of the cube of
        `NEIGHBOURHOOD` voxels with the highest mean, since single high voxels mostly lie at the brain edge.
    """
    if components is not None and components.any():
        largest = int(np.argmax(np.bincount(components.ravel())[1:])) + 1
        scores = np.where(components == largest, scores, -np.inf)
    else:
        scores = uniform_filter(scores, NEIGHBOURHOOD, mode="constant")
    return tuple(int(index) for index in np.unravel_index(np.argmax(scores), scores.shape))


def draw_overlay(
    target: Path,
    scan: Volume,
    brain: np.ndarray,
    scores: np.ndarray,
    *,
    title: str,
    threshold: float | None,
    components: np.ndarray | None = None,
    lesion: np.ndarray | None = None,
) -> Path:
    """Draw an anomaly map on the scan.

    Parameters
    ----------
    target : pathlib.Path
        SVG file to write.
    scan : Volume
        Scaled to [0, 1], RAS+.
    brain : numpy.ndarray of bool
        Brain mask, on the grid of `scan` as all following arrays.
    scores : numpy.ndarray
        Anomaly map.
    title : str
        Title of the figure.
    threshold : float or None
        Fixed threshold, whose contour is drawn.
    components : numpy.ndarray of int, optional
        Labels of the components above the threshold.
    lesion : numpy.ndarray of bool, optional
        Ground truth.

    Returns
    -------
    pathlib.Path
        Path of the figure.
    """
    box = bounding_box(brain)
    shown, inside, heat = scan.crop(box), brain[box], np.where(brain[box], scores[box], 0)
    scale = ColourScale.of(heat[inside], threshold)
    focus = main_finding(heat, None if components is None else components[box])
    burden = np.maximum(heat - (scale.opaque if threshold is None else threshold), 0).sum(axis=(0, 1))
    selected, anomalous = select_slices(burden, *extent(inside, "axial"), COLUMNS * ROWS)
    planes = [[("axial", focus[2]), ("coronal", focus[1]), ("sagittal", focus[0])]]
    mosaic = [[("axial", k) for k in selected[at : at + COLUMNS]] for at in range(0, len(selected), COLUMNS)]

    upper = lay_out(planes, inside.shape, 12, 58, WIDTH - 24, label_room=24, gap=8)
    lower = lay_out(mosaic, inside.shape, 12, upper.bottom + 36, WIDTH - 24)
    canvas = Canvas(WIDTH, lower.bottom + 36, title, _HOVER)
    canvas.text(20, 34, title, 20, attributes='font-weight="bold"')
    background = to_grey(shown.data, 1.0)
    for grid in (upper, lower):
        canvas.grey(grid.picture(background), grid.x, grid.y, grid.scale)
    canvas.open_group('class="overlay"')
    heat_indices, palette = scale.indices(heat), scale.palette()
    for grid in (upper, lower):
        canvas.indexed(grid.picture(heat_indices), palette, grid.x, grid.y, grid.scale)
    entries = []
    if threshold is not None:
        for grid, width in ((upper, 1.7), (lower, 1.25)):
            canvas.lines(grid.contours(heat, threshold), THRESHOLD_COLOUR, width)
        entries.append(
            (THRESHOLD_COLOUR, "", f"fixed threshold \N{GREEK SMALL LETTER TAU} = {threshold:.3g}")
        )
    if lesion is not None:
        for grid, width in ((upper, 1.7), (lower, 1.25)):
            canvas.lines(grid.contours(lesion[box]), LESION_COLOUR, width)
        entries.append((LESION_COLOUR, "", "lesion (ground truth)"))
    canvas.close_group()
    upper.annotate(canvas, shown, 15)
    lower.annotate(canvas, shown, 12, set(anomalous))
    where = "the region with the highest mean score"
    if components is not None and components.any():
        where = "the highest score of the largest component"
    canvas.text(
        20, upper.bottom + 20, f"Top: three planes through {where}. Bottom: axial slices", 13, "start", MUTED
    )
    if anomalous:
        canvas.text(
            WIDTH - 20, upper.bottom + 20, "slices with the largest anomalies", 13, "end", 'fill="#ffb454"'
        )
    _colour_bar(canvas, scale, palette, threshold)
    legend(canvas, canvas.height - 13, entries)
    return canvas.save(target)


def _colour_bar(canvas: Canvas, scale: ColourScale, palette: np.ndarray, threshold: float | None) -> None:
    width, height, y = 280, 12, 17
    x = WIDTH - width - 80
    place = f'x="{x}" y="{y}" width="{width}" height="{height}"'
    canvas.raw(f'<svg {place} viewBox="0 0 255 1" preserveAspectRatio="none">')
    canvas.indexed(np.arange(1, 256, dtype=np.uint8)[None, :], palette, 0, 0, 1)
    canvas.raw("</svg>")
    canvas.raw(f'<rect {place} fill="none" stroke="#9aa0a6" stroke-width=".8"/>')
    low, high = f"{scale.low:.3g}", f"{scale.high:.3g}"
    canvas.text(x - 8, y + 11, low, 13, "end", MUTED)
    canvas.text(x + width + 8, y + 11, high, 13, "start", MUTED)
    canvas.text(x - 8 - 8 * len(low) - 8, y + 11, "anomaly score", 14, "end")
    if threshold is not None:
        at = x + width * (threshold - scale.low) / (scale.high - scale.low)
        canvas.raw(f'<path d="M{at:.1f} {y - 4}v{height + 8}" stroke="#fff" stroke-width="2"/>')
        canvas.text(at, y + height + 18, f"\N{GREEK SMALL LETTER TAU} = {threshold:.3g}", 13, "middle")
