from __future__ import annotations

from pathlib import Path

import nibabel as nib
import nitransforms
import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from bids_uad.preprocessing import resampling as transforms
from bids_uad.preprocessing.resampling import (
    field_of_view,
    load_ants,
    resample,
    resample_isotropic,
    resample_mask,
    resample_mask_through,
    smooth_to_spacing,
    to_ants,
)

from .conftest import NATIVE_AFFINE, known_move


@pytest.fixture
def blob() -> np.ndarray:
    return ndimage.gaussian_filter(np.random.default_rng(0).random((30, 34, 28)), 2).astype(np.float32)


OBLIQUE = transforms.rotation_about(np.zeros(3), (11.0, -7.0, 20.0)) @ np.diag([-2.0, 2.0, 3.0, 1.0])


def test_itk_file_round_trip_is_exact(tmp_path: Path) -> None:
    path = transforms.write_itk(tmp_path / "x.txt", known_move())
    np.testing.assert_allclose(transforms.read_itk(path), known_move(), rtol=0, atol=1e-12)


def test_nitransforms_reads_a_written_itk_file(tmp_path: Path) -> None:
    path = transforms.write_itk(tmp_path / "x.txt", known_move())
    theirs = nitransforms.linear.load(path, fmt="itk")
    np.testing.assert_allclose(theirs.matrix, known_move(), atol=1e-10)


def test_read_itk_with_a_centre_of_rotation_equals_nitransforms(tmp_path: Path) -> None:
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


def test_ants_applies_a_written_itk_file_as_resample_does(tmp_path: Path, blob: np.ndarray) -> None:
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


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("extend", [False, True])
def test_resample_is_scipys_interpolation_at_the_places_of_the_affines(blob, order, extend) -> None:
    pull = transforms.rotation_about(np.array([-20.0, 30.0, 40.0]), (9.0, -14.0, 21.0))
    target = np.array([[-1.7, 0.3, 0, -2], [0.2, 1.9, 0.1, 3], [0, -0.2, 2.6, 5], [0, 0, 0, 1.0]])
    shape = (34, 36, 33)
    ours = resample(blob, OBLIQUE, shape, target, pull, order=order, extend=extend)
    world = nib.affines.apply_affine(pull @ target, np.moveaxis(np.indices(shape), 0, -1))
    places = np.moveaxis(nib.affines.apply_affine(np.linalg.inv(OBLIQUE), world), -1, 0)
    expected = ndimage.map_coordinates(blob, places, order=order, mode="nearest")
    ends = np.array(blob.shape).reshape(3, 1, 1, 1) - 0.5
    inside = ((places > -0.5) & (places < ends)).all(axis=0)
    assert 0.2 < inside.mean() < 0.8
    expected = expected if extend else np.where(inside, expected, 0)
    # A thousandth of a voxel is allowed for at the border, and nearest neighbours may fall either way.
    clear = np.minimum(np.abs(places + 0.5), np.abs(places - ends)).min(axis=0) > 2e-3
    np.testing.assert_allclose(ours[clear], expected[clear], atol=1e-5)
    assert clear.mean() > 0.98
    assert ours.dtype == np.float32


@pytest.mark.parametrize("spacing", [2.0, 5.0])
def test_an_image_on_a_wide_background_is_resampled_as_scipy_does_on_the_whole_grid(spacing) -> None:
    rng = np.random.default_rng(0)
    volume = np.zeros((40, 50, 30), dtype=np.float32)
    volume[12:25, 0:20, 8:22] = rng.random((13, 20, 14)) + 0.5  # at the edge of the grid, too
    centre = nib.affines.apply_affine(OBLIQUE, [18, 3, 15])
    pull = transforms.rotation_about(centre, (7.0, -11.0, 19.0))
    matrix = np.linalg.inv(OBLIQUE) @ pull @ OBLIQUE
    expected = ndimage.affine_transform(volume, matrix[:3, :3], matrix[:3, 3], order=1, mode="nearest")
    positions = nib.affines.apply_affine(matrix, np.moveaxis(np.indices(volume.shape), 0, -1))
    # A thousandth of a voxel is allowed for at the border.
    inside = ((positions > -0.501) & (positions < np.array(volume.shape) - 0.499)).all(axis=-1)
    expected[~inside] = 0
    assert (expected[:, :4] > 0).sum() > 500
    ours = resample(volume, OBLIQUE, volume.shape, OBLIQUE, pull)
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    region = rng.random(volume.shape) > 0.5
    own = resample(volume, OBLIQUE, volume.shape, OBLIQUE, pull, region=region)
    np.testing.assert_allclose(own, np.where(region, expected, 0), atol=1e-5)
    affine = np.diag([1.0, 1.5, 0.8, 1.0])
    widths = np.sqrt(spacing**2 - np.diag(affine)[:3] ** 2) / np.diag(affine)[:3] / np.sqrt(8 * np.log(2))
    smooth = ndimage.gaussian_filter(volume, widths, mode="nearest")
    np.testing.assert_array_equal(transforms.smooth_to_spacing(volume, affine, spacing), smooth)


