"""Nipype plugins: local worker processes and SLURM jobs, with failures recorded by node.

nipype's MultiProc uses one process pool. If a worker is killed, usually because memory ran out, the pool
breaks, the exception is lost in a callback, and the run waits forever. :class:`IsolatedPlugin` has one pipe
per worker process: the exit of a worker is detected, and is the failure of the node that ran in it.

nipype runs one graph, which would hold the nodes of all participants: building it takes long, and it runs
breadth first. :class:`IsolatedPlugin` adds the graph of a participant when an earlier one is finished.
"""

from __future__ import annotations

import gc
import getpass
import logging
import math
import multiprocessing as mp
import os
import re
import subprocess
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from logging.handlers import QueueHandler
from multiprocessing.connection import Connection, wait
from pathlib import Path
from queue import SimpleQueue
from shlex import quote
from traceback import format_exception
from typing import Any, ClassVar

import networkx as nx
import numpy as np
import scipy.sparse as ssp
import yaml
from nipype import config as nipype_config
from nipype.pipeline.engine import Workflow, nodes, utils
from nipype.pipeline.plugins.multiproc import MultiProcPlugin, run_node
from nipype.pipeline.plugins.slurm import SLURMPlugin
from nipype.pipeline.plugins.slurmgraph import SLURMGraphPlugin
from nipype.utils.profiler import log_nodes_cb

from bids_uad.config import RunConfig
from bids_uad.errors import ConfigError, UserError, storage_error
from bids_uad.resources import RequestProcess, describe_exit, end_with_parent, oom_kills

LOGGER = logging.getLogger("bids_uad")

START_METHOD = "forkserver"
PRELOADED = ("bids_uad.levels.participant.workflow", "bids_uad.reports.participant", "pandas")
"""Modules imported once, in the process that workers are forked from; they start neither threads nor CUDA."""
PLUGINS = ("MultiProc", "SLURM", "SLURMGraph")
END_SECONDS = 5.0
"""Time in s within which an idle worker ends before it is killed."""
POLL_NODES, POLL_LOCKS, POLL_SECONDS = 0.1, 1.0, 2.0
"""Longest intervals in s between queries of local nodes, locks of other runs, and states of SLURM jobs."""
_JOB_STATES = {
    "OUT_OF_MEMORY": "was killed because memory ran out; give the jobs more memory (--mem in sbatch_args)",
    "TIMEOUT": "reached its time limit; give the jobs more time (--time in sbatch_args)",
    "CANCELLED": "was cancelled",
    "NODE_FAIL": "ended because its compute node failed; run the same command again to continue",
    "PREEMPTED": "was preempted; run the same command again to continue",
}
"""Descriptions of final states of SLURM jobs without a result."""
_UNFINISHED = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "STAGE_OUT"}


@dataclass(frozen=True)
class NodeFailure:
    """A node that failed.

    Parameters
    ----------
    node : str
        Full name, dots between workflows.
    traceback : str
        Traceback of the error, or a line about the exit of its process.
    crash_file : str
        Crash file of nipype, with the details.
    """

    node: str
    traceback: str
    crash_file: str


class FailureLog:
    """Mixin of nipype plugins that records failed nodes, and ends the run if a disk cannot be written.

    Attributes
    ----------
    failures : list of NodeFailure
        Failed nodes in order of time.
    folders : tuple of pathlib.Path
        Output and work folders. If one cannot be written, all other nodes would fail, too, and the run ends
        with a :class:`~bids_uad.errors.StorageError`.
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
    """Raise a storage error if a node has failed because a folder cannot be written.

    Parameters
    ----------
    traceback : str
        Traceback of the node.
    folders : sequence of pathlib.Path
        Output and work folders.

    Raises
    ------
    StorageError
        If the traceback describes one, see :func:`bids_uad.errors.storage_error`.
    """
    messages = [line for line in traceback.splitlines() if not line.lstrip().startswith("File ")]
    if folders and (found := storage_error("\n".join(messages), folders, guess=True)) is not None:
        raise found


class CallError(Exception):
    """A call has failed, or its process was killed; the message is the traceback."""


@dataclass
class Call:
    """Function that is called in a worker process.

    Parameters
    ----------
    function : callable
        Function of a module, which worker processes can import.
    args : tuple
        Its arguments.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    result: None = None
    """As nodes have it; always None."""

    def run(self, updatehash: bool) -> tuple[Any, list[logging.LogRecord]]:
        """Return the result of the function, or an error for users, and what was logged."""
        records: SimpleQueue[logging.LogRecord] = SimpleQueue()
        handler = QueueHandler(records)
        LOGGER.addHandler(handler)
        try:
            result = self.function(*self.args)
        except UserError as error:
            result = error
        finally:
            LOGGER.removeHandler(handler)
        return result, [records.get() for _ in range(records.qsize())]


