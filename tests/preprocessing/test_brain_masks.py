"""Brain masks: from the background, from whole heads, and from external programs."""

from __future__ import annotations

import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from bids_uad.errors import InputError, UnavailableError
from bids_uad.preprocessing.brain_extraction.masks import (
    HD_BET_FOLDER,
    Extraction,
    extract_brain,
    mask_from_background,
    packaged_weights,
    resolve_extraction,
    run_external_program,
)
from bids_uad.preprocessing.brain_extraction.network import load_network, predict_brain_mask
from bids_uad.preprocessing.check import read_scan, read_volume
from bids_uad.preprocessing.intensity_correction import correct_bias
from bids_uad.preprocessing.interfaces import BrainMask
from bids_uad.preprocessing.quality import MIN_LOCAL_CORRELATION
from bids_uad.preprocessing.reference import Reference
from bids_uad.preprocessing.registration import Volume, register_to_reference
from bids_uad.preprocessing.resampling import resample, rotation_about

from .conftest import NATIVE_AFFINE, NATIVE_SHAPE, REAL_DATA, draw, known_move, save


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2.0 * float((a & b).sum()) / float(a.sum() + b.sum())


@pytest.mark.parametrize("background", [0.0, -5.0])
def test_mask_from_background_has_one_component_without_holes(background: float) -> None:
    grid = np.indices((40, 40, 40)) - 19.5
    radius = np.sqrt((grid**2).sum(axis=0))
    data = np.where(radius < 15, 100.0, background)
    data[radius < 4] = background  # dark ventricle
    data[1, 1, 1] = 3.0  # crumb
    np.testing.assert_array_equal(mask_from_background(data), radius < 15)


def head_around(brain: np.ndarray) -> np.ndarray:
    """Put noisy skull, scalp and a neck around a brain: whole-head T1w of a phantom on 3 mm voxels."""
    rng = np.random.default_rng(1)
    inside = brain > 0
    distance = ndimage.distance_transform_edt(~inside) * 3.0
    scalp = (distance > 8) & (distance < 16)
    neck = np.zeros(brain.shape, dtype=bool)
    i, j, k = (int(c) for c in ndimage.center_of_mass(inside))
    neck[i - 14 : i + 14, j - 16 : j + 16, : k - 18] = True
    soft = (scalp | (neck & (distance > 8))) & ~inside
    head = np.where(inside, brain, 0.0) + np.where(soft, 700.0, 0.0)
    return np.abs(head + rng.normal(0, 15, brain.shape)).astype(np.float32)


@pytest.mark.slow
def test_extract_brain_masks_the_brain_of_a_phantom_head(reference_volume: Volume, tmp_path: Path) -> None:
    brain = draw(reference_volume, known_move(), NATIVE_SHAPE, NATIVE_AFFINE)
    head = Volume(head_around(brain), NATIVE_AFFINE)
    found, agreement = extract_brain(head, reference_volume, tmp_path)
    assert agreement is None
    assert dice(found, brain > 0) > 0.95


@pytest.fixture
def shifted_masks(monkeypatch: pytest.MonkeyPatch) -> tuple[Volume, np.ndarray]:
    """A head whose brain is a ball, and a template mask that is 2 mm too high."""
    grid = np.indices((80, 80, 80)) - 39.5
    ball = (grid**2).sum(axis=0) < 25**2
    data = np.where(ball, 100.0, 0.0) + np.where((grid**2).sum(axis=0) < 34**2, 8.0, 0.0)
    monkeypatch.setattr(
        "bids_uad.preprocessing.brain_extraction.masks._warp_template_mask",
        lambda *_: np.roll(ball, 1, axis=2),
    )
    monkeypatch.setattr("bids_uad.preprocessing.brain_extraction.masks._refine", lambda mask, _: mask)
    monkeypatch.setattr("bids_uad.preprocessing.brain_extraction.masks.correct_bias", lambda data, *_: data)
    return Volume(data.astype(np.float32), np.diag([2.0, 2.0, 2.0, 1.0])), ball


