"""Checkpoints of a training (tensors only, written atomically), and averaged weights."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from bids_uad.engine.bundle import write_tensors
from bids_uad.files import atomic_path
from bids_uad.methods.base import Detector

LOGGER = logging.getLogger(__name__)

DETECTOR, AVERAGE, OPTIMISER = "detector/", "average/", "optimiser/"


def moving_average(module: nn.Module, decay: float) -> AveragedModel:
    """Create an exponential moving average of a module's weights; its buffers are copied, not averaged.

    Parameters
    ----------
    module : torch.nn.Module
        Module whose weights are averaged.
    decay : float
        Final decay. After n updates it is ``min(decay, (1 + n) / (10 + n))``.

    Returns
    -------
    torch.optim.swa_utils.AveragedModel
        Average; the first update copies the weights of the module.
    """

    def average(mean: Tensor, value: Tensor, updates: Tensor | int) -> Tensor:
        n = int(updates) + 1
        return torch.lerp(mean, value, 1 - min(decay, (1 + n) / (10 + n)))

    averaged = AveragedModel(module, avg_fn=average)
    averaged.eval().requires_grad_(requires_grad=False)
    return averaged


class Checkpoint:
    """State of a training in one file, which each save overwrites.

    A file that cannot be read is ignored with a warning.

    Parameters
    ----------
    path : pathlib.Path
        Safetensors file. Trainings with other settings need another file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, Tensor] = {}
        self.position = (0, 0)
        self.updates = 0
        if not path.is_file():
            return
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
                position = int(metadata["stage"]), int(metadata["step"])
                updates = int(metadata["updates"])
                self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            LOGGER.warning("%s is damaged (%s); the training starts again", path, error)
            return
        self.position, self.updates = position, updates

    def save(
        self,
        detector: Detector,
        position: tuple[int, int],
        optimiser: torch.optim.Optimizer | None = None,
        average: AveragedModel | None = None,
    ) -> None:
        """Write the state after a step.

        Parameters
        ----------
        detector : Detector
            Detector with its current weights.
        position : tuple of int
            Index of the stage, and number of its completed steps.
        optimiser : torch.optim.Optimizer, default=None
            Optimiser of the stage; None between stages.
        average : AveragedModel, default=None
            Averaged weights of the stage; None between stages.
        """
        tensors = _prefixed(DETECTOR, detector.state_dict())
        if optimiser is not None and average is not None:
            tensors |= _prefixed(AVERAGE, average.module.state_dict())
            for index, state in optimiser.state_dict()["state"].items():
                tensors |= _prefixed(f"{OPTIMISER}{index}/", state)
        metadata = {"stage": str(position[0]), "step": str(position[1])}
        metadata["updates"] = str(0 if average is None else int(average.n_averaged))
        with atomic_path(self.path) as temporary:
            write_tensors(tensors, temporary, metadata)

    def restore(self, detector: Detector) -> tuple[int, int]:
        """Load the weights into a detector, and return the stage and step; (0, 0) without a checkpoint."""
        if self.tensors:
            detector.load_state_dict(_unprefixed(DETECTOR, self.tensors))
        return self.position

    def restore_stage(self, stage: int, optimiser: torch.optim.Optimizer, average: AveragedModel) -> int:
        """Load the state of a stage into optimiser and average, and return its number of completed steps."""
        if self.position[0] != stage or self.position[1] == 0:
            return 0
        average.module.load_state_dict(_unprefixed(AVERAGE, self.tensors))
        average.n_averaged.fill_(self.updates)
        states: dict[int, dict[str, Tensor]] = {}
        for name, value in _unprefixed(OPTIMISER, self.tensors).items():
            index, key = name.split("/")
            states.setdefault(int(index), {})[key] = value
        optimiser.load_state_dict({**optimiser.state_dict(), "state": states})
        return self.position[1]


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # Cloned, since safetensors refuses tensors that share memory.
    return {prefix + name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}


def _unprefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
