from __future__ import annotations

import numpy as np
import torch

from bids_uad.simulation import deformation
from bids_uad.simulation.spatial import BOX_SHAPE, box_points


def test_jacobian_of_a_linear_map_is_its_determinant():
    matrix = torch.tensor([[0.2, 0.1, 0.0], [-0.1, -0.3, 0.2], [0.0, 0.1, 0.4]])
    axes = torch.meshgrid(*[torch.arange(6.0)] * 3, indexing="ij")
    displacement = torch.einsum("ij,jxyz->ixyz", matrix, torch.stack(axes))
    expected = torch.linalg.det(matrix + torch.eye(3)).item()
    got = deformation.jacobian_determinant(displacement)
    assert got.shape == (5, 5, 5)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-4)


def test_remove_folds_makes_the_jacobian_positive():
    wild = deformation.random_deformation(np.random.default_rng(0), 25.0)
    assert deformation.jacobian_determinant(wild).min() < 0
    tame = deformation.remove_folds(wild)
    assert deformation.jacobian_determinant(tame).min() > 0
    assert tame.abs().max() < wild.abs().max()


def test_expand_region_enlarges_a_region():
    distance = (box_points() - torch.tensor([-119.0, 107.0, 77.0])).norm(dim=-1)
    region = (distance < 12).float()
    displacement = deformation.expand_region(region[::2, ::2, ::2].contiguous(), 2.5)
    points = deformation.source_points(displacement, np.ones(3), np.eye(3))
    moved = (points - torch.tensor([-119.0, 107.0, 77.0])).norm(dim=-1) < 12
    assert moved.sum() > 1.3 * region.sum()


def test_mass_effect_decays_with_distance():
    centre = np.array([80.0, 100.0, 76.0])
    field = deformation.mass_effect(centre, 10.0, 3.0)
    assert field.shape == (3, *BOX_SHAPE)
    # Tissue at +x is read from nearer to the centre.
    np.testing.assert_allclose(field[0, 90, 100, 76], -3.0, rtol=1e-4)
    # r / R exp((1 - (r / R)^2) / 2) times the maximum shift, for r = 20 mm and R = 10 mm.
    np.testing.assert_allclose(field[0, 100, 100, 76], -3.0 * 2 * np.exp(-1.5), rtol=1e-4)


def test_source_points_scale_about_the_head_centre():
    none = torch.zeros(3, *BOX_SHAPE)
    points = deformation.source_points(none, np.full(3, 1.1), np.eye(3))
    centre = torch.tensor([-119.0, 107.0, 77.0])
    torch.testing.assert_close((points - centre) * 1.1, box_points() - centre, atol=1e-3, rtol=0)
