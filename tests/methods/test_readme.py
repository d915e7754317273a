"""The recipe for a new detector in the README of the package `methods`, executed literally."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import bids_uad.methods
from bids_uad import space
from bids_uad.engine.bundle import load_bundle, load_detector, save_bundle
from bids_uad.methods.base import Batch
from bids_uad.methods.registry import DETECTORS, Entry, build_detector
from bids_uad.networks.counter_rng import SliceGenerator
from bids_uad.reports.boilerplate import UsedModel, methods_text
from tests.levels.study import Study

README = Path(bids_uad.methods.__file__).parent / "README.md"
ROOT = Path(__file__).parents[2]
HEAD = ROOT / "tests" / "data" / "whole_head"
MODULE, LINE, FRAGMENT, SECTION, COMMANDS = (
    match[2] for match in re.finditer(r"^(`{3,})\w+\n(.*?)^\1$", README.read_text("utf-8"), re.M | re.S)
)


@pytest.fixture
def brightness(tmp_path, monkeypatch):
    """The detector of the README, registered from a module of its own."""
    (tmp_path / "brightness_of_readme.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    entry = eval(LINE.partition(":")[2].strip().rstrip(","), {"Entry": Entry})  # noqa: S307
    monkeypatch.setitem(DETECTORS, "brightness", entry._replace(module="brightness_of_readme"))
    return build_detector("brightness", "lite")


def test_detector_of_the_readme_computes_z_scores(brightness):
    slices = torch.rand(4, 1, 224, 224, generator=torch.Generator().manual_seed(0)) ** 3
    batch = Batch(slices, slices > 0.01)
    (stage,) = brightness.stages()
    stage.fit(iter([batch]), torch.Generator())
    scores = brightness.score(slices, batch.brain, SliceGenerator(torch.arange(4))).numpy()
    values, brain = slices.double().numpy(), batch.brain.numpy()
    expected = np.abs(values - values[brain].mean()) / values[brain].std(ddof=1)
    np.testing.assert_allclose(scores, np.where(brain, expected, 0), rtol=1e-4, atol=1e-5)


def test_one_line_registers_the_detector_of_the_readme(brightness, tmp_path):
    bundle = save_bundle(
        tmp_path / "brightness-T2w-lite", brightness, preset="lite", modality="T2w", training={}, card=""
    )
    assert load_detector(bundle).hyper == brightness.hyper
    text = methods_text([UsedModel("brightness", "T2w", "lite", 0.5, "fpr_1pct")])
    assert "Brightness on T2w" in text


def copy_of_the_package(folder: Path) -> Path:
    """Copy what the recipe changes, and link what it only reads."""
    for name in ("bids_uad", "boilerplate", "docs", "tests"):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("data", "build", "__pycache__")
        )
    for name in ("bids_uad/data", "tests/data", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("pyproject.toml", "README.md", "CHANGES"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def raw_dataset(folder: Path) -> Path:
    """Write a BIDS dataset with the T2w image of the simulated head."""
    anat = folder / "sub-01" / "anat"
    anat.mkdir(parents=True)
    shutil.copy(HEAD / "T2w.nii.gz", anat / "sub-01_T2w.nii.gz")
    (folder / "dataset_description.json").write_text(json.dumps({"Name": "Head", "BIDSVersion": "1.10.0"}))
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_recipe_of_the_readme_works_from_lint_to_documentation(tmp_path):
    package = copy_of_the_package(tmp_path / "package")
    (package / "bids_uad" / "methods" / "brightness.py").write_text(MODULE)
    registry = package / "bids_uad" / "methods" / "registry.py"
    start = "DETECTORS: dict[str, Entry] = {\n"
    registry.write_text(registry.read_text().replace(start, start + LINE))
    (package / "boilerplate" / "methods" / "brightness.md").write_text(FRAGMENT)
    with (package / "docs" / "detectors.md").open("a") as page:
        page.write("\n" + SECTION)

    scans = Study(tmp_path / "study").write().scans
    places = {"DERIVATIVES": scans, "VALIDATION": scans, "MODELS": tmp_path / "models"}
    places |= {"DATA": raw_dataset(tmp_path / "raw"), "OUT": tmp_path / "out"}
    environment = os.environ | {"PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for line in COMMANDS.splitlines():
        names = "|".join(places)
        command = [
            re.sub(rf"^({names})\b", lambda name: str(places[name[0]]), word) for word in shlex.split(line)
        ]
        if command[0] == "bids_uad":  # the installed program would not import the copy
            command[:1] = [sys.executable, "-m", "bids_uad"]
        done = subprocess.run(
            command, cwd=package, env=environment, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"

    assert load_bundle(tmp_path / "models" / "brightness-T2w-lite").calibration is not None
    (scores,) = (tmp_path / "out").rglob("*_desc-T2wBrightness_anomalymap.nii.gz")
    assert np.asarray(nib.load(scores).dataobj).shape == space.SHAPE
    assert (
        "*Brightness* scores the absolute Z score" in (tmp_path / "out" / "logs" / "CITATION.md").read_text()
    )
    page = (package / "docs" / "build" / "detectors.html").read_text(encoding="utf-8")
    assert re.search(r"<h2>Brightness<.*<code[^>]*>(<span[^>]*>)?slices<", page, re.S)
