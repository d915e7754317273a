"""Compare feature networks, and training tasks of the network ``mri``, by the AUPRC of detectors.

``python -m benchmarks.backbones TRAIN LESIONS... --modality T2w`` takes folders of preprocessed scans:
healthy ones with tissue classes for training, and folders of scans with lesion masks. Results are the average
precision (AUPRC) over brain voxels of each scan, its mean, and the mean difference to ``mri`` with its 95 %
bootstrap interval over participants, in ``benchmarks/results/backbones-T2w.json`` or in ``--output``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score
from torch import Generator, Tensor

from benchmarks.scan import read
from bids_uad.dataset.sri24_scans import PreprocessedScan, find_preprocessed
from bids_uad.engine.bundle import CORRECTED
from bids_uad.engine.inference import anomaly_map
from bids_uad.evaluation.bootstrap import bootstrap_interval
from bids_uad.methods.base import Batch, FeatureDetector, GradientStage
from bids_uad.methods.registry import build_detector, preset_of
from bids_uad.networks.backbones import LESIONS, LITE, MRI, BackboneConfig
from bids_uad.networks.synthetic_anomalies import cut_windows, uniform, vary_intensity
from bids_uad.training.backbone import initialise_backbone
from bids_uad.training.loop import TrainingData, TrainingSettings, start_fabric, train_detector
from bids_uad.training.store import SliceStore, TrainingScan

RESULTS = Path(__file__).parent / "results"
DETECTORS = ("patchcore", "fae", "rd", "uniad")
CELL = 16
"""Side in pixels of the squares that are hidden in masked modelling."""
HIDDEN_FRACTION = 0.5
"""Fraction of hidden squares."""
N_LOCATIONS = 256
"""Locations per slice in contrastive learning."""
TEMPERATURE = 0.1
"""Temperature of the contrastive loss."""


def _windows(detector: FeatureDetector, batch: Batch, generator: Generator) -> tuple[Tensor, Tensor]:
    config = detector.hyper.backbone
    return cut_windows(batch.slices, batch.brain, config.window, config.augmentation, generator)


def tissue_loss(detector: FeatureDetector, batch: Batch, generator: Generator) -> Tensor:
    """Compute the cross-entropy of the tissue classes without painted anomalies."""
    config = detector.hyper.backbone
    images, tissue = cut_windows(
        batch.slices, batch.tissue[:, None], config.window, config.augmentation, generator
    )
    images = vary_intensity(images, tissue > 0, config.augmentation, generator)
    return F.cross_entropy(detector.backbone.classify(images), tissue[:, 0])


def masked_loss(detector: FeatureDetector, batch: Batch, generator: Generator) -> Tensor:
    """Compute the mean absolute error of the intensity inside hidden squares."""
    images, brain = _windows(detector, batch, generator)
    rows, columns = images.shape[-2] // CELL, images.shape[-1] // CELL
    cells = uniform((len(images), 1, rows, columns), 0, 1, generator) < HIDDEN_FRACTION
    hidden = F.interpolate(cells.float(), scale_factor=CELL) > 0
    predicted = detector.backbone.classify(images.masked_fill(hidden, 0))[:, :1]
    return (predicted - images).abs()[hidden & brain].mean()


def contrastive_loss(detector: FeatureDetector, batch: Batch, generator: Generator) -> Tensor:
    """Compute InfoNCE: match locations of a slice between two augmentations of it."""
    config = detector.hyper.backbone
    images, brain = _windows(detector, batch, generator)
    first, second = (
        detector.backbone(vary_intensity(images, brain, config.augmentation, generator)) for _ in range(2)
    )
    losses = []
    for one, other in zip(first[1:], second[1:], strict=True):
        inside = F.interpolate(brain.float(), size=one.shape[-2:]) > 0
        for k in range(len(one)):
            where = inside[k, 0].flatten().nonzero()[:, 0]
            where = where[torch.randperm(len(where), generator=generator)[:N_LOCATIONS]]
            a, b = (F.normalize(part[k].flatten(1)[:, where].T, dim=1) for part in (one, other))
            losses.append(F.cross_entropy(a @ b.T / TEMPERATURE, torch.arange(len(where))))
    return torch.stack(losses).mean()


REFERENCE, IMAGENET, SEGMENTATION = "painted anomalies", "ImageNet", "painted lesions"
"""Network ``mri`` as trained by the package, EfficientNet-Lite0 with ImageNet weights, and network of PLS."""
NAMES = {IMAGENET: LITE, SEGMENTATION: LESIONS}
"""Feature network of each task whose weights are loaded; that of the others is ``mri``."""
LOSSES: dict[str, Callable[[FeatureDetector, Batch, Generator], Tensor]] = {
    REFERENCE: FeatureDetector.feature_loss,
    "segmentation": tissue_loss,
    "masked modelling": masked_loss,
    "contrastive": contrastive_loss,
}
TAPS = {
    LITE: {"patchcore": (2, 3), "fae": (1, 2, 3), "rd": (1, 2, 3), "uniad": (1, 2, 3, 4)},
    MRI: {"patchcore": (1, 2), "fae": (1, 2), "rd": (0, 1, 2), "uniad": (1, 2)},
}
"""Maps that the detectors use of feature networks other than that of preset ``lite``."""
TASKS = (REFERENCE, IMAGENET, SEGMENTATION, "untrained", *list(LOSSES)[1:])


def candidate(name: str, modality: str, task: str) -> FeatureDetector:
    """Build a detector of preset ``lite`` whose feature network has given weights or is trained by a task.

    Parameters
    ----------
    name : str
        One of `DETECTORS`.
    modality : {"T1w", "T2w"}
        Modality of the detector.
    task : str
        One of `TASKS`.

    Returns
    -------
    FeatureDetector
        Detector; its feature maps are those of the preset, or of `TAPS` for another network.
    """
    torch.manual_seed(0)
    hyper = preset_of(name, "lite", modality)
    backbone = hyper.backbone
    network = NAMES.get(task, MRI)
    if backbone.name != network:
        backbone = BackboneConfig(name=network, taps=TAPS[network][name])
    detector = build_detector(name, replace(hyper, backbone=backbone))
    initialise_backbone(detector, modality)
    stages = []
    if task in LOSSES:
        loss = partial(LOSSES[task], detector)
        stages = [GradientStage.scheduled(task, detector.backbone, loss, backbone)]
    detector.backbone_stages = lambda: stages
    return detector


def precision_of(detector: FeatureDetector, scans: list[PreprocessedScan]) -> dict[str, float]:
    """Compute the average precision of a detector in each scan."""
    precisions = {}
    for scan in scans:
        volume, brain, lesion = read(scan.image), read(scan.brain) > 0, read(scan.lesion) > 0
        scores = anomaly_map(detector, volume, brain, key=scan.key)
        precisions[scan.subject] = float(average_precision_score(lesion[brain], scores[brain]))
    return precisions


def compare(found: dict[str, float], reference: dict[str, float]) -> dict[str, float | list[float]]:
    """Compute the mean difference of paired scans, and its 95 % bootstrap interval.

    Parameters
    ----------
    found, reference : dict of str to float
        AUPRC of the same participants.

    Returns
    -------
    dict
        `mean` and `interval`; the limits are NaN for fewer than five participants.
    """
    difference = np.array([found[subject] - reference[subject] for subject in found])
    return {
        "mean": float(difference.mean()),
        "interval": list(bootstrap_interval(difference, list(found), seed=0)),
    }


def main() -> None:
    """Train and evaluate the detectors with each feature network, and write a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("train", type=Path)
    parser.add_argument("lesions", type=Path, nargs="+")
    parser.add_argument("--modality", choices=("T1w", "T2w"), default="T2w")
    parser.add_argument("--detectors", nargs="+", choices=DETECTORS, default=DETECTORS[:1])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument(
        "--steps", type=int, help="training steps of each stage (default: those of the preset)"
    )
    parser.add_argument("--output", type=Path, help="file of the results (default: backbones-MODALITY.json)")
    parser.add_argument("-w", "--work-dir", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    torch.set_num_threads(1)
    healthy = find_preprocessed(args.train, args.modality)
    subjects = [TrainingScan(scan.image, scan.brain, scan.tissue, scan.subject) for scan in healthy]
    store = SliceStore.open_or_build(subjects, args.work_dir, CORRECTED)
    fabric = start_fabric(torch.device("cpu"))
    rows = []
    for name in args.detectors:
        reference = {}
        for task in args.tasks:
            detector = candidate(name, args.modality, task)
            schedule = TrainingSettings(0, args.steps)
            with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
                train_detector(detector, TrainingData.all_of(store), schedule, Path(folder), fabric=fabric)
            row = {"detector": name, "task": task}
            for folder in args.lesions:
                scans = [scan for scan in find_preprocessed(folder, args.modality) if scan.lesion]
                found = precision_of(detector, scans)
                row[folder.name] = {"auprc": float(np.mean(list(found.values()))), "scans": found}
                if task == REFERENCE:
                    reference[folder.name] = found
                elif reference:
                    row[folder.name]["difference"] = compare(found, reference[folder.name])
            rows.append(row)
            print(json.dumps(row), flush=True)
    results = {"modality": args.modality, "steps": args.steps, "rows": rows}
    output = args.output or RESULTS / f"backbones-{args.modality}.json"
    output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
