from __future__ import annotations

from pathlib import Path

import nitransforms
import numpy as np
import pytest

from bids_uad.preprocessing import transforms
from bids_uad.preprocessing.antspy import load_ants, to_ants
from bids_uad.preprocessing.resampling import (
    field_of_view,
    isotropic,
    resample,
    resample_mask,
    resample_mask_through,
)

from .conftest import NATIVE_AFFINE, known_move


@pytest.fixture
def blob() -> np.ndarray:
    from scipy import ndimage

    return ndimage.gaussian_filter(np.random.default_rng(0).random((30, 34, 28)), 2).astype(np.float32)


OBLIQUE = transforms.rotation_about(np.zeros(3), (11.0, -7.0, 20.0)) @ np.diag([-2.0, 2.0, 3.0, 1.0])


def test_itk_file_round_trip_is_exact(tmp_path: Path) -> None:
    path = transforms.write_itk(tmp_path / "x.txt", known_move())
    np.testing.assert_allclose(transforms.read_itk(path), known_move(), rtol=0, atol=1e-12)


def test_nitransforms_reads_our_file_as_the_same_matrix(tmp_path: Path) -> None:
    path = transforms.write_itk(tmp_path / "x.txt", known_move())
    theirs = nitransforms.linear.load(path, fmt="itk")
    np.testing.assert_allclose(theirs.matrix, known_move(), atol=1e-10)


def test_we_read_a_file_with_a_centre_of_rotation_as_nitransforms_does(tmp_path: Path) -> None:
    path = tmp_path / "centre.txt"
    path.write_text(
        "#Insight Transform File V1.0\n#Transform 0\nTransform: MatrixOffsetTransformBase_double_3_3\n"
        "Parameters: 0 -1 0 1 0 0 0 0 1 4 5 6\nFixedParameters: 10 20 30\n"
    )
    ours = transforms.read_itk(path)
    np.testing.assert_allclose(ours, nitransforms.linear.load(path, fmt="itk").matrix, atol=1e-10)


@pytest.mark.parametrize("text", ["", "Parameters: 1 2 3\nFixedParameters: 0 0 0\n"])
def test_read_itk_refuses_what_is_no_affine(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"bad\.txt"):
        transforms.read_itk(path)


def test_ants_applies_our_file_as_we_resample(tmp_path: Path, blob: np.ndarray) -> None:
    ants = load_ants()
    move = transforms.rotation_about(np.array([5.0, 6.0, 7.0]), (5.0, 3.0, -4.0))
    path = transforms.write_itk(tmp_path / "x.txt", move)
    shape, target = (26, 30, 24), OBLIQUE @ transforms.translation(np.array([1.0, 2.0, 1.0]))
    ours = resample(blob, OBLIQUE, shape, target, move)
    theirs = ants.apply_transforms(
        to_ants(np.zeros(shape), target), to_ants(blob, OBLIQUE), [str(path)], interpolator="linear"
    ).numpy()
    inner = (slice(4, -4),) * 3
    np.testing.assert_allclose(ours[inner], theirs[inner], atol=2e-4)


def test_inverse_undoes_the_file(tmp_path: Path, blob: np.ndarray) -> None:
    move = known_move()
    back = transforms.read_itk(transforms.write_itk(tmp_path / "b.txt", np.linalg.inv(move)))
    np.testing.assert_allclose(move @ back, np.eye(4), atol=1e-10)


def test_nearest_rigid_is_a_rotation_and_keeps_the_point() -> None:
    point = np.array([10.0, 20.0, 30.0])
    rough = known_move().copy()
    rough[:3, :3] *= 1.001
    rigid = transforms.nearest_rigid(rough, point)
    np.testing.assert_allclose(rigid[:3, :3] @ rigid[:3, :3].T, np.eye(3), atol=1e-12)
    assert np.linalg.det(rigid[:3, :3]) == pytest.approx(1.0)
    np.testing.assert_allclose((rigid @ [*point, 1])[:3], (rough @ [*point, 1])[:3], atol=1e-9)


