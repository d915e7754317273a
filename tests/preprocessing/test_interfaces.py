"""Brain masks that cannot be one are replaced, and what shows no brain is refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from bids_uad.errors import InputError
from bids_uad.preprocessing.brain_extraction.masks import packaged_weights
from bids_uad.preprocessing.check import is_skull_stripped
from bids_uad.preprocessing.interfaces import BrainMask, RegisterToAnchor, RegisterToReference
from bids_uad.preprocessing.reference import Reference
from bids_uad.preprocessing.registration import (
    CUBE,
    EDGE,
    Volume,
    local_correlation,
)
from bids_uad.preprocessing.resampling import rotation_about, translation, write_itk

from .conftest import NATIVE_AFFINE, NATIVE_SHAPE, draw, known_move, save, t2w_like
from .test_brain_masks import dice, head_around


@pytest.fixture(scope="module")
def brain(reference_volume: Volume) -> np.ndarray:
    return draw(reference_volume, known_move(), NATIVE_SHAPE, NATIVE_AFFINE)


@pytest.fixture(scope="module")
def badly_stripped(brain: np.ndarray) -> np.ndarray:
    """A brain, skull and scalp on a background of exactly 0: 2.8 L."""
    distance = ndimage.distance_transform_edt(brain == 0) * 3.0
    return np.where(distance < 16, head_around(brain), 0.0)


def find_mask(data: np.ndarray, reference: Reference, folder: Path, **inputs: object):
    """Run the interface with the packaged network; give its outputs and the mask."""
    interface = BrainMask(
        in_file=str(save(folder / "conformed.nii.gz", data.astype(np.float32), NATIVE_AFFINE)),
        source="/data/sub-01_T1w.nii.gz",
        template=str(reference.t1w),
        template_mask=str(reference.brain_mask),
        program="network",
        weights=str(packaged_weights()),
        **inputs,
    )
    outputs = interface.run(cwd=str(folder)).outputs
    return outputs, np.asarray(nib.load(outputs.out_mask).dataobj) > 0


def given(mask: np.ndarray, folder: Path) -> str:
    return str(save(folder / "sub-01_desc-brain_mask.nii.gz", mask.astype(np.uint8), NATIVE_AFFINE))


def grown(brain: np.ndarray, mm: float) -> np.ndarray:
    """A mask whose surface lies outside that of the brain, or inside."""
    mask = brain > 0
    depth = ndimage.distance_transform_edt(mask) - ndimage.distance_transform_edt(~mask)
    return depth * 3.0 > -mm


def test_brain_mask_extracts_the_brain_of_a_badly_stripped_image(
    brain: np.ndarray, badly_stripped: np.ndarray, reference: Reference, tmp_path: Path
) -> None:
    outputs, mask = find_mask(badly_stripped, reference, tmp_path, skull_stripped=True)
    assert dice(mask, brain > 0) > 0.93
    assert (outputs.origin, outputs.skull_stripped) == ("extracted", False)
    (text,) = outputs.warnings
    assert "marked or detected as skull-stripped, has 2,7" in text
    assert outputs.warnings[text] is False


def test_is_skull_stripped_is_false_for_a_badly_stripped_image(badly_stripped: np.ndarray) -> None:
    assert not is_skull_stripped(badly_stripped, NATIVE_AFFINE)


@pytest.mark.parametrize("mm", [18.0, -24.0], ids=["too large", "too small"])
def test_brain_mask_replaces_an_implausible_external_mask_by_the_background(
    mm: float, brain: np.ndarray, reference: Reference, tmp_path: Path
) -> None:
    wrong = given(grown(brain, mm), tmp_path)
    outputs, mask = find_mask(brain, reference, tmp_path, external_mask=wrong)
    np.testing.assert_array_equal(mask, brain > 0)
    assert (outputs.origin, outputs.skull_stripped) == ("background", True)
    (text,) = outputs.warnings
    assert text.startswith("The brain mask sub-01_desc-brain_mask.nii.gz of another pipeline has ")


def test_brain_mask_replaces_an_implausible_external_mask_by_extraction(
    brain: np.ndarray, reference: Reference, tmp_path: Path
) -> None:
    wrong = given(grown(brain, 18.0), tmp_path)
    outputs, mask = find_mask(head_around(brain), reference, tmp_path, external_mask=wrong)
    assert dice(mask, brain > 0) > 0.93
    assert outputs.origin == "extracted"
    assert len(outputs.warnings) == 1


def test_brain_mask_warns_of_both_implausible_masks(
    brain: np.ndarray,
    badly_stripped: np.ndarray,
    reference: Reference,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(BrainMask, "_extract", lambda *_: brain > 0)
    wrong = given(grown(brain, -24.0), tmp_path)
    outputs, _ = find_mask(badly_stripped, reference, tmp_path, external_mask=wrong, skull_stripped=True)
    assert (outputs.origin, len(outputs.warnings)) == ("extracted", 2)


def test_brain_mask_uses_a_plausible_external_mask(
    brain: np.ndarray, reference: Reference, tmp_path: Path
) -> None:
    outputs, mask = find_mask(brain, reference, tmp_path, external_mask=given(grown(brain, -6.0), tmp_path))
    np.testing.assert_array_equal(mask, grown(brain, -6.0))
    assert (outputs.origin, outputs.warnings) == ("given", {})


@pytest.mark.parametrize("millilitres", [400, 2500])
def test_brain_mask_refuses_a_scan_without_plausible_brain(
    millilitres: int, brain: np.ndarray, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = np.zeros(NATIVE_SHAPE, bool)
    mask.flat[: round(millilitres * 1000 / 27)] = True
    monkeypatch.setattr("bids_uad.preprocessing.interfaces.extract_brain", lambda *_: (mask, None))
    said = rf"^/data/sub-01_T1w.nii.gz: brain extraction failed: .* {millilitres:,} mL .*700 to 2,300 mL\); "
    with pytest.raises(InputError, match=said):
        find_mask(head_around(brain), reference, tmp_path)


@pytest.mark.parametrize("wrong", ["head", "scrap"])
def test_register_to_anchor_uses_the_t1w_mask_for_an_implausible_t2w_mask(
    wrong: str, brain: np.ndarray, tmp_path: Path
) -> None:
    t2w = t2w_like(brain)
    if wrong == "head":
        distance = ndimage.distance_transform_edt(brain == 0) * 3.0
        t2w = np.where(brain > 0, t2w, np.where(distance < 16, 300.0, 0.0))
    else:  # a slab that was brought to a larger grid
        t2w[:, :, :30] = t2w[:, :, 44:] = 0.0
    interface = RegisterToAnchor(
        in_file=str(save(tmp_path / "T2w.nii.gz", t2w.astype(np.float32), NATIVE_AFFINE)),
        anchor=str(save(tmp_path / "brain.nii.gz", brain, NATIVE_AFFINE)),
        anchor_mask=given(brain > 0, tmp_path),
        anchor_xfm=str(write_itk(tmp_path / "xfm.txt", known_move())),
        skull_stripped=True,
        aligned=True,
    )
    outputs = interface.run(cwd=str(tmp_path)).outputs
    np.testing.assert_array_equal(np.asarray(nib.load(outputs.out_mask).dataobj) > 0, brain > 0)
    assert (outputs.origin, outputs.skull_stripped) == ("anchor", False)
    (text,) = outputs.warnings
    assert "only the T1w image's brain mask was used" in text


SHAPE, AFFINE = (56, 60, 56), nib.affines.from_matvec(np.diag([3.5] * 3), [-96, -103, -96])


def phantom(kind: str) -> np.ndarray:
    """An object of about 1.3 L on a background of exactly 0."""
    x, y, z = np.meshgrid(*[(np.arange(n) - (n - 1) / 2) * 3.5 for n in SHAPE], indexing="ij")
    cylinder = (np.hypot(x, y) < 62) & (np.abs(z) < 55)
    data = np.where(np.sqrt(x**2 + y**2 + z**2) < 68 if kind == "ball" else cylinder, 500.0, 0.0)
    if kind == "grid":
        data[cylinder & ((np.abs(x) % 21 < 5) | (np.abs(y) % 21 < 5))] = 60.0
    if kind == "rods":
        for number, angle in enumerate(np.arange(0, 2 * np.pi, np.pi / 4)):
            rod = np.hypot(x - 40 * np.cos(angle), y - 40 * np.sin(angle)) < 6 + number
            data[cylinder & rod] = 80.0 + 100 * number
    if kind == "trunk":
        data[cylinder & (np.hypot(x, y - 20) < 14)] = 300.0
        data[cylinder & (np.hypot(x, y - 20) < 14) & (np.abs(z) % 28 < 6)] = 120.0
        data[cylinder & (np.hypot(x, y + 8) < 10)] = 100.0
        data[cylinder & (np.hypot(x, y + 8) < 5)] = 420.0
    noise = np.random.default_rng(0).normal(0, 10, SHAPE)
    return np.where(data > 0, np.maximum(data + noise, 1.0), 0.0)


def register_phantom(kind: str, reference: Reference, folder: Path, **inputs: object) -> None:
    data = phantom(kind)
    assert is_skull_stripped(data, AFFINE)
    RegisterToReference(
        in_file=str(save(folder / "brain.nii.gz", data.astype(np.float32), AFFINE)),
        mask=str(save(folder / "mask.nii.gz", (data > 0).astype(np.uint8), AFFINE)),
        source="/data/sub-phantom_T1w.nii.gz",
        reference=str(reference.t1w),
        reference_mask=str(reference.brain_mask),
        **inputs,
    ).run(cwd=str(folder))


PHANTOMS = ["ball", "cylinder", "grid", "rods", "trunk"]
REFUSED = r"^/data/sub-phantom_T1w.nii.gz: shows no brain: "


@pytest.mark.parametrize("angle", [0.0, 40.0])
@pytest.mark.parametrize("kind", PHANTOMS)
def test_register_to_reference_interface_refuses_a_phantom(
    kind: str, angle: float, reference: Reference, tmp_path: Path
) -> None:
    centre = np.array([-119.0, 116.0, 76.0])  # of the reference brain
    pull = translation(-centre) @ rotation_about(centre, (0.0, angle, 0.0))
    xfm = write_itk(tmp_path / "given.txt", pull)
    with pytest.raises(InputError, match=REFUSED):
        register_phantom(kind, reference, tmp_path, external_xfm=str(xfm))


@pytest.mark.slow
@pytest.mark.parametrize("kind", PHANTOMS)
def test_register_interfaces_refuse_a_phantom(kind: str, reference: Reference, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=REFUSED):
        register_phantom(kind, reference, tmp_path)


def test_local_correlation_is_the_median_of_the_cubes() -> None:
    random = np.random.default_rng(2)
    one, other = random.normal(size=(2, 40, 44, 38))
    other += 0.7 * one
    mask = np.zeros(one.shape, bool)
    mask[1:-1, 1:-1, 1:-1] = True
    inner = ndimage.binary_erosion(mask, iterations=EDGE)
    correlations = []
    for start in itertools.product(*[range(0, n, CUBE) for n in one.shape]):
        cube = tuple(slice(s, s + CUBE) for s in start)
        chosen = inner[cube]
        if chosen.sum() >= CUBE**3 / 2:
            correlations.append(np.corrcoef(one[cube][chosen], other[cube][chosen])[0, 1])
    found = local_correlation(Volume(one, np.eye(4), mask), Volume(other, np.eye(4)), np.eye(4))
    assert found == pytest.approx(np.median(correlations), abs=1e-4)
    assert local_correlation(Volume(one, np.eye(4), mask), Volume(-other, np.eye(4)), np.eye(4)) < -0.5
    assert local_correlation(Volume(one, np.eye(4), mask & False), Volume(other, np.eye(4)), np.eye(4)) == 0
