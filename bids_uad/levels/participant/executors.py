"""A nipype plugin whose workers can die without taking the run with them.

nipype's MultiProc runs on one process pool. If the kernel kills a worker, usually for memory, the pool breaks
as a whole, the exception is lost in a callback, and the run waits for ever. Here each worker is a process of
its own behind a pipe: a death is noticed, told with its signal, and charged to the node that ran there.
"""

from __future__ import annotations

import gc
import getpass
import logging
import multiprocessing as mp
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from shlex import quote
from traceback import format_exception
from typing import Any, Protocol

import numpy as np
import yaml
from nipype.pipeline.engine import nodes, utils
from nipype.pipeline.plugins.multiproc import MultiProcPlugin, run_node
from nipype.pipeline.plugins.slurm import SLURMPlugin
from nipype.pipeline.plugins.slurmgraph import SLURMGraphPlugin

from bids_uad.config import RunConfig
from bids_uad.errors import ConfigError, storage_error
from bids_uad.resources import end_with_parent, oom_kills, why_killed

START_METHOD = "forkserver"
PRELOADED = ("bids_uad.levels.participant.workflow", "pandas")


@dataclass(frozen=True)
class NodeFailure:
    """A node that failed.

    Parameters
    ----------
    node : str
        Full name, dots between workflows.
    traceback : str
    crash_file : str
        Where nipype wrote the details.
    """

    node: str
    traceback: str
    crash_file: str


class FailureLog:
    """A nipype plugin that remembers what failed, in order, and stops where a disk cannot be written.

    Attributes
    ----------
    failures : list of NodeFailure
    folders : tuple of pathlib.Path
        Where outputs and intermediate files go. If one of them cannot be written, all other nodes would fail,
        too: the run ends with a :class:`~bids_uad.errors.StorageError`.
    """

    folders: tuple[Path, ...] = ()

    def __init__(self, plugin_args: dict[str, Any]) -> None:
        self.failures: list[NodeFailure] = []
        super().__init__(plugin_args=plugin_args)

    def _report_crash(self, node, result=None):
        lines = "".join((result or {}).get("traceback") or "")
        raise_if_unwritable(lines, self.folders)
        crash_file = super()._report_crash(node, result=result)
        self.failures.append(NodeFailure(node.fullname, lines, str(crash_file)))
        return crash_file


def raise_if_unwritable(traceback: str, folders: Sequence[Path]) -> None:
    """Raise an error of its own kind if a node has failed because a folder cannot be written.

    Parameters
    ----------
    traceback : str
        Of the node.
    folders : sequence of pathlib.Path

    Raises
    ------
    StorageError
    """
    messages = [line for line in traceback.splitlines() if not line.lstrip().startswith("File ")]
    if folders and (found := storage_error("\n".join(messages), folders, guess=True)) is not None:
        raise found


