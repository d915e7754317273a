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
POPULATION = Population(SEED)


@pytest.fixture(scope="session")
def subject() -> SubjectInfo:
    return draw_subject_info(POPULATION, INDEX)


@pytest.fixture(scope="session")
def healthy(subject: SubjectInfo) -> Anatomy:
    with torch.no_grad():
        return make_anatomy(POPULATION, INDEX, subject, None)


@pytest.fixture(scope="session")
def stroke(subject: SubjectInfo) -> Anatomy:
    with torch.no_grad():
        return make_anatomy(POPULATION, INDEX, subject, "stroke")
