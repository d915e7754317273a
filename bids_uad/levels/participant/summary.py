"""Progress of a run, status of every image, summary table, and participant reports."""

from __future__ import annotations

import logging
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
from rich.columns import Columns
from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from bids_uad import __version__
from bids_uad.calibration.thresholds import HealthyMarked
from bids_uad.config import RunConfig
from bids_uad.dataset.inputs import requested_subjects
from bids_uad.dataset.naming import ImageUnit, Problem, detection_outputs, natural_key, preprocessing_outputs
from bids_uad.dataset.participants import Participants, try_read_participants
from bids_uad.errors import UserError, duration, truncate_list
from bids_uad.files import is_outdated, locked, read_json, write_json
from bids_uad.levels.participant.completion_records import (
    describe_methods,
    read_record,
    read_records,
    record_path,
)
from bids_uad.levels.participant.executors import Call, CallError, NodeFailure, Steps, make_plugins
from bids_uad.levels.participant.interfaces import sidecar_of
from bids_uad.levels.participant.plan import Task, remove_temporary_files
from bids_uad.levels.participant.workflow import node_key, node_key_of
from bids_uad.methods.registry import detector_name
from bids_uad.preprocessing.quality import FAILED_MIRRORED
from bids_uad.preprocessing.registration import Volume, mirror_ratio
from bids_uad.reports.derivatives import Image, find_images, read_sidecar

LOGGER = logging.getLogger("bids_uad")

PARTICIPANT = "-"
"""Name of the image in the status of a participant as a whole."""
LOG_INTERVAL = 300.0
"""Time in s after which the state of the run is logged if no participant is finished."""
MAX_ROWS = 200
"""Maximum number of rows of the summary table."""
DONE, UP_TO_DATE, FAILED, NOT_RUN, UNUSABLE = "done", "up to date", "failed", "not run", "unusable"

_ERROR_LINE = re.compile(r"^\s*(?:[A-Za-z_][\w.]*\.)?([A-Za-z_]\w*(?:Error|Exception|Killed|Exit)): (.+)$")
_STYLES = {DONE: "green", UP_TO_DATE: "cyan", FAILED: "red", NOT_RUN: "yellow", UNUSABLE: "red"}


@dataclass(frozen=True)
class ImageStatus:
    """Result of a run for one image.

    Parameters
    ----------
    subject : str
        Label of the participant, without `sub-`.
    image : str
        Name of the image; `PARTICIPANT` if the status concerns the participant as a whole.
    status : str
        `done`, `up to date`, `failed`, `not run` or `unusable`.
    seconds : float, default=0
        Total time of the image's nodes.
    message : str, default=""
        Cause of a failure in one line.
    """

    subject: str
    image: str
    status: str
    seconds: float = 0.0
    message: str = ""

    @property
    def complete(self) -> bool:
        """Whether all outputs of the image exist and are up to date."""
        return self.status in (DONE, UP_TO_DATE)


