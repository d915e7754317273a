"""How long the group level takes, and how much memory, as a cohort grows.

``python -m benchmarks.group --participants 1000 3000 10000`` makes score tables of healthy and lesion scans
for nine detectors, runs the group level on each cohort in a process of its own, and writes
``benchmarks/results/group.json``. Ten thousand participants take 1.6 GB of disk and ten minutes to write.
"""

from __future__ import annotations

import argparse
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table
from scipy.special import ndtr

from bids_uad import __version__
from bids_uad.atomic import write_json, write_tsv
from bids_uad.dataset.naming import detector_desc
from bids_uad.engine.bundle import Bundle, resolve_bundles
from bids_uad.levels.participant.maps import histogram_table

RESULTS = Path(__file__).parent / "results"
VOXELS = 1_400_000
SCANNERS = 8
PROCESSES = 2


def write_cohort(root: Path, participants: int) -> int:
    """Write participants.tsv and the score tables of a cohort, a third of it with lesions.

    Every packaged T1w model but the baseline has a table for everybody, in its own bins.

    Returns
    -------
    int
        Number of models.
    """
    rng = np.random.default_rng(0)
    bundles = [bundle for bundle in resolve_bundles(["all"], ["T1w"]) if bundle.detector != "intensity"]
    people = []
    for number in range(participants):
        subject, sick = f"sub-{number:05d}", number % 3 == 0
        people.append(
            {
                "participant_id": subject,
                "age": round(rng.uniform(20, 85), 1),
                "sex": "MF"[number % 2],
                "scanner": f"scanner{rng.integers(SCANNERS)}",
                "group": "patient" if sick else "control",
                "pathology": ("stroke", "tumour")[number % 2] if sick else None,
            }
        )
        folder = root / "derivatives" / subject / "anat"
        folder.mkdir(parents=True)
        size = int(10 ** rng.uniform(2, 5)) if sick else None
        for bundle in bundles:
            write_scores(folder, subject, bundle, size, rng)
        quality = pd.DataFrame([{"exclude": "no", "exclude_reasons": "n/a"}])
        write_tsv(folder / f"{subject}_space-SRI24_desc-T1wPreproc_qc.tsv", quality)
    write_tsv(root / "participants.tsv", pd.DataFrame(people))
    return len(bundles)


def shares(places: np.ndarray) -> np.ndarray:
    """Share of each bin of a log-normal score; `places` are those of the inner edges."""
    return np.diff(ndtr(np.concatenate([[-np.inf], places, [np.inf]])))


def write_scores(
    folder: Path, subject: str, bundle: Bundle, size: int | None, rng: np.random.Generator
) -> None:
    """Write the two score tables of one image and model; `size` is that of the lesion in voxels."""
    edges = bundle.bin_edges
    name, threshold = "fpr_1pct", bundle.thresholds["fpr_1pct"]
    place = np.log(np.maximum(edges[1:-1], 1e-6) / threshold)
    healthy = rng.multinomial(VOXELS, shares(place + 2.3 + rng.normal(0, 0.2)))
    lesion = None if size is None else rng.multinomial(size, shares(place + rng.normal(0, 0.5)))
    found = healthy[edges[:-1] >= threshold].sum()
    if lesion is not None:
        found += lesion[edges[:-1] >= threshold].sum()
    stem = f"{subject}_space-SRI24_desc-{detector_desc('T1w', bundle.detector)}"
    write_tsv(folder / f"{stem}_histogram.tsv", histogram_table(edges, healthy, lesion))
    row = {
        "source_image": f"{subject}/anat/{subject}_T1w.nii.gz",
        "modality": "T1w",
        "detector": bundle.detector,
        "preset": bundle.preset,
        "model_sha256": bundle.sha256,
        "app_version": __version__,
        "threshold": repr(threshold),
        "threshold_name": name,
        "model_has_met": "no",
        "brain_volume_mm3": VOXELS + (size or 0),
        "anomaly_volume_mm3": found,
        "lesion_volume_mm3": size,
        "n_components": 5,
        "n_lesions": size and 2,
        "n_lesions_detected": size and 1,
        "n_false_components": size and 4,
    }
    write_tsv(folder / f"{stem}_metrics.tsv", pd.DataFrame([row]))


def measure(root: Path) -> dict[str, float]:
    """Run the group level: seconds on the wall and of processor, and the memory of all processes together."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    command = [sys.executable, "-m", "bids_uad", str(root), str(root / "derivatives"), "group"]
    process = subprocess.Popen([*command, "--nprocs", str(PROCESSES)], stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, resident(process.pid))
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"the group level failed ({process.returncode})")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(used, 1),
        "peak_mb": round(peak / 1e6),
        "page_mb": round((root / "derivatives" / "group.html").stat().st_size / 1e6, 1),
    }


def resident(pid: int) -> int:
    """Bytes in memory of a process and its children, of shared pages each its part (Linux)."""
    own = Path(f"/proc/{pid}")
    try:
        size = re.search(r"^Pss: +(\d+) kB", (own / "smaps_rollup").read_text(), re.MULTILINE)
        children = [child for task in own.glob("task/*/children") for child in task.read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return 0  # it has just ended
    return (1024 * int(size[1]) if size else 0) + sum(resident(int(child)) for child in children)


def main() -> None:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--participants", nargs="+", type=int, default=[1000, 3000, 10_000])
    sizes = sorted(parser.parse_args().participants)
    rows = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            models = write_cohort(Path(folder), size)
            rows.append({"participants": size, **measure(Path(folder))})
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)
    write_json(
        RESULTS / "group.json",
        {"version": __version__, "models": models, "processes": PROCESSES, "rows": rows},
    )


if __name__ == "__main__":
    main()
