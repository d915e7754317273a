"""A nipype plugin whose workers can die without taking the run with them.

nipype's MultiProc runs on one process pool. If the kernel kills a worker, usually for memory, the pool breaks
as a whole, the exception is lost in a callback, and the run waits for ever. Here each worker is a process of
its own behind a pipe: a death is noticed, told with its signal, and charged to the node that ran there.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing as mp
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from traceback import format_exception
from typing import Any

from nipype.pipeline.engine import nodes, utils
from nipype.pipeline.plugins.multiproc import MultiProcPlugin, run_node

from bids_uad.cgroups import oom_kills, why_killed
from bids_uad.errors import storage_error
from bids_uad.workers import end_with_parent

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
