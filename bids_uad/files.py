"""Atomic writing of files, locks between processes, checksums, and reading of tables and JSON."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from bids_uad.errors import ConfigError, InputError, unreadable

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

LOGGER = logging.getLogger("bids_uad")

_TEMPORARY = re.compile(r"\.(?P<host>[0-9a-f]{6})-(?P<pid>[0-9]+)-[0-9a-f]{6}\.(?P<name>.+)")
REMEDY = "run the participant level again for this subject"
"""Remedy for unreadable tables of the participant level."""
MISSING = frozenset({"n/a", "nan", ""})
"""Texts of missing values in tables."""
DEPRECATED_COLUMNS = {"model_has_met": "seen_in_training", "found_share": "detected_fraction"}
"""Names of columns in tables of earlier versions, and their present names."""
ABANDONED_AFTER = 24 * 3600.0
"""Time in s after which a temporary file of a process on another host counts as abandoned."""


@cache
def _host() -> str:
    """Return an identifier of this host or container, within which process ids are unique."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
        parts.append(str(Path("/proc/self/ns/pid").stat().st_ino))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:6]


def temporary_name(name: str) -> str:
    """Return a name for an unfinished file or folder.

    It starts with a dot, so that it is not taken for an output, contains host and process id for
    :func:`remove_unfinished`, and has the extension of `name`, from which writers choose the format.

    Parameters
    ----------
    name : str
        Final name.

    Returns
    -------
    str
        Name that no other file has.
    """
    return f".{_host()}-{os.getpid()}-{uuid.uuid4().hex[:6]}.{name[-200:]}"


@contextmanager
def atomic_path(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `target` that is renamed to it on success.

    Parameters
    ----------
    target : path-like
        Final file; missing parent folders are created.

    Yields
    ------
    pathlib.Path
        Temporary path, removed if the block raises.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / temporary_name(target.name)
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        with suppress(OSError):  # of an unwritable disk, for which the block has raised already
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_paths(targets: Sequence[Path], obsolete: Iterable[Path] = ()) -> Iterator[list[Path]]:
    """Yield temporary paths for files that belong together, see :func:`atomic_path`.

    Existing files are replaced only after all new ones were written, and remain unchanged if a disk is full.

    Parameters
    ----------
    targets : sequence of pathlib.Path
        Final files; the last is renamed last.
    obsolete : iterable of pathlib.Path, optional
        Files that do not match the new ones, and are removed before these are renamed.

    Yields
    ------
    list of pathlib.Path
        Temporary paths in the order of `targets`.
    """
    with ExitStack() as stack:
        temporary = [stack.enter_context(atomic_path(target)) for target in reversed(targets)]
        yield temporary[::-1]
        for path in obsolete:
            path.unlink(missing_ok=True)


@contextmanager
def temporary_folder(parent: Path, name: str) -> Iterator[Path]:
    """Yield a new temporary folder, which is removed at the end unless it was renamed.

    Parameters
    ----------
    parent : pathlib.Path
        Folder to create it in; created if missing.
    name : str
        End of the folder's name.

    Yields
    ------
    pathlib.Path
        The folder.
    """
    folder = parent / temporary_name(name)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes, also on different hosts.

    Parameters
    ----------
    path : pathlib.Path
        Lock file. It is created if missing, and not removed, since other processes may wait for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX)
        except OSError as error:
            LOGGER.warning("%s cannot be locked (%s); do not start jobs at the same time", path, error)
        yield


