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
    CLASSES,
    FREESURFER,
    icbm_to_sri24,
    label_map_to_sri24,
    rotation,
    template_source,
)


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


def test_a_tilted_label_map_is_put_back(tilted_template):
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


def test_a_map_without_cortex_is_refused(tmp_path):
    path = tmp_path / "bad_dseg.nii.gz"
    nib.save(nib.Nifti1Image(np.full((8, 8, 8), 2, dtype=np.int16), np.eye(4)), path)
    with pytest.raises(InputError, match="no cortex"):
        anatomy.read_label_map(path)


def test_affine_moves_icbm_to_the_sri24_grid():
    # The template is about a tenth larger than SRI24.
    determinant = np.linalg.det(icbm_to_sri24()[:3, :3])
    assert 0.65 < determinant < 0.9
