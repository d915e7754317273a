"""The participant level from start to exit code."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from nipype import config as nipype_config
from rich.console import Console
from rich.table import Table

from bids_uad.config import RunConfig
from bids_uad.dataset.describe import (
    ModelEntry,
    describe_dataset,
    refuse_foreign,
)
from bids_uad.dataset.external import LESIONS
from bids_uad.dataset.inputs import Collection, collect, requested_subjects
from bids_uad.dataset.naming import PREFIX_ENTITIES, ImageUnit, Problem, detector_desc, entities_of
from bids_uad.dataset.participants import Participants, read_participants, try_read_participants
from bids_uad.engine.bundle import Bundle, resolve_bundles
from bids_uad.errors import (
    ConfigError,
    ExitCode,
    InputError,
    UnavailableError,
    UserError,
    truncate_list,
)
from bids_uad.files import locked_names, read_json, remove_unfinished, sha256_of, write_text
from bids_uad.levels.participant.completion_records import (
    read_record,
    record_path,
    withdraw,
    write_methods,
)
from bids_uad.levels.participant.executors import NodeFailure, make_plugin, prepare_nipype
from bids_uad.levels.participant.leakage import leakage_warnings, normative_warnings
from bids_uad.levels.participant.plan import (
    RunContext,
    Task,
    by_subject,
    crash_dir,
    drop_unreadable,
    make_plan,
    mask_warnings,
    model_identity,
    split_tasks,
)
from bids_uad.levels.participant.summary import (
    PARTICIPANT,
    UP_TO_DATE,
    Outcome,
    Progress,
    Stopwatch,
    collect_outcomes,
    doubts,
    print_summary,
    remember,
    write_reports,
)
from bids_uad.levels.participant.workflow import build_workflow, working_folders
from bids_uad.preprocessing.brain_extraction.masks import Extraction, resolve_extraction
from bids_uad.preprocessing.check import check_image
from bids_uad.preprocessing.reference import Reference, resolve_reference, write_template

LOGGER = logging.getLogger("bids_uad")


class WorkflowError(UserError):
    """The workflow could not be built."""


def run_participant(config: RunConfig) -> int:
    """Process the participants that were asked for.

    Parameters
    ----------
    config : RunConfig

    Returns
    -------
    int
        0 if everything that was asked for is there; 1 if an image, participant or report failed.

    Raises
    ------
    UserError
        If nothing can be done at all.
    """
    console = Console(stderr=True, markup=False)
    if config.reports_only:
        return _rebuild_reports(config)
    if config.device.startswith("cuda"):
        probe_device(config.device, config.precision)
    extraction = resolve_extraction(config.brain_extraction, config.extraction_weights)
    refuse_foreign(config.output_dir)
    read_json(config.bids_dir / "dataset_description.json")  # refused now, not after the checks
    collection = collect(config, check=lambda unit: _check(unit, config.output_dir))
    _tell_collection(collection)
    _require_images(collection, config)
    bundles = _choose_models(config, collection)
    reference = _find_reference(config)
    collection = drop_unreadable(collection)
    _require_images(collection, config)
    plan = partial(
        make_plan,
        collection,
        bundles,
        _read_participants(config, collection, bundles),
        output_dir=config.output_dir,
        modalities=config.modalities,
        reference_sha256=reference.sha256,
        random_seed=config.random_seed,
        precision=config.precision,
        min_lesion_volume=config.min_lesion_volume,
        extraction=extraction,
    )
    if config.dry_run:
        tasks = plan()
        for line in _cautions(config, tasks, bundles):
            LOGGER.warning(line)
        _print_plan(tasks, collection, console)
        return ExitCode.OK
    with claimed(config, plan) as tasks:
        return _run(config, collection, tasks, bundles, reference, extraction, console)


def _run(
    config: RunConfig,
    collection: Collection,
    tasks: list[Task],
    bundles: Sequence[Bundle],
    reference: Reference,
    extraction: Extraction,
    console: Console,
) -> int:
    """Do what is planned, write the reports and the summary; return the exit code."""
    _remove_unfinished(config, collection.subjects)
    cautions = _cautions(config, tasks, bundles)
    for line in cautions:
        LOGGER.warning(line)
    if config.clean_workdir:
        clean(config.work_dir, tasks)
    pending = [task for task in tasks if not task.done]
    device, precision = config.device, config.precision
    if pending and bundles:
        device, precision = probe_device(device, precision)
        LOGGER.info("Detectors run on %s in %s", device, precision)
    stopwatch = Stopwatch()
    failures = []
    withdraw_unusable(config, collection.problems)
    if pending:
        _describe(config, tasks, bundles, reference)
        context = RunContext(config, reference, extraction, device, precision)
        failures = _process(config, tasks, context, stopwatch)
        _describe(config, tasks, bundles, reference)
        write_methods(config.output_dir)
    outcomes = collect_outcomes(
        tasks, collection.problems, failures, stopwatch, output_dir=config.output_dir, run_id=config.run_id
    )
    unwritten = _report(config, outcomes, device)
    print_summary(outcomes, tasks, config.output_dir, console)
    for line in cautions + doubts(outcomes, tasks, config.output_dir):
        LOGGER.warning(line)
    # One file may be the reason for several images.
    for line in dict.fromkeys([outcome.message for outcome in outcomes if not outcome.good] + unwritten):
        LOGGER.error(line)
    if unwritten or not all(outcome.good for outcome in outcomes):
        return ExitCode.FAILED
    if config.clean_workdir:
        clean(config.work_dir, tasks)
    return ExitCode.OK


def _remove_unfinished(config: RunConfig, subjects: Iterable[str]) -> None:
    """Remove what killed runs have left in the output folder, at the top and for some participants."""
    for folder in (config.output_dir, config.output_dir / "logs"):
        remove_unfinished(folder)
    for name in ("tpl-SRI24", *(f"sub-{subject}" for subject in subjects)):
        remove_unfinished(config.output_dir / name, below=True)


def _cautions(config: RunConfig, tasks: Sequence[Task], bundles: Sequence[Bundle]) -> list[str]:
    """List what limits the results of a run, as far as it is known before."""
    lines = leakage_warnings(bundles, [task.unit for task in tasks], config.bids_dir) + normative_warnings(
        tasks
    )
    own = [task for task in tasks if not task.anchor_only]
    lines += mask_warnings(own, config.derivatives.get(LESIONS))
    lost = sorted({label for task in tasks for label in task.lost})
    if lost:
        images = [task.unit.key for task in tasks if task.lost]
        lines.append(
            f"the outputs of {truncate_list(lost, 5)} are out of date for {truncate_list(images, 5)}, since "
            "inputs or options have changed; they are removed, and made again by a run with these --models"
        )
    return lines


def _check(unit: ImageUnit, output_dir: Path) -> None:
    """Check an image, unless an earlier run did so and it has not changed since."""
    record = read_record(record_path(output_dir, unit))
    if (
        record is None
        or not unit.path.is_file()
        or record.fingerprint.get("input_sha256") != sha256_of(unit.path)
    ):
        check_image(unit.path)


def _require_images(collection: Collection, config: RunConfig) -> None:
    """End the run if no image is left, with a line for each problem; participants' reports show them, too."""
    if collection.units:
        return
    problems = collection.problems
    if not config.dry_run:
        withdraw_unusable(config, problems)
        ended = collect_outcomes(
            [], problems, [], Stopwatch(), output_dir=config.output_dir, run_id=config.run_id
        )
        _report(config, ended, config.device)
    for message in dict.fromkeys(problem.message for problem in problems):
        LOGGER.error(message)
    raise InputError(
        config.bids_dir, f"no {' or '.join(config.modalities)} image to work on", "see the lines above"
    )


