"""Dice of two masks, against SciPy's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial import distance

from bids_uad.preprocessing.registration import dice


def test_is_what_scipy_says():
    rng = np.random.default_rng(0)
    for share in (0.01, 0.5, 0.9):
        one, other = rng.random((2, 6, 7, 8)) < share
        assert dice(one, other) == pytest.approx(1 - distance.dice(one.ravel(), other.ravel()))


def test_nothing_overlaps_nothing():
    nothing, all_of_it = np.zeros((3, 3, 3), dtype=bool), np.ones((3, 3, 3), dtype=bool)
    assert dice(nothing, nothing) == dice(nothing, all_of_it) == 0.0
    assert dice(all_of_it, all_of_it) == 1.0
