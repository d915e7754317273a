"""From a whole head to the tumour in it, against known masks and transforms; see tests/data/README.md."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from bids_uad import space
from bids_uad.engine.bundle import load_detector, resolve_bundles
from bids_uad.engine.inference import anomaly_map
from bids_uad.images import scale_intensity
from bids_uad.preprocessing.brain_extraction.masks import extract_brain, packaged_weights
from bids_uad.preprocessing.brain_extraction.network import load_network, predict_brain_mask
from bids_uad.preprocessing.intensity_correction import correct_bias
from bids_uad.preprocessing.registration import Volume, register_to_anchor, register_to_reference
from bids_uad.preprocessing.resampling import resample, resample_mask

HEAD = Path(__file__).parents[1] / "data" / "whole_head"


@dataclass(frozen=True)
class Truth:
    """A scan of the head with its true brain and lesion masks, all on one grid."""

    data: np.ndarray
    affine: np.ndarray
    brain: np.ndarray
    lesion: np.ndarray
    to_head: np.ndarray

    def points(self) -> np.ndarray:
        """World coordinates of every 997th brain voxel, homogeneous, shape (4, N)."""
        voxels = np.argwhere(self.brain)[::997]
        return self.affine @ np.vstack([voxels.T, np.ones(len(voxels))])


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2.0 * float((a & b).sum()) / float(a.sum() + b.sum())


def distances(pull: np.ndarray, truth: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Distance in mm between the images of points under two transforms."""
    return np.linalg.norm(((pull - truth) @ points)[:3], axis=0)


def true_transforms() -> dict:
    return json.loads((HEAD / "transforms.json").read_text())


@pytest.fixture(scope="module")
def truths() -> dict[str, Truth]:
    """Both scans; SciPy alone brings the masks from the T1w to the T2w scan."""
    found = {}
    masks = {name: nib.load(HEAD / f"{name}_mask.nii.gz") for name in ("brain", "lesion")}
    to_head = {name: np.array(matrix) for name, matrix in true_transforms()["scanner_to_head"].items()}
    for modality in ("T1w", "T2w"):
        scan = nib.load(HEAD / f"{modality}.nii.gz")
        to_t1w = np.linalg.inv(to_head["T1w"]) @ to_head[modality]
        moved = {}
        for name, mask in masks.items():
            matrix = np.linalg.inv(mask.affine) @ to_t1w @ scan.affine
            share = np.asarray(mask.dataobj, dtype=np.float32)
            moved[name] = ndimage.affine_transform(share, matrix[:3], output_shape=scan.shape, order=1) > 0.5
        data = np.asarray(scan.dataobj, dtype=np.float32)
        found[modality] = Truth(data, scan.affine, **moved, to_head=to_head[modality])
    return found


@pytest.fixture(scope="module")
def seen(truths) -> dict[str, np.ndarray]:
    """Brain masks of the network."""
    network = load_network(packaged_weights())
    return {
        modality: predict_brain_mask(scan.data, scan.affine, network) for modality, scan in truths.items()
    }


@pytest.fixture(scope="module")
def t1w_brain(truths, seen, tmp_path_factory) -> Volume:
    """The T1w brain, extracted and corrected for its bias field, on black."""
    scan = truths["T1w"]
    folder = tmp_path_factory.mktemp("extraction")
    mask, agreement = extract_brain(Volume(scan.data, scan.affine), None, folder, seen["T1w"])
    assert agreement is None
    return Volume(np.where(mask, correct_bias(scan.data, scan.affine, mask), 0), scan.affine, mask)


@pytest.fixture(scope="module")
def t1w_pull(t1w_brain, reference_volume, tmp_path_factory) -> np.ndarray:
    """From the reference image to the T1w scan."""
    pull, qc = register_to_reference(reference_volume, t1w_brain)
    assert qc["restarted"] is False
    return pull


@pytest.fixture(scope="module")
def t2w_pull(truths, t1w_brain) -> np.ndarray:
    """From the T1w scan to the T2w scan."""
    scan = truths["T2w"]
    pull, _ = register_to_anchor(t1w_brain, Volume(scan.data, scan.affine))
    return pull


