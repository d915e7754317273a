"""Intensity scaling inside the brain, the last step of preprocessing."""

from __future__ import annotations

import numpy as np

UPPER_PERCENTILE = 99.5
SCALING = {"method": "percentile", "lower": 0.0, "upper": UPPER_PERCENTILE, "region": "brain mask"}


def scale_intensity(volume: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """Scale a scan so that the 99.5th percentile of the brain is 1.

    Nothing is cut above: what a detector does with the brightest voxels is its own (see
    :mod:`bids_uad.engine.protocol`). Zero stays zero: magnitude images have a physical origin, and a lower
    percentile would move with the amount of cerebrospinal fluid that the brain mask happens to hold. One
    bright vessel moves nothing.

    Parameters
    ----------
    volume : numpy.ndarray
        Any shape, bias-corrected intensities.
    brain : numpy.ndarray of bool
        Same shape. The mask, not ``volume == 0``, says what is brain.

    Returns
    -------
    numpy.ndarray of float32
        At least 0; 0 outside the brain.

    Raises
    ------
    ValueError
        If the mask is empty or the brain is not brighter than zero.
    """
    brain = np.asarray(brain, dtype=bool)
    if not brain.any():
        raise ValueError("the brain mask is empty")
    upper = float(np.percentile(volume[brain], UPPER_PERCENTILE))
    if not upper > 0:
        raise ValueError("the image has no positive intensity inside the brain mask")
    scaled = np.maximum(np.asarray(volume, dtype=np.float32) / np.float32(upper), 0.0)
    return np.where(brain, scaled, np.float32(0.0)).astype(np.float32)
