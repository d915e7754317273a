"""Tissue maps of the template and of label maps, and their alignment with SRI24."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from bids_uad.errors import InputError
from bids_uad.simulation import anatomy
from bids_uad.simulation.anatomy import (
    BUILT_IN,
    CLASSES,
    FREESURFER,
    find_label_maps,
    label_map_to_sri24,
    read_label_map,
    rotation,
    template_source,
)
from bids_uad.space import icbm_to_sri24

TABLE = """index\tname
7\tLeft-Cerebral-Cortex
8\tright cerebral cortex
9\tWM
10\tLeft-Lateral-Ventricle
11\tSkull
12\tCSF
"""


def label_map(path, labels: dict[str, int]):
    """Blocks of cortex, white matter, ventricle, bone and fluid."""
    volume = np.zeros((40, 40, 40), dtype=np.int16)
    for position, label in enumerate(labels.values()):
        volume[10:30, 10:30, 10 + 4 * position : 14 + 4 * position] = label
    nib.save(nib.Nifti1Image(volume, np.eye(4)), path)


@pytest.fixture
def folder(tmp_path):
    label_map(tmp_path / "x_dseg.nii.gz", {"cortex": 8, "white": 9, "ventricle": 10, "bone": 11, "csf": 12})
    (tmp_path / "dseg.tsv").write_text(TABLE)
    return tmp_path


def test_read_label_map_uses_the_lookup_table(folder):
    classes, _ = read_label_map(str(folder / "x_dseg.nii.gz"))
    label_map(folder / "fs.nii.gz", {"cortex": 42, "white": 2, "ventricle": 4, "bone": 255, "csf": 24})
    (folder / "dseg.tsv").unlink()
    as_freesurfer, _ = read_label_map(str(folder / "fs.nii.gz"))
    np.testing.assert_array_equal(classes, as_freesurfer)
    counts = np.bincount(classes.ravel(), minlength=len(CLASSES) + 1)
    assert {CLASSES[k - 1]: counts[k] for k in np.flatnonzero(counts[1:]) + 1} == {
        "csf": 1600,
        "ventricle": 1600,
        "cortex": 1600,
        "white": 1600,
    }


def test_read_lookup_table_prefers_the_table_of_the_map(folder):
    (folder / "x_dseg.tsv").write_text("index\tname\n8\twhite\n9\tcortex\n12\tcsf\n")
    classes, _ = read_label_map(str(folder / "x_dseg.nii.gz"))
    first = classes[np.nonzero(classes)[0][0], :, :]
    assert set(np.unique(classes)) == {0} | {1 + CLASSES.index(name) for name in ("csf", "cortex", "white")}
    assert first.any()


def test_a_table_without_names_is_refused(folder):
    (folder / "dseg.tsv").write_text("index\tcolour\n1\tred\n")
    with pytest.raises(InputError, match="lacks a column"):
        read_label_map(str(folder / "x_dseg.nii.gz"))


def test_read_label_map_refuses_unknown_labels(folder):
    (folder / "dseg.tsv").write_text("index\tname\n8\tliver\n")
    with pytest.raises(InputError, match="no cortex"):
        read_label_map(str(folder / "x_dseg.nii.gz"))


def test_find_label_maps_accepts_files_folders_and_the_template(folder):
    own = str(folder / "x_dseg.nii.gz")
    assert find_label_maps([BUILT_IN, folder, own]) == [BUILT_IN, own, own]
    with pytest.raises(InputError, match="neither a label map nor a folder"):
        find_label_maps([folder / "nothing"])


def test_rotation_agrees_with_scipy():
    angles = np.array([0.2, -0.4, 0.7])
    got = rotation(torch.from_numpy(angles)).numpy()
    np.testing.assert_allclose(got, Rotation.from_euler("xyz", angles).as_matrix(), atol=1e-7)


@pytest.fixture(scope="module")
def tilted_template(tmp_path_factory) -> tuple[Path, np.ndarray]:
    """The template as a label map whose world was turned and moved by a known rigid transform."""
    source = template_source()
    fractions = source.fractions
    labels = np.zeros(fractions.shape[1:], dtype=np.int16)
    largest = fractions.argmax(0).numpy()
    for index, name in enumerate(CLASSES):
        labels[(largest == index) & (fractions.sum(0).numpy() > 0.5)] = FREESURFER[name][0]
    known = nib.affines.from_matvec(
        Rotation.from_euler("xyz", [8, -5, 6], degrees=True).as_matrix(), [15, -9, 20]
    )
    path = tmp_path_factory.mktemp("labels") / "tilted_dseg.nii.gz"
    nib.save(nib.Nifti1Image(labels, known @ source.affine), path)
    return path, known


def test_label_map_to_sri24_inverts_a_known_transform(tilted_template):
    path, known = tilted_template
    found = label_map_to_sri24(str(path)) @ known
    corners = np.array([[-60, 40, 20, 1], [-180, 180, 100, 1], [-119, 107, 77, 1.0]])
    np.testing.assert_allclose(corners @ found.T, corners, atol=1.5)


def test_label_map_source_keeps_classes(tilted_template):
    source = anatomy.label_map_source(tilted_template[0])
    built_in = template_source()
    for name in ("white", "cortex", "ventricle"):
        index = CLASSES.index(name)
        ours = float((built_in.fractions.argmax(0) == index)[built_in.fractions.sum(0) > 0.5].sum())
        assert abs(float(source.fractions[index].sum()) - ours) < 0.01 * ours


def test_read_label_map_refuses_a_map_without_cortex(tmp_path):
    path = tmp_path / "bad_dseg.nii.gz"
    nib.save(nib.Nifti1Image(np.full((8, 8, 8), 2, dtype=np.int16), np.eye(4)), path)
    with pytest.raises(InputError, match="no cortex"):
        anatomy.read_label_map(path)


def test_add_fluid_fills_a_sulcus_and_surrounds_the_brain():
    """Two half balls with a fissure of 6 mm between them, without any fluid label."""
    x, y, z = np.ogrid[-36:36, -36:36, -36:36]
    brain = (x**2 + y**2 + z**2 <= 28**2) & (np.abs(x + 0.5) > 3)
    filled = anatomy.add_fluid(brain.astype(np.uint8) * np.uint8(1 + CLASSES.index("cortex")))
    fluid = filled == 1 + CLASSES.index("csf")
    assert not (fluid & brain).any()
    radius = np.sqrt((x**2 + y**2 + z**2).astype(float)) * np.ones(brain.shape)
    assert fluid[~brain & (radius < 27)].all()
    # The rim is 4 mm thick, with an error of one voxel.
    off_fissure = np.broadcast_to(np.abs(x) > 14, brain.shape)
    assert fluid[off_fissure & (radius > 29) & (radius < 31)].all()
    assert not fluid[radius > 33.5].any()


def test_read_label_map_adds_fluid_only_to_a_map_without_any(folder):
    classes, _ = read_label_map(str(folder / "x_dseg.nii.gz"))
    assert (classes == 1 + CLASSES.index("csf")).sum() == 1600
    label_map(folder / "dry_dseg.nii.gz", {"cortex": 8, "white": 9, "ventricle": 10})
    classes, _ = read_label_map(str(folder / "dry_dseg.nii.gz"))
    fluid = classes == 1 + CLASSES.index("csf")
    assert fluid.any()
    assert {int(n) for n in np.bincount(classes.ravel())[2:] if n} == {1600}


def test_affine_moves_icbm_to_the_sri24_grid():
    # The template is about a tenth larger than SRI24.
    determinant = np.linalg.det(icbm_to_sri24()[:3, :3])
    assert 0.65 < determinant < 0.9
