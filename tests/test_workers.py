"""Worker processes end with the process that started them; a process that answers requests is replaced.

As a program, this module is a process that answers requests.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from threading import Timer

import pytest

from bids_uad.errors import InputError, UserError
from bids_uad.resources import (
    NoAnswerError,
    RequestProcess,
    end_with_parent,
    map_in_processes,
    serve_requests,
)

ROOT = Path(__file__).parents[1]

PROGRAM = """
import multiprocessing as mp
import sys, time
from tests.test_workers import report_and_sleep
if __name__ == "__main__":
    context = mp.get_context(sys.argv[1])
    own_end, other_end = context.Pipe()
    context.Process(target=report_and_sleep, args=(other_end, sys.argv[2])).start()
    print(own_end.recv(), flush=True)
    time.sleep(600)
"""


def report_and_sleep(pipe, state: str) -> None:
    """Send the number of this process, then sleep or wait for a message."""
    end_with_parent()
    pipe.send(os.getpid())
    if state == "busy":
        time.sleep(600)
    pipe.recv()


def runs(number: int) -> bool:
    """Return whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("state", ["idle", "busy"])
@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
def test_worker_ends_when_its_parent_is_killed(tmp_path, start_method, state):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(program), start_method, state]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        worker = int(parent.stdout.readline())
        assert runs(worker)
        parent.send_signal(signal.SIGKILL)
    wait_for_end(worker)


def wait_for_end(number: int, seconds: float = 10) -> None:
    """Wait until a process has ended."""
    end = time.monotonic() + seconds
    while runs(number):
        assert time.monotonic() < end
        time.sleep(0.02)


BIG = 8 << 20
"""Bytes of a result that takes many times the buffer of a pipe."""


