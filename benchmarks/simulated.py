"""The benchmark of the packaged models on simulated scans that are not in their training data.

``python -m benchmarks.simulated TEST OUT`` scores the preprocessed scans of TEST with every model, writes the
score tables of the participant level to OUT (existing ones are kept), runs the group level on them, and
writes ``benchmarks/results/simulated.tsv``: a row for all lesions and one for each kind.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from rich.progress import track

from benchmarks.scan import read, score_volume
from bids_uad import __version__
from bids_uad.calibration.thresholds import score_counts
from bids_uad.cli.main import main as bids_uad
from bids_uad.config import DEFAULT_MIN_COUNTED_VOLUME, MODALITIES
from bids_uad.dataset.naming import detector_desc
from bids_uad.dataset.participants import read_participants, source_name, subject_hashes
from bids_uad.dataset.sri24_scans import PreprocessedScan, find_preprocessed, sibling_output
from bids_uad.engine.bundle import Bundle, resolve_bundles
from bids_uad.evaluation.metrics import edge_index
from bids_uad.files import write_tsv
from bids_uad.levels.participant.leakage import scanner_seen
from bids_uad.levels.participant.postprocess import (
    histogram_table,
    label_components,
    lesion_table,
    metrics_row,
)

RESULTS = Path(__file__).parent / "results"
COLUMNS = {
    "detector": "detector",
    "modality": "modality",
    "cohort": "lesion",
    "n_lesion_scans": "scans",
    "threshold_name": "threshold",
    "dice_mean": "Dice, fixed threshold",
    "dice_optimal": "Dice, best threshold",
    "auprc_mean": "AUPRC",
    "fpr_healthy_mean": "healthy FPR",
    "fpr_healthy_at_1pct": "healthy FPR at fpr_1pct",
}


def tables_of(scan: PreprocessedScan, bundle: Bundle, out: Path) -> tuple[Path, Path]:
    """Return the paths of the score tables of a scan: metrics and histogram."""
    image = out / scan.subject / "anat" / scan.image.name
    desc = f"desc-{detector_desc(bundle.modality, bundle.scored_as)}"
    return sibling_output(image, f"{desc}_metrics.tsv"), sibling_output(image, f"{desc}_histogram.tsv")


def write_tables(
    scan: PreprocessedScan,
    bundle: Bundle,
    scores: np.ndarray,
    brain: np.ndarray,
    seen_in: list[str],
    seen: str | None,
    out: Path,
) -> None:
    """Write the score tables of a map; that of the metrics last, which marks the others as complete."""
    metrics, histogram = tables_of(scan, bundle, out)
    # Only scans with a lesion have a lesion mask.
    lesion = read(scan.lesion) > 0 if scan.lesion else None
    name, threshold = bundle.default_threshold
    mask = bundle.rule.mask(scores, brain)
    labels = label_components(mask)
    facts = {
        "source_image": f"{scan.subject}/anat/{scan.image.name}",
        "modality": bundle.modality,
        "detector": bundle.scored_as,
        "preset": bundle.preset,
        "model_sha256": bundle.sha256,
        "app_version": __version__,
        "threshold": repr(threshold),
        "threshold_name": name,
        "seen_in_training": " and ".join(seen_in) or "no",
        "scanner_seen": seen,
    }
    write_tsv(
        histogram, histogram_table(bundle.bin_edges, *score_counts(scores, brain, lesion, bundle.bin_edges))
    )
    if lesion is not None:
        lesions = metrics.with_name(metrics.name.replace("_metrics.", "_lesions."))
        write_tsv(lesions, lesion_table(lesion, mask, read(scan.image), brain))
    write_tsv(metrics, metrics_row(facts, labels, brain, lesion, DEFAULT_MIN_COUNTED_VOLUME))


def healthy_fpr(scans: list[PreprocessedScan], bundle: Bundle, out: Path) -> float:
    """Return the mean fraction of healthy brain voxels above the threshold ``fpr_1pct``."""
    shares = []
    for scan in scans:
        if scan.lesion is None:
            table = pd.read_csv(tables_of(scan, bundle, out)[1], sep="\t")
            edge = edge_index(table["score_lower"].to_numpy(), bundle.thresholds["fpr_1pct"])
            shares.append(table["n_nonlesion"][edge:].sum() / table["n_nonlesion"].sum())
    return float(np.mean(shares))


def markdown(table: pd.DataFrame) -> str:
    """Return a table in Markdown, numbers with three digits."""
    rows = [
        [f"{value:.3f}" if isinstance(value, float) else str(value) for value in row]
        for row in table.itertuples(index=False)
    ]
    lines = [list(table.columns), ["---"] * len(table.columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Score the scans, run the group level, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("test", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", nargs="+", default=["all"], help="as of bids_uad (default: all packaged)")
    parser.add_argument("--modalities", nargs="+", choices=MODALITIES, default=["T1w", "T2w"])
    parser.add_argument("--only-score", action="store_true", help="do not write the table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    bundles = resolve_bundles(args.models, args.modalities)
    people = read_participants(args.test)
    rates = []
    for bundle in bundles:
        scans = find_preprocessed(args.test, bundle.modality)
        missing = [scan for scan in scans if not tables_of(scan, bundle, args.out)[0].is_file()]
        for scan in track(missing, description=bundle.name):
            seen_in = bundle.cohorts_containing(subject_hashes(args.test, [scan.subject]))
            scanner = people.person(scan.subject, scan.session).scanner
            seen = scanner_seen(bundle, scanner, source_name(args.test))
            brain = read(scan.brain) > 0
            scores = score_volume(bundle, read(scan.image), brain, scan.key)
            write_tables(scan, bundle, scores, brain, seen_in, seen, args.out)
        rates.append(
            {
                "detector": bundle.detector,
                "modality": bundle.modality,
                "fpr_healthy_at_1pct": healthy_fpr(scans, bundle, args.out),
            }
        )
    if args.only_score:
        return
    if bids_uad([str(args.test), str(args.out), "group"]):
        raise SystemExit("the group level failed")
    benchmark = pd.read_csv(args.out / "group_benchmark.tsv", sep="\t").merge(pd.DataFrame(rates))
    table = benchmark[list(COLUMNS)].rename(columns=COLUMNS)
    write_tsv(RESULTS / "simulated.tsv", table.round(4))
    print(markdown(table))


if __name__ == "__main__":
    main()
