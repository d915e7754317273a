"""Participant level: check inputs, process what is missing or outdated, write reports, give an exit code."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from nipype import config as nipype_config
from rich.console import Console
from rich.table import Table

from bids_uad.config import RunConfig
from bids_uad.dataset.describe import ModelEntry, describe_dataset, refuse_foreign
from bids_uad.dataset.external import LESIONS
from bids_uad.dataset.inputs import Collection, collect
from bids_uad.dataset.naming import ImageUnit, detector_desc
from bids_uad.dataset.participants import Participants, read_participants, try_read_participants
from bids_uad.engine.bundle import Bundle, resolve_bundles
from bids_uad.errors import ConfigError, ExitCode, InputError, UnavailableError, UserError, truncate_list
from bids_uad.files import is_outdated, read_json, sha256_of, write_text
from bids_uad.levels.participant.completion_records import read_record, record_path, write_methods
from bids_uad.levels.participant.executors import NodeFailure, configure_nipype, make_plugin
from bids_uad.levels.participant.leakage import leakage_warnings, normative_warnings
from bids_uad.levels.participant.plan import (
    RunContext,
    Task,
    crash_dir,
    drop_unreadable,
    lock_images,
    mask_warnings,
    plan_tasks,
    remove_outdated,
    remove_temporary_files,
    remove_unusable,
)
from bids_uad.levels.participant.summary import (
    ProgressLog,
    Stopwatch,
    collect_statuses,
    print_summary,
    quality_warnings,
    rewrite_reports,
    update_reports,
)
from bids_uad.levels.participant.workflow import build_workflow, working_folders
from bids_uad.preprocessing.brain_extraction.masks import resolve_extraction
from bids_uad.preprocessing.check import check_image
from bids_uad.preprocessing.reference import Reference, resolve_reference, write_template

LOGGER = logging.getLogger("bids_uad")

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
"""Program of :func:`probe_device`."""


class WorkflowError(UserError):
    """The workflow could not be built."""


def run_participant(config: RunConfig) -> int:
    """Run the participant level: check inputs, process what is missing or outdated, write the reports.

    Parameters
    ----------
    config : RunConfig
        Options of the command line.

    Returns
    -------
    int
        Exit code: 0 if all requested outputs exist, 1 if an image, participant or report failed.

    Raises
    ------
    UserError
        If the run cannot start, for example because no image is usable or the requested GPU is not available.
    """
    if config.reports_only:
        return ExitCode.FAILED if rewrite_reports(config) else ExitCode.OK
    collection, participants, context = prepare_run(config)
    plan = partial(plan_tasks, collection, participants, context)
    if config.dry_run:
        print_plan(plan(), collection, context)
        return ExitCode.OK
    with lock_images(config, plan) as tasks:
        return run_tasks(tasks, collection, context)


def prepare_run(config: RunConfig) -> tuple[Collection, Participants, RunContext]:
    """Check options, images, models and the reference image before anything is written.

    Parameters
    ----------
    config : RunConfig
        Options of the command line.

    Returns
    -------
    collection : Collection
        Usable images, and problems of the others.
    participants : Participants
        Contents of participants.tsv and sessions.tsv.
    context : RunContext
        Models, reference image, brain extraction; the device is not resolved yet.

    Raises
    ------
    UserError
        If the run cannot start.
    """
    if config.device.startswith("cuda"):
        probe_device(config.device, config.precision)
    extraction = resolve_extraction(config.brain_extraction, config.extraction_weights)
    refuse_foreign(config.output_dir)
    read_json(config.bids_dir / "dataset_description.json")  # fails now instead of after the image checks
    collection = collect(config, check=partial(_check_image, config))
    _log_collection(collection)
    _require_images(collection, config)
    bundles = _choose_models(config, collection)
    reference = _find_reference(config)
    collection = drop_unreadable(collection)
    _require_images(collection, config)
    participants = _read_participants(config, collection, bundles)
    context = RunContext(config, tuple(bundles), reference, extraction, config.device, config.precision)
    return collection, participants, context


def _check_image(config: RunConfig, unit: ImageUnit) -> None:
    """Check an image, unless an earlier run has processed the same file."""
    record = read_record(record_path(config.output_dir, unit))
    if (
        record is None
        or not unit.path.is_file()
        or record.fingerprint.get("input_sha256") != sha256_of(unit.path)
    ):
        check_image(unit.path)


def _log_collection(collection: Collection) -> None:
    """Log the numbers of participants and images, and the images that are left out by filters."""
    LOGGER.info("%d participant(s), %d image(s)", len(collection.subjects), len(collection.units))
    by_reason = defaultdict(list)
    for path, reason in collection.left_out.items():
        by_reason[reason].append(path.name)
    for reason, names in by_reason.items():
        LOGGER.info("%d image(s) left out (%s): %s", len(names), reason, truncate_list(names, 5))


def _require_images(collection: Collection, config: RunConfig) -> None:
    """End the run if no image is usable, after logging each problem and adding it to the reports."""
    if collection.units:
        return
    problems = collection.problems
    if not config.dry_run:
        remove_unusable(problems, config)
        update_reports(config, collect_statuses([], problems, [], Stopwatch(), config), config.device)
    for message in dict.fromkeys(problem.message for problem in problems):
        LOGGER.error(message)
    raise InputError(
        config.bids_dir,
        f"no usable {' or '.join(config.modalities)} image among the selected participants",
        "check --participant-label and --bids-filter-file, and the errors above",
    )


def _choose_models(config: RunConfig, collection: Collection) -> list[Bundle]:
    """Load the models for the modalities of the images, and check them."""
    if config.models == ("none",):
        return []
    present = {unit.modality for unit in collection.units if unit.key not in collection.anchors_only}
    modalities = [modality for modality in config.modalities if modality in present]
    return resolve_bundles(list(config.models) or None, modalities, config.deviations)


def _find_reference(config: RunConfig) -> Reference:
    """Find the reference image; all images of a dataset must be registered to the same one."""
    try:
        reference = resolve_reference(config.atlas_dir, config.work_dir / "reference")
    except InputError as error:
        raise UnavailableError(str(error)) from error
    earlier = read_json(config.output_dir / "tpl-SRI24" / "anat" / "tpl-SRI24_desc-brain_T1w.json")
    if earlier.get("ReferenceSHA256") not in (None, reference.sha256):
        raise ConfigError(
            f"{config.output_dir} was written with another reference image ({earlier.get('ReferenceName')}); "
            "use the same --atlas-dir, or another output folder"
        )
    return reference


def _read_participants(config: RunConfig, collection: Collection, bundles: Sequence[Bundle]) -> Participants:
    """Read participants.tsv; an unusable table is an error only if normative deviations are requested."""
    read = (
        read_participants if any(bundle.deviation != "none" for bundle in bundles) else try_read_participants
    )
    participants = read(config.bids_dir, [f"sub-{label}" for label in collection.subjects])
    for note in participants.notes:
        LOGGER.warning(note)
    return participants


def probe_device(device: str, precision: str) -> tuple[str, str]:
    """Resolve device and precision of the detectors, in a separate process that frees the GPU.

    Parameters
    ----------
    device : str
        `auto`, `cpu`, `cuda` or `cuda:N`.
    precision : {"auto", "fp32", "bf16"}
        Requested arithmetic of the networks.

    Returns
    -------
    device : str
        `cpu`, `cuda` or `cuda:N`.
    precision : {"auto", "fp32", "bf16"}
        Arithmetic that the device supports; on a CPU that of each detector if `auto`.

    Raises
    ------
    UnavailableError
        If a requested GPU does not work, or does not support the precision.
    """
    if device == "cpu":
        return device, precision
    probe = subprocess.run(
        [sys.executable, "-c", _PROBE, device, precision], capture_output=True, text=True, check=False
    )
    if probe.returncode == 0:
        device, supported = probe.stdout.split()[-2:]
        return device, precision if device == "cpu" else supported
    lines = probe.stderr.strip().splitlines() or [f"the check ended with exit code {probe.returncode}"]
    reason = lines[-1]
    raise UnavailableError(reason if device in reason else f"--device {device}: {reason}")


def print_plan(tasks: Sequence[Task], collection: Collection, context: RunContext) -> None:
    """Print the tasks of a dry run.

    Parameters
    ----------
    tasks : sequence of Task
        Tasks of all participants.
    collection : Collection
        Its problems are printed, too.
    context : RunContext
        Options and models.
    """
    for line in _warnings(tasks, context):
        LOGGER.warning(line)
    table = Table("image", "status", "detectors", "registered to", "lesion mask", title="bids_uad dry run")
    for task in tasks:
        reason = " (inputs or options changed)" if task.outdated else ""
        table.add_row(
            task.unit.key,
            "anchor only" if task.anchor_only else "up to date" if task.done else f"to do{reason}",
            ", ".join(bundle.label for bundle in task.bundles) or "-",
            task.unit.anchor.key if task.unit.anchor else "SRI24",
            task.lesion.path.name if task.lesion else "-",
        )
    for problem in collection.problems:
        table.add_row(problem.key or f"sub-{problem.subject}", "unusable", "-", "-", "-")
    console = Console(stderr=True, markup=False)
    console.print(table)
    for message in dict.fromkeys(problem.message for problem in collection.problems):
        console.print(message, style="red", markup=False, highlight=False, soft_wrap=True)


def _warnings(tasks: Sequence[Task], context: RunContext) -> list[str]:
    """List limits of the results that are known before the run."""
    config = context.config
    lines = leakage_warnings(context.bundles, [task.unit for task in tasks], config.bids_dir)
    lines += normative_warnings(tasks)
    lines += mask_warnings([task for task in tasks if not task.anchor_only], config.derivatives.get(LESIONS))
    models = sorted({label for task in tasks for label in task.outdated_models})
    if models:
        images = [task.unit.key for task in tasks if task.outdated_models]
        lines.append(
            f"the outputs of {truncate_list(models, 5)} are outdated for {truncate_list(images, 5)}, since "
            "inputs or options have changed; they are removed, run with these --models to write them again"
        )
    return lines


def run_tasks(tasks: list[Task], collection: Collection, context: RunContext) -> int:
    """Process pending tasks, write reports and print the summary.

    Parameters
    ----------
    tasks : list of Task
        Tasks of all participants, locked.
    collection : Collection
        Its problems are part of the summary.
    context : RunContext
        Options, models, reference image and brain extraction.

    Returns
    -------
    int
        Exit code 0 or 1.

    Raises
    ------
    UnavailableError
        If the requested GPU is not available.
    StorageError
        If an output or work folder cannot be written.
    WorkflowError
        If the workflow could not be built.
    """
    config = context.config
    remove_temporary_files(config.output_dir, collection.subjects)
    warnings = _warnings(tasks, context)
    for line in warnings:
        LOGGER.warning(line)
    if config.clean_workdir:
        _remove_working_folders(tasks, config)
    pending = [task for task in tasks if not task.done]
    if pending and context.bundles:
        device, precision = probe_device(config.device, config.precision)
        context = replace(context, device=device, precision=precision)
        precisions = sorted({context.precision_of(bundle) for bundle in context.bundles})
        LOGGER.info("Detectors run on %s in %s", device, " and ".join(precisions))
    stopwatch = Stopwatch()
    failures = []
    remove_unusable(collection.problems, config)
    if pending:
        _describe_dataset(tasks, context)
        failures = run_workflow(tasks, context, stopwatch)
        _describe_dataset(tasks, context)  # other jobs may have written it meanwhile
    records = (record_path(config.output_dir, task.unit) for task in tasks)
    if pending or is_outdated(config.output_dir / "logs" / "CITATION.md", records):
        write_methods(config.output_dir)
    statuses = collect_statuses(tasks, collection.problems, failures, stopwatch, config)
    failed_reports = update_reports(config, statuses, context.device)
    print_summary(statuses, tasks, config.output_dir, Console(stderr=True, markup=False))
    for line in warnings + quality_warnings(statuses, tasks, config.output_dir):
        LOGGER.warning(line)
    errors = [status.message for status in statuses if not status.complete]
    for line in dict.fromkeys(errors + failed_reports):  # one file may affect several images
        LOGGER.error(line)
    if failed_reports or not all(status.complete for status in statuses):
        return ExitCode.FAILED
    if config.clean_workdir:
        _remove_working_folders(tasks, config)
    return ExitCode.OK


def _remove_working_folders(tasks: Sequence[Task], config: RunConfig) -> None:
    """Remove the working folders of images; that of the participant may be in use by another job."""
    for task in tasks:
        for folder in working_folders(config.work_dir, task.unit):
            shutil.rmtree(folder, ignore_errors=True)


def _describe_dataset(tasks: Sequence[Task], context: RunContext) -> None:
    """Write the files at the top of the dataset: description, README, bibliography, template."""
    config, bundles = context.config, context.bundles
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
    write_template(context.reference, config.output_dir)


def run_workflow(tasks: list[Task], context: RunContext, stopwatch: Stopwatch) -> list[NodeFailure]:
    """Build and run the nipype workflow.

    Parameters
    ----------
    tasks : list of Task
        Tasks of all participants.
    context : RunContext
        Options, models, reference image, brain extraction and device.
    stopwatch : Stopwatch
        Measures the time of each image.

    Returns
    -------
    list of NodeFailure
        Nodes that failed.

    Raises
    ------
    WorkflowError
        If the workflow could not be built.
    StorageError
        If an output or work folder cannot be written.
    """
    config = context.config
    configure_nipype()
    nipype_config.update_config(
        {
            "execution": {
                "check_version": "false",
                # Pages about the graph, which jobs that share a work folder would overwrite.
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
    subjects = {task.unit.subject for task in pending}
    _write_config(config, subjects)
    for task in pending:
        remove_outdated(task, config)
    LOGGER.info("%d image(s) to process, %d up to date", len(pending), len(tasks) - len(pending))
    progress = ProgressLog(len(pending))

    def watch(node: Any, status: str) -> None:
        stopwatch(node, status)
        progress(node, status)

    plugin = make_plugin(config, watch)
    try:
        workflow.run(plugin=plugin)
    except RuntimeError:
        # nipype raises one error for all failed nodes; without failed nodes, it is another error.
        if not plugin.failures:
            raise
    finally:
        plugin.close()
        remove_temporary_files(config.output_dir, subjects)  # of stopped workers
    return plugin.failures


def _write_config(config: RunConfig, subjects: set[str]) -> None:
    """Write the configuration of the run to the logs of the dataset and of each participant."""
    text = config.to_toml()
    write_text(config.output_dir / "logs" / f"bids_uad-{config.run_id}.toml", text)
    for subject in subjects:
        write_text(crash_dir(config, subject) / "bids_uad.toml", text)
