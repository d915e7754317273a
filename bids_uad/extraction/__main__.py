"""Make the weights of the brain extraction: ``python -m bids_uad.extraction LABELMAPS OUT``."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from bids_uad.atomic import atomic_path, write_text
from bids_uad.extraction.heads import read_head
from bids_uad.extraction.training import train

CARD = """# Brain extraction

Research software, not for clinical use.

A three-dimensional U-Net with {parameters:,} numbers that finds the brain in whole heads of any contrast.
It has learnt from synthetic heads alone: label maps of {n_heads} heads, deformed, in random contrasts, with
blobs for lesions, thick slices, bias fields, noise, and parts that are cut off.

- Source: {source}
- {steps} steps of one head, seed {seed}, {precision}, {minutes:.0f} minutes on one CPU thread, torch {torch}

## Make it again

    python -m bids_uad.extraction LABELMAPS OUT --steps {steps} --seed {seed} --precision {precision}
"""
SOURCE = "label maps of SynthSeg's training (Billot et al. 2023, Apache-2.0)"


def main(arguments: list[str] | None = None) -> int:
    """Train, and write weights and card; exit code 0."""
    parser = argparse.ArgumentParser(prog="python -m bids_uad.extraction", description=__doc__)
    parser.add_argument("labelmaps", nargs="+", type=Path, help="label maps of whole heads")
    parser.add_argument("out", type=Path, help="folder for weights.safetensors and MODEL_CARD.md")
    parser.add_argument("--steps", type=int, default=3_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--source", default=SOURCE, help="where the label maps are from, for the card")
    args = parser.parse_args(arguments)
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
