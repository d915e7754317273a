"""Participant reports, each written in a process of its own."""

from __future__ import annotations

import logging
import multiprocessing as mp
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from bids_uad import __version__
from bids_uad.atomic import write_json
from bids_uad.cgroups import oom_kills, why_killed
from bids_uad.config import RunConfig
from bids_uad.dataset.describe import read_json
from bids_uad.dataset.participants import healthy_flag, read_participants
from bids_uad.levels.participant.outcome import Outcome
from bids_uad.levels.participant.plugin import START_METHOD

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
    """
    if not subjects:
        return []
    failed = []
    kills = oom_kills()
    workers = min(config.nprocs, len(subjects))
    with ProcessPoolExecutor(workers, mp_context=mp.get_context(START_METHOD)) as pool:
        people = read_participants(config.bids_dir)
        controls = {subject for subject in subjects if healthy_flag(people.row(f"sub-{subject}"))}
        jobs = {
            subject: pool.submit(_write, config.output_dir, subject, subject in controls)
            for subject in subjects
        }
        for subject, job in jobs.items():
            reason = _outcome(job, kills)
            if reason:
                failed.append(f"sub-{subject}: its derivatives are complete, but not its report: {reason}")
    return failed


def remember(config: RunConfig, subject: str, outcomes: Sequence[Outcome], device: str) -> None:
    """Keep what became of a participant's images, for the report of this run and for later ones.

    Parameters
    ----------
    config : RunConfig
    subject : str
    outcomes : sequence of Outcome
        The participant's.
    device : str
        Where detectors ran.
    """
    told = {
        "run_id": config.run_id,
        "version": __version__,
        "device": device,
        "random_seed": config.random_seed,
        "models": list(config.models) or ["default"],
        "deviations": list(config.deviations) or ["default"],
        "modalities": list(config.modalities),
        "nprocs": config.nprocs,
        "omp_nthreads": config.omp_nthreads,
        "images": [
            {"image": outcome.image, "status": outcome.status, "message": outcome.message}
            for outcome in outcomes
        ],
    }
    write_json(last_run_file(config.output_dir, subject), told)


def last_run_file(output_dir: Path, subject: str) -> Path:
    """Say where the last run that changed a participant is described."""
    return output_dir / f"sub-{subject}" / "log" / "last_run.json"


def _write(output_dir: Path, subject: str, is_control: bool) -> None:
    """Write one report (in a worker)."""
    from bids_uad.reports.participant import write_subject_report

    told = read_json(last_run_file(output_dir, subject))
    errors = [image["message"] for image in told.get("images", []) if image["message"]]
    write_subject_report(output_dir, subject, errors=errors, run_info=told, is_control=is_control)


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
