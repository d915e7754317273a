"""Many kinds of scans in one dataset: unusable ones are reported, all others processed."""

from __future__ import annotations

import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tests.dataset.skeleton import write_mask
from tests.levels.test_participant_run import Bench, reference, stand_ins  # noqa: F401
from tests.preprocessing.test_check import AFFINE, DEFECTS, head, two_forms

OBLIQUE = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.2, -0.1, 0.3) * 4.0, [-90, -80, -70])


def stored(data: np.ndarray, affine: np.ndarray = AFFINE, *, ending: str = ".nii.gz", endian: str = "<"):
    """Return a function that stores an image in a certain format."""

    def make(folder: Path) -> Path:
        header = nib.Nifti1Header(endianness=endian)
        header.set_data_dtype(data.dtype)
        path = folder / f"sub-01_T1w{ending}"
        nib.save(nib.Nifti1Image(data, affine, header), path)
        return path

    return make


def scaled(folder: Path) -> Path:
    """Integers with a slope and an intercept."""
    image = nib.Nifti1Image(head().astype(np.int16), AFFINE)
    image.header.set_slope_inter(0.5, 3.0)
    nib.save(image, folder / "sub-01_T1w.nii.gz")
    return folder / "sub-01_T1w.nii.gz"


USUAL = {
    "plain": stored(head()),
    "uncompressed": stored(head(), ending=".nii"),
    "bytes": stored(head().astype(np.uint8)),
    "shorts": stored(head().astype(np.int16)),
    "doubles": stored(head().astype(np.float64)),
    "bigendian": stored(head(), endian=">"),
    "trailing": stored(head()[..., None]),
    "trailing5": stored(head()[..., None, None]),
    "scaled": scaled,
    "las": stored(head(), AFFINE @ np.diag([-1.0, 1, 1, 1])),
    "sagittal": stored(head(), AFFINE[:, [2, 0, 1, 3]]),
    "oblique": stored(head(), OBLIQUE),
    "thick": stored(head()[:, :, ::2], AFFINE @ np.diag([1.0, 1, 2, 1])),
    "qformonly": lambda folder: two_forms(folder, AFFINE, AFFINE, (0, 1)),
    "sformonly": lambda folder: two_forms(folder, AFFINE, AFFINE, (1, 0)),
    "fewnegatives": stored(head() - np.float32(0.5) * (np.arange(50) == 25)),
}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_kinds_of_scan_in_one_run(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # one line for each message
    bench = Bench(tmp_path)
    bench.dataset()
    for label, make in USUAL.items():
        place(bench.raw, label, make)
    problems = {
        f"defect{number:02d}": problem
        for number, (make, problem) in enumerate(DEFECTS)
        if place(bench.raw, f"defect{number:02d}", make)
    }
    (bench.raw / "sub-none" / "anat").mkdir(parents=True)
    for ending in (".nii", ".nii.gz"):
        place(bench.raw, "twins", stored(head(), ending=ending))
    place(bench.raw, "offgrid", stored(head()))
    lesions = bench.folder / "lesions"
    write_mask(lesions / "sub-offgrid" / "anat" / "sub-offgrid_label-lesion_mask.nii.gz", np.eye(4))
    problems |= {
        "none": "no usable T1w",
        "twins": "same BIDS entities as",
        "offgrid": "lesion mask on the grid",
    }
    assert len(USUAL) + len(problems) >= 35

    assert (
        bench.run("--nprocs", "2", "-d", f"lesions={lesions}", "--modalities", "T1w", models=bench.models[:1])
        == 1
    )

    said = capfd.readouterr().err.splitlines()
    errors = [line for line in said if "│" not in line and "WARNING" not in line]
    for label, problem in problems.items():
        own = [text for text in errors if f"sub-{label}" in text and "participants done" not in text]
        assert len(own) == 1, (label, own)
        assert re.search(problem, own[0]), (problem, own)
    finished = {path.parts[-3] for path in bench.out.rglob("*_desc-T1wDisyre_anomalymap.nii.gz")}
    assert finished == {f"sub-{label}" for label in (*USUAL, "offgrid")}


def place(raw: Path, label: str, make) -> bool:
    """Write a scan and assign it to a participant; return whether there is one."""
    folder = raw / f"sub-{label}" / "anat"
    folder.mkdir(parents=True, exist_ok=True)
    made = make(folder)
    if not made.exists() and not made.is_symlink():
        folder.rmdir()
        folder.parent.rmdir()
        return False
    made.rename(folder / made.name.replace("sub-01", f"sub-{label}"))
    return True
