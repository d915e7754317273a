"""A small study for tests that run the whole command line: inputs, models and the command of each level."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np

from bids_uad import space
from tests.dataset.skeleton import write_dataset, write_mask
from tests.levels.fakes import fake_bundle, fake_reference

LEVELS = ("participant", "group", "train", "calibrate", "reports")
PEOPLE = "participant_id\tage\tsex\tgroup\nsub-01\t40\tF\tcontrol\nsub-02\t50\tM\tpatient\n"


class Study:
    """Inputs below a folder, and the commands on them.

    Parameters
    ----------
    folder : pathlib.Path
        Holds `raw`, `lesions`, `scans` (preprocessed, to train on), the stand-in models and the reference.
    out, work, trained : pathlib.Path, optional
        Outputs of the participant and group level, working folder, and models made by `train`; folders of
        these names below `folder` by default.
    """

    def __init__(
        self, folder: Path, out: Path | None = None, work: Path | None = None, trained: Path | None = None
    ) -> None:
        self.folder = folder
        self.raw, self.lesions, self.scans = folder / "raw", folder / "lesions", folder / "scans"
        self.out, self.work = out or folder / "out", work or folder / "work"
        self.trained = trained or folder / "trained"
        self.detector = "intensity"
        self.models = [folder / f"disyre-{modality}" for modality in ("T1w", "T2w")]

    def write(self) -> Study:
        """Write the inputs: two participants, one of them with two images and a lesion mask."""
        images = ["sub-01/anat/sub-01_T1w.nii.gz", "sub-01/anat/sub-01_T2w.nii.gz"]
        write_dataset(self.raw, {name: {} for name in [*images, "sub-02/anat/sub-02_T1w.nii.gz"]})
        (self.raw / "participants.tsv").write_text(PEOPLE)
        write_mask(self.lesions / "sub-01" / "anat" / "sub-01_label-lesion_mask.nii.gz")
        description = {"Name": "Masks", "BIDSVersion": "1.9.0", "DatasetType": "derivative"}
        (self.lesions / "dataset_description.json").write_text(json.dumps(description))
        for model in self.models:
            fake_bundle(model, "disyre", model.name.split("-")[1])
        fake_reference(self.folder)
        for number, label in enumerate(("01", "02"), start=1):
            write_scan(self.scans, label, level=0.1 * number)
        (self.scans / "participants.tsv").write_text(PEOPLE)
        (self.scans / "dataset_description.json").write_text(
            json.dumps({"Name": "Scans", "BIDSVersion": "1.9.0"})
        )
        return self

    def arguments(self, level: str) -> list[str]:
        """Arguments of the command line for one level; `reports` writes those of participants again."""
        own = ["-w", str(self.work), "--nprocs", "1", "--device", "cpu"]
        if level in ("train", "calibrate"):
            chosen = ["--detector", self.detector, "--modality", "T2w", "--preset", "lite"]
            quick = ["--steps", "60", "--batch-size", "2"] if level == "train" else []
            return [level, str(self.scans), str(self.trained), *chosen, *quick, *own]
        if level == "group":
            return [str(self.raw), str(self.out), level, *own]
        own += ["-d", f"lesions={self.lesions}"] + (["--reports-only"] if level == "reports" else [])
        return [str(self.raw), str(self.out), "participant", *own, "--models", *map(str, self.models)]

    def start(self, level: str, *extra: str, real_reports: bool = True, **options) -> subprocess.Popen:
        """Start one level in a process group of its own."""
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "COLUMNS": "10000"}
        environment |= {"REFERENCE": str(self.folder), "REPORTS": "real" if real_reports else "stand-in"}
        return subprocess.Popen(
            [sys.executable, "-m", "tests.levels.with_fakes", *self.arguments(level), *extra],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
            **options,
        )

    def run(self, level: str, *extra: str, **options) -> tuple[int, str]:
        """Run one level to its end; return exit code and printed text."""
        with self.start(level, *extra, **options) as process:
            said, _ = process.communicate(timeout=600)
        return process.returncode, said


def write_scan(folder: Path, label: str, *, level: float) -> None:
    """Write a preprocessed T2w of ten slices, and a lesion for the second participant."""
    brain = np.zeros(space.SHAPE, np.uint8)
    brain[100:140, 100:140, 70:80] = 1
    volume = brain * np.random.default_rng(int(label)).uniform(level, 0.8, space.SHAPE)
    anat = folder / f"sub-{label}" / "anat"
    anat.mkdir(parents=True, exist_ok=True)
    stem = f"sub-{label}_space-SRI24"
    nib.save(space.to_image(volume), anat / f"{stem}_desc-preproc_T2w.nii.gz")
    nib.save(space.to_image(brain, np.uint8), anat / f"{stem}_desc-brain_mask.nii.gz")
    if label == "02":
        lesion = np.zeros_like(brain)
        lesion[110:120, 110:120, 72:76] = 1
        nib.save(space.to_image(lesion, np.uint8), anat / f"{stem}_label-lesion_desc-manual_mask.nii.gz")
