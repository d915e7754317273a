"""Measure time and memory of one detector on one volume, in a separate process."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import median_filter

from benchmarks.literal import LITERAL, single
from bids_uad import space
from bids_uad.engine.bundle import load_bundle, load_detector
from bids_uad.engine.execution import Execution
from bids_uad.engine.inference import (
    anomaly_map,
    covering_fields,
    masked_median,
    published_median,
    smooth_across_slices,
)
from bids_uad.methods.base import Detector
from bids_uad.methods.registry import build_detector
from bids_uad.networks.counter_rng import SliceGenerator

KEY = "benchmark"
"""Name of the image, part of the random seed."""


@dataclass(frozen=True)
class Run:
    """One measurement.

    Parameters
    ----------
    bundle : pathlib.Path
        Folder of the model bundle.
    scan : pathlib.Path
        NumPy archive with `volume` and `brain`.
    device : str
        Device as in PyTorch.
    literal : bool, default=False
        Whether to use the literal implementation instead of the engine.
    precision : {"fp32", "bf16"}, default="fp32"
        Precision of the engine.
    changes : tuple of (str, object), default=()
        Names and new values of hyper-parameters.
    """

    bundle: Path
    scan: Path
    device: str
    literal: bool = False
    precision: str = "fp32"
    changes: tuple[tuple[str, object], ...] = ()


@dataclass(frozen=True)
class Measured:
    """CPU time in s (on a GPU wall time), peak memory of process or GPU in MiB, and the filtered map."""

    seconds: float
    peak_mb: int
    scores: np.ndarray


def measure(run: Run) -> Measured:
    """Measure a run in a new process, so that its peak memory does not include earlier runs."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measure, run).result()


def _measure(run: Run) -> Measured:
    bundle = load_bundle(run.bundle)
    detector = load_detector(bundle, run.device)
    if run.changes:
        changed = build_detector(bundle.detector, replace(detector.hyper, **dict(run.changes)))
        changed.load_state_dict(detector.state_dict())
        detector = changed.eval().to(run.device)
    with np.load(run.scan) as archive:
        volume, brain = archive["volume"], archive["brain"]
    compute = _literal_map if run.literal else _engine_map
    execution = Execution(run.precision)
    if not run.literal:
        execution.prepare(detector)
    one_slice = brain.copy()
    one_slice[..., : brain.shape[2] // 2] = False
    one_slice[..., brain.shape[2] // 2 + 1 :] = False
    compute(detector, bundle, volume, one_slice, execution)  # warm-up
    if run.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    clock = clock_of(run.device)
    start = clock()
    scores, untimed = compute(detector, bundle, volume, brain, execution)
    seconds = clock() - start - untimed
    peak = _peak_mb() if run.device == "cpu" else torch.cuda.max_memory_allocated() // 2**20
    return Measured(seconds, peak, scores)


def clock_of(device: str) -> Callable[[], float]:
    """Return the clock for a device: CPU time, which other processes hardly affect, or wall time on a GPU."""
    return time.process_time if device == "cpu" else time.perf_counter


def _peak_mb() -> int:
    """Return the peak resident memory of this process in MiB; `getrusage` would include the parent."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) // 1024
    raise RuntimeError("/proc/self/status has no VmHWM; the peak memory cannot be measured")


def _engine_map(detector: Detector, bundle, volume, brain, execution) -> tuple[np.ndarray, float]:
    scores = anomaly_map(detector, volume, brain, key=KEY, protocol=bundle.protocol, execution=execution)
    return scores, 0.0


@torch.inference_mode()
def _literal_map(detector: Detector, bundle, volume, brain, execution) -> tuple[np.ndarray, float]:
    """Score all slices one by one in float32, and filter the volume with SciPy.

    The time includes the published filter. The map is smoothed and filtered as by the engine instead, so that
    maps differ only by the scoring; the seconds that this takes are returned to be subtracted.
    """
    device = next(iter(detector.state_dict().values())).device
    score = LITERAL.get(detector.name, single)
    scaled, mask = bundle.protocol.prepare(volume, brain)
    slices, inside = (torch.from_numpy(space.to_slices(part).copy()) for part in (scaled, mask))
    (field,) = covering_fields(inside, detector.field_of_view)
    result = torch.zeros_like(slices)
    for index in range(len(slices)):
        x, brain_slice = (field.cut(part)[index, None, None].to(device) for part in (slices, inside))
        generator = SliceGenerator.of_slices(KEY, 0, [index], device)
        scores = torch.where(brain_slice, score(detector, x, brain_slice, generator), 0.0)
        field.cut(result)[index] = scores[0, 0].cpu()
    median_filter(result.numpy(), size=4)
    clock = clock_of(device.type)
    start = clock()
    if detector.slice_smoothing:
        result = smooth_across_slices(result, inside, detector.slice_smoothing)
    filtered = published_median(result) if bundle.protocol.published else masked_median(result, inside)
    scores = space.from_slices(filtered.numpy()) * brain
    return scores, clock() - start
