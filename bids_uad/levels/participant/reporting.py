"""Participant reports, each written in a process of its own."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from bids_uad import __version__
from bids_uad.atomic import locked, write_json
from bids_uad.cgroups import oom_kills, why_killed
from bids_uad.config import RunConfig
from bids_uad.dataset.describe import read_json
from bids_uad.dataset.participants import Participants, read_if_usable
from bids_uad.levels.participant.outcome import PARTICIPANT, Outcome
from bids_uad.levels.participant.plugin import START_METHOD, raise_if_unwritable
from bids_uad.levels.participant.records import records_of
from bids_uad.workers import worker_pool

LOGGER = logging.getLogger("bids_uad")


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
        people = read_if_usable(config.bids_dir, [f"sub-{subject}" for subject in subjects])
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
    from bids_uad.levels.participant.handedness import find_swapped
    from bids_uad.levels.participant.methods import methods_of
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
