"""Scaling of intensities, against NumPy's percentiles."""

from __future__ import annotations

import numpy as np
import pytest

from bids_uad.images import scale_intensity


def test_scale_intensity_brings_the_percentile_of_the_brain_to_one() -> None:
    rng = np.random.default_rng(0)
    brain = rng.random((20, 21, 22)) < 0.3
    # What lies outside the brain is brighter and must not matter; noise may be negative.
    volume = np.where(brain, rng.normal(300, 150, brain.shape), 5000.0)
    scaled = scale_intensity(volume, brain)
    inside = np.sort(volume[brain])
    # Linear interpolation between order statistics (Hyndman and Fan 1996, definition 7).
    place = 0.995 * (len(inside) - 1)
    low = int(place)
    upper = inside[low] + (place - low) * (inside[low + 1] - inside[low])
    np.testing.assert_allclose(scaled[brain], np.maximum(volume[brain] / upper, 0), rtol=1e-5)
    assert scaled.dtype == np.float32
    assert not scaled[~brain].any()
    assert scaled.max() == pytest.approx(inside[-1] / upper, rel=1e-5)  # not cut above
    assert (volume[brain] < 0).any()


def test_scale_intensity_does_not_depend_on_the_unit() -> None:
    rng = np.random.default_rng(1)
    volume, brain = rng.gamma(2, 100, (12, 12, 12)), np.ones((12, 12, 12), dtype=bool)
    np.testing.assert_allclose(
        scale_intensity(volume, brain), scale_intensity(37.5 * volume, brain), rtol=1e-5
    )


def test_scale_intensity_refuses_an_empty_or_dark_brain() -> None:
    with pytest.raises(ValueError, match="mask is empty"):
        scale_intensity(np.ones((3, 3, 3)), np.zeros((3, 3, 3), dtype=bool))
    with pytest.raises(ValueError, match="no positive intensity"):
        scale_intensity(-np.ones((3, 3, 3)), np.ones((3, 3, 3), dtype=bool))
