"""The last half millimetre of a rigid registration."""

from __future__ import annotations

import numpy as np
from scipy import ndimage, optimize

from bids_uad.preprocessing.registration import BINS, Volume, binned, mutual_information
from bids_uad.preprocessing.transforms import rotation_about, translation

SMOOTHING = 2.0
"""Gaussian (mm) that leaves one hill to climb, and no ripples from the grid."""
RIM = 3
"""Voxels around the mask that are looked at too: the outline of the brain is good evidence."""
DEGREES_PER_STEP = 1.0
"""A rotation that moves the surface of a brain by about as much as a shift of 1 mm."""
PRECISION = 0.01


def refine_rigid(fixed: Volume, moving: Volume, pull: np.ndarray) -> np.ndarray:
    """Climb from a rigid transform to the nearest top of normalised mutual information.

    ANTs looks at a random sample of the voxels and stops up to a millimetre short, elsewhere for each start;
    Powell's method (Powell 1964, doi:10.1093/comjnl/7.2.155) over all voxels ends in the same place.

    Parameters
    ----------
    fixed, moving : Volume
        Brains on black, `fixed` with its mask, on voxels of some 2 mm.
    pull : numpy.ndarray, shape (4, 4)
        Where to start: fixed points to moving points, within a few mm of the top.

    Returns
    -------
    numpy.ndarray, shape (4, 4)
        Exactly rigid.
    """
    region = ndimage.binary_dilation(fixed.mask, iterations=RIM)
    where = np.argwhere(region)
    points = fixed.affine @ np.vstack([where.T, np.ones(len(where))])
    fixed_bins = np.rint(binned(_smooth(fixed)[region]) * (BINS - 1)).astype(np.intp)
    values = _smooth(moving)
    low, high = np.percentile(values[moving.mask], [0.5, 99.5])
    to_voxels, centre = np.linalg.inv(moving.affine), fixed.centre()

    def moved(step: np.ndarray) -> np.ndarray:
        turn = rotation_about(centre, tuple(DEGREES_PER_STEP * step[:3]))
        return pull @ translation(step[3:]) @ turn

    def cost(step: np.ndarray) -> float:
        voxels = (to_voxels @ moved(step) @ points)[:3]
        sampled = ndimage.map_coordinates(values, voxels, order=1, mode="constant")
        level = np.clip((sampled - low) / (high - low), 0.0, 1.0) * (BINS - 1)
        below = np.floor(level).astype(np.intp)
        # A value between two bins counts in both, so that the cost has no steps.
        upper = level - below
        cells = fixed_bins * BINS + below
        joint = np.bincount(cells, 1.0 - upper, BINS * BINS)
        joint += np.bincount(cells + (below < BINS - 1), upper, BINS * BINS)
        return -mutual_information(joint.reshape(BINS, BINS))

    found = optimize.minimize(
        cost, np.zeros(6), method="Powell", options={"xtol": PRECISION, "ftol": PRECISION * 1e-5}
    )
    return moved(found.x)


def _smooth(volume: Volume) -> np.ndarray:
    edges = np.linalg.norm(volume.affine[:3, :3], axis=0)
    return ndimage.gaussian_filter(volume.data.astype(np.float32), SMOOTHING / edges)
