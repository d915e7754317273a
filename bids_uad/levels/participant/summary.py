"""What became of every image, and how it is told."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bids_uad import __version__
from bids_uad.config import RunConfig
from bids_uad.dataset.naming import Problem, detection_outputs, preprocessing_outputs
from bids_uad.dataset.participants import Participants, try_read_participants
from bids_uad.files import locked, read_json, write_json
from bids_uad.levels.participant.completion_records import read_record, record_path, records_of
from bids_uad.levels.participant.executors import START_METHOD, NodeFailure, raise_if_unwritable
from bids_uad.levels.participant.interfaces import sidecar_of
from bids_uad.levels.participant.plan import Task
from bids_uad.levels.participant.workflow import node_key, node_key_of
from bids_uad.preprocessing.quality import FAILED_MIRRORED
from bids_uad.preprocessing.registration import Volume, mirror_ratio
from bids_uad.reports.derivatives import Image, find_images, read_sidecar
from bids_uad.reports.group_text import detector_name
from bids_uad.resources import oom_kills, why_killed, worker_pool

PARTICIPANT = "-"
"""Stands for an image in the outcome of a participant as a whole."""
DONE, UP_TO_DATE, FAILED, NOT_RUN, UNUSABLE = "done", "up to date", "failed", "not run", "unusable"

_ERROR_LINE = re.compile(r"^\s*(?:[A-Za-z_][\w.]*\.)?([A-Za-z_]\w*(?:Error|Exception|Killed|Exit)): (.+)$")
_STYLES = {DONE: "green", UP_TO_DATE: "cyan", FAILED: "red", NOT_RUN: "yellow", UNUSABLE: "red"}


@dataclass(frozen=True)
class Outcome:
    """What became of one image.

    Parameters
    ----------
    subject, image : str
        Label, and name of the image (or what is known of it).
    status : str
        `done`, `up to date`, `failed`, `not run` or `unusable`.
    seconds : float
        Time spent in its steps, summed; 0 if nothing was done.
    message : str
        Why, in one line; empty if all is well.
    """

    subject: str
    image: str
    status: str
    seconds: float = 0.0
    message: str = ""

    @property
    def good(self) -> bool:
        """Whether all outputs of the image are there."""
        return self.status in (DONE, UP_TO_DATE)


@dataclass
class Stopwatch:
    """A nipype status callback that sums up the time of each image's steps."""

    seconds: dict[tuple[str, str], float] = field(default_factory=dict)
    _started: dict[str, float] = field(default_factory=dict)

    def __call__(self, node: Any, status: str) -> None:
        """Take note of `start`, `end` and `exception`."""
        name = node.fullname
        if status == "start":
            self._started[name] = time.monotonic()
        elif name in self._started:
            spent = time.monotonic() - self._started.pop(name)
            place = node_key_of(name)
            self.seconds[place] = self.seconds.get(place, 0.0) + spent


def collect_outcomes(
    tasks: Sequence[Task],
    problems: Sequence[Problem],
    failures: Sequence[NodeFailure],
    stopwatch: Stopwatch,
    *,
    output_dir: Path,
    run_id: str,
) -> list[Outcome]:
    """Find out what became of every image after a run.

    Parameters
    ----------
    tasks : sequence of Task
    problems : sequence of Problem
        What could not be used from the start.
    failures : sequence of NodeFailure
    stopwatch : Stopwatch
    output_dir : pathlib.Path
    run_id : str

    Returns
    -------
    list of Outcome
        Sorted by participant.
    """
    first = {}
    for failure in failures:
        first.setdefault(node_key_of(failure.node), failure)
    outcomes = [
        Outcome(problem.subject, problem.key or PARTICIPANT, UNUSABLE, message=problem.message)
        for problem in problems
    ]
    for task in tasks:
        unit = task.unit
        place = node_key(unit.subject, unit.key)
        if task.anchor_only and place not in first:
            continue
        spent = stopwatch.seconds.get(place, 0.0)
        record = read_record(record_path(output_dir, unit))
        if task.done and not task.anchor_only:
            outcome = Outcome(unit.subject, unit.key, UP_TO_DATE, spent)
        elif record is not None and record.run_id == run_id:
            outcome = Outcome(unit.subject, unit.key, DONE, spent)
        elif place in first:
            failure = first[place]
            step = failure.node.rsplit(".", 1)[-1]
            told = f"{unit.key}: {step}: {error_line(failure.traceback)} (details: {failure.crash_file})"
            outcome = Outcome(unit.subject, unit.key, FAILED, spent, told)
        else:
            told = f"{unit.key}: not run, because another image that it needs, or the run, failed before"
            outcome = Outcome(unit.subject, unit.key, NOT_RUN, spent, told)
        outcomes.append(outcome)
    return sorted(outcomes, key=lambda outcome: (outcome.subject, outcome.image))