Steps = Generator["Call | Workflow | None", Any, None]
"""Steps of a participant: a generator that yields one after the other.

It yields a :class:`Call`, and is sent its result; errors (:class:`CallError`, or
:class:`~bids_uad.errors.UserError` of the function) are raised in the generator. It yields a workflow, and
continues when all its nodes have run, failed, or depend on one that failed. It yields None to be continued
later, because it waits for another run.
"""


class _State(Enum):
    CALL, NODES, WAITING, PARKED = range(4)


@dataclass(eq=False)
class _Participant:
    """Participant in process; PARKED until the workflows of all participants can run on a cluster."""

    steps: Steps
    state: _State | None = None
    call: Call | None = None
    graph: nx.DiGraph | None = None
    processed: bool = False
    resume_at: float = 0.0


class _GraphRecorder:
    """Plugin that keeps the graph of a workflow instead of running it."""

    plugin_args: ClassVar[dict[str, Any]] = {}

    def run(self, graph, config, updatehash=False):
        self.graph, self.config = graph, config


class IsolatedPlugin(FailureLog, MultiProcPlugin):
    """MultiProc with one pipe per worker process, and one graph per participant.

    Parameters
    ----------
    plugin_args : dict
        MultiProc's `n_procs`, `memory_gb`, `n_gpu_procs`, `raise_insufficient`, `status_callback`.
    """

    def __init__(self, plugin_args: dict[str, Any]) -> None:
        super().__init__(plugin_args)
        self._context = mp.get_context(START_METHOD)
        self._context.set_forkserver_preload(list(PRELOADED))
        self._idle: list[_Worker] = []
        self._busy: dict[int, _Worker] = {}

    def process(
        self,
        participants: Iterable[Steps],
        *,
        cluster: SlurmPlugin | SlurmGraphPlugin | None = None,
        stop_on_failure: bool = False,
    ) -> int:
        """Process participants depth first: at most `processors + 1` are unfinished at a time.

        So neither the time to the first result, nor memory, nor the size of the work folder grows with the
        number of participants. Participants that wait for another run do not count.

        Parameters
        ----------
        participants : iterable of Steps
            Steps of each participant, see :data:`Steps`.
        cluster : SlurmPlugin or SlurmGraphPlugin, optional
            Plugin that runs the workflows. All participants are then begun at once, and the nodes of all
            workflows are one graph.
        stop_on_failure : bool, default=False
            Whether the run ends after the first failed node. The remaining steps of participants with a
            workflow are still run, without it; other participants are dropped.

        Returns
        -------
        int
            Number of participants that were dropped.

        Raises
        ------
        StorageError
            If an output or work folder cannot be written.
        """
        gc.freeze()  # nipype collects garbage at each poll, which takes 0.5 s with all imported modules
        self._begin(participants, cluster)
        try:
            while self._advance():
                self._take_results()
                if stop_on_failure and self.failures:
                    self._stop()
                self._start_calls()
                self._send_procs_to_workers(graph=self._graph)
                wait([worker.pipe for worker in self._busy.values()], POLL_NODES)
        finally:
            gc.unfreeze()
            if self._active:  # the run is interrupted
                self.kill_workers()
                for participant in self._active:
                    participant.steps.close()
        return self._dropped

    def _begin(self, participants: Iterable[Steps], cluster: SlurmPlugin | SlurmGraphPlugin | None) -> None:
        """Reset what :meth:`process` and the methods of nipype keep."""
        self._queue, self._cluster = iter(participants), cluster
        self._limit = self.processors + 1 if cluster is None else math.inf
        self._active: list[_Participant] = []
        self._calls: list[tuple[_Participant, Call]] = []
        self._running_calls: dict[int, _Participant] = {}
        self._stopped, self._dropped = False, 0
        self._graph, self.procs, self._owners = nx.DiGraph(), [], []
        self.depidx = self.refidx = ssp.lil_matrix((0, 0), dtype=int)
        self.proc_done = self.proc_pending = np.zeros(0, dtype=bool)
        self.mapnodes, self.mapnodesubids, self.pending_tasks, self._run_errors = [], {}, [], []

    def _advance(self) -> bool:
        """Continue participants whose step has ended, begin others; return whether any is unfinished."""
        for participant in [one for one in self._active if one.state is _State.NODES]:
            own = np.array([owner is participant for owner in self._owners])
            if np.all(self.proc_done[own] & ~self.proc_pending[own]):
                self._keep(~own)
                self._resume(participant)
        for participant in [one for one in self._active if one.state is _State.WAITING]:
            if time.monotonic() >= participant.resume_at:
                self._resume(participant)
        while sum(one.state is not _State.WAITING for one in self._active) < self._limit:
            steps = None if self._stopped else next(self._queue, None)
            if steps is None:
                break
            self._active.append(_Participant(steps))
            self._resume(self._active[-1])
        parked = [one for one in self._active if one.state is _State.PARKED]
        if parked and len(parked) == len(self._active):
            self._run_on_cluster(parked)
        return bool(self._active)

    def _resume(self, participant: _Participant, result: Any = None) -> None:
        """Continue the steps of a participant to the next one; raise errors in them."""
        try:
            if isinstance(result, Exception):
                step = participant.steps.throw(result)
            else:
                step = participant.steps.send(result)
        except StopIteration:
            self._active.remove(participant)
            return
        if step is None:
            participant.state, participant.resume_at = _State.WAITING, time.monotonic() + POLL_LOCKS
        elif isinstance(step, Call):
            participant.state, participant.call = _State.CALL, step
            self._calls.append((participant, step))
        else:
            recorder = _GraphRecorder()
            step.run(plugin=recorder)
            participant.graph, self._config = recorder.graph, recorder.config
            participant.processed = True
            participant.state = _State.NODES if self._cluster is None else _State.PARKED
            if self._cluster is None:
                self._add(participant)

    def _add(self, participant: _Participant) -> None:
        """Add the nodes of a participant's graph to those that nipype's methods schedule."""
        nodes = list(nx.topological_sort(participant.graph))
        self._prerun_check(participant.graph)
        self._graph.update(participant.graph)
        self.procs += nodes
        self._owners += [participant] * len(nodes)
        depends = ssp.csr_matrix(nx.to_scipy_sparse_array(participant.graph, nodelist=nodes, weight=None))
        self.depidx = ssp.block_diag([self.depidx, depends], format="lil")
        self.refidx = self.depidx.copy()
        participant.graph = None
        new = np.zeros(len(nodes), dtype=bool)
        self.proc_done = np.concatenate([self.proc_done, new])
        self.proc_pending = np.concatenate([self.proc_pending, new])

    def _keep(self, kept: np.ndarray) -> None:
        """Remove nodes from those that nipype's methods schedule; `kept` is a boolean mask."""
        self._graph.remove_nodes_from([self.procs[index] for index in np.flatnonzero(~kept)])
        position = dict(zip(np.flatnonzero(kept).tolist(), range(len(self.procs)), strict=False))
        self.procs = [self.procs[index] for index in position]
        self._owners = [self._owners[index] for index in position]
        self.depidx = self.depidx[kept][:, kept]
        self.refidx = self.depidx.copy()
        self.proc_done, self.proc_pending = self.proc_done[kept], self.proc_pending[kept]
        self.pending_tasks = [(taskid, position[job]) for taskid, job in self.pending_tasks if kept[job]]

    def _take_results(self) -> None:
        """Process the results of nodes and calls."""
        running, self.pending_tasks = self.pending_tasks, []
        for taskid, job in running:
            result = self._get_result(taskid)
            if result is None:
                self.pending_tasks.append((taskid, job))
            elif result["traceback"]:
                self._clean_queue(job, self._graph, result=result)
            else:
                self._task_finished_cb(job)
        for taskid, participant in list(self._running_calls.items()):
            result = self._get_result(taskid)
            if result is not None:
                del self._running_calls[taskid]
                traceback = "".join(result["traceback"] or "")
                raise_if_unwritable(traceback, self.folders)
                value, records = (CallError(traceback), []) if traceback else result["result"]
                for record in records:
                    LOGGER.handle(record)
                self._resume(participant, value)

    def _start_calls(self) -> None:
        """Start calls before nodes, since others wait for their participant to be finished."""
        while self._calls and self._check_resources(self.pending_tasks)[1] > 0:
            participant, call = self._calls.pop(0)
            self._running_calls[self._submit_job(call)] = participant

    def _check_resources(self, running_tasks):
        memory_gb, processors, gpu_slots = super()._check_resources(running_tasks)
        n_calls = len(self._running_calls)
        return memory_gb - min(n_calls, memory_gb), processors - min(n_calls, processors), gpu_slots

    def _sort_jobs(self, jobids, scheduler=None):
        """Return the nodes sorted by participant, the earliest first."""
        order = {id(participant): number for number, participant in enumerate(self._active)}
        return jobids[np.argsort([order[id(self._owners[job])] for job in jobids], kind="stable")]

    def _run_on_cluster(self, participants: Sequence[_Participant]) -> None:
        """Run the workflows of all participants as one graph, and continue their steps."""
        graph = nx.compose_all([participant.graph for participant in participants])
        try:
            self._cluster.run(graph, config=self._config)
        except RuntimeError:
            # nipype raises one error for all failed nodes; without failed nodes, it is another error.
            if not self._cluster.failures:
                raise
        self.failures += self._cluster.failures
        for participant in participants:
            self._resume(participant)

    def _stop(self) -> None:
        """Kill running nodes; drop participants that were not begun or have no workflow yet."""
        if self._stopped:
            return
        self._stopped = True
        self.kill_workers()
        self._calls, self._running_calls, self.pending_tasks = [], {}, []
        self._keep(np.zeros(len(self.procs), dtype=bool))
        self._dropped = sum(1 for _ in self._queue)
        for participant in list(self._active):
            if participant.state is _State.NODES:
                self._resume(participant)
            elif participant.state is _State.CALL and participant.processed:
                self._calls.append((participant, participant.call))
            else:
                participant.steps.close()
                self._active.remove(participant)
                self._dropped += 1

    def close(self) -> None:
        """End all workers, and the processes that they keep; the results of running nodes are lost."""
        self.kill_workers()
        self.pool.shutdown(wait=False, cancel_futures=True)

    def kill_workers(self) -> None:
        """End idle workers and kill the others; new ones are started when they are needed."""
        for worker in self._idle:
            worker.release()
        for worker in [*self._idle, *self._busy.values()]:
            worker.kill(seconds=END_SECONDS if worker in self._idle else 0)
        self._idle, self._busy = [], {}

    def _submit_job(self, node, updatehash=False):
        """Start a node in an idle worker, or in a new one.

        Nodes that keep a process (:class:`~bids_uad.levels.participant.interfaces.Detect`) share workers of
        their own, so that there are as many such processes as run at a time.
        """
        self._taskid += 1
        keeps_process = getattr(getattr(node, "interface", None), "keeps_process", False)
        suitable = [worker for worker in self._idle if worker.keeps_process == keeps_process]
        if suitable:
            worker = suitable[-1]
            self._idle.remove(worker)
        else:
            worker = _Worker(self._context, keeps_process)
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


