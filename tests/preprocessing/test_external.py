"""Brains found by another program; the programs are stand-ins that take the same arguments."""

from __future__ import annotations

import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bids_uad.errors import InputError, UnavailableError
from bids_uad.preprocessing.brain_extraction.masks import (
    HD_BET_FOLDER,
    Extraction,
    resolve_extraction,
    run_external_program,
)
from bids_uad.preprocessing.interfaces import BrainMask
from bids_uad.preprocessing.reference import Reference

from .conftest import save

AFFINE = np.diag([-4.0, 4.0, 4.0, 1.0])
STAND_IN = f"""#!{sys.executable}
import argparse, os, sys
import nibabel as nib
import numpy as np
parser = argparse.ArgumentParser()
for flag in ("-i", "-m", "-o", "-device", "--model"):
    parser.add_argument(flag)
parser.add_argument("--disable_tta", action="store_true")
parser.add_argument("--save_bet_mask", action="store_true")
args = parser.parse_args()
image = nib.load(args.i)
if image.get_fdata().max() < 10:
    sys.exit("nothing there")
if os.path.basename(sys.argv[0]) == "hd-bet":
    assert args.disable_tta and args.save_bet_mask and args.device == "cpu"
    assert os.path.isdir(os.path.expanduser("~/{HD_BET_FOLDER}"))
    target = args.o.replace(".nii.gz", "_bet.nii.gz")
else:
    assert os.path.isfile(args.model)
    target = args.m
mask = nib.as_closest_canonical(nib.Nifti1Image((image.get_fdata() > 50).astype(np.uint8), image.affine))
nib.save(mask, target)
"""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Put both programs on the PATH; give their weights."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("mri_synthstrip", "hd-bet"):
        (folder / name).write_text(STAND_IN)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    weights = {"synthstrip": tmp_path / "synthstrip.1.pt", "hd-bet": tmp_path / HD_BET_FOLDER}
    weights["synthstrip"].touch()
    weights["hd-bet"].mkdir()
    return weights


def head(folder: Path) -> Path:
    data = np.random.default_rng(0).normal(20.0, 2.0, (60, 60, 60)).astype(np.float32)
    data[20:40, 15:45, 20:40] = 100.0
    return save(folder / "head.nii.gz", data, AFFINE)


@pytest.mark.parametrize("name", ["synthstrip", "hd-bet"])
def test_the_mask_of_a_program_is_taken(
    name: str, programs, tmp_path: Path, reference: Reference, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    extraction = resolve_extraction(name, programs[name])
    assert extraction.weights == programs[name]
    assert all(path.is_file() for path in extraction.files)
    found = (
        BrainMask(
            in_file=str(head(tmp_path)),
            template=str(reference.t1w),
            template_mask=str(reference.brain_mask),
            program=name,
            weights=str(programs[name]),
        )
        .run()
        .outputs
    )
    mask = nib.load(found.out_mask)
    np.testing.assert_array_equal(mask.affine, AFFINE)
    assert mask.get_fdata().sum() == 20 * 30 * 20
    assert mask.get_fdata()[25, 20, 25] == 1
    assert found.skull_stripped is False


def test_a_failure_names_the_scan_and_repeats_what_was_said(programs, tmp_path: Path) -> None:
    empty = save(tmp_path / "sub-01_T1w.nii.gz", np.ones((20, 20, 20), np.float32), AFFINE)
    with pytest.raises(InputError, match=r"sub-01_T1w.*SynthStrip wrote no brain mask.*nothing there"):
        run_external_program("synthstrip", programs["synthstrip"], empty, tmp_path)


def test_what_is_not_there_is_told_before_anything_is_done(programs, tmp_path: Path, monkeypatch) -> None:
    assert resolve_extraction("template", None) == Extraction("template")
    with pytest.raises(UnavailableError, match="needs --brain-extraction-weights"):
        resolve_extraction("synthstrip", None)
    packaged = resolve_extraction("combined", None)
    assert packaged.files == [packaged.weights]
    assert packaged.weights.is_file()
    own = programs["synthstrip"]
    assert resolve_extraction("network", own) == Extraction("network", own)
    with pytest.raises(UnavailableError, match="does not exist"):
        resolve_extraction("synthstrip", tmp_path / "none.pt")
    with pytest.raises(UnavailableError, match=HD_BET_FOLDER):
        resolve_extraction("hd-bet", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(UnavailableError, match="mri_synthstrip or nipreps-synthstrip is not on the PATH"):
        resolve_extraction("synthstrip", programs["synthstrip"])
