"""A brain that moves: the built-in reference, drawn on coarse native grids at known positions."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bids_uad.preprocessing.check import read_volume
from bids_uad.preprocessing.reference import Reference, resolve_reference
from bids_uad.preprocessing.registration import Volume
from bids_uad.preprocessing.resampling import resample, rotation_about, translation

REAL_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
NATIVE_SHAPE = (72, 84, 72)
NATIVE_AFFINE = np.array([[-3.0, 0, 0, -12], [0, 3.0, 0, -2], [0, 0, 3.0, -30], [0, 0, 0, 1]])

MNI_TO_SRI24 = np.array(
    [
        [0.922126, -0.009894, -0.001188, -119.058579],
        [-0.006933, 0.935744, -0.186456, 125.592415],
        [-0.007382, 0.192645, 0.846861, 71.853679],
        [0.0, 0.0, 0.0, 1.0],
    ]
)
"""Affine from ICBM152 to SRI24 by ANTs, mm."""


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TEMPLATEFLOW_HOME", raising=False)
        return resolve_reference(None, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def reference_volume(reference: Reference) -> Volume:
    data, affine = read_volume(reference.t1w)
    return Volume(data, affine, read_volume(reference.brain_mask)[0] > 0)


def known_move() -> np.ndarray:
    """From SRI24 points to points of the phantom: 8, -6 and 10 degrees about the brain, and a shift."""
    centre = np.array([-119.0, 116.0, 76.0])
    return translation(np.array([7.0, -9.0, 5.0])) @ rotation_about(centre, (8.0, -6.0, 10.0))


def draw(brain: Volume, move: np.ndarray, shape: tuple[int, int, int], affine: np.ndarray) -> np.ndarray:
    """Draw the reference brain on a native grid, after `move`, with noise and a bias field."""
    back = np.linalg.inv(move)
    image = resample(np.where(brain.mask, brain.data, 0.0), brain.affine, shape, affine, back)
    inside = resample(brain.mask, brain.affine, shape, affine, back) > 0.5
    ramp = np.linspace(0.8, 1.2, shape[0])[:, None, None]
    noise = np.random.default_rng(3).normal(0.0, 8.0, shape)
    return np.where(inside, np.maximum(image * ramp + noise, 1.0), 0.0).astype(np.float32)


def t2w_like(t1w: np.ndarray) -> np.ndarray:
    """Turn the contrast round inside the brain."""
    return np.where(t1w > 0, 1100.0 - t1w, 0.0).astype(np.float32)


def save(path: Path, data: np.ndarray, affine: np.ndarray, code: int = 1) -> Path:
    image = nib.Nifti1Image(data, affine)
    image.set_sform(affine, code=code)
    image.set_qform(affine, code=code)
    image.to_filename(path)
    return path
