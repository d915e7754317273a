"""A small SVG canvas: pixels stay pixels (embedded PNG), lines and words stay sharp."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from html import escape
from pathlib import Path

import contourpy
import numpy as np
from PIL import Image

from bids_uad.files import write_text

FONT = "Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"
JPEG_QUALITY = 80


class Canvas:
    """An SVG drawing of a given size in user units.

    Parameters
    ----------
    width, height : float
        Size of the drawing.
    title : str
        Accessible name of the figure.
    style : str
        Extra CSS.
    background, ink : str
        Colours of the ground and of text that names none.
    """

    def __init__(
        self,
        width: float,
        height: float,
        title: str,
        style: str = "",
        *,
        background: str = "#000",
        ink: str = "#e8eaed",
    ) -> None:
        self.width, self.height = width, height
        # The opening tag stays on a line of its own: nireports strips every width and height on that line.
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
            'preserveAspectRatio="xMidYMid meet" role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>text{{font-family:{FONT}}}text:not([fill]){{fill:{ink}}}{style}</style>",
            f'<rect width="{width:.0f}" height="{height:.0f}" rx="8" fill="{background}"/>',
        ]

    def open_group(self, attributes: str = "") -> None:
        """Start a group; `attributes` is written into the tag as it is."""
        self._parts.append(f"<g {attributes}>")

    def close_group(self) -> None:
        """End the group that was opened last."""
        self._parts.append("</g>")

    def raw(self, markup: str) -> None:
        """Add SVG markup as it is."""
        self._parts.append(markup)

    def grey(self, pixels: np.ndarray, x: float, y: float, scale: float) -> None:
        """Place an 8-bit grey image, shape (rows, columns)."""
        self.embed(Image.fromarray(pixels, mode=None), x, y, scale)

    def indexed(self, pixels: np.ndarray, palette: np.ndarray, x: float, y: float, scale: float) -> None:
        """Place an 8-bit indexed image; `palette` is RGBA, shape (256, 4), uint8."""
        image = Image.fromarray(pixels).convert("P")
        image.putpalette(palette[:, :3].tobytes())
        image.info["transparency"] = palette[:, 3].tobytes()
        self.embed(image, x, y, scale)

    def embed(self, image: Image.Image, x: float, y: float, scale: float, kind: str = "png") -> None:
        """Place a picture, coded as `png` (exact) or `jpeg` (smaller)."""
        buffer = io.BytesIO()
        options = {"compress_level": 9} if kind == "png" else {"quality": JPEG_QUALITY}
        image.save(buffer, format=kind, **options, **image.info)
        data = base64.b64encode(buffer.getvalue()).decode("ascii")
        self._parts.append(
            f'<image x="{x:.1f}" y="{y:.1f}" width="{image.width * scale:.1f}" '
            f'height="{image.height * scale:.1f}" href="data:image/{kind};base64,{data}"/>'
        )

    def rect(self, x: float, y: float, width: float, height: float, fill: str) -> None:
        """Draw a filled rectangle."""
        self._parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}"/>'
        )

    def lines(self, path: str, colour: str, width: float, dash: str = "") -> None:
        """Stroke a path with a dark rim, so that it reads on bright and on dark."""
        if not path:
            return
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        common = f'd="{path}" fill="none" stroke-linejoin="round"'
        self._parts.append(
            f'<path {common} stroke="#000" stroke-opacity=".55" stroke-width="{width * 2.1:.2f}"/>'
        )
        self._parts.append(f'<path {common} stroke="{colour}" stroke-width="{width:.2f}"{dashes}/>')

    def text(
        self, x: float, y: float, words: str, size: float, anchor: str = "start", attributes: str = ""
    ) -> None:
        """Write `words` with the baseline at `y`."""
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" text-anchor="{anchor}" {attributes}>'
            f"{escape(words)}</text>"
        )

    def render(self) -> str:
        """Return the drawing as an SVG element that is also a whole SVG file."""
        return "\n".join([*self._parts, "</svg>", ""])

    def save(self, target: Path) -> Path:
        """Write the drawing to `target` atomically and return it."""
        return write_text(target, self.render())


def contour(tile: np.ndarray, level: float, x: float, y: float, scale: float) -> str:
    """SVG path data of the iso-line of a picture placed at (x, y).

    Parameters
    ----------
    tile : numpy.ndarray, two-dimensional
        As displayed: row 0 on top.
    level : float
        Value of the line. The picture is padded with zeros, so lines always close.
    x, y : float
        Position of the picture's upper left corner.
    scale : float
        Size of a pixel.

    Returns
    -------
    str
        Empty if nothing crosses the level.
    """
    padded = np.pad(tile.astype(np.float64), 1)
    if not (padded > level).any():
        return ""
    commands = []
    for line in contourpy.contour_generator(z=padded).lines(level):
        # Value centres sit in the middle of a pixel, one pixel of padding away.
        points = np.round((line - 0.5) * scale + (x, y), 1)
        steps = np.round(np.diff(points, axis=0), 1)
        start = f"M{points[0, 0]:g} {points[0, 1]:g}l"
        commands.append(start + _join(f"{dx:g} {dy:g}" for dx, dy in steps))
    return "".join(commands)


def _join(pairs: Iterable[str]) -> str:
    return " ".join(pairs).replace(" -", "-")
