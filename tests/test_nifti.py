"""Damaged NIfTI files: whatever bytes are wrong, one is read or refused with one line that names it."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bids_uad.errors import InputError
from bids_uad.images import grid_of, open_nifti, read_data, same_grid
from bids_uad.preprocessing.check import header_warnings, read_scan

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


def test_a_wrong_byte_in_compressed_data_is_never_taken(tmp_path):
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


def test_values_are_those_that_nibabel_gives(tmp_path):
    path = tmp_path / "sub-01_T1w.nii.gz"
    data = np.random.default_rng(0).normal(300, 50, SHAPE)
    image = nib.Nifti1Image(data, AFFINE)
    image.set_data_dtype(np.int16)  # with slope and intercept
    image.to_filename(path)
    read = read_data(path, open_nifti(path))
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, nib.load(path).get_fdata(dtype=np.float32))
    np.testing.assert_allclose(read, data, atol=0.01)
