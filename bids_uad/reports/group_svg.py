"""Plain SVG: scales, ticks and shapes, enough for the figures of the group report."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

INK, MUTED, GRID, PAPER = "#1b2733", "#5b6875", "#e3e8ed", "#ffffff"
FONT = "system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif"


def number(value: float, digits: int = 3) -> str:
    """Write a number with `digits` significant digits, without a trailing point or zeros."""
    if not math.isfinite(value):
        return "n/a"
    if value == 0:
        return "0"
    if abs(value) >= 10**digits:
        return f"{value:,.0f}"
    if abs(value) < 1e-4:
        mantissa, exponent = f"{value:.{max(digits - 2, 0)}e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


@dataclass(frozen=True)
class Linear:
    """A linear scale from data (`low`, `high`) to pixels (`start`, `stop`)."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        """Place one value, in pixels."""
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Return about `count` round values within the scale."""
        step = _round_step((self.high - self.low) / count)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(index * step, 12) for index in range(first, last + 1)]


@dataclass(frozen=True)
class Log:
    """A base-10 logarithmic scale from data (`low`, `high`, both > 0) to pixels."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        """Place one value, in pixels; what is below the scale is put at its lower end."""
        share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.stop - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Return powers of ten within the scale, at most about `count`, or round steps."""
        first = math.ceil(math.log10(self.low) - 1e-9)
        last = math.floor(math.log10(self.high) + 1e-9)
        stride = max(1, math.ceil((last - first + 1) / count))
        powers = [10.0**power for power in range(first, last + 1, stride)]
        if len(powers) > 1:
            return powers
        finer = [factor * 10.0**power for power in range(first - 1, last + 1) for factor in (1, 2, 5)]
        return [value for value in finer if self.low <= value <= self.high]


Scale = Linear | Log


def _round_step(step: float) -> float:
    size = 10.0 ** math.floor(math.log10(step))
    return next(factor * size for factor in (1, 2, 2.5, 5, 10) if factor * size >= step * 0.999)


def round_up(value: float) -> float:
    """Return a round number not below `value` (> 0), for the end of an axis."""
    size = 10.0 ** math.floor(math.log10(value))
    steps = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)
    return next(factor * size for factor in steps if factor * size >= value * 0.9999)


