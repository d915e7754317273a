"""Copies of scans with less contrast between tissues."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pandas as pd

from benchmarks.low_contrast import copy_with_less_contrast
from bids_uad.space import AFFINE


def test_contrast_of_every_second_participant_is_reduced(tmp_path):
    rng = np.random.default_rng(0)
    brain = np.zeros((12, 12, 12), np.uint8)
    brain[2:-2, 2:-2, 2:-2] = 1
    images = {}
    for label in ("sub-001", "sub-002"):
        folder = tmp_path / "source" / label / "anat"
        folder.mkdir(parents=True)
        images[label] = rng.uniform(0.2, 1, brain.shape).astype(np.float32) * brain
        for ending, data in (("desc-preproc_T1w", images[label]), ("desc-brain_mask", brain)):
            nib.save(nib.Nifti1Image(data, AFFINE), folder / f"{label}_space-SRI24_{ending}.nii.gz")
    (tmp_path / "source" / "dataset_description.json").write_text('{"Name": "brains"}')
    participants = pd.DataFrame({"participant_id": list(images), "age": ["30", "n/a"]})
    participants.to_csv(tmp_path / "source" / "participants.tsv", sep="\t", index=False)

    table = copy_with_less_contrast(tmp_path / "source", tmp_path / "copy")
    assert list(table["participant_id"]) == ["sub-001", "sub-502"]
    assert list(table["age"]) == ["30", "n/a"]
    factor = table["contrast_factor"][1]
    assert table["contrast_factor"][0] == 1
    assert 0.35 <= factor < 1

    def copied(label):
        name = f"{label}_space-SRI24_desc-preproc_T1w.nii.gz"
        return nib.load(tmp_path / "copy" / label / "anat" / name).get_fdata()

    np.testing.assert_array_equal(copied("sub-001"), images["sub-001"])
    before, after = images["sub-002"][brain > 0], copied("sub-502")[brain > 0]
    mean = before.mean()
    expected = (mean + factor * (before - mean)) / (mean + factor * (1 - mean))
    np.testing.assert_allclose(after, expected, atol=1e-5)
    assert "contrast" in json.loads((tmp_path / "copy" / "dataset_description.json").read_text())["Name"]
    assert not copied("sub-502")[brain == 0].any()
