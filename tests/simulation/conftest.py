from __future__ import annotations

import pytest
import torch

from bids_uad.simulation.subject import (
    Anatomy,
    Population,
    SubjectInfo,
    draw_subject_info,
    make_anatomy,
)

SEED, INDEX = 5, 0
WORLD = Population(SEED)


@pytest.fixture(scope="session")
def person() -> SubjectInfo:
    return draw_subject_info(WORLD, INDEX)


@pytest.fixture(scope="session")
def healthy(person: SubjectInfo) -> Anatomy:
    with torch.no_grad():
        return make_anatomy(WORLD, INDEX, person, None)


@pytest.fixture(scope="session")
def stroke(person: SubjectInfo) -> Anatomy:
    with torch.no_grad():
        return make_anatomy(WORLD, INDEX, person, "stroke")
