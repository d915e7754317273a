"""What the engine saves by not computing: seconds per volume beside a straightforward path, in one run.

The straightforward path scores every slice of the volume one at a time, empty ones too, and filters with
SciPy. Both paths use the packaged bundles on one simulated brain; the maps are compared.
"""

from __future__ import annotations

import platform
import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.ndimage import generic_filter

from bids_uad import __version__, space
from bids_uad.atomic import write_json
from bids_uad.engine.bundle import PACKAGED, load_bundle, load_detector, packaged_bundles
from bids_uad.engine.inference import anomaly_map
from bids_uad.methods.base import Detector
from bids_uad.preprocessing.intensity import scale_intensity

RESULTS = Path(__file__).parent / "results"
SLAB = slice(70, 80)  # slices on which the filtered maps are compared


def ellipsoid_brain() -> tuple[np.ndarray, np.ndarray]:
    """Make a head-sized ellipsoid with noise, and its mask."""
    axes = np.ogrid[tuple(slice(0, size) for size in space.SHAPE)]
    centre, radii = (120, 120, 75), (68, 85, 65)
    radius = sum(((axis - c) / r) ** 2 for axis, c, r in zip(axes, centre, radii, strict=True))
    brain = radius <= 1
    noise = np.random.default_rng(0).normal(0, 0.05, space.SHAPE)
    return scale_intensity((0.6 + 0.2 * (radius < 0.4) + noise).clip(0), brain), brain


@torch.inference_mode()
def straightforward(detector: Detector, volume: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """Score all 155 slices one by one, without the median filter."""
    slices = torch.from_numpy(np.ascontiguousarray(space.to_slices(volume)))
    inside = torch.from_numpy(np.ascontiguousarray(space.to_slices(brain)))
    maps = [
        detector.score(slices[index, None, None], inside[index, None, None], [torch.Generator()])[0, 0]
        for index in range(len(slices))
    ]
    return space.from_slices(torch.stack(maps).numpy())


def seconds(function: Callable, *arguments: object, **options: object) -> tuple[float, np.ndarray]:
    """Time one call."""
    start = time.perf_counter()
    result = function(*arguments, **options)
    return time.perf_counter() - start, result


def largest_difference(fast: np.ndarray, raw: np.ndarray, brain: np.ndarray) -> float:
    """Compare the engine's map with the other path's, filtered by SciPy on a slab."""
    around = slice(SLAB.start - 1, SLAB.stop + 1)
    masked = np.where(brain, raw, np.nan)[..., around]

    def lower_median(values: np.ndarray) -> float:
        values = np.sort(values[~np.isnan(values)])
        return values[(len(values) - 1) // 2] if len(values) else 0.0

    slow = generic_filter(masked, lower_median, size=3, mode="constant", cval=np.nan)[..., 1:-1]
    return float(np.abs(fast[..., SLAB] - slow)[brain[..., SLAB]].max())


def main() -> None:
    """Run, print the table, write the JSON."""
    volume, brain = ellipsoid_brain()
    rows = []
    for name in packaged_bundles():
        bundle = load_bundle(PACKAGED / name)
        detector = load_detector(bundle)
        fast, scores = seconds(anomaly_map, detector, volume, brain, key="bench")
        slow, raw = seconds(straightforward, detector, volume, brain)
        rows.append(
            {
                "bundle": name,
                "engine_seconds": round(fast, 2),
                "straightforward_seconds": round(slow, 2),
                "ratio": round(slow / fast, 2),
                "largest_difference": largest_difference(scores, raw, brain),
            }
        )
    table = Table("bundle", "engine, s", "straightforward, s", "ratio", "largest difference")
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)
    write_json(
        RESULTS / "engine.json",
        {
            "version": __version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "architecture": platform.machine(),
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
