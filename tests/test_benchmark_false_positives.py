"""The picture of what is marked in error: who is counted, which slices are shown."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from benchmarks.false_positives import SLICE_GAP, count_marked, draw, slices_to_show
from bids_uad.dataset.participants import read_participants
from bids_uad.dataset.sri24_scans import find_preprocessed
from bids_uad.engine.bundle import PACKAGED, load_bundle
from bids_uad.space import AFFINE, SHAPE


def save(path, *boxes):
    """Store an image of 0, and of 1 in some boxes."""
    data = np.zeros(SHAPE, np.uint8)
    for box in boxes:
        data[box] = 1
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, AFFINE), path)


@pytest.fixture
def derivatives(tmp_path):
    """A healthy control, patients with and without a lesion mask, and a control without scores."""
    left, right = np.s_[100:110, 100:110, 60:64], np.s_[130:140, 100:110, 60:64]
    for subject, marked in {
        "sub-h": (left,),
        "sub-p": (left, right),
        "sub-q": (right,),
        "sub-x": None,
    }.items():
        start = tmp_path / subject / "anat" / f"{subject}_space-SRI24_"
        for ending in ("desc-preproc_T1w", "desc-brain_mask"):
            save(start.with_name(f"{start.name}{ending}.nii.gz"), np.s_[20:200, 20:200, 20:140])
        if marked:
            save(start.with_name(f"{start.name}label-anomaly_desc-T1wPls_mask.nii.gz"), *marked)
    save(tmp_path / "sub-p" / "anat" / "sub-p_space-SRI24_label-lesion_desc-manual_mask.nii.gz", right)
    rows = ["participant_id\tgroup", "sub-h\tcontrol", "sub-p\tpatient", "sub-q\tpatient", "sub-x\tcontrol"]
    (tmp_path / "participants.tsv").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_count_marked_skips_lesions_and_patients_without_a_lesion_mask(derivatives, tmp_path):
    bundle = load_bundle(PACKAGED / "pls-T1w-default")
    scans = find_preprocessed(derivatives, "T1w")
    marked = count_marked(scans, bundle, read_participants(derivatives))
    assert (marked.healthy, marked.patients) == (1, 1)
    assert marked.counts.max() == 2
    assert marked.counts[105, 105, 62] == 2
    assert marked.counts[135, 105, 62] == 0
    assert marked.counts.sum() == 2 * 400

    draw(marked, scans[0].image, "two people", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_slices_with_most_marks_are_shown_apart():
    counts = np.zeros(SHAPE, int)
    counts[:10, 0, 40] = 1
    counts[:20, 0, 44] = 1
    counts[:5, 0, 90] = 1
    shown = slices_to_show(counts)
    assert {44.0, 90.0} <= set(shown)
    assert 40.0 not in shown
    assert shown == sorted(shown)
    assert min(np.diff(shown)) >= SLICE_GAP
