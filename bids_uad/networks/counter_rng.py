"""Random numbers that are a function of slice, step and place, and of nothing else.

A stochastic detector must give a slice the same map whatever it shares a batch with, in whatever order, on a
CPU or a GPU. The generators of torch cannot do that: they count on, and each kind of device has its own. Here
a number is a hash of its counter (SplitMix64: Steele, Lea and Flood 2014, "Fast splittable pseudorandom
number generators"), computed with whole-number arithmetic that is the same everywhere.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def _signed(number: int) -> int:
    """Read 64 bits as torch does."""
    return number - 2**64 if number >= 2**63 else number


GOLDEN = _signed(0x9E3779B97F4A7C15)
FIRST, SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)
MANTISSA = 2**24 - 1


def _shifted(bits: Tensor, places: int) -> Tensor:
    """Shift to the right, zeros coming in: torch repeats the sign."""
    return (bits >> places) & (2 ** (64 - places) - 1)


def mix(bits: Tensor) -> Tensor:
    """Scramble 64-bit numbers, the finaliser of SplitMix64; int64, any shape."""
    bits = (bits ^ _shifted(bits, 30)) * FIRST
    bits = (bits ^ _shifted(bits, 27)) * SECOND
    return bits ^ _shifted(bits, 31)


def _unit(bits: Tensor) -> Tensor:
    """Turn the upper 24 bits into float32 numbers in (0, 1)."""
    return (_shifted(bits, 40).float() + 0.5) / 2**24


class SliceGenerator:
    """Random numbers for a batch of slices, each from a stream of its own.

    Parameters
    ----------
    seeds : Tensor of int64, shape (B,)
        One for each slice, on the device that is drawn on.
    """

    def __init__(self, seeds: Tensor) -> None:
        self.seeds = seeds

    @classmethod
    def of_slices(cls, key: str, seed: int, slices: Sequence[int], device: torch.device) -> SliceGenerator:
        """Seed by image and slice.

        Parameters
        ----------
        key : str
            Identifies the image, for example its BIDS name.
        seed : int
            The run's random seed.
        slices : sequence of int
            Slice indices on the SRI24 grid.
        device : torch.device
        """
        digests = (hashlib.sha256(f"{seed}/{key}/{index}".encode()).digest() for index in slices)
        numbers = [_signed(int.from_bytes(digest[:8], "big")) for digest in digests]
        return cls(torch.tensor(numbers, dtype=torch.int64, device=device))

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: Tensor | slice | list[int]) -> SliceGenerator:
        return SliceGenerator(self.seeds[index])

    def _bits(self, step: int, count: int) -> Tensor:
        """Scrambled counters, shape (B, count)."""
        start = mix(self.seeds + mix(torch.full_like(self.seeds, step + 1)))
        counter = torch.arange(1, count + 1, device=self.seeds.device)
        return mix(start[:, None] + counter * GOLDEN)

    def uniform(self, step: int, *shape: int) -> Tensor:
        """Draw uniformly from (0, 1); float32, shape (B, *shape).

        Parameters
        ----------
        step : int
            Draws of different steps are independent, draws of the same step the same.
        *shape : int
            Of one slice's numbers.
        """
        return _unit(self._bits(step, math.prod(shape))).view(len(self), *shape)

    def normal(self, step: int, *shape: int) -> Tensor:
        """Draw from the standard normal distribution, as :meth:`uniform` does (Box and Muller 1958)."""
        count = math.prod(shape)
        bits = self._bits(step, -(-count // 2))
        radius = (-2 * _unit(bits).log()).sqrt()
        angle = (_shifted(bits, 8) & MANTISSA).float() * (2 * math.pi / 2**24)
        pairs = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)
        return pairs[:, :count].reshape(len(self), *shape)