class NameLocks:
    """Exclusive locks of names between processes, also on different hosts.

    The lock of a name is one byte of a file, which is not written. Locks end with the process.

    Parameters
    ----------
    path : pathlib.Path
        Lock file, created with its folder at the first lock, and not removed. A process must have one object
        per file only, since closing the file ends all locks of the process.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream: TextIO | None = None

    def acquire(self, names: Iterable[str]) -> str | None:
        """Lock all names or, without waiting, none.

        Parameters
        ----------
        names : iterable of str
            Names that this object does not hold.

        Returns
        -------
        str or None
            A name that another process has locked; None if all names are locked now.
        """
        if self._stream is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = self._path.open("a")
        held: list[str] = []
        for name in names:
            try:
                fcntl.lockf(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _offset(name))
            except (BlockingIOError, PermissionError):
                self.release(held)
                return name
            except OSError as error:
                LOGGER.warning(
                    "%s cannot be locked (%s); do not process an image in two jobs at a time",
                    self._path,
                    error,
                )
                return None
            held.append(name)
        return None

    def release(self, names: Iterable[str]) -> None:
        """Unlock names.

        Parameters
        ----------
        names : iterable of str
            Names that this object holds.
        """
        for name in names:
            with suppress(OSError):  # of a file system without locks, see `acquire`
                fcntl.lockf(self._stream, fcntl.LOCK_UN, 1, _offset(name))

    def close(self) -> None:
        """Unlock all names."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def _offset(name: str) -> int:
    """Return the position of a name's byte in a lock file."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")


def remove_unfinished(
    folder: Path, written_here: Callable[[str], bool] = lambda name: False, *, below: bool = False
) -> None:
    """Remove temporary files and folders of killed processes.

    Files of running processes are kept; those of other hosts are removed one day after the last write.

    Parameters
    ----------
    folder : pathlib.Path
        Folder to search.
    written_here : callable, optional
        Function of the final name of a file that returns whether, because of a lock, no other run can be
        writing it; such files are removed in any case. By default there are none.
    below : bool, default=False
        Whether to search subfolders.
    """
    for path in list(folder.glob("**/.*" if below else ".*")):
        match = _TEMPORARY.match(path.name)
        if match and (_is_abandoned(path, match) or written_here(match["name"])):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):
                    path.unlink()


def _is_abandoned(path: Path, match: re.Match[str]) -> bool:
    """Return whether the process in the name of a temporary file has ended, or the file is old."""
    if match["host"] == _host() and not _runs(int(match["pid"])):
        return True
    try:
        return time.time() - path.lstat().st_mtime > ABANDONED_AFTER
    except FileNotFoundError:
        return False


def _runs(pid: int) -> bool:
    """Return whether a process is running and not a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return True
    return state not in ("Z", "X")


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
    return write_text(target, json_text(content))


def json_text(content: dict[str, Any]) -> str:
    """Return `content` as indented JSON; see :func:`write_json`."""
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of a derivative dataset, or a dataset description.

    Parameters
    ----------
    path : pathlib.Path
        The file.

    Returns
    -------
    dict
        Fields of the object; empty if there is no such file.

    Raises
    ------
    ConfigError
        If the file is not valid JSON or does not hold an object.
    InputError
        If the file cannot be read.
    """
    if not path.is_file():
        return {}
    try:
        return parse_json_object(path)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}; repair it") from error


def parse_json_object(path: Path) -> dict[str, Any]:
    """Parse a JSON file that holds an object; callers choose the type of error.

    Parameters
    ----------
    path : pathlib.Path
        The file, in UTF-8 with or without byte order mark.

    Returns
    -------
    dict
        Fields of the object.

    Raises
    ------
    InputError
        If the file cannot be read.
    ValueError
        With the problem as text, if the file is not valid JSON or does not hold an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content


def write_tsv(target: str | os.PathLike[str], table: pd.DataFrame) -> Path:
    """Write `table` as BIDS TSV to `target` atomically (missing values are `n/a`)."""
    with atomic_path(target) as temporary:
        table.to_csv(temporary, sep="\t", index=False, na_rep="n/a", lineterminator="\n")
    return Path(target)


def is_outdated(page: Path, records: Iterable[Path]) -> bool:
    """Return whether a file is missing or older than a record it is written from.

    Parameters
    ----------
    page : pathlib.Path
        File that is written last, such as a report; it is outdated if a run was killed before.
    records : iterable of pathlib.Path
        Records; those that do not exist are ignored.

    Returns
    -------
    bool
        True if the file has to be written again.
    """
    if not page.is_file():
        return True
    written = page.stat().st_mtime_ns
    return any(record.is_file() and record.stat().st_mtime_ns > written for record in records)


