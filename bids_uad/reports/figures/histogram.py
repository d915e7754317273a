"""Histogram of the scores with the threshold, drawn from the counts of the histogram table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from bids_uad.files import atomic_path

BINS = 120
NONLESION_COLOUR, LESION_COLOUR, THRESHOLD_COLOUR = "#4d6a8a", "#d55e00", "#1a1a1a"


@dataclass(frozen=True)
class ScoreCounts:
    """Number of voxels per score bin.

    Attributes
    ----------
    edges : numpy.ndarray, shape (n + 1,)
        Increasing; the last may be infinite.
    nonlesion : numpy.ndarray, shape (n,)
        Brain voxels outside of lesions; all brain voxels without a lesion mask.
    lesion : numpy.ndarray, shape (n,), or None
        Lesion voxels; None without a lesion mask.
    """

    edges: np.ndarray
    nonlesion: np.ndarray
    lesion: np.ndarray | None

    @classmethod
    def read(cls, path: Path) -> ScoreCounts:
        """Read a `_histogram.tsv`."""
        table = pd.read_csv(path, sep="\t", na_values="n/a", keep_default_na=False)
        edges = np.append(table["score_lower"].to_numpy(float), float(table["score_upper"].iloc[-1]))
        lesion = None if table["n_lesion"].isna().any() else table["n_lesion"].to_numpy(float)
        return cls(edges, table["n_nonlesion"].to_numpy(float), lesion)

    @property
    def pooled(self) -> ScoreCounts:
        """Counts of all brain voxels, as without a lesion mask."""
        return ScoreCounts(self.edges, self.nonlesion + (0 if self.lesion is None else self.lesion), None)


def rebin(edges: np.ndarray, counts: np.ndarray, onto: np.ndarray) -> np.ndarray:
    """Compute the fraction of voxels in other bins, assuming uniform scores within each bin.

    Parameters
    ----------
    edges : numpy.ndarray, shape (n + 1,)
        Increasing bin edges; voxels of an infinite last bin count in the total only.
    counts : numpy.ndarray, shape (n,)
        Voxels per bin.
    onto : numpy.ndarray, shape (m + 1,)
        Edges of the new bins.

    Returns
    -------
    numpy.ndarray, shape (m,)
        Fractions of ``counts.sum()``; zeros if this is zero.
    """
    finite = np.isfinite(edges)
    cumulative = np.concatenate([[0.0], np.cumsum(counts)])[finite]
    total = max(float(counts.sum()), 1.0)
    return np.diff(np.interp(onto, edges[finite], cumulative)) / total


def display_edges(counts: ScoreCounts, threshold: float | None) -> np.ndarray:
    """Return evenly spaced bin edges over the range of the scores and the threshold."""
    used = np.flatnonzero(counts.pooled.nonlesion)
    finite = counts.edges[np.isfinite(counts.edges)]
    if not used.size:
        return np.linspace(finite[0], finite[-1], BINS + 1)
    low = counts.edges[used[0]]
    high = finite[min(used[-1] + 1, len(finite) - 1)]
    if threshold is not None:
        low, high = min(low, threshold), max(high, 1.1 * threshold)
    return np.linspace(low, high if high > low else low + 1, BINS + 1)


def draw_histogram(
    target: Path, counts: ScoreCounts, *, threshold: float | None, threshold_name: str
) -> Path:
    """Draw the distribution of the scores in the brain.

    Parameters
    ----------
    target : pathlib.Path
        SVG file to write.
    counts : ScoreCounts
        Histogram of the scores.
    threshold : float or None
        Fixed threshold, drawn as a line.
    threshold_name : str
        How it was fixed, in words.

    Returns
    -------
    pathlib.Path
        Path of the figure.
    """
    edges = display_edges(counts, threshold)
    figure = Figure(figsize=(12, 3.3))
    axes = figure.add_axes((0.085, 0.15, 0.905, 0.74))
    series = [
        ("brain" if counts.lesion is None else "brain outside lesions", counts.nonlesion, NONLESION_COLOUR)
    ]
    if counts.lesion is not None:
        series.append(("lesion (ground truth)", counts.lesion, LESION_COLOUR))
    drawn = []
    for label, values, colour in series:
        fraction = rebin(counts.edges, values, edges)
        drawn.append(fraction)
        name = f"{label}, n = {int(values.sum()):,}"
        axes.stairs(fraction, edges, fill=True, color=colour, alpha=0.28)
        axes.stairs(fraction, edges, color=colour, linewidth=1.6, label=name)
    positive = np.concatenate(drawn)
    positive = positive[positive > 0]
    if positive.size:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(max(positive.min() * 0.7, 2e-6), min(positive.max() * 2.2, 1.5))
    if threshold is not None:
        axes.axvline(
            threshold,
            color=THRESHOLD_COLOUR,
            linewidth=1.5,
            linestyle=(0, (5, 2.5)),
            label=f"fixed threshold \N{GREEK SMALL LETTER TAU} = {threshold:.3g} ({threshold_name})",
        )
    axes.set(xlabel="anomaly score", ylabel="fraction of voxels per bin", xlim=(edges[0], edges[-1]))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#000000", alpha=0.08)
    axes.legend(frameon=False, fontsize=8.5, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderpad=0)
    settings = {"svg.fonttype": "none", "svg.hashsalt": "bids_uad", "font.family": "sans-serif"}
    with matplotlib.rc_context(settings), atomic_path(target) as temporary:
        FigureCanvasSVG(figure).print_svg(temporary, metadata={"Date": None})
    return target
