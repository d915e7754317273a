"""From the command line to an exit code."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import Timer
from typing import Any

from bids_uad.cli.parser import parse_args
from bids_uad.config import RunConfig
from bids_uad.errors import (
    ConfigError,
    InputError,
    ModelError,
    StorageError,
    UnavailableError,
    UserError,
    existing_part,
    is_writable,
    storage_error,
    unreadable,
)

OK, FAILED, USAGE, NO_INPUT, UNAVAILABLE, SOFTWARE, UNWRITABLE = 0, 1, 2, 66, 69, 70, 73
INTERRUPTED, TERMINATED = 130, 143

_DOORS = {
    "participant": ("bids_uad.levels.participant.run", "run_participant"),
    "train": ("bids_uad.training.train", "run_train"),
    "calibrate": ("bids_uad.training.calibrate", "run_calibrate"),
    "group": ("bids_uad.levels.group", "run_group"),
}


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which schedulers and container engines send before they kill."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run bids_uad.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments; the process's own by default.

    Returns
    -------
    int
        0 all done, 1 a participant or report failed, 2 wrong usage, 66 nothing to work on, 69 a GPU,
        model or atlas is not available, 70 the workflow could not be built, 73 a folder cannot be
        written, 130 interrupted, 143 ended by SIGTERM.
    """
    config = None
    try:
        config = parse_args(argv)
        _set_up_process(config)
        with _orderly_end():
            _check_folders(config)
            return _run_levels(config)
    except (UserError, OSError) as error:
        if config is not None and config.verbosity > 1:
            traceback.print_exc()
        problem = error if isinstance(error, UserError) else _explain(error, config)
        if problem is None:
            raise
        print(f"bids_uad: {problem}", file=sys.stderr)
        return exit_code(problem)
    except KeyboardInterrupt as end:
        print("bids_uad: interrupted; the same command goes on where this run stopped", file=sys.stderr)
        return TERMINATED if isinstance(end, _Terminated) else INTERRUPTED


def exit_code(error: UserError) -> int:
    """Translate an error for the user into the process's exit code."""
    kinds = {
        ConfigError: USAGE,
        InputError: NO_INPUT,
        ModelError: UNAVAILABLE,
        UnavailableError: UNAVAILABLE,
        StorageError: UNWRITABLE,
    }
    return next((code for kind, code in kinds.items() if isinstance(error, kind)), SOFTWARE)


def _check_folders(config: RunConfig) -> None:
    """Refuse output and work folders that cannot be written before anything is done.

    Raises
    ------
    StorageError
        Naming the folder.
    """
    written = [] if config.dry_run else [config.output_dir]
    if not config.dry_run and not config.reports_only and config.levels != ("group",):
        written.append(config.work_dir)
    for folder in written:
        there = existing_part(folder)
        if not there.is_dir():
            raise StorageError(there, errno.ENOTDIR)
        if not is_writable(folder):
            read_only = os.statvfs(there).f_flag & os.ST_RDONLY
            raise StorageError(folder, errno.EROFS if read_only else errno.EACCES)


def _explain(error: OSError, config: RunConfig | None) -> UserError | None:
    """Translate an error of the operating system; None if it does not name a file or folder."""
    folders = [] if config is None else [config.output_dir, config.work_dir]
    if (found := storage_error(str(error), folders, guess=error.errno is None)) is not None:
        in_the_way = found.code in (errno.ENOTDIR, errno.EEXIST) and error.filename is not None
        return StorageError(error.filename, found.code) if in_the_way else found
    return None if error.filename is None else unreadable(error.filename, error)


def _run_levels(config: RunConfig) -> int:
    """Run the levels in order; a failed participant does not keep the group level from running."""
    worst = OK
    for level in config.levels:
        module, function = _DOORS[level]
        code = getattr(importlib.import_module(module), function)(config)
        if code > FAILED:
            return code
        worst = max(worst, code)
    return worst


def _set_up_process(config: RunConfig) -> None:
    """Set logging, and the thread counts that numerical libraries read when they are first imported."""
    from rich.console import Console
    from rich.logging import RichHandler

    threads = str(config.omp_nthreads)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, threads)
    if "OMP_WAIT_POLICY" not in os.environ:
        # Threads that wait for each other soon leave their core to whoever else works on the machine.
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ["NIPYPE_NO_ET"] = os.environ["NO_ET"] = "1"

    logger = logging.getLogger("bids_uad")
    logger.handlers = [
        RichHandler(console=Console(stderr=True), show_path=False, rich_tracebacks=False, markup=False)
    ]
    logger.propagate = False
    logger.setLevel(logging.DEBUG if config.verbosity else logging.INFO)
    if not config.verbosity:
        # It logs what is odd about a header without naming the file; our errors do.
        logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)


@contextmanager
def _orderly_end() -> Iterator[None]:
    """Let SIGTERM end the levels as an interruption does.

    The first process of a container would ignore it, and jobs of a cluster would go on.
    """
    handler, hook = signal.signal(signal.SIGTERM, _terminate), sys.unraisablehook
    sys.unraisablehook = partial(_repeat_interruption, hook)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
        sys.unraisablehook = hook


def _repeat_interruption(otherwise: Callable[[Any], Any], unraisable: Any) -> None:
    """Send a signal again that arrived in a destructor, where Python drops the exception that it raises."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        number = signal.SIGTERM if issubclass(unraisable.exc_type, _Terminated) else signal.SIGINT
        Timer(0.1, os.kill, (os.getpid(), number)).start()
    else:
        otherwise(unraisable)


def _terminate(number: int, frame: object) -> None:
    raise _Terminated
