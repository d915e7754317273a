from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch

from bids_uad.errors import InputError
from bids_uad.simulation.__main__ import main
from bids_uad.simulation.shapes import EDGE_MM, component_shapes, lesion_shapes, real_shape
from bids_uad.simulation.spatial import box_points
from bids_uad.space import icbm_to_sri24


@pytest.fixture
def folder(tmp_path):
    """One cube of 20 mm about (30, -20, 20) in ICBM152 space, on a grid that runs from right to left."""
    affine = np.diag([-1.0, 1.0, 1.0, 1.0])
    affine[:3, 3] = [90, -126, -72]
    mask = np.zeros((182, 218, 182), dtype=np.uint8)
    mask[50:70, 96:116, 82:102] = 1
    nib.save(nib.Nifti1Image(mask, affine), tmp_path / "a_mask.nii.gz")
    nib.save(nib.Nifti1Image(mask, affine), tmp_path / "b_mask.nii.gz")
    (tmp_path / "lesions.tsv").write_text(
        "file\tpathology\na_mask.nii.gz\tacute stroke\nb_mask.nii.gz\tmultiple sclerosis\nc.nii.gz\tcyst\n"
    )
    return tmp_path


def test_lesion_shapes_lists_masks_by_kind(folder):
    assert lesion_shapes(folder) == {
        "stroke": (str(folder / "a_mask.nii.gz"),),
        "ms": (str(folder / "b_mask.nii.gz"),),
    }


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        (None, "is missing"),
        ("file\na_mask.nii.gz\n", "lacks a column"),
        ("file\tpathology\nz.nii.gz\tstroke\n", "listed in lesions.tsv"),
    ],
)
def test_lesion_shapes_reports_an_invalid_folder(folder, table, complaint):
    (folder / "lesions.tsv").unlink()
    if table:
        (folder / "lesions.tsv").write_text(table)
    with pytest.raises(InputError, match=complaint):
        lesion_shapes(folder)
    assert main([str(folder / "out"), "--stroke", "1", "--lesion-masks", str(folder)]) == 66


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.5])
def test_real_shape_keeps_its_position_and_scales(folder, scale):
    class Still:
        def normal(self, *_):
            return np.zeros(3)

    points = box_points()
    fraction = real_shape(str(folder / "a_mask.nii.gz"), points, Still())(scale)
    # The template is a little smaller or larger than SRI24: its affine scales volumes.
    expected = (20 * scale) ** 3 * abs(np.linalg.det(icbm_to_sri24()[:3, :3]))
    assert float(fraction.sum()) == pytest.approx(expected, rel=0.05)
    centre = (points * fraction[..., None]).sum((0, 1, 2)) / fraction.sum()
    wanted = icbm_to_sri24() @ [30.5, -20.5, 19.5, 1]
    torch.testing.assert_close(centre, torch.tensor(wanted[:3]).float(), atol=0.3, rtol=0)
    # A soft edge, about a voxel wide, on the surface of the cube.
    soft = int(((fraction > 0.02) & (fraction < 0.98)).sum())
    assert 0 < soft < 6 * EDGE_MM * scale * 6 * (20 * scale) ** 2


def test_component_shapes_are_the_filled_components_at_1_mm(tmp_path):
    """A hollow cube of 20 mm, a bar of 24 x 8 x 6 mm and a speck of 32 mm3, on a grid of 2 x 2 x 1 mm."""
    mask = np.zeros((40, 40, 60), dtype=np.uint8)
    mask[2:12, 2:12, 2:22] = 1
    mask[5:7, 5:7, 8:12] = 0
    mask[20:32, 20:24, 40:46] = 1
    mask[36:38, 36:38, 50:52] = 1
    nib.save(nib.Nifti1Image(mask, np.diag([-2.0, 2.0, 1.0, 1.0])), tmp_path / "a_mask.nii.gz")
    (tmp_path / "lesions.tsv").write_text("file\tpathology\na_mask.nii.gz\tstroke\n")
    shapes = component_shapes(tmp_path)
    assert sorted(tuple(shape.shape) for shape in shapes) == [(20, 20, 20), (24, 8, 6)]
    assert all(shape.dtype == torch.bool and shape.all() for shape in shapes)
