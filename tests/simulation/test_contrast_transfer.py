"""T1w scans with the contrast of T2w or FLAIR: known tissues in, known order out."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import binary_erosion, distance_transform_edt, gaussian_filter
from scipy.stats import spearmanr

from bids_uad.simulation.contrast_transfer import t1w_to_flair, t1w_to_t2w, tissue_levels

LEVELS = (0.2, 0.6, 0.9)


@pytest.fixture(scope="module")
def phantom():
    """Three tissues side by side with a little noise, and the box of brain around them."""
    tissue = np.repeat([0, 1, 1, 2, 2, 2], 8)[:, None, None] * np.ones((1, 24, 20), dtype=int)
    volume = np.take(LEVELS, tissue) + np.random.default_rng(0).normal(0, 0.01, tissue.shape)
    brain = np.zeros(tissue.shape, dtype=bool)
    brain[1:-1, 1:-1, 1:-1] = True
    return volume * brain, brain, tissue


def test_tissue_levels_of_a_phantom_are_its_means(phantom):
    volume, brain, _ = phantom
    np.testing.assert_allclose(tissue_levels(volume, brain), LEVELS, atol=0.01)


@pytest.mark.parametrize("seed", range(5))
def test_fluid_is_brightest_and_white_matter_darkest(phantom, seed):
    volume, brain, tissue = phantom
    t2w = t1w_to_t2w(volume, brain, np.random.default_rng(seed))
    inner = binary_erosion(brain)
    assert np.array_equal(t2w > 0, inner)
    assert np.percentile(t2w[inner], 99.5) == pytest.approx(1)
    fluid, grey, white = (np.median(t2w[inner & (tissue == label)]) for label in range(3))
    assert 0.7 < fluid <= 1
    assert 0.16 < white < 0.55
    assert grey / white == pytest.approx(1.35, abs=0.17)


def test_t1w_to_t2w_inverts_the_order_of_tissues(phantom):
    volume, brain, _ = phantom
    t2w = t1w_to_t2w(volume, brain, np.random.default_rng(1))
    inner = binary_erosion(brain)
    assert spearmanr(volume[inner], t2w[inner]).statistic < -0.98


def test_scanners_differ(phantom):
    volume, brain, _ = phantom
    one, other = (t1w_to_t2w(volume, brain, np.random.default_rng(seed)) for seed in (1, 2))
    assert np.abs(one - other).max() > 0.02


@pytest.mark.parametrize("seed", range(5))
def test_grey_matter_is_brightest_in_flair_and_fluid_darkest(phantom, seed):
    volume, brain, tissue = phantom
    flair = t1w_to_flair(volume, brain, np.random.default_rng(seed))
    assert np.array_equal(flair > 0, brain)
    assert np.percentile(flair[brain], 99.5) == pytest.approx(1)
    fluid, grey, white = (np.median(flair[brain & (tissue == label)]) for label in range(3))
    # Pure fluid may be up to 30 % darker in T1w than the median.
    assert 0.09 < fluid / grey < 0.6
    assert 0.69 < white / grey < 0.9
    # Within grey and white matter, brighter in T1w is darker in FLAIR.
    solid = brain & (tissue > 0)
    assert spearmanr(volume[solid], flair[solid]).statistic < -0.8


def test_the_wall_of_the_ventricles_is_not_bright_in_flair():
    """Partial volume of fluid and white matter has the T1w intensity of grey matter."""
    axes = np.ogrid[-32:32, -32:32, -32:32]
    radius = np.sqrt(sum(axis**2 for axis in axes))
    tissue = np.select([radius < 8, radius < 24, radius < 29], [0, 2, 1], 0)
    brain = radius < 30
    volume = gaussian_filter(np.take(LEVELS, tissue), 0.6) * brain
    flair = t1w_to_flair(volume, brain, np.random.default_rng(0))
    white = np.median(flair[(radius > 12) & (radius < 20)])
    cortex = np.median(flair[(radius > 25) & (radius < 28)])
    wall = np.abs(distance_transform_edt(radius >= 8) - 0.5) < 1.5
    assert flair[wall].max() < 1.2 * white < cortex
    assert flair[radius < 6].max() < 0.5 * white
