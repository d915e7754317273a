"""Participants of the simulated cohort: groups, scanners and lesion volumes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import pandas as pd

from benchmarks.paper.published import PATHOLOGIES, Load, Pathology
from bids_uad.simulation.pathology import CAVITY_AGE
from bids_uad.simulation.subject import Population, draw_subject_info, random_stream

SEEN_SEED, SEEN_SCANNERS = 1, 7
"""Seed of the training cohort of the packaged models, and number of its scanners, of which they saw six."""
UNSEEN_SEED, UNSEEN_SCANNERS = 2512, 5
PARTICIPANTS = 315
PATTERN = (
    *("healthy", "glioma", "chronic stroke", "healthy", "multiple sclerosis"),
    *("acute stroke", "healthy", "white matter hyperintensities", "glioma", "healthy"),
    *("acute stroke", "chronic stroke", "healthy", "multiple sclerosis", "white matter hyperintensities"),
)
"""Groups of consecutive participants, repeated. Those of a pathology alternate between the seeds."""
FIRST_INDEX, INDEX_STEP = 1000, 16
"""Index of the first participant, beyond those of training cohorts, and distance to the next."""


@dataclass(frozen=True)
class StudyPopulation(Population):
    """Population whose lesions have the volumes of a published cohort.

    Parameters
    ----------
    load : Load, default=None
        Distribution of the lesion volume; None for healthy participants.
    """

    load: Load | None = None

    def volume(self, index: int) -> float | None:
        """Draw the lesion volume (mL) of a participant."""
        if self.load is None:
            return None
        return self.load.draw(random_stream(self.seed, index, "lesion-volume"))


@dataclass(frozen=True)
class Participant:
    """Participant of the study.

    Parameters
    ----------
    seed : int
        Seed of the simulation, which determines the scanners.
    index : int
        Index of the simulated subject.
    group : str
        ``healthy`` or a key of `PATHOLOGIES`.
    """

    seed: int
    index: int
    group: str

    @property
    def name(self) -> str:
        """BIDS name."""
        return f"sub-{self.index + 1:03d}"

    @property
    def pathology(self) -> Pathology | None:
        """Simulated pathology; None for healthy participants."""
        return PATHOLOGIES.get(self.group)

    def population(self, labelmaps: Sequence[str]) -> StudyPopulation:
        """Return the population that the participant is drawn from."""
        return StudyPopulation(
            self.seed,
            tuple(labelmaps),
            SEEN_SCANNERS if self.seed == SEEN_SEED else UNSEEN_SCANNERS,
            normal_variants=True,
            load=self.pathology.load if self.pathology else None,
        )


def plan(number: int = PARTICIPANTS) -> list[Participant]:
    """List the participants, such that any first part has all groups and both kinds of scanners.

    Parameters
    ----------
    number : int, default=315
        Number of participants.

    Returns
    -------
    list of Participant
        Participants in the order of simulation.
    """
    people = []
    for position, group in enumerate(islice(cycle(PATTERN), number)):
        seed = (SEEN_SEED, UNSEEN_SEED)[position % 2]
        index = FIRST_INDEX + INDEX_STEP * position
        if group.endswith("stroke"):
            index = next(each for each in range(index, index + INDEX_STEP) if _stroke(seed, each) == group)
        people.append(Participant(seed, index, group))
    return people


def _stroke(seed: int, index: int) -> str:
    """Return whether the simulator draws an acute or a chronic stroke: its first draw of a lesion."""
    old = random_stream(seed, index, "lesion").uniform(0.0, 1.0) > CAVITY_AGE
    return "chronic stroke" if old else "acute stroke"


def participants_table(people: Sequence[Participant], labelmaps: Sequence[str]) -> pd.DataFrame:
    """Tabulate age, sex, group and scanner of the participants, without simulating them.

    Parameters
    ----------
    people : sequence of Participant
        Participants.
    labelmaps : sequence of str
        Sources of anatomy.

    Returns
    -------
    pandas.DataFrame
        Contents of participants.tsv.
    """
    rows = []
    for person in people:
        subject = draw_subject_info(person.population(labelmaps), person.index)
        scanner = subject.scanner
        rows.append(
            {
                "participant_id": person.name,
                "age": subject.age,
                "sex": subject.sex,
                "group": "patient" if person.pathology else "control",
                "pathology": person.group if person.pathology else "none",
                "scanner": f"seed{person.seed}-{scanner.name}",
                "manufacturer": scanner.manufacturer,
                "field_strength": f"{scanner.field_strength:g} T",
                "noise": scanner.noise,
                "anatomy": anatomy_name(subject.source),
            }
        )
    return pd.DataFrame(rows)


def anatomy_name(source: str) -> str:
    """Return the name of a source of anatomy in participants.tsv and study.json."""
    return Path(source).name.split("_dseg")[0]
