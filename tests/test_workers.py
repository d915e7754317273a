"""Worker processes end with the process that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bids_uad.resources import worker_pool

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
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, str(program), start_method, state]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        worker = int(parent.stdout.readline())
        assert runs(worker)
        parent.send_signal(signal.SIGKILL)
    end = time.monotonic() + 10
    while runs(worker):
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
