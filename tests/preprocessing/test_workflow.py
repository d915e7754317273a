from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from bids_uad import space
from bids_uad.preprocessing import interfaces
from bids_uad.preprocessing.brain_extraction.masks import Extraction
from bids_uad.preprocessing.intensity_correction import correct_bias
from bids_uad.preprocessing.reference import Reference
from bids_uad.preprocessing.registration import Volume
from bids_uad.preprocessing.resampling import (
    map_to_native,
    read_itk,
    resample_mask,
    rotation_about,
    translation,
)
from bids_uad.preprocessing.workflow import init_lesion_wf, init_preproc_wf

from .conftest import MNI_TO_SRI24, NATIVE_AFFINE, NATIVE_SHAPE, draw, known_move, save, t2w_like

BY_TEMPLATE = Extraction("template")
TEMPLATE = "MNI152NLin2009cAsym:res-2"
LESION_CENTRE = np.array([-100.0, 120.0, 90.0])
T2W_SHAPE = (60, 70, 24)
T2W_AFFINE = rotation_about(np.array([90.0, 100.0, 70.0]), (4.0, 5.0, -6.0)) @ np.array(
    [[-3.5, 0, 0, -5], [0, 3.5, 0, -8], [0, 0, 7.0, -10], [0, 0, 0, 1.0]]
)


@functools.cache
def lesion_ball() -> np.ndarray:
    """A ball of 14 mm radius in the brain, on the SRI24 grid."""
    i, j, k = np.ogrid[tuple(slice(n) for n in space.SHAPE)]
    centre = np.linalg.inv(space.AFFINE) @ [*LESION_CENTRE, 1.0]
    return (i - centre[0]) ** 2 + (j - centre[1]) ** 2 + (k - centre[2]) ** 2 < 14.0**2


def run(workflow, base: Path, **inputs: object) -> SimpleNamespace:
    """Run a workflow in this process, with fewer iterations of N4, which is tested elsewhere."""
    workflow.base_dir = str(base)
    for key, value in inputs.items():
        setattr(workflow.inputs.inputnode, key, str(value))
    workflow.config["execution"] = {"remove_unnecessary_outputs": "false", "crashdump_dir": str(base)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interfaces, "correct_bias", functools.partial(correct_bias, iterations=(20, 20)))
        graph = workflow.run()
    nodes = {node.name: node.result.outputs for node in graph.nodes()}
    mask = nodes.get("brain_mask", nodes["register"])
    native = nodes.get("native", nodes["register"])
    return SimpleNamespace(
        preproc=nodes["resample"].out_file,
        brain_mask=nodes["resample"].out_mask,
        own_mask=mask.out_mask,
        native_mask=nodes.get("native", mask).out_mask,
        corrected=nodes["correct_bias"].out_file,
        brain=nodes["correct_bias"].out_brain,
        xfm=nodes["register"].to_sri24,
        to_sri24=native.to_sri24,
        from_sri24=native.from_sri24,
        lesion=nodes["lesion"].out_file,
        qc=nodes["quality"].qc,
        in_templates=nodes["resample"].in_templates,
    )


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory, reference: Reference, reference_volume: Volume):
    """A T1w with a lesion mask, and a thick-slice oblique T2w of the same head."""
    folder = tmp_path_factory.mktemp("session")
    t1w = draw(reference_volume, known_move(), NATIVE_SHAPE, NATIVE_AFFINE)
    lesion = resample_mask(
        lesion_ball(), space.AFFINE, NATIVE_SHAPE, NATIVE_AFFINE, np.linalg.inv(known_move())
    )
    t1w_file = save(folder / "T1w.nii.gz", t1w[..., None], NATIVE_AFFINE)
    lesion_file = save(folder / "lesion.nii.gz", lesion.astype(np.uint8), NATIVE_AFFINE)
    t2w = t2w_like(draw(reference_volume, known_move(), T2W_SHAPE, T2W_AFFINE))
    t2w_file = save(folder / "T2w.nii.gz", t2w, T2W_AFFINE)
    common = {"skull_stripped": None, "omp_nthreads": 1, "reference": reference, "extraction": BY_TEMPLATE}
    common["templates"] = [TEMPLATE]
    anchor = run(
        init_preproc_wf(name="t1w_wf", modality="T1w", is_anchor=True, **common),
        folder,
        in_file=t1w_file,
        lesion_mask=lesion_file,
    )
    other = run(
        init_preproc_wf(name="t2w_wf", modality="T2w", is_anchor=False, **common),
        folder,
        in_file=t2w_file,
        anchor_file=anchor.brain,
        anchor_mask=anchor.native_mask,
        anchor_xfm=anchor.to_sri24,
    )
    return SimpleNamespace(t1w=t1w_file, t2w=t2w_file, lesion=lesion_file, anchor=anchor, other=other)


