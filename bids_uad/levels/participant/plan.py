"""What is to be done: every image against what is already there."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bids_uad.config import RunConfig
from bids_uad.dataset.inputs import Collection
from bids_uad.dataset.lesion_masks import LesionMask
from bids_uad.dataset.naming import ImageUnit, Problem
from bids_uad.dataset.participants import Participants, Person
from bids_uad.engine.bundle import Bundle
from bids_uad.errors import InputError, truncate_list
from bids_uad.files import sha256_of
from bids_uad.levels.participant.completion_records import (
    CompletionRecord,
    all_there,
    make_fingerprint,
    read_record,
    record_path,
)
from bids_uad.preprocessing.brain_extraction.masks import Extraction
from bids_uad.preprocessing.reference import Reference

LOGGER = logging.getLogger("bids_uad")


@dataclass(frozen=True)
class Task:
    """One image and what is still to be done about it.

    Parameters
    ----------
    unit : ImageUnit
    bundles : tuple of Bundle
        Models whose outputs are missing, one for each deviation.
    person : Person
        Age, sex, health and scanner of the participant at the image's session.
    lesion : LesionMask, optional
        Ground truth of the image, which other images of the session may share.
    fingerprint : dict
        What the outputs depend on, models apart.
    outdated : bool
        Whether an earlier run's outputs hold no longer, since inputs or options have changed.
    lost : tuple of str
        Labels of models whose outputs are outdated and which this run does not have.
    done : bool
        Nothing is to be done.
    anchor_only : bool
        Whether the image belongs to a session that was not asked for, and is preprocessed only where T2w
        images of other sessions are registered to it. It counts as done.
    """

    unit: ImageUnit
    bundles: tuple[Bundle, ...]
    person: Person
    lesion: LesionMask | None
    fingerprint: dict
    outdated: bool
    lost: tuple[str, ...]
    done: bool
    anchor_only: bool = False

    @property
    def provides_lesion(self) -> bool:
        """Whether this image's workflow brings the lesion mask to SRI24."""
        return self.lesion_provider == self.unit.key

    @property
    def is_control(self) -> bool:
        """Whether the participant is healthy by participants.tsv, at the image's session."""
        return bool(self.person.healthy)

    @property
    def lesion_provider(self) -> str | None:
        """Name of the image whose workflow does; none without ground truth."""
        return None if self.lesion is None else self.lesion.provider

    @property
    def depends_on(self) -> tuple[str, ...]:
        """Names of the images whose brain mask or registration the outputs of this one rest on."""
        anchor = None if self.unit.anchor is None else self.unit.anchor.key
        lesion = None if self.lesion is None or self.lesion.on_atlas else self.lesion.provider
        return tuple(dict.fromkeys(name for name in (anchor, lesion) if name not in (None, self.unit.key)))


def model_identity(bundle: Bundle, precision: str, person: Person, min_lesion_volume: float) -> str:
    """Identify what a model's outputs depend on: its training, calibration, and the options of the run.

    A precision of ``auto`` holds wherever the run goes on. Deviations also depend on age and sex, and counts
    of lesions and components on the least volume of those that are counted.
    """
    identity = f"{bundle.sha256}+{bundle.calibration_sha256}+{precision}+{min_lesion_volume:g}mm3"
    if bundle.deviation == "none":
        return identity
    return f"{identity}+{person.covariates['age']}+{person.covariates['sex']}"


def make_plan(
    collection: Collection,
    bundles: Sequence[Bundle],
    participants: Participants,
    *,
    output_dir: Path,
    modalities: Sequence[str],
    reference_sha256: str,
    random_seed: int,
    precision: str,
    min_lesion_volume: float,
    extraction: Extraction,
) -> list[Task]:
    """Compare every image with its record.

    Parameters
    ----------
    collection : Collection
    bundles : sequence of Bundle
        Models of this run.
    participants : Participants
    output_dir : pathlib.Path
    modalities : sequence of str
        Images that anomalies are looked for in; an anchor of another kind is only preprocessed.
    reference_sha256 : str
    random_seed : int
    precision : str
        As asked for: `auto`, `fp32` or `bf16`.
    min_lesion_volume : float
        Least volume of a lesion that is counted, in mm3.
    extraction : Extraction
        What finds brains in whole heads.

    Returns
    -------
    list of Task
        In the order of the collection's units.
    """
    tasks = []
    for unit in collection.units:
        if unit.key in collection.anchors_only:
            tasks.append(_anchor_only(unit))
            continue
        lesion = collection.lesions.get(unit.key)
        fingerprint = make_fingerprint(
            unit,
            lesion,
            reference_sha256=reference_sha256,
            random_seed=random_seed,
            extraction=extraction,
        )
        person = participants.person(f"sub-{unit.subject}", unit.session)
        wanted = [b for b in bundles if b.modality == unit.modality and unit.modality in modalities]
        record = read_record(record_path(output_dir, unit))
        outdated = record is not None and record.fingerprint != fingerprint
        current = None if outdated else record
        identities = [model_identity(bundle, precision, person, min_lesion_volume) for bundle in wanted]
        missing = tuple(
            bundle
            for bundle, identity in zip(wanted, identities, strict=True)
            if not _is_current(current, bundle, identity, output_dir)
        )
        complete = current is not None and all_there(current.outputs, output_dir)
        again = {bundle.scored_as for bundle in wanted}
        earlier = record.models if outdated else {}
        tasks.append(
            Task(
                unit=unit,
                bundles=missing,
                person=person,
                lesion=lesion,
                fingerprint=fingerprint,
                outdated=outdated,
                lost=tuple(model.label for name, model in earlier.items() if name not in again),
                done=complete and not missing,
            )
        )
    return tasks


