"""Time, memory and agreement of the networks on a GPU, and the limits that the hardware sets.

``python -m benchmarks.gpu`` runs the default model and the nine published detectors in the presets `default`
and `paper` over one volume in under ten minutes, and writes ``benchmarks/results/gpu.json``. Networks that
are not packaged have random weights. ``python -m benchmarks.gpu --roofline`` needs no GPU: it counts
operations and memory traffic of a volume, and writes ``benchmarks/results/roofline.json``, which the other
run reads.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.detectors import RESULTS, describe_environment, print_table
from benchmarks.scan import Scan, load_scan, number_of_slices
from bids_uad.engine.bundle import Protocol, load_detector, protocol_of, resolve_bundles
from bids_uad.engine.execution import Execution, resolve_device, resolve_precision
from bids_uad.engine.inference import anomaly_map
from bids_uad.files import read_json, write_json
from bids_uad.methods.base import Detector
from bids_uad.methods.registry import DETECTORS, build_detector, detector_class
from bids_uad.networks.backbones import LesionFeatures

KEY = "benchmark"
DEFAULT_MODEL = "default model"
PUBLISHED = tuple(name for name in DETECTORS if name not in ("pls", "intensity"))
CHIPS = {"H200": (989e12, 4.8e12), "H100": (989e12, 3.35e12), "A100": (312e12, 2.04e12)}
"""Floating-point operations per second in bfloat16 (dense), and bytes per second, by name of the GPU."""
BYTES_PER_NUMBER = 2
COUNTED_SLICES = 8
"""Slices on which operations are counted, from the bottom to the top of the brain."""
TOLERANCE = 1e-3
"""Largest mean difference of a map in fp32 to that of the CPU, as a fraction of the mean of the map."""
TIMING_FRACTION = 0.7
"""Fraction of the time budget for timing; the rest is for the comparison with the CPU."""
NO_TIME = "not enough time"
GOALS = (15.0, 5.0)
"""Seconds for nine maps of a volume."""


@dataclass(frozen=True)
class Network:
    """A detector with trained or random weights.

    Parameters
    ----------
    name, preset : str
        Detector and preset; `DEFAULT_MODEL` and its preset for the default model of T2w images.
    """

    name: str
    preset: str

    def build(self, device: str) -> tuple[Detector, Protocol]:
        """Load or make the detector in evaluation mode; return it with its scaling and filter."""
        if self.name == DEFAULT_MODEL:
            (bundle,) = resolve_bundles(None, ["T2w"])
            return load_detector(bundle, device), bundle.protocol
        torch.manual_seed(0)
        detector = build_detector(self.name, self.preset).eval()
        randomise(detector)
        return detector.to(device), protocol_of(self.preset)


def randomise(detector: Detector) -> None:
    """Draw weights that are initialised at or near zero, so that the output depends on the input.

    The memory bank of PatchCore is drawn as well. IterMask gets a threshold that no error exceeds, so that
    each slice takes two rounds and no pixel depends on rounding.
    """
    for weight in detector.parameters():
        if weight.ndim > 1 and weight.std() < 1e-4:
            nn.init.kaiming_normal_(weight, nonlinearity="linear")
    buffers = dict(detector.named_buffers(recurse=False))
    if "bank" in buffers:
        buffers["bank"].normal_()
    if detector.name == "itermask":
        detector.threshold.fill_(torch.inf)


class Traffic(TorchDispatchMode):
    """Count the numbers that operations read and write, each operation for itself, without caches."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = (leaf for leaf in tree_leaves((args, kwargs, output)) if isinstance(leaf, Tensor))
            self.numbers += sum(tensor.numel() for tensor in tensors)
        return output


@contextmanager
def count_work() -> Iterator[dict[str, float]]:
    """Context that counts operations and memory traffic.

    Yields
    ------
    dict
        On exit, `flops`: floating-point operations of convolutions and matrix products, and `bytes`: memory
        traffic in bfloat16, if every operation reads its inputs and writes its outputs once.
    """
    work: dict[str, float] = {}
    with FlopCounterMode(display=False) as counter, Traffic() as traffic:
        yield work
    work |= {"flops": counter.get_total_flops(), "bytes": BYTES_PER_NUMBER * traffic.numbers}


