"""Whether fixed thresholds carry over better to other scans if scores are normalised within each scan.

``python -m benchmarks.normalisation VALIDATION TEST --cache CACHE`` scores the preprocessed scans of
VALIDATION (healthy controls and lesions), chooses the default threshold as `calibrate` does, without and with
each normalisation of `NORMALISATIONS`, and applies it to the scans of TEST, one or several datasets. No
lesion mask is used for a normalisation. It writes ``benchmarks/results/normalisation.tsv``. The score
histograms of each scan are kept in CACHE, and not computed again. ``--every 4`` scores every fourth axial
slice only.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from benchmarks.scan import read, score_volume
from benchmarks.simulated import RESULTS, markdown
from bids_uad.calibration.thresholds import (
    FINE_EDGES,
    HealthyMarked,
    ThresholdEstimator,
    score_counts,
)
from bids_uad.dataset.participants import Participants, read_participants, subject_hashes
from bids_uad.dataset.sri24_scans import PreprocessedScan, find_preprocessed, has_preprocessed
from bids_uad.engine.bundle import Bundle, resolve_bundles
from bids_uad.evaluation.bootstrap import bootstrap_interval
from bids_uad.files import atomic_path, write_tsv

MODELS = ("intensity", "patchcore", "uniad", "fae", "disyre")
NONE = "none"
CENTRES = np.concatenate([[0.0], np.sqrt(FINE_EDGES[1:-2] * FINE_EDGES[2:-1]), FINE_EDGES[-2:-1]])
"""Scores that stand for the bins of a histogram; they differ from all scores of the bin by at most 0.05 %."""


def quantile(counts: np.ndarray, level: float, values: np.ndarray = CENTRES) -> float:
    """Return a quantile of values, shape (bins,), that occur `counts` times; the lower one if between two."""
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(counts[order]) / counts.sum()
    return float(values[order][np.searchsorted(reached, level - 1e-12)])


def by_median(counts: np.ndarray) -> np.ndarray:
    """Subtract the median, and divide by the median absolute deviation, scaled to a standard deviation."""
    centred = CENTRES - quantile(counts, 0.5)
    return centred / (1.4826 * quantile(counts, 0.5, np.abs(centred)))


def by_quantiles(counts: np.ndarray) -> np.ndarray:
    """Subtract the median, and divide by the distance of the 90th percentile from it."""
    middle = quantile(counts, 0.5)
    return (CENTRES - middle) / (quantile(counts, 0.9) - middle)


def by_rank(counts: np.ndarray) -> np.ndarray:
    """Return the fraction of the brain with lower scores, so that each scan has the same share marked."""
    return (np.cumsum(counts) - counts) / counts.sum()


NORMALISATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    NONE: lambda counts: CENTRES,
    "median and MAD": by_median,
    "median and 90th percentile": by_quantiles,
    "rank": by_rank,
}
"""Normalised scores of all bins, given the histogram of the whole brain; negative ones become 0."""


@dataclass(frozen=True)
class Counts:
    """Score histograms of a scan over the bins of `FINE_EDGES`.

    Parameters
    ----------
    subject : str
        Participant.
    kind : str
        Pathology; ``healthy`` for controls.
    rest : numpy.ndarray of int, shape (bins,)
        Brain voxels outside the lesions.
    lesion : numpy.ndarray of int, shape (bins,), or None
        Brain voxels inside the lesions; None for controls.
    """

    subject: str
    kind: str
    rest: np.ndarray = field(repr=False)
    lesion: np.ndarray | None = field(repr=False)

    def normalised(self, name: str) -> Counts:
        """Return the histograms of the scores after a normalisation."""
        whole = self.rest if self.lesion is None else self.rest + self.lesion
        values = np.maximum(NORMALISATIONS[name](whole), 0)
        bins = np.maximum(np.searchsorted(FINE_EDGES[:-1], values, side="left") - 1, 0)
        rest, lesion = (
            None if counts is None else np.bincount(bins, counts, len(bins)).astype(np.int64)
            for counts in (self.rest, self.lesion)
        )
        return Counts(self.subject, self.kind, rest, lesion)

    def marked(self, threshold: float, *, lesions: bool = False) -> float:
        """Return the fraction of the brain, with or without its lesions, above a threshold."""
        counts = self.rest + self.lesion if lesions and self.lesion is not None else self.rest
        return float(counts[_edge(threshold) :].sum() / counts.sum())

    def dice(self, threshold: float) -> float:
        """Return the Dice at a threshold; NaN for controls."""
        if self.lesion is None:
            return float("nan")
        found, false = (counts[_edge(threshold) :].sum() for counts in (self.lesion, self.rest))
        return float(2 * found / (found + false + self.lesion.sum()))


def _edge(threshold: float) -> int:
    return int(np.searchsorted(FINE_EDGES, threshold))


def count_scan(
    scan: PreprocessedScan, bundles: Sequence[Bundle], folder: Path, *, healthy: bool, every: int
) -> None:
    """Score a scan with each model, unless its histograms are in a folder.

    Voxels in the lesion mask of a healthy control are left out, as by `calibrate`.
    """
    missing = [bundle for bundle in bundles if not _stored(folder, bundle, scan).is_file()]
    if not missing:
        return
    brain, lesion = read(scan.brain) > 0, read(scan.lesion) > 0 if scan.lesion else None
    brain &= np.arange(brain.shape[2]) % every == 0
    volume = read(scan.image)
    for bundle in missing:
        scores = score_volume(bundle, volume, brain, scan.key)
        inside = brain & ~lesion if healthy and lesion is not None else brain
        rest, found = score_counts(scores, inside, None if healthy else lesion, FINE_EDGES)
        with atomic_path(_stored(folder, bundle, scan)) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, rest=rest, **({} if found is None else {"lesion": found}))


def _stored(folder: Path, bundle: Bundle, scan: PreprocessedScan) -> Path:
    return folder / f"{bundle.name}-{bundle.sha256[:8]}" / f"{scan.key}.npz"


def used_scans(folder: Path, modality: str) -> Iterator[tuple[PreprocessedScan, bool, str]]:
    """Yield controls and scans with a lesion mask of a dataset, whether healthy, and the pathology."""
    people: Participants = read_participants(folder)
    for scan in find_preprocessed(folder, modality):
        if people.person(scan.subject, scan.session).healthy:
            yield scan, True, "healthy"
        elif scan.lesion is not None:
            yield scan, False, people.cohort(scan.subject, scan.session)


def read_counts(folder: Path, bundle: Bundle, stored: Path, *, unseen: bool) -> list[Counts]:
    """Read the histograms of a dataset.

    Parameters
    ----------
    folder : pathlib.Path
        Preprocessed scans and participants.tsv.
    bundle : Bundle
        Model.
    stored : pathlib.Path
        Folder of the histograms.
    unseen : bool
        Whether participants of the model's training or validation data are left out.

    Returns
    -------
    list of Counts
        Scans without a lesion voxel are left out, unless of controls.
    """
    found = []
    for scan, healthy, kind in used_scans(folder, bundle.modality):
        if unseen and bundle.cohorts_containing(subject_hashes(folder, [scan.subject])):
            continue
        with np.load(_stored(stored, bundle, scan)) as arrays:
            counts = Counts(scan.subject, kind, arrays["rest"], None if healthy else arrays["lesion"])
        if healthy or counts.lesion.any():
            found.append(counts)
    return found


def default_threshold(scans: Sequence[Counts]) -> tuple[str, float]:
    """Return name and value of the default threshold of scans."""
    estimator = ThresholdEstimator()
    for scan in scans:
        estimator.add_counts(scan.rest, scan.lesion, scan.kind)
    summary = estimator.summary()
    chosen = summary["default_threshold"]
    return chosen, summary["thresholds"][chosen]


def outcomes(validation: Sequence[Counts], test: Sequence[Counts]) -> pd.DataFrame:
    """Return marked fraction and Dice of each test scan at the threshold fixed on the validation scans.

    Returns
    -------
    pandas.DataFrame
        Columns `normalisation`, `threshold`, `limit` (95th percentile of the marked fraction of the
        validation controls), `participant_id`, `kind`, `marked` (outside the lesions), `whole` (with
        them) and `dice`.
    """
    rows = []
    for name in NORMALISATIONS:
        fixed_on = [scan.normalised(name) for scan in validation]
        chosen, threshold = default_threshold(fixed_on)
        healthy = [scan.marked(threshold) for scan in fixed_on if scan.lesion is None]
        limit = float(np.percentile(healthy, 95)) if healthy else float("nan")
        for scan in (each.normalised(name) for each in test):
            shares = scan.marked(threshold), scan.marked(threshold, lesions=True)
            rows.append((name, chosen, limit, scan.subject, scan.kind, *shares, scan.dice(threshold)))
    columns = ["normalisation", "threshold", "limit", "participant_id", "kind", "marked", "whole", "dice"]
    return pd.DataFrame(rows, columns=columns)


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Summarise the outcomes of a model, and compare each normalisation with none.

    Parameters
    ----------
    table : pandas.DataFrame
        Of :func:`outcomes`.

    Returns
    -------
    pandas.DataFrame
        A row for each normalisation; intervals are 95 % bootstrap intervals over participants.
    """
    rows = []
    reference = table[table["normalisation"] == NONE].reset_index(drop=True)
    for name, own in table.groupby("normalisation", sort=False):
        own = own.reset_index(drop=True)
        controls = own["kind"] == "healthy"
        healthy, lesion = own[controls], own[~controls]
        far_above = HealthyMarked(p95=own["limit"].iloc[0]).limit
        row = {
            "normalisation": name,
            "threshold": own["threshold"].iloc[0],
            "validation_p95": own["limit"].iloc[0],
            "healthy_scans": len(healthy),
            "healthy_median": healthy["marked"].median(),
            "healthy_p95": healthy["marked"].quantile(0.95),
            "healthy_above_p95": (healthy["marked"] > healthy["limit"]).mean(),
            "healthy_excess": (healthy["marked"] > far_above).mean(),
            "lesion_scans": len(lesion),
            "marked_beside": lesion["marked"].median(),
            "lesion_excess": (lesion["whole"] > far_above).mean(),
            "dice": lesion["dice"].mean(),
        }
        for measure, part in (("marked", healthy), ("dice", lesion)):
            difference = part[measure] - reference.loc[part.index, measure]
            low, high = bootstrap_interval(difference, part["participant_id"], seed=0)
            row |= {
                f"{measure}_difference": difference.mean(),
                f"{measure}_low": low,
                f"{measure}_high": high,
            }
        rows.append(row)
    return pd.DataFrame(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("validation", type=Path)
    parser.add_argument("test", type=Path, nargs="+")
    parser.add_argument("--cache", type=Path, required=True, help="folder of the score histograms")
    parser.add_argument("--models", nargs="+", default=MODELS, help="as of bids_uad (default: %(default)s)")
    parser.add_argument("--modalities", nargs="+", default=["T1w", "T2w"])
    parser.add_argument(
        "--every",
        type=int,
        default=1,
        help="score every n-th axial slice (default 1); not for pls, whose input includes neighbours",
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    tables = []
    bundles = resolve_bundles(list(args.models), args.modalities, skip_missing=True)
    if args.every > 1 and any(bundle.detector == "pls" for bundle in bundles):
        parser.error("--every: the input of pls includes neighbouring slices; omit it or pls")
    stored = {
        folder: args.cache / f"every-{args.every}" / str(number) / folder.resolve().name
        for number, folder in enumerate([args.validation, *args.test])
    }
    for modality in args.modalities:
        own = [bundle for bundle in bundles if bundle.modality == modality]
        folders = {folder: path for folder, path in stored.items() if has_preprocessed(folder, modality)}
        for folder, path in folders.items():
            for scan, healthy, _ in used_scans(folder, modality):
                count_scan(scan, own, path, healthy=healthy, every=args.every)
        for bundle in own:
            validation, *tests = (
                read_counts(folder, bundle, path, unseen=folder != args.validation)
                for folder, path in folders.items()
            )
            table = summarise(outcomes(validation, [counts for each in tests for counts in each]))
            table.insert(0, "detector", bundle.detector)
            table.insert(1, "modality", bundle.modality)
            print(markdown(table), flush=True)
            tables.append(table)
    write_tsv(RESULTS / "normalisation.tsv", pd.concat(tables).round(5))


if __name__ == "__main__":
    main()