class Progress:
    """Progress of a run: participants that are done, failed and running, current steps, time left.

    On a terminal, a bar is updated in place. Elsewhere, a line is logged for each finished participant, and
    every few minutes while none is finished.

    Parameters
    ----------
    n_participants : int
        Number of participants of the run.
    console : rich.console.Console
        Console of the bar, that of the log.

    Attributes
    ----------
    seconds : dict
        Total time of the nodes of each image of unfinished participants in s, by
        :func:`~bids_uad.levels.participant.workflow.node_key`.
    """

    def __init__(self, n_participants: int, console: Console) -> None:
        self.seconds: dict[tuple[str, str], float] = {}
        self._total, self._done, self._failed, self._processed = n_participants, 0, 0, 0
        self._running: dict[str, None] = {}
        self._nodes: dict[str, float] = {}
        self._begin = self._logged = time.monotonic()
        self._live = Live(console=console, get_renderable=self._line, refresh_per_second=2, transient=True)
        self._interactive = console.is_terminal

    def __enter__(self) -> Progress:
        if self._interactive:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._interactive:
            self._live.stop()

    def watch(self, node: Any, status: str) -> None:
        """Process a status of a nipype node: `start`, `end` or `exception`."""
        name = node.fullname
        if status == "start":
            self._nodes[name] = time.monotonic()
        elif name in self._nodes:
            key = node_key_of(name)
            self.seconds[key] = self.seconds.get(key, 0.0) + time.monotonic() - self._nodes.pop(name)
        if not self._interactive and time.monotonic() - self._logged > LOG_INTERVAL:
            self._log(self._text())

    def begin(self, subject: str) -> None:
        """Add a participant, by label, to the running ones."""
        self._running[subject] = None

    def end(self, subject: str, statuses: Sequence[ImageStatus]) -> None:
        """Count a participant, by label, as done or failed, and log it unless all images were up to date."""
        del self._running[subject]
        failed = [status for status in statuses if not status.complete]
        self._done += not failed
        self._failed += bool(failed)
        key = node_key(subject, "")[0]
        self.seconds = {image: seconds for image, seconds in self.seconds.items() if image[0] != key}
        if any(status.status != UP_TO_DATE for status in statuses):
            self._processed += 1
            number = f"{len(failed)} of {len(statuses)} images" if failed else f"{len(statuses)} image(s)"
            self._log(f"sub-{subject} {'failed' if failed else 'done'} ({number}); {self._text()}")

    def _log(self, text: str) -> None:
        self._logged = time.monotonic()
        LOGGER.info(text)

    def _text(self) -> str:
        """Describe the state of the run in one line."""
        ended = self._done + self._failed
        text = f"{self._done} of {self._total} participants done"
        if self._failed:
            text += f", {self._failed} failed"
        if self._nodes:
            steps = [f"{node_key_of(name)[1]} {name.rsplit('.', 1)[1]}" for name in self._nodes]
            text += f"; running: {truncate_list(steps, 4)}"
        if self._processed and ended < self._total:
            left = (time.monotonic() - self._begin) / self._processed * (self._total - ended)
            text += f"; about {duration(left)} left"
        return text

    def _line(self) -> RenderableType:
        """Return the bar and the text for the terminal."""
        bar = ProgressBar(self._total, self._done + self._failed, width=30)
        return Columns([bar, Text(self._text(), no_wrap=True, overflow="ellipsis")])


def collect_statuses(
    tasks: Sequence[Task],
    problems: Sequence[Problem],
    failures: Sequence[NodeFailure],
    seconds: Mapping[tuple[str, str], float],
    config: RunConfig,
) -> list[ImageStatus]:
    """Return the status of every image of a participant after its workflow.

    Parameters
    ----------
    tasks : sequence of Task
        Tasks of the participant.
    problems : sequence of Problem
        Images and lesion masks that could not be used.
    failures : sequence of NodeFailure
        Nodes that failed.
    seconds : mapping
        Times of the images, see :class:`Progress`.
    config : RunConfig
        `output_dir` and `run_id` are used.

    Returns
    -------
    list of ImageStatus
        Sorted by image.
    """
    failed: dict[tuple[str, str], list[NodeFailure]] = defaultdict(list)
    for failure in failures:
        failed[node_key_of(failure.node)].append(failure)
    statuses = [
        ImageStatus(problem.subject, problem.key or PARTICIPANT, UNUSABLE, message=problem.message)
        for problem in problems
    ]
    for task in tasks:
        key = node_key(task.unit.subject, task.unit.key)
        if key not in failed and task.anchor_only:
            continue
        status, message = _status_of(task, failed[key], config)
        own = seconds.get(key, 0.0)
        statuses.append(ImageStatus(task.unit.subject, task.unit.key, status, own, message))
    return sorted(statuses, key=lambda status: (status.subject, status.image))


def _status_of(task: Task, failures: Sequence[NodeFailure], config: RunConfig) -> tuple[str, str]:
    """Return status and message of a task; several detectors may have failed."""
    if task.done and not task.anchor_only:
        return UP_TO_DATE, ""
    record = read_record(record_path(config.output_dir, task.unit))
    if record is not None and record.run_id == config.run_id:
        return DONE, ""
    if failures:
        causes = []
        for failure in failures:
            cause = f"{error_line(failure.traceback)} (details: {failure.crash_file})"
            causes.append(f"{failure.node.rsplit('.', 1)[-1]}: {cause}")
        return FAILED, f"{task.unit.key}: {'; '.join(causes)}"
    return (
        NOT_RUN,
        f"{task.unit.key}: not run, because an image that it depends on, or the run, failed before",
    )