class _Worker:
    """Process that runs nodes, with the parent's end of its pipe."""

    def __init__(self, context: mp.context.BaseContext, keeps_process: bool) -> None:
        self.keeps_process = keeps_process
        self.pipe, child_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(child_end, str(Path.cwd())), daemon=True)
        self._process.start()
        self._oom_kills = oom_kills()
        child_end.close()

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def start(self, node: Any, updatehash: bool, taskid: int) -> None:
        """Send a node to the process; the exit of an idle process is detected at the next poll."""
        try:
            self.pipe.send((node, updatehash, taskid))
        except (BrokenPipeError, ConnectionResetError):
            self._process.join()

    def poll(self) -> dict[str, Any] | None:
        """Return nipype's result dictionary, or None while the node runs."""
        try:
            if self.pipe.poll():
                return self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
        if self._process.is_alive():
            return None
        cause = describe_exit(self._process.exitcode, self._oom_kills)
        return {"result": None, "traceback": [f"ProcessKilled: the step {cause}"]}

    def release(self) -> None:
        """Let the process end by itself, if it is idle, and the process that it keeps."""
        with suppress(OSError):
            self.pipe.send(None)

    def kill(self, seconds: float) -> None:
        """Kill the process if it has not ended within a time in s."""
        self._process.join(seconds)
        self._process.kill()
        self._process.join()
        self.pipe.close()


