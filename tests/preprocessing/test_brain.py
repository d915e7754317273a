from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from bids_uad.preprocessing.brain import extract_brain, mask_of_stripped
from bids_uad.preprocessing.check import read_scan, read_volume
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
    found = extract_brain(Volume(head_around(brain), NATIVE_AFFINE), reference_volume, tmp_path)
    assert dice(found, brain > 0) > 0.95


@pytest.mark.slow
@pytest.mark.skipif(not (REAL_DATA / "brains").is_dir(), reason="real scans are not here")
@pytest.mark.parametrize(
    ("scan", "mask"),
    [
        (
            "sub-tcgafg6692/anat/sub-tcgafg6692_T1w.nii.gz",
            "sub-tcgafg6692/anat/sub-tcgafg6692_space-T1w_desc-brain_mask.nii.gz",
        ),
        (
            "sub-umcllg01/ses-1/anat/sub-umcllg01_ses-1_T1w.nii.gz",
            "sub-umcllg01/ses-1/anat/sub-umcllg01_ses-1_space-T1w_desc-brain_mask.nii.gz",
        ),
    ],
)
def test_a_brain_is_found_in_real_heads(
    scan: str, mask: str, reference_volume: Volume, tmp_path: Path
) -> None:
    data, affine = read_scan(REAL_DATA / "brains" / scan)
    truth = read_volume(REAL_DATA / "brains" / "derivatives" / "brainmasks" / mask)[0] > 0
    found = extract_brain(Volume(data, affine), reference_volume, tmp_path)
    assert dice(found, truth) > 0.94
