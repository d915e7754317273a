"""Where a scan has data: inside its field of view, but not in margins that were filled in."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bids_uad import space
from bids_uad.preprocessing.interfaces import ResampleToSRI24
from bids_uad.preprocessing.quality import coverage_mask
from bids_uad.preprocessing.registration import Volume
from bids_uad.preprocessing.resampling import resample, rotation_about, translation, write_itk

from .conftest import NATIVE_AFFINE, NATIVE_SHAPE, draw, known_move, save, t2w_like
from .test_brain import head_around

SHAPE = (90, 100, 90)
AFFINE = nib.affines.from_matvec(np.diag([2.0, 2.0, 2.0]), [-89, -99, -89])


def distance(shape: tuple[int, ...] = SHAPE, affine: np.ndarray = AFFINE) -> np.ndarray:
    """From the origin of the world, mm."""
    return np.linalg.norm(nib.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1)), axis=-1)


def head(background: float = 0.0, noise: float = 0.0) -> np.ndarray:
    """A ball of 70 mm in a shell up to 84 mm."""
    values = np.where(distance() < 70, 400.0, np.where(distance() < 84, 900.0, background))
    return values + np.abs(np.random.default_rng(0).normal(0, noise, SHAPE)).round()


BRAIN = distance() < 70


def found(data: np.ndarray, stripped: bool = False, affine: np.ndarray = AFFINE) -> np.ndarray:
    """Ask for the coverage of the grid of `head`."""
    return coverage_mask(Volume(data.astype(np.float32), affine), stripped, SHAPE, AFFINE, np.eye(4))


@pytest.mark.parametrize("stripped", [True, False])
def test_a_smaller_grid_covers_the_voxels_inside_it(stripped: bool) -> None:
    move = rotation_about(np.zeros(3), (5.0, -8.0, 12.0)) @ translation(np.array([3.0, -2.0, 1.0]))
    smaller = (90, 100, 60)
    data = np.random.default_rng(0).uniform(100, 200, smaller)
    result = coverage_mask(Volume(data, AFFINE), stripped, SHAPE, AFFINE, move)
    points = nib.affines.apply_affine(np.linalg.inv(AFFINE) @ move @ AFFINE, np.argwhere(BRAIN))
    inside = ((points > -0.5) & (points < np.array(smaller) - 0.5)).all(axis=1)
    assert 0.3 < inside.mean() < 0.8
    assert (result[BRAIN] != inside).mean() < 1e-4  # rounding at the edge


@pytest.mark.parametrize("noise", [0.0, 20.0])
@pytest.mark.parametrize("background", [0.0, -5.0])
def test_a_whole_head_is_covered_where_the_brain_is(background: float, noise: float) -> None:
    assert found(head(background, noise))[BRAIN].all()


def test_empty_voxels_and_cavities_inside_a_head_are_data() -> None:
    data = head()
    data[BRAIN & (np.random.default_rng(1).random(SHAPE) < 0.1)] = 0.0
    data[40:50, 40:50, 40:50] = 0.0
    assert found(data)[BRAIN].all()


def test_the_wedges_that_reslicing_leaves_are_not_covered() -> None:
    """A slab of 80 mm that was brought to an oblique grid."""
    slab, slab_affine = head()[:, :, 25:65], AFFINE @ translation(np.array([0.0, 0.0, 25.0]))
    move = rotation_about(np.zeros(3), (12.0, 6.0, 0.0))
    resliced = resample(slab, slab_affine, SHAPE, AFFINE, move)
    points = nib.affines.apply_affine(np.linalg.inv(slab_affine) @ move @ AFFINE, np.argwhere(BRAIN))
    inside = (points[:, 2] > -0.5) & (points[:, 2] < 39.5)
    result = found(resliced)[BRAIN]
    assert 0.5 < inside.mean() < 0.8
    assert result[inside].all()
    assert result[~inside].mean() < 0.01


def test_one_empty_thick_slice_is_not_covered() -> None:
    data = head()[:, :, 10:70:3].copy()
    affine = AFFINE @ translation(np.array([0.0, 0.0, 11.0])) @ np.diag([1.0, 1.0, 3.0, 1.0])
    full = found(data, affine=affine)
    data[:, :, -1] = 0.0
    difference = full & ~found(data, affine=affine)
    assert set(np.flatnonzero(difference[45, 50])) == {67, 68, 69}


def test_a_stripped_brain_is_covered_all_around_its_natural_surface() -> None:
    data = np.where(BRAIN, 400.0, 0.0)
    assert found(data, stripped=True).all()
    thick = data[:, :, ::3]
    assert coverage_mask(
        Volume(thick, AFFINE @ np.diag([1.0, 1, 3, 1])), True, (90, 100, 88), AFFINE, np.eye(4)
    ).all()


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("upper", [True, False])
def test_nothing_is_covered_beyond_the_cut_of_a_stripped_brain(axis: int, upper: bool) -> None:
    data = np.where(BRAIN, 400.0, 0.0)
    cut = np.moveaxis(np.zeros(SHAPE, bool), axis, 0)
    cut[-30 if upper else slice(30)] = True
    if upper:
        cut[-30:] = True
    cut = np.moveaxis(cut, 0, axis)
    data[cut] = 0.0
    np.testing.assert_array_equal(found(data, stripped=True), ~cut)


def test_a_scan_elsewhere_covers_nothing() -> None:
    far = translation(np.array([500.0, 0.0, 0.0]))
    assert not coverage_mask(Volume(head(), AFFINE), False, space.SHAPE, space.AFFINE, far).any()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("stripped", [False, True])
def test_the_brain_mask_ends_where_the_scan_does(
    stripped: bool, padded: bool, reference_volume: Volume, tmp_path: Path
) -> None:
    """A T2w image that lacks the lowest third of the brain, with the brain mask of its T1w image."""
    brain = draw(reference_volume, known_move(), NATIVE_SHAPE, NATIVE_AFFINE)
    t2w = t2w_like(brain) if stripped else t2w_like(brain) + head_around(brain) * (brain == 0)
    first = 30
    affine = NATIVE_AFFINE @ translation(np.array([0.0, 0.0, 0.0 if padded else first]))
    t2w = np.where(np.arange(NATIVE_SHAPE[2]) < first, 0, t2w) if padded else t2w[:, :, first:]
    files = {
        "in_file": save(tmp_path / "T2w.nii.gz", t2w.astype(np.float32), affine),
        "native_mask": save(tmp_path / "mask.nii.gz", (t2w > 0).astype(np.uint8), affine),
        "to_sri24": write_itk(tmp_path / "to_sri24.txt", known_move()),
        "brain_mask": save(tmp_path / "anchor_mask.nii.gz", (brain > 0).astype(np.uint8), NATIVE_AFFINE),
    }
    files |= {"conformed": files["in_file"], "brain_xfm": files["to_sri24"]}
    interface = ResampleToSRI24(skull_stripped=stripped, **{name: str(path) for name, path in files.items()})
    outputs = interface.run(cwd=str(tmp_path)).outputs
    to_voxel = np.linalg.inv(NATIVE_AFFINE) @ known_move() @ space.AFFINE
    height = nib.affines.apply_affine(to_voxel, np.argwhere(reference_volume.mask))[:, 2]
    found = np.asarray(nib.load(outputs.out_mask).dataobj)[reference_volume.mask] > 0
    assert 0.2 < (height < first).mean() < 0.5
    assert found[height < first - 1].mean() < 0.001
    assert found[height > first].mean() > 0.97
    image = np.asarray(nib.load(outputs.out_file).dataobj)[reference_volume.mask]
    assert image[height < first - 1].max() == 0
    seen = np.asarray(nib.load(outputs.coverage).dataobj)[reference_volume.mask]
    assert 1 - seen.mean() == pytest.approx((height < first - 0.5).mean(), abs=0.02)
