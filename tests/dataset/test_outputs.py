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
from bids_uad.dataset.describe import (
    ModelEntry,
    dataset_link,
    describe_dataset,
    refuse_foreign,
)
from bids_uad.dataset.naming import ImageUnit
from bids_uad.errors import ConfigError
from bids_uad.levels.participant.interfaces import DerivativesDataSink
from tests.dataset.skeleton import write_dataset
from tests.header_contract import header_faults

UNIT = ImageUnit(
    Path("/raw/sub-01/ses-a/anat/sub-01_ses-a_acq-x_run-01_T2w.nii.gz"),
    "01",
    "a",
    "T2w",
    {"subject": "01", "session": "a", "acquisition": "x", "run": "01"},
)
START = "sub-01/ses-a/anat/sub-01_ses-a_acq-x_run-01"


def test_names():
    names = naming.detection_outputs(UNIT, "patchcore")
    assert {kind: str(path).removeprefix(START) for kind, path in names.items()} == {
        "anomalymap": "_space-SRI24_desc-T2wPatchcore_anomalymap.nii.gz",
        "probseg": "_space-SRI24_label-anomaly_desc-T2wPatchcore_probseg.nii.gz",
        "mask": "_space-SRI24_label-anomaly_desc-T2wPatchcore_mask.nii.gz",
        "dseg": "_space-SRI24_seg-T2wPatchcore_dseg.nii.gz",
        "components": "_space-SRI24_seg-T2wPatchcore_dseg.tsv",
        "native_mask": "_space-orig_label-anomaly_desc-T2wPatchcore_mask.nii.gz",
        "histogram": "_space-SRI24_desc-T2wPatchcore_histogram.tsv",
        "metrics": "_space-SRI24_desc-T2wPatchcore_metrics.tsv",
    }
    with_truth = naming.detection_outputs(UNIT, "patchcore", with_truth=True)
    assert str(with_truth.pop("lesions")) == f"{START}_space-SRI24_desc-T2wPatchcore_lesions.tsv"
    assert with_truth == names
    assert (
        str(naming.preprocessing_outputs(UNIT)["to_sri24"]) == f"{START}_from-T2w_to-SRI24_mode-image_xfm.txt"
    )
    with pytest.raises(ValueError, match="no output is named"):
        naming.output_path(UNIT, suffix="statmap")


def test_sink_agrees_with_the_names_and_pins_the_header(tmp_path):
    image = nib.Nifti1Image(np.full(space.SHAPE, 0.5), space.AFFINE)
    image.set_sform(image.affine, 4)
    nib.save(image, tmp_path / "x.nii.gz")
    sink = DerivativesDataSink(
        base_directory=str(tmp_path / "out"),
        in_file=str(tmp_path / "x.nii.gz"),
        source_file=str(UNIT.path),
        space="SRI24",
        desc="preproc",
        suffix="T2w",
        compress=True,
        data_dtype="float32",
        meta_dict={"SkullStripped": True},
    )
    work = tmp_path / "work"
    work.mkdir()
    target = tmp_path / "out" / naming.preprocessing_outputs(UNIT)["preproc"]
    assert sink.run(cwd=str(work)).outputs.out_file == str(target)
    assert header_faults(target) == []
    written = nib.load(target)
    assert (int(written.header["sform_code"]), int(written.header["qform_code"])) == (2, 2)
    assert written.get_data_dtype() == np.float32
    assert json.loads(target.with_name(target.name.replace(".nii.gz", ".json")).read_text())["SkullStripped"]
    assert sorted(path.name for path in target.parent.iterdir()) == [
        target.name.replace(".nii.gz", ".json"),
        target.name,
    ]


def test_import_leaves_the_templateflow_archive_and_home_alone(tmp_path):
    environment = {**os.environ, "HOME": str(tmp_path), "TEMPLATEFLOW_HOME": str(tmp_path / "mine")}
    script = "import os, bids_uad.levels.participant.interfaces; print(os.environ['TEMPLATEFLOW_HOME'])"
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(tmp_path / "mine")
    assert not (tmp_path / "mine").exists()
    assert not (tmp_path / ".cache" / "templateflow").exists()


def test_description_is_repeatable_and_keeps_what_earlier_runs_wrote(tmp_path):
    raw = write_dataset(tmp_path / "raw", {})
    out = tmp_path / "raw" / "derivatives" / "uad"

    def describe(*models, **descriptions):
        describe_dataset(out, raw, {}, [ModelEntry(name, "0.1.0", "a" * 64) for name in models], descriptions)
        return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}

    first = describe("one", preproc="image")
    stamps = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert describe("one", preproc="image") == first
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == stamps
    both = describe("two", brain="mask")
    described = json.loads(both["dataset_description.json"])
    assert [entry["Name"] for entry in described["GeneratedBy"]] == ["bids_uad", "one", "two"]
    assert described["DatasetLinks"] == {"raw": "../.."}
    assert described["License"] == "CC0"
    assert both["descriptions.tsv"].decode().splitlines() == [
        "desc_id\tdescription",
        "desc-brain\tmask",
        "desc-preproc\timage",
    ]
    (out / ".bidsignore").write_text("mine\n")
    assert describe()[".bidsignore"].decode().startswith("mine\n*.html\n")


def test_links_tell_no_paths_of_the_host(tmp_path):
    far = Path("/somewhere/else/entirely/raw")
    near = tmp_path / "out"
    assert dataset_link(tmp_path / "raw", near, {}) == "../raw"
    assert dataset_link(Path("/data"), Path("/out"), {}) == "../data"
    assert dataset_link(far, near, {"DatasetDOI": "10.1/x"}) == "doi:10.1/x"
    assert dataset_link(far, near, {"Name": "A b"}) == "urn:bids-dataset:A%20b"
    assert "somewhere" not in dataset_link(far, near, {})


def test_other_datasets_are_not_written_into(tmp_path):
    write_dataset(tmp_path / "raw", {})
    with pytest.raises(ConfigError, match="already holds another dataset"):
        refuse_foreign(tmp_path / "raw")
    (tmp_path / "raw" / "dataset_description.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        refuse_foreign(tmp_path / "raw")
    refuse_foreign(tmp_path / "nowhere")