def error_line(traceback: str) -> str:
    """Find the line of a traceback that says what happened.

    Parameters
    ----------
    traceback : str
        nipype's, which may wrap another.

    Returns
    -------
    str
        The message alone for an error with a message of its own, else its last line.
    """
    lines = [line.strip() for line in traceback.splitlines() if line.strip()]
    for line in reversed(lines):
        match = _ERROR_LINE.match(line)
        if match:
            kind, message = match.groups()
            return message if kind in ("InputError", "ModelError", "ProcessKilled") else f"{kind}: {message}"
    return lines[-1] if lines else "no message"


def print_summary(
    outcomes: Sequence[Outcome], tasks: Sequence[Task], output_dir: Path, console: Console
) -> None:
    """Print one line for each image: status, time, volumes and, with ground truth, Dice.

    Parameters
    ----------
    outcomes : sequence of Outcome
    tasks : sequence of Task
    output_dir : pathlib.Path
    console : rich.console.Console
    """
    table = Table("image", "status", "seconds", "brain mL", "anomaly mL (Dice)", title="bids_uad participant")
    for column in table.columns[2:4]:
        column.justify = "right"
    by_key = {task.unit.key: task for task in tasks}
    for outcome in outcomes:
        brain, found = "", ""
        if outcome.good:
            task = by_key[outcome.image]
            rows = [_measure(output_dir, task, name) for name in _detectors(output_dir, task.unit)]
            brain = rows[0][0] if rows else ""
            found = ", ".join(text for _, text in rows)
        seconds = f"{outcome.seconds:.0f}" if outcome.seconds else "-"
        image = outcome.image if outcome.image != PARTICIPANT else f"sub-{outcome.subject}"
        table.add_row(image, Text(outcome.status, _STYLES[outcome.status]), seconds, brain, found)
    console.print(table)


def doubts(outcomes: Sequence[Outcome], tasks: Sequence[Task], output_dir: Path) -> list[str]:
    """Repeat what preprocessing wants a person to look at, for the images of this run."""
    units = {task.unit.key: task.unit for task in tasks}
    lines = []
    for outcome in outcomes:
        if outcome.status == DONE:
            image = output_dir / preprocessing_outputs(units[outcome.image])["preproc"]
            quality = read_json(sidecar_of(image)).get("PreprocessingQuality", {})
            lines += [f"{outcome.image}: {warning}" for warning in quality.get("warnings", [])]
    return lines


def _detectors(output_dir: Path, unit: Any) -> list[str]:
    """List the detectors whose metrics an image has."""
    pattern = detection_outputs(unit, "X")["metrics"].name.replace(f"{unit.modality}X_", f"{unit.modality}*_")
    start = f"_desc-{unit.modality}"
    paths = sorted((output_dir / unit.folder).glob(pattern))
    return [path.name.split(start, 1)[1].removesuffix("_metrics.tsv") for path in paths]


