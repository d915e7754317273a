"""The contrast of a T2w scan, given to a real T1w scan.

In both contrasts grey values run from fluid over grey to white matter, one way or the other: a falling curve
through the three turns the sulci, vessels and folia of a T1w scan into what a T2w scan shows of them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator
from scipy.ndimage import binary_erosion
from sklearn.cluster import KMeans

from bids_uad.images import scale_intensity

VOXELS = 20_000  # enough to find three means
# T2w grey values in units of fluid, and of grey matter in units of white: ranges wide enough for the real
# turbo-spin-echo scans at hand.
WHITE = (0.17, 0.42)
GREY = (1.2, 1.5)
BRIGHTEST = 1.3  # in units of white matter; what is brighter in T1w (slow blood, fat) looks no darker in T2w


def tissue_levels(volume: NDArray[np.floating], brain: NDArray[np.bool_]) -> tuple[float, float, float]:
    """Find the typical T1w grey values of fluid, grey and white matter.

    Parameters
    ----------
    volume : numpy.ndarray
        T1w, positive in the brain.
    brain : numpy.ndarray of bool
        Same shape.

    Returns
    -------
    tuple of float
        Ascending: centres of three clusters (k-means).
    """
    values = volume[brain]
    values = values[:: max(1, len(values) // VOXELS), None]
    fluid, grey, white = np.sort(KMeans(3, n_init=3, random_state=0).fit(values).cluster_centers_[:, 0])
    return float(fluid), float(grey), float(white)


def t1w_to_t2w(
    volume: NDArray[np.floating], brain: NDArray[np.bool_], rng: np.random.Generator
) -> NDArray[np.float32]:
    """Give a T1w scan the contrast of a T2w scan of some scanner.

    Parameters
    ----------
    volume : numpy.ndarray
        T1w intensities, positive in the brain.
    brain : numpy.ndarray of bool
        Same shape.
    rng : numpy.random.Generator
        Draws the scanner.

    Returns
    -------
    numpy.ndarray of float32
        Scaled as the participant level scales, 0 outside the brain and in its outermost voxels: those are
        dark where they were mixed with the background, and would be bright.

    Notes
    -----
    The curve is monotone (Fritsch and Carlson 1980). Partial volume draws the cluster of fluid towards
    cortex, so that pure fluid is taken to be darker than its centre.
    """
    fluid, grey, white = tissue_levels(volume, brain)
    darkest = rng.uniform(*WHITE)
    pure = fluid * rng.uniform(0.6, 0.9)
    curve = PchipInterpolator(
        [pure, grey, white, BRIGHTEST * white],
        [1.0, darkest * rng.uniform(*GREY), darkest, 0.8 * darkest],
    )
    t2w = curve(np.clip(volume, pure, BRIGHTEST * white))
    return scale_intensity(t2w, binary_erosion(brain))