def file_sha256(path: Path) -> str:
    """Compute the SHA-256 of a file.

    Parameters
    ----------
    path : pathlib.Path
        The file.

    Returns
    -------
    str
        Hexadecimal digest.
    """
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


CHECKSUMS: dict[Path, str] = {}
"""Checksums by :func:`sha256_of`. The main process takes over those that worker processes have computed."""


def sha256_of(path: Path) -> str:
    """Compute the SHA-256 of a file, stored in `CHECKSUMS` since inputs do not change during a run.

    Parameters
    ----------
    path : pathlib.Path
        The file.

    Returns
    -------
    str
        Hexadecimal digest.

    Raises
    ------
    InputError
        If the file cannot be read, for example because it was removed.
    """
    if path not in CHECKSUMS:
        try:
            CHECKSUMS[path] = file_sha256(path)
        except OSError as error:
            raise unreadable(path, error) from error
    return CHECKSUMS[path]


def read_columns(path: Path, names: Sequence[str], optional: Sequence[str] = ()) -> dict[str, list[str]]:
    """Read columns of a tab-separated table as text, several times faster than pandas for small tables.

    Columns with deprecated names (`DEPRECATED_COLUMNS`) are read under their present names.

    Parameters
    ----------
    path : pathlib.Path
        Table of the participant level.
    names : sequence of str
        Required columns.
    optional : sequence of str, optional
        Columns whose values are `n/a` if they are missing.

    Returns
    -------
    dict of str to list of str
        Values of each column.

    Raises
    ------
    InputError
        If the table or a required column is missing, or rows differ in length.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise InputError(path, "is missing", REMEDY) from error
    except UnicodeDecodeError as error:
        raise InputError(path, f"not a text file ({error})", REMEDY) from error
    lines = list(filter(None, lines))
    header = [DEPRECATED_COLUMNS.get(name, name) for name in lines[0].split("\t")] if lines else []
    missing = [name for name in names if name not in header]
    if missing:
        raise InputError(path, f"no column {', '.join(missing)}", REMEDY)
    width = len(header)
    if {*map(str.count, lines, repeat("\t"))} != {width - 1}:
        raise InputError(path, "rows of different length", REMEDY)
    cells = "\t".join(lines[1:]).split("\t") if lines[1:] else []
    columns = {name: cells[header.index(name) :: width] for name in (*names, *optional) if name in header}
    return dict.fromkeys(optional, ["n/a"] * (len(lines) - 1)) | columns


def read_row(path: Path, names: Sequence[str], optional: Sequence[str] = ()) -> dict[str, str]:
    """Read columns of a table with one row, as text.

    Parameters
    ----------
    path : pathlib.Path
        Table of the participant level.
    names : sequence of str
        Required columns.
    optional : sequence of str, optional
        Columns whose value is `n/a` if they are missing.

    Returns
    -------
    dict of str to str
        Value of each column.

    Raises
    ------
    InputError
        If the table or a required column is missing, or the number of rows is not 1.
    """
    columns = read_columns(path, names, optional)
    n_rows = len(columns[names[0]])
    if n_rows != 1:
        raise InputError(path, f"{n_rows} rows instead of one", REMEDY)
    return {name: values[0] for name, values in columns.items()}


def read_numbers(path: Path, names: Sequence[str]) -> np.ndarray:
    """Read columns of a table as numbers.

    Parameters
    ----------
    path : pathlib.Path
        Table of the participant level.
    names : sequence of str
        Required columns.

    Returns
    -------
    numpy.ndarray of float64, shape (rows, columns)
        Values; NaN if missing.

    Raises
    ------
    InputError
        If the table or a column is missing, or a value is not a number.
    """
    import numpy as np

    columns = read_columns(path, names)
    try:
        return np.array(
            [[float("nan") if text in MISSING else float(text) for text in columns[name]] for name in names]
        ).T
    except ValueError as error:
        raise InputError(path, f"not only numbers ({error})", REMEDY) from error
