"""Where the field of view of a detector is laid."""

from __future__ import annotations

import pytest
import torch

from bids_uad.engine.inference import covering_fields, usual_field

SIZE = (160, 192)


def mask(rows: tuple[int, int], columns: tuple[int, int]) -> torch.Tensor:
    inside = torch.zeros(3, 224, 224, dtype=torch.bool)
    inside[1, rows[0] : rows[1], columns[0] : columns[1]] = True
    return inside


def test_the_usual_place_is_about_the_brains_centre():
    field = usual_field(SIZE)
    assert (field.rows, field.columns) == (slice(32, 192), slice(26, 218))
    assert usual_field((224, 224)).cut(torch.zeros(2, 224, 224)).shape == (2, 224, 224)


def test_shifts_stop_at_the_border():
    assert usual_field(SIZE, (5, -3)).rows == slice(37, 197)
    assert usual_field(SIZE, (0, 100)).columns == slice(32, 224)
    assert usual_field((224, 224), (8, -8)) == usual_field((224, 224))


def test_an_ordinary_brain_gets_the_usual_field():
    assert covering_fields(mask((45, 178), (36, 207)), SIZE) == [usual_field(SIZE)]
    assert covering_fields(mask((0, 0), (0, 0)), SIZE) == [usual_field(SIZE)]


@pytest.mark.parametrize(
    ("rows", "start"), [((20, 150), 20), ((50, 200), 40), ((60, 220), 60), ((64, 224), 64), ((0, 160), 0)]
)
def test_a_brain_aside_moves_the_field_no_further_than_it_must(rows, start):
    (field,) = covering_fields(mask(rows, (36, 207)), SIZE)
    assert field.rows == slice(start, start + 160)
    assert field.columns == usual_field(SIZE).columns


@pytest.mark.parametrize(
    ("rows", "columns"), [((10, 180), (36, 207)), ((0, 224), (10, 220)), ((0, 161), (0, 193))]
)
def test_a_large_brain_is_covered(rows, columns):
    fields = covering_fields(mask(rows, columns), SIZE)
    covered = torch.zeros(224, 224, dtype=torch.bool)
    for field in fields:
        part = field.cut(covered)
        assert part.shape == SIZE
        part |= True
    assert covered[rows[0] : rows[1], columns[0] : columns[1]].all()
    wide, long = (axis[1] - axis[0] > size for axis, size in zip((rows, columns), SIZE, strict=True))
    assert len(fields) == 2 ** (wide + long)
