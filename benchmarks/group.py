"""Run time and memory of the group level by cohort size.

``python -m benchmarks.group --participants 1000 3000 10000`` simulates score tables of healthy and lesion
scans for ten detectors, runs the group level on each cohort in a separate process, and writes
``benchmarks/results/group.json``. Writing the tables of 10,000 participants takes 1.6 GB of disk and 10
minutes.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table
from scipy.special import ndtr

from bids_uad import __version__
from bids_uad.dataset.naming import detector_desc
from bids_uad.dataset.sidecars import LESION_COLUMNS
from bids_uad.engine.bundle import Bundle, resolve_bundles
from bids_uad.files import write_json, write_tsv
from bids_uad.levels.participant.completion_records import CompletionRecord, ModelRecord
from bids_uad.levels.participant.postprocess import histogram_table

RESULTS = Path(__file__).parent / "results"
VOXELS = 1_400_000
"""Brain voxels of a scan."""
SCANNERS = 8
PROCESSES = 2
DETECTORS = 10


def write_cohort(root: Path, participants: int) -> int:
    """Write participants.tsv and the score tables of a cohort, a third of which has lesions.

    Parameters
    ----------
    root : pathlib.Path
        Folder of the raw dataset; the tables are written to `derivatives`.
    participants : int
        Number of participants.

    Returns
    -------
    int
        Number of models; each has a table for every participant.
    """
    rng = np.random.default_rng(0)
    bundles = [bundle for bundle in resolve_bundles(["all"], ["T1w"]) if bundle.detector != "intensity"]
    bundles = bundles[:DETECTORS]
    rows = []
    for number in range(participants):
        subject, has_lesions = f"sub-{number:05d}", number % 3 == 0
        rows.append(
            {
                "participant_id": subject,
                "age": round(rng.uniform(20, 85), 1),
                "sex": "MF"[number % 2],
                "scanner": f"scanner{rng.integers(SCANNERS)}",
                "group": "patient" if has_lesions else "control",
                "pathology": ("stroke", "tumour")[number % 2] if has_lesions else None,
            }
        )
        folder = root / "derivatives" / subject / "anat"
        folder.mkdir(parents=True)
        lesions = draw_lesions(rng) if has_lesions else None
        for bundle in bundles:
            write_scores(folder, subject, bundle, lesions, rng)
        write_record(root / "derivatives", subject, bundles)
        quality = pd.DataFrame([{"exclude": "no", "exclude_reasons": "n/a"}])
        write_tsv(folder / f"{subject}_space-SRI24_desc-T1wPreproc_qc.tsv", quality)
    write_tsv(root / "participants.tsv", pd.DataFrame(rows))
    return len(bundles)


def write_record(output_dir: Path, subject: str, bundles: list[Bundle]) -> None:
    """Write the completion record of an image, which lists its score tables."""
    key = f"{subject}_T1w"
    models = {}
    for bundle in bundles:
        files = output_dir.glob(f"{subject}/anat/*_desc-{detector_desc('T1w', bundle.detector)}_*")
        names = sorted(path.relative_to(output_dir).as_posix() for path in files)
        models[bundle.scored_as] = ModelRecord(bundle.label, bundle.sha256, outputs=names)
    record = CompletionRecord(key, "benchmark", f"{subject}/anat/{key}.nii.gz", {}, models=models)
    write_json(output_dir / subject / "log" / f"{key}.json", asdict(record))


def draw_lesions(rng: np.random.Generator) -> pd.DataFrame:
    """Draw 1 to 20 lesions of a participant with a total volume of 0.1 to 100 mL."""
    parts = rng.dirichlet(np.ones(rng.integers(1, 21)))
    volumes = np.maximum(1, np.sort(parts)[::-1] * 10 ** rng.uniform(2, 5)).astype(int)
    table = pd.DataFrame({"lesion": np.arange(1, len(volumes) + 1), "volume_mm3": volumes})
    table["contrast"] = rng.normal(2, 1, len(table)).round(3)
    positions = [f"{point}_{axis}" for point in ("centroid", "mni") for axis in "xyz"]
    table[positions] = rng.uniform(-60, 60, (len(table), 6)).round(1)
    return table


def bin_probabilities(inner_edges: np.ndarray) -> np.ndarray:
    """Return the probability of each bin under a standard normal distribution, given the inner edges."""
    return np.diff(ndtr(np.concatenate([[-np.inf], inner_edges, [np.inf]])))


def write_scores(
    folder: Path, subject: str, bundle: Bundle, lesions: pd.DataFrame | None, rng: np.random.Generator
) -> None:
    """Write the score tables of one image and model; scores are log-normal."""
    edges = bundle.bin_edges
    name, threshold = "fpr_1pct", bundle.thresholds["fpr_1pct"]
    log_edges = np.log(np.maximum(edges[1:-1], 1e-6) / threshold)
    healthy = rng.multinomial(VOXELS, bin_probabilities(log_edges + 2.3 + rng.normal(0, 0.2)))
    size = None if lesions is None else int(lesions["volume_mm3"].sum())
    lesion = (
        None if size is None else rng.multinomial(size, bin_probabilities(log_edges + rng.normal(0, 0.5)))
    )
    positive = healthy[edges[:-1] >= threshold].sum()
    if lesion is not None:
        positive += lesion[edges[:-1] >= threshold].sum()
    stem = f"{subject}_space-SRI24_desc-{detector_desc('T1w', bundle.detector)}"
    write_tsv(folder / f"{stem}_histogram.tsv", histogram_table(edges, healthy, lesion))
    detected = 0
    if lesions is not None:
        table = lesions.assign(detected_fraction=rng.uniform(-0.5, 1, len(lesions)).clip(0).round(4))
        table["detected"] = (table["detected_fraction"] > 0).astype(int)
        detected = int(table["detected"].sum())
        write_tsv(folder / f"{stem}_lesions.tsv", table[list(LESION_COLUMNS)])
    row = {
        "source_image": f"{subject}/anat/{subject}_T1w.nii.gz",
        "modality": "T1w",
        "detector": bundle.detector,
        "preset": bundle.preset,
        "model_sha256": bundle.sha256,
        "app_version": __version__,
        "threshold": repr(threshold),
        "threshold_name": name,
        "seen_in_training": "no",
        "brain_volume_mm3": VOXELS + (size or 0),
        "anomaly_volume_mm3": positive,
        "lesion_volume_mm3": size,
        "min_lesion_volume_mm3": 1,
        "n_components": 5,
        "n_counted_components": 5,
        "n_lesions": None if lesions is None else len(lesions),
        "n_lesions_detected": None if lesions is None else detected,
        "n_false_components": size and 4,
    }
    write_tsv(folder / f"{stem}_metrics.tsv", pd.DataFrame([row]))


def measure(root: Path) -> dict[str, float]:
    """Run the group level; return times, peak memory of all processes and size of the report.

    `quiet_seconds` is the wall time if nothing else runs: the CPU time of the main process, and that of its
    worker processes divided by their number, which does not depend on the load of the machine.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    command = [sys.executable, "-m", "bids_uad", str(root), str(root / "derivatives"), "group"]
    process = subprocess.Popen([*command, "--nprocs", str(PROCESSES)], stdout=subprocess.DEVNULL)
    peak, main = 0, 0.0
    while process.poll() is None:
        peak = max(peak, resident(process.pid))
        main = max(main, own_cpu_seconds(process.pid))
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"the group level failed ({process.returncode})")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(used, 1),
        "quiet_seconds": round(main + (used - main) / PROCESSES, 1),
        "peak_mb": round(peak / 1e6),
        "page_mb": round((root / "derivatives" / "group.html").stat().st_size / 1e6, 1),
    }


def resident(pid: int) -> int:
    """Return the memory of a process and its children in bytes, as proportional set size (Linux)."""
    own = Path(f"/proc/{pid}")
    try:
        size = re.search(r"^Pss: +(\d+) kB", (own / "smaps_rollup").read_text(), re.MULTILINE)
        children = [child for task in own.glob("task/*/children") for child in task.read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return 0  # the process has ended
    return (1024 * int(size[1]) if size else 0) + sum(resident(int(child)) for child in children)


def own_cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process without its children (Linux); 0 if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Measure each cohort size, print a table and write the JSON."""
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
