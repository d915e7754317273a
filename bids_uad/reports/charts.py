"""Canvas of the charts of the group report: matplotlib figures as inline SVG with tooltips and links."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from bids_uad.methods.registry import detector_name
from bids_uad.reports.group_text import number

WIDTH = 1080
"""Width of every chart in pixels of 1/72 inch, so that sizes in points are sizes in pixels."""
INK, MUTED, GRID, PAPER = "#1b2733", "#5b6875", "#e3e8ed", "#ffffff"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
DASHES = (0, (4, 3))
ALPHA = 0.05
"""Significance level."""
MAX_DOTS = 300
"""Maximum number of scans of a detector that are drawn as dots."""
WIDE_LOG_RANGE = 1e4
"""Ratio of the limits above which logarithmic axes are labelled with powers of ten."""

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 12,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 12,
    "axes.titlesize": 14,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "xtick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 12.5,
}
_styled = matplotlib.rc_context(_STYLE)
_GEOMETRY = re.compile(r" (?:d|x|y|width|height|transform)=\"[^\"]*\"")
_DECIMALS = re.compile(r"-?\d+\.\d{3,}")
_MARKER = re.compile(r"<use [^>]*/>")


Key = tuple[str, str]
"""Detector and modality."""


@dataclass(frozen=True)
class Chart:
    """One chart and the text around it.

    Parameters
    ----------
    name : str
        Name of its file, without extension.
    title, caption : str
        Heading and text above the chart.
    svg : str
        SVG element, which is also a complete SVG file.
    """

    name: str
    title: str
    caption: str
    svg: str

    def of_modality(self, modality: str) -> Chart:
        """Return the chart with the modality in its name and title."""
        return replace(self, name=f"{self.name}_{modality}", title=f"{self.title}: {modality}")


class ChartCanvas:
    """A figure of fixed width that is filled panel by panel; positions are pixels from the upper left corner.

    Parameters
    ----------
    height : float
        Height in pixels.
    label : str
        Accessible name, read by screen readers.
    """

    def __init__(self, height: float, label: str) -> None:
        self.height = height
        self._label = label
        self._figure = Figure(figsize=(WIDTH / 72, height / 72))
        self._tooltips: dict[str, list[tuple[str, str]]] = {}

    @_styled
    def panel(
        self, left: float, top: float, width: float, height: float, *, grid: str = "y", **labels: str
    ) -> Axes:
        """Add a panel.

        Parameters
        ----------
        left, top, width, height : float
            Data area of the panel in pixels.
        grid : str, default="y"
            Axis whose grid lines are drawn.
        **labels : str
            ``title``, ``xlabel`` and ``ylabel``.

        Returns
        -------
        matplotlib.axes.Axes
        """
        bottom = self.height - top - height
        box = (left / WIDTH, bottom / self.height, width / WIDTH, height / self.height)
        axes = self._figure.add_axes(box)
        axes.set(**labels)
        axes.grid(axis=grid)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
            axis.set_major_formatter(lambda value, _: number(value))
        return axes

    @_styled
    def rows(self, left: float, top: float, width: float, row_height: float, n_rows: int) -> Axes:
        """Add a panel of rows, whose y axis runs downwards and is measured in pixels from its top.

        Parameters
        ----------
        left, top, width, row_height : float
            In pixels.
        n_rows : int
            Number of rows.

        Returns
        -------
        matplotlib.axes.Axes
        """
        height = row_height * n_rows
        axes = self.panel(left, top, width, height, grid="x")
        axes.set_ylim(height, 0)
        axes.set_yticks([])
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(axis="x", length=0, pad=6)
        return axes

    @_styled
    def markers(
        self,
        axes: Axes,
        x: Sequence[float] | np.ndarray,
        y: Sequence[float] | np.ndarray,
        colour: str | Sequence[str],
        *,
        radius: float = 4.2,
        tips: Sequence[str] = (),
        links: Sequence[str] = (),
        hollow: bool = False,
        opacity: float = 1.0,
        marker: str = "o",
    ) -> None:
        """Draw markers with tooltips and links.

        Parameters
        ----------
        axes : matplotlib.axes.Axes
            Panel to draw on.
        x, y : sequence of float, shape (n,)
            Finite data coordinates.
        colour : str or sequence of str
            Colour of all or of each marker.
        radius : float, default=4.2
            Radius in pixels.
        tips, links : sequence of str, shape (n,) or empty
            Tooltip and link target of each marker; empty strings for none.
        hollow : bool, default=False
            Whether only the outline is drawn.
        opacity : float, default=1
            Opacity between 0 and 1.
        marker : str, default="o"
            Shape, see `matplotlib.markers`.
        """
        name = f"markers{len(self._tooltips)}"
        n = len(x)
        self._tooltips[name] = list(zip(tips or [""] * n, links or [""] * n, strict=True))
        axes.scatter(
            x,
            y,
            s=(2 * radius) ** 2,
            marker=marker,
            facecolors=PAPER if hollow else colour,
            edgecolors=colour if hollow else PAPER,
            linewidths=1.4 if hollow else 0.7,
            alpha=opacity,
            clip_on=False,
            zorder=3,
            gid=name,
        )

    @_styled
    def text(self, x: float, y: float, words: str, **options: Any) -> None:
        """Write a line of text with its baseline at (x, y), in pixels; `options` go to matplotlib's text."""
        self._figure.text(x / WIDTH, 1 - y / self.height, words, **options)

    @_styled
    def line(self, x: tuple[float, float], y: tuple[float, float], **options: Any) -> None:
        """Draw a straight line between two points, in pixels; `options` go to `matplotlib.lines.Line2D`."""
        ends = [value / WIDTH for value in x], [1 - value / self.height for value in y]
        self._figure.add_artist(Line2D(*ends, transform=self._figure.transFigure, **options))

    @_styled
    def legend(self, handles: Sequence[Any]) -> None:
        """Put a legend in the middle of the lower edge."""
        self._figure.legend(
            handles=handles,
            loc="lower center",
            ncols=len(handles),
            borderaxespad=0.2,
            handletextpad=0.4,
            columnspacing=1.4,
        )

    @_styled
    def svg(self) -> str:
        """Return the drawing as an SVG element; the same content gives the same text."""
        buffer = io.StringIO()
        with matplotlib.rc_context({"svg.hashsalt": self._label}):
            FigureCanvasSVG(self._figure).print_svg(buffer, metadata={"Date": None})
        text = buffer.getvalue()
        text = text[text.index("<svg") :].strip()
        text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        text = re.sub(r"'DejaVu Sans'[^;\"]*", escape(FONT, quote=False), text)
        for name, notes in self._tooltips.items():
            text = _with_tooltips(text, name, notes)
        text = _GEOMETRY.sub(lambda match: _DECIMALS.sub(_to_hundredths, match[0]), _without_unused_ids(text))
        size = f'width="{WIDTH}" height="{self.height:g}" role="img" aria-label="{escape(self._label)}"'
        text = re.sub(r'width="[^"]*pt" height="[^"]*pt"', size, text, count=1)
        text = re.sub(r'(<svg [^>]*)height="[\d.]+pt"', r"\1", text, count=1)
        head, body = text.split(">", 1)
        return f"{head}>\n <title>{escape(self._label)}</title>{body}"


