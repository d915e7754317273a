"""Errors that are told to the user in one line, without a traceback."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from tempfile import gettempdir

_FULL = (errno.ENOSPC, errno.EDQUOT)
_STORAGE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space, or have the quota raised",
    errno.EROFS: "mount it writable",
    errno.EACCES: "get permission to write there",
    errno.EPERM: "get permission to write there",
    errno.ENOTDIR: "remove the file that is where a folder is expected",
    errno.EEXIST: "remove the file that is where a folder is expected",
}
"""What to do about each reason (errno) why a folder cannot be written."""
_NOTHING_LEFT = 1 << 16
"""Free bytes below which a disk is full, and the likely cause of an error that does not give its reason."""


class UserError(Exception):
    """Something the user can put right; the message says what and how."""


class ConfigError(UserError):
    """The command line or a configuration file asks for something impossible."""


class ModelError(UserError):
    """A model bundle is missing, damaged or does not fit the images."""


class UnavailableError(UserError):
    """A resource that was asked for (GPU, atlas) is not on this machine."""


class StorageError(UserError):
    """A folder for outputs or intermediate files cannot be written.

    Parameters
    ----------
    folder : path-like
        The folder, or the file in it.
    code : int
        Reason, as in :mod:`errno`.
    """

    def __init__(self, folder: str | PathLike[str], code: int) -> None:
        remedy = _STORAGE.get(code, "check its disk")
        super().__init__(
            f"{folder}: cannot be written ({os.strerror(code).lower()}); {remedy} or choose another folder, "
            "and run the same command again, which goes on where this run stopped"
        )
        self.folder, self.code = str(folder), code

    def __reduce__(self) -> tuple:
        return type(self), (self.folder, self.code)


def storage_error(message: str, folders: Sequence[Path], *, guess: bool = False) -> StorageError | None:
    """Find out whether an error means that a folder cannot be written.

    Parameters
    ----------
    message : str
        Of the error, which may come from another process or program.
    folders : sequence of pathlib.Path
        Where outputs and intermediate files go. The folder for temporary files counts as one of them.
    guess : bool, default=False
        Whether an error that does not give a reason is put down to a full disk, if a disk is full.

    Returns
    -------
    StorageError or None
        None if the error means something else, such as an input that cannot be read.
    """
    code = next((code for code in _STORAGE if os.strerror(code) in message), None)
    if code in (*_FULL, errno.EROFS):
        folders = [*folders, Path(gettempdir())]
    named = [folder for folder in folders if str(folder) in message or repr(str(folder))[1:-1] in message]
    if named and code is not None:
        return StorageError(max(named, key=lambda folder: len(str(folder))), code)
    if code in _FULL:
        return StorageError(min(folders, key=_free_bytes), code)
    if code == errno.EROFS:
        return StorageError(next((folder for folder in folders if not is_writable(folder)), folders[0]), code)
    full = [folder for folder in folders if _free_bytes(folder) < _NOTHING_LEFT]
    return StorageError(full[0], errno.ENOSPC) if guess and full else None


def existing_part(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    return next((path for path in (folder, *folder.parents) if os.path.lexists(path)), folder)


def is_writable(folder: Path) -> bool:
    """Return whether files can be made in a folder, or the folder itself where it does not exist."""
    return os.access(existing_part(folder), os.W_OK | os.X_OK)


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(existing_part(folder)).free


class InputError(UserError):
    """An input file cannot be used.

    Parameters
    ----------
    path : path-like
        The file at fault.
    problem : str
        What is wrong with it.
    remedy : str
        What the user can do about it.
    """

    def __init__(self, path: str | PathLike[str], problem: str, remedy: str) -> None:
        super().__init__(f"{path}: {problem}; {remedy}")
        self.path = str(path)
        self.problem = problem
        self.remedy = remedy

    def __reduce__(self) -> tuple:
        # The default would rebuild it from the message alone, and fail in a worker process.
        return type(self), (self.path, self.problem, self.remedy)


def unreadable(path: str | PathLike[str], error: OSError) -> InputError:
    """Describe a file that the operating system does not let us read.

    Parameters
    ----------
    path : path-like
        The file.
    error : OSError
        What opening or reading it raised.

    Returns
    -------
    InputError
        It tells links to content that is elsewhere (git-annex) from files that are missing.
    """
    path = Path(path)
    # Path's own methods raise where a folder may not be entered.
    if os.path.islink(path) and not os.path.exists(path):  # noqa: PTH110, PTH114
        problem = "the file is a link to content that is not here"
        return InputError(path, problem, "fetch it with `datalad get`")
    if isinstance(error, FileNotFoundError):
        return InputError(
            path, "there is no such file (any more)", "check that it was not removed and its disk is mounted"
        )
    return InputError(
        path, f"the file cannot be read ({error.strerror or error})", "check its permissions and its disk"
    )


def truncate_list(names: Iterable[str], most: int = 20) -> str:
    """Name the first few of many, and say how many more there are.

    Parameters
    ----------
    names : iterable of str
        Named in their order.
    most : int

    Returns
    -------
    str
        Such as ``sub-01, sub-02 and 5 more``.
    """
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
