"""Registration, its metrics and the Dice coefficient."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.spatial import distance

from bids_uad.preprocessing.intensity_correction import correct_bias
from bids_uad.preprocessing.quality import MIN_LOCAL_CORRELATION
from bids_uad.preprocessing.registration import (
    BINS,
    COARSE_STAGES,
    FINE_STAGES,
    RESTART_OVERLAP,
    RESTART_SIMILARITY,
    RegistrationSchedule,
    Volume,
    _information_slope,
    centred_start,
    dice,
    equalise_tissue,
    mask_overlap,
    mutual_information,
    refine_rigid,
    register_best,
    register_rigid,
    register_to_anchor,
    register_to_reference,
    rescale_percentiles,
    rotated_starts,
    similarity,
)
from bids_uad.preprocessing.resampling import rotation_about, translation

from .conftest import NATIVE_AFFINE, NATIVE_SHAPE, draw, known_move, t2w_like

FEW = (20, 20)


@pytest.fixture(scope="module")
def scan(reference_volume: Volume) -> Volume:
    data = draw(reference_volume, known_move(), NATIVE_SHAPE, NATIVE_AFFINE)
    return Volume(data, NATIVE_AFFINE, data > 0)


def target_error(pull: np.ndarray, truth: np.ndarray, volume: Volume) -> float:
    """Mean distance (mm) between where two transforms send the voxels of the brain."""
    voxels = np.argwhere(volume.mask)[::997]
    points = volume.affine @ np.vstack([voxels.T, np.ones(len(voxels))])
    return float(np.linalg.norm(((pull - truth) @ points)[:3], axis=0).mean())


def test_register_to_reference_recovers_a_known_transform(reference_volume: Volume, scan: Volume) -> None:
    pull, qc = register_to_reference(reference_volume, scan)
    assert target_error(pull, known_move(), reference_volume) < 0.5
    np.testing.assert_allclose(pull[:3, :3] @ pull[:3, :3].T, np.eye(3), atol=1e-12)
    assert qc["mask_overlap"] > 0.97
    assert qc["restarted"] is False


def flair_like(t1w: np.ndarray) -> np.ndarray:
    """Return fluid, grey and white matter with the intensities of a FLAIR scan, 0 outside the brain."""
    top = np.percentile(t1w[t1w > 0], 99)
    return np.interp(t1w, np.array([0.0, 0.15, 0.35, 0.65, 1.0]) * top, [0.0, 100.0, 250.0, 1000.0, 800.0])


def test_equalise_tissue_keeps_the_contrast_of_fluid_only(scan: Volume) -> None:
    flair = Volume(flair_like(scan.data), scan.affine, scan.mask)
    equal = equalise_tissue(flair, flair.mask)
    ceiling = np.sort(flair.data[flair.mask])[int(0.15 * flair.mask.sum())]
    assert equal.data.max() == pytest.approx(ceiling, rel=0.01)
    fluid = flair.data < 0.9 * ceiling
    np.testing.assert_array_equal(equal.data[fluid], flair.data[fluid])


def test_flair_with_a_bright_lesion_is_registered_to_the_t1w_reference(
    reference_volume: Volume, scan: Volume
) -> None:
    data = flair_like(scan.data)
    centre = np.add(np.argwhere(scan.mask).mean(0), [25, 0, 10])
    data[(np.linalg.norm(np.indices(data.shape).T - centre, axis=-1).T < 20) & scan.mask] = 1800.0
    flair = Volume(data, scan.affine, scan.mask)
    pull, qc = register_to_reference(reference_volume, flair, dark_fluid=True)
    assert target_error(pull, known_move(), reference_volume) < 0.5
    assert qc["restarted"] is False
    # Below this, a scan is refused.
    assert abs(qc["local_correlation"]) > 2 * MIN_LOCAL_CORRELATION


def test_registration_is_reproducible_to_the_bit(
    scan: Volume, reference_volume: Volume, tmp_path: Path
) -> None:
    fixed, moving = reference_volume.coarse(6.0).cropped(2), scan.coarse(6.0)
    runs = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        runs.append(register_rigid(fixed, moving, known_move(), tmp_path / name))
    assert runs[0].tobytes() == runs[1].tobytes()
    assert not np.array_equal(runs[0], known_move())


def test_a_t2w_head_in_scanner_coordinates_is_registered_to_its_anchor(scan: Volume) -> None:
    # A bright shell around the brain stands for the scalp, which the anchor lacks.
    from scipy import ndimage

    move = rotation_about(scan.centre(), (3.0, -2.0, 4.0))
    near = ndimage.binary_dilation(scan.mask, iterations=5) & ~ndimage.binary_dilation(
        scan.mask, iterations=3
    )
    head = t2w_like(scan.data) + np.where(near, 900.0, 0.0)
    t2w = Volume(head.astype(np.float32), move @ scan.affine)
    pull, qc = register_to_anchor(scan, t2w)
    assert target_error(pull, move, scan) < 0.7
    assert qc["mask_overlap"] is None


@pytest.mark.parametrize("swapped", [False, True])
def test_register_to_anchor_prefers_the_mirror_image_of_a_flipped_t2w(scan: Volume, swapped: bool) -> None:
    # The template is symmetric: a large bright region makes one side differ from the other.
    middle = np.array(scan.data.shape) // 2
    blob = np.zeros(scan.data.shape, bool)
    blob[middle[0] + 4 : middle[0] + 18, middle[1] - 12 : middle[1] + 12, middle[2] - 8 : middle[2] + 14] = (
        True
    )
    data = np.where(blob & scan.mask, 1.6 * scan.data.max() - scan.data, scan.data)
    anchor = Volume(data, scan.affine, scan.mask)
    t2w = t2w_like(data)
    _, qc = register_to_anchor(anchor, Volume(t2w[::-1] if swapped else t2w, scan.affine))
    assert (qc["mirrored_similarity"] > 1.3 * qc["similarity"]) == swapped


def upside_down(scan: Volume) -> tuple[Volume, np.ndarray]:
    """Return the scan turned by 180 degrees, and the transform from the reference."""
    turn = rotation_about(scan.centre(), (180.0, 0.0, 0.0))
    return Volume(scan.data, turn @ scan.affine, scan.mask), turn @ known_move()


@pytest.mark.slow
def test_similarity_is_low_for_a_rotated_brain_with_high_mask_overlap(
    reference_volume: Volume, scan: Volume
) -> None:
    turned, truth = upside_down(scan)
    fixed, moving = reference_volume.coarse().cropped(6), turned.coarse().cropped(6)
    first = refine_rigid(fixed, moving, centred_start(fixed, moving), (*COARSE_STAGES, *FINE_STAGES))
    assert target_error(first, truth, reference_volume) > 20
    assert mask_overlap(fixed, moving, first) > RESTART_OVERLAP
    assert similarity(fixed, moving, first) < RESTART_SIMILARITY


def test_register_to_reference_restarts_for_a_brain_that_is_upside_down(
    reference_volume: Volume, scan: Volume
) -> None:
    turned, truth = upside_down(scan)
    pull, qc = register_to_reference(reference_volume, turned)
    assert qc["restarted"] is True
    assert target_error(pull, truth, reference_volume) < 0.5


@pytest.mark.parametrize(
    "angles", [pytest.param((40.0, 0.0, 0.0), marks=pytest.mark.slow), (-20.0, 15.0, 30.0)]
)
def test_register_to_reference_needs_no_restart_for_a_tilted_head(
    reference_volume: Volume, scan: Volume, angles: tuple[float, float, float]
) -> None:
    turn = rotation_about(scan.centre(), angles)
    pull, qc = register_to_reference(reference_volume, Volume(scan.data, turn @ scan.affine, scan.mask))
    assert qc["restarted"] is False
    assert target_error(pull, turn @ known_move(), reference_volume) < 0.5


def test_information_slope_is_the_derivative_of_mutual_information() -> None:
    rng = np.random.default_rng(0)
    joint = rng.random((6, 6))
    joint[0, 1] = 0.0
    p = joint / joint.sum()
    value, slope = _information_slope(p)
    assert value == pytest.approx(mutual_information(p))
    for i, j in [(2, 3), (5, 0)]:
        # Mass moves along the second image, so that the distribution of the first one is unchanged.
        step = np.zeros_like(p)
        step[i, j], step[i, j + 1] = -1e-6, 1e-6
        change = (mutual_information(p + step) - mutual_information(p - step)) / 2e-6
        assert slope[i, j + 1] - slope[i, j] == pytest.approx(change, rel=1e-5)


def test_register_to_reference_restarts_for_a_rotated_brain(reference_volume: Volume, scan: Volume) -> None:
    fixed = reference_volume.coarse(8.0)
    turned = Volume(scan.data, rotation_about(scan.centre(), (0.0, 0.0, 90.0)) @ scan.affine, scan.mask)
    best = rotated_starts(fixed, turned.coarse(8.0), 1)[0]
    truth = rotation_about(scan.centre(), (0.0, 0.0, 90.0)) @ known_move()
    angle = np.degrees(np.arccos((np.trace(best[:3, :3].T @ truth[:3, :3]) - 1) / 2))
    assert angle < 30


def test_similarity_is_one_for_itself_and_zero_for_noise(scan: Volume) -> None:
    assert similarity(scan, scan, np.eye(4)) == pytest.approx(1.0, abs=1e-6)
    rng = np.random.default_rng(0)
    noise = Volume(rng.random(scan.data.shape).astype(np.float32), scan.affine)
    assert similarity(scan, noise, np.eye(4)) < 0.01


def test_similarity_is_mutual_information_over_joint_entropy(scan: Volume) -> None:
    from sklearn.metrics import mutual_info_score

    small = scan.coarse(6.0)
    moved = Volume(t2w_like(small.data), small.affine, small.mask)
    one, other = (
        np.histogram_bin_edges([0.0, 1.0], BINS)
        .searchsorted(rescale_percentiles(volume.data[small.mask]), side="right")
        .clip(1, BINS)
        for volume in (small, moved)
    )
    pairs = np.unique(np.stack([one, other]), axis=1, return_counts=True)[1] / small.mask.sum()
    expected = mutual_info_score(one, other) / -(pairs * np.log(pairs)).sum()
    assert similarity(small, moved, np.eye(4)) == pytest.approx(expected, rel=1e-9)


def test_similarity_uses_the_union_of_the_masks(scan: Volume) -> None:
    """Also where one of the two brains is missing: a shift is seen at the outline."""
    from sklearn.metrics import mutual_info_score

    fixed = scan.coarse(6.0)
    shift = 2
    moved = Volume(np.roll(fixed.data, shift, axis=1), fixed.affine, np.roll(fixed.mask, shift, axis=1))
    region = fixed.mask | moved.mask
    levels = [
        np.minimum((rescale_percentiles(volume.data[region]) * BINS).astype(int), BINS - 1)
        for volume in (fixed, moved)
    ]
    counts = np.unique(np.stack(levels), axis=1, return_counts=True)[1] / region.sum()
    expected = mutual_info_score(*levels) / -(counts * np.log(counts)).sum()
    assert similarity(fixed, moved, np.eye(4)) == pytest.approx(expected, rel=1e-6)


def test_rescale_percentiles_maps_percentiles_to_0_and_1() -> None:
    values = np.random.default_rng(0).permutation(np.arange(1001.0))
    np.testing.assert_allclose(rescale_percentiles(values), np.clip((values - 5) / 990, 0, 1), atol=1e-12)
    assert not rescale_percentiles(np.full(7, 3.0)).any()


@pytest.mark.parametrize("apart", [0.0, 9.0, 20.0, 45.0])
def test_mask_overlap_of_two_balls_is_that_of_their_lens(apart: float) -> None:
    """Two balls of radius r at a distance d share a lens of pi (4 r + d) (2 r - d)^2 / 12."""
    radius = 20.0
    grid = np.indices((60, 110, 60)) - np.array([29.5, 54.5, 29.5]).reshape(3, 1, 1, 1)
    ball = (grid**2).sum(axis=0) < radius**2
    volume = Volume(ball.astype(np.float32), np.eye(4), ball)
    lens = np.pi * (4 * radius + apart) * max(2 * radius - apart, 0) ** 2 / 12
    expected = lens / (4 / 3 * np.pi * radius**3)
    pull = translation(np.array([0.0, apart, 0.0]))
    assert mask_overlap(volume, volume, pull) == pytest.approx(expected, abs=0.005)
    larger = Volume(ball.astype(np.float32), np.diag([1.2, 1.2, 1.2, 1.0]), ball)
    centred = centred_start(volume, larger)
    assert mask_overlap(volume, larger, centred) == pytest.approx(2 / (1 + 1.2**3), abs=0.01)


def test_register_best_keeps_the_most_similar_result(
    reference_volume: Volume, scan: Volume, tmp_path: Path
) -> None:
    fixed, moving = reference_volume.coarse(6.0).cropped(2), scan.coarse(6.0)
    far = known_move() @ rotation_about(fixed.centre(), (0.0, 0.0, 90.0))
    for starts in ([far, known_move()], [known_move(), far]):
        pull, score = register_best(fixed, moving, starts, tmp_path, RegistrationSchedule((50,), (1,), (0,)))
        assert target_error(pull, known_move(), fixed) < 3
        assert score == pytest.approx(similarity(fixed, moving, pull))
        assert score > similarity(fixed, moving, far)


def test_volume_coarse_keeps_position_and_mask_volume() -> None:
    grid = np.indices((60, 60, 40)).astype(float)
    grid[2] *= 1.5
    ball = ((grid - np.array([30, 28, 29]).reshape(3, 1, 1, 1)) ** 2).sum(axis=0) < 20**2
    volume = Volume(100.0 * ball, np.diag([-1.0, 1.0, 1.5, 1.0]), ball)
    for spacing in (2.0, 3.0):
        coarse = volume.coarse(spacing)
        np.testing.assert_allclose(coarse.centre(), volume.centre(), atol=0.1)
        assert coarse.mask.sum() * spacing**3 == pytest.approx(ball.sum() * 1.5, rel=0.04)
        cropped = coarse.cropped(2)
        np.testing.assert_allclose(cropped.centre(), coarse.centre(), atol=1e-9)
        assert cropped.mask.sum() == coarse.mask.sum()
        assert cropped.data.shape == tuple(np.ptp(np.argwhere(coarse.mask), axis=0) + 5)


def test_refine_rigid_converges_to_one_transform(reference_volume: Volume, scan: Volume) -> None:
    fixed, moving = reference_volume.coarse(3.0).cropped(4), scan.coarse(3.0).cropped(4)
    found = []
    for aside in ((2.0, -2.0, 1.0), (-1.0, 2.0, -2.0)):
        start = known_move() @ translation(np.array(aside)) @ rotation_about(fixed.centre(), aside)
        assert target_error(start, known_move(), fixed) > 2
        found.append(refine_rigid(fixed, moving, start))
        np.testing.assert_allclose(found[-1][:3, :3] @ found[-1][:3, :3].T, np.eye(3), atol=1e-12)
    assert target_error(found[0], found[1], fixed) < 0.05
    assert target_error(found[0], known_move(), fixed) < 0.6  # a fifth of a voxel


def test_bias_correction_removes_a_known_field(reference_volume: Volume) -> None:
    brain = reference_volume.coarse(3.0)
    x = np.linspace(-1, 1, brain.data.shape[0])[:, None, None]
    field = np.exp(0.6 * x) * np.ones(brain.data.shape)
    corrected = correct_bias(brain.data * field, brain.affine, brain.mask, FEW)
    inside = brain.mask & (brain.data > 100)
    before = np.std(np.log((brain.data * field)[inside] / brain.data[inside]))
    # The template has a little shading of its own; what counts is the field that was put on it.
    plain = correct_bias(brain.data, brain.affine, brain.mask, FEW)
    after = np.std(np.log(corrected[inside] / plain[inside]))
    assert before > 0.12
    assert after < 0.25 * before
    assert np.median(corrected[brain.mask]) == pytest.approx(
        np.median((brain.data * field)[brain.mask]), rel=1e-4
    )


def test_bias_correction_depends_on_neither_unit_nor_surroundings(reference_volume: Volume) -> None:
    brain = reference_volume.coarse(4.0)
    x = np.linspace(-1, 1, brain.data.shape[0])[:, None, None]
    scan = np.where(brain.mask, brain.data, 0.0) * np.exp(0.4 * x)
    scan[0, 0, 0] = -50.0
    plain = correct_bias(scan, brain.affine, brain.mask, FEW)
    assert plain.min() == 0.0
    scaled = correct_bias(0.01 * scan, brain.affine, brain.mask, FEW)
    np.testing.assert_allclose(scaled, 0.01 * plain, rtol=2e-3, atol=1e-4 * plain.max())
    # A bright scalp is left alone, and the field goes on smoothly into it and beyond.
    outside = ~brain.mask
    bright = np.where(outside, 4 * brain.data.max(), scan)
    corrected = correct_bias(bright, brain.affine, brain.mask, FEW)
    np.testing.assert_allclose(corrected[brain.mask], plain[brain.mask], rtol=2e-3, atol=1e-4 * plain.max())
    field = np.log(corrected[outside] / bright[outside])
    logarithm = np.full(brain.data.shape, np.nan)
    logarithm[outside] = field
    assert np.ptp(field) > 0.3
    for axis in range(3):
        assert np.nanmax(np.abs(np.diff(logarithm, axis=axis))) < 0.06


def test_bias_correction_refuses_an_empty_mask() -> None:
    with pytest.raises(ValueError, match="no signal"):
        correct_bias(np.zeros((8, 8, 8)), np.eye(4), np.ones((8, 8, 8), dtype=bool))


def test_dice_equals_that_of_scipy():
    rng = np.random.default_rng(0)
    for share in (0.01, 0.5, 0.9):
        one, other = rng.random((2, 6, 7, 8)) < share
        assert dice(one, other) == pytest.approx(1 - distance.dice(one.ravel(), other.ravel()))


def test_dice_of_empty_masks_is_0():
    nothing, all_of_it = np.zeros((3, 3, 3), dtype=bool), np.ones((3, 3, 3), dtype=bool)
    assert dice(nothing, nothing) == dice(nothing, all_of_it) == 0.0
    assert dice(all_of_it, all_of_it) == 1.0
