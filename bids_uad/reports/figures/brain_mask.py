"""Brain-mask figure: outlines of the brain masks of the scan and the reference on the scan."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bids_uad.reports.figures.display import Volume, bounding_box, to_grey
from bids_uad.reports.figures.registration import (
    REFERENCE_COLOUR,
    WIDTH,
    legend,
    three_plane_grid,
)
from bids_uad.reports.figures.svg import Canvas

BRAIN_COLOUR = "#e69f00"


def draw_brain_mask(
    target: Path, scan: Volume, brain: np.ndarray, reference_brain: np.ndarray | None, *, scan_name: str
) -> Path:
    """Draw the outline of the brain mask on the scan in SRI24 space.

    Parameters
    ----------
    target : pathlib.Path
        SVG file to write.
    scan : Volume
        Scaled to [0, 1], RAS+.
    brain : numpy.ndarray of bool
        Brain mask of the scan, same grid.
    reference_brain : numpy.ndarray of bool, optional
        Brain mask of the reference, same grid.
    scan_name : str
        Name of the scan in the title.

    Returns
    -------
    pathlib.Path
        Path of the figure.
    """
    box = bounding_box(brain if reference_brain is None else brain | reference_brain)
    shown, inside = scan.crop(box), brain[box]
    grid = three_plane_grid(inside, 52)
    canvas = Canvas(WIDTH, grid.bottom + 34, f"Brain mask of {scan_name}")
    canvas.text(20, 32, f"Brain mask: {scan_name}", 19, attributes='font-weight="bold"')
    canvas.grey(grid.picture(to_grey(shown.data, 1.0)), grid.x, grid.y, grid.scale)
    entries = [(BRAIN_COLOUR, "", "brain mask of the scan")]
    if reference_brain is not None:
        canvas.lines(grid.contours(reference_brain[box]), REFERENCE_COLOUR, 1.0, "3 2.5")
        entries.append((REFERENCE_COLOUR, "5 4", "brain of the reference"))
    canvas.lines(grid.contours(inside), BRAIN_COLOUR, 1.3)
    grid.annotate(canvas, shown, 12)
    legend(canvas, canvas.height - 13, entries)
    return canvas.save(target)
