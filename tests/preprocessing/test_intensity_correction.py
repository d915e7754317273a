"""MP2RAGE images simulated from two inversion images with complex Gaussian noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bids_uad.preprocessing.check import is_skull_stripped, read_scan
from bids_uad.preprocessing.intensity_correction import is_uniform_image, mask_background

from .conftest import save

AFFINE = np.diag([2.5, 2.5, 2.5, 1.0])
SHAPE = (84, 84, 84)
RADIUS = 2.5 * np.sqrt(sum((index - 42) ** 2 for index in np.indices(SHAPE)))
"""Distance from the centre of the head, mm."""
LONGITUDINAL = {"white": (0.9, 0.70), "grey": (1.4, 0.82), "fluid": (4.0, 1.0), "scalp": (0.5, 0.8)}
"""T1 (s) and proton density."""


def tissues() -> dict[str, np.ndarray]:
    """Concentric: a ventricle, white and grey matter, fluid, bone (dark), scalp, and air around."""
    edges = {"fluid": 15, "white": 55, "grey": 68, "csf": 72, "bone": 79, "scalp": 86}
    found, inner = {}, -1.0
    for name, outer in edges.items():
        found[name] = (inner < RADIUS) & (outer >= RADIUS)
        inner = outer
    found["fluid"] |= found.pop("csf")
    return found


def uniform_image(snr: float) -> np.ndarray:
    """Combine two noisy inversions to an image from -0.5 to 0.5 (Marques et al. 2010, equation 3)."""
    random = np.random.default_rng(1)
    inversions = []
    for delay in (0.8, 2.7):
        signal = np.zeros(SHAPE)
        for name, where in tissues().items():
            if name in LONGITUDINAL:
                relaxation, density = LONGITUDINAL[name]
                signal[where] = density * (1 - 2 * np.exp(-delay / relaxation))
        noise = random.normal(0, 0.5 / snr, (2, *SHAPE))
        inversions.append(signal + noise[0] + 1j * noise[1])
    first, second = inversions
    return np.real(np.conj(first) * second) / (np.abs(first) ** 2 + np.abs(second) ** 2)


def in_scanner_units(image: np.ndarray) -> np.ndarray:
    return np.round((image + 0.5) * 4095).astype(np.float32)


@pytest.mark.parametrize("snr", [8, 20, 40])
def test_mask_background_sets_air_to_0_and_keeps_the_head(snr):
    image = in_scanner_units(uniform_image(snr))
    air = RADIUS > 86
    assert np.std(image[air]) == pytest.approx(4095 / np.sqrt(12), rel=0.01)  # uniform
    masked, fraction = mask_background(image, AFFINE)
    inside = RADIUS <= 72
    np.testing.assert_array_equal(masked[inside], image[inside])
    assert np.mean(masked[tissues()["scalp"]] == image[tissues()["scalp"]]) > 0.95
    assert np.mean(masked[air] == 0) > 0.97
    assert fraction == pytest.approx(np.mean(air), abs=0.03)


@pytest.mark.parametrize("value", [0, 2048])
def test_mask_background_leaves_an_image_without_noise_unchanged(value):
    image = np.where(RADIUS > 86, np.float32(value), in_scanner_units(uniform_image(20)))
    masked, fraction = mask_background(image, AFFINE)
    assert fraction == 0
    np.testing.assert_array_equal(masked, image)


def test_mask_background_leaves_pure_noise_unchanged():
    noise = np.random.default_rng(0).uniform(0, 4095, (40, 40, 40)).astype(np.float32)
    assert mask_background(noise, AFFINE)[1] == 0


@pytest.mark.parametrize("units", [in_scanner_units, np.float32], ids=["scanner", "ratio"])
def test_read_scan_masks_the_background_of_mp2rage(tmp_path: Path, units):
    path = save(tmp_path / "sub-01_UNIT1.nii.gz", np.asarray(units(uniform_image(20)), np.float32), AFFINE)
    scan = read_scan(path)
    assert scan.data.min() == 0
    assert np.mean(scan.data[RADIUS > 86] == 0) > 0.97
    assert scan.notes[0].startswith("The noise around the head of the MP2RAGE image (7")
    assert not is_skull_stripped(scan.data, scan.affine)


def test_read_scan_sets_nan_background_to_0(tmp_path: Path):
    image = np.where(RADIUS > 86, np.nan, uniform_image(20)).astype(np.float32)
    scan = read_scan(save(tmp_path / "sub-01_UNIT1.nii.gz", image, AFFINE))
    assert np.all(scan.data[RADIUS > 86] == 0)
    inside = RADIUS <= 86
    np.testing.assert_allclose(scan.data[inside], image[inside] - image[inside].min(), atol=1e-6)
    assert scan.notes == (f"{np.sum(RADIUS > 86):,} NaN or infinite voxels of the background were set to 0.",)


def test_read_scan_keeps_the_background_of_other_images(tmp_path: Path):
    image = in_scanner_units(uniform_image(20))
    scan = read_scan(save(tmp_path / "sub-01_T1w.nii.gz", image, AFFINE))
    np.testing.assert_array_equal(scan.data, image)
    assert scan.notes == ()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sub-01_UNIT1.nii.gz", True),
        ("sub-01_acq-UNIT1_T1w.nii", False),
        ("sub-01_inv-1_MP2RAGE.nii.gz", False),
    ],
)
def test_is_uniform_image_reads_the_suffix(name, expected):
    assert is_uniform_image(f"/UNIT1/{name}") is expected