def test_resample_identity_changes_nothing(blob: np.ndarray) -> None:
    np.testing.assert_allclose(resample(blob, OBLIQUE, blob.shape, OBLIQUE), blob, atol=1e-6)


def test_field_of_view_reaches_half_a_voxel_beyond_the_centres() -> None:
    thick = np.diag([1.0, 1.0, 6.0, 1.0])
    fine = np.diag([1.0, 1.0, 1.0, 1.0])
    fine[2, 3] = -10.0
    covered = field_of_view((8, 8, 4), thick, (8, 8, 40), fine)[4, 4]
    z = np.arange(40) - 10.0
    np.testing.assert_array_equal(covered, (z >= -3) & (z <= 21))
    values = resample(np.ones((8, 8, 4)), thick, (8, 8, 40), fine)[4, 4]
    np.testing.assert_array_equal(values, covered.astype(np.float32))


def test_isotropic_keeps_world_positions_and_mean(blob: np.ndarray) -> None:
    coarse, affine = isotropic(blob, OBLIQUE, 4.0)
    np.testing.assert_allclose(np.linalg.norm(affine[:3, :3], axis=0), 4.0)
    assert coarse.mean() == pytest.approx(blob.mean(), rel=0.02)
    x, y, z = np.meshgrid(*(np.arange(n) for n in blob.shape), indexing="ij")
    world_x = OBLIQUE[0, 0] * x + OBLIQUE[0, 1] * y + OBLIQUE[0, 2] * z
    seen, _ = isotropic(world_x, OBLIQUE, 4.0)
    i, j, k = (n // 2 for n in seen.shape)
    assert seen[i, j, k] == pytest.approx((affine @ [i, j, k, 1])[0], abs=0.05)


def test_resample_mask_keeps_the_volume_of_a_ball() -> None:
    grid = np.indices((40, 40, 40)) - 19.5
    ball = (grid**2).sum(axis=0) < 12**2
    move = transforms.rotation_about(np.array([19.5] * 3), (13.0, 8.0, -20.0))
    moved = resample_mask(ball, np.eye(4), (40, 40, 40), np.eye(4), move)
    assert moved.dtype == bool
    assert moved.sum() == pytest.approx(ball.sum(), rel=0.01)


def test_native_affine_of_the_phantom_is_left_handed() -> None:
    # Guards the other tests: a radiological grid is where a sign error would show.
    assert np.linalg.det(NATIVE_AFFINE[:3, :3]) < 0


def test_a_chain_of_files_is_one_resampling_through_their_product(tmp_path: Path) -> None:
    i, j, k = np.ogrid[:60, :60, :60]
    ball = (i - 25) ** 2 + (j - 30) ** 2 + (k - 33) ** 2 < 12**2
    affine, grid = np.diag([1.5, 1.5, 1.5, 1.0]), np.eye(4)
    first = transforms.translation(np.array([5.0, -4.0, 3.0])) @ transforms.rotation_about(
        np.array([40.0, 40, 40]), (20.0, 0, 30.0)
    )
    second = transforms.translation(np.array([-2.0, 6.0, 1.0])) @ transforms.rotation_about(
        np.array([30.0, 50, 40]), (0, 25.0, 0)
    )
    files = [
        str(transforms.write_itk(tmp_path / f"{n}.txt", m)) for n, m in (("first", first), ("second", second))
    ]
    chained = resample_mask_through(ball, affine, (90, 90, 90), grid, files)
    direct = resample_mask(ball, affine, (90, 90, 90), grid, second @ first)
    assert direct.sum() == pytest.approx(ball.sum() * 1.5**3, rel=0.02)
    assert (chained != direct).sum() <= 1e-3 * direct.sum()
    other_order = resample_mask(ball, affine, (90, 90, 90), grid, first @ second)
    assert (chained & other_order).sum() < 0.9 * direct.sum()
