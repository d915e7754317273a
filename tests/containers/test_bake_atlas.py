"""The atlas gets into the image only if it is the one that was meant."""

from __future__ import annotations

import hashlib
import os
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bids_uad.preprocessing.reference import resolve_reference
from tests.preprocessing.test_atlas import as_packaged

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "containers" / "bake_atlas.py"


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A package as it is downloaded."""
    folder = tmp_path_factory.mktemp("package")
    t1w = resolve_reference(None, folder / "cache").t1w
    as_packaged(np.asarray(nib.load(t1w).dataobj).astype(np.int16), folder / "spgr.nii")
    with zipfile.ZipFile(folder / "sri24.zip", "w") as archive:
        archive.write(folder / "spgr.nii", "sri24/spgr.nii")
    return folder / "sri24.zip"


@pytest.fixture
def bake(monkeypatch):
    """`main` of the script, with nothing in the environment that it reads."""
    for name in ("SRI24_SHA256", "SRI24_URL"):
        monkeypatch.delenv(name, raising=False)
    return runpy.run_path(str(SCRIPT))["main"]


def test_right_package_is_baked_from_a_folder_or_an_address(package, bake, tmp_path, monkeypatch):
    monkeypatch.setenv("SRI24_SHA256", hashlib.sha256(package.read_bytes()).hexdigest())
    command = [sys.executable, SCRIPT, package.parent, tmp_path / "one"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert not resolve_reference(tmp_path / "one", tmp_path).metadata["StandIn"]
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("SRI24_URL", package.as_uri())
    bake(tmp_path / "empty", tmp_path / "other")
    assert (tmp_path / "other" / "tpl-SRI24" / "LICENSE").is_file()


@pytest.mark.parametrize("checksum", ["0" * 64, None])
def test_another_package_stops_the_build(package, bake, tmp_path, monkeypatch, checksum):
    if checksum:
        monkeypatch.setenv("SRI24_SHA256", checksum)
    with pytest.raises(SystemExit, match="SRI24_SHA256 is"):
        bake(package.parent, tmp_path / "archive")


def test_without_a_package_the_archive_is_not_empty_and_holds_no_atlas(bake, tmp_path, monkeypatch):
    (tmp_path / "none").mkdir()
    bake(tmp_path / "none", tmp_path / "archive")
    assert [path.name for path in (tmp_path / "archive").iterdir()] == ["README.md"]
    monkeypatch.setenv("TEMPLATEFLOW_HOME", str(tmp_path / "archive"))
    assert resolve_reference(None, tmp_path / "cache").metadata["StandIn"]