def _to_hundredths(match: re.Match[str]) -> str:
    """Round a coordinate to hundredths of a pixel, which halves the size of a chart."""
    return f"{float(match[0]):.2f}"


def _with_tooltips(text: str, group: str, notes: Sequence[tuple[str, str]]) -> str:
    """Add tooltips and links to the markers of one group, in the order in which they were drawn."""
    start = text.index(f'<g id="{group}"')
    end = text.find('<g id="', start + 1)
    part, waiting = text[start : None if end < 0 else end], iter(notes)

    def annotate(match: re.Match[str]) -> str:
        tip, link = next(waiting)
        mark = match[0]
        if tip:
            mark = f"{mark.removesuffix('/>')}><title>{escape(tip)}</title></use>"
        return f'<a href="{escape(link)}">{mark}</a>' if link else mark

    part = _MARKER.sub(annotate, part)
    if next(waiting, None) is not None:
        raise RuntimeError(f"matplotlib drew fewer markers than there are notes in {group}")
    return text[:start] + part + ("" if end < 0 else text[end:])


def _without_unused_ids(text: str) -> str:
    """Remove unused identifiers, which could occur in several charts of one page."""
    used = set(re.findall(r"(?:href=\"|url\()#([^\")]+)", text))
    return re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in used else "", text)


