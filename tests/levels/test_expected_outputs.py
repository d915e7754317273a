"""Output files of each kind of input, compared with stored lists."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from niworkflows.utils.bids import collect_data

from tests.dataset.skeleton import write_image, write_mask
from tests.levels.test_participant_run import Bench, reference, stand_ins  # noqa: F401

EXPECTED = Path(__file__).parent / "expected"
T1W, T2W = "sub-01/anat/sub-01_T1w.nii.gz", "sub-01/anat/sub-01_T2w.nii.gz"
RAW = {
    "t1w": [T1W],
    "t2w": [T2W],
    "both": [T1W, T2W],
    "sessions_and_runs": [
        "sub-01/ses-a/anat/sub-01_ses-a_run-1_T1w.nii.gz",
        "sub-01/ses-a/anat/sub-01_ses-a_run-2_T1w.nii.gz",
        "sub-01/ses-a/anat/sub-01_ses-a_T2w.nii.gz",
        "sub-01/ses-b/anat/sub-01_ses-b_acq-thick_rec-norm_T2w.nii.gz",
    ],
    "lesions": [T1W, T2W],
    "fmriprep": [T1W, T2W],
}


def derivatives(kind: str, folder: Path) -> list[str]:
    """Write the derivatives of a kind of input; return the option that names them."""
    root = folder / kind
    if kind == "lesions":
        write_mask(root / "sub-01/anat/sub-01_label-lesion_mask.nii.gz")
    elif kind == "fmriprep":
        write_image(root / "sub-01/anat/sub-01_desc-preproc_T1w.nii.gz")
        write_mask(root / "sub-01/anat/sub-01_desc-brain_mask.nii.gz")
        write_image(root / "sub-01/anat/sub-01_desc-preproc_T2w.nii.gz")
    else:
        return []
    return ["-d", f"{kind}={root}"]


# The list of "both" is part of that of "lesions".
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] if kind == "both" else []) for kind in RAW]
)
def test_files_are_those_of_the_list(kind, tmp_path):
    bench = Bench(tmp_path)
    bench.dataset(*RAW[kind])
    assert bench.run(*derivatives(kind, tmp_path)) == 0
    found = {path.relative_to(bench.out).as_posix() for path in bench.out.rglob("*") if path.is_file()}
    kept = sorted(name for name in found if not name.startswith("logs/") and "/log/" not in name)
    assert kept == (EXPECTED / f"{kind}.txt").read_text().splitlines()
    if kind == "t1w":
        (roi,) = bench.out.rglob("*_label-lesion_roi.nii.gz")
        fmriprep_takes(roi, bench.raw)


def fmriprep_takes(roi: Path, raw: Path) -> None:
    """Copy a mask to where fMRIPrep's documentation says, and query the dataset as fMRIPrep does."""
    copy = raw / T1W.replace(".nii.gz", "_label-lesion_roi.nii.gz")
    shutil.copy(roi, copy)
    images, _ = collect_data(raw, "01", bids_validate=False)
    assert images["roi"] == [str(copy)]
    assert images["t1w"] == [str(raw / T1W)]
    mask, scan = nib.load(copy), nib.load(raw / T1W)
    assert mask.shape == scan.shape
    np.testing.assert_allclose(mask.affine, scan.affine, atol=1e-5)
    assert set(np.unique(np.asarray(mask.dataobj))) <= {0, 1}
