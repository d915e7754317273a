"""Training loop: runs the stages of a detector over a slice store, with checkpoints and several processes."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator
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
from bids_uad.engine.inference import Field, default_field
from bids_uad.errors import truncate_list
from bids_uad.files import atomic_path
from bids_uad.methods.base import Batch, Detector, FitStage, GradientStage, PaintedBatch, PaintedScan
from bids_uad.training.checkpoint import Checkpoint, moving_average
from bids_uad.training.store import MIN_BRAIN_PIXELS, SliceStore

LOGGER = logging.getLogger(__name__)

JITTER_PIXELS = 8
"""Maximum shift of the training window, since brains differ in position."""
CHECKPOINTS_PER_STAGE = 50
MIN_STEPS_BETWEEN_CHECKPOINTS = 10
HELD_OUT_CHECKS = 20
"""Evaluations of the held-out loss per stage."""
HELD_OUT_SLICES = 64
SCANS_PER_POOL = 12
"""Scans that are painted at once, and among whose slices those of a batch are drawn."""
SLICES_PER_SCAN = 96
"""Slices of a painted scan that are used before it is replaced."""
LOG_COLUMNS = ["stage_number", "stage", "step", "loss", "held_out_loss"]

Report = Callable[[str, int, int, float], None]


@dataclass(frozen=True)
class TrainingData:
    """Slices for training and for the held-out loss.

    Parameters
    ----------
    store : SliceStore
        Slices of all scans.
    training : numpy.ndarray of int
        Indices of the slices for training.
    held_out : numpy.ndarray of int
        Indices of the slices for the held-out loss; may be empty.
    """

    store: SliceStore
    training: np.ndarray
    held_out: np.ndarray

    @classmethod
    def all_of(cls, store: SliceStore) -> TrainingData:
        """Return all slices of a store as training data, without held-out slices."""
        return cls(store, np.arange(len(store)), np.arange(0))


@dataclass(frozen=True)
class TrainingSettings(Constrained):
    """Settings of a training run.

    Parameters
    ----------
    seed : int
        Seed of the order of slices and of all random draws.
    steps : int, default=None
        Number of steps of each gradient stage; if None, that of the preset.
    batch_size : int, default=None
        Batch size of each gradient stage, summed over all processes; if None, that of the preset.
    precision : {"fp32", "bf16"}, default="fp32"
        Precision of convolutions and matrix products; weights and losses are float32.
    """

    seed: Seed
    steps: Count | None = None
    batch_size: Count | None = None
    precision: Annotated[str, OneOf("fp32", "bf16")] = "fp32"

    def stream(self, *key: int) -> np.random.Generator:
        """Return the random numbers of a stage, step and so on, which no other key shares."""
        return np.random.default_rng([self.seed, *key])


@dataclass
class Losses:
    """Losses at the end of each gradient stage, by name of the stage.

    Attributes
    ----------
    training : dict of str to float, default={}
        Mean loss of the last tenth of the steps.
    held_out : dict of str to float, default={}
        Last held-out loss.
    """

    training: dict[str, float] = field(default_factory=dict)
    held_out: dict[str, float] = field(default_factory=dict)


def train_detector(
    detector: Detector,
    data: TrainingData,
    settings: TrainingSettings,
    folder: Path,
    *,
    fabric: Fabric,
    report: Report | None = None,
) -> Losses:
    """Train all stages of a detector in order.

    All random numbers are functions of seed, stage and step, and the checkpoint holds the rest of the state,
    so that an interrupted training that is resumed ends with the same weights to the bit. Several processes
    divide the slices of each step and average their gradients.

    Parameters
    ----------
    detector : Detector
        Moved to the device of `fabric` and trained in place; it ends with the averaged weights of each stage.
    data : TrainingData
        Slices.
    settings : TrainingSettings
        Seed, steps, batch size and precision.
    folder : pathlib.Path
        Folder of checkpoint and log. Training resumes from a checkpoint in it.
    fabric : lightning_fabric.Fabric
        Launched, see :func:`start_fabric`. Only the first process writes files.
    report : callable, optional
        Called as ``report(stage, step, steps, loss)`` after each step.

    Returns
    -------
    Losses
        Final losses by stage.

    Raises
    ------
    ValueError
        If a stage needs tissue classes and the store has none, or a loss, a gradient or the detector's state
        after a stage is NaN or infinite.
    """
    device = fabric.device
    # Only the module of the current stage is in training mode, and the memory layout is the same for all, so
    # that features are equal to the bit whether they were just trained or come from a checkpoint.
    detector.to(device, memory_format=_layout(device, settings.precision)).eval()
    checkpoint = Checkpoint(folder / "checkpoint.safetensors")
    position = checkpoint.restore(detector)
    log = TrainingLog(folder / "training.csv", keep=position)
    if position != (0, 0):
        LOGGER.info("Resuming stage %d after step %d", position[0] + 1, position[1])
    for number, stage in enumerate(detector.stages()):
        if number < position[0]:
            continue
        if isinstance(stage, FitStage):
            rng = settings.stream(number)
            generator = _torch_generator(rng, device)
            detector.eval()
            among = data.held_out if stage.held_out and len(data.held_out) else data.training
            if stage.held_out and among is data.training:
                LOGGER.warning("No subject is held out; stage %r uses training subjects", stage.name)
            drawn = data.store.draw(among, stage.slices, stage.batch_size, rng, device)
            with torch.no_grad():
                stage.fit((_in_window(batch, detector.field_of_view, rng) for batch in drawn), generator)
        else:
            if stage.needs_tissue and not data.store.has_tissue:
                raise ValueError(
                    f"stage {stage.name!r} needs tissue classes (desc-tissue_dseg) for every training scan"
                )
            with in_precision(detector, settings.precision):
                _StageTrainer(detector, number, stage, data, settings, fabric).run(checkpoint, log, report)
        if invalid := not_finite(detector.state_dict()):
            raise ValueError(
                f"NaN or infinite values in {truncate_list(invalid, 3)} after stage {stage.name!r}"
            )
        if fabric.is_global_zero:
            checkpoint.save(detector, (number + 1, 0))
    detector.eval()
    return log.losses()


def _layout(device: torch.device, precision: str) -> torch.memory_format:
    """Return channels last, except for bf16 on a CPU, where the gradient of group norm is slow in it."""
    slow = device.type == "cpu" and precision == "bf16"
    return torch.contiguous_format if slow else torch.channels_last


def _torch_generator(rng: np.random.Generator, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(int(rng.integers(2**62)))


def _in_window(batch: Batch, size: tuple[int, int], rng: np.random.Generator) -> Batch:
    """Crop a batch to the detector's field of view, shifted at random."""
    window = _random_window(size, rng)
    return batch.cut(window.rows, window.columns)