def test_smooth_to_spacing_has_the_fwhm_of_the_voxel_difference() -> None:
    """Variances of Gaussians add: voxels of a mm become voxels of b mm by a kernel of b^2 - a^2 (FWHM)."""
    impulse = np.zeros((41, 41, 41), dtype=np.float32)
    impulse[20, 20, 20] = 1
    edges = (2.0, 9.0, 3.0)
    found = smooth_to_spacing(impulse, OBLIQUE @ np.diag([1, 4.5, 1, 1]), 8.0)
    assert found.sum() == pytest.approx(1, rel=1e-5)
    for axis, edge in enumerate(edges):
        profile = found.sum(axis=tuple({0, 1, 2} - {axis}))
        variance = (profile * (edge * (np.arange(41) - 20.0)) ** 2).sum()
        expected = max(8.0**2 - edge**2, 0) / (8 * np.log(2))
        assert variance == pytest.approx(expected, rel=0.01, abs=1e-6)


@pytest.mark.parametrize("spacing", [1.5, 4.0])
def test_resample_isotropic_keeps_world_coordinates(spacing) -> None:
    shape = (30, 33, 23)
    world = nib.affines.apply_affine(OBLIQUE, np.moveaxis(np.indices(shape), 0, -1))
    corner = [-0.5, -0.5, -0.5, 1]
    edges = np.linalg.norm(OBLIQUE[:3, :3], axis=0)
    for axis in range(3):
        found, affine = resample_isotropic(world[..., axis], OBLIQUE, spacing)
        assert found.shape == tuple(np.ceil(np.array(shape) * edges / spacing - 1e-3).astype(int))
        np.testing.assert_allclose(affine @ corner, OBLIQUE @ corner, atol=1e-9)
        np.testing.assert_allclose(affine[:3, :3] / spacing, OBLIQUE[:3, :3] / edges, atol=1e-12)
        expected = nib.affines.apply_affine(affine, np.moveaxis(np.indices(found.shape), 0, -1))[..., axis]
        inner = (slice(5, -5),) * 3  # smoothing repeats the edge
        np.testing.assert_allclose(found[inner], expected[inner], atol=1e-3)


def test_rotations_are_about_x_then_y_then_z_and_keep_the_point() -> None:
    a, b, c = np.deg2rad([10.0, -25.0, 40.0])
    about_x = [[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]]
    about_y = [[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]]
    about_z = [[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]]
    point = np.array([7.0, -5.0, 3.0])
    found = transforms.rotation_about(point, (10.0, -25.0, 40.0))
    np.testing.assert_allclose(found[:3, :3], np.array(about_z) @ about_y @ about_x, atol=1e-12)
    np.testing.assert_allclose(found @ [*point, 1], [*point, 1], atol=1e-12)


@pytest.mark.parametrize("degrees", [0.0, 12.0, 95.0, 180.0])
def test_rotation_angle_is_that_about_any_axis(degrees: float) -> None:
    axis = np.array([1.0, 2.0, -2.0]) / 3
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_rotvec(np.deg2rad(degrees) * axis).as_matrix()
    matrix[:3, 3] = [5, 6, 7]
    assert transforms.rotation_angle(matrix) == pytest.approx(degrees, abs=1e-5)


def test_nearest_rigid_never_mirrors() -> None:
    """Of diag(1, 0.9, -0.1) the nearest orthonormal matrix is a reflection, the nearest rotation is none."""
    rigid = transforms.nearest_rigid(np.diag([1.0, 0.9, -0.1, 1.0]), np.array([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(rigid[:3, :3], np.eye(3), atol=1e-12)
    np.testing.assert_allclose(rigid @ [1, 2, 3, 1], [1, 1.8, -0.3, 1], atol=1e-12)


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


def test_resample_mask_through_equals_resampling_by_the_composed_transform(tmp_path: Path) -> None:
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