def _serve(pipe: Connection, folder: str) -> None:
    """Run nodes until the parent sends None or closes its end of the pipe."""
    os.chdir(folder)
    os.environ["NIPYPE_NO_ET"] = "1"
    end_with_parent()
    configure_nipype()
    while True:
        try:
            received = pipe.recv()
        except EOFError:
            return
        except Exception as error:  # of unpickling
            failure = f"{type(error).__name__}: the step cannot be received by its process: {error}"
            pipe.send({"result": None, "traceback": [failure], "taskid": None})
            continue
        if received is None:
            RequestProcess.stop_all()
            return
        node, updatehash, taskid = received
        options = (getattr(node, "config", None) or {}).get("monitoring", {})
        nipype_config.resource_monitor = options.get("enabled", "false")
        if nipype_config.resource_monitor:  # nipype leaves its samples in the current folder
            os.chdir(node.base_dir)
        try:
            result = run_node(node, updatehash, taskid)
            if nipype_config.resource_monitor:
                for samples in Path.cwd().glob(f".proc-{os.getpid()}_*"):
                    samples.unlink()
        except Exception as error:  # with a full disk, nipype reads a result that it could not write
            result = {"result": None, "traceback": format_exception(error), "taskid": taskid}
        try:
            pipe.send(result)
        except Exception as error:  # of pickling
            failure = f"{type(error).__name__}: the step's result cannot be sent back: {error}"
            pipe.send({"result": None, "traceback": [failure], "taskid": taskid})


