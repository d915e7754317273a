"""Effect of the normative references of the packaged models on bias and Dice on simulated scans.

``python -m benchmarks.normative TEST OUT`` scores the preprocessed scans of TEST with every packaged model
that has a reference, writes the tables of scores and of deviations to OUT (existing ones are kept),
runs the group level on them, and writes ``benchmarks/results/normative.tsv``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from rich.progress import track

from benchmarks.scan import read, score_volume
from benchmarks.simulated import RESULTS, markdown, tables_of, write_tables
from bids_uad.calibration.normative import NormativeReference
from bids_uad.cli.main import main as bids_uad
from bids_uad.dataset.participants import read_participants, subject_hashes
from bids_uad.dataset.sri24_scans import find_preprocessed
from bids_uad.engine.bundle import (
    NORMATIVE,
    NORMATIVE_FILE,
    PACKAGED,
    Bundle,
    load_bundle,
    packaged_bundles,
)
from bids_uad.files import write_tsv


def with_reference() -> list[Bundle]:
    """Packaged bundles that have a normative reference."""
    bundles = [load_bundle(PACKAGED / name) for name in packaged_bundles()]
    return [bundle for bundle in bundles if NORMATIVE in (bundle.calibration or {})]


def score_both(bundle: Bundle, test: Path, out: Path) -> None:
    """Score every scan without a table, and compute the deviations of its scores."""
    deviating = bundle.with_deviation(NORMATIVE)
    scans = find_preprocessed(test, bundle.modality)
    missing = [scan for scan in scans if not tables_of(scan, deviating, out)[0].is_file()]
    if not missing:
        return
    reference = NormativeReference.read(bundle.folder / NORMATIVE_FILE, bundle.normative["reference"])
    people = read_participants(test)
    for scan in track(missing, description=bundle.name):
        seen_in = bundle.cohorts_containing(subject_hashes(test, [scan.subject]))
        brain = read(scan.brain) > 0
        scores = score_volume(bundle, read(scan.image), brain, scan.key)
        write_tables(scan, bundle, scores, brain, seen_in, None, out)
        z = reference.deviations(scores, brain, **people.person(scan.subject, scan.session).covariates)
        write_tables(scan, deviating, z, brain, seen_in, None, out)


def main() -> None:
    """Score the scans, run the group level, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("test", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for bundle in with_reference():
        score_both(bundle, args.test, args.out)
    if bids_uad([str(args.test), str(args.out), "group"]):
        raise SystemExit("the group level failed")
    table = pd.read_csv(args.out / "group_deviations.tsv", sep="\t")
    numbers = table.select_dtypes(np.number).columns
    write_tsv(RESULTS / "normative.tsv", table.round(dict.fromkeys(numbers, 4)))
    print(markdown(table))


if __name__ == "__main__":
    main()
