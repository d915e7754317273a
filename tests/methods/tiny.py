"""A network that is small enough for tests."""

from __future__ import annotations

from bids_uad.networks.ddpmpp import DDPMppConfig

TINY_NETWORK = DDPMppConfig(
    size=64,
    width=16,
    multipliers=(1, 2),
    blocks=(1, 1),
    attention=(),
    middle_attention=False,
    dropout=0.0,
)
