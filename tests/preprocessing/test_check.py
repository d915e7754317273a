from __future__ import annotations

import gzip
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bids_uad.errors import InputError
from bids_uad.preprocessing.check import check_image, header_warnings, is_skull_stripped

from .conftest import REAL_DATA, save

AFFINE = np.diag([4.0, 4.0, 4.0, 1.0])


def head() -> np.ndarray:
    grid = np.indices((50, 50, 50)) - 24.5
    radius = np.sqrt((grid**2).sum(axis=0))
    return np.where(radius < 23, 100 + 20 * np.cos(radius), 0).astype(np.float32)


def good(folder: Path, data: np.ndarray | None = None, affine: np.ndarray = AFFINE) -> Path:
    return save(folder / "sub-01_T1w.nii.gz", head() if data is None else data, affine)


def test_a_good_image_passes(tmp_path: Path) -> None:
    check_image(good(tmp_path))


def test_a_trailing_axis_of_one_passes(tmp_path: Path) -> None:
    check_image(good(tmp_path, head()[..., None]))


def truncated_gzip(folder: Path) -> Path:
    path = good(folder, np.random.default_rng(0).random((50, 50, 50)).astype(np.float32))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def truncated_plain(folder: Path) -> Path:
    path = save(folder / "sub-01_T1w.nii", head(), AFFINE)
    path.write_bytes(path.read_bytes()[:5000])
    return path


def corrupt_header(folder: Path) -> Path:
    path = save(folder / "sub-01_T1w.nii", head(), AFFINE)
    content = bytearray(path.read_bytes())
    content[70:72] = (999).to_bytes(2, "little")  # a data type that does not exist
    path.write_bytes(bytes(content))
    return path


def corrupt_dimensions(folder: Path) -> Path:
    path = save(folder / "sub-01_T1w.nii", head(), AFFINE)
    content = bytearray(path.read_bytes())
    content[40:56] = (-3).to_bytes(2, "little", signed=True) * 8
    path.write_bytes(bytes(content))
    return path


def not_an_image(folder: Path) -> Path:
    path = folder / "sub-01_T1w.nii.gz"
    path.write_bytes(gzip.compress(b"<html>404</html>"))
    return path


def empty(folder: Path) -> Path:
    path = folder / "sub-01_T1w.nii.gz"
    path.touch()
    return path


def broken_link(folder: Path) -> Path:
    path = folder / "sub-01_T1w.nii.gz"
    path.symlink_to(folder / ".git" / "annex" / "objects" / "gone")
    return path


def with_values(value: float) -> object:
    def make(folder: Path) -> Path:
        data = head()
        data[25, 25, 25] = value
        return good(folder, data)

    return make


def almost_empty(folder: Path) -> Path:
    data = np.zeros((50, 50, 50), np.float32)
    data[20:23, 20:23, 20:23] = 50
    return good(folder, data)


def no_orientation(folder: Path) -> Path:
    path = folder / "sub-01_T1w.nii.gz"
    image = nib.Nifti1Image(head(), AFFINE)
    image.set_sform(None, code=0)
    image.set_qform(None, code=0)
    image.to_filename(path)
    return path


def zero_affine(folder: Path) -> Path:
    path = folder / "sub-01_T1w.nii.gz"
    image = nib.Nifti1Image(head(), AFFINE)
    for row in ("srow_x", "srow_y", "srow_z"):
        image.header[row] = 0
    image.to_filename(path)
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[280:328] = bytes(48)
    raw[254:256] = (1).to_bytes(2, "little")
    path.write_bytes(gzip.compress(bytes(raw)))
    return path


def sheared(folder: Path) -> Path:
    affine = AFFINE.copy()
    affine[0, 1] = 1.0
    path = folder / "sub-01_T1w.nii.gz"
    image = nib.Nifti1Image(head(), affine)
    image.set_sform(affine, code=1)
    image.to_filename(path)
    return path


