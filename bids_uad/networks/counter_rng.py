"""Counter-based random numbers, which are a function of slice, step and position only.

The map of a stochastic detector must not depend on batch, order or device. The generators of PyTorch depend
on all three. Here each number is a hash of its counter (SplitMix64: Steele, Lea and Flood 2014, "Fast
splittable pseudorandom number generators"), computed in integer arithmetic that is equal on every device.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def _signed(number: int) -> int:
    """Reinterpret an unsigned 64-bit number as signed, the only 64-bit type of PyTorch."""
    return number - 2**64 if number >= 2**63 else number


# Constants of SplitMix64: increment and the two multipliers.
INCREMENT = _signed(0x9E3779B97F4A7C15)
FIRST, SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)
MANTISSA = 2**24 - 1
"""Mask of 24 bits, the precision of float32."""


def _shifted(bits: Tensor, places: int) -> Tensor:
    """Shift bits to the right and fill with zeros; the shift of PyTorch fills with the sign."""
    return (bits >> places) & (2 ** (64 - places) - 1)


def mix(bits: Tensor) -> Tensor:
    """Apply the finaliser of SplitMix64.

    Parameters
    ----------
    bits : Tensor of int64
        Numbers of any shape.

    Returns
    -------
    Tensor of int64
        Hashed numbers of the same shape.
    """
    bits = (bits ^ _shifted(bits, 30)) * FIRST
    bits = (bits ^ _shifted(bits, 27)) * SECOND
    return bits ^ _shifted(bits, 31)


def _unit(bits: Tensor) -> Tensor:
    """Convert the upper 24 bits to float32 numbers in (0, 1)."""
    return (_shifted(bits, 40).float() + 0.5) / 2**24


class SliceGenerator:
    """Random numbers for a batch of slices, one stream per slice.

    Parameters
    ----------
    seeds : Tensor of int64, shape (B,)
        Seeds of the slices, on the device of the random numbers.
    """

    def __init__(self, seeds: Tensor) -> None:
        self.seeds = seeds

    @classmethod
    def of_slices(cls, key: str, seed: int, slices: Sequence[int], device: torch.device) -> SliceGenerator:
        """Make a generator whose seeds are hashes of image and slice.

        Parameters
        ----------
        key : str
            Name of the image, for example its BIDS name.
        seed : int
            Random seed of the run.
        slices : sequence of int
            Slice indices on the SRI24 grid.
        device : torch.device
            Device of the random numbers.

        Returns
        -------
        SliceGenerator
            Generator for these slices.
        """
        digests = (hashlib.sha256(f"{seed}/{key}/{index}".encode()).digest() for index in slices)
        numbers = [_signed(int.from_bytes(digest[:8], "big")) for digest in digests]
        return cls(torch.tensor(numbers, dtype=torch.int64, device=device))

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: Tensor | slice | list[int]) -> SliceGenerator:
        return SliceGenerator(self.seeds[index])

    def _bits(self, step: int, count: int) -> Tensor:
        """Return hashed counters, shape (B, count)."""
        start = mix(self.seeds + mix(torch.full_like(self.seeds, step + 1)))
        counter = torch.arange(1, count + 1, device=self.seeds.device)
        return mix(start[:, None] + counter * INCREMENT)

    def uniform(self, step: int, *shape: int) -> Tensor:
        """Draw uniformly from (0, 1).

        Parameters
        ----------
        step : int
            Number of the draw: different steps give independent numbers, equal steps equal numbers.
        *shape : int
            Shape of the numbers of one slice.

        Returns
        -------
        Tensor of float32, shape (B, *shape)
            Random numbers.
        """
        return _unit(self._bits(step, math.prod(shape))).view(len(self), *shape)

    def normal(self, step: int, *shape: int) -> Tensor:
        """Draw from the standard normal distribution (Box and Muller 1958).

        Parameters
        ----------
        step : int
            Number of the draw, as in :meth:`uniform`.
        *shape : int
            Shape of the numbers of one slice.

        Returns
        -------
        Tensor of float32, shape (B, *shape)
            Random numbers.
        """
        count = math.prod(shape)
        bits = self._bits(step, -(-count // 2))
        radius = (-2 * _unit(bits).log()).sqrt()
        angle = (_shifted(bits, 8) & MANTISSA).float() * (2 * math.pi / 2**24)
        pairs = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)
        return pairs[:, :count].reshape(len(self), *shape)
