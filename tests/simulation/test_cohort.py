from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from bids_uad.simulation.__main__ import build_cohort, build_parser, main
from bids_uad.simulation.cohort import SimulatedCohort, make_subject
from bids_uad.simulation.subject import Population
from bids_uad.space import AFFINE, SHAPE
from tests.header_contract import faults_below


def digest(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("raw") / "ds"
    subjects = ["--healthy", "1", "--stroke", "1", "--seed", "4"]
    assert main([str(out), *subjects, "--modalities", "T1w"]) == 0
    return out


@pytest.fixture(scope="module")
def preprocessed(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sri24") / "ds"
    assert main([str(out), "--healthy", "1", "--stroke", "1", "--seed", "4", "--derivatives"]) == 0
    return out


def test_make_cohort_is_determined_by_the_seed(tmp_path, preprocessed):
    # The second subject alone, with other contrasts and without the first before it.
    contrasts = ("T1w", "FLAIR")
    make_subject(SimulatedCohort(tmp_path, Population(4), (None, "stroke"), contrasts, derivatives=True), 1)
    images = {name: sha for name, sha in digest(tmp_path).items() if name.endswith(".nii.gz")}
    flair = "sub-002/anat/sub-002_space-SRI24_desc-preproc_FLAIR.nii.gz"
    assert len(images) == 5
    assert images.pop(flair) not in images.values()
    whole = digest(preprocessed)
    assert images == {name: whole[name] for name in images}
    first = {sha for name, sha in whole.items() if "sub-001" in name and name.endswith(".nii.gz")}
    assert not first & set(images.values())


def test_derivatives_follow_the_naming_and_the_grid(preprocessed):
    folder = preprocessed / "sub-002" / "anat"
    brain = nib.load(folder / "sub-002_space-SRI24_desc-brain_mask.nii.gz")
    inside = np.asarray(brain.dataobj) > 0
    for modality in ("T1w", "T2w"):
        image = nib.load(folder / f"sub-002_space-SRI24_desc-preproc_{modality}.nii.gz")
        data = np.asarray(image.dataobj)
        assert image.shape == SHAPE
        np.testing.assert_array_equal(image.affine, AFFINE)
        assert image.get_data_dtype() == np.float32
        assert data.min() == 0
        assert data.max() > 1
        assert not data[~inside].any()
    lesion = np.asarray(nib.load(folder / "sub-002_space-SRI24_label-lesion_desc-manual_mask.nii.gz").dataobj)
    assert lesion.any()
    assert inside[lesion > 0].all()
    assert not list((preprocessed / "sub-001").rglob("*lesion*"))


def test_simulated_derivatives_keep_the_header_contract(raw, preprocessed):
    assert faults_below(raw / "derivatives") == []
    assert faults_below(preprocessed) == []


def test_raw_images_and_masks_share_a_grid(raw):
    scan = nib.load(raw / "sub-002/anat/sub-002_T1w.nii.gz")
    mask = nib.load(raw / "derivatives/lesions/sub-002/anat/sub-002_space-T1w_label-lesion_mask.nii.gz")
    assert scan.shape == mask.shape
    np.testing.assert_array_equal(scan.affine, mask.affine)
    assert scan.get_data_dtype() == np.int16
    assert nib.aff2axcodes(scan.affine) == ("R", "A", "S")
    values = np.asarray(scan.dataobj)
    assert values[np.asarray(mask.dataobj) > 0].min() > 0
    assert values.max() > 300


def test_raw_tissue_labels_lie_on_the_scan(raw, preprocessed):
    name = "sub-001_space-T1w_desc-tissue_dseg.nii.gz"
    labels = nib.load(raw / "derivatives/tissue/sub-001/anat" / name)
    scan = nib.load(raw / "sub-001/anat/sub-001_T1w.nii.gz")
    np.testing.assert_array_equal(labels.affine, scan.affine)
    native, values = np.asarray(labels.dataobj), np.asarray(scan.dataobj)
    np.testing.assert_array_equal(native > 0, values > 0)
    assert values[native == 3].mean() > values[native == 2].mean() > values[native == 1].mean()
    there = nib.load(preprocessed / "sub-001/anat/sub-001_space-SRI24_desc-tissue_dseg.nii.gz")
    voxel = np.prod(labels.header.get_zooms())
    volumes = [
        np.bincount(np.asarray(x.dataobj).ravel(), minlength=6)[1:] * v
        for x, v in ((labels, voxel), (there, 1))
    ]
    np.testing.assert_allclose(volumes[0], volumes[1], rtol=0.05)


def test_native_to_sri24_of_a_raw_scan_aligns_it_with_sri24(raw, preprocessed):
    """The recorded transform carries the native lesion onto the one in SRI24 space."""
    record = raw / "derivatives/simulation/sub-002/anat/sub-002_desc-simulation_parameters.json"
    transform = np.array(json.loads(record.read_text())["T1w"]["native_to_sri24"])
    native = nib.load(raw / "derivatives/lesions/sub-002/anat/sub-002_space-T1w_label-lesion_mask.nii.gz")
    there = nib.load(preprocessed / "sub-002/anat/sub-002_space-SRI24_label-lesion_desc-manual_mask.nii.gz")

    def centre(image: nib.Nifti1Image, onto: np.ndarray) -> np.ndarray:
        return (onto @ image.affine @ np.r_[np.argwhere(np.asarray(image.dataobj) > 0).mean(0), 1])[:3]

    np.testing.assert_allclose(centre(native, transform), centre(there, np.eye(4)), atol=0.5)


def test_healthy_cohort_reads_participants_tsv(raw):
    table = pd.read_csv(raw / "participants.tsv", sep="\t", keep_default_na=False)
    assert table["participant_id"].tolist() == ["sub-001", "sub-002"]
    assert table["group"].tolist() == ["control", "patient"]
    assert table["pathology"].tolist() == ["none", "stroke"]


@pytest.mark.parametrize("dataset", ["raw", "preprocessed"])
def test_validator_finds_no_error(dataset, request):
    validator = shutil.which("bids-validator-deno")
    if validator is None:
        pytest.skip("bids-validator-deno is not on the path")
    folder = request.getfixturevalue(dataset)
    folders = (
        [folder, *(folder / "derivatives" / part for part in ("lesions", "tissue"))]
        if dataset == "raw"
        else [folder]
    )
    for each in folders:
        done = subprocess.run([validator, "--json", str(each)], capture_output=True, text=True, check=False)
        issues = json.loads(done.stdout)["issues"]["issues"]
        assert [i for i in issues if i["severity"] == "error"] == []


def test_invalid_numbers_are_refused(tmp_path):
    for wrong in (
        ["--healthy", "0"],
        ["--healthy", "-1"],
        ["--stroke", "1", "--lesion-contrast", "2"],
        ["--stroke", "1", "--lesion-volume", "5", "1"],
        ["--healthy", "1", "--scanners", "0"],
    ):
        with pytest.raises(SystemExit) as caught:
            main([str(tmp_path / "x"), *wrong])
        assert caught.value.code == 2
    assert not (tmp_path / "x").exists()


def test_lesion_masks_are_those_of_the_t1w_scan_if_there_is_one(tmp_path):
    """Masks are written for the first contrast, for any order on the command line."""
    arguments = [str(tmp_path), "--stroke", "1", "--modalities"]
    parse = build_parser().parse_args
    assert build_cohort(parse([*arguments, "FLAIR", "T2w", "T1w"])).modalities == ("T1w", "T2w", "FLAIR")
    assert build_cohort(parse([*arguments, "FLAIR"])).modalities == ("FLAIR",)


def test_find_label_maps_refuses_a_folder_without_label_maps(tmp_path):
    assert main([str(tmp_path / "x"), "--healthy", "1", "--labelmaps", str(tmp_path)]) == 66


def test_progress_is_printed(tmp_path, monkeypatch, capsys):
    names = ["sub-001", "sub-002"]
    monkeypatch.setattr("bids_uad.simulation.__main__.make_cohort", lambda cohort, nprocs: iter(names))
    assert main([str(tmp_path), "--healthy", "2"]) == 0
    assert capsys.readouterr().err.splitlines() == [
        "Simulated subjects: 1 of 2; about 1 min left",
        "Simulated subjects: 2 of 2",
        f"2 subjects in {tmp_path}",
    ]