def work(index: int, act: str) -> int | bytes:
    """Do what a call of the tests below says."""
    if act == "send":
        return bytes(BIG)
    if act == "sleep":
        time.sleep(600)
    elif act == "refuse":
        raise InputError("scan.nii", "gave NaN", "look at it")
    elif act == "fail":
        raise ZeroDivisionError("nothing to divide by")
    elif act == "killed while it sends":
        Timer(0.05, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return bytes(32 * BIG)
    elif act == "exit":
        os._exit(3)
    return index * index


def results_of(acts: Sequence[str], workers: int = 2) -> list[int]:
    return list(map_in_processes(work, range(len(acts)), acts, workers=workers))


@pytest.mark.parametrize("workers", [1, 2, 9])
def test_results_of_processes_come_in_order(workers):
    acts = [""] * 7
    assert results_of(acts, workers) == list(map(work, range(7), acts))
    assert results_of([], workers) == []


@pytest.mark.parametrize("act", ["refuse", "fail"])
def test_error_of_a_process_is_raised(act):
    with pytest.raises((InputError, ZeroDivisionError)) as caught:
        results_of(["sleep", act])
    with pytest.raises(caught.type, match=f"^{re.escape(str(caught.value))}$"):
        work(0, act)
    shown = "".join(traceback.format_exception(caught.value))
    assert ("in work" in shown) == (act == "fail")


@pytest.mark.parametrize(
    ("act", "cause"),
    [
        ("exit", "a worker process ended with exit code 3"),
        ("killed while it sends", "a worker process was killed .* lower --nprocs"),
    ],
)
def test_process_that_ends_without_a_result_raises(act, cause):
    with pytest.raises(UserError, match=cause):
        results_of(["sleep", act])


def test_processes_are_killed_while_they_send_results():
    for results in [map_in_processes(work, range(8), ["", *["send"] * 7], workers=2) for _ in range(3)]:
        assert next(results) == 0
        results.close()
    assert not mp.active_children()


BLOCKS: list[bytes] = []


def answer(request: dict) -> dict:
    """Do what a request says, and return the number of the process."""
    act, orders = request.get("act"), Path(request.get("orders", os.devnull))
    if orders.is_file() and (acts := orders.read_text().split()):
        act, rest = acts[0], acts[1:]
        orders.write_text(" ".join(rest))
    if act == "grow":
        BLOCKS.append(b"a" * (64 << 20))
    elif act == "print":
        print("a line on standard output")
        os.system("echo and one of a program")  # noqa: S605
    elif act == "refuse":
        raise InputError("scan.nii", "gave NaN", "look at it")
    elif act == "fail":
        raise ZeroDivisionError("nothing to\ndivide by")
    elif act == "exit":
        print("no such library", file=sys.stderr)
        os._exit(3)
    elif act == "sleep":
        time.sleep(600)
    elif act is not None:
        os.kill(os.getpid(), signal.Signals[act])
    return {"pid": os.getpid(), "threads": os.environ.get("OMP_NUM_THREADS")}


@pytest.fixture
def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def process():
    process = RequestProcess("tests.test_workers")
    yield process
    process.stop()


def test_one_process_answers_all_requests(process, environment):
    environment["OMP_NUM_THREADS"] = "3"
    answers = [process.ask({"act": act}, environment) for act in (None, "print", None)]
    assert [each["threads"] for each in answers] == ["3"] * 3
    (number,) = {each["pid"] for each in answers}
    assert runs(number)
    process.stop()
    assert not runs(number)


@pytest.mark.parametrize("act", ["SIGKILL", "SIGSEGV", "exit"])
def test_request_is_repeated_once_if_the_process_ends(process, environment, tmp_path, act):
    first = process.ask({}, environment)["pid"]
    orders = tmp_path / "orders"
    orders.write_text(act)
    second = process.ask({"orders": str(orders)}, environment)["pid"]
    assert first != second
    orders.write_text(f"{act} {act} {act}")
    with pytest.raises(NoAnswerError) as caught:
        process.ask({"orders": str(orders)}, environment)
    assert orders.read_text() == act  # two of three orders were obeyed
    expected = 3 if act == "exit" else -signal.Signals[act]
    assert caught.value.returncode == expected
    assert caught.value.stderr.strip() == ("no such library" if act == "exit" else "")
    assert process.ask({}, environment)["pid"] not in (first, second)


def test_process_killed_between_requests_is_replaced(process, environment):
    first = process.ask({}, environment)["pid"]
    os.kill(first, signal.SIGKILL)
    wait_for_end(first)
    assert process.ask({}, environment)["pid"] != first


def test_errors_are_answers(process, environment):
    first = process.ask({}, environment)["pid"]
    with pytest.raises(InputError, match=r"^scan.nii: gave NaN; look at it$") as refusal:
        process.ask({"act": "refuse"}, environment)
    assert refusal.value.remedy == "look at it"
    assert process.ask({}, environment)["pid"] == first
    with pytest.raises(
        NoAnswerError, match=r"(?s)in answer.*ZeroDivisionError: nothing to\ndivide by"
    ) as caught:
        process.ask({"act": "fail"}, environment)
    assert caught.value.returncode is None
    assert not runs(first)  # its state, such as that of a GPU, is not known


def test_process_ends_when_idle(process, environment):
    environment["IDLE_SECONDS"] = "0.2"
    first = process.ask({}, environment)["pid"]
    wait_for_end(first)
    assert process.ask({}, environment)["pid"] != first


@pytest.mark.parametrize(("limit", "n_requests"), [("40e6", 2), ("140e6", 4), ("1e12", 6)])
def test_process_that_has_grown_is_replaced_after_a_request(process, environment, limit, n_requests):
    """Each request adds 64 MiB; those of the first do not count."""
    environment["MEMORY_GROWTH"] = limit
    numbers = [process.ask({"act": "grow"}, environment)["pid"] for _ in range(6)]
    assert numbers.count(numbers[0]) == n_requests


def test_resident_bytes_grow_with_memory():
    # In a new process, since a long one may have that much freed memory left.
    program = (
        "from bids_uad.resources import resident_bytes; before = resident_bytes(); "
        "block = b'a' * (200 << 20); print((resident_bytes() - before) / len(block))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 0.9 < float(done.stdout) < 1.5


ASKING = """
import os, sys
from bids_uad.resources import RequestProcess
process = RequestProcess("tests.test_workers")
print(process.ask({})["pid"], flush=True)
process.ask({"act": "sleep"}) if sys.argv[1] == "busy" else sys.stdin.read()
"""


@pytest.mark.parametrize("state", ["idle", "busy", "ended"])
def test_process_ends_with_the_one_that_asks(environment, state):
    command = [sys.executable, "-c", ASKING, state]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=environment, **pipes) as parent:
        number = int(parent.stdout.readline())
        time.sleep(0.2)
        assert runs(number)
        if state == "ended":
            parent.stdin.close()
            assert parent.wait(60) == 0
        parent.kill()
    wait_for_end(number)


if __name__ == "__main__":
    serve_requests(
        answer,
        int(sys.argv[1]),
        idle_seconds=float(os.environ.get("IDLE_SECONDS", "600")),
        memory_growth=float(os.environ.get("MEMORY_GROWTH", "1e12")),
    )
