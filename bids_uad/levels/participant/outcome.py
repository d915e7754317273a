"""What became of every image, and how it is told."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bids_uad.dataset.describe import read_json
from bids_uad.dataset.naming import detection_outputs, preprocessing_outputs
from bids_uad.dataset.outputs import sidecar_of
from bids_uad.dataset.units import Problem
from bids_uad.levels.participant.plan import Task
from bids_uad.levels.participant.plugin import NodeFailure
from bids_uad.levels.participant.records import read_record, record_path
from bids_uad.levels.participant.workflow import place_of_node, place_of_unit
from bids_uad.reports.group_text import detector_name

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
            place = place_of_node(name)
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
        first.setdefault(place_of_node(failure.node), failure)
    outcomes = [
        Outcome(problem.subject, problem.key or PARTICIPANT, UNUSABLE, message=problem.message)
        for problem in problems
    ]
    for task in tasks:
        unit = task.unit
        place = place_of_unit(unit.subject, unit.key)
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
