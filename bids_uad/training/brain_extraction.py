"""Teach the network with heads that are drawn as it learns."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from bids_uad.files import atomic_path, write_text
from bids_uad.preprocessing.brain_extraction.network import BrainNet
from bids_uad.training.checkpoint import moving_average
from bids_uad.training.heads import Head, read_head, simulate_head
from bids_uad.training.loop import CLIP_NORM, rate

LEARNING_RATE = 2e-3
EMA_DECAY = 0.99

Report = Callable[[int, float], None]


def loss_of(logits: Tensor, brain: Tensor) -> Tensor:
    """Cross-entropy plus one minus soft Dice.

    Parameters
    ----------
    logits, brain : Tensor, of the same shape
        `brain` is the share of brain in each voxel.
    """
    likely = torch.sigmoid(logits)
    overlap = 2 * (likely * brain).sum() / ((likely + brain).sum() + 1)
    return F.binary_cross_entropy_with_logits(logits, brain) + 1 - overlap


def train(
    heads: Sequence[Head], steps: int, seed: int, *, precision: str = "fp32", report: Report | None = None
) -> BrainNet:
    """Train from the beginning; one head a step.

    Parameters
    ----------
    heads : sequence of Head
    steps : int
    seed : int
    precision : {"fp32", "bf16"}
    report : callable, optional
        ``report(step, loss)`` after each step.

    Returns
    -------
    BrainNet
        With the moving average of its weights.
    """
    torch.manual_seed(seed)
    network = BrainNet()
    average = moving_average(network, EMA_DECAY)
    optimiser = torch.optim.AdamW(network.parameters(), LEARNING_RATE)
    for step in range(steps):
        rng = np.random.default_rng([seed, step])
        scan, brain = simulate_head(heads[int(rng.integers(len(heads)))], rng)
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * rate(step, steps)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = network(scan[None, None])
        loss = loss_of(logits.float(), brain[None, None])
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP_NORM)
        optimiser.step()
        average.update_parameters(network)
        if report is not None:
            report(step + 1, loss.item())
    network.load_state_dict(average.module.state_dict())
    return network.eval()


CARD = """# Brain extraction

Research software, not for clinical use.

A three-dimensional U-Net with {parameters:,} numbers that finds the brain in whole heads of any contrast.
It has learnt from synthetic heads alone: label maps of {n_heads} heads, deformed, in random contrasts, with
blobs for lesions, thick slices, bias fields, noise, and parts that are cut off.

- Source: {source}
- {steps} steps of one head, seed {seed}, {precision}, {minutes:.0f} minutes on one CPU thread, torch {torch}

## Make it again

    bids_uad extraction LABELMAPS OUT --steps {steps} \\
        --seed {seed} --precision {precision}
"""
SOURCE = "label maps of SynthSeg's training (Billot et al. 2023, Apache-2.0)"


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of ``bids_uad extraction``."""
    parser = argparse.ArgumentParser(
        prog="bids_uad extraction", description="Train the brain extraction network on label maps of heads."
    )
    parser.add_argument("labelmaps", nargs="+", type=Path, help="label maps of whole heads")
    parser.add_argument("out", type=Path, help="folder for weights.safetensors and MODEL_CARD.md")
    parser.add_argument("--steps", type=int, default=3_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--source", default=SOURCE, help="where the label maps are from, for the card")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Train, and write weights and card; exit code 0."""
    args = build_parser().parse_args(arguments)
    torch.set_num_threads(1)
    start = time.monotonic()
    heads = [read_head(path) for path in args.labelmaps]

    def report(step: int, loss: float) -> None:
        if step % max(1, args.steps // 40) == 0:
            print(f"step {step} of {args.steps}, loss {loss:.3f}", flush=True)

    network = train(heads, args.steps, args.seed, precision=args.precision, report=report)
    with atomic_path(args.out / "weights.safetensors") as temporary:
        save_file({name: value.half() for name, value in network.state_dict().items()}, temporary)
    card = CARD.format(
        parameters=sum(value.numel() for value in network.parameters()),
        n_heads=len(heads),
        source=args.source,
        steps=args.steps,
        seed=args.seed,
        precision=args.precision,
        minutes=(time.monotonic() - start) / 60,
        torch=torch.__version__,
    )
    write_text(args.out / "MODEL_CARD.md", card)
    print(f"Wrote {args.out / 'weights.safetensors'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
