"""How well two brain masks agree."""

from __future__ import annotations

import numpy as np


def dice(one: np.ndarray, other: np.ndarray) -> float:
    """Compute the Dice overlap of two masks (Dice 1945).

    Parameters
    ----------
    one, other : numpy.ndarray of bool, same shape

    Returns
    -------
    float
        From 0 to 1; 0 if both are empty.
    """
    total = int(one.sum()) + int(other.sum())
    return 2.0 * int((one & other).sum()) / total if total else 0.0
