"""The main job from raw BIDS to reports."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import nitransforms
import numpy as np
import pandas as pd
import pytest

from bids_uad import space
from bids_uad.cli.main import main
from bids_uad.preprocessing.resampling import read_itk
from tests.header_contract import faults_below
from tests.integration.conftest import DETECTORS

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]

EXPECTED = Path(__file__).with_name("expected_outputs.txt")


def validate(folder: Path) -> list[dict]:
    """Errors and warnings of the BIDS validator."""
    program = Path(sys.executable).with_name("bids-validator-deno")
    if not program.exists():
        pytest.skip("bids-validator-deno is not installed")
    done = subprocess.run([program, "--format", "json", folder], capture_output=True, text=True, timeout=300)
    return json.loads(done.stdout)["issues"]["issues"]


def test_it_succeeds(run):
    assert run.code == 0, run.text


def test_the_expected_files_are_there(run):
    """One line a file; what carries the run's identity is left out."""
    found = sorted(
        path.relative_to(run.out).as_posix()
        for path in run.out.rglob("*")
        if path.is_file() and not {"log", "logs", "figures"} & set(path.relative_to(run.out).parts)
    )
    assert found == EXPECTED.read_text().split()


def test_nothing_temporary_is_left(run):
    assert [path.name for path in run.out.rglob(".*") if path.name != ".bidsignore"] == []


def test_output_is_valid_bids(run):
    assert validate(run.out) == []


def test_input_is_valid_bids(run):
    assert [issue for issue in validate(run.data) if issue["severity"] == "error"] == []


def test_all_images_of_a_run_keep_the_header_contract(run):
    assert faults_below(run.out) == []


def test_maps_are_on_the_grid_and_inside_the_brain(run):
    maps = sorted(run.out.rglob("*_anomalymap.nii.gz"))
    assert len(maps) == 3 * len(DETECTORS)
    for path in maps:
        image = nib.load(path)
        assert image.shape == space.SHAPE
        np.testing.assert_array_equal(image.affine, space.AFFINE)
        modality = path.name.split("_desc-")[1][:3]
        prefix = path.name.split("_desc-")[0]
        brain = path.with_name(f"{prefix}_desc-brain_mask.nii.gz")
        if modality == "T2w":
            brain = path.with_name(f"{prefix}_desc-T2wBrain_mask.nii.gz")
        outside = np.asarray(nib.load(brain).dataobj) == 0
        scores = image.get_fdata()
        assert scores[outside].max() == 0
        assert scores.max() > 0


def test_masks_are_maps_above_the_threshold(run):
    for path in run.out.rglob("*_label-anomaly_desc-*_probseg.nii.gz"):
        mask = path.with_name(path.name.replace("_probseg", "_mask"))
        scores = path.with_name(path.name.replace("_label-anomaly", "").replace("_probseg", "_anomalymap"))
        threshold = json.loads(mask.with_name(mask.name.replace(".nii.gz", ".json")).read_text())["Threshold"]
        above = nib.load(scores).get_fdata() > np.float32(threshold)
        np.testing.assert_array_equal(above, nib.load(mask).get_fdata() > 0)
        shares = nib.load(path).get_fdata()
        np.testing.assert_array_equal(above, shares > 0.5)


def test_native_masks_lie_on_the_scans_grid(run):
    for path in run.out.rglob("*_space-orig_label-anomaly_desc-T1w*_mask.nii.gz"):
        subject = path.name.split("_")[0]
        scan = nib.load(run.data / subject / "anat" / f"{subject}_T1w.nii.gz")
        image = nib.load(path)
        assert image.shape == scan.shape
        np.testing.assert_allclose(image.affine, scan.affine, atol=1e-4)


def resampled(run, scan: str, path: Path, like: Path, order: int, step: int = 1) -> np.ndarray:
    """Resample a raw image to SRI24 space with nitransforms, through the transform that the run wrote.

    The grid is that of every `step`-th voxel of `like` in each direction.
    """
    reference = nib.load(like).slicer[::step, ::step, ::step]
    subject = like.name.split("_")[0]
    transform = like.with_name(f"{subject}_from-{scan}_to-SRI24_mode-image_xfm.txt")
    linear = nitransforms.linear.load(transform, fmt="itk", reference=reference)
    return nitransforms.resampling.apply(linear, nib.load(path), reference=reference, order=order).get_fdata()


def neighbours(volume: np.ndarray) -> list[np.ndarray]:
    """Shift a volume by one voxel in each of the six directions."""
    return [np.roll(volume, step, axis) for axis in range(3) for step in (-1, 1)]


def test_the_lesion_mask_is_resampled_with_the_image(run):
    mask = next(run.out.rglob("*_label-lesion_desc-manual_mask.nii.gz"))
    raw = (
        run.data
        / "derivatives"
        / "lesions"
        / json.loads(mask.with_name(mask.name.replace(".nii.gz", ".json")).read_text())["Sources"][
            0
        ].removeprefix("bids:lesions:")
    )
    expected = resampled(run, "T1w", raw, mask, order=0) > 0
    found = nib.load(mask).get_fdata() > 0

    def dice(other: np.ndarray) -> float:
        return 2 * (expected & other).sum() / (expected.sum() + other.sum())

    assert found.sum() > 100
    assert dice(found) > 0.9  # trilinear interpolation and nearest neighbours differ at the surface
    assert dice(found) > max(map(dice, neighbours(found))) + 0.02