class IsolatedPlugin(FailureLog, MultiProcPlugin):
    """MultiProc with one pipe per worker process.

    Parameters
    ----------
    plugin_args : dict
        As for MultiProc (`n_procs`, `memory_gb`, `n_gpu_procs`, `raise_insufficient`, `status_callback`).
    """

    def __init__(self, plugin_args: dict[str, Any]) -> None:
        super().__init__(plugin_args)
        self._context = mp.get_context(START_METHOD)
        # Imported once, in the process that workers are forked from; nothing here starts threads or CUDA.
        self._context.set_forkserver_preload(list(PRELOADED))
        self._idle: list[_Worker] = []
        self._busy: dict[int, _Worker] = {}

    def run(self, graph, config, updatehash=False):
        """Run the nodes; see nipype.

        nipype collects garbage whenever it looks at its workers, ten times a second. That takes half a second
        if it goes through all that is imported, and next to nothing if that is set apart.
        """
        gc.collect()
        gc.freeze()
        try:
            super().run(graph, config, updatehash=updatehash)
        finally:
            gc.unfreeze()

    def _prerun_check(self, graph):
        super()._prerun_check(graph)
        self._participants = np.array([])

    def _sort_jobs(self, jobids, scheduler=None):
        """Order nodes by participant, and hold back those of participants whose turn has not come.

        nipype works breadth first: the first node of each participant, then the second, and so on. Here at
        most one participant more than there are processors is unfinished at a time, so that neither the time
        to the first result nor the size of the work folder grows with the number of participants.
        """
        if len(self._participants) != len(self.procs):
            names = [node.fullname.split(".")[1] for node in self.procs]
            first = {name: number for number, name in enumerate(dict.fromkeys(names))}
            self._participants = np.array([first[name] for name in names])
        unfinished = np.unique(self._participants[~self.proc_done | self.proc_pending])
        under_way = unfinished[: self.processors + 1]
        of_jobs = self._participants[jobids]
        turn = np.isin(of_jobs, under_way)
        return jobids[turn][np.argsort(of_jobs[turn], kind="stable")]

    def close(self) -> None:
        """Stop all workers; what they were doing is lost."""
        for worker in [*self._idle, *self._busy.values()]:
            worker.kill()
        self._idle, self._busy = [], {}
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _submit_job(self, node, updatehash=False):
        self._taskid += 1
        worker = self._idle.pop() if self._idle else _Worker(self._context)
        self._busy[self._taskid] = worker
        worker.start(node, updatehash, self._taskid)
        return self._taskid

    def _get_result(self, taskid):
        worker = self._busy[taskid]
        result = worker.poll()
        if result is None:
            return None
        del self._busy[taskid]
        if worker.alive:
            self._idle.append(worker)
        return {**result, "taskid": taskid}

    def _clear_task(self, taskid):
        """Nothing to clear: the worker was released with its result."""

    def _postrun_check(self):
        self.close()


class _Worker:
    """One process that runs nodes, and our end of its pipe."""

    def __init__(self, context: mp.context.BaseContext) -> None:
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, str(Path.cwd())), daemon=True)
        self._process.start()
        self._oom_kills = oom_kills()
        theirs.close()

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def start(self, node: Any, updatehash: bool, taskid: int) -> None:
        """Hand over a node; a worker that died while idle shows at the next poll."""
        try:
            self._pipe.send((node, updatehash, taskid))
        except (BrokenPipeError, ConnectionResetError):
            self._process.join()

    def poll(self) -> dict[str, Any] | None:
        """Give nipype's result dictionary, or None while the node runs."""
        try:
            if self._pipe.poll():
                return self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
        if self._process.is_alive():
            return None
        return {"result": None, "traceback": [describe_death(self._process.exitcode, self._oom_kills)]}

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()


def describe_death(exitcode: int | None, oom_kills_before: int) -> str:
    """Say why a worker process is gone.

    Parameters
    ----------
    exitcode : int or None
        Negative for a signal, as :mod:`multiprocessing` has it.
    oom_kills_before : int
        Processes that the kernel had killed for memory when it started.

    Returns
    -------
    str
        One line.
    """
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        if name == "SIGKILL":
            return f"ProcessKilled: the step was killed {why_killed(oom_kills_before)}"
        return f"ProcessKilled: the step died of {name}"
    return f"ProcessKilled: the step's process ended by itself with exit code {exitcode}"


def _serve(pipe: Connection, folder: str) -> None:
    """Run nodes until the other end closes."""
    os.chdir(folder)
    os.environ["NIPYPE_NO_ET"] = "1"
    end_with_parent()
    prepare_nipype()
    while True:
        try:
            node, updatehash, taskid = pipe.recv()
        except EOFError:
            return
        except (
            Exception
        ) as error:  # unpickling runs foreign code, too, and what it raises would be printed here
            failure = f"{type(error).__name__}: the step cannot be received by its process: {error}"
            pipe.send({"result": None, "traceback": [failure], "taskid": None})
            continue
        try:
            result = run_node(node, updatehash, taskid)
        except Exception as error:  # a full disk: nipype reads the result that it could not write
            result = {"result": None, "traceback": format_exception(error), "taskid": taskid}
        try:
            pipe.send(result)
        except Exception as error:  # pickling runs foreign code: whatever it raises is the node's failure
            failure = f"{type(error).__name__}: the step's result cannot be sent back: {error}"
            pipe.send({"result": None, "traceback": [failure], "taskid": taskid})


