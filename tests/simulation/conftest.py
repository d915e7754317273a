from __future__ import annotations

import pytest
import torch

from bids_uad.simulation.subject import Anatomy, Person, draw_person, make_anatomy

SEED, INDEX = 5, 0


@pytest.fixture(scope="session")
def person() -> Person:
    return draw_person(SEED, INDEX, ())


@pytest.fixture(scope="session")
def healthy(person: Person) -> Anatomy:
    with torch.no_grad():
        return make_anatomy(SEED, INDEX, person, None)


@pytest.fixture(scope="session")
def stroke(person: Person) -> Anatomy:
    with torch.no_grad():
        return make_anatomy(SEED, INDEX, person, "stroke")
