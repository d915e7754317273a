"""FLAIR scans from raw BIDS to the group level, with a T1w scan and without one."""

from __future__ import annotations

import json
import shutil

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from bids_uad.engine.bundle import PACKAGED
from bids_uad.preprocessing.resampling import read_itk
from bids_uad.space import AFFINE
from tests.integration.conftest import bids_uad, simulate

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Both levels on a healthy subject with T1w and FLAIR, and one with a tumour and FLAIR only."""
    base = tmp_path_factory.mktemp("flair")
    data = simulate(base / "data", "--healthy", "1", "--tumour", "1", "--modalities", "FLAIR")
    t1w = simulate(base / "t1w", "--healthy", "1", "--modalities", "T1w")
    for path in (t1w / "sub-001" / "anat").iterdir():
        shutil.copy(path, data / "sub-001" / "anat")
    bundle = PACKAGED / "intensity-FLAIR-lite"
    done = bids_uad(
        data, base / "out", "participant", "group", "-w", base / "work", "--models", bundle,
        "-d", f"lesions={data / 'derivatives' / 'lesions'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return data, base / "out", done.stdout + done.stderr


def test_t1w_without_a_model_is_not_scored(run):
    _, out, text = run
    assert "T1w images are not scored" in text
    assert len(list(out.rglob("*desc-FLAIRIntensity_anomalymap.nii.gz"))) == 2
    assert not list(out.rglob("*desc-T1w*_anomalymap.nii.gz"))


@pytest.mark.parametrize(("name", "desc"), [("sub-001", "FLAIRBrain"), ("sub-002", "brain")])
def test_flair_is_registered_to_the_true_position(run, name, desc):
    data, out, _ = run
    record = data / f"derivatives/simulation/{name}/anat/{name}_desc-simulation_parameters.json"
    truth = np.array(json.loads(record.read_text())["FLAIR"]["native_to_sri24"])
    pull = read_itk(out / name / "anat" / f"{name}_from-FLAIR_to-SRI24_mode-image_xfm.txt")
    brain = nib.load(out / name / "anat" / f"{name}_space-SRI24_desc-{desc}_mask.nii.gz")
    points = np.argwhere(np.asarray(brain.dataobj) > 0)[::997] @ AFFINE[:3, :3].T + AFFINE[:3, 3]
    points = np.c_[points, np.ones(len(points))]
    # The anatomy of a simulated subject is aligned with the atlas to some millimetres.
    assert np.linalg.norm((points @ (truth @ pull).T - points)[:, :3], axis=1).mean() < 6


def test_lesions_are_evaluated_and_bright(run):
    _, out, _ = run
    table = pd.read_csv(out / "group_subjects.tsv", sep="\t", na_values="n/a").set_index("participant_id")
    assert table["modality"].tolist() == ["FLAIR"] * 2
    assert table["role"].tolist() == ["healthy", "lesion"]
    brain, lesion = table.loc["sub-002", ["brain_volume_mm3", "lesion_volume_mm3"]]
    assert table.loc["sub-002", "auprc"] > 5 * lesion / brain