def _measure(output_dir: Path, task: Task, detector: str) -> tuple[str, str]:
    """Return brain volume, and detector with anomaly volume and Dice, as text; controls have no Dice."""
    files = detection_outputs(task.unit, detector)
    row = pd.read_csv(output_dir / files["metrics"], sep="\t", na_values="n/a").iloc[0]
    text = f"{detector_name(detector.lower())} {row['anomaly_volume_mm3'] / 1000:.1f}"
    if row["lesion_volume_mm3"] == 0 and not task.is_control:
        text += " (empty mask)"
    elif pd.notna(row["lesion_volume_mm3"]) and not task.is_control:
        text += f" ({dice_of(output_dir / files['histogram'], row):.3f})"
    return f"{row['brain_volume_mm3'] / 1000:.0f}", text


def dice_of(histogram: Path, row: pd.Series) -> float:
    """Compute Dice at the fixed threshold from the score counts.

    Parameters
    ----------
    histogram : pathlib.Path
    row : pandas.Series
        The metrics row; its threshold is one of the bin edges.

    Returns
    -------
    float
        1 if both masks are empty.
    """
    table = pd.read_csv(histogram, sep="\t", na_values="n/a")
    hit = float(table.loc[table["score_lower"] >= row["threshold"], "n_lesion"].sum())
    total = float(row["anomaly_volume_mm3"] + row["lesion_volume_mm3"])
    return 1.0 if total == 0 else 2 * hit / total


LOGGER = logging.getLogger("bids_uad")


@dataclass
class Progress:
    """A nipype status callback that logs each image as it ends, well or not.

    Parameters
    ----------
    total : int
        Images to process.
    """

    total: int
    _ended: set[tuple[str, str]] = field(default_factory=set)

    def __call__(self, node: Any, status: str) -> None:
        """Take note of an image's last node, and of the first that fails."""
        place = node_key_of(node.fullname)
        # The record is written last, when all else is.
        good = status == "end" and node.name == "complete"
        if place in self._ended or not (good or status == "exception"):
            return
        self._ended.add(place)
        LOGGER.info(
            "%s %s, %d of %d images", place[1], "done" if good else "failed", len(self._ended), self.total
        )


def write_reports(config: RunConfig, subjects: Sequence[str]) -> list[str]:
    """Write the reports of some participants from what :func:`remember` left and the derivatives.

    Parameters
    ----------
    config : RunConfig
    subjects : sequence of str

    Returns
    -------
    list of str
        One line for each report that could not be written.

    Raises
    ------
    StorageError
        If the output folder, or that for temporary files, cannot be written.
    """
    if not subjects:
        return []
    failed = []
    kills = oom_kills()
    workers = min(config.nprocs, len(subjects))
    with worker_pool(workers, START_METHOD) as pool:
        people = try_read_participants(config.bids_dir, [f"sub-{subject}" for subject in subjects])
        jobs = {
            subject: pool.submit(_write, config.output_dir, subject, people.only([f"sub-{subject}"]))
            for subject in subjects
        }
        for subject, job in jobs.items():
            reason = _outcome(job, kills)
            for warning in () if reason else job.result():
                LOGGER.warning(warning)
            if reason:
                raise_if_unwritable(reason, (config.output_dir,))
                failed.append(f"sub-{subject}: its derivatives are complete, but not its report: {reason}")
    return failed


def remember(config: RunConfig, subject: str, outcomes: Sequence[Outcome], device: str) -> None:
    """Keep what became of a participant's images, for the report of this run and for later ones.

    What earlier runs said of other images stays, since jobs for other sessions, modalities or models know
    nothing of each other; of an image that is gone from the dataset it does not.

    Parameters
    ----------
    config : RunConfig
    subject : str
    outcomes : sequence of Outcome
        The participant's.
    device : str
        Where detectors ran.
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
            "image": outcome.image,
            "status": outcome.status,
            "message": outcome.message,
            "run_id": config.run_id,
            "sessions": list(config.sessions),
        }
        for outcome in outcomes
    ]
    path = last_run_file(config.output_dir, subject)
    with _one_at_a_time(config.output_dir, subject):
        earlier = [
            image
            for image in read_json(path).get("images", [])
            if not _is_superseded(image, config, subject, {outcome.image for outcome in outcomes})
        ]
        images = sorted([*images, *earlier], key=lambda image: (image["image"], image["message"]))
        write_json(path, {**run, "images": images})


def _is_superseded(image: dict[str, Any], config: RunConfig, subject: str, reported: set[str]) -> bool:
    """Check whether what an earlier run said of an image, or of a participant as a whole, holds no longer."""
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
    """Return the path of the description of a participant's last run."""
    return output_dir / f"sub-{subject}" / "log" / "last_run.json"