def prepare_nipype() -> None:
    """Set up nipype, and nibabel, in this process, which may be a worker.

    They are kept from repeating on the terminal what the crash files and our summary say. And where nipype
    searches a node's folder, it takes the folder's path for a part of the pattern: below a folder such as
    ``data [2024]`` it finds nothing, and removes the files that it has just written.
    """
    for name in (
        "nibabel.global",
        "nipype.workflow",
        "nipype.interface",
        "nipype.utils",
        "nipype.filemanip",
    ):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    for module in (nodes, utils):
        module.glob = _glob_in_folder


def _glob_in_folder(pattern: str) -> list[str]:
    """List the files of a folder whose names match a pattern; the folder itself is no pattern."""
    path = Path(pattern)
    return [str(found) for found in path.parent.glob(path.name)]


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
        As those of :class:`~bids_uad.levels.participant.executors.FailureLog`.
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


PLUGINS = ("MultiProc", "SLURM", "SLURMGraph")


class Plugin(Protocol):
    """What a run needs of a nipype plugin beside nipype's own interface."""

    failures: list[NodeFailure]
    folders: tuple[Path, ...]

    def close(self) -> None:
        """Stop what is still under way."""


def make_plugin(config: RunConfig, callback: Callable[[Any, str], None]) -> Plugin:
    """Make the plugin that a run asks for.

    Parameters
    ----------
    config : RunConfig
        `plugin_file` names the plugin and its arguments; without it, workers of this process.
    callback : callable
        Is told of each node's start and end, where the plugin knows.

    Returns
    -------
    Plugin

    Raises
    ------
    ConfigError
        If the file is not understood, or the path of the working folder is one that job scripts cannot hold.
    """
    name, arguments = "MultiProc", {}
    if config.plugin_file is not None:
        name, arguments = read_plugin_file(config.plugin_file)
        if name != "MultiProc":
            check_job_folder(config.work_dir)
    if name == "SLURMGraph":
        plugin = SlurmGraphPlugin(arguments, mark=config.run_id)
    elif name == "SLURM":
        plugin = SlurmPlugin({"status_callback": callback, **arguments})
    else:
        own = {
            "n_procs": config.nprocs,
            "memory_gb": config.mem_gb,
            "n_gpu_procs": config.n_gpu_procs,
            "raise_insufficient": False,
        }
        plugin = IsolatedPlugin({**own, "status_callback": callback, **arguments})
    plugin.folders = (config.output_dir, config.work_dir)
    return plugin


def check_job_folder(folder: Path) -> None:
    """Refuse a working folder whose path nipype's job scripts, which do not quote it, cannot hold.

    Raises
    ------
    ConfigError
    """
    plain = "".join(character for character in str(folder) if character.isascii())
    if plain != quote(plain) or "%" in plain:  # SLURM replaces %j and the like in the names of log files
        raise ConfigError(
            f"the work folder {folder} has a space, quote, bracket or other special character in its path, "
            "which jobs of a cluster cannot use; choose another with -w"
        )


def read_plugin_file(path: Path) -> tuple[str, dict[str, Any]]:
    """Read a plugin and its arguments from YAML, as fMRIPrep does.

    Parameters
    ----------
    path : pathlib.Path
        A mapping with `plugin`, one of `PLUGINS`, and perhaps `plugin_args`.

    Returns
    -------
    name : str
    arguments : dict

    Raises
    ------
    ConfigError
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--use-plugin {path} cannot be read: {error}") from error
    remedy = "write 'plugin: SLURM' and, below it, 'plugin_args:' with what the plugin takes"
    if not isinstance(content, dict) or not {"plugin"} <= set(content) <= {"plugin", "plugin_args"}:
        raise ConfigError(f"--use-plugin {path}: {remedy}")
    if content["plugin"] not in PLUGINS:
        raise ConfigError(f"--use-plugin {path}: plugin {content['plugin']} is none of {', '.join(PLUGINS)}")
    arguments = content.get("plugin_args") or {}
    if not isinstance(arguments, dict):
        raise ConfigError(f"--use-plugin {path}: plugin_args must be a mapping; {remedy}")
    return content["plugin"], arguments
