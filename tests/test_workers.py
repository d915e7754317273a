"""Worker processes end with the process that started them; a process that answers requests is replaced.

As a program, this module is a process that answers requests.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bids_uad.errors import InputError
from bids_uad.resources import NoAnswerError, RequestProcess, serve_requests, worker_pool

ROOT = Path(__file__).parents[1]

PROGRAM = """
import sys, time
from bids_uad.resources import worker_pool
from tests.test_workers import pid
if __name__ == "__main__":
    with worker_pool(1, sys.argv[1]) as pool:
        print(pool.submit(pid).result(), flush=True)
        if sys.argv[2] == "busy":
            pool.submit(time.sleep, 600)
        time.sleep(600)
"""


def pid() -> int:
    """Return the number of the process that this runs in."""
    return os.getpid()


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


def test_worker_pool_is_killed_when_the_block_raises():
    begin = time.monotonic()

    def interrupted():
        with worker_pool(1, "forkserver") as pool:
            pool.submit(pid).result()
            pool.submit(time.sleep, 600)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert time.monotonic() - begin < 60


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