@pytest.fixture(scope="module")
def t2w(truths, t1w_brain, t1w_pull, t2w_pull) -> tuple[Volume, np.ndarray]:
    """The T2w head, corrected inside the T1w scan's brain, and the pull from the reference."""
    scan = truths["T2w"]
    grid = (scan.data.shape, scan.affine, np.linalg.inv(t2w_pull))
    mask = resample_mask(t1w_brain.mask, t1w_brain.affine, *grid)
    return Volume(correct_bias(scan.data, scan.affine, mask), scan.affine, mask), t2w_pull @ t1w_pull


# The true mask shifted by 4.8 mm has a Dice of 0.94 with itself, grown or shrunk by 3.2 mm one of 0.93.
@pytest.mark.parametrize(("modality", "least"), [("T1w", 0.95), ("T2w", 0.915)])
def test_the_network_finds_the_brain(truths, seen, modality, least) -> None:
    assert dice(seen[modality], truths[modality].brain) > least


def test_intensities_refine_the_brain(truths, t1w_brain) -> None:
    assert dice(t1w_brain.mask, truths["T1w"].brain) > 0.965


@pytest.mark.slow
@pytest.mark.parametrize(
    ("modality", "network", "least"),
    [("T1w", True, 0.965), ("T2w", True, 0.935), ("T1w", False, 0.965), ("T2w", False, 0.97)],
)
def test_the_template_finds_the_brain(
    truths, seen, reference_volume, modality, network, least, tmp_path
) -> None:
    scan = truths[modality]
    given = seen[modality] if network else None
    mask, agreement = extract_brain(Volume(scan.data, scan.affine), reference_volume, tmp_path, given)
    assert dice(mask, scan.brain) > least
    assert (agreement is not None) == network


def test_the_head_is_registered_to_the_template(truths, t1w_pull, reference_volume) -> None:
    """The person is no rigid copy of the template: the true transform is a least-squares fit, too."""
    truth = np.linalg.inv(truths["T1w"].to_head) @ np.array(true_transforms()["template_to_head"])
    voxels = np.argwhere(reference_volume.mask)[::997]
    points = reference_volume.affine @ np.vstack([voxels.T, np.ones(len(voxels))])
    apart = distances(t1w_pull, truth, points)
    assert apart.mean() < 1.5
    assert apart.max() < 3.0
    # Both are far from where the registration starts.
    assert distances(np.eye(4), truth, points).mean() > 20


def test_the_t2w_scan_is_registered_to_the_t1w_scan(truths, t2w_pull) -> None:
    truth = np.linalg.inv(truths["T2w"].to_head) @ truths["T1w"].to_head
    points = truths["T1w"].points()
    assert distances(t2w_pull, truth, points).mean() < 0.25
    assert distances(np.eye(4), truth, points).mean() > 2


def best_dice(scores: np.ndarray, truth: np.ndarray) -> float:
    """Highest Dice of scores and truth over all thresholds."""
    falling = truth[np.argsort(-scores, kind="stable")]
    hits = np.cumsum(falling)
    return float((2 * hits / (np.arange(1, len(hits) + 1) + hits[-1])).max())


@pytest.mark.slow
@pytest.mark.parametrize(("modality", "least"), [("T1w", 0.48), ("T2w", 0.6)])
def test_the_default_detector_finds_the_tumour(truths, t1w_brain, t1w_pull, t2w, modality, least) -> None:
    """By its fixed decision rule, better than intensities at their best threshold, and at the right place."""
    scan = truths[modality]
    volume, pull = (t1w_brain, t1w_pull) if modality == "T1w" else t2w
    grid = (space.SHAPE, space.AFFINE, pull)
    brain = resample_mask(volume.mask, scan.affine, *grid)
    lesion = resample_mask(scan.lesion, scan.affine, *grid) & brain
    image = scale_intensity(resample(volume.data, scan.affine, *grid), brain)
    (bundle,) = resolve_bundles(["pls"], [modality], ["none"])
    scores = anomaly_map(load_detector(bundle), image, brain, key="head")
    assert dice(bundle.rule.mask(scores, brain), lesion) > least

    smooth = ndimage.median_filter(image, 3)[brain]
    assert max(best_dice(sign * smooth, lesion[brain]) for sign in (1, -1)) < least
    radius = (3 * lesion.sum() / (4 * np.pi)) ** (1 / 3)
    for axis in range(3):
        assert dice(np.roll(lesion, round(radius), axis), lesion) < least
