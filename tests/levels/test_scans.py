"""Scans without a BIDS dataset, on the command line and from Python, with stand-ins for the processing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from scipy.interpolate import RegularGridInterpolator

from bids_uad import space
from bids_uad.cli.main import main
from bids_uad.config import RunConfig
from bids_uad.errors import ConfigError, InputError, UserError
from bids_uad.files import CHECKSUMS
from bids_uad.levels import scans
from bids_uad.levels.scans import Scan, contrast_of, find_scans, make_dataset, make_labels
from tests.dataset.skeleton import write_image
from tests.levels.fakes import fake_bundle
from tests.levels.test_participant_run import reference, stand_ins  # noqa: F401

AFFINE = space.AFFINE @ nib.affines.from_matvec(np.diag([-2.0, 2, 2]), [203.3, 84.8, 30.6])
"""Grid that contains the cubes of the stand-in detector, in another orientation than SRI24."""


@pytest.fixture(scope="module")
def run(tmp_path_factory, stand_ins):  # noqa: F811
    """Three scans, of which one cannot be read and one is refused by preprocessing, processed together."""
    folder = tmp_path_factory.mktemp("scans")
    good = write_image(folder / "in" / "P 01_T1.nii.gz", AFFINE, (60, 60, 60))
    good.with_name("P 01_T1.json").write_text('{"Manufacturer": "ACME"}')
    write_image(folder / "in" / "refused_mprage.nii", AFFINE, (60, 60, 60))
    (folder / "in" / "damaged_T1w.nii.gz").write_bytes(good.read_bytes()[:20_000])
    (folder / "in" / "notes.txt").write_text("not a scan")
    fake_bundle(folder / "disyre-T1w", "disyre", "T1w")
    return folder, call(folder)


def call(folder: Path) -> int:
    CHECKSUMS.clear()
    arguments = [folder / "in", folder / "out", "--device", "cpu", "--nprocs", "2"]
    return main([*map(str, arguments), "--models", str(folder / "disyre-T1w")])


def test_results_have_the_name_and_the_grid_of_the_scan(run):
    folder, code = run
    assert code == 1  # of the two others
    names = {path.name for path in (folder / "out").iterdir()}
    results = {f"P 01_T1{end}" for end in (".html", "_anomalymap.nii.gz", "_anomalymask.nii.gz")}
    others = {"bids", "work", "calls.txt", "refused_mprage.html"}
    assert names == {*others, *results, "P 01_T1_components.tsv"}
    scores, mask = (
        nib.load(folder / "out" / f"P 01_T1_{end}.nii.gz") for end in ("anomalymap", "anomalymask")
    )
    for image in (scores, mask):
        assert image.shape == (60, 60, 60)
        np.testing.assert_allclose(image.affine, AFFINE, atol=1e-5)
    anat = folder / "out" / "bids" / "derivatives" / "bids_uad" / "sub-P01T1" / "anat"
    sri24 = nib.load(anat / "sub-P01T1_space-SRI24_desc-T1wDisyre_anomalymap.nii.gz").get_fdata()
    lookup = RegularGridInterpolator([np.arange(size) for size in sri24.shape], sri24)
    voxels = np.argwhere(np.ones(scores.shape))
    world = nib.affines.apply_affine(AFFINE, voxels)
    expected = lookup(nib.affines.apply_affine(np.linalg.inv(space.AFFINE), world)).reshape(scores.shape)
    np.testing.assert_allclose(scores.get_fdata(), expected, atol=1e-4)
    assert (expected > 0).sum() > 20
    assert mask.get_fdata()[expected > 0.74].all()
    assert len(pd.read_csv(folder / "out" / "P 01_T1_components.tsv", sep="\t")) == 2


def test_dataset_has_copies_of_the_scans_and_their_sidecars(run):
    folder, _ = run
    root = folder / "out" / "bids"
    assert {path.name for path in root.glob("sub-*")} == {"sub-P01T1", "sub-refusedmprage"}
    copy = root / "sub-P01T1" / "anat" / "sub-P01T1_T1w.nii.gz"
    assert not copy.is_symlink()
    assert copy.read_bytes() == (folder / "in" / "P 01_T1.nii.gz").read_bytes()
    assert json.loads(copy.with_name("sub-P01T1_T1w.json").read_text()) == {"Manufacturer": "ACME"}
    assert (root / "sub-refusedmprage" / "anat" / "sub-refusedmprage_T1w.nii").is_file()


def test_same_command_processes_only_scans_that_failed(run, capfd):
    folder, _ = run
    (folder / "out" / "calls.txt").unlink()
    before = (folder / "out" / "P 01_T1_anomalymap.nii.gz").read_bytes()
    assert call(folder) == 1
    assert not (folder / "out" / "calls.txt").exists()
    assert (folder / "out" / "P 01_T1_anomalymap.nii.gz").read_bytes() == before
    text = "".join(capfd.readouterr().err.split())
    assert "damaged_T1w.nii.gz:theimagedata" in text
    assert "sub-refusedmprage_T1w.nii:nobrainwasfound" in text


def request(folder: Path, scan: Path, **options: object) -> dict:
    """Return a request as `detect` sends it."""
    config = RunConfig(
        bids_dir=folder / "out" / "bids",
        output_dir=folder / "out",
        levels=("scans",),
        work_dir=folder / "out" / "work",
        scans=(str(scan),),
        models=(str(folder / "disyre-T1w"),),
        device="cpu",
        **options,
    )
    return {"config": config.to_toml(), "keep": False}


def test_detect_returns_what_the_command_line_writes(run, tmp_path):
    folder, _ = run
    answer = scans._answer(request(folder, folder / "in" / "P 01_T1.nii.gz"))
    result = scans._read_result(scans.ScanOutputs(**json.loads(json.dumps(answer))), keep=True)
    for name, array in (("map", result.native.map), ("mask", result.native.mask)):
        written = nib.load(folder / "out" / f"P 01_T1_anomaly{name}.nii.gz")
        np.testing.assert_array_equal(array, written.get_fdata())
    assert result.native.mask.dtype == bool
    assert result.sri24.map.shape == result.label_image.shape == result.scan_image.shape == space.SHAPE
    assert result.sri24.mask.sum() == result.components["volume_mm3"].sum() == 258
    assert (result.modality, result.model, result.threshold) == ("T1w", "disyre-T1w", 0.5)
    assert result.warnings == ("look at sub-P01T1_T1w.nii.gz",)
    assert result.report == folder / "out" / "P 01_T1.html"
    assert "nan" not in repr(result)
    assert len(repr(result)) < 300


def test_detect_raises_the_reason_of_a_failure(run):
    folder, _ = run
    scan = folder / "in" / "refused_mprage.nii"
    with pytest.raises(UserError, match="no brain was found; give a brain mask") as failure:
        scans._answer(request(folder, scan))
    assert str(scan) in str(failure.value)
    assert "details" not in str(failure.value)
    with pytest.raises(InputError, match=r"cut short|cannot be read"):
        scans._answer(request(folder, folder / "in" / "damaged_T1w.nii.gz"))


def test_import_is_fast():
    program = """if True:
        import sys, bids_uad
        assert "numpy" not in sys.modules
        from bids_uad import detect
        print(*{"torch", "ants", "nipype", "bids", "sklearn"} & set(sys.modules))
        """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("name", "contrast"),
    [
        ("sub-01_T1w.nii.gz", "T1w"),
        ("sub-01_space-T1w_FLAIR.nii.gz", "FLAIR"),
        ("sub-01_T1w_brain.nii.gz", None),
        ("sub-01_desc-brain_mask.nii.gz", None),
        ("sub-01_ce-gd_T1w.nii.gz", None),
        ("p7 T2.NII.GZ", "T2w"),
        ("p7-t2-flair.nii", "FLAIR"),
        ("BraTS-GLI-00000-000-t2f.nii.gz", "FLAIR"),
        ("BraTS-GLI-00000-000-t1n.nii.gz", "T1w"),
        ("BraTS-GLI-00000-000-t1c.nii.gz", None),
        ("p7_UNIT1.nii", "T1w"),
        ("T1_to_T2.nii.gz", None),
        ("T1_mask.nii.gz", None),
        ("scan.nii.gz", None),
        ("T100.nii.gz", None),
    ],
)
def test_contrast_of_reads_whole_words_of_the_name(name, contrast):
    assert contrast_of(name) == contrast


def test_labels_are_unique_letters_and_digits():
    stems = ["sub-01_ses-a_T1w", "a-b", "A_B", "\u8111", "x" * 100, "x" * 101]
    labels = make_labels(stems)
    assert labels[0] == "01sesaT1w"
    assert len({label.lower() for label in labels}) == len(stems)
    assert all(label.isascii() and label.isalnum() and len(label) <= 72 for label in labels)
    assert make_labels(stems) == labels


@pytest.mark.parametrize(
    ("names", "modality", "error", "message"),
    [
        (["scan.nii.gz"], None, ConfigError, r"^scan.nii.gz: .* --modality"),
        (["a/x_T1w.nii", "b/x_T1w.nii.gz"], None, ConfigError, "a/x_T1w.nii and .* have the same name"),
        (["absent.nii"], None, InputError, "absent.nii: there is no such file"),
        (["T1.mgz"], "T1w", InputError, "T1.mgz: not a NIfTI file"),
        (["T1.nii", "a"], None, InputError, "a: a folder, not a file"),
        (["empty"], None, InputError, r"empty: no NIfTI file .* dcm2niix"),
        (["out"], None, ConfigError, "choose another output folder"),
        (
            ["out/T1.nii", "out/T1_anomalymap.nii.gz"],
            "T1w",
            ConfigError,
            "name of a result of T1.nii",
        ),
    ],
)
def test_find_scans_explains_what_cannot_be_used(tmp_path, names, modality, error, message):
    for folder in ("a", "b", "empty", "out"):
        (tmp_path / folder).mkdir()
    for name in names:
        if "." in name and "absent" not in name:
            (tmp_path / name).touch()
    with pytest.raises(error, match=message):
        find_scans([tmp_path / name for name in names], modality, tmp_path / "out")


def test_modality_is_that_of_all_scans(tmp_path):
    for name in ("T1.nii", "b.nii.gz"):
        (tmp_path / name).touch()
    found = find_scans([tmp_path / "T1.nii", tmp_path / "b.nii.gz"], "FLAIR", tmp_path)
    assert [(scan.modality, scan.image.name) for scan in found] == [
        ("FLAIR", "sub-T1_FLAIR.nii"),
        ("FLAIR", "sub-b_FLAIR.nii.gz"),
    ]


def test_make_dataset_replaces_an_earlier_scan_of_the_same_name(tmp_path):
    root, path = tmp_path / "bids", write_image(tmp_path / "x_UNIT1.nii.gz")
    make_dataset([Scan(path, "T2w", "x")], root)
    old = root / scans.DERIVATIVES / "sub-x" / "anat"
    old.mkdir(parents=True)
    make_dataset([Scan(path, "T1w", "x")], root)
    assert [file.name for file in (root / "sub-x" / "anat").iterdir()] == ["sub-x_UNIT1.nii.gz"]
    assert not old.exists()
    (root / "dataset_description.json").write_text('{"Name": "My study"}')
    with pytest.raises(ConfigError, match="already holds another dataset"):
        make_dataset([Scan(path, "T1w", "x")], root)
