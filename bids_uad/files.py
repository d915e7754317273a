"""Files that are either whole or not there."""

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
from typing import TYPE_CHECKING, Any

from bids_uad.errors import ConfigError, InputError, unreadable

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

LOGGER = logging.getLogger("bids_uad")

_TEMPORARY = re.compile(r"\.(?P<host>[0-9a-f]{6})-(?P<pid>[0-9]+)-[0-9a-f]{6}\.(?P<name>.+)")
REMEDY = "run the participant level again for this subject"
"""What to do about a table of the participant level that cannot be read."""
MISSING = frozenset({"n/a", "nan", ""})
"""Texts that stand for a missing number."""
ABANDONED_AFTER = 24 * 3600.0
"""Seconds after which the temporary file of a process that cannot be asked about is no longer in use."""


@cache
def _host() -> str:
    """Return a mark of this host or container, within which a number stands for one process."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
        parts.append(str(Path("/proc/self/ns/pid").stat().st_ino))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:6]


def temporary_name(name: str) -> str:
    """Return a name for a file or folder that is not finished yet.

    It starts with a dot, so that neither BIDS tools nor a reader of the folder take it for an output, names
    the process that writes it, for :func:`remove_unfinished`, and ends as `name` does, since writers choose
    a format by the extension.

    Parameters
    ----------
    name : str
        The final name.

    Returns
    -------
    str
    """
    return f".{_host()}-{os.getpid()}-{uuid.uuid4().hex[:6]}.{name[-200:]}"


@contextmanager
def atomic_path(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `target` that is renamed to it on success.

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
    temporary = target.parent / temporary_name(target.name)
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        with suppress(OSError):  # of a disk that cannot be written, which the block has raised already
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_paths(targets: Sequence[Path], obsolete: Iterable[Path] = ()) -> Iterator[list[Path]]:
    """Yield temporary paths for files that belong together, as :func:`atomic_path` does for one.

    Nothing of what is there is touched before all of the files are written: a full disk leaves it as it was.

    Parameters
    ----------
    targets : sequence of pathlib.Path
        The final files, of which the last is renamed last.
    obsolete : iterable of pathlib.Path
        Files that do not hold together with the new ones, and are removed before these appear.

    Yields
    ------
    list of pathlib.Path
        Where to write, in the order of `targets`.
    """
    with ExitStack() as stack:
        temporary = [stack.enter_context(atomic_path(target)) for target in reversed(targets)]
        yield temporary[::-1]
        for path in obsolete:
            path.unlink(missing_ok=True)


@contextmanager
def temporary_folder(parent: Path, name: str) -> Iterator[Path]:
    """Yield a new folder for unfinished or passing files, which is removed at the end, unless it was renamed.

    Parameters
    ----------
    parent : pathlib.Path
        Made if missing.
    name : str
        What the folder is for; the end of its name.

    Yields
    ------
    pathlib.Path
    """
    folder = parent / temporary_name(name)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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


def remove_unfinished(
    folder: Path, written_here: Callable[[str], bool] = lambda name: False, *, below: bool = False
) -> None:
    """Remove the temporary files and folders of processes that were killed.

    What another process is writing stays: on this host the number of the process tells whether it runs, and a
    file of another host is taken for abandoned a day after it was last written to.

    Parameters
    ----------
    folder : pathlib.Path
    written_here : callable, optional
        Is given the name of the file that would have been written; says whether it is certain, because of a
        lock, that no other run is writing it now. By default it never is.
    below : bool, default=False
        Whether to look into the folders below it, too.
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
    """Return whether the process that a temporary file names will not finish it."""
    if match["host"] == _host() and not _runs(int(match["pid"])):
        return True
    try:
        return time.time() - path.lstat().st_mtime > ABANDONED_AFTER
    except FileNotFoundError:
        return False


def _runs(pid: int) -> bool:
    """Return whether a process runs; one that has ended and was not waited for does not."""
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
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise unreadable(path, error) from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error}); repair it") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: not a JSON object; repair it")
    return content


def write_tsv(target: str | os.PathLike[str], table: pd.DataFrame) -> Path:
    """Write `table` as BIDS TSV to `target` atomically (missing values are `n/a`)."""
    with atomic_path(target) as temporary:
        table.to_csv(temporary, sep="\t", index=False, na_rep="n/a", lineterminator="\n")
    return Path(target)


@cache
def sha256_of(path: Path) -> str:
    """Compute the SHA-256 of a file's bytes; inputs do not change during a run.

    Raises
    ------
    InputError
        If the file cannot be read, for example because it was removed.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise unreadable(path, error) from error
    return digest.hexdigest()


def read_columns(path: Path, names: Sequence[str], optional: Sequence[str] = ()) -> dict[str, list[str]]:
    """Read the named columns of a tab-separated table as text, optional ones as n/a where they lack.

    Tables are many and small: parsing them here is several times faster than pandas.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise InputError(path, "is missing", REMEDY) from error
    except UnicodeDecodeError as error:
        raise InputError(path, f"not a text file ({error})", REMEDY) from error
    lines = list(filter(None, lines))
    header = lines[0].split("\t") if lines else []
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
    """Read the named columns of a table that has one row, as text.

    Parameters
    ----------
    path : pathlib.Path
    names : sequence of str
    optional : sequence of str
        Columns that may lack, and are `n/a` then.

    Returns
    -------
    dict of str to str

    Raises
    ------
    InputError
        If the table or a column is missing, or there is not one whole row.
    """
    columns = read_columns(path, names, optional)
    n_rows = len(columns[names[0]])
    if n_rows != 1:
        raise InputError(path, f"{n_rows} rows instead of one", REMEDY)
    return {name: values[0] for name, values in columns.items()}


def read_numbers(path: Path, names: Sequence[str]) -> np.ndarray:
    """Read the named columns of a table as numbers.

    Parameters
    ----------
    path : pathlib.Path
    names : sequence of str

    Returns
    -------
    numpy.ndarray of float64, shape (rows, columns)
        NaN where a value is missing.

    Raises
    ------
    InputError
        If the table or a column is missing, or holds something else.
    """
    import numpy as np

    columns = read_columns(path, names)
    try:
        return np.array(
            [[float("nan") if text in MISSING else float(text) for text in columns[name]] for name in names]
        ).T
    except ValueError as error:
        raise InputError(path, f"not only numbers ({error})", REMEDY) from error
