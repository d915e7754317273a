"""Names of outputs, and the data sink that writes them."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bids_uad import space
from bids_uad.dataset import naming
from bids_uad.dataset.naming import ImageUnit
from bids_uad.images import save_image
from bids_uad.levels.participant.interfaces import DerivativesDataSink
from tests.header_contract import header_faults

UNIT = ImageUnit(
    Path("/raw/sub-01/ses-a/anat/sub-01_ses-a_acq-x_run-01_T2w.nii.gz"),
    "01",
    "a",
    "T2w",
    {"subject": "01", "session": "a", "acquisition": "x", "run": "01"},
)
START = "sub-01/ses-a/anat/sub-01_ses-a_acq-x_run-01"


def test_names_of_the_outputs_of_an_image():
    names = naming.detection_outputs(UNIT, "patchcore")
    assert {kind: str(path).removeprefix(START) for kind, path in names.items()} == {
        "anomalymap": "_space-SRI24_desc-T2wPatchcore_anomalymap.nii.gz",
        "probseg": "_space-SRI24_label-anomaly_desc-T2wPatchcore_probseg.nii.gz",
        "mask": "_space-SRI24_label-anomaly_desc-T2wPatchcore_mask.nii.gz",
        "dseg": "_space-SRI24_seg-T2wPatchcore_dseg.nii.gz",
        "components": "_space-SRI24_seg-T2wPatchcore_dseg.tsv",
        "FSLeyes": "_space-SRI24_seg-T2wPatchcore_dseg.lut",
        "Freeview": "_space-SRI24_seg-T2wPatchcore_dseg.txt",
        "ITK-SNAP": "_space-SRI24_seg-T2wPatchcore_dseg.label",
        "3D Slicer": "_space-SRI24_seg-T2wPatchcore_dseg.ctbl",
        "native_mask": "_space-orig_label-anomaly_desc-T2wPatchcore_mask.nii.gz",
        "histogram": "_space-SRI24_desc-T2wPatchcore_histogram.tsv",
        "metrics": "_space-SRI24_desc-T2wPatchcore_metrics.tsv",
    }
    with_lesions = naming.detection_outputs(UNIT, "patchcore", with_lesions=True)
    assert str(with_lesions.pop("lesions")) == f"{START}_space-SRI24_desc-T2wPatchcore_lesions.tsv"
    assert with_lesions == names
    t1w = naming.detection_outputs(dataclasses.replace(UNIT, modality="T1w"), "patchcore")
    assert str(t1w["roi"]) == f"{START}_seg-T1wPatchcore_label-lesion_roi.nii.gz"
    assert (
        str(naming.preprocessing_outputs(UNIT)["to_sri24"]) == f"{START}_from-T2w_to-SRI24_mode-image_xfm.txt"
    )
    spaces = space.output_spaces(
        ["MNI152NLin2009cAsym", "MNI152NLin2009cAsym:res-2", "anat", "SRI24", "orig"]
    )
    further = naming.detection_outputs(UNIT, "patchcore", spaces=spaces).items() - names.items()
    further |= naming.template_outputs(UNIT, spaces).items()
    start = f"{START}_space-MNI152NLin2009cAsym"
    assert {str(path).replace(start, "*") for _, path in further} == {
        *("*_desc-T2wPatchcore_anomalymap.nii.gz", "*_res-2_desc-T2wPatchcore_anomalymap.nii.gz"),
        *(
            "*_label-anomaly_desc-T2wPatchcore_mask.nii.gz",
            "*_res-2_label-anomaly_desc-T2wPatchcore_mask.nii.gz",
        ),
        *("*_seg-T2wPatchcore_dseg.nii.gz", "*_seg-T2wPatchcore_res-2_dseg.nii.gz"),
        *("*_desc-preproc_T2w.nii.gz", "*_res-2_desc-preproc_T2w.nii.gz"),
        *("*_desc-brain_mask.nii.gz", "*_res-2_desc-brain_mask.nii.gz"),
        f"{START}_from-T2w_to-MNI152NLin2009cAsym_mode-image_xfm.txt",
        f"{START}_from-MNI152NLin2009cAsym_to-T2w_mode-image_xfm.txt",
        f"{START}_space-orig_desc-T2wPatchcore_anomalymap.nii.gz",
        f"{START}_space-orig_seg-T2wPatchcore_dseg.nii.gz",
    }
    assert naming.template_outputs(UNIT, space.output_spaces(["orig"])) == {}
    with pytest.raises(ValueError, match="no path pattern"):
        naming.output_path(UNIT, suffix="statmap")


@pytest.mark.parametrize(
    ("source", "modality", "expected"),
    [
        (
            "bids:raw:sub-1/ses-a/anat/sub-1_ses-a_run-2_T2w.nii.gz",
            "T2w",
            "sub-1/ses-a/anat/sub-1_ses-a_run-2",
        ),
        ("sub-1/anat/sub-1_T1w.nii", "T1w", "sub-1/anat/sub-1"),
        ("bids:raw:sub-1/anat/sub-1_run-1_UNIT1.nii.gz", "T1w", "sub-1/anat/sub-1_rec-UNIT1_run-1"),
    ],
)
def test_output_of_source_is_named_like_the_outputs(source, modality, expected):
    path = naming.output_of_source(source, modality, f"desc-preproc_{modality}.nii.gz")
    assert path.as_posix() == f"{expected}_space-SRI24_desc-preproc_{modality}.nii.gz"


def test_natural_key_sorts_numbers_by_value():
    names = ["sub-10", "sub-02", "sub-b", "sub-2", "sub-1x", "", "sub-1"]
    assert sorted(names, key=naming.natural_key) == [
        "",
        "sub-1",
        "sub-1x",
        "sub-02",
        "sub-2",
        "sub-10",
        "sub-b",
    ]


def test_data_sink_writes_to_the_named_path_with_the_header_contract(tmp_path):
    source = save_image(space.to_image(np.full(space.SHAPE, 0.5), np.float32), tmp_path / "x.nii.gz")
    sink = DerivativesDataSink(
        base_directory=str(tmp_path / "out"),
        in_file=str(source),
        source_file=str(UNIT.path),
        space="SRI24",
        desc="preproc",
        suffix="T2w",
        compress=True,
        meta_dict={"SkullStripped": True},
    )
    work = tmp_path / "work"
    work.mkdir()
    target = tmp_path / "out" / naming.preprocessing_outputs(UNIT)["preproc"]
    assert sink.run(cwd=str(work)).outputs.out_file == str(target)
    assert target.read_bytes() == source.read_bytes()
    assert header_faults(target) == []
    written = nib.load(target)
    assert (int(written.header["sform_code"]), int(written.header["qform_code"])) == (2, 2)
    assert written.get_data_dtype() == np.float32
    assert json.loads(target.with_name(target.name.replace(".nii.gz", ".json")).read_text())["SkullStripped"]
    assert sorted(path.name for path in target.parent.iterdir()) == [
        target.name.replace(".nii.gz", ".json"),
        target.name,
    ]


def test_import_does_not_write_to_home_or_the_templateflow_archive(tmp_path):
    environment = {**os.environ, "HOME": str(tmp_path), "TEMPLATEFLOW_HOME": str(tmp_path / "mine")}
    script = "import os, bids_uad.levels.participant.interfaces; print(os.environ['TEMPLATEFLOW_HOME'])"
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(tmp_path / "mine")
    assert not (tmp_path / "mine").exists()
    assert not (tmp_path / ".cache" / "templateflow").exists()