def _anchor_only(unit: ImageUnit) -> Task:
    """Make the task of an image that is used as an anchor, and not written."""
    return Task(
        unit=unit,
        bundles=(),
        person=Person(),
        lesion=None,
        fingerprint={},
        outdated=False,
        lost=(),
        done=True,
        anchor_only=True,
    )


def _is_current(record: CompletionRecord | None, bundle: Bundle, identity: str, output_dir: Path) -> bool:
    """Check that the outputs of a model are there and are those of this very model."""
    model = None if record is None else record.models.get(bundle.scored_as)
    return model is not None and model.identity == identity and all_there(model.outputs, output_dir)


def by_subject(tasks: Sequence[Task]) -> dict[str, list[Task]]:
    """Group tasks by participant, in their order."""
    groups: dict[str, list[Task]] = {}
    for task in tasks:
        groups.setdefault(task.unit.subject, []).append(task)
    return groups


def mask_warnings(tasks: Sequence[Task], lesions_dir: Path | None) -> list[str]:
    """Report lesion masks that are empty, belong to a control, or leave images of their session without one.

    Parameters
    ----------
    tasks : sequence of Task
        Of all participants.
    lesions_dir : pathlib.Path or None
        Dataset of lesion masks; None if there is none.

    Returns
    -------
    list of str
        One line for each kind.
    """
    masked = [task for task in tasks if task.lesion is not None]
    empty = {f"sub-{task.unit.subject}" for task in masked if task.lesion.is_empty and not task.is_control}
    controls = {f"sub-{task.unit.subject}" for task in masked if task.is_control and not task.lesion.is_empty}
    sessions = {(task.unit.subject, task.unit.session) for task in masked}
    without = [
        task.unit.key
        for task in tasks
        if task.lesion is None and (task.unit.subject, task.unit.session) in sessions
    ]
    lines = []
    if lesions_dir is not None and not masked:
        text = "names must end in _label-lesion_mask, _label-lesion_roi or _seg-lesion_mask"
        lines.append(f"{lesions_dir} holds no usable lesion mask for any of the images; {text}")
    if empty:
        text = "Dice is 1 where nothing is found, else 0, and they are counted apart"
        lines.append(f"The lesion mask is empty: {truncate_list(sorted(empty))}; {text}")
    if controls:
        text = "Healthy by participants.tsv and yet with a lesion in the lesion mask"
        lines.append(f"{text}: {truncate_list(sorted(controls))}. They count as healthy")
    if without:
        lines.append(
            f"No lesion mask for {truncate_list(without)}: the masks of their session name other images"
        )
    return lines


def drop_unreadable(collection: Collection) -> Collection:
    """Move images to the problems whose files have become unreadable, or those of an image that they need.

    Parameters
    ----------
    collection : Collection

    Returns
    -------
    Collection
    """
    units: list[ImageUnit] = []
    problems: list[Problem] = []
    by_key = {unit.key: unit for unit in collection.units}
    for unit in collection.units:
        lesion = collection.lesions.get(unit.key)
        needed = [unit] if lesion is None else [unit, by_key[lesion.provider]]
        needed += [other.anchor for other in needed if other.anchor is not None]
        files = [path for own in needed for path in (own.path, *own.external.files)]
        try:
            for path in (*files, *(() if lesion is None else lesion.files)):
                sha256_of(path)
        except InputError as error:
            problems.append(Problem(unit.subject, str(error), unit.key))
        else:
            units.append(unit)
    return replace(collection, units=tuple(units), problems=(*collection.problems, *problems))


def split_tasks(tasks: Sequence[Task]) -> tuple[list[Task], list[Task]]:
    """Split a participant's tasks into those to do and those that are only needed by them.

    An image that is done is preprocessed again (from the working folder, where it is still there) if
    another is registered to it, or needs the lesion mask that lies on its grid.

    Parameters
    ----------
    tasks : sequence of Task

    Returns
    -------
    to_do, support : list of Task
    """
    to_do = [task for task in tasks if not task.done]
    needed = set()
    for task in to_do:
        needed |= _needs(task)
    by_key = {task.unit.key: task for task in tasks}
    for key in list(needed):
        needed |= _needs(by_key[key]) if by_key[key].unit.anchor is not None else set()
    support = [task for task in tasks if task.done and task.unit.key in needed]
    return to_do, support


def _needs(task: Task) -> set[str]:
    """Name the images that a task's workflow takes something from."""
    needs = set() if task.unit.anchor is None else {task.unit.anchor.key}
    if task.lesion_provider not in (None, task.unit.key):
        needs.add(task.lesion_provider)
    return needs


MAX_DETECTION_THREADS = 4


@dataclass(frozen=True)
class RunContext:
    """Options, reference image, brain extraction and device of a run.

    Parameters
    ----------
    config : RunConfig
    reference : Reference
    extraction : Extraction
    device : str
        Resolved: `cpu`, `cuda` or `cuda:N`.
    precision : str
        Resolved: `fp32` or `bf16`.
    """

    config: RunConfig
    reference: Reference
    extraction: Extraction
    device: str
    precision: str = "fp32"

    @property
    def detection_threads(self) -> int:
        """CPU threads of a detector; the command line alone decides, so that a rerun gives the same map."""
        if self.device != "cpu":
            return 1
        return max(self.config.omp_nthreads, min(self.config.nprocs, MAX_DETECTION_THREADS))


def crash_dir(config: RunConfig, subject: str) -> Path:
    """Say where a participant's crash files go."""
    return config.output_dir / f"sub-{subject}" / "log" / config.run_id
