from __future__ import annotations

import pytest
import torch

from bids_uad.simulation.subject import (
    Anatomy,
    Person,
    World,
    draw_person,
    make_anatomy,
)

SEED, INDEX = 5, 0
WORLD = World(SEED)


@pytest.fixture(scope="session")
def person() -> Person:
    return draw_person(WORLD, INDEX)


@pytest.fixture(scope="session")
def healthy(person: Person) -> Anatomy:
    with torch.no_grad():
        return make_anatomy(WORLD, INDEX, person, None)


@pytest.fixture(scope="session")
def stroke(person: Person) -> Anatomy:
    with torch.no_grad():
        return make_anatomy(WORLD, INDEX, person, "stroke")
