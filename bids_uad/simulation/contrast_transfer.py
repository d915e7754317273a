"""Contrast transfer: a real T1w scan with the intensities of a T2w scan.

In both contrasts, intensities are ordered as cerebrospinal fluid, grey and white matter, in opposite
directions: a decreasing curve through the three turns the sulci, vessels and folia of a T1w scan into those
of a T2w scan.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator
from scipy.ndimage import binary_erosion
from sklearn.cluster import KMeans

from bids_uad.images import scale_intensity

CLUSTERED_VOXELS = 20_000
WHITE = (0.17, 0.42)
"""Range of the T2w intensity of white matter relative to fluid, which includes the available real
turbo-spin-echo scans."""
GREY = (1.2, 1.5)
"""Range of the T2w intensity of grey matter relative to white matter."""
MAX_T1W = 1.3
"""T1w intensity relative to white matter above which the T2w intensity is constant (slow blood, fat)."""


def t1w_to_t2w(
    volume: NDArray[np.floating], brain: NDArray[np.bool_], rng: np.random.Generator
) -> NDArray[np.float32]:
    """Transfer a T1w scan to the contrast of a random T2w scan.

    Parameters
    ----------
    volume : numpy.ndarray
        T1w intensities, positive in the brain.
    brain : numpy.ndarray of bool
        Brain mask of the same shape.
    rng : numpy.random.Generator
        Source of the T2w contrast.

    Returns
    -------
    numpy.ndarray of float32
        T2w-like image, scaled as by the participant level. It is 0 outside the brain and in its outermost
        voxels, which are dark in T1w because of partial volume with the background and would be bright.

    Notes
    -----
    The curve is a monotone cubic (Fritsch and Carlson 1980). Partial volume shifts the cluster of fluid
    towards cortex, so pure fluid is assumed to be darker than the centre of its cluster.
    """
    fluid, grey, white = tissue_levels(volume, brain)
    t2w_white = rng.uniform(*WHITE)
    pure_fluid = fluid * rng.uniform(0.6, 0.9)
    curve = PchipInterpolator(
        [pure_fluid, grey, white, MAX_T1W * white],
        [1.0, t2w_white * rng.uniform(*GREY), t2w_white, 0.8 * t2w_white],
    )
    t2w = curve(np.clip(volume, pure_fluid, MAX_T1W * white))
    return scale_intensity(t2w, binary_erosion(brain))


def tissue_levels(volume: NDArray[np.floating], brain: NDArray[np.bool_]) -> tuple[float, float, float]:
    """Estimate the typical T1w intensities of fluid, grey and white matter by k-means.

    Parameters
    ----------
    volume : numpy.ndarray
        T1w intensities, positive in the brain.
    brain : numpy.ndarray of bool
        Brain mask of the same shape.

    Returns
    -------
    tuple of float
        Centres of three clusters, ascending.
    """
    values = volume[brain]
    values = values[:: max(1, len(values) // CLUSTERED_VOXELS), None]
    fluid, grey, white = np.sort(KMeans(3, n_init=3, random_state=0).fit(values).cluster_centers_[:, 0])
    return float(fluid), float(grey), float(white)
