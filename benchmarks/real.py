"""The benchmark of the packaged models on real scans.

``python -m benchmarks.real DATA OUT`` takes the participants of a BIDS dataset who have a lesion mask in
``DATA/derivatives/lesions``, and some healthy ones, runs the participant and the group level on them (what
is there is not made again), and writes ``benchmarks/results/real.tsv``: a row for each detector, modality and
pathology. Beside the detectors stands the floor: the scan's own intensity, median-filtered, cut at the
threshold that suits each scan best.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.ndimage import median_filter

from benchmarks.scan import read
from benchmarks.simulated import markdown
from bids_uad.cli.main import main as bids_uad
from bids_uad.dataset.participants import Participants, read_participants, subject_hashes
from bids_uad.dataset.sri24_scans import PreprocessedScan, find_preprocessed
from bids_uad.engine.bundle import Bundle, resolve_bundles
from bids_uad.evaluation.metrics import counts_above, dice_curve
from bids_uad.evaluation.subjects import LESION, unit_role
from bids_uad.evaluation.tables import UnitScores, find_metrics_tables, read_unit
from bids_uad.files import write_tsv

RESULTS = Path(__file__).parent / "results"
MODALITIES = ("T1w", "T2w")
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


def choose(data: Path, people: Participants, healthy: int, bundles: list[Bundle]) -> list[str]:
    """Choose who is scored: all with a lesion mask, and healthy ones of every site in turn.

    Whom a model has met is left out.

    Parameters
    ----------
    data : pathlib.Path
    people : Participants
        Those of `data`.
    healthy : int
        How many healthy ones.
    bundles : list of Bundle
        Models that will score them.

    Returns
    -------
    list of str
        ``sub-<label>``.
    """
    hashes = {name: subject_hashes(data, [name]) for name in people.labels}
    strangers = [
        name for name in hashes if not any(bundle.cohorts_containing(hashes[name]) for bundle in bundles)
    ]
    masks = (data / "derivatives" / "lesions").glob("sub-*/**/*_label-lesion_*mask.nii.gz")
    masked = {path.name.split("_")[0] for path in masks}
    sites: dict[str, list[str]] = {}
    for name in strangers:
        if people.person(name).healthy:
            sites.setdefault(people.row(name).get("site", ""), []).append(name)
    queues = [list(names) for names in sites.values()]
    controls = []
    while len(controls) < healthy and any(queues):
        controls += [queue.pop(0) for queue in queues if queue]
    return [name for name in strangers if name in masked or name in controls[:healthy]]


def best_dice(nonlesion: np.ndarray, lesion: np.ndarray) -> float:
    """Dice at the threshold that suits a scan best, from counts per ascending score bin."""
    return float(dice_curve(nonlesion, lesion).max())


def floor_of(volume: np.ndarray, brain: np.ndarray, lesion: np.ndarray, modality: str) -> tuple[float, float]:
    """Compute the best Dice and the average precision of the scan's intensity, median of 3 x 3 x 3 voxels.

    Parameters
    ----------
    volume : numpy.ndarray of float
        Preprocessed scan.
    brain, lesion : numpy.ndarray of bool
        Brain and lesion masks on the same grid.
    modality : str
        `T2w`, in which lesions are hyperintense, or `T1w`, in which they are hypointense.

    Returns
    -------
    dice, average_precision : float
        NaN if no voxel inside the brain is lesion.
    """
    if not lesion[brain].any():
        return float("nan"), float("nan")
    scores = median_filter(volume, 3)[brain] * (1 if modality == "T2w" else -1)
    _, bins = np.unique(scores, return_inverse=True)
    inside, rest = np.bincount(bins, lesion[brain]), np.bincount(bins, ~lesion[brain])
    found = counts_above(inside)
    precision = found / (found + counts_above(rest))
    return best_dice(rest, inside), float((precision * inside).sum() / inside.sum())


def floors(scans: list[PreprocessedScan], people: Participants, modality: str) -> Iterator[dict]:
    """Give the rows of the floor: one for each pathology and one for all."""
    rows = []
    for scan in scans:
        if scan.lesion is not None and not people.person(scan.subject, scan.session).healthy:
            brain = read(scan.brain) > 0
            numbers = floor_of(read(scan.image), brain, read(scan.lesion) > 0, modality)
            rows.append((people.cohort(scan.subject, scan.session), *numbers))
    table = pd.DataFrame(rows, columns=["cohort", "dice_each", "auprc_mean"])
    for cohort in ("all", *sorted(set(table["cohort"]))):
        of_cohort = table if cohort == "all" else table[table["cohort"] == cohort]
        means = of_cohort[["dice_each", "auprc_mean"]].mean().to_dict()
        yield {
            "detector": "floor",
            "modality": modality,
            "cohort": cohort,
            "n_lesion_scans": len(of_cohort),
            **means,
        }


def best_of_each(units: list[UnitScores]) -> pd.DataFrame:
    """Mean of each lesion scan's best Dice, by detector, modality and cohort; the group level lacks it."""
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


def table_of(out: Path, people: Participants, modalities: tuple[str, ...]) -> pd.DataFrame:
    """Make the table of what the participant and group levels left in `out`."""
    units = [read_unit(path, people) for path in find_metrics_tables(out)]
    benchmark = pd.read_csv(out / "group_benchmark.tsv", sep="\t")
    table = benchmark.merge(best_of_each(units), how="left")
    floor = [
        row for modality in modalities for row in floors(find_preprocessed(out, modality), people, modality)
    ]
    table = pd.concat([table, pd.DataFrame(floor)])
    table = table.sort_values(["modality", "cohort", "detector"])
    return table[list(COLUMNS)].rename(columns=COLUMNS)


def main() -> None:
    """Run both levels, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--healthy", type=int, default=6, help="how many healthy participants (default 6)")
    parser.add_argument("--models", nargs="+", default=["all"], help="as of bids_uad (default: all packaged)")
    parser.add_argument("--deviation", nargs="+", help="as of bids_uad")
    parser.add_argument("--work-dir", type=Path, help="scratch space (default: OUT/work)")
    parser.add_argument("--atlas-dir", type=Path, help="folder with tpl-SRI24")
    args = parser.parse_args()
    people = read_participants(args.data)
    bundles = resolve_bundles(args.models, list(MODALITIES))
    chosen = [name.removeprefix("sub-") for name in choose(args.data, people, args.healthy, bundles)]
    datasets = [str(args.data), str(args.out)]
    options = ["--participant-label", *chosen, "-w", str(args.work_dir or args.out / "work"), "--nprocs", "1"]
    options += ["-d", f"lesions={args.data / 'derivatives' / 'lesions'}", "--models", *args.models]
    if args.deviation:
        options += ["--deviation", *args.deviation]
    if args.atlas_dir:
        options += ["--atlas-dir", str(args.atlas_dir)]
    if bids_uad([*datasets, "participant", *options]) or bids_uad([*datasets, "group"]):
        raise SystemExit("bids_uad failed; see above")
    table = table_of(args.out, people, MODALITIES)
    write_tsv(RESULTS / "real.tsv", table.round(4))
    print(markdown(table))


if __name__ == "__main__":
    main()
