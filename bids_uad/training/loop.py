"""Run a detector's training stages over a slice store, in one process or several; killed, it goes on."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
from lightning_fabric import Fabric
from torch import Generator, Tensor, nn

from bids_uad.config import Seed
from bids_uad.constraints import Constrained, Count, OneOf
from bids_uad.engine.bundle import not_finite
from bids_uad.engine.execution import in_precision
from bids_uad.engine.inference import default_field
from bids_uad.errors import truncate_list
from bids_uad.files import atomic_path
from bids_uad.methods.base import (
    Batch,
    Detector,
    FitStage,
    GradientStage,
)
from bids_uad.training.checkpoint import Checkpoint, moving_average
from bids_uad.training.store import SliceStore

LOGGER = logging.getLogger(__name__)

EMA_DECAY = 0.999
CLIP_NORM = 1.0
JITTER = 8  # pixels by which the field is moved about, since brains do not all lie in the same place
CHECKPOINTS = 50  # in a stage, unless they would be too close
STEPS_APART = 10
HELD_OUT_CHECKS = 20  # in a stage
HELD_OUT_SLICES = 64

Report = Callable[[str, int, int, float], None]


@dataclass(frozen=True)
class TrainingData:
    """What is learnt from.

    Parameters
    ----------
    store : SliceStore
    training, held_out : numpy.ndarray of int
        Its slices that are learnt from, and those that only tell how well. The latter may be none.
    """

    store: SliceStore
    training: np.ndarray
    held_out: np.ndarray

    @classmethod
    def all_of(cls, store: SliceStore) -> TrainingData:
        """Learn from every slice of a store."""
        return cls(store, np.arange(len(store)), np.arange(0))


@dataclass(frozen=True)
class TrainingSettings(Constrained):
    """How it is learnt.

    Parameters
    ----------
    seed : int
        Of the order of slices and of every random draw.
    steps, batch_size : int, optional
        Instead of the preset's, for all gradient stages. The batch is that of all processes together.
    precision : {"fp32", "bf16"}
        Of convolutions and matrix products in networks; weights and losses are in single precision.
    """

    seed: Seed
    steps: Count | None = None
    batch_size: Count | None = None
    precision: Annotated[str, OneOf("fp32", "bf16")] = "fp32"

    def stream(self, *place: int) -> np.random.Generator:
        """Random numbers of one place in the training: stage, step and so on, and of nothing else."""
        return np.random.default_rng([self.seed, *place])


@dataclass
class Losses:
    """Mean loss over the last tenth of each gradient stage, and the last held-out loss, by stage name."""

    training: dict[str, float] = field(default_factory=dict)
    held_out: dict[str, float] = field(default_factory=dict)


def train_detector(
    detector: Detector,
    data: TrainingData,
    schedule: TrainingSettings,
    folder: Path,
    *,
    fabric: Fabric,
    report: Report | None = None,
) -> Losses:
    """Train every stage of a detector, in order.

    Every random number is a function of seed, stage and step, and the checkpoint holds everything else, so
    that a training that was killed and started again ends with the same weights to the bit. Several processes
    share the slices of each step and agree on its gradient.

    Parameters
    ----------
    detector : Detector
        Moved to the device of `fabric` and trained in place; the averaged weights are left in it.
    data : TrainingData
    schedule : TrainingSettings
    folder : pathlib.Path
        Of checkpoint and log. What an earlier run of the same training left there is gone on from.
    fabric : lightning_fabric.Fabric
        Launched, see :func:`~bids_uad.training.loop.start_fabric`. The first process alone writes.
    report : callable, optional
        ``report(stage, step, steps, loss)`` after each step.

    Returns
    -------
    Losses

    Raises
    ------
    ValueError
        If a stage needs tissue classes and the store has none, or a loss, a gradient or what a stage leaves
        in the detector is NaN or infinite.
    """
    device = fabric.device
    # Only what a stage trains is in training mode, and all is laid out alike, so that features are the same
    # to the bit whether they were learnt a moment ago or come from a checkpoint.
    detector.to(device, memory_format=_layout(device, schedule.precision)).eval()
    checkpoint = Checkpoint(folder / "checkpoint.safetensors")
    position = checkpoint.restore(detector)
    log = TrainingLog(folder / "training.csv", keep=position)
    if position != (0, 0):
        LOGGER.info("Going on with stage %d after step %d", position[0] + 1, position[1])
    for number, stage in enumerate(detector.stages()):
        if number < position[0]:
            continue
        if isinstance(stage, FitStage):
            rng = schedule.stream(number)
            generator = _generator(rng, device)
            detector.eval()
            drawn = data.store.draw(data.training, stage.slices, stage.batch_size, rng, device)
            with torch.no_grad():
                stage.fit((_in_field(batch, detector.field_of_view, rng) for batch in drawn), generator)
        else:
            if stage.needs_tissue and not data.store.has_tissue:
                raise ValueError(
                    f"stage {stage.name!r} needs tissue classes (desc-tissue_dseg) for every training scan"
                )
            with in_precision(detector, schedule.precision):
                _StageTrainer(detector, number, stage, data, schedule, fabric).run(checkpoint, log, report)
        if wrong := not_finite(detector.state_dict()):
            raise ValueError(
                f"NaN or infinite values in {truncate_list(wrong, 3)} after stage {stage.name!r}"
            )
        if fabric.is_global_zero:
            checkpoint.save(detector, (number + 1, 0))
    detector.eval()
    return _losses(log)


def _layout(device: torch.device, precision: str) -> torch.memory_format:
    """Channels last, the fastest, but where group norm's gradient takes ten times as long in it."""
    slow = device.type == "cpu" and precision == "bf16"
    return torch.contiguous_format if slow else torch.channels_last


