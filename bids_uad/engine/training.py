"""Run a detector's training stages over a slice store."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from bids_uad.engine.ema import MovingAverage
from bids_uad.engine.store import SliceStore
from bids_uad.methods.base import Detector, FitStage, GradientStage

EMA_DECAY = 0.999
CLIP_NORM = 1.0

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
                stage.fit(store.draw(stage.slices, stage.batch_size, rng, device), generator)
        else:
            total = steps or stage.steps
            size = batch_size or stage.batch_size
            losses[stage.name] = _descend(stage, store, total, size, rng, generator, device, report)
    detector.eval()
    return losses


def _descend(
    stage: GradientStage,
    store: SliceStore,
    steps: int,
    batch_size: int,
    rng: np.random.Generator,
    generator: torch.Generator,
    device: torch.device,
    report: Report | None,
) -> float:
    if stage.needs_tissue and not store.has_tissue:
        raise ValueError(
            f"stage {stage.name!r} needs tissue classes (desc-tissue_dseg) for every training scan"
        )
    module = stage.module.train().to(memory_format=torch.channels_last)
    average = MovingAverage(module, EMA_DECAY)
    optimiser = torch.optim.AdamW(module.parameters(), lr=stage.learning_rate)
    warm_up = max(1, steps // 50)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    recent: list[float] = []
    batches = store.shuffled(batch_size, rng, device)
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
