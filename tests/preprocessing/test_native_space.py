"""Native masks lie on exactly the grid of the input, however its header describes that grid."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bids_uad import space
from bids_uad.images import save_image
from bids_uad.preprocessing.interfaces import BrainMask, Conform
from bids_uad.preprocessing.reference import Reference
from bids_uad.preprocessing.resampling import map_to_native
from tests.header_contract import header_faults, read_header, sform

SHAPE = (44, 48, 40)
PLAIN = nib.affines.from_matvec(np.diag([4.0, 4.0, 4.0]), [-86, -94, -78])
OBLIQUE = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.2, -0.1, 0.3) * 4.0, [-90, -80, -70])
SHIFTED = PLAIN + np.array([[0, 0, 0, 30.0], [0] * 4, [0] * 4, [0] * 4])


def brain() -> np.ndarray:
    """A ball of 1.3 L."""
    grid = [(np.arange(n) - (n - 1) / 2) * 4.0 for n in SHAPE]
    distance = np.sqrt(sum(np.square(axis) for axis in np.ix_(*grid)))
    return np.where(distance < 68, 400 + 2 * distance, 0).astype(np.float32)


def stored(
    affine: np.ndarray, *, qform: np.ndarray | None = None, codes: tuple[int, int] = (1, 1), **options
):
    """Make an image with a sform, a qform (the same by default) and their codes."""
    made = options.get("kind", nib.Nifti1Image)(options.get("data", brain()), None)
    made.set_sform(affine, code=codes[0])
    made.set_qform(affine if qform is None else qform, code=codes[1])
    return made


SHEARED = PLAIN @ np.array([[1, 0.001, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
INPUTS = {
    "plain": stored(PLAIN),
    "flipped": stored(PLAIN @ np.diag([-1.0, 1, -1, 1])),
    "permuted": stored(PLAIN[:, [2, 0, 1, 3]]),
    "oblique": stored(OBLIQUE),
    "left-handed and oblique": stored(OBLIQUE @ np.diag([-1.0, 1, 1, 1])),
    "forms apart": stored(PLAIN, qform=SHIFTED),
    "qform alone": stored(PLAIN, qform=OBLIQUE, codes=(0, 1)),
    "sform alone": stored(OBLIQUE, qform=PLAIN, codes=(1, 0)),
    "other codes": stored(PLAIN, codes=(4, 2)),
    "NIfTI-2": stored(OBLIQUE, kind=nib.Nifti2Image),
    "trailing axes": stored(PLAIN, data=brain()[..., None, None]),
    "integers": stored(PLAIN, data=brain().astype(np.int16)),
    "slight shear": stored(SHEARED),
}
INPUTS["scaled"] = stored(PLAIN, data=brain().astype(np.int16))
INPUTS["scaled"].header.set_slope_inter(0.5, 0.0)


@pytest.mark.parametrize("name", INPUTS)
def test_native_masks_have_the_affine_and_the_shape_of_the_input(
    name: str, reference: Reference, tmp_path: Path
) -> None:
    path = tmp_path / "raw_T1w.nii.gz"
    nib.save(INPUTS[name], path)
    expected = nib.load(path).affine[:3].astype(np.float32)
    conformed = Conform(in_file=str(path)).run(cwd=str(tmp_path)).outputs.out_file
    given = {"template": str(reference.t1w), "template_mask": str(reference.brain_mask)}
    mask = BrainMask(in_file=conformed, skull_stripped=True, program="template", **given)
    brain_mask = Path(mask.run(cwd=str(tmp_path)).outputs.out_mask)
    anomalies = map_to_native(np.zeros(space.SHAPE, bool), nib.load(brain_mask), np.eye(4))
    for written in (brain_mask, save_image(anomalies, tmp_path / "anomalies.nii.gz")):
        np.testing.assert_array_equal(sform(read_header(written)), expected)
        assert nib.load(written).shape == SHAPE
        assert header_faults(written) == []
    np.testing.assert_array_equal(np.asarray(nib.load(brain_mask).dataobj), brain() > 0)