def configure_nipype() -> None:
    """Configure nipype and nibabel in this process, which may be a worker.

    Their messages are in the crash files and the summary, and are not printed. nipype's search for files of a
    node takes the folder's path as part of the pattern: below a folder such as ``data [2024]`` it finds
    nothing, and removes files that were just written. It is replaced by one that takes the path literally.
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
    """List the files whose names match a pattern, in a folder whose path is taken literally."""
    path = Path(pattern)
    return [str(found) for found in path.parent.glob(path.name)]


class SlurmPlugin(FailureLog, SLURMPlugin):
    """SLURM plugin that submits one job per node, as soon as its inputs exist.

    Parameters
    ----------
    plugin_args : dict
        Arguments of nipype's SLURM plugin (`sbatch_args`, `template`, `max_jobs`, `status_callback`).
    """

    def __init__(self, plugin_args: dict[str, Any]) -> None:
        _set_logname()
        super().__init__(plugin_args)

    def close(self) -> None:
        """Cancel unfinished jobs."""
        _cancel([str(job) for job in self._pending])
        self._pending = {}

    def _get_result(self, taskid):
        if self._is_pending(taskid):
            return None
        state = _state_of(taskid)
        if state in _JOB_STATES:
            return {"result": None, "traceback": [describe_job_end(taskid, state)]}
        return super()._get_result(taskid)


class SlurmGraphPlugin(SLURMGraphPlugin):
    """SLURM plugin that submits all jobs at once, with their dependencies, and waits until all have ended.

    Parameters
    ----------
    plugin_args : dict
        Arguments of nipype's SLURMGraph plugin (`sbatch_args`, `template`, `dont_resubmit_completed_jobs`).
    mark : str
        Comment (one word) that identifies the jobs of this run.

    Attributes
    ----------
    failures : list of NodeFailure
        See :class:`FailureLog`.
    folders : tuple of pathlib.Path
        See :class:`FailureLog`.
    """

    folders: tuple[Path, ...] = ()

    def __init__(self, plugin_args: dict[str, Any], mark: str) -> None:
        _set_logname()
        self.failures: list[NodeFailure] = []
        self._mark, self._nodes = mark, []
        own = f"{plugin_args.get('sbatch_args', '')} --comment={mark} --kill-on-invalid-dep=yes"
        super().__init__(plugin_args={**plugin_args, "sbatch_args": own})

    def run(self, graph, config, updatehash=False):
        """Submit the graph, wait for its jobs, and record failures."""
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
            elif state != "CANCELLED":  # as are the jobs that depend on a failed one
                log = next(iter(sorted(Path(node.base_dir).glob(f"*/batch/*{node._id}.sh.e"))), "none")
                self.failures.append(NodeFailure(node.fullname, describe_job_end(job, state), str(log)))

    def close(self) -> None:
        """Cancel unfinished jobs."""
        _cancel([job for job, state in self._jobs().values() if state in _UNFINISHED])

    def _submit_graph(self, pyfiles, dependencies, nodes):
        self._nodes = nodes
        super()._submit_graph(pyfiles, dependencies, nodes)

    def _wait(self) -> dict[int, tuple[str, str]]:
        """Return number and final state of each node's job when all have ended."""
        last: dict[int, tuple[str, str]] = {}
        while True:
            seen = self._jobs()
            last |= seen
            if not any(state in _UNFINISHED for _, state in seen.values()):
                break
            time.sleep(POLL_SECONDS)
        # SLURM drops jobs minutes after their end, so that the final state may not have been seen.
        return {
            index: (job, _state_of(job) if state in _UNFINISHED else state)
            for index, (job, state) in last.items()
        }

    def _jobs(self) -> dict[int, tuple[str, str]]:
        """Query SLURM for the jobs of this run: number and state by index of the node in the graph."""
        lines = _query("squeue", "--noheader", "--me", "--states=all", "--format=%i|%j|%T|%k").splitlines()
        jobs = {}
        for line in lines:
            job, name, state, mark = line.strip().split("|")
            if mark == self._mark:
                jobs[int(re.match(r"j(\d+)_", name)[1])] = (job, state)
        return jobs


