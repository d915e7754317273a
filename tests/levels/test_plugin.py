import os
import signal
import time

import pytest

from bids_uad.levels.participant.detection import explain
from bids_uad.levels.participant.outcome import error_line
from bids_uad.levels.participant.plugin import IsolatedPlugin, describe_death


class Task:
    """Stands in for a node: pickled to the worker and run there."""

    def __init__(self, act):
        self.act = act
        self.result = None

    def run(self, updatehash):
        if self.act == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.act == "raise":
            raise ValueError("no")
        if self.act == "sleep":
            time.sleep(60)
        return (self.act, os.getpid())


@pytest.fixture
def plugin():
    plugin = IsolatedPlugin({"n_procs": 2, "memory_gb": 1, "n_gpu_procs": 1})
    yield plugin
    plugin.close()


def wait(plugin, taskid):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        result = plugin._get_result(taskid)
        if result is not None:
            return result
        time.sleep(0.05)
    raise AssertionError("no result")


def test_death_of_one_worker_is_told_and_costs_only_its_task(plugin):
    sleeping = plugin._submit_job(Task("sleep"))
    killed = plugin._submit_job(Task("kill"))
    result = wait(plugin, killed)
    assert "SIGKILL" in "".join(result["traceback"])
    assert plugin._get_result(sleeping) is None
    fine = wait(plugin, plugin._submit_job(Task("work")))
    assert fine["traceback"] is None
    assert fine["result"][0] == "work"


def test_workers_are_used_again_and_errors_come_back(plugin):
    first = wait(plugin, plugin._submit_job(Task("work")))
    failed = wait(plugin, plugin._submit_job(Task("raise")))
    second = wait(plugin, plugin._submit_job(Task("work")))
    assert "ValueError: no" in "".join(failed["traceback"])
    assert first["result"][1] == second["result"][1]


def test_workers_end_when_closed(plugin):
    worker_id = wait(plugin, plugin._submit_job(Task("work")))["result"][1]
    plugin.close()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.kill(worker_id, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("the worker is still there")


def test_deaths_in_words():
    assert "memory" in describe_death(-signal.SIGKILL)
    assert "SIGSEGV" in describe_death(-signal.SIGSEGV)
    assert "exit code 3" in describe_death(3)


def test_engine_failures_in_words():
    assert "memory ran out" in explain(-signal.SIGKILL, "")
    assert "--device cpu" in explain(1, "x\ntorch.OutOfMemoryError: CUDA out of memory. Tried")
    assert explain(69, "model bundle x: y\n") == "model bundle x: y (exit code 69)"


@pytest.mark.parametrize(
    ("traceback", "line"),
    [
        ("Traceback:\n  File x\nValueError: bad value", "ValueError: bad value"),
        (
            "NodeError: Exception\n\nTraceback:\n\tFile y\n\tbids_uad.errors.InputError: a: b; c\n\n",
            "a: b; c",
        ),
        ("ProcessKilled: the step was killed", "the step was killed"),
        ("odd\nlast words", "last words"),
        ("", "no message"),
    ],
)
def test_error_line(traceback, line):
    assert error_line(traceback) == line
