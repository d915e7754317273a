"""How much volumes of lesions differ between two scans of an unchanged brain.

``python -m benchmarks.sessions OUT --pairs N`` simulates N participants with a lesion and two sessions each:
the same brain in another position and scanner, with other noise. The participant level processes them with
the packaged PLS models, and its tables of lesions in both sessions are collected in
``benchmarks/results/sessions.tsv``, from which the limits of change are derived. Finished scans are not
processed again, so that more pairs can be added.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from benchmarks.simulated import RESULTS, markdown
from bids_uad.cli.main import main as bids_uad
from bids_uad.config import MODALITIES
from bids_uad.files import write_json, write_tsv
from bids_uad.images import save_image
from bids_uad.simulation.acquisition import draw_scanner
from bids_uad.simulation.native import simulate_native_scan
from bids_uad.simulation.subject import (
    Population,
    draw_subject_info,
    make_anatomy,
    make_signal,
    random_stream,
)

SEED = 61
KINDS = ("tumour", "stroke", "ms", "wmh")
SESSIONS = ("1", "2")
SHIFT = 1000
"""Added to the index of a participant for the random numbers of the second session."""
TABLE = RESULTS / "sessions.tsv"
COLUMNS = ["volume_before_mm3", "volume_after_mm3", "overlap_mm3", "residual_mm"]


def simulate(raw: Path, index: int, modalities: tuple[str, ...]) -> str:
    """Simulate the two sessions of a participant; return the label.

    Parameters
    ----------
    raw : pathlib.Path
        Dataset folder.
    index : int
        Number of the participant.
    modalities : tuple of str
        Contrasts.
    """
    population = Population(SEED)
    subject = draw_subject_info(population, index)
    label = f"{index + 1:02d}"
    if (raw / f"sub-{label}").is_dir():
        return label
    anatomy = make_anatomy(population, index, subject, KINDS[index % len(KINDS)])
    for position, session in enumerate(SESSIONS):
        number = (index + 2 * position) % population.scanners
        scanner = draw_scanner(number, False, random_stream(SEED, number, "scanner"))
        folder = raw / f"sub-{label}" / f"ses-{session}" / "anat"
        own = index + SHIFT * position
        for modality in modalities:
            image, settings, _ = make_signal(
                population, index, replace(subject, scanner=scanner), anatomy, modality
            )
            scan = simulate_native_scan(
                image,
                settings,
                anatomy,
                random_stream(SEED, own, "pose"),
                random_stream(SEED, own, f"{modality}-scan"),
                truth=False,
            )
            target = folder / f"sub-{label}_ses-{session}_{modality}"
            save_image(scan.image, target.with_suffix(".nii.gz"))
            write_json(target.with_suffix(".json"), {"SkullStripped": True})
    return label


def collect(out: Path) -> pd.DataFrame:
    """Read the tables of lesions of all participants.

    Parameters
    ----------
    out : pathlib.Path
        Derivatives.

    Returns
    -------
    pandas.DataFrame
        One row per lesion (or pair of sessions that was not matched).
    """
    tables = []
    for path in sorted(out.glob("sub-*/anat/*_desc-longitudinal_lesions.tsv")):
        table = pd.read_csv(path, sep="\t", na_values="n/a")
        tables.append(table.assign(participant_id=path.name.split("_")[0]))
    table = pd.concat(tables, ignore_index=True)
    return table[["participant_id", "modality", "detector", *COLUMNS, "not_matched"]]


def limits(table: pd.DataFrame, small: float = 1000.0) -> pd.DataFrame:
    """Summarise the differences by modality.

    Parameters
    ----------
    table : pandas.DataFrame
        Lesions of two scans of unchanged brains, see :func:`collect`.
    small : float, default=1000
        Mean volume in mm3 up to which a lesion is small.

    Returns
    -------
    pandas.DataFrame
        For each modality the number of pairs and lesions, and the 95th percentiles of the difference in
        volume of small lesions found in both scans (mm3), of that of larger ones (fraction of the mean
        volume), and of the volume of lesions found in one scan only (mm3).
    """
    rows = []
    for modality, own in table.groupby("modality", sort=False):
        before, after = own["volume_before_mm3"].dropna(), own["volume_after_mm3"].dropna()
        mean, difference = (before + after) / 2, (after - before).abs()
        both = (before > 0) & (after > 0)
        rows.append(
            {
                "modality": modality,
                "pairs": own["participant_id"].nunique(),
                "residual, mm (largest)": own["residual_mm"].max(),
                "lesions in both": int(both.sum()),
                "small": int((both & (mean <= small)).sum()),
                "small, mm3": _percentile(difference[both & (mean <= small)]),
                "larger, fraction": _percentile((difference / mean)[both & (mean > small)]),
                "in one": int((~both).sum()),
                "in one, mm3": _percentile(difference[~both]),
            }
        )
    return pd.DataFrame(rows)


def _percentile(values: pd.Series) -> float:
    return float(np.percentile(values, 95)) if len(values) else float("nan")


def round_up(value: float) -> float:
    """Round up to two significant digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return math.ceil(value / unit - 1e-9) * unit


def main() -> None:
    """Simulate, process and collect."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--modalities", nargs="+", choices=MODALITIES, default=list(MODALITIES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    raw, out = args.out / "raw", args.out / "out"
    write_json(raw / "dataset_description.json", {"Name": "Pairs of scans", "BIDSVersion": "1.10.0"})
    for index in range(args.pairs):
        with torch.no_grad():
            label = simulate(raw, index, tuple(args.modalities))
        options = ["--participant-label", label, "--modalities", *args.modalities, "--models", "pls"]
        options += ["-w", str(args.out / "work"), "--nprocs", "1", "--omp-nthreads", "1", "--no-viewer"]
        if bids_uad([str(raw), str(out), "participant", *options]):
            raise SystemExit("the participant level failed")
        table = collect(out)
        write_tsv(TABLE, table)
        print(markdown(limits(table)))


if __name__ == "__main__":
    main()