def describe_job_end(job: int | str, state: str) -> str:
    """Describe in one line why a SLURM job ended without a result."""
    return f"ProcessKilled: SLURM job {job} {_JOB_STATES.get(state, f'ended as {state}')}"


def _state_of(job: int | str) -> str:
    """Query SLURM for the state of a job; empty if it is no longer known."""
    fields = _query("scontrol", "--oneliner", "show", "job", str(job), check=False)
    found = re.search(r"\bJobState=(\w+)", fields)
    return found[1] if found else ""


def _cancel(jobs: list[str]) -> None:
    if jobs:
        _query("scancel", *jobs, check=False)


def _query(*command: str, check: bool = True) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=check).stdout


def _crash_file(node: Any, since: float) -> Path | None:
    """Return the crash file that nipype has written for a node during this run."""
    folder = Path(node.config["execution"]["crashdump_dir"])
    for path in sorted(folder.glob(f"crash-*-{node._id}-*.txt")):
        if path.stat().st_mtime >= since and path.read_text().startswith(f"Node: {node.fullname}\n"):
            return path
    return None


def _set_logname() -> None:
    """Set LOGNAME, which nipype uses in the names of jobs, and which some schedulers do not set."""
    if "LOGNAME" not in os.environ:
        try:
            os.environ["LOGNAME"] = getpass.getuser()
        except KeyError:
            os.environ["LOGNAME"] = str(os.getuid())


