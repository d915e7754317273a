"""Participant level: check inputs, process what is missing or outdated, write reports, give an exit code."""

from __future__ import annotations

import ctypes
import logging
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from niworkflows.engine.workflows import LiterateWorkflow
from rich.console import Console
from rich.logging import RichHandler

from bids_uad.config import MODALITIES, RunConfig
from bids_uad.dataset.describe import ModelEntry, describe_dataset, refuse_foreign
from bids_uad.dataset.external import LESIONS
from bids_uad.dataset.inputs import (
    Collection,
    find_modalities,
    open_layout,
    read_queries,
    requested_subjects,
    require_sessions,
)
from bids_uad.dataset.naming import Problem, detector_desc, natural_key
from bids_uad.dataset.participants import Participants, read_participants, try_read_participants
from bids_uad.engine.bundle import Bundle, resolve_bundles
from bids_uad.errors import (
    ConfigError,
    ExitCode,
    InputError,
    StorageError,
    UnavailableError,
    truncate_list,
)
from bids_uad.files import CHECKSUMS, is_outdated, read_json, write_text
from bids_uad.levels.participant.completion_records import write_methods
from bids_uad.levels.participant.executors import (
    Call,
    CallError,
    IsolatedPlugin,
    NodeFailure,
    Steps,
    make_plugins,
)
from bids_uad.levels.participant.leakage import join_remarks, leakage_remarks, normative_remarks
from bids_uad.levels.participant.plan import (
    ImageLocks,
    RunContext,
    Task,
    crash_dir,
    images_in_use,
    inspect_participant,
    mask_remarks,
    model_remarks,
    plan_tasks,
    remove_outdated,
    remove_temporary_files,
    remove_unusable,
)
from bids_uad.levels.participant.summary import (
    Progress,
    collect_statuses,
    error_line,
    needs_report,
    print_summary,
    print_table,
    report_steps,
    rewrite_reports,
    save_last_run,
    summarize,
)
from bids_uad.levels.participant.workflow import build_workflow, node_key, node_key_of, working_folders
from bids_uad.methods.registry import warn_if_emulated
from bids_uad.preprocessing.brain_extraction.masks import resolve_extraction
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