def _one_at_a_time(output_dir: Path, subject: str) -> AbstractContextManager[None]:
    """Let one job at a time work on a participant's report."""
    return locked(output_dir / f"sub-{subject}" / "log" / "report.lock")


def _write(output_dir: Path, subject: str, participants: Participants) -> list[str]:
    """Write one report (in a worker); return warnings about the images taken together."""
    pass
    from bids_uad.levels.participant.completion_records import methods_of
    from bids_uad.reports.participant import write_subject_report

    # Whichever of several jobs comes last sees what all of them have left.
    with _one_at_a_time(output_dir, subject):
        swapped = find_swapped(output_dir, subject)
        told = read_json(last_run_file(output_dir, subject))
        errors = [image["message"] for image in told.get("images", []) if image["message"]]
        write_subject_report(
            output_dir,
            subject,
            errors=errors,
            run_info=told,
            participants=participants,
            remarks=swapped,
            methods=methods_of(records_of(output_dir, f"sub-{subject}")),
        )
    return list(swapped.values())


def _outcome(job: Future, kills: int) -> str:
    """Wait for a report; give the reason if it failed."""
    try:
        job.result()
    except BrokenProcessPool:
        return f"its process was killed {why_killed(kills)}"
    except Exception as error:  # whatever a report runs into must not cost the other reports
        LOGGER.debug("report failed", exc_info=error)
        return f"{type(error).__name__}: {error}"
    return ""


def find_swapped(output_dir: Path, subject: str) -> dict[tuple[str, str], str]:
    """Compare the images of a participant that were registered to the atlas, of all runs and sessions.

    Each is compared with the first (of those that passed quality control, if any did). An image that was
    registered to another of its session is compared with it during registration.

    Parameters
    ----------
    output_dir : pathlib.Path
        Root of the derivative dataset.
    subject : str
        Label without ``sub-``.

    Returns
    -------
    dict of (str, str) to str
        A sentence for each image that disagrees with the first, by its prefix and modality.
    """
    images = [image for image in find_images(output_dir, subject) if _is_anchor(image)]
    if len(images) < 2:
        return {}
    images.sort(key=_failed)  # which keeps the order otherwise
    first, *others = images
    reference = _read(first)
    swapped = {}
    for image in others:
        ratio = mirror_ratio(reference, _read(image))
        if ratio > FAILED_MIRRORED:
            one, other = (f"{each.prefix}_{each.modality}" for each in (first, image))
            swapped[image.prefix, image.modality] = (
                f"Left and right are swapped between {one} and {other}: the images agree {ratio:.1f} times "
                "as well if one of them is mirrored. Check the orientation of both."
            )
    return swapped


def _is_anchor(image: Image) -> bool:
    """Say whether an image was registered to the atlas itself, and all that is needed of it is there."""
    return image.preproc is not None and image.brain is not None and "_desc-brain_" in image.brain.name


def _failed(image: Image) -> bool:
    return bool(read_sidecar(image.preproc).get("PreprocessingQuality", {}).get("failures"))


def _read(image: Image) -> Volume:
    scan = nib.load(image.preproc)
    brain = np.asarray(nib.load(image.brain).dataobj) > 0
    return Volume(np.asarray(scan.dataobj, dtype=np.float32), scan.affine, brain)