def test_extract_brain_averages_agreeing_masks_and_dilates_by_1_mm(shifted_masks, tmp_path: Path) -> None:
    head, ball = shifted_masks
    mask, agreement = extract_brain(head, head, tmp_path, np.roll(ball, -1, axis=2))
    assert agreement == pytest.approx(dice(np.roll(ball, 1, axis=2), np.roll(ball, -1, axis=2)))
    assert ball[mask].mean() < 1
    assert mask[ball].mean() > 0.999  # halfway between the two is the ball itself
    along = np.flatnonzero(mask[40, 40]).min(), np.flatnonzero(mask[40, 40]).max()
    assert along[1] - along[0] + 1 in (50, 51, 52)  # 50 voxels of 2 mm, a millimetre more on each side


def test_extract_brain_uses_the_network_mask_if_the_masks_disagree(shifted_masks, tmp_path: Path) -> None:
    head, ball = shifted_masks
    far = np.roll(ball, -10, axis=2)
    crumb = np.zeros_like(ball)
    crumb[2:4, 2:4, 2:4] = True
    mask, agreement = extract_brain(head, head, tmp_path, far | crumb)
    assert agreement < 0.9
    np.testing.assert_array_equal(mask, far)
    mask, agreement = extract_brain(head, head, tmp_path, np.zeros_like(ball))
    assert agreement == 0.0
    np.testing.assert_array_equal(mask, np.roll(ball, 1, axis=2))
    mask, agreement = extract_brain(head, None, tmp_path, far)
    assert agreement is None
    np.testing.assert_array_equal(mask, far)


@pytest.mark.slow
@pytest.mark.skipif(not (REAL_DATA / "brains").is_dir(), reason="real scans are not here")
@pytest.mark.parametrize(
    ("scan", "least"),
    [
        ("sub-tcgafg6692/anat/sub-tcgafg6692_{}T1w{}", 0.95),
        ("sub-tcgafg6692/anat/sub-tcgafg6692_{}T2w{}", 0.92),
        ("sub-umcllg01/ses-1/anat/sub-umcllg01_ses-1_{}T1w{}", 0.95),
        ("sub-umcllg01/ses-1/anat/sub-umcllg01_ses-1_{}T2w{}", 0.94),
    ],
)
def test_extract_brain_masks_the_brain_of_real_heads(
    scan: str, least: float, reference_volume: Volume, tmp_path: Path
) -> None:
    image = read_scan(REAL_DATA / "brains" / scan.format("", ".nii.gz"))
    mask = scan.format("space-", "_desc-brain_mask.nii.gz")
    truth = read_volume(REAL_DATA / "brains" / "derivatives" / "brainmasks" / mask)[0] > 0
    seen = predict_brain_mask(image.data, image.affine, load_network(packaged_weights()))
    found, _ = extract_brain(Volume(image.data, image.affine), reference_volume, tmp_path, seen)
    assert dice(found, truth) > least


def grid_of_slices(zooms: tuple[float, float, float], below: float = 0.0, sides: float = 0.0):
    """A grid over the phantom's field of view, further down and to the sides; its shape and affine."""
    extent = np.array(NATIVE_SHAPE) * 3.0 + [2 * sides, 2 * sides, below]
    first = NATIVE_AFFINE[:3, 3] + [sides, -sides, -below] + (np.array(zooms) - 3.0) / 2 * [-1, 1, 1]
    affine = np.diag([-zooms[0], zooms[1], zooms[2], 1.0])
    affine[:3, 3] = first
    return tuple(int(n) for n in np.ceil(extent / zooms)), affine


