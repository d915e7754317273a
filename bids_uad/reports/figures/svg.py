"""SVG canvas for slices: embedded images with vector lines and text on top."""

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
    """SVG drawing of a given size in user units.

    Parameters
    ----------
    width, height : float
        Size in user units.
    title : str
        Accessible name, read by screen readers.
    style : str, default=""
        Additional CSS.
    background, ink : str
        Colours of the background and of text without a colour of its own.
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
        # nireports removes widths and heights from the line of the opening tag: nothing else may stand there.
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
            'preserveAspectRatio="xMidYMid meet" role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>text{{font-family:{FONT}}}text:not([fill]){{fill:{ink}}}{style}</style>",
            f'<rect width="{width:.0f}" height="{height:.0f}" rx="8" fill="{background}"/>',
        ]

    def open_group(self, attributes: str = "") -> None:
        """Start a group with the given attributes."""
        self._parts.append(f"<g {attributes}>")

    def close_group(self) -> None:
        """End the group that was opened last."""
        self._parts.append("</g>")

    def raw(self, markup: str) -> None:
        """Add SVG markup unchanged."""
        self._parts.append(markup)

    def grey(self, pixels: np.ndarray, x: float, y: float, scale: float) -> None:
        """Draw an 8-bit grey image, shape (rows, columns)."""
        self.embed(Image.fromarray(pixels, mode=None), x, y, scale)

    def indexed(self, pixels: np.ndarray, palette: np.ndarray, x: float, y: float, scale: float) -> None:
        """Draw an 8-bit indexed image; `palette` is RGBA, shape (256, 4), uint8."""
        image = Image.fromarray(pixels).convert("P")
        image.putpalette(palette[:, :3].tobytes())
        image.info["transparency"] = palette[:, 3].tobytes()
        self.embed(image, x, y, scale)

    def embed(self, image: Image.Image, x: float, y: float, scale: float, kind: str = "png") -> None:
        """Embed an image as `png` (lossless) or `jpeg` (smaller)."""
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
        """Draw a path with a dark border, so that it is visible on bright and dark background."""
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
        """Draw text with the baseline at `y`."""
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" text-anchor="{anchor}" {attributes}>'
            f"{escape(words)}</text>"
        )

    def render(self) -> str:
        """Return the drawing as an SVG element, which is also a complete SVG file."""
        return "\n".join([*self._parts, "</svg>", ""])

    def save(self, target: Path) -> Path:
        """Write the drawing to `target` atomically and return the path."""
        return write_text(target, self.render())


def contour(tile: np.ndarray, level: float, x: float, y: float, scale: float) -> str:
    """Return the SVG path of the contour of an image drawn at (x, y).

    Parameters
    ----------
    tile : numpy.ndarray, two-dimensional
        Image in display orientation, row 0 on top.
    level : float
        Level of the contour. The image is padded with zeros, so that contours are closed.
    x, y : float
        Upper left corner of the image.
    scale : float
        Size of a pixel in user units.

    Returns
    -------
    str
        Path data; empty without values above the level.
    """
    padded = np.pad(tile.astype(np.float64), 1)
    if not (padded > level).any():
        return ""
    commands = []
    for line in contourpy.contour_generator(z=padded).lines(level):
        # Values are at pixel centres; the padding is one pixel.
        points = np.round((line - 0.5) * scale + (x, y), 1)
        steps = np.round(np.diff(points, axis=0), 1)
        start = f"M{points[0, 0]:g} {points[0, 1]:g}l"
        commands.append(start + _join(f"{dx:g} {dy:g}" for dx, dy in steps))
    return "".join(commands)


def _join(pairs: Iterable[str]) -> str:
    return " ".join(pairs).replace(" -", "-")
