"""Outputs in the spaces of --output-spaces, against nibabel, nitransforms, antspyx and TemplateFlow."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import nibabel as nib
import nitransforms
import numpy as np
import pandas as pd
import pytest
import templateflow.conf
from nibabel.processing import resample_from_to

from bids_uad import space
from bids_uad.levels.participant.completion_records import describe_methods, read_records
from bids_uad.levels.participant.interfaces import WriteInTemplates
from bids_uad.preprocessing.resampling import load_ants, write_itk
from tests.dataset.skeleton import write_image
from tests.header_contract import faults_below
from tests.levels.test_participant_run import T1W, Bench, reference, stand_ins, validator_issues  # noqa: F401
from tests.preprocessing.conftest import MNI_TO_SRI24, known_move

MNI = "MNI152NLin2009cAsym"
OPTION = ("--output-spaces", "SRI24", f"{MNI}:res-2", "orig")


@pytest.fixture(scope="module")
def bench(tmp_path_factory, stand_ins):  # noqa: F811
    """Return a finished run on one T1w image, first without and then with the option, with its calls."""
    bench = Bench(tmp_path_factory.mktemp("spaces"))
    bench.dataset(T1W)
    # By the fake registration, which is the identity, the raw image covers the anomalies.
    write_image(bench.raw / T1W, np.array([[4.0, 0, 0, -150], [0, 4, 0, 70], [0, 0, 4, 30], [0, 0, 0, 1]]))
    assert bench.run() == 0
    bench.first, bench.before = bench.take_calls(), bench.maps()
    assert bench.run(*OPTION) == 0
    bench.second = bench.take_calls()
    return bench


def test_grids_are_those_of_templateflow():
    archive = zipfile.ZipFile(Path(templateflow.conf.__file__).with_name("templateflow-skel.zip"))
    described = json.loads(archive.read(f"tpl-{MNI}/template_description.json"))["res"]
    for name, size in ((MNI, "01"), (f"{MNI}:res-1", "01"), (f"{MNI}:res-2", "02")):
        (template,) = space.output_spaces([name])
        shape, affine = template.grid
        assert list(shape) == described[size]["shape"]
        assert (
            affine.tolist()[:3]
            == np.column_stack([np.diag(described[size]["zooms"]), described[size]["origin"]]).tolist()
        )


def test_transforms_take_a_point_of_the_template_to_the_raw_image_and_back(tmp_path):
    files = {name: str(tmp_path / f"{name}.txt") for name in ("to_template", "from_template")}
    to_sri24 = write_itk(tmp_path / "to_sri24.txt", known_move())
    WriteInTemplates(in_files=[], sidecars={}, files=files, to_sri24=str(to_sri24)).run(cwd=str(tmp_path))
    in_sri24 = np.array([-100.0, 120.0, 90.0, 1.0])
    in_mni, in_raw = (np.linalg.inv(MNI_TO_SRI24) @ in_sri24)[:3], (known_move() @ in_sri24)[:3]
    for file, point, expected in (
        (files["to_template"], in_mni, in_raw),
        (files["from_template"], in_raw, in_mni),
    ):
        theirs = nitransforms.linear.load(file, fmt="itk").map(point)
        np.testing.assert_allclose(np.ravel(theirs), expected, atol=1e-4)
        lps = pd.DataFrame([point * [-1, -1, 1]], columns=["x", "y", "z"])
        moved = load_ants().apply_transforms_to_points(3, lps, [file], whichtoinvert=[False])
        np.testing.assert_allclose(moved.to_numpy()[0] * [-1, -1, 1], expected, atol=1e-3)


def test_map_mask_and_components_are_interpolated_once(bench):
    anat = bench.out / "sub-01" / "anat"
    raw = nib.load(bench.raw / T1W)
    shape = (97, 115, 97)
    affine = np.array([[2, 0, 0, -96.5], [0, 2, 0, -132.5], [0, 0, 2, -78.5], [0, 0, 0, 1]])
    kinds = {
        "_desc-T1wDisyre_anomalymap": 1,
        "_label-anomaly_desc-T1wDisyre_mask": 0,
        "_seg-T1wDisyre_dseg": 0,
    }
    for kind, order in kinds.items():
        source = nib.load(anat / f"sub-01_space-SRI24{kind}.nii.gz")
        data = source.get_fdata()
        name = f"_seg-T1wDisyre_res-2{kind[14:]}" if "_seg" in kind else f"_res-2{kind}"
        for ending, grid, pull, code in (
            (f"{MNI}{name}", (shape, affine), MNI_TO_SRI24, 4),
            (f"orig{kind}", (raw.shape, raw.affine), np.eye(4), 1),
        ):
            written = nib.load(anat / f"sub-01_space-{ending}.nii.gz")
            moved = nib.Nifti1Image(data, np.linalg.inv(pull) @ source.affine)
            expected = resample_from_to(moved, grid, order=order).get_fdata()
            assert written.shape == grid[0]
            np.testing.assert_array_equal(written.affine, grid[1])
            assert int(written.header["sform_code"]) == code
            assert written.get_data_dtype() == source.get_data_dtype()
            assert expected.any()
            np.testing.assert_allclose(written.get_fdata(), expected, atol=1e-4)


def test_outputs_in_further_spaces_are_described_and_valid(bench):
    anat = bench.out / "sub-01" / "anat"
    for kind, source in (
        ("_res-2_desc-preproc_T1w", f"bids:raw:{T1W}"),
        (
            "_res-2_label-anomaly_desc-T1wDisyre_mask",
            "bids::sub-01/anat/sub-01_space-SRI24_label-anomaly_desc-T1wDisyre_mask.nii.gz",
        ),
    ):
        sidecar = json.loads((anat / f"sub-01_space-{MNI}{kind}.json").read_text())
        assert sidecar["SpatialReference"].endswith(f"tpl-{MNI}_res-01_T1w.nii.gz")
        assert sidecar["Resolution"] == "Voxels of 2 mm"
        assert "affine transform between SRI24 and MNI152NLin2009cAsym" in sidecar["Transformation"]
        assert sidecar["Sources"] == [source]
    described = json.loads((anat / "sub-01_space-orig_desc-T1wDisyre_anomalymap.json").read_text())
    assert described["SpatialReference"] == "orig"
    assert (anat / f"sub-01_from-T1w_to-{MNI}_mode-image_xfm.txt").is_file()
    assert "also resampled to MNI152NLin2009cAsym" in describe_methods(read_records(bench.out))
    assert faults_below(bench.out) == []
    assert validator_issues(bench.out) == []


def test_other_outputs_are_unchanged_and_further_runs_have_nothing_to_do(bench):
    assert bench.first == bench.second == ["detect sub-01_T1w disyre-T1w", "preproc sub-01_T1w.nii.gz"]
    assert not any("_space-orig_desc" in name or MNI in name for name in bench.before)
    after = bench.maps()
    assert {name: after[name] for name in bench.before} == bench.before
    for option in ((), OPTION):
        assert bench.run(*option) == 0
        assert bench.take_calls() == []
    assert bench.maps() == after