def acquire(volume: np.ndarray, shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """Sample a volume on a grid, averaged over thick slices."""
    parts = np.maximum(np.rint(np.linalg.norm(affine[:3, :3], axis=0) / 2.0), 1).astype(int)
    finer = affine @ np.diag([*(1.0 / parts), 1.0])
    finer[:3, 3] = affine[:3, :3] @ ((1.0 / parts - 1) / 2) + affine[:3, 3]
    fine = resample(volume, NATIVE_AFFINE, tuple(np.array(shape) * parts), finer)
    blocks = np.ravel(np.column_stack([shape, parts]))
    return fine.reshape(blocks).mean(axis=(1, 3, 5))


def head_with_neck(reference: Volume, shape: tuple[int, ...], affine: np.ndarray, turn: tuple[float, ...]):
    """Draw a head with neck and, if the grid extends that far, shoulders; data, true mask and affine."""
    centre = np.array([-119.0, 116.0, 76.0])
    affine = rotation_about(centre, turn) @ affine
    brain = draw(reference, known_move(), NATIVE_SHAPE, NATIVE_AFFINE)
    truth = acquire(brain > 0, shape, affine) > 0.5
    data = acquire(head_around(brain), shape, affine)
    x, y, z = np.moveaxis(nib.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1)), -1, 0)
    bottom = NATIVE_AFFINE[2, 3]
    data[(z < bottom) & (np.hypot(x - centre[0], y - centre[1]) < 60)] = 700.0
    data[(z < bottom - 90) & (np.abs(x - centre[0]) < 150) & (np.abs(y - centre[1]) < 80)] = 600.0
    return data + np.abs(np.random.default_rng(0).normal(0, 15, shape)), truth, affine


def extract_and_register(data: np.ndarray, affine: np.ndarray, reference: Volume, folder: Path):
    """Extract the brain by both methods and register it; brain mask, pull matrix and metrics."""
    seen = predict_brain_mask(data, affine, load_network(packaged_weights()))
    mask, _ = extract_brain(Volume(data, affine), reference, folder, seen)
    corrected = np.where(mask, correct_bias(data, affine, mask), 0.0)
    return mask, *register_to_reference(reference, Volume(corrected, affine, mask))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("grid", "turn"),
    [
        (grid_of_slices((1.0, 1.0, 8.0)), (0.0, 0.0, 0.0)),
        (grid_of_slices((6.0, 1.0, 1.0)), (0.0, 0.0, 0.0)),
        (grid_of_slices((1.0, 7.0, 1.0)), (8.0, 0.0, 12.0)),
        (grid_of_slices((0.6, 0.6, 0.6)), (0.0, 0.0, 0.0)),
        (grid_of_slices((2.0, 2.0, 2.0), below=100.0), (0.0, 0.0, 0.0)),
    ],
    ids=["thick axial", "thick sagittal", "thick coronal, oblique", "small voxels", "neck"],
)
def test_a_head_is_preprocessed_on_unusual_grids(
    grid, turn: tuple[float, float, float], reference_volume: Volume, tmp_path: Path
) -> None:
    """The brain is found, and the registration is off by less than 1 mm anywhere in it."""
    data, truth, affine = head_with_neck(reference_volume, *grid, turn)
    mask, pull, _ = extract_and_register(data, affine, reference_volume, tmp_path)
    assert dice(mask, truth) > 0.95
    points = nib.affines.apply_affine(reference_volume.affine, np.argwhere(reference_volume.mask)[::5000])
    errors = nib.affines.apply_affine(pull, points) - nib.affines.apply_affine(known_move(), points)
    assert np.linalg.norm(errors, axis=1).max() < 1.0


@pytest.mark.slow
def test_a_head_with_shoulders_does_not_resemble_the_reference(reference_volume: Volume, tmp_path: Path):
    """The trunk is taken for the head, and the similarity is below the limit at which scans are refused."""
    grid = grid_of_slices((2.0, 2.0, 2.0), below=200.0, sides=90.0)
    data, _, affine = head_with_neck(reference_volume, *grid, (0.0, 0.0, 0.0))
    _, _, metrics = extract_and_register(data, affine, reference_volume, tmp_path)
    assert abs(metrics["local_correlation"]) < MIN_LOCAL_CORRELATION


