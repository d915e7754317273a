"""Progress of long loops: a bar on a terminal, elsewhere lines of text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from bids_uad.errors import duration

Item = TypeVar("Item")
LINES = 40
"""Approximate number of lines of a loop."""


def track(
    items: Iterable[Item], total: int, description: str, write: Callable[[str], object]
) -> Iterator[Item]:
    """Iterate over items, and report how many are done and how long the others will take.

    Parameters
    ----------
    items : iterable
        Items.
    total : int
        Their number.
    description : str
        What is done with them.
    write : callable
        Called with about `LINES` lines of text, unless standard error is a terminal.

    Yields
    ------
    object
        The items.
    """
    console = Console(stderr=True)
    if console.is_terminal:
        with progress_bar(console) as progress:
            yield from progress.track(items, total, description=escape(description))
        return
    begin = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        if is_reported(done, total):
            left = (time.monotonic() - begin) / done * (total - done)
            write(f"{description}: {done} of {total}" + (f"; about {duration(left)} left" if left else ""))


def is_reported(step: int, steps: int) -> bool:
    """Return whether a line is written after a step, counted from 1."""
    return step % max(1, steps // LINES) == 0 or step == steps


def progress_bar(console: Console, *more: ProgressColumn) -> Progress:
    """Build a bar with description, number of steps, time left and further columns."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, *more, console=console)
