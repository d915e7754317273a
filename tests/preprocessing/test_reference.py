from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bids_uad import space
from bids_uad.errors import InputError
from bids_uad.preprocessing.reference import (
    STAND_IN,
    Reference,
    resolve_reference,
    write_template,
)
from tests.header_contract import faults_below

from .conftest import REAL_DATA


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a network access")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delenv("TEMPLATEFLOW_HOME", raising=False)


@pytest.fixture
def atlas(tmp_path: Path, reference: Reference) -> Path:
    """A TemplateFlow archive whose SRI24 is the stand-in with another name."""
    folder = tmp_path / "archive" / "tpl-SRI24"
    folder.mkdir(parents=True)
    for suffix, source in (("T1w", reference.t1w), ("T2w", reference.t1w), ("mask", reference.brain_mask)):
        shutil.copy(source, folder / f"tpl-SRI24_res-1_desc-brain_{suffix}.nii.gz")
    shutil.copy(reference.t1w, folder / "tpl-SRI24_res-1_desc-other_T1w.nii.gz")
    (folder / "template_description.json").write_text(json.dumps({"Name": "Phantom", "License": "CC0"}))
    return folder.parent


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2.0 * float((a & b).sum()) / float(a.sum() + b.sum())


def test_the_stand_in_is_a_brain_on_the_sri24_grid(reference: Reference) -> None:
    t1w, mask = nib.load(reference.t1w), nib.load(reference.brain_mask)
    for image in (t1w, mask):
        assert image.shape == space.SHAPE
        np.testing.assert_array_equal(image.affine, space.AFFINE)
    brain = np.asarray(mask.dataobj) > 0
    assert brain.sum() == pytest.approx(1.44e6, rel=0.02)
    data = np.asarray(t1w.dataobj)
    assert (data[~brain] == 0).all()
    assert (data[brain] > 0).mean() > 0.999
    assert reference.name == STAND_IN
    assert reference.metadata["StandIn"] is True


def test_stand_in_is_written_once(reference: Reference) -> None:
    cache = reference.t1w.parents[1]
    before = reference.t1w.stat().st_mtime_ns
    again = resolve_reference(None, cache)
    assert again == reference
    assert reference.t1w.stat().st_mtime_ns == before


@pytest.mark.parametrize("inside", [False, True])
def test_an_atlas_is_found_from_the_archive_or_the_template_folder(
    atlas: Path, tmp_path: Path, inside: bool
) -> None:
    found = resolve_reference(atlas / "tpl-SRI24" if inside else atlas, tmp_path / "cache")
    assert found.name == "Phantom"
    assert found.licence == "CC0"
    assert found.t1w.name == "tpl-SRI24_res-1_desc-brain_T1w.nii.gz"
    assert found.t2w is not None
    assert not (tmp_path / "cache").exists()
    assert str(tmp_path) not in found.source


def test_a_read_only_atlas_works_and_is_left_alone(atlas: Path, tmp_path: Path) -> None:
    before = sorted(p.name for p in atlas.rglob("*"))
    (atlas / "tpl-SRI24").chmod(0o555)
    atlas.chmod(0o555)
    try:
        resolve_reference(atlas, tmp_path / "cache")
    finally:
        atlas.chmod(0o755)
        (atlas / "tpl-SRI24").chmod(0o755)
    assert sorted(p.name for p in atlas.rglob("*")) == before


def test_templateflow_home_counts_only_with_content(
    atlas: Path, tmp_path: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEMPLATEFLOW_HOME", str(atlas))
    assert resolve_reference(None, tmp_path / "cache").name == "Phantom"
    for path in (atlas / "tpl-SRI24").glob("*.nii.gz"):
        path.write_bytes(b"")
    assert resolve_reference(None, reference.t1w.parents[1]).name == STAND_IN


def test_an_atlas_off_the_grid_is_refused(atlas: Path, tmp_path: Path) -> None:
    path = atlas / "tpl-SRI24" / "tpl-SRI24_res-1_desc-brain_T1w.nii.gz"
    shifted = space.AFFINE.copy()
    shifted[0, 3] = 1.0
    nib.Nifti1Image(np.ones(space.SHAPE, np.uint8), shifted).to_filename(path)
    with pytest.raises(InputError, match="not on the SRI24 grid"):
        resolve_reference(atlas, tmp_path)


def test_a_folder_without_the_atlas_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no SRI24 atlas"):
        resolve_reference(tmp_path, tmp_path)


def test_an_atlas_without_a_mask_is_refused(atlas: Path, tmp_path: Path) -> None:
    (atlas / "tpl-SRI24" / "tpl-SRI24_res-1_desc-brain_mask.nii.gz").unlink()
    with pytest.raises(InputError, match="no desc-brain mask"):
        resolve_reference(atlas, tmp_path)


def test_the_template_is_written_with_sidecars(reference: Reference, tmp_path: Path) -> None:
    target = write_template(reference, tmp_path)
    times = target.stat().st_mtime_ns
    assert write_template(reference, tmp_path) == target
    assert target.stat().st_mtime_ns == times
    folder = tmp_path / "tpl-SRI24" / "anat"
    assert faults_below(folder) == []
    for name, source in (("brain_T1w", reference.t1w), ("brain_mask", reference.brain_mask)):
        written = nib.load(folder / f"tpl-SRI24_desc-{name}.nii.gz").get_fdata()
        np.testing.assert_array_equal(written, nib.load(source).get_fdata())
    assert sorted(p.name for p in folder.iterdir()) == [
        "tpl-SRI24_desc-brain_T1w.json",
        "tpl-SRI24_desc-brain_T1w.nii.gz",
        "tpl-SRI24_desc-brain_mask.json",
        "tpl-SRI24_desc-brain_mask.nii.gz",
    ]
    sidecar = json.loads((folder / "tpl-SRI24_desc-brain_T1w.json").read_text())
    assert sidecar["SkullStripped"] is True
    assert sidecar["ReferenceSHA256"] == reference.sha256
    mask = json.loads((folder / "tpl-SRI24_desc-brain_mask.json").read_text())
    assert mask["Type"] == "Brain"
    assert mask["Sources"] == [mask["SpatialReference"]]
    assert (tmp_path / mask["SpatialReference"].removeprefix("bids::")).is_file()


@pytest.mark.skipif(not (REAL_DATA / "tpl-SRI24").is_dir(), reason="the SRI24 atlas is not here")
def test_the_stand_in_fits_the_real_atlas(reference: Reference, tmp_path: Path) -> None:
    real = resolve_reference(REAL_DATA, tmp_path)
    assert real.t2w is not None
    assert real.metadata["StandIn"] is False
    masks = [np.asarray(nib.load(r.brain_mask).dataobj) > 0 for r in (reference, real)]
    assert dice(*masks) > 0.965
