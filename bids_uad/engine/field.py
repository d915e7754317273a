"""The part of its slices that a detector is shown: a rectangle about the brain."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bids_uad.space import BRAIN_CENTRE, CROP


@dataclass(frozen=True)
class Field:
    """A rectangle of cropped slices.

    Parameters
    ----------
    rows, columns : slice
    """

    rows: slice
    columns: slice

    def cut(self, slices: Tensor) -> Tensor:
        """Give the rectangle of slices, shape (..., 224, 224), as a view."""
        return slices[..., self.rows, self.columns]


def usual_field(size: tuple[int, int], shift: tuple[int, int] = (0, 0)) -> Field:
    """Place a field where brains lie in SRI24.

    Parameters
    ----------
    size : tuple of int
        Height and width.
    shift : tuple of int
        Pixels by which it is moved, as far as the slices reach.
    """
    return Field(*(_piece(_usual_start(axis, n, shift[axis]), n) for axis, n in enumerate(size)))


def covering_fields(inside: Tensor, size: tuple[int, int]) -> list[Field]:
    """Place fields so that they hold the whole brain of a volume.

    Parameters
    ----------
    inside : Tensor of bool, shape (Z, 224, 224)
        Brain mask.
    size : tuple of int
        Height and width of a field.

    Returns
    -------
    list of Field
        One, where brains usually lie, moved no further than it must be. A brain that is larger than a field
        gets several that overlap.
    """
    rows = _starts(inside.any(2).any(0), size[0], 0)
    columns = _starts(inside.any(1).any(0), size[1], 1)
    return [Field(_piece(row, size[0]), _piece(column, size[1])) for row in rows for column in columns]


def _piece(start: int, length: int) -> slice:
    return slice(start, start + length)


def _usual_start(axis: int, length: int, shift: int = 0) -> int:
    return min(max(BRAIN_CENTRE[axis] - length // 2 + shift, 0), CROP - length)


def _starts(occupied: Tensor, length: int, axis: int) -> list[int]:
    """First indices along one axis, of which `occupied` must be covered."""
    usual = _usual_start(axis, length)
    positions = torch.nonzero(occupied).flatten().tolist()
    if not positions:
        return [usual]
    first, last = positions[0], positions[-1]
    span = last + 1 - first
    if span <= length:
        return [min(max(usual, last + 1 - length), first)]
    count = -(-span // length)
    return [first + round(number * (span - length) / (count - 1)) for number in range(count)]
