from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bids_uad.images import make_image, save_image
from tests.header_contract import header_faults, read_header, sform

AFFINES = {
    "RAS": np.diag([1.0, 1.0, 1.0, 1.0]),
    "LPS": np.array([[-1.0, 0, 0, 90], [0, -1.0, 0, 120], [0, 0, 2.0, -70], [0, 0, 0, 1]]),
    "left-handed": np.array([[-1.0, 0, 0, 90], [0, 1.0, 0, -120], [0, 0, 2.0, -70], [0, 0, 0, 1]]),
    "sagittal": np.array([[0, 0, 1.2, -90], [-0.9, 0, 0, 120], [0, -0.9, 0, 110], [0, 0, 0, 1]]),
    "oblique": nib.affines.from_matvec(
        nib.eulerangles.euler2mat(0.2, -0.1, 0.3) * [1, 1, 5.0], [-90, -80, 9]
    ),
    # Half a turn with a slight tilt: the scalar part of the quaternion is next to nothing.
    "half turn": nib.affines.from_matvec(nib.eulerangles.euler2mat(np.pi, 0.01, 0.09) * 0.8, [90, 80, 9]),
}


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float32])
@pytest.mark.parametrize("name", AFFINES)
def test_written_images_keep_the_header_contract(tmp_path: Path, name: str, dtype: type) -> None:
    values = np.arange(240).reshape(4, 5, 12)
    path = save_image(make_image(values, AFFINES[name], dtype), tmp_path / "image.nii.gz")
    assert header_faults(path) == []
    np.testing.assert_array_equal(sform(read_header(path)), AFFINES[name][:3].astype(np.float32))
    np.testing.assert_array_equal(np.asarray(nib.load(path).dataobj), values)


def test_four_dimensional_images_keep_the_header_contract(tmp_path: Path) -> None:
    path = save_image(make_image(np.ones((3, 4, 5, 6)), np.eye(4), np.float32), tmp_path / "image.nii")
    assert header_faults(path) == []


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.uint16, bool])
def test_make_image_refuses_other_data_types(dtype: type) -> None:
    with pytest.raises(ValueError, match="must be one of uint8, int16, int32, float32; got"):
        make_image(np.zeros((2, 2, 2)), np.eye(4), dtype)


def test_equal_images_make_equal_files(tmp_path: Path) -> None:
    image = make_image(np.arange(64).reshape(4, 4, 4), np.eye(4), np.float32)
    one, other = (save_image(image, tmp_path / name) for name in ("one.nii.gz", "other.nii.gz"))
    assert one.read_bytes() == other.read_bytes()


def test_header_contract_finds_faults(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.zeros((90, 90, 90), np.int16), np.eye(4))
    image.header.set_slope_inter(2.0, 1.0)
    image.set_sform(np.diag([1.0, 1.0, 1.1, 1.0]), code=1)
    nib.save(image, tmp_path / "image.nii.gz")
    assert len(header_faults(tmp_path / "image.nii.gz")) == 5