@pytest.mark.parametrize("scan", ["T1w", "T2w"])
def test_the_image_is_resampled_through_the_written_transform(run, scan):
    preproc = next(run.out.rglob(f"*_desc-preproc_{scan}.nii.gz"))
    subject = preproc.name.split("_")[0]
    raw = run.data / subject / "anat" / f"{subject}_{scan}.nii.gz"
    desc = {"T1w": "brain", "T2w": "T2wBrain"}[scan]
    brain = nib.load(preproc.with_name(f"{subject}_space-SRI24_desc-{desc}_mask.nii.gz")).get_fdata() > 0
    few = (slice(None, None, 3),) * 3
    expected = resampled(run, scan, raw, preproc, order=1, step=3)[brain[few]]
    found = nib.load(preproc).get_fdata()

    def correlation(other: np.ndarray) -> float:
        return np.corrcoef(expected, other[few][brain[few]])[0, 1]

    assert correlation(found) > 0.85  # the raw image has a bias field
    assert correlation(found) > max(map(correlation, neighbours(found))) + 0.01


def test_group_table_agrees_with_the_voxels(run):
    """Dice from score tables equals Dice from the masks."""
    subjects = pd.read_csv(run.out / "group_subjects.tsv", sep="\t", na_values="n/a")
    scored = subjects[(subjects.role == "lesion") & (subjects.modality == "T2w")]
    assert len(scored)
    truth = nib.load(next(run.out.rglob("*_label-lesion_desc-manual_mask.nii.gz"))).get_fdata() > 0
    for row in scored.itertuples():
        desc = f"T2w{row.detector.capitalize()}"
        mask = next(run.out.rglob(f"{row.participant_id}*_space-SRI24_label-anomaly_desc-{desc}_mask.nii.gz"))
        brain = mask.with_name(f"{row.participant_id}_space-SRI24_desc-T2wBrain_mask.nii.gz")
        inside = nib.load(brain).get_fdata() > 0
        found = nib.load(mask).get_fdata() > 0
        dice = 2 * (found & truth & inside).sum() / (found.sum() + (truth & inside).sum())
        assert row.dice == pytest.approx(dice, abs=1e-4)


def test_disyre_finds_the_stroke(run):
    benchmark = pd.read_csv(run.out / "group_benchmark.tsv", sep="\t", na_values="n/a")
    row = benchmark[(benchmark.detector == "disyre") & (benchmark.modality == "T2w")].iloc[0]
    assert row.auprc_mean > 2 * row.prevalence


def test_reports_show_pictures_and_the_warning(run):
    for path in [*run.out.glob("sub-*.html"), run.out / "group.html"]:
        text = path.read_text(encoding="utf-8")
        assert "not for clinical" in text.lower()
        assert "<svg" in text or ".svg" in text


def call(*arguments: object) -> int:
    """Call the program in this process, which has imported it."""
    return main([*map(str, arguments)])


def test_the_same_command_does_nothing_twice(run, capfd):
    before = {path: path.stat().st_mtime_ns for path in run.out.rglob("sub-*/**/*") if path.is_file()}
    code = call(
        run.data, run.out, "participant", "-w", run.out.parent / "work",
        "-d", f"lesions={run.data / 'derivatives' / 'lesions'}", "--models", *DETECTORS, "--no-viewer",
    )  # fmt: skip
    said = "".join(capfd.readouterr())
    assert code == 0, said
    assert "up to date" in said
    after = {path: path.stat().st_mtime_ns for path in run.out.rglob("sub-*/**/*") if path.is_file()}
    assert after == before


def test_group_reads_only_the_output(run, tmp_path):
    """The images may be gone: score tables and participants.tsv are enough."""
    out = tmp_path / "out"
    shutil.copytree(run.out, out, ignore=shutil.ignore_patterns("*.nii.gz", "group*", "figures"))
    data = tmp_path / "data"
    data.mkdir()
    for name in ("participants.tsv", "participants.json", "dataset_description.json"):
        shutil.copy(run.data / name, data)
    assert call(data, out, "group") == 0
    assert (out / "group_benchmark.tsv").read_text() == (run.out / "group_benchmark.tsv").read_text()


@pytest.mark.slow
def test_its_own_output_is_input_that_leaves_nothing_to_do(run, tmp_path):
    """Mask and transform of an earlier run are taken over, and the images come out the same."""
    code = call(
        run.data, tmp_path / "again", "participant", "--participant-label", "002", "--models", "none",
        "-w", tmp_path / "work", "--nprocs", "2", "-d", f"earlier={run.out}",
    )  # fmt: skip
    assert code == 0
    for modality in ("T1w", "T2w"):
        name = f"sub-002_from-{modality}_to-SRI24_mode-image_xfm.txt"
        one, other = (
            read_itk(folder / "sub-002" / "anat" / name) for folder in (run.out, tmp_path / "again")
        )
        np.testing.assert_allclose(one, other, atol=1e-9)
        name = f"sub-002_space-SRI24_desc-preproc_{modality}.nii.gz"
        one, other = (
            nib.load(folder / "sub-002" / "anat" / name) for folder in (run.out, tmp_path / "again")
        )
        difference = np.abs(one.get_fdata() - other.get_fdata())
        assert (difference > 1e-4).mean() < 1e-5
