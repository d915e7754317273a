"""Files that are either whole or not there."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

LOGGER = logging.getLogger("bids_uad")

_TEMPORARY = re.compile(r"\.[0-9a-f]{8}\.(.+)")


@contextmanager
def atomic_path(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `target` that is renamed to it on success.

    The temporary name keeps the whole extension (`.nii.gz`), since writers choose a format by it, and
    starts with a dot, so that neither BIDS tools nor a reader of the folder take it for an output.

    Parameters
    ----------
    target : path-like
        The final file. Missing parent folders are made.

    Yields
    ------
    pathlib.Path
        Where to write. Removed if the block raises.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{uuid.uuid4().hex[:8]}.{target.name}"
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that other processes, also on other hosts, wait for.

    Parameters
    ----------
    path : pathlib.Path
        A file for this purpose only; made if it is not there, and left there, since others may wait for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX)
        except OSError as error:
            LOGGER.warning("%s cannot be locked (%s); let jobs not start in the same second", path, error)
        yield


@contextmanager
def locked_names(path: Path, names: Iterable[str]) -> Iterator[None]:
    """Hold a lock on each of several names; jobs with other names do not wait.

    Each name is a byte of the file, which is never written. The locks end with the process, however it ends.

    Parameters
    ----------
    path : pathlib.Path
        A file for this purpose only; made if it is not there. A process must not open it twice at a time:
        closing one would end the locks of the other.
    names : iterable of str
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    places = {int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big"): name for name in names}
    with path.open("a") as stream:
        try:
            # In one order in all jobs, so that no two wait for each other.
            for place in sorted(places):
                try:
                    fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
                except (BlockingIOError, PermissionError):
                    LOGGER.info("Waiting for another run that works on %s", places[place])
                    fcntl.lockf(stream, fcntl.LOCK_EX, 1, place)
        except OSError as error:
            LOGGER.warning("%s cannot be locked (%s); do not run two jobs on one image at once", path, error)
        yield


def remove_unfinished(folder: Path, written_here: Callable[[str], bool] = lambda name: True) -> None:
    """Remove temporary files that a killed run left in a folder.

    Parameters
    ----------
    folder : pathlib.Path
    written_here : callable
        Is given the name of the file that would have been written; says whether no other run may be writing
        it now.
    """
    for path in folder.glob(".*"):
        match = _TEMPORARY.match(path.name)
        if match and written_here(match[1]):
            path.unlink(missing_ok=True)


def write_text(target: str | os.PathLike[str], text: str) -> Path:
    """Write `text` (UTF-8) to `target` atomically and return its path."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(target)


def write_json(target: str | os.PathLike[str], content: dict[str, Any]) -> Path:
    """Write `content` as indented JSON to `target` atomically and return its path.

    Raises
    ------
    ValueError
        If a number is NaN or infinite, which JSON cannot hold.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    return write_text(target, f"{text}\n")


def write_tsv(target: str | os.PathLike[str], table: pd.DataFrame) -> Path:
    """Write `table` as BIDS TSV to `target` atomically (missing values are `n/a`)."""
    with atomic_path(target) as temporary:
        table.to_csv(temporary, sep="\t", index=False, na_rep="n/a", lineterminator="\n")
    return Path(target)
