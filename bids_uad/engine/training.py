"""Run a detector's training stages over a slice store."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch

from bids_uad.engine.ema import MovingAverage
from bids_uad.engine.field import usual_field
from bids_uad.engine.store import SliceStore
from bids_uad.methods.base import Batch, Detector, FitStage, GradientStage

EMA_DECAY = 0.999
CLIP_NORM = 1.0
JITTER = 8  # pixels by which the field is moved about, since brains do not all lie in the same place

Report = Callable[[str, int, int, float], None]


def train_detector(
    detector: Detector,
    store: SliceStore,
    *,
    seed: int,
    device: torch.device,
    steps: int | None = None,
    batch_size: int | None = None,
    report: Report | None = None,
) -> dict[str, float]:
    """Train every stage of a detector, in order.

    Parameters
    ----------
    detector : Detector
        Moved to `device` and trained in place; the averaged weights are left in it.
    store : SliceStore
        Healthy slices.
    seed : int
        Of the order of slices and of every random draw.
    device : torch.device
    steps, batch_size : int, optional
        Instead of the preset's, for all gradient stages.
    report : callable, optional
        ``report(stage, step, steps, loss)`` after each step.

    Returns
    -------
    dict
        Mean loss over the last tenth of each gradient stage, by stage name.

    Raises
    ------
    ValueError
        If a stage needs tissue classes and the store has none.
    """
    detector.to(device)
    losses: dict[str, float] = {}
    for number, stage in enumerate(detector.stages()):
        rng = np.random.default_rng([seed, number])
        generator = torch.Generator(device).manual_seed(int(rng.integers(2**62)))
        if isinstance(stage, FitStage):
            detector.eval()
            with torch.no_grad():
                drawn = store.draw(stage.slices, stage.batch_size, rng, device)
                stage.fit(_in_fields(drawn, detector.field_of_view, rng), generator)
        else:
            if stage.needs_tissue and not store.has_tissue:
                raise ValueError(
                    f"stage {stage.name!r} needs tissue classes (desc-tissue_dseg) for every training scan"
                )
            total = steps or stage.steps
            size = batch_size or stage.batch_size
            batches = _in_fields(store.shuffled(size, rng, device), detector.field_of_view, rng)
            losses[stage.name] = _descend(stage, batches, total, generator, report)
    detector.eval()
    return losses


def _in_fields(batches: Iterator[Batch], size: tuple[int, int], rng: np.random.Generator) -> Iterator[Batch]:
    """Show of each batch what the detector sees of slices, not always in the same place."""
    for batch in batches:
        row, column = rng.integers(-JITTER, JITTER + 1, 2).tolist()
        field = usual_field(size, (row, column))
        yield batch.cut(field.rows, field.columns)


def _descend(
    stage: GradientStage,
    batches: Iterator[Batch],
    steps: int,
    generator: torch.Generator,
    report: Report | None,
) -> float:
    module = stage.module.train().to(memory_format=torch.channels_last)
    average = MovingAverage(module, EMA_DECAY)
    optimiser = torch.optim.AdamW(module.parameters(), lr=stage.learning_rate)
    warm_up = max(1, steps // 50)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    recent: list[float] = []
    for step in range(1, steps + 1):
        loss = stage.loss(next(batches), generator)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP_NORM)
        optimiser.step()
        schedule.step()
        average.update(module)
        if step > steps - max(1, steps // 10):
            recent.append(loss.item())
        if report is not None:
            report(stage.name, step, steps, loss.item())
    average.apply_to(module)
    module.eval()
    return float(np.mean(recent))
