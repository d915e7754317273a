"""Mean of the weights of a model before and after further training.

``python -m benchmarks.interpolate BEFORE AFTER OUT`` writes a bundle whose weights are the mean of those of
two bundles. Between a model and its fine-tuned version, such a mean is often as accurate as the better one on
new data and more robust (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models"). The packaged T1w
model of PLS was made so; calibrate the new bundle afterwards.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from bids_uad.engine.bundle import Bundle, load_bundle, load_detector, save_bundle
from bids_uad.errors import ModelError
from bids_uad.training.model_card import VALIDATION


def mean_weights(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
    """Compute the mean of two sets of weights.

    Parameters
    ----------
    before, after : dict of str to Tensor
        Weights of the same network; integers are those of `after`.

    Returns
    -------
    dict of str to Tensor
        Mean weights.

    Raises
    ------
    ModelError
        If names or shapes differ.
    """
    shapes = [{name: weight.shape for name, weight in weights.items()} for weights in (before, after)]
    if shapes[0] != shapes[1]:
        raise ModelError("the bundles are not of the same network: names or shapes of their weights differ")
    return {
        name: torch.lerp(before[name], weight, 0.5) if weight.is_floating_point() else weight
        for name, weight in after.items()
    }


def interpolate(before: Path, after: Path, out: Path) -> Bundle:
    """Write the bundle with the mean weights.

    Parameters
    ----------
    before, after : pathlib.Path
        Bundles of the same network.
    out : pathlib.Path
        New bundle, with the description and the model card of `after`.

    Returns
    -------
    Bundle
        The new bundle, without calibration.

    Raises
    ------
    ModelError
        If the networks differ.
    """
    first, second = load_bundle(before), load_bundle(after)
    detector = load_detector(second)
    weights = mean_weights(load_detector(first).state_dict(), detector.state_dict())
    detector.load_state_dict(weights)
    card, *_ = (after / "MODEL_CARD.md").read_text(encoding="utf-8").partition(VALIDATION)
    note = f"""
## Mean of weights

The weights are the mean of those after this training and those of {first.name}
(SHA-256 {first.sha256[:12]}), by `python -m benchmarks.interpolate`.
"""
    return save_bundle(
        out,
        detector,
        preset=second.info["preset"],
        modality=second.modality,
        training={**second.info["training"], "mean_with": {"bundle": first.name, "sha256": first.sha256}},
        card=card + note,
        changed=second.info["changed"],
    )


def main() -> None:
    """Write the bundle with the mean weights of two bundles."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("before", type=Path, help="bundle that the training started from")
    parser.add_argument("after", type=Path, help="bundle that the training wrote")
    parser.add_argument("out", type=Path, help="new bundle")
    args = parser.parse_args()
    interpolate(args.before, args.after, args.out)


if __name__ == "__main__":
    main()