def error_line(traceback: str) -> str:
    """Return the line of a traceback that describes the error.

    Parameters
    ----------
    traceback : str
        Traceback of nipype, which may contain another.

    Returns
    -------
    str
        The message without the error class if it is one for users, else the last line.
    """
    lines = [line.strip() for line in traceback.splitlines() if line.strip()]
    for line in reversed(lines):
        match = _ERROR_LINE.match(line)
        if match:
            kind, message = match.groups()
            return message if kind in ("InputError", "ModelError", "ProcessKilled") else f"{kind}: {message}"
    return lines[-1] if lines else "no message"


def summarize(
    statuses: Sequence[ImageStatus], tasks: Sequence[Task], output_dir: Path
) -> tuple[list[tuple[str | Text, ...]], list[str]]:
    """Return the rows of a participant in the summary table, and the warnings about its images.

    Parameters
    ----------
    statuses : sequence of ImageStatus
        Statuses of the participant's images.
    tasks : sequence of Task
        Tasks of the participant.
    output_dir : pathlib.Path
        Root of the derivatives.

    Returns
    -------
    rows : list of tuple
        Image, status, seconds, brain volume, and anomaly volumes with Dice; one row per image.
    warnings : list of str
        Lines about preprocessing and marked fraction of the images that this run has processed.
    """
    by_key = {task.unit.key: task for task in tasks}
    rows, warnings = [], []
    for status in statuses:
        brain, anomalies = "", ""
        if status.complete:
            task = by_key[status.image]
            metrics = read_metrics(task.unit, output_dir)
            measures = [_measure(output_dir, task, *found) for found in metrics.items()]
            brain = measures[0][0] if measures else ""
            anomalies = ", ".join(text for _, text in measures)
            if status.status == DONE:
                own = image_warnings(task.unit, output_dir, metrics)
                warnings += [f"{status.image}: {warning}" for warning in own]
        seconds = f"{status.seconds:.0f}" if status.seconds else "-"
        image = status.image if status.image != PARTICIPANT else f"sub-{status.subject}"
        rows.append((image, Text(status.status, _STYLES[status.status]), seconds, brain, anomalies))
    return rows, warnings


def print_summary(rows: Sequence[tuple[str | Text, ...]], console: Console) -> None:
    """Print the table of all images: status, time, volumes and, with ground truth, Dice.

    Parameters
    ----------
    rows : sequence of tuple
        Rows of :func:`summarize`. Of more than `MAX_ROWS`, only images that failed are printed.
    console : rich.console.Console
        Console to print to.
    """
    captions = []
    shown = rows
    if len(rows) > MAX_ROWS:
        shown = [row for row in rows if str(row[1]) not in (DONE, UP_TO_DATE)][:MAX_ROWS]
        captions.append(f"and {len(rows) - len(shown)} more images")
    if any("!" in row[4] for row in shown):
        captions.append("!: far more than in healthy validation scans, see the warnings")
    headings = ("image", "status", "seconds", "brain mL", "anomaly mL (Dice)")
    caption = "\n".join(captions) or None
    print_table(headings, shown, console, title="bids_uad participant", caption=caption, numbers=(2, 3))


def print_table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str | Text]],
    console: Console,
    *,
    title: str,
    caption: str | None = None,
    numbers: Sequence[int] = (),
) -> None:
    """Print a table; text that is too long for its column is continued on the next line, not truncated.

    Parameters
    ----------
    headings : sequence of str
        Headings of the columns.
    rows : iterable of sequence
        Cells of each row.
    console : rich.console.Console
        Console to print to.
    title : str
        Text above the table.
    caption : str, optional
        Text below the table.
    numbers : sequence of int, default=()
        Indices of the columns that are aligned to the right.
    """
    table = Table(title=title, caption=caption)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _detectors(output_dir: Path, unit: ImageUnit) -> list[str]:
    """List the detectors with a metrics table of an image."""
    pattern = detection_outputs(unit, "X")["metrics"].name.replace(f"{unit.modality}X_", f"{unit.modality}*_")
    start = f"_desc-{unit.modality}"
    paths = sorted((output_dir / unit.folder).glob(pattern))
    return [path.name.split(start, 1)[1].removesuffix("_metrics.tsv") for path in paths]


