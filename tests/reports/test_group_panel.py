"""Examples in the group report: choice of cases and slices, and the pixels that are drawn."""

from __future__ import annotations

import base64
import io
import re

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from bids_uad import space
from bids_uad.errors import InputError
from bids_uad.reports.group_panel import choose_cases, example_figures, read_slice

STEM = "sub-{}_space-SRI24_{}"


def scans(dice, voxels=None, **columns):
    n = len(dice)
    table = pd.DataFrame(
        {
            "participant_id": [f"sub-{k}" for k in range(n)],
            "session_id": None,
            "source_image": [f"bids:raw:sub-{k}/anat/sub-{k}_T1w.nii.gz" for k in range(n)],
            "dice": dice,
            "n_lesion_voxels": voxels or [10] * n,
        }
    )
    fixed = {"role": "lesion", "detector": "disyre", "modality": "T1w", "report": None}
    return table.assign(**fixed | columns)


def chosen(table):
    return {case.which: case.scan["participant_id"] for case in choose_cases(table)}


def test_best_median_and_worst():
    assert chosen(scans([0.3, 0.9, 0.1, 0.5, 0.2])) == {"best": "sub-1", "median": "sub-0", "worst": "sub-2"}
    assert chosen(scans([0.3, 0.9, 0.1, 0.5])) == {"best": "sub-1", "median": "sub-0", "worst": "sub-2"}
    assert chosen(scans([0.3, 0.9])) == {"best": "sub-1", "worst": "sub-0"}
    assert chosen(scans([0.3])) == {"only": "sub-0"}
    assert chosen(scans([0.0, 0.0, 0.0], [5, 9, 7])) == {"best": "sub-0", "median": "sub-2", "worst": "sub-1"}


def test_empty_masks_and_healthy_controls_are_not_chosen():
    table = scans([1.0, 0.5, 0.4], [0, 5, 5])
    table.loc[2, "role"] = "healthy"
    assert chosen(table) == {"only": "sub-1"}


@pytest.fixture
def study(tmp_path):
    """One scan: brain brighter on the left, anomaly mask anterior, lesion posterior."""
    anat = tmp_path / "sub-0" / "anat"
    anat.mkdir(parents=True)
    brain = np.zeros(space.SHAPE, np.float32)
    brain[60:180, 40:200, 20:130] = 0.3
    world = nib.affines.apply_affine(space.AFFINE, np.argwhere(brain > 0))
    brain[brain > 0] = np.where(world[:, 0] < -119.5, 0.9, 0.3)
    found, lesion = np.zeros(space.SHAPE, np.uint8), np.zeros(space.SHAPE, np.uint8)
    found[100:120, 50:60, 60:100] = 1
    lesion[100:120, 150:190, 85:95] = 1
    lesion[100:140, 150:190, 90] = 1
    nib.save(space.to_image(brain), anat / STEM.format(0, "desc-preproc_T1w.nii.gz"))
    nib.save(
        space.to_image(found, np.uint8), anat / STEM.format(0, "label-anomaly_desc-T1wDisyre_mask.nii.gz")
    )
    nib.save(space.to_image(lesion, np.uint8), anat / STEM.format(0, "label-lesion_desc-manual_mask.nii.gz"))
    return tmp_path


def test_slice_with_the_largest_lesion_area_is_read_in_neurological_convention(study):
    row = scans([0.5]).to_dict(orient="records")[0]
    part = read_slice(study, row)
    assert part.position == "z = 90"
    assert part.lesion.sum() == 40 * 40
    assert part.found.sum() == 20 * 10
    # Subject's left on the left, anterior on top; the second voxel axis of SRI24 runs to posterior.
    assert part.grey[80, 20] > part.grey[80, -20] > 0
    rows_found, rows_lesion = (np.flatnonzero(mask.any(1)).mean() for mask in (part.found, part.lesion))
    assert rows_found < rows_lesion


def test_embedded_images_are_scan_and_mask(study):
    table = scans([0.5], report="sub-0.html")
    (figure,), absent = example_figures(study, table)
    assert absent == ""
    assert figure.name == "examples_T1w"
    assert '<a href="sub-0.html">' in figure.svg
    assert "only: Dice 0.500" in figure.svg
    jpeg, png = (
        Image.open(io.BytesIO(base64.b64decode(code)))
        for code in re.findall(r"base64,([A-Za-z0-9+/=]+)", figure.svg)
    )
    part = read_slice(study, table.to_dict(orient="records")[0])
    assert np.abs(np.asarray(jpeg, float) - part.grey).mean() < 2
    np.testing.assert_array_equal(np.asarray(png.convert("RGBA"))[..., 3] > 0, part.found)
    assert len(figure.svg) < 30_000


def test_lesion_mask_is_found_by_the_rule_of_the_participant_level(study):
    """A mask that names no run serves run-1; one that names another run does not."""
    anat = study / "sub-0" / "anat"
    mask = anat / STEM.format(0, "label-lesion_desc-manual_mask.nii.gz")
    for path in list(anat.iterdir()):
        if path != mask:
            path.rename(path.with_name(path.name.replace("sub-0_", "sub-0_run-1_")))
    row = scans([0.5], source_image="bids:raw:sub-0/anat/sub-0_run-1_T1w.nii.gz").to_dict(orient="records")[0]
    assert read_slice(study, row).lesion.any()
    mask.rename(anat / "sub-0_run-2_space-SRI24_label-lesion_desc-manual_mask.nii.gz")
    with pytest.raises(InputError, match="its lesion mask is missing"):
        read_slice(study, row)


def test_missing_and_unreadable_examples_are_reported(study, tmp_path):
    figures, absent = example_figures(study, scans([0.5, 0.4]))
    assert "not available" in figures[0].svg
    assert absent.startswith(
        "1 of 2 examples cannot be shown. First problem: sub-1/anat/sub-1_space-SRI24_desc-preproc"
    )
    figures, absent = example_figures(study / "nowhere", scans([0.5]))
    assert figures == []
    assert "is missing" in absent
    damaged = study / "sub-0" / "anat" / STEM.format(0, "desc-preproc_T1w.nii.gz")
    damaged.write_bytes(damaged.read_bytes()[:5000])
    figures, absent = example_figures(study, scans([0.5]))
    assert figures == []
    assert "cannot be read" in absent


def test_no_examples_without_lesion_scans(tmp_path):
    assert example_figures(tmp_path, scans([np.nan], role="healthy")) == ([], "")
