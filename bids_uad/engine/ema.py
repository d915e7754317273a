"""An exponential moving average of a network's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


class MovingAverage:
    """Averaged copy of a module; buffers are copied, so that batch statistics go with the weights.

    Parameters
    ----------
    module : nn.Module
    decay : float
        Final decay. It warms up as ``min(decay, (1 + n) / (10 + n))``.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.average = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the module's present weights."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for mean, value in zip(self.average.parameters(), module.parameters(), strict=True):
            mean.lerp_(value, 1 - decay)
        for mean, value in zip(self.average.buffers(), module.buffers(), strict=True):
            mean.copy_(value)

    @torch.no_grad()
    def apply_to(self, module: nn.Module) -> None:
        """Put the averaged weights into `module`."""
        module.load_state_dict(self.average.state_dict())