AFFINE = np.diag([-4.0, 4.0, 4.0, 1.0])
STAND_IN = f"""#!{sys.executable}
import argparse, os, sys
import nibabel as nib
import numpy as np
parser = argparse.ArgumentParser()
for flag in ("-i", "-m", "-o", "-device", "--model"):
    parser.add_argument(flag)
parser.add_argument("--disable_tta", action="store_true")
parser.add_argument("--save_bet_mask", action="store_true")
args = parser.parse_args()
image = nib.load(args.i)
if image.get_fdata().max() < 10:
    sys.exit("nothing there")
if os.path.basename(sys.argv[0]) == "hd-bet":
    assert args.disable_tta and args.save_bet_mask and args.device == "cpu"
    assert os.path.isdir(os.path.expanduser("~/{HD_BET_FOLDER}"))
    target = args.o.replace(".nii.gz", "_bet.nii.gz")
else:
    assert os.path.isfile(args.model)
    target = args.m
mask = nib.as_closest_canonical(nib.Nifti1Image((image.get_fdata() > 50).astype(np.uint8), image.affine))
nib.save(mask, target)
"""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Put both programs on the PATH; give their weights."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("mri_synthstrip", "hd-bet"):
        (folder / name).write_text(STAND_IN)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    weights = {"synthstrip": tmp_path / "synthstrip.1.pt", "hd-bet": tmp_path / HD_BET_FOLDER}
    weights["synthstrip"].touch()
    weights["hd-bet"].mkdir()
    return weights


def head(folder: Path) -> Path:
    data = np.random.default_rng(0).normal(20.0, 2.0, (60, 60, 60)).astype(np.float32)
    data[20:40, 15:45, 20:40] = 100.0
    return save(folder / "head.nii.gz", data, AFFINE)


@pytest.mark.parametrize("name", ["synthstrip", "hd-bet"])
def test_brain_mask_uses_the_mask_of_an_external_program(
    name: str, programs, tmp_path: Path, reference: Reference, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    extraction = resolve_extraction(name, programs[name])
    assert extraction.weights == programs[name]
    assert all(path.is_file() for path in extraction.files)
    found = (
        BrainMask(
            in_file=str(head(tmp_path)),
            template=str(reference.t1w),
            template_mask=str(reference.brain_mask),
            program=name,
            weights=str(programs[name]),
        )
        .run()
        .outputs
    )
    mask = nib.load(found.out_mask)
    np.testing.assert_array_equal(mask.affine, AFFINE)
    assert mask.get_fdata().sum() == 20 * 30 * 20
    assert mask.get_fdata()[25, 20, 25] == 1
    assert found.skull_stripped is False


def test_run_external_program_error_has_the_scan_and_the_last_line(programs, tmp_path: Path) -> None:
    empty = save(tmp_path / "sub-01_T1w.nii.gz", np.ones((20, 20, 20), np.float32), AFFINE)
    with pytest.raises(InputError, match=r"sub-01_T1w.*SynthStrip wrote no brain mask.*nothing there"):
        run_external_program("synthstrip", programs["synthstrip"], empty, tmp_path)


def test_resolve_extraction_reports_missing_programs_and_weights(
    programs, tmp_path: Path, monkeypatch
) -> None:
    assert resolve_extraction("template", None) == Extraction("template")
    with pytest.raises(UnavailableError, match="needs --brain-extraction-weights"):
        resolve_extraction("synthstrip", None)
    packaged = resolve_extraction("combined", None)
    assert packaged.files == [packaged.weights]
    assert packaged.weights.is_file()
    own = programs["synthstrip"]
    assert resolve_extraction("network", own) == Extraction("network", own)
    with pytest.raises(UnavailableError, match="does not exist"):
        resolve_extraction("synthstrip", tmp_path / "none.pt")
    with pytest.raises(UnavailableError, match=HD_BET_FOLDER):
        resolve_extraction("hd-bet", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(UnavailableError, match="mri_synthstrip or nipreps-synthstrip is not on the PATH"):
        resolve_extraction("synthstrip", programs["synthstrip"])
