"""External derivatives are found by name and attached to the right image."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bids_uad.config import RunConfig
from bids_uad.dataset.inputs import collect
from tests.dataset.skeleton import AFFINE, write_dataset, write_image, write_mask

T1W, T2W = "sub-01/anat/sub-01_T1w.nii.gz", "sub-01/anat/sub-01_T2w.nii.gz"
FINER = AFFINE @ np.diag([0.5, 0.5, 0.5, 1.0])
FINER_SHAPE = (48, 48, 48)


@pytest.fixture
def run(tmp_path):
    """Return a function that writes a raw dataset and derivatives of another pipeline, and collects them."""

    def collected(raw, derived, name="fmriprep"):
        config = RunConfig(
            write_dataset(tmp_path / "raw", dict.fromkeys(raw)),
            tmp_path / "out",
            ("participant",),
            tmp_path / "work",
            derivatives={name: tmp_path / name},
        )
        for path in derived:
            target = tmp_path / name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.name.endswith(".nii.gz"):
                writer = write_mask if "_mask" in path else write_image
                writer(target, FINER, FINER_SHAPE)
            else:
                target.write_text("#Insight Transform File V1.0\n")
        return collect(config)

    return collected


def external_names(found):
    """Return the names of the external files of each image."""
    names = {}
    for unit in found.units:
        own = unit.external
        pairs = {field: getattr(own, field) for field in ("image", "brain_mask", "from_raw", "to_sri24")}
        names[unit.key] = {field: path.name for field, path in pairs.items() if path is not None}
    return names


def test_fmriprep_outputs_of_one_session_are_attached(run):
    found = run(
        [T1W, T2W],
        [
            "sub-01/anat/sub-01_desc-preproc_T1w.nii.gz",
            "sub-01/anat/sub-01_desc-brain_mask.nii.gz",
            "sub-01/anat/sub-01_desc-preproc_T2w.nii.gz",
            "sub-01/anat/sub-01_from-orig_to-T1w_mode-image_xfm.txt",
            "sub-01/anat/sub-01_space-MNI152NLin2009cAsym_desc-preproc_T1w.nii.gz",
            "sub-01/anat/sub-01_space-MNI152NLin2009cAsym_desc-brain_mask.nii.gz",
            "sub-01/anat/sub-01_from-MNI152NLin2009cAsym_to-T1w_mode-image_xfm.h5",
            "sub-01/anat/sub-01_hemi-L_pial.surf.gii.txt",
            "sub-01/anat/sub-01_label-GM_probseg.nii.gz",
        ],
    )
    assert not found.problems
    assert external_names(found) == {
        "sub-01_T1w": {
            "image": "sub-01_desc-preproc_T1w.nii.gz",
            "brain_mask": "sub-01_desc-brain_mask.nii.gz",
            "from_raw": "sub-01_from-orig_to-T1w_mode-image_xfm.txt",
        },
        "sub-01_T2w": {
            "image": "sub-01_desc-preproc_T2w.nii.gz",
        },
    }
    t1w, t2w = found.units
    assert t1w.image.name == "sub-01_desc-preproc_T1w.nii.gz"
    assert t2w.external.aligned
    assert t2w.anchor == t1w


def test_images_get_the_external_files_of_their_session_and_run(run):
    raw = [f"sub-01/ses-{s}/anat/sub-01_ses-{s}_run-{r}_T1w.nii.gz" for s in "ab" for r in (1, 2)]
    found = run(
        raw,
        [
            "sub-01/ses-a/anat/sub-01_ses-a_run-2_desc-preproc_T1w.nii.gz",
            "sub-01/ses-b/anat/sub-01_ses-b_desc-preproc_T1w.nii.gz",
            "sub-01/anat/sub-01_desc-preproc_T1w.nii.gz",
        ],
    )
    assert {key: names.get("image") for key, names in external_names(found).items()} == {
        "sub-01_ses-a_run-1_T1w": "sub-01_desc-preproc_T1w.nii.gz",
        "sub-01_ses-a_run-2_T1w": "sub-01_ses-a_run-2_desc-preproc_T1w.nii.gz",
        "sub-01_ses-b_run-1_T1w": "sub-01_ses-b_desc-preproc_T1w.nii.gz",
        "sub-01_ses-b_run-2_T1w": None,
    }


def test_mask_alone_is_used_on_the_raw_grid(run, tmp_path):
    mask = tmp_path / "stripped" / "sub-01/anat/sub-01_desc-brain_mask.nii.gz"
    write_mask(mask)
    found = run([T1W], [], name="stripped")
    assert external_names(found) == {"sub-01_T1w": {"brain_mask": mask.name}}
    assert found.units[0].image == found.units[0].path


def test_mask_on_another_grid_is_reported_and_other_participants_remain(run):
    found = run([T1W, T2W, "sub-02/anat/sub-02_T1w.nii.gz"], ["sub-01/anat/sub-01_desc-brain_mask.nii.gz"])
    assert [unit.key for unit in found.units] == ["sub-02_T1w"]
    assert "sub-01_desc-brain_mask.nii.gz" in found.problems[0].message
    assert "grid of sub-01_T1w.nii.gz" in found.problems[0].message
    assert "its T1w image cannot be used" in found.problems[1].message


@pytest.fixture
def run_on_own_outputs(run, tmp_path):
    """Return a function that collects with own outputs whose reference sidecar has the given text."""

    def collected(reference):
        sidecar = tmp_path / "bids_uad" / "tpl-SRI24" / "anat" / "tpl-SRI24_desc-brain_T1w.json"
        sidecar.parent.mkdir(parents=True)
        sidecar.write_text(reference)
        for number in (1, 2):
            write_mask(tmp_path / f"bids_uad/sub-0{number}/anat/sub-0{number}_desc-brain_mask.nii.gz")
        xfms = [f"sub-01/anat/sub-01_from-{m}_to-SRI24_mode-image_xfm.txt" for m in ("T1w", "T2w")]
        return run([T1W, T2W, "sub-02/anat/sub-02_T1w.nii.gz"], xfms, name="bids_uad")

    return collected


def test_own_outputs_are_attached_with_the_reference_of_their_transforms(run_on_own_outputs):
    found = run_on_own_outputs(json.dumps({"ReferenceSHA256": "abc"}))
    assert external_names(found)["sub-01_T1w"] == {
        "brain_mask": "sub-01_desc-brain_mask.nii.gz",
        "to_sri24": "sub-01_from-T1w_to-SRI24_mode-image_xfm.txt",
    }
    assert found.units[0].external.reference_sha256 == "abc"


@pytest.mark.parametrize("reference", ["{", "[]", ""])
def test_broken_reference_sidecar_costs_one_warning_and_the_transforms(run_on_own_outputs, caplog, reference):
    found = run_on_own_outputs(reference)
    (warning,) = caplog.messages
    assert "tpl-SRI24_desc-brain_T1w.json: not" in warning
    assert warning.endswith("The transforms to SRI24 of the dataset bids_uad are not used")
    assert not found.problems
    assert external_names(found)["sub-01_T1w"] == {"brain_mask": "sub-01_desc-brain_mask.nii.gz"}
    assert len(found.units) == 3