def load(path: str) -> np.ndarray:
    image = nib.load(path)
    assert image.shape == space.SHAPE
    np.testing.assert_array_equal(image.affine, space.AFFINE)
    assert int(image.header["sform_code"]) == int(image.header["qform_code"]) == 2
    return np.asarray(image.dataobj)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2.0 * float((a & b).sum()) / float(a.sum() + b.sum())


def interpolated(path: str, xfm: str, shape=space.SHAPE, to_sri24: np.ndarray = space.AFFINE) -> np.ndarray:
    """Read an image at the voxels of a grid through one transform, by SciPy alone."""
    image = nib.load(path)
    voxels = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1)[::3, ::3, ::3]
    to_voxel = np.linalg.inv(image.affine) @ read_itk(xfm) @ to_sri24
    places = nib.affines.apply_affine(to_voxel, voxels.astype(float))
    data = np.asarray(image.dataobj, dtype=np.float64)
    return ndimage.map_coordinates(data, np.moveaxis(places, -1, 0), order=1, mode="nearest")


@pytest.mark.parametrize("which", ["anchor", "other"])
def test_each_scan_is_interpolated_once(session, which: str) -> None:
    result = getattr(session, which)
    once = interpolated(result.corrected, result.to_sri24)
    brain = load(result.brain_mask)[::3, ::3, ::3] > 0
    ratio = once[brain] / load(result.preproc)[::3, ::3, ::3][brain]
    assert np.ptp(ratio) < 1e-3 * ratio.mean()


@pytest.mark.parametrize("which", ["anchor", "other"])
def test_each_scan_is_interpolated_once_to_a_template(session, reference_volume: Volume, which: str) -> None:
    result = getattr(session, which)
    image, mask = map(nib.load, result.in_templates)
    assert image.shape == mask.shape == (97, 115, 97)
    to_sri24 = MNI_TO_SRI24 @ image.affine
    once = interpolated(result.corrected, result.to_sri24, image.shape, to_sri24)
    brain = np.asarray(mask.dataobj)[::3, ::3, ::3] > 0
    ratio = once[brain] / np.asarray(image.dataobj)[::3, ::3, ::3][brain]
    assert np.ptp(ratio) < 1e-3 * ratio.mean()
    # The phantom is the reference, which is the template by this affine.
    head = resample_mask(reference_volume.mask, space.AFFINE, mask.shape, mask.affine, MNI_TO_SRI24)
    assert dice(np.asarray(mask.dataobj) > 0, head) > 0.95


def test_the_lesion_is_interpolated_once(session) -> None:
    once = interpolated(session.lesion, session.anchor.to_sri24) > 0.5
    assert (once != (load(session.anchor.lesion)[::3, ::3, ::3] > 0)).sum() <= 1


@pytest.mark.parametrize("which", ["anchor", "other"])
def test_scans_arrive_on_the_grid_scaled_and_masked(session, reference_volume: Volume, which: str) -> None:
    result = getattr(session, which)
    image, brain = load(result.preproc), load(result.brain_mask) > 0
    assert image.dtype == np.float32
    assert image.min() == 0.0
    assert np.percentile(image[brain], 99.5) == pytest.approx(1, abs=1e-3)
    assert image.max() > 1
    assert (image[~brain] == 0).all()
    assert dice(brain, reference_volume.mask) > 0.95
    assert result.qc["mask_overlap"] == pytest.approx(dice(brain, reference_volume.mask), abs=1e-4)
    assert result.qc["skull_stripped"] is True
    assert result.qc["warnings"] == []


def test_both_contrasts_show_the_same_anatomy(session, reference_volume: Volume) -> None:
    inner = load(session.anchor.brain_mask).astype(bool) & load(session.other.brain_mask).astype(bool)
    t1w, t2w = load(session.anchor.preproc)[inner], load(session.other.preproc)[inner]
    assert np.corrcoef(t1w, reference_volume.data[inner])[0, 1] > 0.85
    assert np.corrcoef(t1w, t2w)[0, 1] < -0.6


