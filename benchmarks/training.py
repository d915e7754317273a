"""Slices a second that a detector learns from: the engine beside a plain loop, in one run.

The plain loop is what a published training script does: whole slices in single precision, kept in memory, and
forward, backward and step in eager mode. The engine reads its compact store from disk, cuts the field that
the detector looks at, lays tensors out with channels last, averages the weights, and on a GPU computes in
bfloat16. Shown the detector's field only, the plain loop tells what the rest is worth.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.detectors import RESULTS, describe_environment
from benchmarks.scan import simulate
from bids_uad.engine.execution import resolve_device, resolve_precision
from bids_uad.engine.inference import default_field
from bids_uad.engine.protocol import CORRECTED
from bids_uad.files import write_json
from bids_uad.methods.base import Batch, Detector, GradientStage
from bids_uad.methods.registry import build_detector
from bids_uad.training.loop import TrainingData, TrainingSettings, start_fabric, train_detector
from bids_uad.training.store import SliceStore, TrainingScan

DETECTORS = ("disyre", "andi", "riad", "fae")
STEPS = {"cpu": 20, "cuda": 200}


def main() -> None:
    """Run, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="lite")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = resolve_device(args.device)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        subjects = [TrainingScan(*paths) for paths in simulate(scratch / "healthy", healthy=2)]
        store = SliceStore.build(subjects, scratch / "slices", CORRECTED)
        rows = [compare(name, args.preset, store, scratch / name, device) for name in DETECTORS]
    told = {
        **describe_environment(device),
        "preset": args.preset,
        "precision": resolve_precision("auto", device),
        "rows": rows,
    }
    write_json(RESULTS / f"training-{args.preset}-{device.type}.json", told)
    table = Table("detector", "engine, slices/s", "plain loop", "times as fast", "plain loop, same field")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)


def compare(name: str, preset: str, store: SliceStore, folder: Path, device: torch.device) -> dict:
    """Throughput of the last gradient stage of a detector, three ways."""
    steps = STEPS[device.type]
    engine = _engine(_only_last_stage(name, preset), store, folder, device, steps)
    whole = _plain(_only_last_stage(name, preset), store, device, steps, whole=True)
    same = _plain(_only_last_stage(name, preset), store, device, steps, whole=False)
    return {
        "detector": name,
        "engine": round(engine, 1),
        "plain": round(whole, 1),
        "ratio": round(engine / whole, 2),
        "plain_same_field": round(same, 1),
    }


def _only_last_stage(name: str, preset: str) -> Detector:
    torch.manual_seed(0)
    detector = build_detector(name, preset)
    stage = [stage for stage in detector.stages() if isinstance(stage, GradientStage)][-1]
    detector.stages = lambda: [stage]
    return detector


def _engine(detector: Detector, store: SliceStore, folder: Path, device: torch.device, steps: int) -> float:
    ticks: list[float] = []
    train_detector(
        detector,
        TrainingData.all_of(store),
        TrainingSettings(0, steps + 1, precision=resolve_precision("auto", device)),
        folder,
        fabric=start_fabric(device),
        report=lambda *_: ticks.append(time.perf_counter()),
    )
    return detector.stages()[0].batch_size * steps / (ticks[-1] - ticks[0])  # the first step warms up


def _plain(detector: Detector, store: SliceStore, device: torch.device, steps: int, *, whole: bool) -> float:
    (stage,) = detector.stages()
    detector.to(device)
    everything = store.batch(np.arange(len(store)), torch.device("cpu"))
    module = stage.module.train()
    optimiser = torch.optim.Adam(module.parameters(), lr=1e-4)
    generator = torch.Generator(device).manual_seed(0)
    rng = np.random.default_rng(0)

    def step() -> None:
        index = torch.from_numpy(rng.choice(len(store), stage.batch_size, replace=False))
        tissue = None if everything.tissue is None else everything.tissue[index].to(device)
        batch = Batch(everything.slices[index].to(device), everything.brain[index].to(device), tissue)
        if not whole:
            field = default_field(detector.field_of_view, (0, 0))
            batch = batch.cut(field.rows, field.columns)
        loss = stage.loss(batch, generator)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        loss.item()

    return stage.batch_size * steps / _seconds(step, steps)


def _seconds(step: Callable[[], None], steps: int) -> float:
    step()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
