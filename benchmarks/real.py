"""The benchmark of the packaged models on real scans.

``python -m benchmarks.real DATA OUT`` runs the participant and the group level on the participants of a BIDS
dataset who have a lesion mask in ``DATA/derivatives/lesions``, and on some healthy ones, none of whom was
used in training. It writes ``benchmarks/results/real.tsv``, with a row for each detector, modality and
pathology, and ``real_scans.tsv``, with a row for each detector and scan. The baseline is a threshold on the
intensity of the scan after a median filter, chosen for each scan. ``--before OTHER`` compares with the
outputs of another version in OTHER, scan by scan.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.ndimage import median_filter

from benchmarks.scan import read
from benchmarks.simulated import markdown
from bids_uad.cli.main import main as bids_uad
from bids_uad.config import MODALITIES
from bids_uad.dataset.participants import Participants, read_participants, subject_hashes
from bids_uad.dataset.sri24_scans import PreprocessedScan, find_preprocessed
from bids_uad.engine.bundle import Bundle, resolve_bundles
from bids_uad.evaluation.bootstrap import bootstrap_interval
from bids_uad.evaluation.metrics import counts_above, dice_curve
from bids_uad.evaluation.subjects import LESION, unit_role
from bids_uad.evaluation.tables import UnitScores, find_metrics_tables, read_unit
from bids_uad.files import write_tsv

RESULTS = Path(__file__).parent / "results"
COLUMNS = {
    "detector": "detector",
    "modality": "modality",
    "cohort": "pathology",
    "n_lesion_scans": "scans",
    "threshold_name": "threshold",
    "dice_mean": "Dice, fixed threshold",
    "dice_optimal": "best threshold",
    "dice_each": "best of each scan",
    "auprc_mean": "AUPRC",
    "lesion_sensitivity": "lesions found",
    "fpr_lesion_mean": "FPR beside lesions",
    "n_healthy_scans": "healthy scans",
    "fpr_healthy_median": "healthy FPR, median",
}


SCAN_COLUMNS = ["lesion_volume_mm3", "dice", "auprc", "lesion_sensitivity", "fpr", "marked"]
"""Columns of the table of scans, beside detector, modality, pathology and participant."""


def choose(data: Path, people: Participants, healthy: int, bundles: list[Bundle]) -> list[str]:
    """Choose the participants: all with a lesion mask, and healthy ones of all sites in turn.

    Parameters
    ----------
    data : pathlib.Path
        Dataset.
    people : Participants
        Contents of its participants.tsv.
    healthy : int
        Number of healthy participants.
    bundles : list of Bundle
        Models; participants of their training or validation data are left out.

    Returns
    -------
    list of str
        Names, ``sub-<label>``.
    """
    hashes = {name: subject_hashes(data, [name]) for name in people.labels}
    unseen = [
        name for name in hashes if not any(bundle.cohorts_containing(hashes[name]) for bundle in bundles)
    ]
    masks = (data / "derivatives" / "lesions").glob("sub-*/**/*_label-lesion_*mask.nii.gz")
    masked = {path.name.split("_")[0] for path in masks}
    sites: dict[str, list[str]] = {}
    for name in unseen:
        if people.person(name).healthy:
            sites.setdefault(people.row(name).get("site", ""), []).append(name)
    queues = [list(names) for names in sites.values()]
    controls = []
    while len(controls) < healthy and any(queues):
        controls += [queue.pop(0) for queue in queues if queue]
    return [name for name in unseen if name in masked or name in controls[:healthy]]


def best_dice(nonlesion: np.ndarray, lesion: np.ndarray) -> float:
    """Compute the largest Dice over all thresholds, from counts per ascending score bin."""
    return float(dice_curve(nonlesion, lesion).max())


def intensity_baseline(
    volume: np.ndarray, brain: np.ndarray, lesion: np.ndarray, modality: str
) -> tuple[float, float]:
    """Compute the best Dice and the average precision of the scan's intensity, median of 3 x 3 x 3 voxels.

    Parameters
    ----------
    volume : numpy.ndarray of float
        Preprocessed scan.
    brain, lesion : numpy.ndarray of bool
        Brain and lesion masks on the same grid.
    modality : {"T1w", "T2w", "FLAIR"}
        Contrast; lesions are hypointense in T1w, hyperintense in the others.

    Returns
    -------
    dice, average_precision : float
        NaN if no voxel inside the brain is lesion.
    """
    if not lesion[brain].any():
        return float("nan"), float("nan")
    scores = median_filter(volume, 3)[brain] * (-1 if modality == "T1w" else 1)
    _, bins = np.unique(scores, return_inverse=True)
    inside, rest = np.bincount(bins, lesion[brain]), np.bincount(bins, ~lesion[brain])
    found = counts_above(inside)
    precision = found / (found + counts_above(rest))
    return best_dice(rest, inside), float((precision * inside).sum() / inside.sum())


def baseline_rows(scans: list[PreprocessedScan], people: Participants, modality: str) -> Iterator[dict]:
    """Yield the rows of the baseline: one for each pathology, and one for all."""
    rows = []
    for scan in scans:
        if scan.lesion is not None and not people.person(scan.subject, scan.session).healthy:
            brain = read(scan.brain) > 0
            numbers = intensity_baseline(read(scan.image), brain, read(scan.lesion) > 0, modality)
            rows.append((people.cohort(scan.subject, scan.session), *numbers))
    table = pd.DataFrame(rows, columns=["cohort", "dice_each", "auprc_mean"])
    for cohort in ("all", *sorted(set(table["cohort"]))):
        of_cohort = table if cohort == "all" else table[table["cohort"] == cohort]
        means = of_cohort[["dice_each", "auprc_mean"]].mean().to_dict()
        yield {
            "detector": "threshold on intensity",
            "modality": modality,
            "cohort": cohort,
            "n_lesion_scans": len(of_cohort),
            **means,
        }


def best_of_each(units: list[UnitScores]) -> pd.DataFrame:
    """Compute the mean over lesion scans of the best Dice of each, by detector, modality and cohort."""
    rows = [
        {
            "detector": unit.detector,
            "modality": unit.modality,
            "cohort": cohort,
            "dice_each": best_dice(unit.n_nonlesion, unit.n_lesion),
        }
        for unit in units
        if unit_role(unit) == LESION
        for cohort in ("all", unit.cohort)
    ]
    return pd.DataFrame(rows).groupby(["detector", "modality", "cohort"], as_index=False).mean()


def table_of(out: Path, people: Participants, modalities: Iterable[str]) -> pd.DataFrame:
    """Summarise the outputs of the participant and group levels in `out`."""
    units = [read_unit(path, people) for path in find_metrics_tables(out)]
    benchmark = pd.read_csv(out / "group_benchmark.tsv", sep="\t")
    table = benchmark.merge(best_of_each(units), how="left")
    scans = {modality: find_preprocessed(out, modality) for modality in modalities}
    rows = [row for modality in scans for row in baseline_rows(scans[modality], people, modality)]
    table = pd.concat([table, pd.DataFrame(rows)])
    table = table.sort_values(["modality", "cohort", "detector"])
    return table[list(COLUMNS)].rename(columns=COLUMNS)


def scans_of(out: Path) -> pd.DataFrame:
    """Read the metrics of each scan and detector from the group level."""
    table = pd.read_csv(out / "group_subjects.tsv", sep="\t", dtype={"session_id": str})
    table["session_id"] = table["session_id"].fillna("n/a")
    table["marked"] = table["anomaly_volume_mm3"] / table["brain_volume_mm3"]
    return table.set_index(["modality", "cohort", "participant_id", "session_id", "detector"])


def compare(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """Compare the Dice of lesion scans and the marked share of healthy scans between two versions.

    Parameters
    ----------
    before, after : pandas.DataFrame
        Tables of :func:`scans_of`; scans and detectors of both are compared.

    Returns
    -------
    pandas.DataFrame
        A row for each detector, modality, pathology and measure: number of scans, means (Dice) or medians
        (marked share), and mean difference with its 95 % bootstrap interval over participants (NaN for few).
    """
    joined = before.merge(
        after, left_index=True, right_index=True, suffixes=("_before", "_after")
    ).reset_index()
    rows = []
    for (detector, modality, cohort), scans in joined.groupby(["detector", "modality", "cohort"]):
        measure, summary = ("marked", "median") if cohort == "healthy" else ("dice", "mean")
        old, new = scans[f"{measure}_before"], scans[f"{measure}_after"]
        low, high = bootstrap_interval(new - old, scans["participant_id"], seed=0)
        rows.append(
            {
                **{"detector": detector, "modality": modality, "pathology": cohort, "measure": measure},
                **{"scans": len(scans), "before": old.agg(summary), "after": new.agg(summary)},
                **{"difference": (new - old).mean(), "low": low, "high": high},
            }
        )
    return pd.DataFrame(rows)


def main() -> None:
    """Run both levels, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--healthy", type=int, default=6, help="number of healthy participants (default 6)")
    parser.add_argument("--models", nargs="+", default=["all"], help="as of bids_uad (default: all packaged)")
    parser.add_argument("--deviation", nargs="+", help="as of bids_uad")
    parser.add_argument("--nprocs", type=int, default=1, help="as of bids_uad (default 1)")
    parser.add_argument("--work-dir", type=Path, help="scratch space (default: OUT/work)")
    parser.add_argument("--atlas-dir", type=Path, help="folder with tpl-SRI24")
    parser.add_argument(
        "--before", type=Path, metavar="OTHER", help="outputs of another version to compare with"
    )
    args = parser.parse_args()
    people = read_participants(args.data)
    bundles = resolve_bundles(args.models, MODALITIES, skip_missing=True)
    chosen = [name.removeprefix("sub-") for name in choose(args.data, people, args.healthy, bundles)]
    datasets = [str(args.data), str(args.out)]
    options = ["--participant-label", *chosen, "-w", str(args.work_dir or args.out / "work")]
    options += ["-d", f"lesions={args.data / 'derivatives' / 'lesions'}", "--models", *args.models]
    options += ["--nprocs", str(args.nprocs)]
    if args.deviation:
        options += ["--deviation", *args.deviation]
    if args.atlas_dir:
        options += ["--atlas-dir", str(args.atlas_dir)]
    if bids_uad([*datasets, "participant", *options]) or bids_uad([*datasets, "group"]):
        raise SystemExit("bids_uad failed; see above")
    table = table_of(args.out, people, {bundle.modality for bundle in bundles})
    write_tsv(RESULTS / "real.tsv", table.round(4))
    print(markdown(table))
    scans = scans_of(args.out)
    if args.before:
        before = scans_of(args.before)
        comparison = compare(before, scans).round(4)
        write_tsv(RESULTS / "real_comparison.tsv", comparison)
        print(markdown(comparison))
        scans = before[SCAN_COLUMNS[1:]].join(scans[SCAN_COLUMNS], lsuffix="_before", how="right")
    else:
        scans = scans[SCAN_COLUMNS]
    write_tsv(RESULTS / "real_scans.tsv", scans.reset_index().round(4))


if __name__ == "__main__":
    main()