def _choose_models(config: RunConfig, collection: Collection) -> list[Bundle]:
    """Check the models against the images there are, before any is touched."""
    if config.models == ("none",):
        return []
    present = {unit.modality for unit in collection.units if unit.key not in collection.anchors_only}
    modalities = [modality for modality in config.modalities if modality in present]
    return resolve_bundles(list(config.models) or None, modalities, config.deviations)


def _read_participants(config: RunConfig, collection: Collection, bundles: Sequence[Bundle]) -> Participants:
    """Read what is known of the participants; only deviations from healthy controls depend on it.

    Raises
    ------
    InputError
        If `participants.tsv` cannot be used and deviations are asked for.
    """
    read = (
        read_participants if any(bundle.deviation != "none" for bundle in bundles) else try_read_participants
    )
    participants = read(config.bids_dir, [f"sub-{label}" for label in collection.subjects])
    for note in participants.notes:
        LOGGER.warning(note)
    return participants


def _find_reference(config: RunConfig) -> Reference:
    """Find the reference image, and refuse to mix it with another in one dataset."""
    try:
        reference = resolve_reference(config.atlas_dir, config.work_dir / "reference")
    except InputError as error:
        raise UnavailableError(str(error)) from error
    earlier = read_json(config.output_dir / "tpl-SRI24" / "anat" / "tpl-SRI24_desc-brain_T1w.json")
    used = earlier.get("ReferenceSHA256")
    if used not in (None, reference.sha256):
        raise ConfigError(
            f"{config.output_dir} was made with another reference image ({earlier.get('ReferenceName')}); "
            "give the same --atlas-dir as then, or another output folder"
        )
    return reference


