from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from scipy.interpolate import BSpline

from bids_uad.simulation import spatial
from bids_uad.space import AFFINE


def test_box_points_are_the_world_coordinates_of_the_sri24_grid():
    index = np.array([17, 101, 63])
    on_grid = index + [part.start for part in spatial.BOX]
    expected = (AFFINE @ np.r_[on_grid, 1.0])[:3]
    np.testing.assert_allclose(spatial.box_points()[tuple(index)].numpy(), expected)


def test_sample_agrees_with_scipy_under_an_affine():
    rng = np.random.default_rng(0)
    volume = rng.random((12, 15, 10), dtype=np.float32)
    affine = np.array([[0.9, 0.1, 0, -4], [-0.1, 1.1, 0.2, 3], [0, 0.1, 1.3, 7], [0, 0, 0, 1.0]])
    index = rng.uniform(1, 8, (4, 5, 6, 3))
    points = index @ affine[:3, :3].T + affine[:3, 3]
    expected = ndimage.map_coordinates(volume, np.moveaxis(index, -1, 0), order=1)
    got = spatial.sample(torch.from_numpy(volume)[None], affine, torch.from_numpy(points).float())[0]
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-4)


def test_smooth_agrees_with_scipy_in_the_interior():
    volume = np.random.default_rng(1).random((30, 31, 32), dtype=np.float32)
    expected = ndimage.gaussian_filter(volume, (1.5, 1.0, 0.0), truncate=8)
    got = spatial.smooth(torch.from_numpy(volume), (1.5, 1.0, 0.0)).numpy()
    inner = (slice(10, -10),) * 2
    np.testing.assert_allclose(got[inner], expected[inner], atol=1e-5)


def test_spline_matrix_is_the_cubic_b_spline_basis():
    matrix = spatial.spline_matrix(20, 4.0).numpy()
    basis = BSpline.basis_element(np.arange(-2.0, 3.0), extrapolate=False)
    offsets = np.arange(20)[:, None] / 4.0 - (np.arange(matrix.shape[1])[None] - 1)
    np.testing.assert_allclose(matrix, np.nan_to_num(basis(offsets)), atol=1e-6)
    np.testing.assert_allclose(matrix.sum(1), 1.0, atol=1e-6)


def test_random_field_is_standardised_and_smooth():
    field = spatial.random_field(np.random.default_rng(2), 8.0, (40, 41, 42))[0].numpy()
    assert abs(field.mean()) < 1e-4
    assert abs(field.std() - 1) < 1e-3
    assert np.abs(np.diff(field, axis=0)).max() < 1.0


def test_sample_inside_equals_sample_at_marked_points():
    volume = torch.zeros(1, 20, 20, 20)
    volume[0, 5:12, 6:15, 4:10] = 1.0
    affine = np.eye(4)
    axes = [torch.arange(n, dtype=torch.float32) - 2 for n in (24, 24, 24)]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    inside = spatial.nonzero_points(volume[0], affine, points)
    torch.testing.assert_close(
        spatial.sample_inside(volume, affine, points, inside), spatial.sample(volume, affine, points)
    )
    assert not inside.all()
