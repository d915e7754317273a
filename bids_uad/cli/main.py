"""Entry point: run the levels or the subcommand of a command line, and return the exit code."""

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

from bids_uad.cli.parser import TRAINING, parse_args, subcommand_of
from bids_uad.config import SCANS, RunConfig
from bids_uad.errors import (
    ExitCode,
    StorageError,
    UserError,
    describe_os_error,
    existing_part,
    is_writable,
)
from bids_uad.resources import library_environment

LEVEL_RUNNERS = {
    "participant": ("bids_uad.levels.participant.run", "run_participant"),
    "train": ("bids_uad.training.train", "run_train"),
    "calibrate": ("bids_uad.training.calibrate", "run_calibrate"),
    "group": ("bids_uad.levels.group", "run_group"),
    SCANS: ("bids_uad.levels.scans", "run_scans"),
}
"""Module and function of each level, imported when it runs."""
PROGRAMS = {
    "simulate": "bids_uad.simulation.__main__",
    "atlas": "bids_uad.preprocessing.atlas",
    "extraction": "bids_uad.training.brain_extraction",
}
"""Module of each subcommand that has a `main` function with options of its own."""


class _Terminated(KeyboardInterrupt):
    """Raised on SIGTERM, which schedulers and container engines send before SIGKILL."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run bids_uad.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; those of the process by default.

    Returns
    -------
    int
        One of :class:`bids_uad.errors.ExitCode`.
    """
    config = None
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        command = subcommand_of(arguments)
        if command in PROGRAMS:
            return importlib.import_module(PROGRAMS[command]).main(arguments[1:])
        config = parse_args(arguments)
        if command is None:
            _warn_deprecated_levels(config.levels)
        _set_up_process(config)
        with _orderly_end():
            _check_folders(config)
            return _run_levels(config)
    except Exception as error:
        if config is not None and config.verbosity > 1:
            traceback.print_exc()
        folders = [] if config is None else [config.output_dir, config.work_dir]
        problem = describe_os_error(error, folders) if isinstance(error, OSError) else error
        if not isinstance(problem, UserError):
            print(f"bids_uad: {_describe_internal_error(error)}", file=sys.stderr)
            return ExitCode.SOFTWARE
        print(f"bids_uad: {problem}", file=sys.stderr)
        return problem.exit_code
    except KeyboardInterrupt as end:
        print("bids_uad: interrupted; run the same command again to continue", file=sys.stderr)
        return ExitCode.TERMINATED if isinstance(end, _Terminated) else ExitCode.INTERRUPTED


def _describe_internal_error(error: Exception) -> str:
    """Describe an unexpected error and where it was raised, in one line."""
    *_, place = traceback.extract_tb(error.__traceback__)
    text = traceback.format_exception_only(error)[-1].splitlines()[0]
    return (
        f"internal error in {place.name} ({place.filename}:{place.lineno}): {text}; "
        "please report it with the traceback that the same command prints with -vv"
    )


def _warn_deprecated_levels(levels: Sequence[str]) -> None:
    """Print the present spelling of `train` and `calibrate` if they are given as analysis levels."""
    for level in TRAINING:
        if level in levels:
            old, new = (f"'bids_uad {text}'" for text in (f"... {level}", f"{level} DERIVATIVES MODELS"))
            print(f"bids_uad: {old} is deprecated; use {new}", file=sys.stderr)


def _check_folders(config: RunConfig) -> None:
    """Check that the output and work folders can be written.

    Raises
    ------
    StorageError
        If one cannot.
    """
    written = [] if config.dry_run else [config.output_dir]
    if not config.dry_run and not config.reports_only and config.levels != ("group",):
        written.append(config.work_dir)
    for folder in written:
        existing = existing_part(folder)
        if not existing.is_dir():
            raise StorageError(existing, errno.ENOTDIR)
        if not is_writable(folder):
            read_only = os.statvfs(existing).f_flag & os.ST_RDONLY
            raise StorageError(folder, errno.EROFS if read_only else errno.EACCES)


def _run_levels(config: RunConfig) -> int:
    """Run the levels in order; the group level runs even if a participant failed."""
    worst = ExitCode.OK
    for level in config.levels:
        module, function = LEVEL_RUNNERS[level]
        code = getattr(importlib.import_module(module), function)(config)
        if code > ExitCode.FAILED:
            return code
        worst = max(worst, code)
    return worst


def _set_up_process(config: RunConfig) -> None:
    """Set up logging, and the environment that libraries read on import."""
    from rich.console import Console
    from rich.logging import RichHandler

    os.environ.update(library_environment(config.omp_nthreads))
    logger = logging.getLogger("bids_uad")
    logger.handlers = [
        RichHandler(console=Console(stderr=True), show_path=False, rich_tracebacks=False, markup=False)
    ]
    logger.propagate = False
    logger.setLevel(logging.DEBUG if config.verbosity else logging.INFO)
    if not config.verbosity:
        # Its messages about image headers do not name the file; ours do.
        logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)


@contextmanager
def _orderly_end() -> Iterator[None]:
    """End the levels on SIGTERM as on an interruption.

    By default, the first process of a container ignores SIGTERM, and submitted cluster jobs continue.
    """
    handler, hook = signal.signal(signal.SIGTERM, _terminate), sys.unraisablehook
    sys.unraisablehook = partial(_repeat_interruption, hook)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
        sys.unraisablehook = hook


def _repeat_interruption(otherwise: Callable[[Any], Any], unraisable: Any) -> None:
    """Send a signal again whose exception Python dropped, since it was raised in a destructor."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        number = signal.SIGTERM if issubclass(unraisable.exc_type, _Terminated) else signal.SIGINT
        Timer(0.1, os.kill, (os.getpid(), number)).start()
    else:
        otherwise(unraisable)


def _terminate(number: int, frame: object) -> None:
    raise _Terminated
