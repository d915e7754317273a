"""The two levels that make models, driven from the command line on brains of thirty slices."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import cache

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import gpu_models
from bids_uad import space
from bids_uad.cli.main import main
from bids_uad.dataset.participants import subject_hash
from bids_uad.engine.bundle import PACKAGED, load_bundle, load_detector, resolve_bundles
from bids_uad.engine.inference import Scorer
from bids_uad.errors import InputError, ModelError
from bids_uad.files import write_json, write_tsv
from bids_uad.methods.intensity import Intensity
from bids_uad.methods.pls.detector import PLS
from bids_uad.methods.registry import build_detector
from bids_uad.networks.backbones import LITE_WEIGHTS, resnet18
from bids_uad.training import backbone, calibrate, loop

LESION = (slice(100, 112), slice(100, 112), slice(70, 80))


@cache
def brain_and_fluid():
    """An ellipsoid, and its middle."""
    axes = np.ogrid[tuple(slice(0, size) for size in space.SHAPE)]
    radius = sum(((a - c) / r) ** 2 for a, c, r in zip(axes, (120, 120, 75), (40, 44, 15), strict=True))
    return radius < 1, radius < 0.05


def write_scan(folder, label, *, lesion=False):
    """One T2w with bright fluid in the middle, and a lesion that is brighter still."""
    brain, fluid = brain_and_fluid()
    noise = np.random.default_rng(int(label)).normal(0, 0.02, space.SHAPE)
    volume = (np.where(fluid, 0.8, 0.4) + noise).clip(0, 1) * brain
    anat = folder / f"sub-{label}" / "anat"
    anat.mkdir(parents=True)
    stem = f"sub-{label}_space-SRI24"
    if lesion:
        volume[LESION] = 0.95
        truth = np.zeros(space.SHAPE, dtype=np.uint8)
        truth[LESION] = 1
        nib.save(space.to_image(truth, np.uint8), anat / f"{stem}_label-lesion_desc-manual_mask.nii.gz")
    nib.save(space.to_image(volume), anat / f"{stem}_desc-preproc_T2w.nii.gz")
    nib.save(space.to_image(brain, np.uint8), anat / f"{stem}_desc-brain_mask.nii.gz")


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preprocessed")
    for label, lesion in (("1", False), ("2", False), ("3", True), ("4", False)):
        write_scan(folder, label, lesion=lesion)
    people = {
        "participant_id": ["sub-1", "sub-2", "sub-3", "sub-4"],
        "age": [30, 61, 50, 44],
        "sex": ["F", "M", "M", "F"],
        "group": ["control", "control", "patient", "patient"],
        "scanner": ["A", "B", "A", "B"],
    }
    write_tsv(folder / "participants.tsv", pd.DataFrame(people))
    write_json(folder / "dataset_description.json", {"Name": "Thirty slices", "BIDSVersion": "1.10.0"})
    return folder


def call(scans, models, level, detector="intensity", *extra, modality="T2w"):
    chosen = ["--detector", detector, "--modality", modality, "--preset", "lite"]
    return main([level, str(scans), str(models), *chosen, "-w", str(models / "scratch"), *extra])


@pytest.fixture(scope="module")
def models(scans, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    assert call(scans, folder, "train") == 0
    assert call(scans, folder, "calibrate") == 0
    return folder


def test_train_uses_healthy_controls_only(models):
    training = load_bundle(models / "intensity-T2w-lite").info["training"]
    assert training["n_subjects"] == 2
    assert training["age_range"] == [30, 61]
    assert training["sex"] == {"female": 1, "male": 1}
    assert training["scanners"] == ["A", "B"]
    assert training["source"] == "Thirty slices"


def test_model_card_describes_the_training_data(models):
    card = (models / "intensity-T2w-lite" / "MODEL_CARD.md").read_text()
    assert "not for clinical use" in card
    assert "30 to 61 years" in card
    assert "--detector intensity --modality T2w" in card


def test_model_card_has_the_validation_results(models, scans):
    card = models / "intensity-T2w-lite" / "MODEL_CARD.md"
    calibration = json.loads(card.with_name("calibration.json").read_text())
    dice = calibration["validation"]["mean_dice"]["max_dice"]
    text = card.read_text()
    row = next(line for line in text.splitlines() if "max_dice (default)" in line)
    assert f"| {dice:.3f} |" in row
    assert "2 scans of healthy controls,\n1 with lesions." in text
    # Calibrating again replaces the figures.
    assert call(scans, models, "calibrate") == 0
    assert card.read_text() == text


def test_thresholds_come_from_healthy_scans_and_masks(models):
    """The patient without a mask is neither healthy nor ground truth."""
    calibration = json.loads((models / "intensity-T2w-lite" / "calibration.json").read_text())
    assert calibration["validation"]["n_healthy"] == 2
    assert calibration["validation"]["n_lesion"] == 1
    # Between fluid at 0.8 and the lesion at 0.95 lies the cut that leaves only the lesion.
    assert 0.8 < calibration["thresholds"]["max_dice"] < 0.95
    assert calibration["validation"]["mean_dice"]["max_dice"] > 0.95


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """Controls and patients with a lesion, with an empty mask and without a mask; see `GROUPS`."""
    folder = tmp_path_factory.mktemp("masked")
    for label in GROUPS:
        write_scan(folder, label, lesion=label in "1568")
        mask = folder / f"sub-{label}/anat/sub-{label}_space-SRI24_label-lesion_desc-manual_mask.nii.gz"
        if label in "267":
            nib.save(space.to_image(np.zeros(space.SHAPE), np.uint8), mask)
        if label == "5":
            # The T2w is not the first image of its session, after which the mask is not named.
            for path in sorted(mask.parent.glob("*desc-preproc*")):
                shutil.copy(path, path.with_name(path.name.replace("T2w", "T1w")))
                path.rename(path.with_name(path.name.replace("sub-5_", "sub-5_acq-tse_")))
            brain = mask.with_name("sub-5_acq-tse_space-SRI24_desc-T2wBrain_mask.nii.gz")
            shutil.copy(mask.with_name("sub-5_space-SRI24_desc-brain_mask.nii.gz"), brain)
    write_groups(folder, GROUPS)
    return folder


GROUPS = {
    "1": "control",  # with a lesion in the mask
    "2": "control",  # all zero
    "3": "control",
    "4": "patient",  # no mask
    "5": "patient",
    "6": "patient",  # all zero
    "7": "n/a",  # all zero
    "8": "n/a",
}


def write_groups(folder, groups):
    people = {"participant_id": [f"sub-{label}" for label in groups], "group": list(groups.values())}
    write_tsv(folder / "participants.tsv", pd.DataFrame(people | {"age": 40, "sex": "F"}))
    write_json(folder / "dataset_description.json", {"Name": "Masks", "BIDSVersion": "1.10.0"})


def test_calibrate_takes_controls_from_participants_tsv_not_from_masks(
    masked, models, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(calibrate, "MIN_SUBJECTS", 3)
    runs = []
    plain = tmp_path / "plain"
    shutil.copytree(masked, plain)
    for label in "467":
        shutil.rmtree(plain / f"sub-{label}")
    (plain / "sub-2/anat/sub-2_space-SRI24_label-lesion_desc-manual_mask.nii.gz").unlink()
    for folder in (masked, plain):
        shutil.copytree(models / "intensity-T2w-lite", tmp_path / f"{folder.name}-models/intensity-T2w-lite")
        assert call(folder, tmp_path / f"{folder.name}-models", "calibrate") == 0
        bundle = tmp_path / f"{folder.name}-models/intensity-T2w-lite"
        log = " ".join(capsys.readouterr().err.split())
        runs.append((json.loads((bundle / "calibration.json").read_text()), log, bundle))
    (calibration, log, bundle), (expected, *_) = runs
    for found, wanted in ((calibration, expected), (calibration["normative"], expected["normative"])):
        counts = {name: found["validation"][name] for name in ("n_healthy", "n_lesion", "n_empty_mask")}
        assert counts == {"n_healthy": 3, "n_lesion": 2, "n_empty_mask": 2}
        # Empty masks and scans without a mask change no threshold, nor does a control's empty mask.
        assert found["thresholds"] == wanted["thresholds"]
        assert found["validation"] == wanted["validation"] | {"n_empty_mask": 2}
    assert calibration["normative"]["n_healthy_subjects"] == 3
    for words in (
        "1 participant(s) left out, neither healthy by participants.tsv nor with a lesion mask: sub-4",
        "2 scan(s) of patients have a lesion mask without voxels in the brain",
        "counted separately (n_empty_mask): sub-6, sub-7",
    ):
        assert words in log
    assert "with a lesion mask that is not empty, used as controls: sub-1" in log
    assert "empty lesion mask, not used: 2." in (bundle / "MODEL_CARD.md").read_text()


def test_masked_voxels_of_controls_are_not_false_positives(masked, models, tmp_path):
    """As at the group level; without the mask the bright voxels count."""
    rates = []
    for name in ("with", "without"):
        folder, own = tmp_path / name, tmp_path / f"{name}-models"
        shutil.copytree(masked / "sub-1", folder / "sub-1")
        shutil.copytree(masked / "sub-8", folder / "sub-8")
        write_groups(folder, {"1": "control", "8": "patient"})
        if name == "without":
            next(folder.glob("sub-1/anat/*label-lesion*")).unlink()
        shutil.copytree(models / "intensity-T2w-lite", own / "intensity-T2w-lite")
        assert call(folder, own, "calibrate") == 0
        calibration = json.loads((own / "intensity-T2w-lite/calibration.json").read_text())
        rates.append(calibration["validation"]["healthy_fpr"]["max_dice"])
    assert rates[0] < 1e-4
    brain = nib.load(masked / "sub-1/anat/sub-1_space-SRI24_desc-brain_mask.nii.gz").get_fdata().sum()
    assert rates[1] == pytest.approx(12 * 12 * 10 / brain, rel=0.1)


@pytest.mark.parametrize(
    ("groups", "change", "words"),
    [
        ({"4": "patient"}, None, "no scan of a healthy control, and none of a patient with a lesion"),
        ({"6": "patient"}, None, "no scan of a healthy control, and none of a patient with a lesion"),
        ({"8": "patient"}, np.ones((4, 4, 4), np.uint8), "the image of shape (4, 4, 4) is not a volume"),
        ({"8": "patient"}, np.zeros((240, 240, 154), np.uint8), "lesion mask not on the SRI24 grid"),
        (
            {"8": "patient"},
            np.full(space.SHAPE, 0.5, np.float32),
            "lesion mask with values that are not",
        ),
    ],
)
def test_calibrate_refuses_unusable_masks(masked, models, tmp_path, capsys, groups, change, words):
    (label,) = groups
    scans = tmp_path / "scans"
    shutil.copytree(masked / f"sub-{label}", scans / f"sub-{label}")
    write_groups(scans, groups)
    if change is not None:
        path = next(scans.glob("sub-*/anat/*label-lesion*"))
        nib.save(nib.Nifti1Image(change, space.AFFINE), path)
    shutil.copytree(models / "intensity-T2w-lite", tmp_path / "models" / "intensity-T2w-lite")
    before = (tmp_path / "models/intensity-T2w-lite/calibration.json").read_text()
    assert call(scans, tmp_path / "models", "calibrate") == 66
    assert words in capsys.readouterr().err
    assert (tmp_path / "models/intensity-T2w-lite/calibration.json").read_text() == before


def test_the_bundle_is_ready_to_use(models):
    (bundle,) = resolve_bundles([str(models / "intensity-T2w-lite")], ["T2w"])
    assert bundle.default_threshold[0] == "max_dice"
    assert bundle.default_threshold[1] in bundle.bin_edges


MRI = ["backbone.name=mri", "backbone.taps=[1,2]"]
"""Hyper-parameters for a feature network that is trained first, on tissue classes."""


@pytest.mark.parametrize(
    ("detector", "hyper", "code", "words"),
    [("nonesuch", [], 2, "no detector named"), ("fae", ["--hyper", *MRI], 66, "tissue classes")],
)
def test_train_reports_an_unusable_detector(scans, tmp_path, capsys, detector, hyper, code, words):
    assert call(scans, tmp_path / "models", "train", detector, *hyper) == code
    assert words in capsys.readouterr().err


def test_models_are_made_in_a_given_time_and_continued(scans, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_models, "MAX_WARM_UP", 16)
    tiny = ["stride=50", "network.width=8", "network.multipliers=[1,1]", "network.blocks=[0,0]", "steps=3"]
    command = [str(scans), str(scans), str(tmp_path / "models"), "-w", str(tmp_path / "work")]
    command += ["--minutes", "600", "--detectors", "andi", "intensity", "--preset", "lite", "--hyper", *tiny]
    command += ["--device", "cpu", "--batch-size", "2"]
    assert gpu_models.main(command) == 1
    done = json.loads((tmp_path / "models" / "gpu_models.json").read_text())
    assert "no hyper-parameter" in done["intensity-T2w-lite"]["problem"]
    made = done["andi-T2w-lite"]
    assert (made["steps"], made["scans"], made["complete"]) == (3, 4, True)
    bundle = load_bundle(tmp_path / "models" / "andi-T2w-lite")
    assert bundle.provenance["TrainingSteps"] == 3
    assert made["healthy_fpr"] == bundle.calibration["validation"]["healthy_fpr"]
    # A run that was stopped before its end keeps its plan.
    del made["complete"], made["trained"]
    write_json(tmp_path / "models" / "gpu_models.json", {"andi-T2w-lite": made})
    monkeypatch.setattr(gpu_models, "speed", None)
    assert gpu_models.main([word for word in command if word != "intensity"]) == 0
    assert load_bundle(bundle.folder).sha256 == bundle.sha256
    subset = gpu_models.choose_scans(scans, "T2w", 2, tmp_path / "subset")
    assert {path.name for path in subset.glob("sub-*")} == {"sub-1", "sub-3"}
    assert (subset / "participants.tsv").is_file()


def test_hyper_parameters_are_written_to_the_bundle(scans, tmp_path, capsys):
    models = tmp_path / "models"
    quick = ["--steps", "1", "--batch-size", "2"]
    assert call(scans, models, "train", "andi", *quick, "--hyper", "stride=100") == 0
    folder = models / "andi-T2w-lite"
    weights = load_bundle(folder).sha256
    assert load_bundle(folder).info["hyper"]["stride"] == 100
    assert "--hyper stride=100" in (folder / "MODEL_CARD.md").read_text()
    assert call(scans, models, "calibrate", "andi", "--hyper", "stride=50") == 0
    changed = load_bundle(folder)
    assert changed.info["hyper"]["stride"] == 50
    assert changed.provenance["HyperParameters"] == {"stride": 50}
    assert changed.provenance["TrainingSteps"] == 1
    assert changed.provenance["ThresholdCohort"] == "Thirty slices"
    assert changed.sha256 == weights
    assert changed.thresholds
    assert call(scans, models, "calibrate", "andi", "--hyper", "strides=5") == 2
    assert "no hyper-parameter 'strides'" in capsys.readouterr().err
    assert load_bundle(folder).thresholds == changed.thresholds


@pytest.mark.slow
def test_killed_training_resumes_with_equal_weights(scans, tmp_path):
    """SIGKILL in the middle of a stage, then the same command again."""
    chosen = ["--detector", "disyre", "--modality", "T2w", "--preset", "lite", "--nprocs", "1"]
    chosen += ["--steps", "60", "--batch-size", "2", "--random-seed", "4"]

    def command(name):
        folders = ["train", str(scans), str(tmp_path / name), "-w", str(tmp_path / f"{name}-work")]
        return [sys.executable, "-m", "bids_uad", *folders, *chosen]

    subprocess.run(command("whole"), check=True)
    running = subprocess.Popen(command("killed"))
    log = tmp_path / "killed-work"
    while running.poll() is None and not any(log.glob("training-*/training.csv")):
        time.sleep(0.05)
    time.sleep(1)
    assert running.poll() is None, "it ended before it could be killed"
    running.kill()
    running.wait()
    subprocess.run(command("killed"), check=True)
    weights = [load_bundle(tmp_path / name / "disyre-T2w-lite").sha256 for name in ("whole", "killed")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(("share", "code"), [("0.5", 0), ("0", 2), ("2", 2), ("half", 2)])
def test_train_uses_a_fraction_of_the_subjects(scans, tmp_path, share, code):
    arguments = ["--train-fraction", share]
    if code:
        with pytest.raises(SystemExit, match="2"):
            call(scans, tmp_path, "train", "intensity", *arguments)
        return
    assert call(scans, tmp_path, "train", "intensity", *arguments) == 0
    bundle = load_bundle(tmp_path / "intensity-T2w-lite")
    assert bundle.info["training"]["n_subjects"] == 1
    assert bundle.info["training"]["train_fraction"] == 0.5
    assert bundle.provenance["TrainingSubjects"] == 1
    assert bundle.provenance["TrainingFraction"] == 0.5
    assert bundle.provenance["TrainingSteps"] is None


def test_parts_of_synthetic_anomalies_are_switched_off(scans, tmp_path, capsys):
    quick = ["--steps", "1", "--batch-size", "2"]
    parts = ["rectangle", "disc", "texture"]
    models = tmp_path / "models"
    assert call(scans, models, "train", "disyre", *quick, "--hyper", f"anomalies={json.dumps(parts)}") == 0
    bundle = load_bundle(models / "disyre-T2w-lite")
    assert load_detector(bundle).hyper.anomalies == tuple(parts)
    assert bundle.provenance["HyperParameters"] == {"anomalies": parts}
    assert call(scans, models, "train", "disyre", *quick, "--hyper", 'anomalies=["haze"]') == 2
    assert "Got ('haze',) instead." in capsys.readouterr().err


def test_bundle_contains_its_training_subjects(models):
    bundle = load_bundle(models / "intensity-T2w-lite")
    learnt_from, judged_by, stranger = ({subject_hash("Thirty slices", f"sub-{k}")} for k in ("1", "3", "4"))
    assert bundle.cohorts_containing(learnt_from) == ["training", "validation"]
    assert bundle.cohorts_containing(judged_by) == ["validation"]
    assert bundle.cohorts_containing(stranger) == []


@pytest.mark.timeout(300)
def test_train_uses_simulated_subjects_alone_or_with_real_ones(scans, tmp_path):
    chosen = ["--synthetic", "1", "--seed", "3"]
    assert call("none", tmp_path, "train", "intensity", *chosen) == 0
    training = load_bundle(tmp_path / "intensity-T2w-lite").info["training"]
    assert (training["source"], training["n_subjects"]) == ("Synthetic brains, seed 3", 1)
    assert training["subjects"] == [subject_hash("Synthetic brains, seed 3", "sub-001")]
    (image,) = tmp_path.glob("scratch/synthetic-*/sub-001/anat/*_T2w.nii.gz")
    made = image.stat().st_mtime_ns
    assert call(scans, tmp_path, "train", "intensity", *chosen) == 0
    training = load_bundle(tmp_path / "intensity-T2w-lite").info["training"]
    assert (training["source"], training["n_subjects"]) == ("Thirty slices; Synthetic brains, seed 3", 3)
    assert image.stat().st_mtime_ns == made


def test_train_uses_contrast_transferred_t1w_scans(scans, tmp_path, capsys):
    t1w = tmp_path / "t1w"
    shutil.copytree(scans, t1w)
    for image in t1w.glob("sub-*/anat/*_T2w.nii.gz"):
        image.rename(str(image).replace("_T2w", "_T1w"))
    chosen = ["--contrast-transfer", "--seed", "3"]
    assert call(t1w, tmp_path, "train", "intensity", *chosen) == 0
    training = load_bundle(tmp_path / "intensity-T2w-lite").info["training"]
    assert (training["source"], training["n_scans"]) == ("Thirty slices", 2)
    assert training["subjects"] == sorted(subject_hash("Thirty slices", f"sub-{k}") for k in "12")
    images = tmp_path.glob("scratch/recontrasted-*/sub-*/anat/*_T2w.nii.gz")
    made = {path: path.stat().st_mtime_ns for path in images}
    assert len(made) == 2
    shutil.copytree(scans / "sub-1", t1w / "sub-1", dirs_exist_ok=True)
    assert call(t1w, tmp_path, "train", "intensity", *chosen) == 0
    training = load_bundle(tmp_path / "intensity-T2w-lite").info["training"]
    assert (training["source"], training["n_scans"]) == ("Thirty slices; Thirty slices", 3)
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert call(t1w, tmp_path, "train", "intensity", "--contrast-transfer", modality="T1w") == 2
    assert "--modality T2w or FLAIR" in capsys.readouterr().err


def test_train_accepts_bfloat16(scans, tmp_path):
    weights = {}
    for precision in ("fp32", "bf16"):
        arguments = ["--steps", "2", "--batch-size", "2", "--nprocs", "1", "--precision", precision]
        assert call(scans, tmp_path / precision, "train", "disyre", *arguments) == 0
        bundle = load_bundle(tmp_path / precision / "disyre-T2w-lite")
        assert bundle.info["training"]["precision"] == precision
        weights[precision] = load_detector(bundle).state_dict()
    changed = 0.0
    for name, value in weights["fp32"].items():
        torch.testing.assert_close(weights["bf16"][name], value, atol=0.05, rtol=0.05)
        changed = max(changed, float((weights["bf16"][name] - value).abs().max()))
    assert changed > 0


@pytest.fixture
def lesion_masks(tmp_path):
    """Two masks of a cube of 1 mL."""
    folder = tmp_path / "masks"
    folder.mkdir()
    mask = np.zeros((20, 20, 20), dtype=np.uint8)
    mask[3:13, 3:13, 3:13] = 1
    for name in "ab":
        nib.save(nib.Nifti1Image(mask, np.eye(4)), folder / f"{name}.nii.gz")
    (folder / "lesions.tsv").write_text("file\tpathology\na.nii.gz\tstroke\nb.nii.gz\tms\n")
    return folder


@pytest.mark.timeout(300)
def test_train_paints_with_real_shapes_and_continues_from_another_bundle(
    scans, tmp_path, lesion_masks, monkeypatch, capsys
):
    monkeypatch.setattr(loop, "SCANS_PER_POOL", 2)
    few = ["--steps", "2", "--batch-size", "2", "--nprocs", "1", "--hyper", "slice_smoothing=0.5"]
    first = tmp_path / "first"
    assert call(scans, first, "train", "pls", *few, "--lesion-masks", str(lesion_masks)) == 0
    bundle = load_bundle(first / "pls-T2w-lite")
    assert bundle.info["training"]["lesion_shapes"] == 2
    assert [stage["name"] for stage in bundle.info["training"]["stages"]] == ["segmentation"]
    card = (bundle.folder / "MODEL_CARD.md").read_text()
    assert "2 components of\n  real lesion masks. Intensities of real lesions were not used." in card
    assert (
        "--hyper slice_smoothing=0.5 \\\n        --steps 2 --batch-size 2 \\\n        --lesion-masks PATH"
        in card
    )
    detector = load_detector(bundle)
    assert detector.describe() == asdict(replace(PLS.presets["lite"], slice_smoothing=0.5))

    second = tmp_path / "second"
    start = ["--backbone-weights", str(bundle.folder)]
    assert call(scans, second, "train", "pls", *few[:-2], *start, "--seed", "9") == 0
    continued = load_bundle(second / "pls-T2w-lite")
    assert continued.info["training"]["backbone"] == {"bundle": "pls-T2w-lite", "sha256": bundle.sha256}
    assert "lesion_shapes" not in continued.info["training"]
    card = (continued.folder / "MODEL_CARD.md").read_text()
    assert f"Weights at the start: pls-T2w-lite (SHA-256 {bundle.sha256[:12]})" in card
    before, after = detector.state_dict(), load_detector(continued).state_dict()
    # The learning rate has just begun to rise.
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=5e-3, rtol=0.05)
    assert continued.sha256 != bundle.sha256

    wide = [*few[:-2], *start, "--hyper", "place=false"]
    assert call(scans, second, "train", "pls", *wide) == 66
    assert "the network of this bundle has another shape" in " ".join(capsys.readouterr().err.split())
    assert call(scans, second, "train", "intensity", "--lesion-masks", str(lesion_masks)) == 2
    assert "intensity does not use --lesion-masks" in capsys.readouterr().err


def test_calibrate_without_a_bundle_is_an_error(scans, tmp_path, capsys):
    assert call(scans, tmp_path / "models", "calibrate") == 69
    assert "bundle.json is missing" in capsys.readouterr().err


def test_train_without_controls_is_an_error(scans, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "sub-1").symlink_to(scans / "sub-1")
    write_json(bare / "dataset_description.json", {"Name": "Bare", "BIDSVersion": "1.10.0"})
    assert call(bare, tmp_path / "models", "train") == 66
    assert "none of the 1 T2w scans belongs to a healthy control" in capsys.readouterr().err


def test_imagenet_backbones_need_their_weights(scans, tmp_path, capsys):
    """Nothing is ever downloaded: the user names a file, and it must be the right one."""
    command = ["train", str(scans), str(tmp_path / "models"), "--detector", "fae", "--modality", "T2w"]
    assert main([*command, "-w", str(tmp_path / "scratch")]) == 2
    assert "ImageNet weights of resnet18" in capsys.readouterr().err
    wrong = tmp_path / "wrong.safetensors"
    save_file({"conv1.weight": torch.zeros(3)}, wrong)
    assert main([*command, "-w", str(tmp_path / "scratch"), "--backbone-weights", str(wrong)]) == 66
    assert "not the weights of resnet18" in capsys.readouterr().err
    extra = ["--backbone-weights", str(wrong)]
    assert call(scans, tmp_path / "models", "train", "intensity", *extra) == 2
    assert "needs no --backbone-weights" in capsys.readouterr().err


def test_other_imagenet_weights_need_force_and_are_named_in_the_card(scans, tmp_path, capsys):
    """Weights with the right names and shapes, but not those of torchvision."""
    torch.manual_seed(0)
    network = resnet18(2)
    path = tmp_path / "resnet18-f37072fd.pth"
    torch.save(network.state_dict(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    command = ["train", str(scans), str(tmp_path / "models"), "--detector", "fae", "--modality", "T2w"]
    command += ["-w", str(tmp_path / "scratch"), "--steps", "1", "--batch-size", "2"]
    command += ["--backbone-weights", str(tmp_path)]
    assert main(command) == 66
    message = " ".join(capsys.readouterr().err.split())
    assert f"the SHA-256 begins with {digest[:8]} instead of f37072fd" in message
    assert "--force" in message

    other = path.rename(tmp_path / "resnet18-other.pth")
    assert main([*command, "--force"]) == 0
    bundle = load_bundle(tmp_path / "models" / "fae-T2w-default")
    assert bundle.info["training"]["stages"][0] == {
        "name": "features",
        "weights": f"{other.name} instead of resnet18-f37072fd.pth",
        "sha256": digest,
    }
    card = (bundle.folder / "MODEL_CARD.md").read_text()
    assert f"weights {other.name} instead of resnet18-f37072fd.pth, sha256 {digest}" in card
    detector = load_detector(bundle, "cpu")
    stored = detector.backbone.network.conv1.weight
    assert torch.equal(stored, network.conv1.weight.half().float())  # bundles hold float16


def test_weights_of_the_package_are_stored_in_the_bundle(scans, tmp_path):
    lite = ["--hyper", "backbone.name=efficientnet_lite0", "--steps", "1", "--batch-size", "2"]
    assert call(scans, tmp_path, "train", "fae", *lite) == 0
    bundle = load_bundle(tmp_path / "fae-T2w-lite")
    assert bundle.provenance["HyperParameters"] == {"backbone.name": "efficientnet_lite0"}
    assert bundle.info["training"]["stages"][0]["weights"] == LITE_WEIGHTS.name
    packaged = load_file(LITE_WEIGHTS)
    weights = load_detector(bundle).backbone.network.state_dict()
    assert len(weights) == 30
    assert all(torch.equal(value, packaged[name].float()) for name, value in weights.items())


def test_features_of_the_packaged_pls(scans, tmp_path, capsys):
    hyper = ["backbone.name=pls", "backbone.taps=[1,2]", "bank_size=64", "candidates=500", "bank_slices=20"]
    lite = ["--nprocs", "1", "--hyper", *hyper]
    assert call(scans, tmp_path, "train", "patchcore", *lite) == 0
    bundle = load_bundle(tmp_path / "patchcore-T2w-lite")
    packaged = load_bundle(PACKAGED / "pls-T2w-default")
    training = bundle.info["training"]
    assert training["backbone"] == {"bundle": packaged.name, "sha256": packaged.sha256}
    assert set(training["subjects"]) > set(packaged.info["training"]["subjects"])
    network = load_detector(packaged).network
    stored = load_detector(bundle).backbone.network.state_dict()
    same = [name for name in stored if name != "enter.weight"]
    assert all(torch.equal(stored[name], network.state_dict()[name]) for name in same)
    intensity = tmp_path / "intensity-T2w-lite"
    assert call(scans, tmp_path, "train", "intensity") == 0
    assert call(scans, tmp_path, "train", "patchcore", *lite, "--backbone-weights", str(intensity)) == 66
    assert "this is a bundle of intensity; use a bundle of pls in preset default" in capsys.readouterr().err


def test_imagenet_weights_are_recognised_by_their_checksum(tmp_path, monkeypatch):
    detector = build_detector("fae", "default")
    path = tmp_path / "weights.pth"
    torch.save(detector.backbone.network.state_dict(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(backbone.PUBLISHED_FILES, "resnet18", f"resnet18-{digest[:8]}.pth")
    stage = backbone.initialise_backbone(detector, "T2w", path)
    assert stage == {"name": "features", "weights": "weights.pth", "sha256": digest}
    monkeypatch.setitem(backbone.PUBLISHED_FILES, "resnet18", f"resnet18-{digest[1:9]}.pth")
    with pytest.raises(InputError, match=digest[:8]):
        backbone.initialise_backbone(detector, "T2w", path)


@pytest.mark.timeout(300)
def test_backbone_weights_are_loaded_from_another_bundle(scans, tmp_path, capsys):
    for scan in scans.glob("sub-*/anat/*_desc-brain_mask.nii.gz"):
        brain = nib.load(scan)
        target = scan.with_name(scan.name.replace("desc-brain_mask", "desc-tissue_dseg"))
        nib.save(space.to_image(np.asarray(brain.dataobj), np.uint8), target)
    few = ["--steps", "2", "--batch-size", "2", "--nprocs", "1"]
    bank = ["bank_size=64", "candidates=500", "bank_slices=20"]
    assert call(scans, tmp_path, "train", "patchcore", *few, "--hyper", *bank, *MRI) == 0
    first = tmp_path / "patchcore-T2w-lite"
    uniad = [*few, "--hyper", *MRI, "--backbone-weights"]
    assert call(scans, tmp_path, "train", "uniad", *uniad, str(first)) == 0
    second = load_bundle(tmp_path / "uniad-T2w-lite")
    assert second.info["training"]["backbone"]["sha256"] == load_bundle(first).sha256
    assert [stage["name"] for stage in second.info["training"]["stages"]] == ["transformer"]
    assert "--backbone-weights MODELS/patchcore-T2w-lite" in (second.folder / "MODEL_CARD.md").read_text()
    weights = [load_detector(load_bundle(folder)).backbone.state_dict() for folder in (first, second.folder)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    intensity = tmp_path / "intensity-T2w-lite"
    assert call(scans, tmp_path, "train", "intensity") == 0
    assert call(scans, tmp_path, "train", "uniad", *uniad, str(intensity)) == 66
    assert "another backbone" in capsys.readouterr().err


def test_calibrate_fits_a_normative_reference_with_enough_controls(scans, models, tmp_path, monkeypatch):
    own = tmp_path / "models"
    shutil.copytree(models / "intensity-T2w-lite", own / "intensity-T2w-lite")
    folder = own / "intensity-T2w-lite"
    assert call(scans, own, "calibrate") == 0
    assert not (folder / "normative.nii.gz").exists()
    with pytest.raises(ModelError, match="no normative reference"):
        resolve_bundles([str(folder)], ["T2w"], ["none", "normative"])

    monkeypatch.setattr(calibrate, "MIN_SUBJECTS", 2)
    assert call(scans, own, "calibrate") == 0
    raw, deviating = resolve_bundles([str(folder)], ["T2w"], ["none", "normative"])
    assert (raw.scored_as, deviating.scored_as) == ("intensity", "intensity+normative")
    assert raw.thresholds != deviating.thresholds
    assert deviating.default_threshold[1] in deviating.bin_edges
    normative = deviating.normative
    assert normative["n_healthy_subjects"] == 2
    assert normative["reference"]["covariates"]["age_range"] == [30, 61]
    assert normative["validation"]["n_healthy"] == 2
    assert normative["validation"]["n_lesion"] == 1
    assert not list((own / "scratch").iterdir())  # maps that waited are gone


def test_calibrate_chooses_a_decision_rule_and_the_kind_of_maps(scans, models, tmp_path, monkeypatch):
    own = tmp_path / "models"
    shutil.copytree(models / "intensity-T2w-lite", own / "intensity-T2w-lite")
    folder = own / "intensity-T2w-lite"
    plain = load_bundle(folder)
    assert plain.rule.is_plain
    assert plain.rule.threshold == plain.default_threshold[1]
    extra = ("--decision-rule", "hysteresis")
    assert call(scans, own, "calibrate", "intensity", *extra) == 0
    scored = load_bundle(folder)  # too few controls for deviations
    assert scored.default_deviation == "none"
    monkeypatch.setattr(calibrate, "MIN_SUBJECTS", 2)
    assert call(scans, own, "calibrate", "intensity", *extra) == 0
    calibration = json.loads((folder / "calibration.json").read_text())
    raw, deviating = resolve_bundles([str(folder)], ["T2w"], ["none", "normative"])
    assert raw.rule == scored.rule
    for bundle, part in ((raw, calibration), (deviating, calibration["normative"])):
        assert bundle.default_threshold[0] == "max_dice_f1"
        assert bundle.rule.entries() == part["rule"]
        assert {bundle.rule.low, bundle.rule.threshold} <= set(bundle.bin_edges)
        figures = part["validation"]["rule"]
        assert figures["within_limits"]
        assert part["validation"]["mean_dice"]["max_dice_f1"] == figures["dice"]
    # The plain threshold separates the lesion from fluid already.
    assert calibration["validation"]["rule"]["dice"] >= calibration["validation"]["mean_dice"]["max_dice"]
    parts = (calibration, calibration["normative"])
    scored, deviated = (part["validation"]["rule"]["criterion"] for part in parts)
    chosen = "normative" if deviated >= scored else "none"  # a single lesion scan has no standard error
    assert calibration["default_deviation"] == raw.default_deviation == chosen
    assert [bundle.deviation for bundle in resolve_bundles([str(folder)], ["T2w"], [])] == [chosen]
    card = " ".join((folder / "MODEL_CARD.md").read_text().split())
    assert f"Decision rule for scores: components of voxels above {raw.rule.low:.4g} " in card
    assert f"Decision rule for deviations: components of voxels above {deviating.rule.low:.4g} " in card
    dice = calibration["validation"]["rule"]["dice"]
    assert f"| 1 to 5 mL | 1 | {dice:.3f} | {dice:.3f} |" in card  # the lesion has 1.4 mL
    assert "| below 40 years | 1 |" in card
    assert "| 60 to 75 years | 1 |" in card
    (kind,) = calibration["validation"]["by_kind"]
    assert f"| lesions | scans | mean Dice | |---|---|---| | {kind} | 1 | {dice:.3f} |" in card
    assert not list((own / "scratch").iterdir())
    # A plain threshold again.
    assert call(scans, own, "calibrate") == 0
    again = json.loads((folder / "calibration.json").read_text())
    assert "rule" not in again
    assert "default_deviation" not in again
    assert load_bundle(folder).rule.is_plain


def test_calibrate_reads_participants_by_the_common_rules(scans, models, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "MIN_SUBJECTS", 2)
    unusual = tmp_path / "unusual"
    shutil.copytree(scans, unusual, copy_function=os.symlink)
    for name in ("participants.tsv", "dataset_description.json"):
        (unusual / name).unlink()
    (unusual / "participants.tsv").write_bytes(
        "participant_id\tDiagnosis\tAGE\tGender\tplace\r\n1\tHealthy_Control\t30\t2\tKöln\r\n"
        "2\tTDC\t60-62\tmale\t-\r\n3\tMS\t50\tM\t-\r\n4\t-\t44\tF\t-\r\n".encode("latin-1")
    )
    calibrations = []
    for name, folder in (("for_plain", scans), ("for_odd", unusual)):
        own = tmp_path / name / "intensity-T2w-lite"
        shutil.copytree(models / "intensity-T2w-lite", own)
        assert call(folder, own.parent, "calibrate") == 0
        calibrations.append(json.loads((own / "calibration.json").read_text()))
        del calibrations[-1]["cohort"]
    assert calibrations[0] == calibrations[1]
    assert calibrations[1]["normative"]["reference"]["covariates"]["age_range"] == [30, 61]


def test_normative_dir_is_used_for_the_reference_only(scans, models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(calibrate, "MIN_SUBJECTS", 2)
    folders, calibrations = [], []
    others = tmp_path / "others"
    for label in ("7", "8"):
        write_scan(others, label)
    ages = pd.DataFrame({"participant_id": ["sub-7", "sub-8"], "age": [20, 80], "group": ["control"] * 2})
    write_tsv(others / "participants.tsv", ages)
    write_json(others / "dataset_description.json", {"Name": "Others", "BIDSVersion": "1.10.0"})
    for name, more in (("few", []), ("more", ["--normative-dir", str(others)])):
        folders.append(tmp_path / name / "intensity-T2w-lite")
        shutil.copytree(models / "intensity-T2w-lite", folders[-1])
        assert call(scans, tmp_path / name, "calibrate", "intensity", *more) == 0
        calibrations.append(json.loads((folders[-1] / "calibration.json").read_text()))
    log = " ".join(capsys.readouterr().err.split())
    assert "Scoring with intensity-T2w-lite: 1 of 3; about 1 min left" in log
    assert "Scoring for the reference: 2 of 2" in log
    few, more = (calibration.pop("normative") for calibration in calibrations)
    assert calibrations[0] == calibrations[1]  # scores are judged as before
    assert (few["n_healthy_subjects"], more["n_healthy_subjects"]) == (2, 4)
    assert more["reference"]["covariates"]["age_range"] == [20, 80]
    assert few["sha256"] != more["sha256"]
    assert few["validation"]["n_healthy"] == more["validation"]["n_healthy"] == 2
    card = " ".join((folders[1] / "MODEL_CARD.md").read_text().split())
    assert "of 4 controls (age 20 to 80 years)" in card
    assert "2 of them are used for the reference only (Others)." in card
    raw, deviating = resolve_bundles([str(folders[1])], ["T2w"], ["none", "normative"])
    stranger = {subject_hash("Others", "sub-7")}
    assert (raw.cohorts_containing(stranger), deviating.cohorts_containing(stranger)) == (
        [],
        ["normative reference"],
    )

    twice = ["--normative-dir", str(scans)]
    assert call(scans, tmp_path / "more", "calibrate", "intensity", *twice) == 66
    assert "sub-1, sub-2 also in the validation set" in capsys.readouterr().err
    assert json.loads((folders[1] / "calibration.json").read_text())["normative"] == more


def score_nan(self, slices, brain, generator):
    """Stand in for `Intensity.score`; the first slice of each batch has a NaN where brain is."""
    scores = slices.clone()
    scores[0, 0][brain[0, 0].nonzero().unbind(1)] = torch.nan
    return scores


def test_nan_scores_stop_calibrate_and_leave_the_calibration_as_it_was(models, scans, monkeypatch, capsys):
    calibration = models / "intensity-T2w-lite" / "calibration.json"
    before = calibration.read_bytes()
    monkeypatch.setattr(Intensity, "score", score_nan)
    assert call(scans, models, "calibrate") == 69
    message = capsys.readouterr().err
    assert "bids_uad: intensity gave NaN or infinite scores for sub-1_T2w in axial slice" in message
    assert "Traceback" not in message
    assert calibration.read_bytes() == before


def test_nan_scores_stop_detection_with_the_same_line(models, scans, tmp_path, monkeypatch):
    monkeypatch.setattr(Intensity, "score", score_nan)
    stem = scans / "sub-1" / "anat" / "sub-1_space-SRI24"
    target = tmp_path / "map.nii"
    bundle = load_bundle(models / "intensity-T2w-lite")
    request = {
        "image": f"{stem}_desc-preproc_T2w.nii.gz",
        "brain": f"{stem}_desc-brain_mask.nii.gz",
        "key": "sub-1_T2w",
        "seed": 0,
        "bundle": str(bundle.folder),
        "sha256": bundle.sha256,
        "device": "cpu",
        "precision": "fp32",
        "batch_size": None,
        "compiled": False,
        "threads": 1,
        "output": str(target),
    }
    with pytest.raises(ModelError, match=r"^intensity gave NaN .* for sub-1_T2w in axial slice"):
        Scorer()(request)
    assert not target.exists()


def test_constant_scores_give_thresholds_but_no_normative_reference(
    models, scans, tmp_path, monkeypatch, capfd
):
    """A detector that is silent in healthy brains and marks lesions can be used, only not as a deviation."""

    def silent(self, slices, brain, generator):
        return torch.where(brain & (slices > 0.9), slices, 0.0)

    own = shutil.copytree(models, tmp_path / "models")
    monkeypatch.setattr(calibrate, "MIN_SUBJECTS", 2)
    monkeypatch.setattr(Intensity, "score", silent)
    assert call(scans, own, "calibrate") == 0
    assert "scores of the healthy scans are all equal" in " ".join(capfd.readouterr().err.split())
    bundle = load_bundle(own / "intensity-T2w-lite")
    assert "normative" not in bundle.calibration
    assert not (bundle.folder / "normative.nii.gz").exists()


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [("desc-preproc_T2w", np.nan, "NaN or infinite intensities"), ("desc-brain_mask", 0, "mask is empty")],
)
def test_calibrate_names_scans_that_cannot_be_scored(models, scans, tmp_path, capsys, name, value, problem):
    own = shutil.copytree(scans, tmp_path / "scans")
    path = own / "sub-2" / "anat" / f"sub-2_space-SRI24_{name}.nii.gz"
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.full(image.shape, value, image.get_data_dtype()), image.affine), path)
    assert call(own, models, "calibrate") == 66
    message = capsys.readouterr().err
    assert path.name in message
    assert problem in message
