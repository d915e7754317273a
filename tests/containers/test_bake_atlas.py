"""The atlas gets into the image only if it is the one that was meant."""

from __future__ import annotations

import hashlib
import os
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


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A package as it is downloaded."""
    folder = tmp_path_factory.mktemp("package")
    t1w = resolve_reference(None, folder / "cache").t1w
    as_packaged(np.asarray(nib.load(t1w).dataobj).astype(np.int16), folder / "spgr.nii")
    with zipfile.ZipFile(folder / "sri24.zip", "w") as archive:
        archive.write(folder / "spgr.nii", "sri24/spgr.nii")
    return folder / "sri24.zip"


def bake(folder: Path, archive: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "containers" / "bake_atlas.py", folder, archive]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_right_package_is_baked_from_a_folder_or_an_address(package, tmp_path):
    checksum = hashlib.sha256(package.read_bytes()).hexdigest()
    done = bake(package.parent, tmp_path / "one", SRI24_SHA256=checksum)
    assert done.returncode == 0, done.stderr
    assert not resolve_reference(tmp_path / "one", tmp_path).metadata["StandIn"]
    (tmp_path / "empty").mkdir()
    done = bake(tmp_path / "empty", tmp_path / "other", SRI24_SHA256=checksum, SRI24_URL=package.as_uri())
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "other" / "tpl-SRI24" / "LICENSE").is_file()


def test_another_package_stops_the_build(package, tmp_path):
    for environment in ({"SRI24_SHA256": "0" * 64}, {}):
        done = bake(package.parent, tmp_path / f"archive{len(environment)}", **environment)
        assert done.returncode == 1
        assert "SRI24_SHA256 says" in done.stderr


def test_without_a_package_the_archive_is_not_empty_and_holds_no_atlas(tmp_path, monkeypatch):
    (tmp_path / "none").mkdir()
    assert bake(tmp_path / "none", tmp_path / "archive").returncode == 0
    assert [path.name for path in (tmp_path / "archive").iterdir()] == ["README.md"]
    monkeypatch.setenv("TEMPLATEFLOW_HOME", str(tmp_path / "archive"))
    assert resolve_reference(None, tmp_path / "cache").metadata["StandIn"]