def _random_window(size: tuple[int, int], rng: np.random.Generator) -> Field:
    """Draw the position of the field of view."""
    row, column = rng.integers(-JITTER_PIXELS, JITTER_PIXELS + 1, 2).tolist()
    return default_field(size, (row, column))


@dataclass
class _Slices:
    """Slices for a gradient stage, given its number."""

    detector: Detector
    number: int
    stage: GradientStage
    batch_size: int
    data: TrainingData
    settings: TrainingSettings
    fabric: Fabric


@dataclass
class _StoredSlices(_Slices):
    """Batches of slices as they are stored; each epoch has its own random order."""

    epoch_order: tuple[int, np.ndarray] | None = None  # number of an epoch, and its order of slices

    def batch(self, step: int, rng: np.random.Generator) -> Batch:
        """Return the slices of a step for this process, in a window that all processes share."""
        training = self.data.training
        steps_per_epoch = max(1, len(training) // self.batch_size)
        epoch, index = divmod(step - 1, steps_per_epoch)
        if self.epoch_order is None or self.epoch_order[0] != epoch:
            self.epoch_order = epoch, self.settings.stream(self.number, 0, epoch).permutation(training)
        chosen = self.epoch_order[1][index * self.batch_size : (index + 1) * self.batch_size]
        chosen = chosen[self.fabric.global_rank :: self.fabric.world_size]
        batch = self.data.store.batch(chosen, self.fabric.device)
        return _in_window(batch, self.detector.field_of_view, rng)

    def held_out(self, rng: np.random.Generator) -> Iterator[Batch]:
        """Yield batches of held-out slices."""
        for batch in self.data.store.draw(
            self.data.held_out, HELD_OUT_SLICES, self.batch_size, rng, self.fabric.device
        ):
            yield _in_window(batch, self.detector.field_of_view, rng)


@dataclass
class _PaintedSlices(_Slices):
    """Batches of slices of scans that are painted pool by pool, since painting a scan takes seconds."""

    pool: tuple[int, list[PaintedScan], np.ndarray] | None = None  # its number, scans, and order of slices
    held_out_scans: list[PaintedScan] | None = None

    def batch(self, step: int, rng: np.random.Generator) -> PaintedBatch:
        """Return the slices of a step for this process, in a window that all processes share."""
        steps_per_pool = max(1, SCANS_PER_POOL * SLICES_PER_SCAN // self.batch_size)
        pool, index = divmod(step - 1, steps_per_pool)
        if self.pool is None or self.pool[0] != pool:
            self.pool = None  # frees the memory
            scans = self._paint_pool(pool)
            self.pool = pool, scans, self._order(scans, self.settings.stream(self.number, 0, pool, 1))
        _, scans, order = self.pool
        mine = range(self.fabric.global_rank, self.batch_size, self.fabric.world_size)
        chosen = order[(index * self.batch_size + np.array(mine)) % len(order)]
        return self._batch(scans, chosen, rng)

    def held_out(self, rng: np.random.Generator) -> Iterator[PaintedBatch]:
        """Yield batches of slices of held-out scans, which are painted once."""
        if self.held_out_scans is None:
            numbers = np.unique(self.data.store.scans[self.data.held_out])
            stream = self.settings.stream(self.number, 0)
            chosen = stream.choice(numbers, min(SCANS_PER_POOL, len(numbers)), replace=False)
            self.held_out_scans = [self._paint(scan, stream) for scan in chosen]
        order = self._order(self.held_out_scans, rng)[:HELD_OUT_SLICES]
        for start in range(0, len(order), self.batch_size):
            yield self._batch(self.held_out_scans, order[start : start + self.batch_size], rng)

    def _paint_pool(self, pool: int) -> list[PaintedScan]:
        """Paint the next scans of the training data, which are used in a random order in each epoch."""
        numbers = np.unique(self.data.store.scans[self.data.training])
        scans = []
        for position in range(pool * SCANS_PER_POOL, (pool + 1) * SCANS_PER_POOL):
            epoch, index = divmod(position, len(numbers))
            order = self.settings.stream(self.number, 0, epoch, 2).permutation(numbers)
            scans.append(self._paint(order[index], self.settings.stream(self.number, 0, position, 3)))
        return scans

    def _paint(self, scan: int, rng: np.random.Generator) -> PaintedScan:
        generator = _torch_generator(rng, torch.device("cpu"))
        return self.stage.paint(self.data.store.scan(scan), generator)

    def _order(self, scans: list[PaintedScan], rng: np.random.Generator) -> np.ndarray:
        """Draw the order of pairs of scan and slice."""
        pairs = []
        for number, scan in enumerate(scans):
            found = np.flatnonzero(scan.brain.sum((1, 2)).numpy() >= MIN_BRAIN_PIXELS)
            if len(found):
                slices = rng.choice(found, SLICES_PER_SCAN, replace=len(found) < SLICES_PER_SCAN)
                pairs += [(number, each) for each in slices]
        return rng.permutation(np.array(pairs))

    def _batch(self, scans: list[PaintedScan], pairs: np.ndarray, rng: np.random.Generator) -> PaintedBatch:
        window = _random_window(self.detector.field_of_view, rng)
        parts = []
        for number, at in pairs.tolist():
            scan = scans[number]
            inputs = self.detector.inputs(scan.slices, [at], window.rows, window.columns)
            others = (window.cut(part[[at], None]) for part in (scan.brain, scan.target, scan.weight))
            parts.append((inputs, *others))
        inputs, brain, target, weight = (
            torch.cat(each).to(self.fabric.device) for each in zip(*parts, strict=True)
        )
        return PaintedBatch(inputs.float(), brain, target.float(), weight.float())


class _StageTrainer:
    """Optimisation of one gradient stage."""

    def __init__(
        self,
        detector: Detector,
        number: int,
        stage: GradientStage,
        data: TrainingData,
        settings: TrainingSettings,
        fabric: Fabric,
    ) -> None:
        self.detector, self.number, self.stage = detector, number, stage
        self.data, self.settings = data, settings
        self.fabric, self.device = fabric, fabric.device
        self.steps = settings.steps or stage.steps
        self.batch_size = settings.batch_size or stage.batch_size
        source = _StoredSlices if stage.paint is None else _PaintedSlices
        self.source = source(detector, number, stage, self.batch_size, data, settings, fabric)
        self.module = stage.module.train()
        self.average = moving_average(self.module, stage.optimiser.ema_decay or 0.0)
        self.optimiser = torch.optim.AdamW(self.module.parameters(), lr=stage.learning_rate)
        self.loss, self.stepper = fabric.setup(_Loss(stage), self.optimiser)

    def run(self, checkpoint: Checkpoint, log: TrainingLog, report: Report | None) -> None:
        """Optimise from the step of the checkpoint, and leave the averaged weights in the module."""
        done = checkpoint.restore_stage(self.number, self.optimiser, self.average)
        has_checks = self.fabric.is_global_zero and len(self.data.held_out) > 0
        check_every = max(1, self.steps // HELD_OUT_CHECKS)
        save_every = max(MIN_STEPS_BETWEEN_CHECKPOINTS, self.steps // CHECKPOINTS_PER_STAGE)
        for step in range(done + 1, self.steps + 1):
            loss = self._step(step)
            held_out = None
            if has_checks and (step % check_every == 0 or step == self.steps):
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
        rng, rank = self.settings.stream(self.number, step), self.fabric.global_rank
        # All processes share the window of the step; each draws its own augmentation and dropout.
        own = rng if rank == 0 else self.settings.stream(self.number, step, rank)
        generator = _torch_generator(own, self.device)
        torch.manual_seed(int(own.integers(2**62)))  # used by dropout
        batch = self.source.batch(step, rng)
        is_constant = self.stage.optimiser.schedule == "constant"
        factor = 1.0 if is_constant else learning_rate_factor(step - 1, self.steps)
        for group in self.optimiser.param_groups:
            group["lr"] = self.stage.learning_rate * factor
        loss = self.loss(batch, generator)
        self.stepper.zero_grad(set_to_none=True)
        self.fabric.backward(loss)
        limit = self.stage.optimiser.clip_norm or math.inf
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), limit)
        value = self.fabric.all_reduce(loss.detach(), reduce_op="mean").item()
        # Checked before the step, so that weights and checkpoint stay finite.
        self._check_finite("loss", value, step)
        self._check_finite("gradient", norm.item(), step)
        self.stepper.step()
        self.average.update_parameters(self.module)
        return value

    def _check_finite(self, name: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            raise ValueError(f"the {name} of stage {self.stage.name!r} is {value} at step {step}")

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        """Compute the loss of the averaged weights on held-out slices, with the same draws every time."""
        rng = self.settings.stream(self.number)
        generator = _torch_generator(rng, self.device)
        own = {name: value.clone() for name, value in self.module.state_dict().items()}
        self.module.eval().load_state_dict(self.average.module.state_dict())
        losses = [self.stage.loss(batch, generator).item() for batch in self.source.held_out(rng)]
        self.module.load_state_dict(own)
        self.module.train()
        return float(np.mean(losses))


class _Loss(nn.Module):
    """Loss of a stage as the forward pass of a module, which Fabric needs to average gradients."""

    def __init__(self, stage: GradientStage) -> None:
        super().__init__()
        self.module = stage.module
        self.loss = stage.loss

    def forward(self, batch: Batch | PaintedBatch, generator: Generator) -> Tensor:
        return self.loss(batch, generator)


def learning_rate_factor(step: int, steps: int) -> float:
    """Compute the factor of the cosine schedule: linear warm-up over 2 % of the steps, then half a cosine.

    Parameters
    ----------
    step : int
        Number of completed steps.
    steps : int
        Number of all steps.

    Returns
    -------
    float
        From 0 to 1.
    """
    warm_up = max(1, steps // 50)
    return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))


class TrainingLog:
    """CSV file with one row per step.

    Parameters
    ----------
    path : pathlib.Path
        CSV file.
    keep : tuple of int
        Stage and step up to which rows of an interrupted run are kept; later steps will be repeated.
    """

    def __init__(self, path: Path, keep: tuple[int, int]) -> None:
        self.path = path
        self.rows: list[tuple] = []
        if path.is_file() and keep != (0, 0):
            earlier = pd.read_csv(path)
            number, step = earlier["stage_number"], earlier["step"]
            kept = earlier[(number < keep[0]) | ((number == keep[0]) & (step <= keep[1]))]
            self.rows = list(kept[LOG_COLUMNS].itertuples(index=False, name=None))

    def add(self, number: int, stage: str, step: int, loss: float, held_out: float | None) -> None:
        """Append a step, with a held-out loss if there is one."""
        self.rows.append((number, stage, step, loss, np.nan if held_out is None else held_out))

    def table(self) -> pd.DataFrame:
        """Return all steps, with columns `LOG_COLUMNS`."""
        return pd.DataFrame(self.rows, columns=LOG_COLUMNS)

    def losses(self) -> Losses:
        """Summarise the end of each stage."""
        losses = Losses()
        for _, rows in self.table().groupby("stage_number"):
            name = str(rows["stage"].iloc[0])
            last = rows[rows["step"] > rows["step"].max() - max(1, len(rows) // 10)]
            losses.training[name] = float(last["loss"].mean())
            checked = rows["held_out_loss"].dropna()
            if len(checked):
                losses.held_out[name] = float(checked.iloc[-1])
        return losses

    def flush(self) -> None:
        """Write the file atomically."""
        with atomic_path(self.path) as temporary:
            self.table().to_csv(temporary, index=False)


def start_fabric(device: torch.device, devices: int = 1, nodes: int = 1) -> Fabric:
    """Start the processes that share a training.

    With several devices, Fabric or SLURM (``srun`` with one task per device) runs the command once more for
    each, and every process calls this function.

    Parameters
    ----------
    device : torch.device
        Device type; an index selects a single device.
    devices : int, default=1
        Devices per node; processes for a CPU.
    nodes : int, default=1
        Number of nodes.

    Returns
    -------
    Fabric
        Launched. Its precision is not set: detectors choose the precision of their networks.
    """
    # On a cluster, a training that was not started by srun is meant to be a single process.
    warnings.filterwarnings("ignore", "The `srun` command is available", category=UserWarning)
    if devices * nodes == 1:
        fabric = Fabric(
            accelerator=device.type, devices=1 if device.index is None else [device.index], num_nodes=1
        )
    else:
        fabric = Fabric(accelerator=device.type, devices=devices, num_nodes=nodes, strategy="ddp")
    fabric.launch()
    return fabric
