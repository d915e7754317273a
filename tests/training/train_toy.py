"""Train toy detectors in several processes: ``python train_toy.py STORE FOLDER PROCESSES WEIGHTS``."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from bids_uad.methods.base import Detector, GradientStage, PaintedScan
from bids_uad.training import loop
from bids_uad.training.loop import TrainingData, TrainingSettings, start_fabric, train_detector
from bids_uad.training.store import SliceStore


@dataclass(frozen=True)
class ToyHyper:
    width: int = 4


class Toy(Detector):
    """Detector that is trained to segment the brain; its loss uses no random numbers."""

    name = citation = "toy"
    presets = {"lite": ToyHyper()}  # noqa: RUF012

    def __init__(self, hyper):
        super().__init__(hyper)
        width = hyper.width
        self.network = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 1, 1))

    def stages(self):
        return [GradientStage("toy", self.network, self.loss, steps=20, batch_size=4, learning_rate=1e-2)]

    def loss(self, batch, generator):
        return (self.network(batch.slices) - batch.brain.float()).square().mean()

    def score(self, slices, brain, generator):
        return slices


class PaintedToy(Toy):
    """Toy detector of scans whose bright half is a lesion, with a brightness of its own for each painting."""

    name = citation = "painted"

    def stages(self):
        (stage,) = super().stages()
        return [replace(stage, steps=12, paint=self.paint)]

    def paint(self, scan, generator):
        brightness = 0.5 + torch.rand((), generator=generator)
        target = (scan.slices > 0.6).float()
        return PaintedScan(scan.slices * brightness, scan.brain, target, scan.brain.float())

    def loss(self, batch, generator):
        return ((self.network(batch.inputs) - batch.target).square() * batch.weight).mean()


if __name__ == "__main__":
    store, folder, processes, weights = sys.argv[1:]
    loop.SCANS_PER_POOL, loop.SLICES_PER_SCAN = 2, 10
    fabric = start_fabric(torch.device("cpu"), int(processes))
    data = TrainingData.all_of(SliceStore(Path(store)))
    for kind in (Toy, PaintedToy):
        torch.manual_seed(0)
        toy = kind(ToyHyper())
        train_detector(toy, data, TrainingSettings(seed=1), Path(folder) / kind.name, fabric=fabric)
        save_file(toy.state_dict(), f"{weights}-{kind.name}-{fabric.global_rank}.safetensors")
