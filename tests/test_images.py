"""NIfTI images: header contract, reading of damaged files, grids, and intensity scaling."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bids_uad.errors import InputError
from bids_uad.images import (
    grid_of,
    load_image,
    make_image,
    open_nifti,
    read_data,
    same_grid,
    save_image,
    scale_intensity,
)
from bids_uad.preprocessing.check import header_warnings, read_scan
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


@pytest.mark.parametrize("name", ["image.nii", "image.nii.gz"])
def test_compressed_images_are_those_of_nibabel(tmp_path: Path, name: str) -> None:
    values = np.random.default_rng(0).normal(size=(20, 30, 10)).astype(np.float32)
    image = make_image(values, AFFINES["oblique"], np.float32)
    nib.save(image, tmp_path / f"nibabel_{name}")
    path = save_image(image, tmp_path / name)
    theirs, ours = (file.read_bytes() for file in (tmp_path / f"nibabel_{name}", path))
    if name.endswith(".gz"):
        theirs, ours = gzip.decompress(theirs), gzip.decompress(ours)
    assert ours == theirs
    for loaded in (load_image(tmp_path / f"nibabel_{name}"), load_image(path)):
        np.testing.assert_array_equal(np.asanyarray(loaded.dataobj), values)
        np.testing.assert_array_equal(loaded.affine, nib.load(path).affine)


def test_header_contract_finds_faults(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.zeros((90, 90, 90), np.int16), np.eye(4))
    image.header.set_slope_inter(2.0, 1.0)
    image.set_sform(np.diag([1.0, 1.0, 1.1, 1.0]), code=1)
    nib.save(image, tmp_path / "image.nii.gz")
    assert len(header_faults(tmp_path / "image.nii.gz")) == 5


SHAPE = (12, 12, 12)
AFFINE = np.diag([9.0, 9.0, 9.0, 1.0])


def content(version: type[nib.Nifti1Image] = nib.Nifti1Image) -> bytes:
    data = np.random.default_rng(0).integers(1, 1000, SHAPE).astype(np.int16)
    data[[0, -1]] = 0
    return version(data, AFFINE).to_bytes()


def grids_are_comparable(path: Path) -> None:
    grid = grid_of(path)
    assert same_grid(grid, grid)


def scan_and_doubts(path: Path) -> None:
    """Read as the first node of preprocessing does."""
    read_scan(path)
    header_warnings(path)


def pixels(path: Path) -> None:
    read_data(path, open_nifti(path))


@pytest.mark.parametrize("version", [nib.Nifti1Image, nib.Nifti2Image], ids=["NIfTI-1", "NIfTI-2"])
@pytest.mark.parametrize("read", [scan_and_doubts, grids_are_comparable, pixels])
@pytest.mark.filterwarnings("error")
def test_random_bytes_in_a_header_are_read_or_refused(tmp_path, version, read):
    random = np.random.default_rng(4)
    original = content(version)
    path = tmp_path / "sub-01_T1w.nii"
    outcomes, messages = set(), []
    for _ in range(150):
        spoilt = bytearray(original)
        for position in random.integers(0, version.header_class.single_vox_offset, random.integers(1, 8)):
            spoilt[position] = random.integers(256)
        path.write_bytes(spoilt)
        try:
            read(path)
            outcomes.add("read")
        except InputError as error:
            messages.append(str(error))
    assert outcomes
    assert messages
    assert all(message.startswith(f"{path}: ") and "\n" not in message for message in messages)


def test_read_data_refuses_a_corrupt_byte_in_compressed_data(tmp_path):
    random = np.random.default_rng(5)
    original = gzip.compress(content(), mtime=0)
    path = tmp_path / "sub-01_T1w.nii.gz"
    for position in random.integers(10, len(original) - 4, 100):
        spoilt = bytearray(original)
        spoilt[position] ^= 1 << random.integers(8)
        path.write_bytes(spoilt)
        with pytest.raises(InputError) as caught:
            read_scan(path)
        assert str(caught.value).startswith(f"{path}: ")


def test_read_data_equals_nibabel(tmp_path):
    path = tmp_path / "sub-01_T1w.nii.gz"
    data = np.random.default_rng(0).normal(300, 50, SHAPE)
    image = nib.Nifti1Image(data, AFFINE)
    image.set_data_dtype(np.int16)  # with slope and intercept
    image.to_filename(path)
    read = read_data(path, open_nifti(path))
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, nib.load(path).get_fdata(dtype=np.float32))
    np.testing.assert_allclose(read, data, atol=0.01)


def test_scale_intensity_maps_the_percentile_of_the_brain_to_1() -> None:
    rng = np.random.default_rng(0)
    brain = rng.random((20, 21, 22)) < 0.3
    # What lies outside the brain is brighter and must not matter; noise may be negative.
    volume = np.where(brain, rng.normal(300, 150, brain.shape), 5000.0)
    scaled = scale_intensity(volume, brain)
    inside = np.sort(volume[brain])
    # Linear interpolation between order statistics (Hyndman and Fan 1996, definition 7).
    place = 0.995 * (len(inside) - 1)
    low = int(place)
    upper = inside[low] + (place - low) * (inside[low + 1] - inside[low])
    np.testing.assert_allclose(scaled[brain], np.maximum(volume[brain] / upper, 0), rtol=1e-5)
    assert scaled.dtype == np.float32
    assert not scaled[~brain].any()
    assert scaled.max() == pytest.approx(inside[-1] / upper, rel=1e-5)  # not cut above
    assert (volume[brain] < 0).any()


def test_scale_intensity_does_not_depend_on_the_unit() -> None:
    rng = np.random.default_rng(1)
    volume, brain = rng.gamma(2, 100, (12, 12, 12)), np.ones((12, 12, 12), dtype=bool)
    np.testing.assert_allclose(
        scale_intensity(volume, brain), scale_intensity(37.5 * volume, brain), rtol=1e-5
    )


def test_scale_intensity_refuses_an_empty_or_dark_brain() -> None:
    with pytest.raises(ValueError, match="mask is empty"):
        scale_intensity(np.ones((3, 3, 3)), np.zeros((3, 3, 3), dtype=bool))
    with pytest.raises(ValueError, match="no positive intensity"):
        scale_intensity(-np.ones((3, 3, 3)), np.ones((3, 3, 3), dtype=bool))