def make_plugins(
    config: RunConfig, callback: Callable[[Any, str], None]
) -> tuple[IsolatedPlugin, SlurmPlugin | SlurmGraphPlugin | None]:
    """Return the nipype plugins of a run.

    Parameters
    ----------
    config : RunConfig
        `plugin_file` names a plugin and its arguments.
    callback : callable
        Called with each node and its status (`start`, `end`, `exception`); not by SLURMGraph.

    Returns
    -------
    local : IsolatedPlugin
        Plugin with the resources of `config`, or those of a plugin file for MultiProc.
    cluster : SlurmPlugin, SlurmGraphPlugin or None
        Plugin that runs the workflows, if the plugin file names one for SLURM.

    Raises
    ------
    ConfigError
        If the plugin file is not valid, or job scripts cannot contain the path of the work folder.
    """
    configure_nipype()
    nipype_config.update_config(
        {
            "execution": {
                "check_version": "false",
                # Pages about the graph, which jobs that share a work folder would overwrite.
                "create_report": "false",
                "crashfile_format": "txt",
                "poll_sleep_duration": str(POLL_NODES),
                "stop_on_first_crash": "false",
            }
        }
    )
    nipype_config.set("monitoring", "enabled", str(config.resource_monitor).lower())
    # Nodes are monitored by the workers; here, nipype would sum up workflows before they have run.
    nipype_config.resource_monitor = False
    if config.resource_monitor:
        callback = _record_resources(callback, resources_file(config))
    name, arguments = "MultiProc", {}
    if config.plugin_file is not None:
        name, arguments = read_plugin_file(config.plugin_file)
    cluster = None
    if name != "MultiProc":
        check_job_folder(config.work_dir)
        stop = str(config.stop_on_first_crash).lower()
        nipype_config.set("execution", "stop_on_first_crash", stop)
        if name == "SLURM":
            cluster = SlurmPlugin({"status_callback": callback, **arguments})
        else:
            cluster = SlurmGraphPlugin(arguments, mark=config.run_id)
        cluster.folders = (config.output_dir, config.work_dir)
        arguments = {}
    own = {
        "n_procs": config.nprocs,
        "memory_gb": config.mem_gb,
        "n_gpu_procs": config.n_gpu_procs,
        "raise_insufficient": False,
    }
    local = IsolatedPlugin({**own, "status_callback": callback, **arguments})
    local.folders = (config.output_dir, config.work_dir)
    return local, cluster


def resources_file(config: RunConfig) -> Path:
    """Return the path of the memory and CPU usage of a run."""
    return config.output_dir / "logs" / f"bids_uad-{config.run_id}_resources.jsonl"


def _record_resources(callback: Callable[[Any, str], None], path: Path) -> Callable[[Any, str], None]:
    """Return a callback that also writes nipype's statistics of each finished node as a line of JSON."""
    log = logging.getLogger("callback")  # of nipype; other handlers of it are kept

    def record(node: Any, status: str) -> None:
        callback(node, status)
        handler = logging.FileHandler(path, delay=True)
        level, propagate = log.level, log.propagate
        log.addHandler(handler)
        log.setLevel(logging.DEBUG)
        log.propagate = False  # to the terminal
        try:
            log_nodes_cb(node, status)
        finally:
            log.removeHandler(handler)
            log.setLevel(level)
            log.propagate = propagate
            handler.close()

    return record


def check_job_folder(folder: Path) -> None:
    """Check that the path of the work folder can be used in nipype's job scripts, which do not quote it.

    Parameters
    ----------
    folder : pathlib.Path
        Work folder of the run.

    Raises
    ------
    ConfigError
        If the path contains special characters.
    """
    plain = "".join(character for character in str(folder) if character.isascii())
    if plain != quote(plain) or "%" in plain:  # SLURM replaces %j and the like in the names of log files
        raise ConfigError(
            f"the work folder {folder} has a space, quote, bracket or other special character in its path, "
            "which cluster jobs cannot use; choose another with -w"
        )


def read_plugin_file(path: Path) -> tuple[str, dict[str, Any]]:
    """Read a plugin and its arguments from YAML, in the format of fMRIPrep.

    Parameters
    ----------
    path : pathlib.Path
        YAML file with `plugin`, one of `PLUGINS`, and optionally `plugin_args`.

    Returns
    -------
    name : str
        One of `PLUGINS`.
    arguments : dict
        Contents of `plugin_args`.

    Raises
    ------
    ConfigError
        If the file cannot be read or has other contents.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--use-plugin {path} cannot be read: {error}") from error
    remedy = "write 'plugin: SLURM' and, below it, 'plugin_args:' with its arguments"
    if not isinstance(content, dict) or not {"plugin"} <= set(content) <= {"plugin", "plugin_args"}:
        raise ConfigError(f"--use-plugin {path}: {remedy}")
    if content["plugin"] not in PLUGINS:
        raise ConfigError(f"--use-plugin {path}: plugin {content['plugin']} is none of {', '.join(PLUGINS)}")
    arguments = content.get("plugin_args") or {}
    if not isinstance(arguments, dict):
        raise ConfigError(f"--use-plugin {path}: plugin_args must be a mapping; {remedy}")
    return content["plugin"], arguments
