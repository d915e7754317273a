"""Compare engine and literal implementation of every detector: time, memory and maps.

``make bench`` runs it on the scan of ``../shared`` if there is one, else on a simulated brain, with the
packaged models; detectors without one are trained for a few steps first. On a GPU, ``--preset paper``
measures the published network sizes.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measure import Measured, Run, measure
from benchmarks.models import find_model, store_slices, threshold_of
from benchmarks.scan import Scan, load_scan, number_of_slices, simulate
from bids_uad import __version__
from bids_uad.engine.bundle import protocol_of
from bids_uad.engine.execution import resolve_device, resolve_precision
from bids_uad.files import write_json
from bids_uad.methods.registry import DETECTORS, detector_class

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Measure all detectors, print a table and write a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--detectors", nargs="+", default=[*DETECTORS], choices=[*DETECTORS])
    parser.add_argument("--preset", default="lite", choices=("paper", "default", "lite"))
    parser.add_argument("--models", type=Path, help="folder of bundles named DETECTOR-T2w-PRESET")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, whose median is reported")
    args = parser.parse_args()
    device = resolve_device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        scan = load_scan(scratch / "scan")
        archive = scratch / "scan.npz"
        np.savez(archive, volume=scan.volume, brain=scan.brain)
        store_slices(simulate(scratch / "brains", healthy=1), scratch, args.preset)
        rows = []
        for name in args.detectors:
            if args.preset not in detector_class(name).presets:
                continue
            bundle = find_model(name, args.preset, args.models, scratch, device)
            is_published = protocol_of(args.preset).published
            precision = resolve_precision("auto", device, name, published=is_published)
            both = (
                Run(bundle, archive, str(device), literal=True),
                Run(bundle, archive, str(device), precision=precision),
            )
            # Alternately, so that both meet the same load of the computer.
            pairs = [[measure(run) for run in both] for _ in range(args.repeats)]
            literal, engine = (median_run(runs) for runs in zip(*pairs, strict=True))
            figures = compare_runs(engine, literal, scan, threshold_of(bundle))
            rows.append({"detector": name, "precision": precision, **figures})
            print(f"{name}: {rows[-1]['ratio']} times as fast", flush=True)
    print_table(rows)
    write_json(
        RESULTS / f"detectors-{args.preset}-{device.type}.json",
        {
            **describe_environment(device),
            "repeats": args.repeats,
            "preset": args.preset,
            "scan": scan.name,
            "slices_with_brain": number_of_slices(scan),
            "rows": rows,
        },
    )


def median_run(runs: Sequence[Measured]) -> Measured:
    """Return the run with the median time; all runs give the same map."""
    return sorted(runs, key=lambda run: run.seconds)[len(runs) // 2]


def describe_environment(device: torch.device) -> dict:
    """Return version, PyTorch version and device of the measurements."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.machine()} with {torch.get_num_threads()} threads"
    return {"version": __version__, "torch": torch.__version__, "device": name}


def compare_runs(ours: Measured, theirs: Measured, scan: Scan, threshold: float | None) -> dict:
    """Compare time, memory, maps and masks of two runs.

    Parameters
    ----------
    ours, theirs : Measured
        Run to assess, and reference.
    scan : Scan
        Scan that both have processed.
    threshold : float, optional
        Threshold of the masks; by default the 99th percentile of `theirs` in the brain.

    Returns
    -------
    dict
        Row of the table.
    """
    difference = np.abs(ours.scores - theirs.scores)[scan.brain]
    if threshold is None:
        threshold = float(np.quantile(theirs.scores[scan.brain], 0.99))
    masks = [result.scores > threshold for result in (ours, theirs)]
    both = int(sum(mask.sum() for mask in masks))
    return {
        "seconds": round(ours.seconds, 2),
        "reference_seconds": round(theirs.seconds, 2),
        "ratio": round(theirs.seconds / ours.seconds, 2),
        "peak_mb": ours.peak_mb,
        "reference_peak_mb": theirs.peak_mb,
        "largest_difference": float(f"{difference.max():.3g}"),
        "mean_difference": float(f"{difference.mean():.3g}"),
        "largest_score": float(f"{theirs.scores.max():.3g}"),
        "mask_voxels": int(masks[1].sum()),
        "mask_dice": round(2 * int((masks[0] & masks[1]).sum()) / both, 5) if both else None,
    }


def print_table(rows: list[dict]) -> None:
    """Print rows with equal keys as a table."""
    table = Table(*(key.replace("_", " ") for key in rows[0]))
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
