"""Contrast transfer: a real T1w scan with the intensities of a T2w or FLAIR scan.

In T1w and T2w, intensities are ordered as cerebrospinal fluid, grey and white matter, in opposite
directions: a decreasing curve through the three turns the sulci, vessels and folia of a T1w scan into those
of a T2w scan. The curve of FLAIR has its maximum at grey matter.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator
from scipy.ndimage import binary_erosion, binary_opening
from sklearn.cluster import KMeans

from bids_uad.images import scale_intensity

CLUSTERED_VOXELS = 20_000
WHITE = (0.17, 0.42)
"""Range of the T2w intensity of white matter relative to fluid, which includes the available real
turbo-spin-echo scans."""
GREY = (1.2, 1.5)
"""Range of the T2w intensity of grey matter relative to white matter."""
FLAIR_FLUID = (0.10, 0.35)
"""Range of the FLAIR intensity of fluid relative to grey matter."""
FLAIR_WHITE = (0.70, 0.88)
"""Range of the FLAIR intensity of white matter relative to grey matter."""
MAX_T1W = 1.3
"""T1w intensity relative to white matter above which the other intensity is constant (slow blood, fat)."""


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
    t2w = _through_levels(
        volume,
        [pure_fluid, grey, white, MAX_T1W * white],
        [1.0, t2w_white * rng.uniform(*GREY), t2w_white, 0.8 * t2w_white],
    )
    return scale_intensity(t2w, binary_erosion(brain))


def t1w_to_flair(
    volume: NDArray[np.floating], brain: NDArray[np.bool_], rng: np.random.Generator
) -> NDArray[np.float32]:
    """Transfer a T1w scan to the contrast of a random FLAIR scan.

    Parameters
    ----------
    volume : numpy.ndarray
        T1w intensities, positive in the brain.
    brain : numpy.ndarray of bool
        Brain mask of the same shape.
    rng : numpy.random.Generator
        Source of the FLAIR contrast.

    Returns
    -------
    numpy.ndarray of float32
        FLAIR-like image, scaled as by the participant level, 0 outside the brain.

    Notes
    -----
    Voxels with partial volume of fluid and white matter have the T1w intensity of grey matter, which would
    make a bright rim around the ventricles. Where grey matter is thinner than two voxels, the FLAIR intensity
    is therefore interpolated between those of fluid and white matter.
    """
    fluid, grey, white = tissue_levels(volume, brain)
    flair_fluid, flair_white = rng.uniform(*FLAIR_FLUID), rng.uniform(*FLAIR_WHITE)
    pure_fluid = fluid * rng.uniform(0.7, 1.0)
    flair = _through_levels(
        volume,
        [pure_fluid, grey, white, MAX_T1W * white],
        [flair_fluid, 1.0, flair_white, 0.95 * flair_white],
    )
    grey_class = brain & (volume > (fluid + grey) / 2) & (volume < (grey + white) / 2)
    deep = binary_erosion(brain, iterations=15)
    thin = grey_class & deep & ~binary_opening(grey_class, iterations=1)
    direct = np.interp(volume, [pure_fluid, white], [flair_fluid, flair_white])
    return scale_intensity(np.where(thin, direct, flair), brain)


def _through_levels(
    volume: NDArray[np.floating], t1w: list[float], other: list[float]
) -> NDArray[np.floating]:
    """Map T1w levels to those of another contrast by a monotone cubic, which is constant beyond them."""
    return PchipInterpolator(t1w, other)(np.clip(volume, t1w[0], t1w[-1]))


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
