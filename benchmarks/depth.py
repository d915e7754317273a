"""Depth of the default detector: slices with their neighbours against patches in three dimensions.

``python -m benchmarks.depth VALIDATION TRAIN [TRAIN ...] --modality T2w`` trains the preset `default` from
random weights, and then a network with three-dimensional convolutions for the same CPU time, on patches of
scans that are painted in the same way. Both are applied to every third slice of the validation scans. It
writes ``benchmarks/results/depth-<modality>.tsv``, whose columns are those of :mod:`benchmarks.ablations`.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from benchmarks.ablations import (
    RESULTS,
    SLICE_STEP,
    evaluate,
    summarise,
    train_variant,
    training_store,
    validation_slices,
)
from benchmarks.simulated import markdown
from bids_uad.config import MODALITIES
from bids_uad.dataset.sri24_scans import PreprocessedScan, find_preprocessed
from bids_uad.engine.execution import Execution
from bids_uad.engine.inference import default_field
from bids_uad.files import write_tsv
from bids_uad.methods.pls.detector import PLACE_CHANNELS, PLS, weighted_cross_entropy
from bids_uad.networks.synthetic_anomalies import uniform, vary_intensities
from bids_uad.training.checkpoint import moving_average
from bids_uad.training.store import SliceStore

WIDTHS = (24, 48, 72, 96)
"""Channels of the levels of the three-dimensional network, as of the preset `default`."""
FOLD = 2
"""Voxels along each axis that are folded into the channels; the preset `default` folds those of a slice."""
PATCH = 96
"""Side of a patch in voxels."""
PATCHES_PER_SCAN = 8
"""Patches of a painted scan that are used before the next one is painted."""
DEPTH = 144
"""Slices of the volume to which the trained network is applied, from the lowest slice of the brain on."""


class PatchNetwork(nn.Module):
    """U-Net with three-dimensional convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv3d(FOLD**3 + PLACE_CHANNELS, WIDTHS[0], 3, padding=1)
        levels = list(itertools.pairwise(WIDTHS))
        self.encoder = nn.ModuleList([_block(upper, lower) for upper, lower in levels])
        self.decoder = nn.ModuleList([_block(upper + lower, upper) for upper, lower in reversed(levels)])
        self.leave = nn.Conv3d(WIDTHS[0], FOLD**3, 3, padding=1)

    def forward(self, image: Tensor, place: Tensor) -> Tensor:
        """Map intensities in [-1, 1] and place, shape (B, 1 and C, D, H, W), to logits (B, 1, D, H, W)."""
        x = self.enter(torch.cat([_fold(image), F.avg_pool3d(place, FOLD)], 1))
        skips = []
        for block in self.encoder:
            skips.append(x)
            x = block(F.avg_pool3d(x, 2))
        for block in self.decoder:
            x = block(torch.cat([F.interpolate(x, scale_factor=2), skips.pop()], 1))
        return _unfold(self.leave(x))