def work_per_slice(network: Network, scan: Scan) -> dict[str, float]:
    """Count operations and memory traffic of a slice, the mean over `COUNTED_SLICES` slices with brain.

    Modules with weights run on tensors without data, and return zeros. The filter of the volume is not
    included.
    """
    detector, protocol = network.build("cpu")
    for child in detector.children():
        if isinstance(child, LesionFeatures):  # its forward depends on the values of the slices
            child.network.decoder_maps = without_data(child.network, "decoder_maps")
        elif next(child.parameters(), None) is not None:
            child.forward = without_data(child)
    occupied = slices_with_brain(scan)
    sampled = occupied[:: -(-len(occupied) // COUNTED_SLICES)]
    brain = keep_slices(scan, sampled).brain
    score, total = detector.score, Counter()

    def counted(*inputs: Any) -> Tensor:
        with count_work() as work:
            scores = score(*inputs)
        total.update(work)
        return scores

    detector.score = counted
    anomaly_map(detector, scan.volume, brain, key=KEY, protocol=protocol)
    return {name: value / len(sampled) for name, value in total.items()}


def without_data(child: nn.Module, method: str = "forward") -> Any:
    """Return a method of a module on tensors without data, with zeros of the same shapes as output."""
    empty = getattr(copy.deepcopy(child).requires_grad_(False).to("meta"), method)

    def forward(*inputs: Any) -> Any:
        output = empty(*tree_map_only(Tensor, lambda part: part.to("meta"), inputs))
        return tree_map_only(Tensor, lambda part: torch.zeros(part.shape, dtype=part.dtype), output)

    return forward


def limits(work: dict[str, float], slices: int, chip: str = "H200") -> dict[str, float | str]:
    """Compute the shortest time of a volume that arithmetic and memory of a GPU allow.

    Parameters
    ----------
    work : dict
        Result of :func:`work_per_slice`.
    slices : int
        Slices with brain.
    chip : str, default="H200"
        Key of `CHIPS`.

    Returns
    -------
    dict
        `tflop` and `gb` of the volume, the limits in seconds, and which is the larger one.
    """
    flops, speed = CHIPS[chip]
    compute, memory = slices * work["flops"] / flops, slices * work["bytes"] / speed
    return {
        "tflop": round(slices * work["flops"] / 1e12, 3),
        "gb": round(slices * work["bytes"] / 1e9, 1),
        "compute_s": round(compute, 4),
        "memory_s": round(memory, 4),
        "bound": "memory" if memory > compute else "compute",
    }


def write_roofline(networks: Sequence[Network], scan: Scan, output: Path) -> None:
    """Count the work of all networks, print the limits of an H200 and their sums, write the JSON file."""
    slices = number_of_slices(scan)
    rows = []
    for network in networks:
        work = work_per_slice(network, scan)
        per_slice = {f"{name}_per_slice": round(value) for name, value in work.items()}
        rows.append({"detector": network.name, "preset": network.preset, **limits(work, slices), **per_slice})
        print_table([{key: value for key, value in rows[-1].items() if key not in per_slice}])
    sums = {}
    for preset in dict.fromkeys(row["preset"] for row in rows if row["detector"] != DEFAULT_MODEL):
        own = [row for row in rows if row["preset"] == preset and row["detector"] != DEFAULT_MODEL]
        sums[preset] = {
            "networks": len(own),
            "tflop": round(sum(row["tflop"] for row in own), 1),
            "limit_s": round(sum(max(row["compute_s"], row["memory_s"]) for row in own), 2),
        }
    write_json(output, {"chip": "H200", "goals_s": GOALS, "slices": slices, "sums": sums, "rows": rows})
    print(sums)


class Budget:
    """Time that is left of a number of seconds from now."""

    def __init__(self, seconds: float) -> None:
        self._end = time.perf_counter() + seconds

    @property
    def left(self) -> float:
        """Seconds, negative if the budget is exceeded."""
        return self._end - time.perf_counter()


def time_network(network: Network, scan: Scan, device: str, runs: int, budget: Budget) -> dict[str, Any]:
    """Time a network on a volume, in the precision that is the default of the device and the preset.

    Returns
    -------
    dict
        Median seconds of the warm runs, their number, and the peak memory of the GPU. `skipped` if the first
        run, which is not counted, leaves no time for another.
    """
    detector, protocol = network.build(device)
    precision = resolve_precision("auto", torch.device(device), published=protocol.published)
    execution = Execution(precision)
    execution.prepare(detector)
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for run in range(runs + 1):
        start = time.perf_counter()
        anomaly_map(detector, scan.volume, scan.brain, key=KEY, protocol=protocol, execution=execution)
        seconds.append(time.perf_counter() - start)
        if run < runs and budget.left < seconds[-1]:
            break
    if len(seconds) == 1:
        return {"skipped": f"the first run took {seconds[0]:.0f} s, and no time is left"}
    return {
        "precision": precision,
        "seconds": round(statistics.median(seconds[1:]), 3),
        "runs": len(seconds) - 1,
        "peak_mb": torch.cuda.max_memory_allocated() // 2**20 if on_gpu else None,
    }


def compare_with_cpu(network: Network, scan: Scan, device: str) -> dict[str, Any]:
    """Compare the maps of the middle slice with that of the CPU in fp32.

    Returns
    -------
    dict
        Mean difference in `fp32` and, on a GPU, in `bf16`, and whether the first is within `TOLERANCE`.
    """
    slices = slices_with_brain(scan)
    brain = keep_slices(scan, slices[len(slices) // 2 :][:1]).brain
    precisions = ("fp32", "bf16") if torch.device(device).type == "cuda" else ("fp32",)
    maps = []
    for where, precision in (("cpu", "fp32"), *((device, precision) for precision in precisions)):
        detector, protocol = network.build(where)
        execution = Execution(precision)
        execution.prepare(detector)
        scores = anomaly_map(detector, scan.volume, brain, key=KEY, protocol=protocol, execution=execution)
        maps.append(scores[brain])
    found = {
        f"{name}_difference": relative_difference(own, maps[0])
        for name, own in zip(precisions, maps[1:], strict=True)
    }
    return {**found, "within_tolerance": found["fp32_difference"] <= TOLERANCE}


def relative_difference(scores: np.ndarray, reference: np.ndarray) -> float:
    """Compute the mean absolute difference as a fraction of the mean of the reference."""
    return float(f"{np.abs(scores - reference).mean() / np.abs(reference).mean():.3g}")


def affordable(
    networks: Sequence[Network], work: Mapping[Network, float], budget: Budget, least: float = 1.0
) -> Iterator[tuple[Network, bool]]:
    """Yield each network, least work first, and whether its measurement is expected to fit in the budget.

    The time is estimated from that of the network before, which is the time between two items.

    Parameters
    ----------
    networks : sequence of Network
        The networks.
    work : mapping
        Work of each network in any unit. A network that is missing is always expected to fit.
    budget : Budget
        Time that is left.
    least : float, default=1.0
        Fraction of the measurement that has to fit.

    Yields
    ------
    network : Network
        The network.
    fits : bool
        Whether to measure it.
    """
    rate = 0.0
    for network in sorted(networks, key=lambda network: work.get(network, 0.0)):
        own, start = work.get(network, 0.0), time.perf_counter()
        fits = budget.left > least * rate * own
        yield network, fits
        if fits and own:
            rate = (time.perf_counter() - start) / own


def measure_gpu(args: argparse.Namespace, networks: Sequence[Network], scan: Scan, device: str) -> list[dict]:
    """Time all networks, then compare their maps with the CPU."""
    slices = number_of_slices(scan)
    chip = describe_environment(torch.device(device))["device"]
    known = {
        Network(row["detector"], row["preset"]): {
            kind: row[f"{kind}_per_slice"] for kind in ("flops", "bytes")
        }
        for row in read_json(args.roofline_file).get("rows", [])
    }
    rows = {network: {"detector": network.name, "preset": network.preset} for network in networks}
    whole, timing = Budget(args.budget), Budget(TIMING_FRACTION * args.budget)
    traffic, flops = ({network: work[kind] for network, work in known.items()} for kind in ("bytes", "flops"))
    # One of the warm runs suffices, after the first.
    for network, fits in affordable(networks, traffic, timing, least=2 / (args.runs + 1)):
        timed = time_network(network, scan, device, args.runs, timing) if fits else {"skipped": NO_TIME}
        if network in known and "seconds" in timed:
            timed |= reached(known[network], slices, timed["seconds"], chip)
        rows[network] |= timed
        print(rows[network], flush=True)
    for network, fits in affordable(networks, flops, whole):
        rows[network] |= compare_with_cpu(network, scan, device) if fits else {"comparison_skipped": NO_TIME}
        print(rows[network], flush=True)
    return list(rows.values())


def reached(work: dict[str, float], slices: int, seconds: float, device: str) -> dict[str, Any]:
    """Compute the speed of a network, and its fraction of the limit of the GPU if that is known."""
    figures: dict[str, Any] = {"tflops": round(slices * work["flops"] / seconds / 1e12, 2)}
    for chip in CHIPS:
        if chip in device:
            limit = limits(work, slices, chip)
            figures["fraction_of_limit"] = round(max(limit["compute_s"], limit["memory_s"]) / seconds, 3)
    return figures


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark, and write the JSON file; exit code 1 if a map differs from that of the CPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--roofline", action="store_true", help="count operations only; needs no GPU")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--detectors", nargs="+", default=[*PUBLISHED], choices=PUBLISHED)
    parser.add_argument("--presets", nargs="+", default=["default", "paper"])
    parser.add_argument("--runs", type=int, default=5, help="runs of which the median is taken (default: 5)")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds in total (default: 540)")
    parser.add_argument("--slices", type=int, help="only this many slices, for a test")
    parser.add_argument("--roofline-file", type=Path, default=RESULTS / "roofline.json")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu.json")
    args = parser.parse_args(argv)
    networks = [Network(DEFAULT_MODEL, "default")]
    networks += [
        Network(name, preset)
        for preset in args.presets
        for name in args.detectors
        if preset in detector_class(name).presets
    ]
    with tempfile.TemporaryDirectory() as folder:
        scan = load_scan(Path(folder))
    if args.slices:
        occupied = slices_with_brain(scan)
        first = (len(occupied) - args.slices) // 2
        scan = keep_slices(scan, occupied[first : first + args.slices])
    if args.roofline:
        write_roofline(networks, scan, args.roofline_file)
        return
    device = resolve_device(args.device)
    rows = measure_gpu(args, networks, scan, str(device))
    sums = {
        preset: round(
            sum(
                row["seconds"] for row in rows if row["preset"] == preset and row["detector"] != DEFAULT_MODEL
            ),
            2,
        )
        for preset in args.presets
        if all("seconds" in row for row in rows if row["preset"] == preset)
    }
    content = {
        "scan": scan.name,
        "slices": number_of_slices(scan),
        "goals_s": GOALS,
        "sums_s": sums,
        "tolerance": TOLERANCE,
    }
    write_json(args.output, {**describe_environment(device), **content, "rows": rows})
    wrong = [f"{row['detector']} ({row['preset']})" for row in rows if row.get("within_tolerance") is False]
    if wrong:
        raise SystemExit(f"maps differ from those of the CPU: {', '.join(wrong)}")


def slices_with_brain(scan: Scan) -> np.ndarray:
    """Return the indices of the slices with brain."""
    return np.flatnonzero(scan.brain.any((0, 1)))


def keep_slices(scan: Scan, slices: np.ndarray) -> Scan:
    """Remove the brain from all slices but the given ones."""
    brain = np.zeros_like(scan.brain)
    brain[..., slices] = scan.brain[..., slices]
    return replace(scan, brain=brain)


if __name__ == "__main__":
    main()
