"""Images of one participant that disagree about left and right."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from bids_uad import space
from bids_uad.images import save_image
from bids_uad.levels.participant.summary import find_left_right_swaps, write_reports
from bids_uad.preprocessing.reference import resolve_reference
from bids_uad.preprocessing.resampling import resample, rotation_about, translation

CENTRE = np.array([-119.0, 116.0, 76.0])


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, np.ndarray]:
    """The built-in reference, which is symmetric, and its mask."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TEMPLATEFLOW_HOME", raising=False)
        found = resolve_reference(None, tmp_path_factory.mktemp("cache"))
    return nib.load(found.t1w).get_fdata(dtype=np.float32) / 1000, nib.load(found.brain_mask).get_fdata() > 0


def person(template: tuple[np.ndarray, np.ndarray], seed: int) -> np.ndarray:
    """The reference with an asymmetry of its own: smooth changes by a fifth."""
    image, mask = template
    random = np.random.default_rng(seed).normal(size=[n // 4 + 1 for n in space.SHAPE]).astype(np.float32)
    field = ndimage.zoom(ndimage.gaussian_filter(random, 2.0), 4, order=1)
    field = field[: space.SHAPE[0], : space.SHAPE[1], : space.SHAPE[2]]
    return np.where(mask, image * (1 + 0.2 * field / field.std()), 0.0)


def write(out: Path, name: str, image: np.ndarray, modality: str = "T1w", brain: str = "brain") -> None:
    """Write an image as preprocessing leaves it: a degree and a millimetre away from its ideal place."""
    move = rotation_about(CENTRE, (1.0, -0.5, 0.5)) @ translation(np.array([1.0, 0.5, -0.5]))
    moved = resample(image, space.AFFINE, space.SHAPE, space.AFFINE, move)
    noise = np.random.default_rng(sum(name.encode())).normal(0, 0.03, space.SHAPE)
    mask = moved > 0.05
    start = out / "sub-01" / "anat" / f"{name}_space-SRI24_desc-"
    moved = np.where(mask, np.maximum(moved + noise, 0.01), 0.0)
    save_image(space.to_image(moved), f"{start}preproc_{modality}.nii.gz")
    save_image(space.to_image(mask, np.uint8), f"{start}{brain}_mask.nii.gz")


def test_an_image_with_left_and_right_swapped_is_found(template, tmp_path: Path, caplog, monkeypatch) -> None:
    image = person(template, 0)
    write(tmp_path, "sub-01", image)
    write(tmp_path, "sub-01_rec-flipped", image[::-1])
    found = find_left_right_swaps(tmp_path, "01")
    assert list(found) == [("sub-01_rec-flipped", "T1w")]
    text = found["sub-01_rec-flipped", "T1w"]
    assert text.startswith("Left and right are swapped between sub-01_T1w and sub-01_rec-flipped_T1w: ")
    config = SimpleNamespace(output_dir=tmp_path, bids_dir=tmp_path, nprocs=1)
    monkeypatch.setattr(logging.getLogger("bids_uad"), "propagate", True)
    with caplog.at_level(logging.WARNING, "bids_uad"):
        assert write_reports(config, ["01"]) == []
    assert text in caplog.messages
    assert (tmp_path / "sub-01.html").read_text().count(text) == 1


def test_other_images_are_left_alone(template, tmp_path: Path) -> None:
    """The same brain again, in another contrast, the brain of another person, and a T2w of its session."""
    image = person(template, 0)
    write(tmp_path, "sub-01_run-1", image)
    write(tmp_path, "sub-01_run-2", image)
    write(tmp_path, "sub-01_run-3", np.where(image > 0, 1.3 - image, 0.0), "T2w")
    write(tmp_path, "sub-01_run-4", person(template, 1))
    write(tmp_path, "sub-01_run-1", np.where(image > 0, 1.3 - image, 0.0)[::-1], "T2w", "T2wBrain")
    assert find_left_right_swaps(tmp_path, "01") == {}


def test_images_that_failed_are_compared_with_one_that_did_not(template, tmp_path: Path) -> None:
    image = person(template, 0)
    for run, mirrored in (("1", True), ("2", False), ("3", False)):
        write(tmp_path, f"sub-01_run-{run}", image[::-1] if mirrored else image)
    sidecar = tmp_path / "sub-01" / "anat" / "sub-01_run-1_space-SRI24_desc-preproc_T1w.json"
    sidecar.write_text(json.dumps({"PreprocessingQuality": {"failures": ["turned"]}}))
    assert list(find_left_right_swaps(tmp_path, "01")) == [("sub-01_run-1", "T1w")]
