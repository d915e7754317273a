"""Which part of a grid a scan has data for: its field of view, without margins that were filled in."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from bids_uad.preprocessing.check import background
from bids_uad.preprocessing.registration import Volume
from bids_uad.preprocessing.resampling import field_of_view, resample

SPACING = 2.0
"""mm; margins are looked for on every voxel, or on every second, third, ... of finer grids."""
LEAST_MARGIN_MM = 4.0
"""Depth of a margin. Air and fluid have single voxels of exactly the background's value, too."""
ABRUPT = 1 / 3
"""Share of the largest cross-section from which the first slice of a skull-stripped brain is a cut.

A brain tapers off: a slice that touches it by 5 mm shows at most a fifth.
"""


def covered(scan: Volume, stripped: bool, shape: tuple[int, int, int], affine: np.ndarray, pull: np.ndarray):
    """Find the voxels of a grid that a scan has data for.

    Resampling (to the grid of another image, or to 256 x 256 x 256 voxels) fills what lies outside the field
    of view with the value of the background. Such margins are no data.

    Parameters
    ----------
    scan : Volume
        On its own grid, with the intensities it came with.
    stripped : bool
        Whether the scan is skull-stripped. Then only slices beyond an abrupt end of the brain are margins.
    shape : tuple of int
        Shape of the grid.
    affine : numpy.ndarray, shape (4, 4)
        Its voxel-to-world.
    pull : numpy.ndarray, shape (4, 4)
        World matrix from points of the grid to points of the scan.

    Returns
    -------
    numpy.ndarray of bool, of `shape`
    """
    inside = field_of_view(scan.data.shape, scan.affine, shape, affine, pull)
    steps = np.maximum(SPACING / np.linalg.norm(scan.affine[:3, :3], axis=0), 1).astype(int)
    empty = scan.data[:: steps[0], :: steps[1], :: steps[2]] == background(scan.data)
    thinned = scan.affine @ np.diag([*steps, 1.0])
    margin = _beyond_cuts(empty) if stripped else _deep_margin(empty, np.linalg.norm(thinned[:3, :3], axis=0))
    if not margin.any():
        return inside
    return inside & (resample(margin, thinned, shape, affine, pull, order=0, extend=True) < 0.5)


def _beyond_cuts(empty: np.ndarray) -> np.ndarray:
    """Mark the empty slices at the ends of the three axes, where the brain ends abruptly."""
    margin = np.zeros_like(empty)
    for axis in range(3):
        area = np.count_nonzero(~empty, axis=tuple(other for other in range(3) if other != axis))
        filled = np.flatnonzero(area)
        if not filled.size:
            return np.zeros_like(empty)
        slices = np.moveaxis(margin, axis, 0)
        if area[filled[0]] >= ABRUPT * area.max():
            slices[: filled[0]] = True
        if area[filled[-1]] >= ABRUPT * area.max():
            slices[filled[-1] + 1 :] = True
    return margin


def _deep_margin(empty: np.ndarray, zooms: np.ndarray) -> np.ndarray:
    """Keep the regions of empty voxels that are deep and reach the border of the grid."""
    # What lies outside the grid is empty, so that a single slice at its border is deep enough if it is thick.
    wide = np.pad(empty, 1, constant_values=True)
    core = ndimage.distance_transform_edt(wide, sampling=zooms) > LEAST_MARGIN_MM
    labels, _ = ndimage.label(core | np.pad(np.zeros_like(empty), 1, constant_values=True))
    core = labels == labels[0, 0, 0]
    near = ndimage.distance_transform_edt(~core, sampling=zooms) <= LEAST_MARGIN_MM
    inner = (slice(1, -1),) * 3
    return (near & wide)[inner]