def _losses(log: TrainingLog) -> Losses:
    table = log.table()
    losses = Losses()
    for _, rows in table.groupby("stage_number"):
        name = str(rows["stage"].iloc[0])
        last = rows[rows["step"] > rows["step"].max() - max(1, len(rows) // 10)]
        losses.training[name] = float(last["loss"].mean())
        checked = rows["held_out_loss"].dropna()
        if len(checked):
            losses.held_out[name] = float(checked.iloc[-1])
    return losses


class _Loss(nn.Module):
    """A stage's loss as a forward pass, which is where processes learn whose gradients they share."""

    def __init__(self, stage: GradientStage) -> None:
        super().__init__()
        self.module = stage.module
        self.loss = stage.loss

    def forward(self, slices: Tensor, brain: Tensor, tissue: Tensor | None, generator: Generator) -> Tensor:
        return self.loss(Batch(slices, brain, tissue), generator)


class _StageTrainer:
    """One gradient stage."""

    def __init__(
        self,
        detector: Detector,
        number: int,
        stage: GradientStage,
        data: TrainingData,
        schedule: TrainingSettings,
        fabric: Fabric,
    ) -> None:
        self.detector, self.number, self.stage = detector, number, stage
        self.data, self.schedule = data, schedule
        self.fabric, self.device = fabric, fabric.device
        self.steps = schedule.steps or stage.steps
        self.batch_size = schedule.batch_size or stage.batch_size
        self.order: tuple[int, np.ndarray] | None = None  # a pass over the slices, and how it goes
        self.module = stage.module.train()
        self.average = moving_average(self.module, EMA_DECAY)
        self.optimiser = torch.optim.AdamW(self.module.parameters(), lr=stage.learning_rate)
        self.loss, self.stepper = fabric.setup(_Loss(stage), self.optimiser)

    def run(self, checkpoint: Checkpoint, log: TrainingLog, report: Report | None) -> None:
        """Descend from where the checkpoint is, and leave the averaged weights in the module."""
        done = checkpoint.restore_stage(self.number, self.optimiser, self.average)
        checks = self.fabric.is_global_zero and len(self.data.held_out) > 0
        check_every = max(1, self.steps // HELD_OUT_CHECKS)
        save_every = max(STEPS_APART, self.steps // CHECKPOINTS)
        for step in range(done + 1, self.steps + 1):
            loss = self._step(step)
            held_out = None
            if checks and (step % check_every == 0 or step == self.steps):
                held_out = self._held_out_loss()
                self._check_finite("held-out loss", held_out, step)
            log.add(self.number, self.stage.name, step, loss, held_out)
            if report is not None:
                report(self.stage.name, step, self.steps, loss)
            if step % save_every == 0 and self.fabric.is_global_zero:
                log.flush()
                checkpoint.save(self.detector, (self.number, step), self.optimiser, self.average)
        if self.fabric.is_global_zero:
            log.flush()
        self.module.load_state_dict(self.average.module.state_dict())
        self.module.eval()

    def _step(self, step: int) -> float:
        rng, rank = self.schedule.stream(self.number, step), self.fabric.global_rank
        # Processes look at the same place of their slices, and draw what they do to them each for itself.
        own = rng if rank == 0 else self.schedule.stream(self.number, step, rank)
        generator = _generator(own, self.device)
        torch.manual_seed(int(own.integers(2**62)))  # dropout draws from there
        batch = self.data.store.batch(self._slices(step), self.device)
        batch = _in_field(batch, self.detector.field_of_view, rng)
        for group in self.optimiser.param_groups:
            group["lr"] = self.stage.learning_rate * learning_rate_factor(step - 1, self.steps)
        loss = self.loss(batch.slices, batch.brain, batch.tissue, generator)
        self.stepper.zero_grad(set_to_none=True)
        self.fabric.backward(loss)
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), CLIP_NORM)
        value = self.fabric.all_reduce(loss.detach(), reduce_op="mean").item()
        # Before the step, so that neither the weights nor the checkpoint take it in.
        self._check_finite("loss", value, step)
        self._check_finite("gradient", norm.item(), step)
        self.stepper.step()
        self.average.update_parameters(self.module)
        return value

    def _check_finite(self, what: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            raise ValueError(f"the {what} of stage {self.stage.name!r} is {value} at step {step}")

    def _slices(self, step: int) -> np.ndarray:
        """Slices of a step that are this process's: each pass over the data has an order of its own."""
        among = self.data.training
        in_a_pass = max(1, len(among) // self.batch_size)
        number, place = divmod(step - 1, in_a_pass)
        if self.order is None or self.order[0] != number:
            self.order = number, self.schedule.stream(self.number, 0, number).permutation(among)
        taken = self.order[1][place * self.batch_size : (place + 1) * self.batch_size]
        return taken[self.fabric.global_rank :: self.fabric.world_size]

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        """Loss of the averaged weights on slices that are not learnt from; the same draws every time."""
        rng = self.schedule.stream(self.number)
        generator = _generator(rng, self.device)
        own = {name: value.clone() for name, value in self.module.state_dict().items()}
        self.module.eval().load_state_dict(self.average.module.state_dict())
        drawn = self.data.store.draw(self.data.held_out, HELD_OUT_SLICES, self.batch_size, rng, self.device)
        losses = [
            self.stage.loss(_in_field(batch, self.detector.field_of_view, rng), generator).item()
            for batch in drawn
        ]
        self.module.load_state_dict(own)
        self.module.train()
        return float(np.mean(losses))


def learning_rate_factor(step: int, steps: int) -> float:
    """Share of the learning rate after `step` of `steps`: a short rise, then half a cosine down to zero."""
    warm_up = max(1, steps // 50)
    return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _generator(rng: np.random.Generator, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(int(rng.integers(2**62)))


def _in_field(batch: Batch, size: tuple[int, int], rng: np.random.Generator) -> Batch:
    """Show of a batch what the detector sees of slices, not always in the same place."""
    row, column = rng.integers(-JITTER, JITTER + 1, 2).tolist()
    field_of_view = default_field(size, (row, column))
    return batch.cut(field_of_view.rows, field_of_view.columns)


COLUMNS = ["stage_number", "stage", "step", "loss", "held_out_loss"]


class TrainingLog:
    """A CSV file with a row for each step.

    Parameters
    ----------
    path : pathlib.Path
    keep : tuple of int
        Stage and step up to which rows of an earlier run hold; later ones will be made again.
    """

    def __init__(self, path: Path, keep: tuple[int, int]) -> None:
        self.path = path
        self.rows: list[tuple] = []
        if path.is_file() and keep != (0, 0):
            earlier = pd.read_csv(path)
            number, step = earlier["stage_number"], earlier["step"]
            held = earlier[(number < keep[0]) | ((number == keep[0]) & (step <= keep[1]))]
            self.rows = list(held[COLUMNS].itertuples(index=False, name=None))

    def add(self, number: int, stage: str, step: int, loss: float, held_out: float | None) -> None:
        """Remember a step."""
        self.rows.append((number, stage, step, loss, np.nan if held_out is None else held_out))

    def table(self) -> pd.DataFrame:
        """All steps so far."""
        return pd.DataFrame(self.rows, columns=COLUMNS)

    def flush(self) -> None:
        """Write the file."""
        with atomic_path(self.path) as temporary:
            self.table().to_csv(temporary, index=False)


def start_fabric(device: torch.device, devices: int = 1, nodes: int = 1) -> Fabric:
    """Start the processes that share a training.

    With several devices the command is run once more for each by Fabric, or by SLURM (``srun`` with a task
    for each device); all of them come to this place.

    Parameters
    ----------
    device : torch.device
        Its type is that of all devices. An index picks the only one.
    devices : int
        Per node; processes on a CPU.
    nodes : int

    Returns
    -------
    Fabric
        Launched. Arithmetic is left alone: detectors choose the precision of their networks.
    """
    # A node of a cluster has srun, and a training that was not started by it means that.
    warnings.filterwarnings("ignore", "The `srun` command is available", category=UserWarning)
    if devices * nodes == 1:
        fabric = Fabric(
            accelerator=device.type, devices=1 if device.index is None else [device.index], num_nodes=1
        )
    else:
        fabric = Fabric(accelerator=device.type, devices=devices, num_nodes=nodes, strategy="ddp")
    fabric.launch()
    return fabric
