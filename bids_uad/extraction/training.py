"""Teach the network with heads that are drawn as it learns."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bids_uad.engine.checkpoint import moving_average
from bids_uad.engine.training import CLIP_NORM, rate
from bids_uad.extraction.heads import Head, draw_head
from bids_uad.extraction.network import BrainNet

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
        scan, brain = draw_head(heads[int(rng.integers(len(heads)))], rng)
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
