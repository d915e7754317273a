"""Short trainings of every detector on simulated healthy brains, evaluated on inserted anomalies."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from bids_uad.dataset.sri24_scans import find_preprocessed
from bids_uad.engine.inference import anomaly_map
from bids_uad.methods.registry import DETECTORS, build_detector
from bids_uad.simulation.__main__ import main as simulate
from bids_uad.training.backbone import initialise_backbone
from bids_uad.training.loop import TrainingData, TrainingSettings, start_fabric, train_detector
from bids_uad.training.store import SliceStore, TrainingScan

CPU = torch.device("cpu")
TRAINING_SUBJECTS, TEST_SUBJECTS, VOLUMES = 4, 2, 10
STEPS = {"rd": 100, "uniad": 100}  # their features are those of a trained network
OTHER_STEPS = 300
SLAB = 12  # slices scored on either side of what was planted

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("brains")
    count = str(TRAINING_SUBJECTS + TEST_SUBJECTS)
    assert simulate([str(folder), "--healthy", count, "--seed", "11", "--derivatives"]) in (0, None)
    return find_preprocessed(folder, "T2w")


@pytest.fixture(scope="module")
def store(scans, tmp_path_factory):
    subjects = [TrainingScan(scan.image, scan.brain, scan.tissue) for scan in scans[:TRAINING_SUBJECTS]]
    return SliceStore.build(subjects, tmp_path_factory.mktemp("slices"))


@pytest.fixture(scope="module")
def volumes(scans):
    """Ten volumes of other brains, each with a bright ball of random location and size."""
    rng = np.random.default_rng(3)
    made = []
    for number in range(VOLUMES):
        scan = scans[TRAINING_SUBJECTS + number % TEST_SUBJECTS]
        volume = np.asarray(nib.load(scan.image).dataobj, dtype=np.float32)
        brain = np.asarray(nib.load(scan.brain).dataobj) > 0
        middle = brain & (np.abs(np.arange(155) - 80) < 30)
        inside = np.argwhere(middle)
        centre, radius = inside[rng.integers(len(inside))], rng.uniform(7, 12)
        distance = np.sqrt(
            sum((axis - c) ** 2 for axis, c in zip(np.ogrid[:240, :240, :155], centre, strict=True))
        )
        planted = (distance < radius) & brain
        ball = 0.8 + rng.normal(0, 0.03, volume.shape).astype(np.float32)
        slab = np.zeros(155, dtype=bool)
        slab[max(0, centre[2] - SLAB) : centre[2] + SLAB] = True
        made.append((np.where(planted, ball, volume).clip(0, 1), brain & slab, planted & slab))
    return made


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", [name for name in DETECTORS if name != "intensity"])
def test_inserted_anomalies_have_higher_scores_than_healthy_tissue(name, store, volumes, tmp_path):
    torch.manual_seed(0)
    detector = build_detector(name, "lite")
    initialise_backbone(detector, "T2w")
    train_detector(
        detector,
        TrainingData.all_of(store),
        TrainingSettings(0, STEPS.get(name, OTHER_STEPS)),
        tmp_path,
        fabric=start_fabric(CPU),
    )
    gains = []
    for number, (volume, brain, planted) in enumerate(volumes):
        scores = anomaly_map(detector, volume, brain, key=f"volume-{number}")
        precision = average_precision_score(planted[brain], scores[brain])
        gains.append(precision / planted[brain].mean())
    assert np.mean(gains) >= 3, gains