def _describe(
    config: RunConfig, tasks: Sequence[Task], bundles: Sequence[Bundle], reference: Reference
) -> None:
    """Write the dataset-level files; once before the run, and again after it, since other jobs do so too."""
    models = [ModelEntry(bundle.name, str(bundle.info["code_version"]), bundle.sha256) for bundle in bundles]
    written = [task for task in tasks if not task.anchor_only]
    descriptions = {
        "preproc": "Brain in SRI24 space, corrected for intensity non-uniformity, 99.5th percentile at 1",
        "brain": "Brain mask",
        **{f"{task.unit.modality}Preproc": f"Quality of the {task.unit.modality} image" for task in written},
    }
    if any(task.unit.anchor is not None for task in written):
        descriptions["T2wBrain"] = "Brain mask of a T2w image that is registered to a T1w image"
    if any(task.lesion is not None for task in written):
        descriptions["manual"] = "Lesion mask given by the user"
    for bundle in bundles:
        text = f"Scores of {bundle.detector} (preset {bundle.preset}) for the {bundle.modality} image"
        if bundle.deviation != "none":
            text += ", as deviations from a normative reference of healthy controls"
        descriptions[detector_desc(bundle.modality, bundle.scored_as)] = text
    describe_dataset(config.output_dir, config.bids_dir, config.derivatives, models, descriptions)
    write_template(reference, config.output_dir)


def _process(
    config: RunConfig, tasks: list[Task], context: RunContext, stopwatch: Stopwatch
) -> list[NodeFailure]:
    """Build and run the workflow; give the nodes that failed."""
    prepare_nipype()
    nipype_config.update_config(
        {
            "execution": {
                "check_version": "false",
                # Pages about the graph, which jobs that share a work folder would write over each other.
                "create_report": "false",
                "crashfile_format": "txt",
                "poll_sleep_duration": "0.1",
                "stop_on_first_crash": str(config.stop_on_first_crash).lower(),
            }
        }
    )
    try:
        workflow = build_workflow(tasks, context)
    except UserError:
        raise
    except Exception as error:
        raise WorkflowError(f"the workflow could not be built: {type(error).__name__}: {error}") from error
    pending = [task for task in tasks if not task.done]
    _write_run_files(config, {task.unit.subject for task in pending})
    for task in pending:
        make_way(config, task)
    LOGGER.info("%d image(s) to process, %d up to date", len(pending), len(tasks) - len(pending))
    progress = Progress(len(pending))

    def watch(node: Any, status: str) -> None:
        stopwatch(node, status)
        progress(node, status)

    plugin = make_plugin(config, watch)
    try:
        workflow.run(plugin=plugin)
    except RuntimeError:
        # nipype sums up failed nodes in one error; any other is ours to raise.
        if not plugin.failures:
            raise
    finally:
        plugin.close()
        _remove_unfinished(config, {task.unit.subject for task in pending})  # of workers that were stopped
    return plugin.failures


def _write_run_files(config: RunConfig, subjects: set[str]) -> None:
    """Leave the configuration beside the results."""
    text = config.to_toml()
    write_text(config.output_dir / "logs" / f"bids_uad-{config.run_id}.toml", text)
    for subject in subjects:
        write_text(crash_dir(config, subject) / "bids_uad.toml", text)


def _report(config: RunConfig, outcomes: Sequence[Outcome], device: str) -> list[str]:
    """Write the reports of participants that changed or have none."""
    by_subject = defaultdict(list)
    for outcome in outcomes:
        by_subject[outcome.subject].append(outcome)
    subjects = []
    for subject, own in by_subject.items():
        without_images = all(outcome.image == PARTICIPANT for outcome in own)
        if without_images and not (config.output_dir / f"sub-{subject}").is_dir():
            continue
        if any(outcome.status != UP_TO_DATE for outcome in own) or _is_older(config.output_dir, subject):
            remember(config, subject, own, device)
            subjects.append(subject)
    return write_reports(config, subjects)


