"""SSIM and GMS against scikit-image and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import prewitt
from skimage.metrics import structural_similarity

from bids_uad.networks.similarity import gms_maps, gradient_magnitude, ssim_map


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(2, 3, 48, 40, generator=generator, dtype=torch.float64)
    second = 0.7 * first + 0.3 * torch.rand(first.shape, generator=generator, dtype=torch.float64)
    return first, second


def test_ssim_equals_scikit_images(pair):
    ours = ssim_map(*pair, valid=True)
    for index in np.ndindex(2, 3):
        _, full = structural_similarity(
            pair[0][index].numpy(),
            pair[1][index].numpy(),
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1.0,
            full=True,
        )
        np.testing.assert_allclose(ours[index], full[5:-5, 5:-5], atol=1e-9)


def test_padded_ssim_equals_valid_ssim_inside(pair):
    assert ssim_map(*pair).shape == pair[0].shape
    torch.testing.assert_close(ssim_map(*pair)[..., 5:-5, 5:-5], ssim_map(*pair, valid=True))
    torch.testing.assert_close(ssim_map(pair[0], pair[0]), torch.ones_like(pair[0]))


def test_gradient_magnitude_equals_scipys_prewitt(pair):
    image = pair[0][:1, :1]
    ours = gradient_magnitude(image)[0, 0]
    parts = [prewitt(image[0, 0].numpy(), axis) / 3 for axis in (0, 1)]
    np.testing.assert_allclose(ours, np.hypot(*parts)[1:-1, 1:-1], atol=1e-6)


def test_gms_equals_its_formula(pair):
    first, second = pair[0][:, :1], pair[1][:, :1]
    maps = gms_maps(first, second)
    assert [tuple(part.shape[-2:]) for part in maps] == [(46, 38), (22, 18), (10, 8), (4, 3)]
    a, b = (gradient_magnitude(torch.nn.functional.avg_pool2d(x, 2)) for x in (first, second))
    # The constant of the publication.
    expected = 1 - (a - b) ** 2 / (a**2 + b**2 + 0.0026)
    torch.testing.assert_close(maps[1], expected)
    assert all(torch.allclose(part, torch.ones_like(part)) for part in gms_maps(first, first))
