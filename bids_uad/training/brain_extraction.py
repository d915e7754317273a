"""Training of the brain-extraction network on simulated heads (``bids_uad extraction``)."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from bids_uad.config import Parser
from bids_uad.files import atomic_path, write_text
from bids_uad.preprocessing.brain_extraction.network import BrainNet
from bids_uad.training.checkpoint import moving_average
from bids_uad.training.loop import learning_rate_factor
from bids_uad.training.simulated_heads import Head, read_head, simulate_head

LEARNING_RATE = 2e-3
EMA_DECAY = 0.99
CLIP_NORM = 1.0
SOURCE = "label maps of SynthSeg's training (Billot et al. 2023, Apache-2.0)"
CARD = """# Brain extraction

Research software, not for clinical use.

A three-dimensional U-Net with {parameters:,} parameters that masks the brain in whole heads of any contrast.
Training data are simulated heads only: label maps of {n_heads} heads, deformed, in random contrasts, with
blobs as lesions, thick slices, bias fields, noise and a cropped field of view.

- Source: {source}
- {steps} steps of one head, seed {seed}, {precision}, {minutes:.0f} minutes on one CPU thread, torch {torch}

## Reproduce

    bids_uad extraction LABELMAPS OUT --steps {steps} \\
        --seed {seed} --precision {precision}
"""

Report = Callable[[int, float], None]


def train(
    heads: Sequence[Head], steps: int, seed: int, *, precision: str = "fp32", report: Report | None = None
) -> BrainNet:
    """Train a network from random weights, with one simulated head in each step.

    Parameters
    ----------
    heads : sequence of Head
        Label maps; one is drawn in each step.
    steps : int
        Number of optimisation steps.
    seed : int
        Seed of the weights and of all draws.
    precision : {"fp32", "bf16"}, default="fp32"
        Precision of the forward pass; weights and loss are float32.
    report : callable, optional
        Called as ``report(step, loss)`` after each step, counted from 1.

    Returns
    -------
    BrainNet
        Network with the exponential moving average of the weights, in evaluation mode.
    """
    torch.manual_seed(seed)
    network = BrainNet()
    average = moving_average(network, EMA_DECAY)
    optimiser = torch.optim.AdamW(network.parameters(), LEARNING_RATE)
    for step in range(steps):
        rng = np.random.default_rng([seed, step])
        scan, brain = simulate_head(heads[int(rng.integers(len(heads)))], rng)
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * learning_rate_factor(step, steps)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = network(scan[None, None])
        loss = bce_dice_loss(logits.float(), brain[None, None])
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP_NORM)
        optimiser.step()
        average.update_parameters(network)
        if report is not None:
            report(step + 1, loss.item())
    network.load_state_dict(average.module.state_dict())
    return network.eval()


def bce_dice_loss(logits: Tensor, brain: Tensor) -> Tensor:
    """Compute binary cross-entropy plus one minus soft Dice.

    Parameters
    ----------
    logits : Tensor
        Output of the network.
    brain : Tensor, of the same shape
        Fraction of brain in each voxel.

    Returns
    -------
    Tensor
        Scalar.
    """
    probability = torch.sigmoid(logits)
    dice = 2 * (probability * brain).sum() / ((probability + brain).sum() + 1)
    return F.binary_cross_entropy_with_logits(logits, brain) + 1 - dice


def build_parser() -> Parser:
    """Build the parser of ``bids_uad extraction``."""
    parser = Parser(
        prog="bids_uad extraction", description="Train the brain extraction network on label maps of heads."
    )
    parser.add_argument("labelmaps", nargs="+", type=Path, help="label maps of whole heads")
    parser.add_argument("out", type=Path, help="folder for weights.safetensors and MODEL_CARD.md")
    parser.add_argument("--steps", type=int, default=3_000, help="optimisation steps (default 3000)")
    parser.add_argument("--seed", type=int, default=1, help="random seed (default 1)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="default bf16")
    parser.add_argument("--source", default=SOURCE, help="source of the label maps, for the model card")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Train the network, write its weights and model card, and return exit code 0."""
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