def read_metrics(
    unit: ImageUnit, output_dir: Path, detectors: Sequence[str] | None = None
) -> dict[str, pd.Series]:
    """Read the metrics tables of an image.

    Parameters
    ----------
    unit : ImageUnit
        The image.
    output_dir : pathlib.Path
        Root of the derivatives.
    detectors : sequence of str, optional
        Names of detectors as in :func:`bids_uad.dataset.naming.detection_outputs`; by default all that have
        scored the image.

    Returns
    -------
    dict of str to pandas.Series
        Row of the table of each detector.
    """
    names = _detectors(output_dir, unit) if detectors is None else detectors
    paths = {name: output_dir / detection_outputs(unit, name)["metrics"] for name in names}
    return {name: pd.read_csv(path, sep="\t", na_values="n/a").iloc[0] for name, path in paths.items()}


def _measure(output_dir: Path, task: Task, detector: str, row: pd.Series) -> tuple[str, str]:
    """Return brain volume, and detector with anomaly volume and Dice, as text; controls have no Dice."""
    name = detector_name(detector.lower())
    text = f"{name} {row['anomaly_volume_mm3'] / 1000:.1f}"
    if _excess_warning(row, name):
        text += "!"
    if row["lesion_volume_mm3"] == 0 and not task.is_control:
        text += " (empty mask)"
    elif pd.notna(row["lesion_volume_mm3"]) and not task.is_control:
        text += f" ({_dice(output_dir / detection_outputs(task.unit, detector)['histogram'], row):.3f})"
    return f"{row['brain_volume_mm3'] / 1000:.0f}", text


def _excess_warning(row: pd.Series, name: str) -> str:
    """Return the warning if far more is marked than in healthy scans, else an empty text."""
    brain = row["brain_volume_mm3"] or np.nan
    return HealthyMarked.read(row).warning(row["anomaly_volume_mm3"] / brain, name)


def _dice(histogram: Path, row: pd.Series) -> float:
    """Compute the Dice of the anomaly mask; 1 if both masks are empty.

    In tables of earlier versions, the overlap is that of the score histogram at the threshold.
    """
    overlap = row.get("detected_volume_mm3")
    if pd.isna(overlap):
        table = pd.read_csv(histogram, sep="\t", na_values="n/a")
        overlap = float(table.loc[table["score_lower"] >= row["threshold"], "n_lesion"].sum())
    total = float(row["anomaly_volume_mm3"] + row["lesion_volume_mm3"])
    return 1.0 if total == 0 else 2 * overlap / total


def image_warnings(unit: ImageUnit, output_dir: Path, metrics: Mapping[str, pd.Series]) -> list[str]:
    """List the warnings about preprocessing and marked fraction of an image.

    Parameters
    ----------
    unit : ImageUnit
        The image.
    output_dir : pathlib.Path
        Root of the derivatives.
    metrics : mapping of str to pandas.Series
        Metrics of the detectors, see :func:`read_metrics`.

    Returns
    -------
    list of str
        One sentence or two each.
    """
    quality = read_json(sidecar_of(output_dir / preprocessing_outputs(unit)["preproc"]))
    lines = list(quality.get("PreprocessingQuality", {}).get("warnings", []))
    for detector, row in metrics.items():
        lines += filter(None, [_excess_warning(row, detector_name(detector.lower()))])
    return lines