DEFECTS = [
    (truncated_gzip, "cannot be read"),
    (truncated_plain, "cut short"),
    (corrupt_header, "not a readable image"),
    (corrupt_dimensions, "not a volume|not a readable image|cannot be read"),
    (not_an_image, "not a readable image"),
    (empty, "empty"),
    (broken_link, "datalad get"),
    (lambda folder: folder / "none.nii.gz", "no such file"),
    (lambda folder: good(folder, np.zeros((50, 50, 50), np.float32)), "every voxel has the value 0"),
    (lambda folder: good(folder, np.full((50, 50, 50), 7, np.float32)), "every voxel has the value 7"),
    (with_values(np.nan), "NaN"),
    (with_values(np.inf), "infinite"),
    (lambda folder: good(folder, np.stack([head()] * 2, axis=-1)), "4 dimensions"),
    (lambda folder: good(folder, head()[:, :, 25]), "not a volume"),
    (lambda folder: good(folder, head()[:, :, 25:26]), "not a volume"),
    (lambda folder: good(folder, affine=np.diag([4000.0, 4000.0, 4000.0, 1.0])), "voxel size"),
    (lambda folder: good(folder, affine=np.diag([0.3, 0.3, 0.3, 1.0])), "field of view"),
    (lambda folder: good(folder, (head() - 100) * (head() > 0)), "negative"),
    (almost_empty, "only 1.7 mL"),
    (no_orientation, "no orientation"),
    (zero_affine, "singular"),
    (sheared, "shear"),
]
"""How a scan is spoilt, and what is said about it."""


@pytest.mark.parametrize(("make", "problem"), DEFECTS)
def test_check_image_error_has_the_file_and_the_problem(tmp_path: Path, make, problem: str) -> None:
    path = make(tmp_path)
    with pytest.raises(InputError, match=problem) as caught:
        check_image(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def two_forms(folder: Path, sform: np.ndarray, qform: np.ndarray, codes: tuple[int, int] = (1, 1)) -> Path:
    image = nib.Nifti1Image(head(), None)
    image.set_sform(sform, code=codes[0])
    image.set_qform(qform, code=codes[1])
    image.to_filename(folder / "sub-01_T1w.nii.gz")
    return folder / "sub-01_T1w.nii.gz"


@pytest.mark.parametrize(
    ("qform", "codes", "sentence", "grave"),
    [
        (AFFINE, (1, 1), None, False),
        (AFFINE @ np.diag([-1.0, 1, 1, 1]), (1, 1), "disagree about left and right", True),
        (AFFINE + np.array([[0, 0, 0, 7.0]] + [[0] * 4] * 3), (2, 1), "differ by up to 7 mm", False),
        (AFFINE @ np.diag([-1.0, 1, 1, 1]), (1, 0), None, False),
    ],
)
def test_header_warnings_report_disagreeing_forms(tmp_path: Path, qform, codes, sentence, grave) -> None:
    found = header_warnings(two_forms(tmp_path, AFFINE, qform, codes))
    assert list(found.values()) == ([] if sentence is None else [grave])
    assert all(sentence in text for text in found)


def ball(litres: float, noise: bool = False) -> tuple[np.ndarray, np.ndarray]:
    grid = (np.indices((70, 70, 70)) - 34.5) * 3.0
    radius = (3 * litres * 1e6 / (4 * np.pi)) ** (1 / 3)
    data = np.where((grid**2).sum(axis=0) < radius**2, 100.0, 0.0)
    if noise:
        data += np.abs(np.random.default_rng(0).normal(0, 3, data.shape))
    return data, np.diag([3.0, 3.0, 3.0, 1.0])


@pytest.mark.parametrize(
    ("litres", "noise", "expected"), [(1.3, False, True), (1.3, True, False), (3.5, False, False)]
)
def test_is_skull_stripped_uses_background_and_volume(litres: float, noise: bool, expected: bool) -> None:
    assert is_skull_stripped(*ball(litres, noise)) is expected


@pytest.mark.parametrize("stated", [True, False])
def test_is_skull_stripped_prefers_the_sidecar(stated: bool) -> None:
    assert is_skull_stripped(*ball(1.3 if not stated else 3.5), {"SkullStripped": stated}) is stated


def test_is_skull_stripped_ignores_an_invalid_sidecar_value() -> None:
    assert is_skull_stripped(*ball(1.3), {"SkullStripped": "unknown"}) is True


@pytest.mark.slow
@pytest.mark.skipif(not (REAL_DATA / "brains").is_dir(), reason="real scans are not here")
def test_real_scans_are_classified_as_their_sidecars_say() -> None:
    scans = sorted((REAL_DATA / "brains").glob("sub-*/**/*_T[12]w.nii.gz"))
    assert scans
    wrong = []
    for path in scans:
        check_image(path)
        image = nib.load(path)
        stated = json.loads(Path(str(path).replace(".nii.gz", ".json")).read_text())["SkullStripped"]
        if is_skull_stripped(np.asarray(image.dataobj, dtype=np.float32), image.affine) is not stated:
            wrong.append(path.name)
    assert wrong == []
