"""What approximations gain and cost: seconds, and Dice of the mask with that of the exact computation.

Runs on some slices in the middle of the scan, since the exact computations are long.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.detectors import RESULTS, circumstances, compared, print_table
from benchmarks.measure import Run, measure
from benchmarks.models import find_model, store_slices
from benchmarks.scan import Scan, load_scan, simulate
from bids_uad.atomic import write_json
from bids_uad.engine.execution import resolve_device

SLAB = slice(70, 90)
WHOLE = ("field_of_view", (224, 224))

# For each detector: the exact computation, and what may be done instead.
OPTIONS: dict[str, tuple[tuple, dict[str, tuple]]] = {
    "andi": (
        (("stride", 1),),
        {f"every {stride}th noise level": (("stride", stride),) for stride in (2, 4, 10, 20)},
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
        whole = load_scan(scratch / "scan")
        brain = np.zeros_like(whole.brain)
        brain[..., SLAB] = whole.brain[..., SLAB]
        scan = Scan(whole.name, whole.volume, brain)
        np.savez(scratch / "scan.npz", volume=scan.volume, brain=scan.brain)
        store_slices(simulate(scratch / "brains", healthy=1, lesion=0), scratch, "lite")
        rows = []
        for name, (exact_changes, options) in OPTIONS.items():
            bundle = find_model(name, "lite", args.models, scratch, device)
            run = Run(bundle, scratch / "scan.npz", str(device), changes=exact_changes)
            exact = measure(run)
            alternatives = {option: replace(run, changes=changes) for option, changes in options.items()}
            alternatives["bfloat16"] = replace(run, precision="bf16")
            for option, alternative in alternatives.items():
                figures = compared(measure(alternative), exact, scan, None)
                kept = ("seconds", "reference_seconds", "ratio", "mean_difference", "mask_dice")
                rows.append({"detector": name, "option": option, **{key: figures[key] for key in kept}})
                print_table(rows[-1:])
    print_table(rows)
    content = {**circumstances(device), "scan": scan.name, "slices": [SLAB.start, SLAB.stop], "rows": rows}
    write_json(RESULTS / f"options-{device.type}.json", content)


if __name__ == "__main__":
    main()
