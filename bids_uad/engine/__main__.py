"""Score one preprocessed image with several bundles, in a process of its own.

A fresh process gives its GPU memory back when it ends, whatever the workflow engine does.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from bids_uad import space
from bids_uad.engine.bundle import load_bundle, load_detector
from bids_uad.engine.execution import Execution, resolve_device
from bids_uad.engine.inference import anomaly_map
from bids_uad.errors import UserError
from bids_uad.images import save_image


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bids_uad.engine", description=__doc__.splitlines()[0])
    parser.add_argument("--image", type=Path, required=True, help="preprocessed scan on the SRI24 grid")
    parser.add_argument("--brain", type=Path, required=True, help="its brain mask")
    parser.add_argument("--key", required=True, help="name of the image, seeds stochastic detectors")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch-size", type=int, default=None, help="slices at once")
    parser.add_argument("--compile", dest="compiled", action="store_true", help="compile the networks")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    parser.add_argument(
        "--job",
        nargs=2,
        action="append",
        required=True,
        metavar=("BUNDLE", "MAP"),
        help="model bundle, output map",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the jobs; 0, or 69 when a bundle or device cannot be used."""
    args = _parser().parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        device = resolve_device(args.device)
        volume = np.asarray(nib.load(args.image).dataobj, dtype=np.float32)
        brain = np.asarray(nib.load(args.brain).dataobj) > 0
        execution = Execution(args.precision, args.batch_size, args.compiled)
        for folder, output in args.job:
            bundle = load_bundle(folder)
            detector = execution.prepare(load_detector(bundle, str(device)))
            scores = anomaly_map(
                detector,
                volume,
                brain,
                key=args.key,
                seed=args.seed,
                protocol=bundle.protocol,
                execution=execution,
            )
            save_image(space.to_image(scores), output)
    except UserError as error:
        print(error, file=sys.stderr)
        return 69
    print(f"device: {device}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
