"""Left-right mirror images at inference with the default detector: precision and cost.

``python -m benchmarks.mirror VALIDATION --modality T2w`` applies the packaged model to validation scans in
three ways: all slices and their mirror images, every second slice mirrored (as packaged), and slices only.
It writes ``benchmarks/results/mirror-<modality>.tsv``: average precision of the whole map, share of healthy
brains above the threshold of largest mean Dice, differences to the first row with 95 % intervals, CPU time.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from benchmarks.ablations import RESULTS, evaluate, summarise
from benchmarks.scan import read
from benchmarks.simulated import markdown
from bids_uad.config import MODALITIES
from bids_uad.dataset.sri24_scans import PreprocessedScan, find_preprocessed
from bids_uad.engine.bundle import load_detector, resolve_bundles
from bids_uad.engine.execution import DEFAULT_EXECUTION
from bids_uad.engine.inference import anomaly_map
from bids_uad.files import write_tsv
from bids_uad.methods.pls.detector import PLS
from bids_uad.networks.counter_rng import SliceGenerator


class Straight(PLS):
    """PLS without mirror images."""

    def score(self, slices: Tensor, brain: Tensor, generator: SliceGenerator) -> Tensor:
        """Predict the lesion probability of slices, without their mirror images."""
        return torch.where(brain, self.predict(slices), 0.0)


class Both(PLS):
    """PLS with the mirror images of all slices."""

    def score(self, slices: Tensor, brain: Tensor, generator: SliceGenerator) -> Tensor:
        """Predict the mean lesion probability of slices and mirror images."""
        one = super().score(slices, brain, generator)
        return (one + super().score(slices.flip(-2), brain.flip(-2), generator).flip(-2)) / 2


WAYS: dict[str, type[PLS]] = {
    "slices and mirror images": Both,
    "every second slice mirrored": PLS,
    "slices only": Straight,
}


def score_map(detector: PLS, scan: PreprocessedScan, seconds: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return scores and lesion mask of the brain voxels of a scan, and append the CPU time to `seconds`."""
    volume, brain = read(scan.image), read(scan.brain) > 0
    lesion = np.zeros_like(brain) if scan.lesion is None else read(scan.lesion) > 0
    start = time.process_time()
    scores = anomaly_map(detector, volume, brain, key=scan.key)
    seconds.append(time.process_time() - start)
    return scores[brain], lesion[brain]


def main(arguments: list[str] | None = None) -> None:
    """Compare the three ways."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("validation", type=Path, help="preprocessed healthy and lesion scans")
    parser.add_argument("--modality", choices=MODALITIES, default="T2w", help="contrast (default T2w)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    (bundle,) = resolve_bundles([PLS.name], [args.modality])
    scans = find_preprocessed(args.validation, args.modality)
    tables: dict[str, pd.DataFrame] = {}
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for name, kind in WAYS.items():
        packaged = load_detector(bundle)
        detector = kind(packaged.hyper).eval()
        detector.load_state_dict(packaged.state_dict())
        tables[name] = evaluate(
            DEFAULT_EXECUTION.prepare(detector), scans, scorer=partial(score_map, seconds=times[name])
        )
    table = pd.DataFrame(summarise(tables)).round(4)
    table["CPU seconds per scan"] = [round(float(np.mean(times[name])), 1) for name in WAYS]
    write_tsv(RESULTS / f"mirror-{args.modality}.tsv", table)
    print(markdown(table))


if __name__ == "__main__":
    main()
