from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from bids_uad.extraction.find import find_brain, load_network
from bids_uad.preprocessing.brain import extract_brain, mask_of_stripped
from bids_uad.preprocessing.check import read_scan, read_volume
from bids_uad.preprocessing.extraction import packaged_weights
from bids_uad.preprocessing.registration import Volume

from .conftest import NATIVE_AFFINE, NATIVE_SHAPE, REAL_DATA, draw, known_move


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2.0 * float((a & b).sum()) / float(a.sum() + b.sum())


@pytest.mark.parametrize("background", [0.0, -5.0])
def test_the_mask_of_a_stripped_scan_has_no_holes_and_no_crumbs(background: float) -> None:
    grid = np.indices((40, 40, 40)) - 19.5
    radius = np.sqrt((grid**2).sum(axis=0))
    data = np.where(radius < 15, 100.0, background)
    data[radius < 4] = background  # dark ventricle
    data[1, 1, 1] = 3.0  # crumb
    np.testing.assert_array_equal(mask_of_stripped(data), radius < 15)


def head_around(brain: np.ndarray) -> np.ndarray:
    """Put noisy skull, scalp and a neck around a brain: whole-head T1w of a phantom on 3 mm voxels."""
    rng = np.random.default_rng(1)
    inside = brain > 0
    distance = ndimage.distance_transform_edt(~inside) * 3.0
    scalp = (distance > 8) & (distance < 16)
    neck = np.zeros(brain.shape, dtype=bool)
    i, j, k = (int(c) for c in ndimage.center_of_mass(inside))
    neck[i - 14 : i + 14, j - 16 : j + 16, : k - 18] = True
    soft = (scalp | (neck & (distance > 8))) & ~inside
    head = np.where(inside, brain, 0.0) + np.where(soft, 700.0, 0.0)
    return np.abs(head + rng.normal(0, 15, brain.shape)).astype(np.float32)


@pytest.mark.slow
def test_a_brain_is_found_in_a_head(reference_volume: Volume, tmp_path: Path) -> None:
    brain = draw(reference_volume, known_move(), NATIVE_SHAPE, NATIVE_AFFINE)
    head = Volume(head_around(brain), NATIVE_AFFINE)
    found, agreement = extract_brain(head, reference_volume, tmp_path)
    assert agreement is None
    assert dice(found, brain > 0) > 0.95


@pytest.fixture
def witnesses(monkeypatch: pytest.MonkeyPatch) -> tuple[Volume, np.ndarray]:
    """A head with a ball for a brain, of which the template sees 2 mm too high."""
    grid = np.indices((80, 80, 80)) - 39.5
    ball = (grid**2).sum(axis=0) < 25**2
    data = np.where(ball, 100.0, 0.0) + np.where((grid**2).sum(axis=0) < 34**2, 8.0, 0.0)
    monkeypatch.setattr("bids_uad.preprocessing.brain._by_template", lambda *_: np.roll(ball, 1, axis=2))
    monkeypatch.setattr("bids_uad.preprocessing.brain._refine", lambda mask, _: mask)
    monkeypatch.setattr("bids_uad.preprocessing.brain.correct_bias", lambda data, *_: data)
    return Volume(data.astype(np.float32), np.diag([2.0, 2.0, 2.0, 1.0])), ball


def test_two_masks_that_agree_meet_halfway_and_a_millimetre_outside(witnesses, tmp_path: Path) -> None:
    head, ball = witnesses
    mask, agreement = extract_brain(head, head, tmp_path, np.roll(ball, -1, axis=2))
    assert agreement == pytest.approx(dice(np.roll(ball, 1, axis=2), np.roll(ball, -1, axis=2)))
    assert ball[mask].mean() < 1
    assert mask[ball].mean() > 0.999  # halfway between the two is the ball itself
    along = np.flatnonzero(mask[40, 40]).min(), np.flatnonzero(mask[40, 40]).max()
    assert along[1] - along[0] + 1 in (50, 51, 52)  # 50 voxels of 2 mm, a millimetre more on each side


def test_of_two_that_contradict_each_other_the_network_is_believed(witnesses, tmp_path: Path) -> None:
    head, ball = witnesses
    far = np.roll(ball, -10, axis=2)
    crumb = np.zeros_like(ball)
    crumb[2:4, 2:4, 2:4] = True
    mask, agreement = extract_brain(head, head, tmp_path, far | crumb)
    assert agreement < 0.9
    np.testing.assert_array_equal(mask, far)
    mask, agreement = extract_brain(head, head, tmp_path, np.zeros_like(ball))
    assert agreement == 0.0
    np.testing.assert_array_equal(mask, np.roll(ball, 1, axis=2))
    mask, agreement = extract_brain(head, None, tmp_path, far)
    assert agreement is None
    np.testing.assert_array_equal(mask, far)


@pytest.mark.slow
@pytest.mark.skipif(not (REAL_DATA / "brains").is_dir(), reason="real scans are not here")
@pytest.mark.parametrize(
    ("scan", "least"),
    [
        ("sub-tcgafg6692/anat/sub-tcgafg6692_{}T1w{}", 0.95),
        ("sub-tcgafg6692/anat/sub-tcgafg6692_{}T2w{}", 0.92),
        ("sub-umcllg01/ses-1/anat/sub-umcllg01_ses-1_{}T1w{}", 0.95),
        ("sub-umcllg01/ses-1/anat/sub-umcllg01_ses-1_{}T2w{}", 0.94),
    ],
)
def test_a_brain_is_found_in_real_heads(
    scan: str, least: float, reference_volume: Volume, tmp_path: Path
) -> None:
    image = read_scan(REAL_DATA / "brains" / scan.format("", ".nii.gz"))
    mask = scan.format("space-", "_desc-brain_mask.nii.gz")
    truth = read_volume(REAL_DATA / "brains" / "derivatives" / "brainmasks" / mask)[0] > 0
    seen = find_brain(image.data, image.affine, load_network(packaged_weights()))
    found, _ = extract_brain(Volume(image.data, image.affine), reference_volume, tmp_path, seen)
    assert dice(found, truth) > least
