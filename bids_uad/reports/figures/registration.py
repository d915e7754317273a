"""Registration figure: scan and reference image alternate on hovering."""

from __future__ import annotations

from pathlib import Path
from textwrap import shorten

import numpy as np

from bids_uad.reports.figures.display import (
    CONVENTION,
    Volume,
    bounding_box,
    even_slices,
    to_grey,
)
from bids_uad.reports.figures.svg import Canvas
from bids_uad.reports.figures.tiles import MUTED, Grid, lay_out

WIDTH = 1280
HINT = 310
"""Width in pixels that the title leaves free at the right."""
TITLE_LENGTH = 84
# Sagittal slices are wider, so that fewer fill a row.
SLICES_PER_ROW = {"axial": 8, "coronal": 8, "sagittal": 6}
REFERENCE_COLOUR = "#56b4e9"
_FLICKER = """
.moving{animation:swap 1.6s steps(1) infinite;animation-play-state:paused}
svg:hover .moving{animation-play-state:running}
@keyframes swap{0%{opacity:1}50%{opacity:0}100%{opacity:1}}
"""


def three_plane_grid(brain: np.ndarray, top: float) -> Grid:
    """Lay out rows of axial, coronal and sagittal slices, evenly spaced over a brain mask."""
    rows = [
        [(name, index) for index in even_slices(brain, name, number)]
        for name, number in SLICES_PER_ROW.items()
    ]
    return lay_out(rows, brain.shape, 12, top, WIDTH - 24)


def draw_registration(
    target: Path,
    scan: Volume,
    reference: Volume,
    reference_brain: np.ndarray,
    *,
    scan_name: str,
    reference_name: str,
) -> Path:
    """Draw scan and reference in one figure.

    Parameters
    ----------
    target : pathlib.Path
        SVG file to write.
    scan, reference : Volume
        Images on the same grid, RAS+.
    reference_brain : numpy.ndarray of bool
        Brain mask of the reference, whose outline is drawn on both.
    scan_name, reference_name : str
        Names in the title.

    Returns
    -------
    pathlib.Path
        Path of the figure.
    """
    box = bounding_box(reference_brain | (scan.data > 0))
    outline = reference_brain[box]
    moving, fixed = scan.crop(box), reference.crop(box)
    grid = three_plane_grid(outline, 52)
    canvas = Canvas(WIDTH, grid.bottom + 34, f"Registration of {scan_name} to {reference_name}", _FLICKER)
    upper = float(np.percentile(fixed.data[outline], 99.5)) if outline.any() else float(fixed.data.max())
    canvas.grey(grid.picture(to_grey(fixed.data, upper)), grid.x, grid.y, grid.scale)
    words = shorten(f"Reference: {reference_name}", TITLE_LENGTH, placeholder=" …")
    canvas.text(20, 32, words, 19, attributes='font-weight="bold"')
    canvas.open_group('class="moving"')
    canvas.raw(f'<rect x="0" y="8" width="{WIDTH - HINT}" height="36" fill="#000"/>')
    canvas.grey(grid.picture(to_grey(moving.data, 1.0)), grid.x, grid.y, grid.scale)
    canvas.text(20, 32, f"Scan: {scan_name}", 19, attributes='font-weight="bold"')
    canvas.close_group()
    canvas.lines(grid.contours(outline), REFERENCE_COLOUR, 1.1)
    grid.annotate(canvas, moving, 12)
    canvas.text(WIDTH - 20, 32, "Hover to alternate", 14, "end", MUTED)
    legend(canvas, canvas.height - 13, [(REFERENCE_COLOUR, "", "brain of the reference")])
    return canvas.save(target)


def legend(canvas: Canvas, y: float, entries: list[tuple[str, str, str]]) -> None:
    """Draw legend entries (colour, dash pattern, text) on the left and the orientation on the right."""
    x = 20.0
    for colour, dash, words in entries:
        canvas.lines(f"M{x:g} {y - 4:g}h30", colour, 2.4, dash)
        canvas.text(x + 38, y, words, 13)
        x += 38 + 7.0 * len(words) + 26
    canvas.text(WIDTH - 20, y, CONVENTION, 13, "end", MUTED)
