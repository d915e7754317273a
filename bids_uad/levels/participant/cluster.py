"""nipype's SLURM plugins, so that a failed job is told with its reason and charged to its node."""

from __future__ import annotations

import getpass
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

from nipype.pipeline.plugins.slurm import SLURMPlugin
from nipype.pipeline.plugins.slurmgraph import SLURMGraphPlugin

from bids_uad.levels.participant.plugin import FailureLog, NodeFailure, raise_if_unwritable

POLL_SECONDS = 2.0
_WORDS = {
    "OUT_OF_MEMORY": "was killed because memory ran out; give the jobs more memory (--mem in sbatch_args)",
    "TIMEOUT": "ran into its time limit; give the jobs more time (--time in sbatch_args)",
    "CANCELLED": "was cancelled",
    "NODE_FAIL": "died with its compute node; the same command goes on where it stopped",
    "PREEMPTED": "was preempted; the same command goes on where it stopped",
}
_UNFINISHED = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "STAGE_OUT"}


class SlurmPlugin(FailureLog, SLURMPlugin):
    """One SLURM job for each node, submitted when what it needs is there.

    Parameters
    ----------
    plugin_args : dict
        As for nipype's SLURM plugin (`sbatch_args`, `template`, `max_jobs`, `status_callback`).
    """

    def __init__(self, plugin_args: dict[str, Any]) -> None:
        _name_user()
        super().__init__(plugin_args)

    def close(self) -> None:
        """Cancel the jobs that are still under way."""
        _cancel([str(job) for job in self._pending])
        self._pending = {}

    def _get_result(self, taskid):
        if self._is_pending(taskid):
            return None
        state = _state_of(taskid)
        if state in _WORDS:
            return {"result": None, "traceback": [describe_end(taskid, state)]}
        return super()._get_result(taskid)


class SlurmGraphPlugin(SLURMGraphPlugin):
    """All jobs submitted at once, each waiting for those that it needs; returns when all have ended.

    Parameters
    ----------
    plugin_args : dict
        As for nipype's SLURMGraph plugin (`sbatch_args`, `template`, `dont_resubmit_completed_jobs`).
    mark : str
        Tells this run's jobs from others: one word.

    Attributes
    ----------
    failures : list of NodeFailure
    folders : tuple of pathlib.Path
        As those of :class:`~bids_uad.levels.participant.plugin.FailureLog`.
    """

    folders: tuple[Path, ...] = ()

    def __init__(self, plugin_args: dict[str, Any], mark: str) -> None:
        _name_user()
        self.failures: list[NodeFailure] = []
        self._mark, self._nodes = mark, []
        own = f"{plugin_args.get('sbatch_args', '')} --comment={mark} --kill-on-invalid-dep=yes"
        super().__init__(plugin_args={**plugin_args, "sbatch_args": own})

    def run(self, graph, config, updatehash=False):
        """Submit the graph, wait for its jobs, and take note of what failed."""
        started = time.time()
        super().run(graph, config, updatehash=updatehash)
        jobs = self._wait()
        for index, node in enumerate(self._nodes):
            job, state = jobs.get(index, ("", "COMPLETED"))
            if state == "COMPLETED":
                continue
            crash = _crash_file(node, started)
            if crash is not None:
                raise_if_unwritable(crash.read_text(), self.folders)
                self.failures.append(NodeFailure(node.fullname, crash.read_text(), str(crash)))
            elif state != "CANCELLED":  # those that waited for a failed one are cancelled
                log = next(iter(sorted(Path(node.base_dir).glob(f"*/batch/*{node._id}.sh.e"))), "none")
                self.failures.append(NodeFailure(node.fullname, describe_end(job, state), str(log)))

    def close(self) -> None:
        """Cancel the jobs that are still under way."""
        _cancel([job for job, state in self._jobs().values() if state in _UNFINISHED])

    def _submit_graph(self, pyfiles, dependencies, nodes):
        self._nodes = nodes
        super()._submit_graph(pyfiles, dependencies, nodes)

    def _wait(self) -> dict[int, tuple[str, str]]:
        """Give number and last state of each node's job when all have ended."""
        last: dict[int, tuple[str, str]] = {}
        while True:
            seen = self._jobs()
            last |= seen
            if not any(state in _UNFINISHED for _, state in seen.values()):
                break
            time.sleep(POLL_SECONDS)
        # SLURM forgets jobs minutes after their end; the last word may then be missing.
        return {
            index: (job, _state_of(job) if state in _UNFINISHED else state)
            for index, (job, state) in last.items()
        }

    def _jobs(self) -> dict[int, tuple[str, str]]:
        """Ask SLURM for this run's jobs: number and state by the node's place in the graph."""
        lines = _ask("squeue", "--noheader", "--me", "--states=all", "--format=%i|%j|%T|%k").splitlines()
        jobs = {}
        for line in lines:
            job, name, state, mark = line.strip().split("|")
            if mark == self._mark:
                jobs[int(re.match(r"j(\d+)_", name)[1])] = (job, state)
        return jobs


def describe_end(job: int | str, state: str) -> str:
    """Say in one line why a job ended without a result."""
    return f"ProcessKilled: SLURM job {job} {_WORDS.get(state, f'ended as {state}')}"


def _state_of(job: int | str) -> str:
    """Ask SLURM how a job ended; empty if it has forgotten it."""
    told = _ask("scontrol", "--oneliner", "show", "job", str(job), check=False)
    found = re.search(r"\bJobState=(\w+)", told)
    return found[1] if found else ""


def _cancel(jobs: list[str]) -> None:
    if jobs:
        _ask("scancel", *jobs, check=False)


def _ask(*command: str, check: bool = True) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=check).stdout


def _crash_file(node: Any, since: float) -> Path | None:
    """Find what nipype wrote about a node's crash during this run."""
    folder = Path(node.config["execution"]["crashdump_dir"])
    for path in sorted(folder.glob(f"crash-*-{node._id}-*.txt")):
        if path.stat().st_mtime >= since and path.read_text().startswith(f"Node: {node.fullname}\n"):
            return path
    return None


def _name_user() -> None:
    """Give the environment the user's name, which nipype names jobs after and some schedulers leave out."""
    if "LOGNAME" not in os.environ:
        try:
            os.environ["LOGNAME"] = getpass.getuser()
        except KeyError:
            os.environ["LOGNAME"] = str(os.getuid())
