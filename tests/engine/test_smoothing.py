"""Smoothing across slices, beside SciPy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter1d

from bids_uad.engine.inference import smooth_across_slices


@pytest.mark.parametrize("sigma", [0.7, 2.0, 4.0])
def test_it_is_scipys_gaussian_with_no_weight_outside_the_brain(sigma):
    rng = np.random.default_rng(0)
    brain = rng.random((30, 7, 9)) < 0.8
    scores = rng.random(brain.shape) * brain
    reach = {"sigma": sigma, "axis": 0, "mode": "constant", "radius": int(np.ceil(3 * sigma))}
    expected = gaussian_filter1d(scores, **reach) / gaussian_filter1d(brain.astype(float), **reach)
    found = smooth_across_slices(torch.from_numpy(scores), torch.from_numpy(brain), sigma)
    np.testing.assert_allclose(found.numpy(), np.where(brain, expected, 0), rtol=1e-9)


def test_an_even_map_stays_even_and_a_single_slice_is_thinned():
    brain = torch.zeros(20, 4, 4, dtype=torch.bool)
    brain[3:17] = True
    torch.testing.assert_close(smooth_across_slices(0.3 * brain, brain, 3.0), 0.3 * brain)
    single = torch.zeros(20, 4, 4)
    single[10] = 1
    # Of a wide Gaussian the share of one slice is about 1 / (sigma sqrt(2 pi)).
    assert smooth_across_slices(single, brain, 2.0)[10, 0, 0] == pytest.approx(0.2, abs=0.005)
