"""Reference cases that the published code computed (tests/data/README.md), and their weights and noise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bids_uad.methods.base import Detector
from bids_uad.methods.registry import detector_class

FOLDER = Path(__file__).parent / "data" / "published"


def uniform(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(key))


def noise(seed: int, step: int, shape: tuple[int, ...]) -> Tensor:
    """White noise of one step of a case."""
    return torch.from_numpy(uniform(seed, step).standard_normal(shape).astype(np.float32))


def weight(seed: int, position: int, kind: int, shape: tuple[int, ...], gain: float) -> Tensor:
    """One tensor of the published state dict, by its position there and its kind."""
    u = 2 * uniform(seed, position).random(shape) - 1
    fan = np.prod(shape[1:]) if len(shape) > 1 else 1
    value = (gain * u * np.sqrt(3 / fan), 1 + 0.2 * u, 0.1 * u, 1 + 0.5 * u)[kind]
    return torch.from_numpy(value.astype(np.float32))


class Case:
    """Inputs and outputs of one published method; `case[name]` is an array of it."""

    def __init__(self, name: str) -> None:
        with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
            self.arrays = dict(file)
        self.detector_name = name

    def __getitem__(self, name: str) -> Any:
        return self.arrays[name]

    def grey(self, name: str = "slices_u8") -> Tensor:
        """Slices in [0, 1], shape (B, 1, H, W)."""
        return torch.from_numpy(self[name].astype(np.float32) / np.float32(255))[:, None]

    def noise(self, step: int, shape: tuple[int, ...] | None = None) -> Tensor:
        return noise(int(self["noise_seed"]), step, tuple(self.grey().shape) if shape is None else shape)

    def fill(self, module: nn.Module, prefix: str = "", seed: str = "weight_seed") -> None:
        """Give a module the weights of the case; every tensor it names must be there."""
        state = module.state_dict()
        columns = (self[f"{prefix}{column}"] for column in ("weight_index", "weight_kind", "our_name"))
        for position, kind, name in zip(*columns, strict=True):
            shape = tuple(state[str(name)].shape)
            gain = float(self["weight_gain"])
            state[str(name)] = weight(int(self[seed]), int(position), int(kind), shape, gain)
        module.load_state_dict(state)

    def detector(self, **changes: object) -> Detector:
        """The detector with preset `paper`, its weights as they were drawn at first."""
        kind = detector_class(self.detector_name)
        return kind(replace(kind.presets["paper"], **changes)).eval()


class FixedNoise:
    """Stands in for a `SliceGenerator`: hands out the noise of a case."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def __getitem__(self, rows: object) -> FixedNoise:
        return self

    def normal(self, step: int, *shape: int) -> Tensor:
        return self.case.noise(step, (1, *shape))
