"""What another pipeline has done is not done again: only the rigid step to SRI24 is left."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

from bids_uad.preprocessing.reference import Reference
from bids_uad.preprocessing.registration import Volume
from bids_uad.preprocessing.resampling import read_itk, resample, translation, write_itk
from bids_uad.preprocessing.workflow import ExternalInputs, init_preproc_wf

from .conftest import NATIVE_AFFINE, NATIVE_SHAPE, draw, known_move, save, t2w_like
from .test_workflow import BY_TEMPLATE, T2W_AFFINE, T2W_SHAPE, dice, run

BRAIN_CENTRE = np.array([-119.0, 116.0, 76.0, 1.0])
EARLIER_SHIFT = translation(np.array([4.0, -3.0, 6.0]))
"""From points of the earlier pipeline's space to points of the raw scan."""


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory, reference: Reference, reference_volume: Volume):
    """A raw T1w and T2w, and an earlier pipeline's versions: elsewhere, the T2w on the grid of the T1w."""
    folder = tmp_path_factory.mktemp("earlier")
    t1w = draw(reference_volume, known_move(), NATIVE_SHAPE, NATIVE_AFFINE)
    t2w = t2w_like(draw(reference_volume, known_move(), T2W_SHAPE, T2W_AFFINE))
    files = {
        "raw_t1w": save(folder / "raw_T1w.nii.gz", t1w, NATIVE_AFFINE),
        "raw_t2w": save(folder / "raw_T2w.nii.gz", t2w, T2W_AFFINE),
        "from_raw": write_itk(folder / "from-orig_to-T1w_mode-image_xfm.txt", EARLIER_SHIFT),
    }
    moved = resample(t1w, NATIVE_AFFINE, NATIVE_SHAPE, NATIVE_AFFINE, EARLIER_SHIFT)
    files["t1w"] = save(folder / "T1w.nii.gz", moved, NATIVE_AFFINE)
    files["t2w"] = save(folder / "T2w.nii.gz", t2w_like(moved), NATIVE_AFFINE)
    files["mask"] = save(folder / "mask.nii.gz", (moved > 0).astype(np.uint8), NATIVE_AFFINE)
    common = {"skull_stripped": None, "omp_nthreads": 1, "reference": reference, "extraction": BY_TEMPLATE}
    external = ExternalInputs(image=True, mask=True)
    anchor = run(
        init_preproc_wf(name="t1w_wf", modality="T1w", is_anchor=True, external=external, **common),
        folder,
        in_file=files["t1w"],
        external_mask=files["mask"],
        raw_file=files["raw_t1w"],
        from_raw=files["from_raw"],
    )
    external = ExternalInputs(image=True, aligned=True)
    other = run(
        init_preproc_wf(name="t2w_wf", modality="T2w", is_anchor=False, external=external, **common),
        folder,
        in_file=files["t2w"],
        anchor_file=anchor.brain,
        anchor_mask=anchor.own_mask,
        anchor_xfm=anchor.xfm,
        raw_file=files["raw_t2w"],
    )
    return SimpleNamespace(anchor=anchor, other=other, **files)


def data(path: str | Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def test_external_image_and_mask_are_used_unchanged(earlier) -> None:
    image, mask = data(earlier.t1w), data(earlier.mask)
    np.testing.assert_array_equal(data(earlier.anchor.brain), np.where(mask, image, 0))
    np.testing.assert_array_equal(data(earlier.anchor.own_mask), mask)


@pytest.mark.parametrize("which", ["anchor", "other"])
def test_outputs_are_resampled_to_the_raw_scan(earlier, which: str) -> None:
    result = getattr(earlier, which)
    found = read_itk(result.to_sri24) @ BRAIN_CENTRE
    assert np.linalg.norm(found - known_move() @ BRAIN_CENTRE) < 1.0
    np.testing.assert_allclose(read_itk(result.from_sri24) @ read_itk(result.to_sri24), np.eye(4), atol=1e-9)


def test_the_masks_lie_on_the_raw_grids(earlier) -> None:
    raw = data(earlier.raw_t1w) > 0
    assert dice(data(earlier.anchor.native_mask) > 0, raw) > 0.97
    assert nib.load(earlier.other.native_mask).shape == T2W_SHAPE
    assert dice(data(earlier.other.native_mask) > 0, data(earlier.raw_t2w) > 0) > 0.93


def test_aligned_t2w_has_the_transform_of_its_anchor(earlier) -> None:
    assert Path(earlier.other.xfm).read_text() == Path(earlier.anchor.xfm).read_text()
    assert dice(data(earlier.other.brain_mask) > 0, data(earlier.anchor.brain_mask) > 0) > 0.99


def test_external_transform_is_used_unchanged(earlier, reference: Reference, tmp_path: Path) -> None:
    xfm = write_itk(tmp_path / "given.txt", known_move())
    mask = data(earlier.raw_t1w) > 0
    result = run(
        init_preproc_wf(
            name="given_wf",
            modality="T1w",
            is_anchor=True,
            skull_stripped=None,
            omp_nthreads=1,
            reference=reference,
            extraction=BY_TEMPLATE,
            external=ExternalInputs(mask=True, xfm=True),
        ),
        tmp_path,
        in_file=earlier.raw_t1w,
        external_mask=save(tmp_path / "mask.nii.gz", mask.astype(np.uint8), NATIVE_AFFINE),
        external_xfm=xfm,
    )
    np.testing.assert_array_equal(read_itk(result.to_sri24), known_move())
    assert result.qc["registration_overlap"] > 0.9
    assert result.qc["similarity"] > 0.15
