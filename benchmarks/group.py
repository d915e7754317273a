"""How long the group level takes, and how much memory, as a cohort grows.

``python -m benchmarks.group --participants 100 200 400`` makes score tables of healthy and lesion scans for
nine detectors, runs the group level on each cohort in a process of its own, and writes
``benchmarks/results/group.json``.
"""

from __future__ import annotations

import argparse
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

from bids_uad import __version__
from bids_uad.atomic import write_json, write_tsv
from bids_uad.dataset.naming import detector_desc
from bids_uad.levels.participant.maps import histogram_table
from bids_uad.methods.registry import DETECTORS

RESULTS = Path(__file__).parent / "results"
N_BINS = 1900
VOXELS, LESION_VOXELS = 1_400_000, 8_000
SCANNERS = 8


def write_cohort(root: Path, participants: int, detectors: list[str]) -> None:
    """Write participants.tsv and the score tables of a cohort, a third of it with lesions."""
    rng = np.random.default_rng(0)
    edges = np.concatenate([[0.0], np.geomspace(1e-3, 1.0, N_BINS - 1)])
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
        for detector in detectors:
            write_scores(root / "derivatives", subject, detector, edges, sick, rng)
    write_tsv(root / "participants.tsv", pd.DataFrame(people))


def write_scores(
    root: Path, subject: str, detector: str, edges: np.ndarray, sick: bool, rng: np.random.Generator
) -> None:
    """Write the two score tables of one image and detector."""
    falling = rng.dirichlet(np.geomspace(50, 0.05, N_BINS))
    healthy = rng.multinomial(VOXELS, falling)
    lesion = rng.multinomial(LESION_VOXELS, falling[::-1]) if sick else None
    threshold = edges[int(0.9 * N_BINS)]
    found = healthy[edges >= threshold].sum() + (lesion[edges >= threshold].sum() if sick else 0)
    stem = root / subject / "anat" / f"{subject}_space-SRI24_desc-{detector_desc('T1w', detector)}"
    write_tsv(Path(f"{stem}_histogram.tsv"), histogram_table(np.append(edges, np.inf), healthy, lesion))
    row = {
        "source_image": f"{subject}/anat/{subject}_T1w.nii.gz",
        "modality": "T1w",
        "detector": detector,
        "preset": "lite",
        "model_sha256": "0" * 64,
        "app_version": __version__,
        "threshold": repr(float(threshold)),
        "threshold_name": "fpr_1pct",
        "model_has_met": "no",
        "brain_volume_mm3": VOXELS + LESION_VOXELS * sick,
        "anomaly_volume_mm3": found,
        "lesion_volume_mm3": LESION_VOXELS if sick else None,
        "n_components": 5,
        "n_lesions": 2 if sick else None,
        "n_lesions_detected": 1 if sick else None,
        "n_false_components": 4 if sick else None,
    }
    write_tsv(Path(f"{stem}_metrics.tsv"), pd.DataFrame([row]))


def measure(root: Path) -> tuple[float, float]:
    """Run the group level; wall seconds, and the highest memory of any run so far in MB."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "bids_uad", str(root), str(root / "derivatives"), "group"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def main() -> None:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--participants", nargs="+", type=int, default=[100, 200, 400])
    sizes = sorted(parser.parse_args().participants)
    detectors = [name for name in DETECTORS if name != "intensity"]
    rows = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            write_cohort(Path(folder), size, detectors)
            seconds, peak = measure(Path(folder))
        rows.append({"participants": size, "seconds": round(seconds, 1), "peak_mb": round(peak)})
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)
    write_json(RESULTS / "group.json", {"version": __version__, "detectors": len(detectors), "rows": rows})


if __name__ == "__main__":
    main()
