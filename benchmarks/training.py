"""Training throughput (slices per second) of the training loop, compared with a plain loop.

The plain loop is that of a typical published training script: whole slices in float32, kept in memory, and
forward, backward and step in eager mode. The training loop reads its compact store from disk, crops slices to
the field of view of the detector, uses channels-last tensors, averages the weights, and computes in bfloat16
on a GPU. The plain loop is also run on the cropped field of view, which shows the effect of the other
differences.
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
from bids_uad.engine.bundle import protocol_of
from bids_uad.engine.execution import resolve_device, resolve_precision
from bids_uad.engine.inference import default_field
from bids_uad.files import write_json
from bids_uad.methods.base import Batch, Detector, GradientStage
from bids_uad.methods.registry import build_detector
from bids_uad.training.loop import TrainingData, TrainingSettings, start_fabric, train_detector
from bids_uad.training.store import SliceStore, TrainingScan

DETECTORS = ("disyre", "andi", "riad", "fae")
STEPS = {"cpu": 20, "cuda": 200}


def main() -> None:
    """Run the benchmark, print the table and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="lite")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device, protocol = resolve_device(args.device), protocol_of(args.preset)
    precision = resolve_precision("auto", device, published=protocol.published)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        scans = [TrainingScan(*paths) for paths in simulate(scratch / "healthy", healthy=2)]
        store = SliceStore.build(scans, scratch / "slices", protocol)
        rows = [compare(name, args.preset, store, scratch / name, device, precision) for name in DETECTORS]
    results = {
        **describe_environment(device),
        "preset": args.preset,
        "precision": precision,
        "rows": rows,
    }
    write_json(RESULTS / f"training-{args.preset}-{device.type}.json", results)
    table = Table("detector", "engine, slices/s", "plain loop", "times as fast", "plain loop, same field")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)


def compare(
    name: str, preset: str, store: SliceStore, folder: Path, device: torch.device, precision: str
) -> dict:
    """Compute the throughput of the last gradient stage of a detector for the three variants."""
    steps = STEPS[device.type]
    settings = TrainingSettings(0, steps + 1, precision=precision)
    engine = _engine(_only_last_stage(name, preset), store, folder, device, settings)
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


def _engine(
    detector: Detector, store: SliceStore, folder: Path, device: torch.device, settings: TrainingSettings
) -> float:
    ticks: list[float] = []
    train_detector(
        detector,
        TrainingData.all_of(store),
        settings,
        folder,
        fabric=start_fabric(device),
        report=lambda *_: ticks.append(time.perf_counter()),
    )
    # Without the first step, a warm-up.
    return detector.stages()[0].batch_size * (len(ticks) - 1) / (ticks[-1] - ticks[0])


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
