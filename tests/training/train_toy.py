"""Train a toy detector in several processes: ``python train_toy.py STORE FOLDER PROCESSES WEIGHTS``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from bids_uad.methods.base import Detector, GradientStage
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


if __name__ == "__main__":
    store, folder, processes, weights = sys.argv[1:]
    torch.manual_seed(0)
    toy = Toy(ToyHyper())
    fabric = start_fabric(torch.device("cpu"), int(processes))
    data = TrainingData.all_of(SliceStore(Path(store)))
    train_detector(toy, data, TrainingSettings(seed=1), Path(folder), fabric=fabric)
    save_file(toy.state_dict(), f"{weights}-{fabric.global_rank}.safetensors")
