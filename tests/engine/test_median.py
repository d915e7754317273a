"""The masked median against SciPy."""

from __future__ import annotations

import numpy as np
import torch
from scipy.ndimage import generic_filter, median_filter

from bids_uad.engine import inference as median
from bids_uad.engine.inference import masked_median, published_median


def test_inside_a_full_mask_it_is_scipys_median():
    volume = np.random.default_rng(0).random((12, 13, 14)).astype(np.float32)
    ours = masked_median(torch.from_numpy(volume), torch.ones(volume.shape, dtype=torch.bool)).numpy()
    theirs = median_filter(volume, size=3)
    np.testing.assert_array_equal(ours[1:-1, 1:-1, 1:-1], theirs[1:-1, 1:-1, 1:-1])


def test_outside_voxels_never_enter():
    rng = np.random.default_rng(1)
    volume = rng.random((10, 11, 12)).astype(np.float32)
    brain = rng.random(volume.shape) < 0.6
    ours = masked_median(torch.from_numpy(volume), torch.from_numpy(brain)).numpy()

    def lower_median(values):
        values = np.sort(values[~np.isnan(values)])
        return values[(len(values) - 1) // 2] if len(values) else 0

    masked = np.where(brain, volume, np.nan)
    theirs = generic_filter(masked, lower_median, size=3, mode="constant", cval=np.nan)
    np.testing.assert_array_equal(ours, np.where(brain, theirs, 0).astype(np.float32))


def test_the_published_filter_is_scipys_even_median():
    rng = np.random.default_rng(2)
    volume = (rng.random((13, 11, 17)) * (rng.random((13, 11, 17)) < 0.5)).astype(np.float32)
    volume[6:, :, 4:9] = 0
    ours = published_median(torch.from_numpy(volume)).numpy()
    np.testing.assert_array_equal(ours, median_filter(volume, size=4))


def test_the_published_filter_moves_a_cube_by_half_a_voxel():
    cube = torch.zeros(20, 20, 20)
    cube[8:12, 8:12, 8:12] = 1
    reached = torch.nonzero(published_median(cube))
    assert reached.max() == 12


def test_empty_mask_gives_zeros():
    empty = torch.zeros(4, 4, 4, dtype=torch.bool)
    assert masked_median(torch.rand(4, 4, 4), empty).abs().max() == 0


def test_chunks_do_not_show(monkeypatch):
    volume = torch.rand(20, 21, 22, generator=torch.Generator().manual_seed(0))
    brain = volume > 0.2
    whole = masked_median(volume, brain)
    monkeypatch.setattr(median, "ROWS", 1_000)
    assert torch.equal(whole, masked_median(volume, brain))