def _block(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [
            nn.Conv3d(channels, outputs, 3, padding=1),
            nn.GroupNorm(outputs // 12, outputs),
            nn.SiLU(),
        ]
    return nn.Sequential(*layers)


def _fold(x: Tensor) -> Tensor:
    """Move neighbouring voxels to the channels: (B, 1, D, H, W) to (B, 8, D / 2, H / 2, W / 2)."""
    for axis in (2, 3, 4):
        x = torch.cat(x.unflatten(axis, (-1, FOLD)).unbind(axis + 1), 1)
    return x


def _unfold(x: Tensor) -> Tensor:
    """Invert :func:`_fold`."""
    for axis in (4, 3, 2):
        x = torch.stack(x.chunk(FOLD, 1), axis + 1).flatten(axis, axis + 1)
    return x


def patches(
    detector: PLS, store: SliceStore, seed: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Generator]]:
    """Yield intensities, place, target and weight of patches that are centred in the brain.

    Parameters
    ----------
    detector : PLS
        Detector that paints the scans.
    store : SliceStore
        Training scans.
    seed : int
        Random seed.

    Yields
    ------
    tuple
        Tensors of shape (1, C, D, H, W), and the generator of further random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.from_numpy(np.unique(store.scans))
    while True:
        for number in numbers[torch.randperm(len(numbers), generator=generator)].tolist():
            scan = detector.paint(store.scan(number), generator)
            inside = scan.brain.nonzero()
            shape = torch.tensor(scan.brain.shape)
            for _ in range(PATCHES_PER_SCAN):
                centre = inside[torch.randint(len(inside), (), generator=generator)]
                start = torch.minimum((centre - PATCH // 2).clamp_min(0), shape - PATCH).tolist()
                box = tuple(slice(first, first + PATCH) for first in start)
                place = _place(detector, scan.slices, *box)
                parts = (scan.slices[box], scan.target[box], scan.weight[box])
                image, target, weight = (part[None, None].float() for part in parts)
                yield image, place, target, weight, generator


def _place(detector: PLS, slices: Tensor, numbers: slice, rows: slice, columns: slice) -> Tensor:
    """Return coordinates and tissue priors of a part of a scan, shape (1, C, D, h, w)."""
    inputs = detector.inputs(slices, range(numbers.start, numbers.stop), rows, columns)
    return inputs[:, detector.hyper.intensity_channels :].float().movedim(1, 0)[None]


def train_patches(detector: PLS, store: SliceStore, seconds: float, seed: int) -> tuple[nn.Module, int]:
    """Train the three-dimensional network for some CPU time, with the optimiser settings of PLS.

    Parameters
    ----------
    detector : PLS
        Detector that paints the scans, and whose hyper-parameters are used.
    store : SliceStore
        Training scans.
    seconds : float
        CPU time.
    seed : int
        Random seed.

    Returns
    -------
    network : torch.nn.Module
        Network with averaged weights.
    steps : int
        Number of steps.
    """
    torch.manual_seed(seed)
    (stage,) = detector.stages()
    network = PatchNetwork()
    average = moving_average(network, stage.optimiser.ema_decay or 0.0)
    optimiser = torch.optim.AdamW(network.parameters())
    start, steps = time.process_time(), 0
    for image, place, target, weight, generator in patches(detector, store, seed):
        done = (time.process_time() - start) / seconds
        if done >= 1:
            break
        for group in optimiser.param_groups:
            rising = min(1.0, (done + 1e-3) / 0.02)
            group["lr"] = stage.learning_rate * rising * 0.5 * (1 + math.cos(math.pi * done))
        varied = vary_intensities(
            image[:, 0], detector.hyper.intensity, detector.hyper.fine_bias_strength, generator
        )
        kept = uniform((1, 1, 1, 1, 1), 0.0, 1.0, generator) >= detector.hyper.place_dropout
        logits = network(2 * varied[:, None] * (image > 0) - 1, place * kept)
        loss = weighted_cross_entropy(logits, target, weight)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), stage.optimiser.clip_norm or math.inf)
        optimiser.step()
        average.update_parameters(network)
        steps += 1
    return average.module, steps


@torch.inference_mode()
def score_whole(detector: PLS, network: nn.Module, scan: PreprocessedScan) -> tuple[np.ndarray, np.ndarray]:
    """Score every third slice of a scan with the three-dimensional network.

    Parameters
    ----------
    detector : PLS
        Detector whose inputs and field of view are used.
    network : torch.nn.Module
        Trained network.
    scan : PreprocessedScan
        Scan.

    Returns
    -------
    scores : numpy.ndarray of float32, shape (N,)
        Scores of the brain voxels, the mean over the scan and its left-right mirror image.
    lesion : numpy.ndarray of bool, shape (N,)
        Whether they are lesion.
    """
    slices, inside, lesion = validation_slices(scan)
    field = default_field(detector.field_of_view)
    first = min(int(inside.flatten(1).any(1).nonzero()[0]), len(slices) - DEPTH)
    numbers = slice(first, first + DEPTH)
    image = 2 * field.cut(slices)[numbers][None, None] - 1
    place = _place(detector, slices, numbers, field.rows, field.columns)
    straight = network(image, place).sigmoid()
    mirrored = network(image.flip(3), place.flip(3)).sigmoid().flip(3)
    scores = torch.zeros(slices.shape)
    field.cut(scores)[numbers] = (straight + mirrored)[0, 0] / 2
    chosen = inside.clone()
    chosen[[number for number in range(len(slices)) if number % SLICE_STEP]] = False
    return scores[chosen].numpy(), lesion[chosen].numpy()


def main(arguments: list[str] | None = None) -> None:
    """Train and compare both networks."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("validation", type=Path, help="preprocessed healthy and lesion scans")
    parser.add_argument("train", nargs="+", type=Path, help="datasets of preprocessed healthy scans")
    parser.add_argument("--modality", choices=MODALITIES, default="T2w", help="contrast (default T2w)")
    parser.add_argument("--lesion-masks", type=Path, help="as of `bids_uad train`")
    parser.add_argument("--steps", type=int, default=400, help="of the preset `default` (default 400)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and painted scans (default 0)")
    parser.add_argument("--work-dir", type=Path, default=Path("work"), help="checkpoints (default ./work)")
    parser.add_argument("--output", type=Path, help="table (default: benchmarks/results)")
    args = parser.parse_args(arguments)
    args.start = None  # random weights
    torch.set_num_threads(1)
    validation = find_preprocessed(args.validation, args.modality)
    store = training_store(args)
    hyper = PLS.presets["default"]
    start = time.process_time()
    detector = train_variant(lambda: PLS(hyper), store, args.work_dir / f"depth-{args.modality}", args)
    seconds = time.process_time() - start
    painter = PLS(hyper)
    painter.shapes = detector.shapes
    tables = {
        f"slices with neighbours, {args.steps} steps": evaluate(Execution().prepare(detector), validation)
    }
    network, steps = train_patches(painter, store, seconds, args.seed)
    tables[f"patches, {steps} steps"] = evaluate(
        painter, validation, scorer=lambda painter, scan: score_whole(painter, network, scan)
    )
    table = pd.DataFrame(summarise(tables)).round(4)
    write_tsv(args.output or RESULTS / f"depth-{args.modality}.tsv", table)
    print(f"CPU time of each training: {seconds / 60:.0f} min\n{markdown(table)}")


if __name__ == "__main__":
    main()
