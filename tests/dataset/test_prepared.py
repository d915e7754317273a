"""What other pipelines have done is found by name, and given to the image it belongs to."""

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
    """Give a function that writes a raw dataset and files of an earlier pipeline, and collects."""

    def collected(raw, earlier, name="fmriprep"):
        config = RunConfig(
            write_dataset(tmp_path / "raw", dict.fromkeys(raw)),
            tmp_path / "out",
            ("participant",),
            tmp_path / "work",
            derivatives={name: tmp_path / name},
        )
        for path in earlier:
            target = tmp_path / name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.name.endswith(".nii.gz"):
                writer = write_mask if "_mask" in path else write_image
                writer(target, FINER, FINER_SHAPE)
            else:
                target.write_text("#Insight Transform File V1.0\n")
        return collect(config)

    return collected


def given(found):
    """Names of what each image was given, without the participant's prefix."""
    names = {}
    for unit in found.units:
        own = unit.external
        pairs = {field: getattr(own, field) for field in ("image", "brain_mask", "from_raw", "to_sri24")}
        names[unit.key] = {field: path.name for field, path in pairs.items() if path is not None}
    return names


def test_fmriprep_of_one_session(run):
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
    assert given(found) == {
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


def test_sessions_and_runs_get_their_own(run):
    raw = [f"sub-01/ses-{s}/anat/sub-01_ses-{s}_run-{r}_T1w.nii.gz" for s in "ab" for r in (1, 2)]
    found = run(
        raw,
        [
            "sub-01/ses-a/anat/sub-01_ses-a_run-2_desc-preproc_T1w.nii.gz",
            "sub-01/ses-b/anat/sub-01_ses-b_desc-preproc_T1w.nii.gz",
            "sub-01/anat/sub-01_desc-preproc_T1w.nii.gz",
        ],
    )
    assert {key: names.get("image") for key, names in given(found).items()} == {
        "sub-01_ses-a_run-1_T1w": "sub-01_desc-preproc_T1w.nii.gz",
        "sub-01_ses-a_run-2_T1w": "sub-01_ses-a_run-2_desc-preproc_T1w.nii.gz",
        "sub-01_ses-b_run-1_T1w": "sub-01_ses-b_desc-preproc_T1w.nii.gz",
        "sub-01_ses-b_run-2_T1w": None,
    }


def test_a_mask_alone_is_taken_on_the_raw_grid(run, tmp_path):
    mask = tmp_path / "stripped" / "sub-01/anat/sub-01_desc-brain_mask.nii.gz"
    write_mask(mask)
    found = run([T1W], [], name="stripped")
    assert given(found) == {"sub-01_T1w": {"brain_mask": mask.name}}
    assert found.units[0].image == found.units[0].path


def test_a_mask_on_no_known_grid_is_refused_by_name_and_others_go_on(run):
    found = run([T1W, T2W, "sub-02/anat/sub-02_T1w.nii.gz"], ["sub-01/anat/sub-01_desc-brain_mask.nii.gz"])
    assert [unit.key for unit in found.units] == ["sub-02_T1w"]
    assert "sub-01_desc-brain_mask.nii.gz" in found.problems[0].message
    assert "grid of sub-01_T1w.nii.gz" in found.problems[0].message
    assert "its T1w image cannot be used" in found.problems[1].message


def test_our_own_output_is_read_with_the_reference_it_leads_to(run, tmp_path):
    sidecar = tmp_path / "bids_uad" / "tpl-SRI24" / "anat" / "tpl-SRI24_desc-brain_T1w.json"
    sidecar.parent.mkdir(parents=True)
    sidecar.write_text(json.dumps({"ReferenceSHA256": "abc"}))
    mask = "sub-01/anat/sub-01_desc-brain_mask.nii.gz"
    write_mask(tmp_path / "bids_uad" / mask)
    xfms = [f"sub-01/anat/sub-01_from-{m}_to-SRI24_mode-image_xfm.txt" for m in ("T1w", "T2w")]
    found = run([T1W, T2W], xfms, name="bids_uad")
    assert given(found)["sub-01_T1w"] == {"brain_mask": mask[12:], "to_sri24": xfms[0][12:]}
    assert found.units[0].external.reference_sha256 == "abc"