def run_participant(config: RunConfig) -> int:
    """Run the participant level: process what is missing or outdated, participant after participant.

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
    return run_dataset(config).exit_code


def run_dataset(config: RunConfig) -> Run:
    """Process what is missing or outdated, and report what failed; see :func:`run_participant`.

    Parameters
    ----------
    config : RunConfig
        Options of the command line.

    Returns
    -------
    Run
        The finished run.

    Raises
    ------
    UserError
        If the run cannot start.
    """
    subjects, participants, context = prepare_run(config)
    config = context.config
    console = _log_console()
    with Progress(len(subjects), console) as progress:
        plugin, cluster = make_plugins(config, progress.watch)
        run = Run(config, participants, context, plugin, progress)
        if not config.dry_run:
            remove_temporary_files(config.output_dir)
        steps = run.list_tasks if config.dry_run else run.process
        try:
            run.n_dropped = plugin.process(
                map(steps, subjects), cluster=cluster, stop_on_failure=config.stop_on_first_crash
            )
        finally:
            for each in (plugin, cluster, run.locks):
                if each is not None:
                    each.close()
            if run.n_images and not config.dry_run:
                remove_temporary_files(config.output_dir)  # of stopped workers
    run.log_inputs(len(subjects))
    if not run.n_images and not run.n_dropped:
        for message in run.errors:
            LOGGER.error(message)
        raise InputError(
            config.bids_dir,
            f"no usable {truncate_list(config.modalities, last='or')} image among the selected participants",
            "check --participant-label and --bids-filter-file, and the errors above",
        )
    run.finish(console)
    return run


def _log_console() -> Console:
    """Return the console of the log, so that a progress bar and log lines do not overwrite each other."""
    consoles = [handler.console for handler in LOGGER.handlers if isinstance(handler, RichHandler)]
    return consoles[0] if consoles else Console(stderr=True, markup=False)


def prepare_run(config: RunConfig) -> tuple[tuple[str, ...], Participants, RunContext]:
    """Check options, names, models and the reference image before anything is written; read no image.

    Parameters
    ----------
    config : RunConfig
        Options of the command line.

    Returns
    -------
    subjects : tuple of str
        Labels of the requested participants.
    participants : Participants
        Contents of participants.tsv and sessions.tsv.
    context : RunContext
        Models, reference image, brain extraction, and `config` without the modalities that are skipped; the
        device is resolved only if a GPU is requested.

    Raises
    ------
    UserError
        If the run cannot start.
    """
    device, precision = config.device, config.precision
    if device.startswith(("cuda", "mps")):
        device, precision = probe_device(device, precision)
    extraction = resolve_extraction(config.brain_extraction, config.extraction_weights)
    refuse_foreign(config.output_dir)
    read_json(config.bids_dir / "dataset_description.json")
    subjects = requested_subjects(config.bids_dir, config.participants)
    require_sessions(config.bids_dir, subjects, config.sessions)
    read_queries(config.filter_file)
    if config.database_dir is not None:
        open_layout(config.bids_dir, subjects, config.database_dir)
    LOGGER.info("%d participant(s)", len(subjects))
    bundles, config = _choose_models(config, subjects)
    reference = _find_reference(config)
    participants = _read_participants(config, subjects, bundles)
    context = RunContext(config, tuple(bundles), reference, extraction, device, precision)
    return subjects, participants, context


def _choose_models(config: RunConfig, subjects: Sequence[str]) -> tuple[list[Bundle], RunConfig]:
    """Load and check the models for the modalities of the images; skip those without a model by default."""
    if config.models == ("none",):
        return [], config
    found = find_modalities(config, subjects)
    by_default = set(config.modalities) == set(MODALITIES)
    models = list(config.models) or None
    bundles = [
        replace(bundle, min_component_volume=config.min_lesion_size)
        for bundle in resolve_bundles(models, found, config.deviations, skip_missing=by_default)
    ]
    skipped = set(found) - {bundle.modality for bundle in bundles}
    kept = tuple(modality for modality in config.modalities if modality not in skipped)
    return bundles, replace(config, modalities=kept)


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


def _read_participants(config: RunConfig, subjects: Sequence[str], bundles: Sequence[Bundle]) -> Participants:
    """Read participants.tsv; an unusable table is an error only if normative deviations are requested."""
    read = (
        read_participants if any(bundle.deviation != "none" for bundle in bundles) else try_read_participants
    )
    participants = read(config.bids_dir, [f"sub-{label}" for label in subjects])
    for note in participants.notes:
        LOGGER.warning(note)
    return participants


def probe_device(device: str, precision: str) -> tuple[str, str]:
    """Resolve device and precision of the detectors, in a separate process that frees the GPU.

    Parameters
    ----------
    device : str
        `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
    precision : {"auto", "fp32", "bf16"}
        Requested arithmetic of the networks.

    Returns
    -------
    device : str
        `cpu`, `cuda`, `cuda:N` or `mps`.
    precision : {"auto", "fp32", "bf16"}
        Arithmetic that the device supports; on a CPU that of each detector if `auto`.

    Raises
    ------
    UnavailableError
        If a requested GPU does not work, or does not support the precision.
    """
    if device == "cpu" or (device == "auto" and not has_gpu_driver()):
        return "cpu", precision
    probe = subprocess.run(
        [sys.executable, "-c", _PROBE, device, precision], capture_output=True, text=True, check=False
    )
    if probe.returncode == 0:
        device, supported = probe.stdout.split()[-2:]
        return device, precision if device == "cpu" else supported
    lines = probe.stderr.strip().splitlines() or [f"the check ended with exit code {probe.returncode}"]
    reason = lines[-1]
    raise UnavailableError(reason if device in reason else f"--device {device}: {reason}")


def has_gpu_driver() -> bool:
    """Return whether the driver library of a GPU exists, which PyTorch would load in some seconds."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Path("/dev/kfd").exists()  # of AMD
    return True


class Run:
    """Steps of the participants of a run, and what remains of finished participants.

    Parameters
    ----------
    config : RunConfig
        Options of the command line.
    participants : Participants
        Contents of participants.tsv and sessions.tsv.
    context : RunContext
        Models, reference image and brain extraction.
    plugin : IsolatedPlugin
        Plugin that runs the steps.
    progress : Progress
        Progress of the run.

    Attributes
    ----------
    n_images : int
        Number of usable images so far.
    n_dropped : int
        Number of participants that were not begun.
    """

    def __init__(
        self,
        config: RunConfig,
        participants: Participants,
        context: RunContext,
        plugin: IsolatedPlugin,
        progress: Progress,
    ) -> None:
        self._config, self._participants, self._context = config, participants, context
        self._plugin, self._progress = plugin, progress
        self.locks = ImageLocks(config)
        self.n_images = self.n_dropped = 0
        self._errors: dict[str, list[str]] = defaultdict(list)
        self._left_out: dict[str, list[str]] = defaultdict(list)
        self._remarks: dict[tuple[str, str], set[str]] = defaultdict(set)
        self._quality: list[str] = []
        self._rows: list[tuple] = []
        self._descriptions: dict[str, str] = {}
        self._n_masks, self._n_processed, self._device_found = 0, 0, False

    @property
    def bundles(self) -> tuple[Bundle, ...]:
        """Models of the run."""
        return self._context.bundles

    @property
    def errors(self) -> list[str]:
        """Messages of images and reports that failed, in the order of the participants."""
        by_participant = [self._errors[subject] for subject in sorted(self._errors, key=natural_key)]
        messages = list(dict.fromkeys(chain(*by_participant)))  # one file may affect several images
        if self.n_dropped:
            messages.append(f"{self.n_dropped} participant(s) not processed, because an image failed")
        return messages

    @property
    def exit_code(self) -> int:
        """Exit code: 1 if an image, participant or report failed, else 0; always 0 for a dry run."""
        return ExitCode.FAILED if self.errors and not self._config.dry_run else ExitCode.OK

    def process(self, subject: str) -> Steps:
        """Process one participant: check inputs, run the workflow, write the report.

        Parameters
        ----------
        subject : str
            Label without `sub-`.

        Yields
        ------
        Call, LiterateWorkflow or None
            See :data:`~bids_uad.levels.participant.executors.Steps`.
        """
        config = self._config
        self._progress.begin(subject)
        remove_temporary_files(config.output_dir, subject)
        collection, checksums = yield from self._inspect(subject)
        CHECKSUMS.update(checksums)
        remove_unusable(collection.problems, config)
        waits_for = None
        while True:
            try:
                with self.locks.hold(
                    partial(plan_tasks, collection, self._participants, self._context)
                ) as tasks:
                    if not isinstance(tasks, str):
                        failures, problems = yield from self._run_workflow(subject, tasks)
                        break
            except InputError as error:  # a file has disappeared
                tasks, failures, problems = [], [], [Problem(subject, str(error))]
                break
            if waits_for is None:
                waits_for = tasks
                LOGGER.info("Waiting for another run that processes %s", waits_for)
            yield None
        problems = [*collection.problems, *problems]
        statuses = collect_statuses(tasks, problems, failures, self._progress.seconds, config)
        if needs_report(config, subject, statuses):
            save_last_run(config, subject, statuses, self._context.device)
            yield from report_steps(config, subject, self._participants, self._errors[subject])
        self._errors[subject] += [status.message for status in statuses if not status.complete]
        rows, warnings = summarize(statuses, tasks, config.output_dir)
        self._rows += rows
        self._quality += warnings
        self._progress.end(subject, statuses)
        for path in checksums:
            CHECKSUMS.pop(path, None)

    def list_tasks(self, subject: str) -> Steps:
        """List the tasks of one participant for a dry run; see :meth:`process`."""
        self._progress.begin(subject)
        collection, checksums = yield from self._inspect(subject)
        CHECKSUMS.update(checksums)
        tasks = plan_tasks(collection, self._participants, self._context)
        self._add_remarks(tasks)
        for task in tasks:
            reason = " (inputs or options changed)" if task.outdated else ""
            self._rows.append(
                (
                    task.unit.key,
                    "anchor only" if task.anchor_only else "up to date" if task.done else f"to do{reason}",
                    ", ".join(bundle.label for bundle in task.bundles) or "-",
                    task.unit.anchor.key if task.unit.anchor else "SRI24",
                    task.lesion.path.name if task.lesion else "-",
                )
            )
        for problem in collection.problems:
            self._rows.append((problem.key or f"sub-{problem.subject}", "unusable", "-", "-", "-"))
            self._errors[subject].append(problem.message)
        self._progress.end(subject, [])

    def _inspect(self, subject: str) -> Generator[Call, Any, tuple[Collection, dict[Path, str]]]:
        """Find, read and hash the images of a participant in a worker process."""
        try:
            collection, checksums = yield Call(inspect_participant, (self._config, subject))
        except (CallError, InputError) as error:
            cause = error_line(str(error))
            problem = Problem(subject, f"sub-{subject}: the images could not be checked: {cause}")
            return Collection((subject,), (), problems=(problem,)), {}
        self.n_images += len(collection.units)
        self._n_masks += len(collection.lesions)
        for path, reason in collection.left_out.items():
            self._left_out[reason].append(path.name)
        return collection, checksums

    def _run_workflow(
        self, subject: str, tasks: list[Task]
    ) -> Generator[LiterateWorkflow, None, tuple[list[NodeFailure], list[Problem]]]:
        """Run the workflow of a participant whose images are locked; return what failed."""
        config = self._config
        self._add_remarks(tasks)
        if config.clean_workdir:
            self._remove_working_folders(tasks)
        pending = [task for task in tasks if not task.done]
        if not pending:
            return [], []
        self._n_processed += len(pending)
        if any(task.bundles for task in pending):
            self._find_device()
        self._describe_dataset(tasks)
        try:
            workflow = build_workflow(tasks, self._context)
        except StorageError:
            raise
        except Exception as error:  # the other participants can be processed
            LOGGER.debug("workflow not built", exc_info=error)
            message = f"sub-{subject}: the workflow could not be built: {type(error).__name__}: {error}"
            return [], [Problem(subject, message)]
        log_dir = crash_dir(config, subject)
        write_text(log_dir / "bids_uad.toml", config.to_toml())
        if config.write_graph:
            kind = "svg" if shutil.which("dot") else "dot"
            workflow.write_graph(str(log_dir / "graph.dot"), graph2use="colored", format=kind)
        for task in pending:
            remove_outdated(task, config)
        try:
            yield workflow
        finally:
            remove_temporary_files(config.output_dir, subject)  # of stopped workers
        own = node_key(subject, "")[0]
        failures = [failure for failure in self._plugin.failures if node_key_of(failure.node)[0] == own]
        if not failures and not config.keep_workdir:
            self._remove_working_folders(tasks)
        return failures, []

    def _add_remarks(self, tasks: Sequence[Task]) -> None:
        """Add the limits of the results that are known before processing; log the first of each kind."""
        remarks = leakage_remarks(self._context.bundles, [task.unit for task in tasks], self._config.bids_dir)
        remarks += normative_remarks(tasks) + mask_remarks(tasks) + model_remarks(tasks)
        for remark in remarks:
            if remark.kind not in self._remarks and not self._config.dry_run:
                LOGGER.warning("".join(remark))
            self._remarks[remark.kind].add(remark.name)

    def _find_device(self) -> None:
        """Resolve device and precision at the first image that is scored."""
        if not self._device_found:
            device, precision = self._context.device, self._context.precision
            if not device.startswith(("cuda", "mps")):  # a requested GPU was checked before the run
                device, precision = probe_device(device, precision)
            self._context = replace(self._context, device=device, precision=precision)
            self._device_found = True
            precisions = sorted({self._context.precision_of(bundle) for bundle in self._context.bundles})
            LOGGER.info("Detectors run on %s in %s", device, " and ".join(precisions))
            warn_if_emulated(precision, device)

    def _remove_working_folders(self, tasks: Sequence[Task]) -> None:
        """Remove the working folders of the images that are locked; another job may use the others."""
        used = images_in_use(tasks, everything=self._config.clean_workdir)
        folders = [
            folder
            for task in tasks
            if task.unit.key in used
            for folder in working_folders(self._config.work_dir, task.unit)
        ]
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        if folders and not self._config.sessions:
            with suppress(OSError):  # of other images
                folders[0].parent.rmdir()

    def _describe_dataset(self, tasks: Sequence[Task]) -> None:
        """Write the files at the top of the dataset, if the tasks add anything to their descriptions."""
        descriptions = describe_outputs(tasks, self._context.bundles)
        if not self._descriptions:
            path = self._config.output_dir / "logs" / f"bids_uad-{self._config.run_id}.toml"
            write_text(path, self._config.to_toml())
        if not descriptions.keys() <= self._descriptions.keys():
            self._descriptions |= descriptions
            self._write_description()

    def _write_description(self) -> None:
        """Write the files at the top of the dataset: description, README, bibliography, template."""
        config, bundles = self._config, self._context.bundles
        models = [
            ModelEntry(bundle.name, str(bundle.info["code_version"]), bundle.sha256) for bundle in bundles
        ]
        describe_dataset(config.output_dir, config.bids_dir, config.derivatives, models, self._descriptions)
        write_template(self._context.reference, config.output_dir)

    def log_inputs(self, n_participants: int) -> None:
        """Log the numbers of participants and images, and the images that are left out by filters."""
        LOGGER.info("%d image(s) of %d participant(s)", self.n_images, n_participants)
        for reason, names in self._left_out.items():
            LOGGER.info("%d image(s) left out (%s): %s", len(names), reason, truncate_list(names, 5))

    def finish(self, console: Console) -> None:
        """Write the methods text of the dataset, print the summary and log warnings and errors.

        Parameters
        ----------
        console : rich.console.Console
            Console to print to.
        """
        config = self._config
        warnings = join_remarks(self._remarks)
        if (lesions := config.derivatives.get(LESIONS)) is not None and not self._n_masks:
            warnings.append(
                f"{lesions}: no usable lesion mask for any of the images; names must end in "
                "_label-lesion_mask, _label-lesion_roi or _seg-lesion_mask"
            )
        # Participants are finished in any order; the images of each are in order.
        self._rows.sort(key=lambda row: natural_key(row[0].partition("_")[0]))
        self._quality.sort(key=natural_key)
        if config.dry_run:
            headings = ("image", "status", "detectors", "registered to", "lesion mask")
            print_table(headings, self._rows, console, title="bids_uad dry run")
        else:
            if self._descriptions:
                self._write_description()  # other jobs may have written it meanwhile
            if self._n_processed or is_outdated(config.output_dir / "logs" / "CITATION.md", self._records()):
                write_methods(config.output_dir, md_only=config.md_only_boilerplate)
            print_summary(self._rows, console)
        for line in warnings + self._quality:
            LOGGER.warning(line)
        for line in self.errors:
            LOGGER.error(line)

    def _records(self) -> Iterator[Path]:
        """Return the completion records of the dataset."""
        for pattern in ("sub-*/log/*.json", "sub-*/ses-*/log/*.json"):
            yield from self._config.output_dir.glob(pattern)


def describe_outputs(tasks: Sequence[Task], bundles: Sequence[Bundle]) -> dict[str, str]:
    """Describe the values of the `desc` entity in the outputs of tasks.

    Parameters
    ----------
    tasks : sequence of Task
        Tasks of a participant.
    bundles : sequence of Bundle
        Models of the run.

    Returns
    -------
    dict of str to str
        Description of each value.
    """
    written = [task for task in tasks if not task.anchor_only]
    descriptions = {
        "preproc": "Brain in SRI24 space, corrected for intensity non-uniformity, 99.5th percentile at 1",
        "brain": "Brain mask",
        **{f"{task.unit.modality}Preproc": f"Quality of the {task.unit.modality} image" for task in written},
    }
    for modality in {task.unit.modality for task in written if task.unit.anchor is not None}:
        text = f"Brain mask of a {modality} image that is registered to a T1w image"
        descriptions[f"{modality}Brain"] = text
    if any(task.unit.session is not None for task in written):
        descriptions["longitudinal"] = "Comparison of the sessions of a participant"
    if any(task.lesion is not None for task in written):
        descriptions["manual"] = "Lesion mask given by the user"
    for bundle in bundles:
        text = f"Scores of {bundle.detector} (preset {bundle.preset}) for the {bundle.modality} image"
        if bundle.deviation != "none":
            text += ", as deviations from a normative reference of healthy controls"
        descriptions[detector_desc(bundle.modality, bundle.scored_as)] = text
    return descriptions
