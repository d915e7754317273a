"""Layout of slices in a mosaic."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bids_uad.reports.figures.display import (
    EDGE_LABELS,
    Volume,
    plane,
    plane_label,
)
from bids_uad.reports.figures.svg import Canvas, contour

MUTED = 'fill="#9aa0a6"'


@dataclass(frozen=True)
class Tile:
    """Slice in a mosaic: plane, index along its normal, and position and size in pixels."""

    name: str
    index: int
    row: int
    column: int
    height: int
    width: int


@dataclass(frozen=True)
class Grid:
    """Mosaic of slices.

    Attributes
    ----------
    tiles : tuple of Tile
        The slices.
    height, width : int
        Size of the mosaic in pixels.
    x, y : float
        Upper left corner in canvas units.
    scale : float
        Canvas units per pixel.
    """

    tiles: tuple[Tile, ...]
    height: int
    width: int
    x: float
    y: float
    scale: float

    def picture(self, data: np.ndarray) -> np.ndarray:
        """Return the mosaic of a RAS+ array, shape (height, width)."""
        sheet = np.zeros((self.height, self.width), dtype=data.dtype)
        for tile in self.tiles:
            rows = slice(tile.row, tile.row + tile.height)
            sheet[rows, tile.column : tile.column + tile.width] = plane(data, tile.name, tile.index)
        return sheet

    def contours(self, data: np.ndarray, level: float = 0.5) -> str:
        """Return the SVG path of the contours in all slices, in canvas units."""
        return "".join(
            contour(plane(data, tile.name, tile.index), level, *self.corner(tile), self.scale)
            for tile in self.tiles
        )

    def corner(self, tile: Tile) -> tuple[float, float]:
        """Return the upper left corner of a slice in canvas units."""
        return self.x + tile.column * self.scale, self.y + tile.row * self.scale

    @property
    def bottom(self) -> float:
        """Lower edge in canvas units."""
        return self.y + self.height * self.scale

    def annotate(self, canvas: Canvas, volume: Volume, size: float, marked: set[int] = frozenset()) -> None:
        """Write world coordinates below and sides in the corners of all slices; `marked` ones in colour."""
        for tile in self.tiles:
            x, y = self.corner(tile)
            width, height = tile.width * self.scale, tile.height * self.scale
            accent = 'fill="#ffb454" font-weight="bold"' if tile.index in marked else MUTED
            words = plane_label(volume, tile.name, tile.index)
            canvas.text(x + width / 2, y + height + size, words, size, "middle", accent)
            left, right = EDGE_LABELS[tile.name]
            canvas.text(x + 2, y + size + 2, left, size, "start", MUTED)
            canvas.text(x + width - 2, y + size + 2, right, size, "end", MUTED)


def lay_out(
    rows: list[list[tuple[str, int]]],
    shape: tuple[int, int, int],
    x: float,
    y: float,
    width: float,
    *,
    label_room: float = 18,
    gap: int = 4,
) -> Grid:
    """Arrange rows of slices so that the widest row has the given width; slices are centred in equal cells.

    Parameters
    ----------
    rows : list of list of (plane, index)
        Slices of each row.
    shape : tuple of int
        Shape of the RAS+ array of the slices.
    x, y : float
        Upper left corner in canvas units.
    width : float
        Width in canvas units.
    label_room : float, default=18
        Height in canvas units for the coordinates below each row.
    gap : int, default=4
        Pixels between slices.

    Returns
    -------
    Grid
        Positions of the slices.
    """
    sizes = {"axial": (shape[1], shape[0]), "coronal": (shape[2], shape[0]), "sagittal": (shape[2], shape[1])}
    sheet_width = max(sum(sizes[name][1] + gap for name, _ in row) - gap for row in rows)
    scale = width / sheet_width
    tiles, top = [], 0
    for row in rows:
        height = max(sizes[name][0] for name, _ in row)
        used = sum(sizes[name][1] for name, _ in row)
        spare = (sheet_width - used) / len(row)
        edge = 0.0
        for name, index in row:
            tile_height, tile_width = sizes[name]
            tiles.append(
                Tile(
                    name,
                    index,
                    top + (height - tile_height) // 2,
                    int(edge + spare / 2),
                    tile_height,
                    tile_width,
                )
            )
            edge += tile_width + spare
        top += height + math.ceil(label_room / scale)
    return Grid(tuple(tiles), top, sheet_width, x, y, scale)
