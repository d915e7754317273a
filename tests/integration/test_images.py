"""The images of containers/build.sh, on the dataset and the detectors of `make demo`: `pytest -m container`.

Nothing of them is written to, there is no network, and nobody knows the user.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from bids_uad import __version__
from bids_uad.files import read_json
from tests.integration.conftest import simulate
from tests.integration.test_whole_run import validate

pytestmark = [pytest.mark.container, pytest.mark.slow, pytest.mark.timeout(7200)]

ROOT = Path(__file__).parents[2]
IMAGE = f"bids_uad:{__version__}"
SIF = ROOT / "dist" / f"bids_uad-{__version__}.sif"
USER = 1234
DETECTORS = ("pls", "uniad", "intensity")
# Some hosts do not let a container's limits be raised as podman does by itself.
PODMAN = ["podman", "--runtime", "runc", "run", "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096"]


def engine() -> list[str]:
    """Docker or podman, whichever has the image."""
    for command in (["docker", "run"], PODMAN):
        try:
            found = subprocess.run([command[0], "image", "inspect", IMAGE], capture_output=True)
        except FileNotFoundError:
            continue
        if found.returncode == 0:
            return command
    pytest.skip(f"no {IMAGE}; run containers/build.sh")


def docker(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    mounts = [
        "-v",
        f"{folder / 'data'}:/data:ro",
        "-v",
        f"{folder / 'out'}:/out",
        "-v",
        f"{folder / 'work'}:/work",
    ]
    limits = ["--rm", "--network=none", "--read-only", "--tmpfs", "/tmp", "--user", f"{USER}:{USER}"]  # noqa: S108
    return call([*engine(), *limits, *mounts, IMAGE, *arguments])


def apptainer(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    program = shutil.which("apptainer")
    if program is None and "APPTAINER_ROOT" in os.environ:
        program = str(ROOT / "containers" / "apptainer.sh")
    if program is None or not SIF.is_file():
        pytest.skip(f"no apptainer or no {SIF.name}; run containers/build.sh")
    binds = [
        "-B",
        f"{folder / 'data'}:/data:ro",
        "-B",
        f"{folder / 'out'}:/out",
        "-B",
        f"{folder / 'work'}:/work",
    ]
    return call([program, "run", "--containall", "--net", "--network=none", *binds, str(SIF), *arguments])


def call(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, timeout=7000)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """The dataset of `make demo`."""
    cohort = ("--healthy", "3", "--stroke", "1", "--ms", "1", "--tumour", "1", "--nprocs", "2")
    return simulate(tmp_path_factory.mktemp("simulated") / "data", *cohort)


@pytest.fixture
def folder(demo, tmp_path, tmp_path_factory):
    """The dataset, and folders that the user of the container may write to."""
    shutil.copytree(demo, tmp_path / "data")
    for name in ("out", "work"):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0o777)
    # pytest keeps its folders to itself.
    base = tmp_path_factory.getbasetemp()
    for each in (
        (base.parent, base, tmp_path) if base.parent.name.startswith("pytest-of-") else (base, tmp_path)
    ):
        each.chmod(0o711)
    return tmp_path


@pytest.mark.parametrize("run", [docker, apptainer])
def test_participant_and_group_level(run, folder):
    said = run(folder, "--version")
    assert said.stdout.strip().endswith(f"bids_uad {__version__}"), said.stderr
    lesions = "lesions=/data/derivatives/lesions"
    options = ["-w", "/work", "-d", lesions, "--models", *DETECTORS, "--nprocs", "2"]
    done = run(folder, "/data", "/out", "participant", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    done = run(folder, "/data", "/out", "group")
    assert done.returncode == 0, done.stdout + done.stderr

    out = folder / "out"
    assert len(list(out.rglob("*_anomalymap.nii.gz"))) == 6 * 2 * len(DETECTORS)
    assert len(pd.read_csv(out / "group_subjects.tsv", sep="\t")) == 6 * 2 * len(DETECTORS)
    pages = {"group.html", *(f"sub-{number:03d}.html" for number in range(1, 7))}
    assert {path.name for path in out.glob("*.html")} == pages
    made_by = read_json(out / "dataset_description.json")["GeneratedBy"][0]["Container"]
    assert made_by == {"Type": run.__name__, "Tag": IMAGE}
    assert validate(out) == [], json.dumps(validate(out))[:2000]
