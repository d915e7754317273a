"""Bad input, and runs that are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bids_uad.files import write_text
from tests.integration.conftest import bids_uad, simulate

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1800)]

OPTIONS = ["--modalities", "T1w", "--models", "intensity", "--nprocs", "2"]


def add(dataset: Path, label: str) -> Path:
    """Make room for a subject's T1w."""
    path = dataset / f"sub-{label}" / "anat" / f"sub-{label}_T1w.nii.gz"
    path.parent.mkdir(parents=True)
    return path


@pytest.fixture(scope="module")
def simulated(tmp_path_factory) -> Path:
    """One healthy subject's T1w, raw BIDS."""
    folder = tmp_path_factory.mktemp("simulated") / "data"
    return simulate(folder, "--healthy", "1", "--modalities", "T1w")


@pytest.fixture(scope="module")
def good(simulated, tmp_path_factory) -> Path:
    """A T1w that nothing is wrong with, with voxels of 2 mm, since little depends on them here."""
    scan = nib.load(simulated / "sub-001" / "anat" / "sub-001_T1w.nii.gz")
    path = tmp_path_factory.mktemp("good") / "sub-001_T1w.nii.gz"
    nib.save(scan.slicer[::2, ::2, ::2], path)
    return path


@pytest.fixture
def dataset(tmp_path, simulated, good) -> Path:
    """A dataset with one good subject."""
    folder = tmp_path / "data"
    write_text(folder / "dataset_description.json", (simulated / "dataset_description.json").read_text())
    add(folder, "good").write_bytes(good.read_bytes())
    return folder


def test_bad_images_are_named_and_others_finish(dataset, good, tmp_path):
    scan = nib.load(good)
    values = np.asarray(scan.dataobj)
    add(dataset, "truncated").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    nib.save(nib.Nifti1Image(np.zeros_like(values), scan.affine), add(dataset, "zero"))
    broken = values.astype(np.float32)
    broken[tuple(size // 2 for size in values.shape)] = np.nan
    nib.save(nib.Nifti1Image(broken, scan.affine), add(dataset, "nan"))
    nib.save(nib.Nifti1Image(np.stack([values, values], axis=-1), scan.affine), add(dataset, "fourd"))
    (dataset / "sub-missing" / "anat").mkdir(parents=True)

    done = bids_uad(dataset, tmp_path / "out", "participant", "-w", tmp_path / "work", *OPTIONS)

    text = done.stdout + done.stderr
    assert done.returncode == 1, text
    assert "Traceback" not in text
    for label in ("truncated", "zero", "nan", "fourd"):
        assert f"sub-{label}_T1w.nii.gz" in text.replace("\n", "")
    assert "missing" in text
    assert next((tmp_path / "out" / "sub-good").rglob("*_desc-T1wIntensity_anomalymap.nii.gz"))
    assert (tmp_path / "out" / "sub-good.html").is_file()


def maps(out: Path) -> dict[str, np.ndarray]:
    """Maps and masks of a run by file name."""
    return {
        path.name: np.asarray(nib.load(path).dataobj)
        for pattern in ("*_anomalymap.nii.gz", "*_mask.nii.gz", "*_preproc_T1w.nii.gz")
        for path in out.rglob(pattern)
    }


def test_a_killed_run_goes_on_to_the_same_maps(dataset, tmp_path):
    undisturbed = bids_uad(dataset, tmp_path / "calm", "participant", "-w", tmp_path / "work1", *OPTIONS)
    assert undisturbed.returncode == 0, undisturbed.stderr

    arguments = [dataset, tmp_path / "killed", "participant", "-w", tmp_path / "work2", *OPTIONS]
    process = subprocess.Popen(
        [sys.executable, "-m", "bids_uad", *map(str, arguments)],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 600
    while not list((tmp_path / "killed").rglob("*_desc-preproc_T1w.nii.gz")):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "sub-good.html").exists()

    resumed = bids_uad(*arguments)
    assert resumed.returncode == 0, resumed.stderr
    calm, killed = maps(tmp_path / "calm"), maps(tmp_path / "killed")
    assert calm.keys() == killed.keys()
    for name, values in calm.items():
        np.testing.assert_array_equal(values, killed[name], err_msg=name)
    leftover = [p for p in (tmp_path / "killed").rglob(".*") if p.name != ".bidsignore"]
    assert leftover == []