class Svg:
    """An SVG drawing that is filled shape by shape.

    Parameters
    ----------
    width, height : float
        Size in pixels; the drawing shrinks with the page.
    title : str
        What a screen reader says.
    """

    def __init__(self, width: float, height: float, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self._parts: list[str] = []

    def line(
        self,
        x1: float,
        y1: float,
        x2: float,
        y2: float,
        colour: str = GRID,
        width: float = 1,
        dash: str = "",
    ) -> None:
        """Draw a straight line."""
        extra = f' stroke-dasharray="{dash}"' if dash else ""
        self._parts.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
            f'stroke-width="{width}"{extra}/>'
        )

    def path(
        self,
        points: Iterable[Sequence[float]],
        colour: str,
        width: float = 2,
        fill: str = "none",
        opacity: float = 1,
        dash: str = "",
    ) -> None:
        """Draw a line through `points`; filled, without an outline, if `fill` is a colour."""
        coordinates = "L".join(f"{x:.1f},{y:.1f}" for x, y in points)
        if not coordinates:
            return
        stroke = (
            f'stroke="{colour}" stroke-width="{width}" stroke-linejoin="round"'
            if fill == "none"
            else f'stroke="none" fill-opacity="{opacity}"'
        )
        extra = f' stroke-dasharray="{dash}"' if dash else ""
        self._parts.append(f'<path d="M{coordinates}" fill="{fill}" {stroke}{extra}/>')

    def rect(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str,
        opacity: float = 1,
        radius: float = 0,
    ) -> None:
        """Draw a filled rectangle."""
        self._parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'fill="{fill}" fill-opacity="{opacity}" rx="{radius}"/>'
        )

    def dot(
        self,
        x: float,
        y: float,
        radius: float,
        colour: str,
        *,
        hollow: bool = False,
        opacity: float = 1,
        tip: str = "",
        href: str = "",
    ) -> None:
        """Draw a circle, with a text on hovering and a link if asked for."""
        fill = PAPER if hollow else colour
        edge = colour if hollow else PAPER
        inner = f"<title>{escape(tip)}</title>" if tip else ""
        circle = (
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{fill}" stroke="{edge}" '
            f'stroke-width="{1.4 if hollow else 0.7}" opacity="{opacity}">{inner}</circle>'
        )
        self._parts.append(f'<a href="{escape(href)}">{circle}</a>' if href else circle)

    def diamond(self, x: float, y: float, size: float, fill: str, tip: str = "") -> None:
        """Draw a small diamond."""
        inner = f"<title>{escape(tip)}</title>" if tip else ""
        self._parts.append(
            f'<path d="M{x:.1f},{y - size:.1f}l{size},{size}l-{size},{size}l-{size},-{size}z" '
            f'fill="{fill}" stroke="{PAPER}" stroke-width="0.8">{inner}</path>'
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 12,
        colour: str = INK,
        anchor: str = "start",
        weight: int = 400,
        rotate: float = 0,
        href: str = "",
    ) -> None:
        """Write one line of text, with a link if asked for; `y` is its baseline."""
        turn = f' transform="rotate({rotate} {x:.1f} {y:.1f})"' if rotate else ""
        words = (
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}" '
            f'text-anchor="{anchor}" font-weight="{weight}"{turn}>{escape(text)}</text>'
        )
        self._parts.append(f'<a href="{escape(href)}">{words}</a>' if href else words)

    def image(self, x: float, y: float, width: float, height: float, data: bytes, kind: str) -> None:
        """Embed a picture; `kind` is `png` or `jpeg`."""
        coded = base64.b64encode(data).decode("ascii")
        self._parts.append(
            f'<image x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'href="data:image/{kind};base64,{coded}"/>'
        )

    def outline(self, path: str, colour: str, width: float) -> None:
        """Stroke path data with a dark rim, so that it reads on bright and on dark; nothing if empty."""
        if path:
            common = f'd="{path}" fill="none" stroke-linejoin="round"'
            rim = f'stroke="#000" stroke-opacity="0.55" stroke-width="{2.1 * width:.2f}"'
            self._parts.append(
                f'<path {common} {rim}/><path {common} stroke="{colour}" stroke-width="{width}"/>'
            )

    def open(self, tag: str) -> None:
        """Begin an element; `tag` is its name and attributes."""
        self._parts.append(f"<{tag}>")

    def close(self, name: str) -> None:
        """End the element that was begun last."""
        self._parts.append(f"</{name}>")

    def axes(
        self,
        x: Scale,
        y: Scale,
        *,
        xlabel: str,
        ylabel: str,
        xticks: int = 5,
        yticks: int = 5,
    ) -> None:
        """Draw grid, ticks and labels of a panel whose y scale runs from bottom to top."""
        for value in y.ticks(yticks):
            self.line(x.start, y(value), x.stop, y(value))
            self.text(x.start - 7, y(value) + 4, tick_text(value, y), size=11, colour=MUTED, anchor="end")
        for value in x.ticks(xticks):
            self.line(x(value), y.start, x(value), y.start + 4, MUTED)
            label = tick_text(value, x)
            self.text(x(value), y.start + 17, label, size=11, colour=MUTED, anchor="middle")
        self.line(x.start, y.start, x.stop, y.start, MUTED)
        middle = (x.start + x.stop) / 2
        self.text(middle, y.start + 35, xlabel, size=12, colour=MUTED, anchor="middle")
        height = (y.start + y.stop) / 2
        left = x.start - 44
        self.text(left, height, ylabel, size=12, colour=MUTED, anchor="middle", rotate=-90)

    def render(self) -> str:
        """Return the drawing as an SVG element that is also a whole SVG file."""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width:.0f} '
            f'{self.height:.0f}" width="{self.width:.0f}" height="{self.height:.0f}" role="img" '
            f'aria-label="{escape(self.title)}" font-family="{escape(FONT)}">'
            f"<title>{escape(self.title)}</title>"
            f'<rect width="100%" height="100%" fill="{PAPER}"/>{"".join(self._parts)}</svg>'
        )


def tick_text(value: float, scale: Scale) -> str:
    """Write the label of a tick; powers of ten where the scale spans many."""
    if isinstance(scale, Log) and scale.high / scale.low > 1e4:
        superscript = str(round(math.log10(value))).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return "1" if value == 1 else f"10{superscript}"
    return number(value)


def quartiles(values: np.ndarray) -> tuple[float, float, float, float, float]:
    """Return lower whisker, quartile, median, quartile and upper whisker of a box plot.

    Whiskers end at the outermost value within 1.5 interquartile ranges of the box.
    """
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    reach = 1.5 * (high - low)
    inside = values[(values >= low - reach) & (values <= high + reach)]
    return float(inside.min()), float(low), float(middle), float(high), float(inside.max())