@pytest.mark.parametrize("which", ["anchor", "other"])
def test_each_scan_has_one_rigid_transform_and_its_inverse(session, which: str) -> None:
    result = getattr(session, which)
    pull, back = read_itk(result.to_sri24), read_itk(result.from_sri24)
    np.testing.assert_allclose(pull @ back, np.eye(4), atol=1e-9)
    np.testing.assert_allclose(pull[:3, :3] @ pull[:3, :3].T, np.eye(3), atol=1e-9)
    shift = np.linalg.norm(((pull - known_move()) @ [*LESION_CENTRE, 1.0])[:3])
    assert shift < 1.0


def test_lesion_mask_of_an_external_image_is_resampled(session) -> None:
    assert dice(load(session.anchor.lesion) > 0, lesion_ball()) > 0.85


def test_lesion_workflow_resamples_a_mask_drawn_on_another_image(
    session, reference_volume: Volume, tmp_path: Path
) -> None:
    motion = translation(np.array([3.0, -2.0, 4.0])) @ known_move()
    flair = t2w_like(draw(reference_volume, motion, T2W_SHAPE, T2W_AFFINE))
    lesion = resample_mask(lesion_ball(), space.AFFINE, T2W_SHAPE, T2W_AFFINE, np.linalg.inv(motion))
    workflow = init_lesion_wf(name="lesion_wf")
    workflow.base_dir = str(tmp_path)
    inputs = {
        "in_file": save(tmp_path / "FLAIR.nii.gz", flair, T2W_AFFINE),
        "lesion_mask": save(tmp_path / "lesion.nii.gz", lesion.astype(np.uint8), T2W_AFFINE),
        "anchor_file": session.anchor.brain,
        "anchor_mask": session.anchor.own_mask,
        "anchor_xfm": session.anchor.xfm,
    }
    for field, path in inputs.items():
        setattr(workflow.inputs.inputnode, field, str(path))
    nodes = {node.name: node.result.outputs for node in workflow.run().nodes()}
    assert dice(load(nodes["lesion"].out_file) > 0, lesion_ball()) > 0.85


def test_the_mask_of_the_t2w_lies_on_its_own_grid(session) -> None:
    native, mask = nib.load(session.t2w), nib.load(session.other.native_mask)
    assert mask.shape == native.shape
    np.testing.assert_allclose(mask.affine, native.affine, atol=1e-4)
    assert dice(np.asarray(mask.dataobj) > 0, np.asarray(native.dataobj) > 0) > 0.93


@pytest.mark.parametrize("which", ["anchor", "other"])
def test_a_mask_goes_to_native_space_and_back(session, which: str) -> None:
    raw = session.t1w if which == "anchor" else session.t2w
    result = getattr(session, which)
    native = map_to_native(lesion_ball(), nib.load(raw), read_itk(result.from_sri24))
    assert native.shape == nib.load(raw).shape[:3]
    assert native.get_data_dtype() == np.uint8
    np.testing.assert_allclose(native.affine, nib.load(raw).affine, atol=1e-5)
    volume = np.asarray(native.dataobj).sum() * abs(np.linalg.det(native.affine[:3, :3]))
    assert volume == pytest.approx(lesion_ball().sum(), rel=0.12)
    again = resample_mask(
        np.asarray(native.dataobj) > 0, native.affine, space.SHAPE, space.AFFINE, read_itk(result.to_sri24)
    )
    assert dice(again, lesion_ball()) > 0.8


def test_map_to_native_keeps_labels(session) -> None:
    labels = lesion_ball().astype(np.int16) * 300
    native = map_to_native(labels, nib.load(session.t1w), read_itk(session.anchor.from_sri24))
    assert set(np.unique(np.asarray(native.dataobj))) == {0, 300}


def test_map_to_native_refuses_another_grid(session) -> None:
    with pytest.raises(ValueError, match="expected a volume"):
        map_to_native(np.zeros((4, 4, 4)), nib.load(session.t1w), np.eye(4))


def test_other_contrasts_are_refused(reference: Reference) -> None:
    with pytest.raises(ValueError, match="T1w, T2w or FLAIR, not 'PDw'"):
        init_preproc_wf(
            name="x",
            modality="PDw",
            is_anchor=True,
            skull_stripped=None,
            omp_nthreads=1,
            reference=reference,
            extraction=BY_TEMPLATE,
        )
