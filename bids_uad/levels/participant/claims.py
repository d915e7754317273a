"""Keep two runs from working on one image at a time, and outputs that hold no longer out of the dataset."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bids_uad.atomic import locked_names, remove_unfinished
from bids_uad.config import RunConfig
from bids_uad.dataset.naming import entities_of
from bids_uad.dataset.units import PREFIX_ENTITIES, ImageUnit, Problem
from bids_uad.levels.participant.plan import Task, by_subject, model_identity, with_support
from bids_uad.levels.participant.records import read_record, record_path, sha256_of, withdraw
from bids_uad.levels.participant.workflow import folders_of_unit

_MODALITIES = ("T1w", "T2w")


@contextmanager
def claimed(config: RunConfig, plan: Callable[[], list[Task]]) -> Iterator[list[Task]]:
    """Plan a run, and keep other runs away from the images that it processes until it is over.

    Jobs for several sessions, models or participants may share the output folder and the work folder. Where
    two need one image, such as the T1w image of another session that a T2w image is registered to, the second
    waits for the first, and finds it done.

    Parameters
    ----------
    config : RunConfig
        `output_dir`, `work_dir` and `clean_workdir` are used.
    plan : callable
        Compares the images with their records.

    Yields
    ------
    list of Task
    """
    held: set[str] = set()
    with ExitStack() as stack:
        while True:
            tasks = plan()
            needed = _images_in_use(tasks, everything=config.clean_workdir) - held
            if not needed:
                break
            for folder in (config.output_dir / "logs", config.work_dir):
                stack.enter_context(locked_names(folder / "images.lock", needed))
            held |= needed
        yield tasks


def _images_in_use(tasks: Sequence[Task], *, everything: bool) -> set[str]:
    """Name the images whose working folders a run uses, or removes."""
    if everything:
        return {task.unit.key for task in tasks}
    used = [with_support(own) for own in by_subject(tasks).values()]
    return {task.unit.key for to_do, support in used for task in (*to_do, *support)}


def clean(work_dir: Path, tasks: Sequence[Task]) -> None:
    """Remove the working folders of some images.

    The folder of the participant stays, even empty: another job may be about to put the folder of another
    session there.
    """
    for task in tasks:
        for folder in folders_of_unit(work_dir, task.unit):
            shutil.rmtree(folder, ignore_errors=True)


def make_way(config: RunConfig, task: Task) -> None:
    """Remove outputs of an image that hold no longer, and what a killed run has left unfinished."""
    remove_unfinished(config.output_dir / task.unit.folder, lambda name: _is_of(name, task.unit))
    withdraw(
        record_path(config.output_dir, task.unit),
        config.output_dir,
        task.fingerprint,
        {
            bundle.scored_as: model_identity(bundle, config.precision, task.person, config.min_lesion_volume)
            for bundle in task.bundles
        },
    )


def _is_of(name: str, unit: ImageUnit) -> bool:
    """Check whether a file in the folder of an image's outputs is named after this image."""
    keys = {key: entity for entity, key in PREFIX_ENTITIES}
    entities = {keys[key]: value for key, value in entities_of(Path(name)).items() if key in keys}
    others = [modality for modality in _MODALITIES if modality != unit.modality]
    return entities == unit.entities and not any(other in name for other in others)


def withdraw_unusable(config: RunConfig, problems: Sequence[Problem]) -> None:
    """Remove the outputs of images that cannot be used any more, since their file is another one now.

    The outputs of a file that is not there (yet, or any more) are left alone.
    """
    for problem in problems:
        for path in (config.output_dir / f"sub-{problem.subject}").glob(f"**/log/{problem.key}.json"):
            record = read_record(path)
            source = None if record is None else config.bids_dir / record.source
            if source is None or not source.is_file():
                continue
            if record.fingerprint.get("input_sha256") != sha256_of(source):
                withdraw(path, config.output_dir, {"input_sha256": sha256_of(source)}, {})