def needs_report(config: RunConfig, subject: str, statuses: Sequence[ImageStatus]) -> bool:
    """Return whether images of a participant have changed, or the report is missing or outdated.

    Parameters
    ----------
    config : RunConfig
        `output_dir` is used.
    subject : str
        Label without `sub-`.
    statuses : sequence of ImageStatus
        Statuses of the participant's images.

    Returns
    -------
    bool
        False also for participants that never had a usable image.
    """
    without_images = all(status.image == PARTICIPANT for status in statuses)
    if without_images and not (config.output_dir / f"sub-{subject}").is_dir():
        return False
    page = config.output_dir / f"sub-{subject}.html"
    changed = any(status.status != UP_TO_DATE for status in statuses)
    return changed or is_outdated(page, page.with_suffix("").glob("**/log/*.json"))


def report_steps(config: RunConfig, subject: str, participants: Participants, failed: list[str]) -> Steps:
    """Write the report of a participant in a worker process.

    Parameters
    ----------
    config : RunConfig
        `output_dir` and `no_viewer` are used.
    subject : str
        Label without `sub-`.
    participants : Participants
        Age, sex and health.
    failed : list of str
        A line is added to it if the report cannot be written.

    Yields
    ------
    Call
        See :func:`write_report`.
    """
    try:
        own = participants.only([f"sub-{subject}"])
        for warning in (yield Call(write_report, (config.output_dir, subject, own, not config.no_viewer))):
            LOGGER.warning(warning)
    except CallError as error:
        LOGGER.debug("report failed", exc_info=error)
        failed.append(f"sub-{subject}: report not written: {error_line(str(error))}")
    except UserError as error:
        failed.append(f"sub-{subject}: report not written: {error}")


def rewrite_reports(config: RunConfig) -> list[str]:
    """Write the reports of all selected participants from the derivatives (`--reports-only`).

    Parameters
    ----------
    config : RunConfig
        `bids_dir`, `output_dir`, `participants`, `no_viewer` and `nprocs` are used.

    Returns
    -------
    list of str
        One line for each report that could not be written; logged, too.

    Raises
    ------
    StorageError
        If the output folder, or that for temporary files, cannot be written.
    """
    subjects = requested_subjects(config.output_dir, config.participants)
    remove_temporary_files(config.output_dir)
    failed: list[str] = []
    participants = try_read_participants(config.bids_dir, [f"sub-{subject}" for subject in subjects])

    def steps(subject: str) -> Steps:
        remove_temporary_files(config.output_dir, subject)
        yield from report_steps(config, subject, participants, failed)

    plugin, _ = make_plugins(replace(config, plugin_file=None), lambda node, status: None)
    try:
        plugin.process(map(steps, subjects))
    finally:
        plugin.close()
    for line in sorted(failed, key=natural_key):
        LOGGER.error(line)
    LOGGER.info("%d report(s) written to %s", len(subjects) - len(failed), config.output_dir)
    return failed


def write_report(
    output_dir: Path, subject: str, participants: Participants, viewer: bool = False
) -> list[str]:
    """Write the report of one participant; the last of several jobs includes the results of all.

    Parameters
    ----------
    output_dir : pathlib.Path
        Root of the derivatives.
    subject : str
        Label without `sub-`.
    participants : Participants
        Age, sex and health of the participant.
    viewer : bool, default=False
        Whether an interactive viewer is written for each anomaly map.

    Returns
    -------
    list of str
        Warnings about images whose left and right differ.
    """
    from bids_uad.reports.participant import write_subject_report

    with _report_lock(output_dir, subject):
        swapped = find_left_right_swaps(output_dir, subject)
        last_run = read_json(last_run_file(output_dir, subject))
        write_subject_report(
            output_dir,
            subject,
            errors=[image["message"] for image in last_run.get("images", []) if image["message"]],
            run_info=last_run,
            participants=participants,
            remarks=swapped,
            methods=describe_methods(read_records(output_dir, f"sub-{subject}")),
            viewer=viewer,
        )
    return list(swapped.values())