def _is_older(output_dir: Path, subject: str) -> bool:
    """Return whether a report is not there, or older than a record of its participant.

    The run that wrote the record was then killed before it wrote the report.
    """
    page = output_dir / f"sub-{subject}.html"
    if not page.is_file():
        return True
    written = page.stat().st_mtime_ns
    return any(path.stat().st_mtime_ns > written for path in page.with_suffix("").glob("**/log/*.json"))


def _rebuild_reports(config: RunConfig) -> int:
    """Write reports again from what is in the output folder."""
    subjects = requested_subjects(config.output_dir, config.participants)
    _remove_unfinished(config, subjects)
    unwritten = write_reports(config, subjects)
    for line in unwritten:
        LOGGER.error(line)
    LOGGER.info("%d report(s) written to %s", len(subjects) - len(unwritten), config.output_dir)
    return ExitCode.FAILED if unwritten else ExitCode.OK


def _tell_collection(collection: Collection) -> None:
    """Log what was found and what was left out."""
    LOGGER.info("%d participant(s), %d image(s)", len(collection.subjects), len(collection.units))
    by_reason = defaultdict(list)
    for path, reason in collection.left_out.items():
        by_reason[reason].append(path.name)
    for reason, names in by_reason.items():
        LOGGER.info("%d image(s) left out (%s): %s", len(names), reason, truncate_list(names, 5))


def _print_plan(tasks: Sequence[Task], collection: Collection, console: Console) -> None:
    """Print what would be done."""
    table = Table("image", "status", "detectors", "registered to", "lesion mask", title="bids_uad dry run")
    for task in tasks:
        again = " (inputs or options changed)" if task.outdated else ""
        table.add_row(
            task.unit.key,
            "anchor only" if task.anchor_only else "up to date" if task.done else f"to do{again}",
            ", ".join(bundle.label for bundle in task.bundles) or "-",
            task.unit.anchor.key if task.unit.anchor else "SRI24",
            task.lesion.path.name if task.lesion else "-",
        )
    for problem in collection.problems:
        table.add_row(problem.key or f"sub-{problem.subject}", "unusable", "-", "-", "-")
    console.print(table)
    for message in dict.fromkeys(problem.message for problem in collection.problems):
        console.print(message, style="red", markup=False, highlight=False, soft_wrap=True)


_PROBE = """
import sys
from bids_uad.errors import UserError
try:
    import torch
    from bids_uad.engine.execution import resolve_device, resolve_precision
    device = resolve_device(sys.argv[1])
    torch.zeros(1, device=device)
    precision = resolve_precision(sys.argv[2], device)
except (UserError, RuntimeError) as error:
    sys.exit(str(error).splitlines()[0])
print(device, precision)
"""


def probe_device(device: str, precision: str) -> tuple[str, str]:
    """Resolve where and how precisely detectors will run, in a process of its own.

    Parameters
    ----------
    device : str
        `auto`, `cpu`, `cuda` or `cuda:N`.
    precision : {"auto", "fp32", "bf16"}

    Returns
    -------
    device : str
        `cpu`, `cuda` or `cuda:N`.
    precision : {"fp32", "bf16"}

    Raises
    ------
    UnavailableError
        If a GPU is asked for and does not work, or cannot compute with that precision.
    """
    if device == "cpu":
        return device, "fp32" if precision == "auto" else precision
    probe = subprocess.run(
        [sys.executable, "-c", _PROBE, device, precision], capture_output=True, text=True, check=False
    )
    if probe.returncode == 0:
        device, precision = probe.stdout.split()[-2:]
        return device, precision
    lines = probe.stderr.strip().splitlines() or [f"the check ended with code {probe.returncode}"]
    reason = lines[-1]
    raise UnavailableError(reason if device in reason else f"--device {device}: {reason}")


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
    used = [split_tasks(own) for own in by_subject(tasks).values()]
    return {task.unit.key for to_do, support in used for task in (*to_do, *support)}


def clean(work_dir: Path, tasks: Sequence[Task]) -> None:
    """Remove the working folders of some images.

    The folder of the participant stays, even empty: another job may be about to put the folder of another
    session there.
    """
    for task in tasks:
        for folder in working_folders(work_dir, task.unit):
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
