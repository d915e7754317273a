"""Worker processes that end with the process that started them, however it ends."""

from __future__ import annotations

import fcntl
import multiprocessing as mp
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager


def end_with_parent() -> None:
    """Have this worker and its children killed when the process that started it is gone.

    A killed run must not leave a worker that still writes where the next run works, or that waits for ever
    for work. The kernel sends the signal when the other end of the pipe is gone: a thread would wait for its
    turn behind ITK, which keeps the interpreter's lock for minutes.
    """
    os.setpgrp()
    sentinel = mp.parent_process().sentinel
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(sentinel, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(sentinel, fcntl.F_SETFL, fcntl.fcntl(sentinel, fcntl.F_GETFL) | os.O_ASYNC)


@contextmanager
def worker_pool(workers: int, start_method: str) -> Iterator[ProcessPoolExecutor]:
    """Open a pool of processes that ends with this process, and at once when the block raises.

    Parameters
    ----------
    workers : int
    start_method : {"spawn", "forkserver", "fork"}

    Yields
    ------
    concurrent.futures.ProcessPoolExecutor
    """
    pool = ProcessPoolExecutor(workers, mp.get_context(start_method), initializer=end_with_parent)
    try:
        yield pool
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.kill()
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()
