"""Time and accuracy of approximations compared with the exact computation.

Time and Dice of the masks are measured on some slices of the scan, since exact computations are slow, and the
average precision on simulated lesions, since a different mask may detect as many lesions.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from sklearn.metrics import average_precision_score

from benchmarks.detectors import RESULTS, compare_runs, describe_environment, print_table
from benchmarks.measure import Run, measure
from benchmarks.models import find_model, store_slices
from benchmarks.scan import Scan, load_scan, read, simulate, simulate_lesions
from bids_uad.engine.execution import resolve_device
from bids_uad.files import write_json

SLICES = 20
KINDS = ("stroke", "tumour")
WHOLE = ("field_of_view", (224, 224))

# For each detector: the exact computation, and what may be done instead.
OPTIONS: dict[str, tuple[tuple, dict[str, tuple]]] = {
    "andi": (
        (("stride", 1),),
        {f"stride {stride}": (("stride", stride),) for stride in (2, 4, 10, 20)},
    ),
    "disyre": (
        (WHOLE, ("stride", 32)),
        {
            "windows every 64 pixels": (WHOLE, ("stride", 64)),
            "one window about the brain": (),
        },
    ),
    "riad": ((), {}),
    "itermask": ((), {}),
}


def main() -> None:
    """Run, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, help="folder of bundles named DETECTOR-T2w-lite")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = resolve_device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        scan = thinned(load_scan(scratch / "scan"), scratch / "scan.npz")
        lesions = []
        for number, (image, mask, truth) in enumerate(simulate_lesions(scratch / "lesions", KINDS)):
            sick = Scan("", read(image), read(mask) > 0)
            lesion = read(truth) > 0
            archive = scratch / f"lesion-{number}.npz"
            lesions.append((archive, thinned(sick, archive, around=lesion).brain, lesion))
        store_slices(simulate(scratch / "brains", healthy=1), scratch, "lite")
        rows = []
        for name, (exact_changes, options) in OPTIONS.items():
            bundle = find_model(name, "lite", args.models, scratch, device)
            run = Run(bundle, scratch / "scan.npz", str(device), changes=exact_changes)
            alternatives = {"exact": run}
            alternatives |= {option: replace(run, changes=changes) for option, changes in options.items()}
            alternatives["bfloat16"] = replace(run, precision="bf16")
            exact = None
            for option, alternative in alternatives.items():
                measured = measure(alternative)
                exact = exact or measured
                figures = compare_runs(measured, exact, scan, None)
                rows.append(
                    {
                        "detector": name,
                        "option": option,
                        **{key: figures[key] for key in ("seconds", "ratio", "mask_dice")},
                        "auprc": round(mean_precision(alternative, lesions), 4),
                    }
                )
                print_table(rows[-1:])
    print_table(rows)
    content = {**describe_environment(device), "scan": scan.name, "slices": SLICES, "rows": rows}
    write_json(RESULTS / f"options-{device.type}.json", content)


def thinned(scan: Scan, archive: Path, around: np.ndarray | None = None) -> Scan:
    """Keep the brain in some slices, in the middle or about a lesion, and write the scan for a run."""
    where = scan.brain if around is None else around
    centre = int(np.flatnonzero(where.any((0, 1))).mean())
    brain = np.zeros_like(scan.brain)
    slab = slice(centre - SLICES // 2, centre + SLICES // 2)
    brain[..., slab] = scan.brain[..., slab]
    np.savez(archive, volume=scan.volume, brain=brain)
    return Scan(scan.name, scan.volume, brain)


def mean_precision(run: Run, lesions: list[tuple[Path, np.ndarray, np.ndarray]]) -> float:
    """Average precision inside the brain, mean over scans with known lesions."""
    found = []
    for archive, brain, lesion in lesions:
        scores = measure(replace(run, scan=archive)).scores
        found.append(average_precision_score(lesion[brain], scores[brain]))
    return float(np.mean(found))


if __name__ == "__main__":
    main()