def save_last_run(config: RunConfig, subject: str, statuses: Sequence[ImageStatus], device: str) -> None:
    """Save options and statuses of a run for the participant's report.

    The statuses that earlier runs have saved for other images are kept, since jobs for other sessions,
    modalities or models do not process them. Those of images that no longer exist are dropped.

    Parameters
    ----------
    config : RunConfig
        Options of the run.
    subject : str
        Label without `sub-`.
    statuses : sequence of ImageStatus
        Statuses of the participant's images.
    device : str
        Device of the detectors.
    """
    run = {
        "run_id": config.run_id,
        "version": __version__,
        "device": device,
        "random_seed": config.random_seed,
        "models": list(config.models) or ["default"],
        "deviations": list(config.deviations) or ["default"],
        "modalities": list(config.modalities),
        "nprocs": config.nprocs,
        "omp_nthreads": config.omp_nthreads,
    }
    images = [
        {
            "image": status.image,
            "status": status.status,
            "message": status.message,
            "run_id": config.run_id,
            "sessions": list(config.sessions),
        }
        for status in statuses
    ]
    path = last_run_file(config.output_dir, subject)
    with _report_lock(config.output_dir, subject):
        reported = {status.image for status in statuses}
        earlier = [
            image
            for image in read_json(path).get("images", [])
            if not _is_superseded(image, config, subject, reported)
        ]
        images = sorted([*images, *earlier], key=lambda image: (image["image"], image["message"]))
        write_json(path, {**run, "images": images})


def _is_superseded(image: dict[str, Any], config: RunConfig, subject: str, reported: set[str]) -> bool:
    """Return whether the saved status of an image or participant is replaced by this run, or obsolete."""
    name = image["image"]
    if name == PARTICIPANT:
        before, now = set(image.get("sessions", [])), set(config.sessions)
        return not now or (bool(before) and before <= now)
    if name in reported:
        return True
    session = re.search(r"_(ses-[^_]+)_", name)
    folder = config.bids_dir / f"sub-{subject}" / (session[1] if session else "") / "anat"
    return not any(folder.glob(f"{name.rsplit('_', 1)[0]}_*.nii*"))


def last_run_file(output_dir: Path, subject: str) -> Path:
    """Return the path of the file written by :func:`save_last_run`."""
    return output_dir / f"sub-{subject}" / "log" / "last_run.json"


def _report_lock(output_dir: Path, subject: str) -> AbstractContextManager[None]:
    """Hold the lock of a participant's report."""
    return locked(output_dir / f"sub-{subject}" / "log" / "report.lock")


def find_left_right_swaps(output_dir: Path, subject: str) -> dict[tuple[str, str], str]:
    """Compare the orientation of a participant's images that were registered to the atlas.

    Images of all runs and sessions are compared with the first, preferably one without quality failures.
    Images that were registered to another image are compared with it during registration.

    Parameters
    ----------
    output_dir : pathlib.Path
        Root of the derivatives.
    subject : str
        Label without `sub-`.

    Returns
    -------
    dict of (str, str) to str
        A warning for each image that agrees with the first only if mirrored, by its prefix and modality.
    """
    images = [image for image in find_images(output_dir, subject) if _is_anchor(image)]
    if len(images) < 2:
        return {}
    images.sort(key=_has_failures)  # stable
    first, *others = images
    reference = _read_volume(first)
    swapped = {}
    for image in others:
        ratio = mirror_ratio(reference, _read_volume(image))
        if ratio > FAILED_MIRRORED:
            one, other = (f"{each.prefix}_{each.modality}" for each in (first, image))
            swapped[image.prefix, image.modality] = (
                f"Left and right are swapped between {one} and {other}: the images agree {ratio:.1f} times "
                "as well if one of them is mirrored. Check the orientation of both."
            )
    return swapped


def _is_anchor(image: Image) -> bool:
    """Return whether an image was registered to the atlas, and its preprocessed image and mask exist."""
    return image.preproc is not None and image.brain is not None and "_desc-brain_" in image.brain.name


def _has_failures(image: Image) -> bool:
    return bool(read_sidecar(image.preproc).get("PreprocessingQuality", {}).get("failures"))


def _read_volume(image: Image) -> Volume:
    scan = nib.load(image.preproc)
    brain = np.asarray(nib.load(image.brain).dataobj) > 0
    return Volume(np.asarray(scan.dataobj, dtype=np.float32), scan.affine, brain)
