"""Compare training tasks of the feature network by the AUPRC of PatchCore.

``python -m benchmarks.backbones TRAIN LESIONS... --modality T2w`` takes folders of preprocessed scans:
healthy ones with tissue classes for training, and folders of scans with lesion masks. Results are average
precision (AUPRC) over brain voxels, averaged over scans, in ``benchmarks/results/backbones-T2w.json``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
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
from bids_uad.methods.base import Batch, GradientStage
from bids_uad.methods.patchcore import PatchCore
from bids_uad.networks.synthetic_anomalies import cut_windows, uniform, vary_intensity
from bids_uad.training.loop import TrainingData, TrainingSettings, start_fabric, train_detector
from bids_uad.training.store import SliceStore, TrainingScan

RESULTS = Path(__file__).parent / "results"
CELL = 16
"""Side in pixels of the squares that are hidden in masked modelling."""
HIDDEN_FRACTION = 0.5
"""Fraction of hidden squares."""
N_LOCATIONS = 256
"""Locations per slice in contrastive learning."""
TEMPERATURE = 0.1
"""Temperature of the contrastive loss."""
TASKS = ("untrained", "segmentation", "painted anomalies", "masked modelling", "contrastive")


class Candidate(PatchCore):
    """PatchCore whose backbone is trained by one of `TASKS`."""

    def __init__(self, task: str) -> None:
        super().__init__(PatchCore.presets["lite"])
        self.task = task

    def backbone_stages(self) -> list[GradientStage]:
        """Return the stage of the task; an empty list for an untrained backbone."""
        losses: dict[str, Callable] = {
            "segmentation": self.tissue_loss,
            "painted anomalies": self.feature_loss,
            "masked modelling": self.masked_loss,
            "contrastive": self.contrastive_loss,
        }
        if self.task not in losses:
            return []
        return [GradientStage.scheduled(self.task, self.backbone, losses[self.task], self.hyper.backbone)]

    def _windows(self, batch: Batch, generator: Generator) -> tuple[Tensor, Tensor]:
        config = self.hyper.backbone
        return cut_windows(batch.slices, batch.brain, config.window, config.augmentation, generator)

    def tissue_loss(self, batch: Batch, generator: Generator) -> Tensor:
        """Compute the cross-entropy of the tissue classes without painted anomalies."""
        config = self.hyper.backbone
        images, tissue = cut_windows(
            batch.slices, batch.tissue[:, None], config.window, config.augmentation, generator
        )
        images = vary_intensity(images, tissue > 0, config.augmentation, generator)
        return F.cross_entropy(self.backbone.classify(images), tissue[:, 0])

    def masked_loss(self, batch: Batch, generator: Generator) -> Tensor:
        """Compute the mean absolute error of the intensity inside hidden squares."""
        images, brain = self._windows(batch, generator)
        rows, columns = images.shape[-2] // CELL, images.shape[-1] // CELL
        cells = uniform((len(images), 1, rows, columns), 0, 1, generator) < HIDDEN_FRACTION
        hidden = F.interpolate(cells.float(), scale_factor=CELL) > 0
        predicted = self.backbone.classify(images.masked_fill(hidden, 0))[:, :1]
        return (predicted - images).abs()[hidden & brain].mean()

    def contrastive_loss(self, batch: Batch, generator: Generator) -> Tensor:
        """Compute InfoNCE: match locations of a slice between two augmentations of it."""
        config = self.hyper.backbone
        images, brain = self._windows(batch, generator)
        first, second = (
            self.backbone(vary_intensity(images, brain, config.augmentation, generator)) for _ in range(2)
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


def precision_of(detector: PatchCore, scans: list[PreprocessedScan]) -> list[float]:
    """Compute the average precision of a detector in each scan."""
    precisions = []
    for scan in scans:
        volume, brain, lesion = read(scan.image), read(scan.brain) > 0, read(scan.lesion) > 0
        scores = anomaly_map(detector, volume, brain, key=scan.key)
        precisions.append(float(average_precision_score(lesion[brain], scores[brain])))
    return precisions


def main() -> None:
    """Train and evaluate one backbone per task, and write a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("train", type=Path)
    parser.add_argument("lesions", type=Path, nargs="+")
    parser.add_argument("--modality", choices=("T1w", "T2w"), default="T2w")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument(
        "--steps", type=int, help="training steps of the backbone (default: those of the preset)"
    )
    parser.add_argument("-w", "--work-dir", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    torch.set_num_threads(1)
    healthy = find_preprocessed(args.train, args.modality)
    subjects = [TrainingScan(scan.image, scan.brain, scan.tissue, scan.subject) for scan in healthy]
    store = SliceStore.open_or_build(subjects, args.work_dir, CORRECTED)
    fabric = start_fabric(torch.device("cpu"))
    rows = []
    for task in args.tasks:
        torch.manual_seed(0)
        detector = Candidate(task)
        schedule = TrainingSettings(0, args.steps)
        with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
            train_detector(detector, TrainingData.all_of(store), schedule, Path(folder), fabric=fabric)
        row = {"task": task}
        for folder in args.lesions:
            scans = [scan for scan in find_preprocessed(folder, args.modality) if scan.lesion]
            row[folder.name] = {
                "auprc": float(np.mean(precision_of(detector, scans))),
                "scans": [scan.subject for scan in scans],
            }
        rows.append(row)
        print(json.dumps(row), flush=True)
    results = {"modality": args.modality, "steps": args.steps or detector.hyper.backbone.steps, "rows": rows}
    (RESULTS / f"backbones-{args.modality}.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