def log_axis(axes: Axes, which: str, low: float, high: float, ticks: int = 5) -> None:
    """Make an axis logarithmic, with powers of ten or round values as ticks.

    Parameters
    ----------
    axes : matplotlib.axes.Axes
        Panel.
    which : {"x", "y"}
        Axis to change.
    low, high : float
        Limits, both > 0.
    ticks : int, default=5
        Approximate maximum number of labelled ticks.
    """
    axis = getattr(axes, f"{which}axis")
    axes.set(**{f"{which}scale": "log", f"{which}lim": (low, high)})
    decades = np.log10(high / low)
    axis.set_major_locator(LogLocator(subs=(1.0,) if decades > 2 else (1.0, 2.0, 5.0), numticks=ticks))
    axis.set_minor_locator(NullLocator())
    if high / low > WIDE_LOG_RANGE:
        axis.set_major_formatter(lambda value, _: power_of_ten(value))
    else:
        axis.set_major_formatter(lambda value, _: number(value))


def power_of_ten(value: float) -> str:
    """Format a power of ten with a superscript exponent."""
    raised = str(round(np.log10(value))).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return "1" if value == 1 else f"10{raised}"


def round_up(value: float) -> float:
    """Return the next round number at or above `value` (> 0), as the limit of an axis."""
    size = 10.0 ** np.floor(np.log10(value))
    steps = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)
    return float(next(factor * size for factor in steps if factor * size >= value * 0.9999))


def dot_handle(label: str, colour: str) -> Line2D:
    """Return a legend entry with a dot."""
    return Line2D([], [], marker="o", linestyle="none", color=colour, markersize=9, label=label)


def detector_handles(detectors: pd.Series, colours: dict[str, str]) -> list[Line2D]:
    """Return the legend entries of the detectors in a column."""
    return [dot_handle(detector_name(detector), colours[detector]) for detector in sorted(set(detectors))]


def modality_panels(
    modalities: Sequence[str],
    height: float,
    margin: float,
    label: str,
    draw: Callable[[ChartCanvas, Axes, str], None],
    **labels: str,
) -> ChartCanvas:
    """Draw one panel per modality side by side; a single panel is centred.

    Parameters
    ----------
    modalities : sequence of str
        Modalities, in the order of the panels.
    height : float
        Height of the data area in pixels.
    margin : float
        Space below it in pixels.
    label : str
        Accessible name of the chart.
    draw : callable
        Function that fills the panel of a modality: ``draw(canvas, axes, modality)``.
    **labels : str
        ``xlabel`` and ``ylabel``.

    Returns
    -------
    ChartCanvas
    """
    canvas = ChartCanvas(40 + height + margin, label)
    width = WIDTH / 2 if len(modalities) > 1 else 720
    offset = 0 if len(modalities) > 1 else (WIDTH - width) / 2
    for index, modality in enumerate(modalities):
        left = offset + index * width + 62
        axes = canvas.panel(left, 40, width - 84, height, title=modality, **labels)
        draw(canvas, axes, modality)
    return canvas


def detector_panels(
    keys: Iterable[Key],
    top: float,
    height: float,
    below: float,
    label: str,
    draw: Callable[[ChartCanvas, Axes, Key, tuple[float, float]], None],
    *,
    legend: float = 0,
    left: float = 62,
    **labels: str,
) -> ChartCanvas:
    """Draw one panel per detector and modality, two in a row, sorted by modality.

    Parameters
    ----------
    keys : iterable of (str, str)
        Detector and modality of each panel.
    top, height, below : float
        Space above the data area, its height, and the space below it, in pixels.
    label : str
        Accessible name of the chart.
    draw : callable
        Function that fills a panel: ``draw(canvas, axes, key, corner)``, with the upper left corner of the
        panel in pixels.
    legend : float, default=0
        Space for a legend below all panels, in pixels.
    left : float, default=62
        Space to the left of each data area, in pixels.
    **labels : str
        ``xlabel`` and ``ylabel``.

    Returns
    -------
    ChartCanvas
    """
    keys = sorted(keys, key=lambda key: key[::-1])
    step = top + height + below
    canvas = ChartCanvas(-(-len(keys) // 2) * step + legend, label)
    for index, key in enumerate(keys):
        x = (index % 2) * WIDTH / 2 if len(keys) > 1 else WIDTH / 4
        y = (index // 2) * step
        axes = canvas.panel(x + left, y + top, WIDTH / 2 - 22 - left, height, **labels)
        title = f"{detector_name(key[0])} · {key[1]}"
        canvas.text(x + 62, y + 20, title, fontsize=14, fontweight="bold")
        draw(canvas, axes, key, (x + 62, y))
    return canvas
