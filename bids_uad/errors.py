"""Errors that the command line reports in one line without a traceback, exit codes, and text for messages."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Sequence
from enum import IntEnum
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
"""Remedy for each reason (errno) why a folder cannot be written."""
_STORAGE_MESSAGES = {os.strerror(code): code for code in _STORAGE} | {
    "Not enough free space to write": errno.ENOSPC  # NumPy, whose error has no number
}
"""Reason (errno) by what the message of an error contains."""
_DISK_FULL_BYTES = 1 << 16
"""Free space in bytes below which a disk counts as full."""


class ExitCode(IntEnum):
    """Exit codes of the command line, those from 66 to 73 as in `sysexits.h`, and what they mean."""

    meaning: str

    def __new__(cls, code: int, meaning: str) -> ExitCode:
        """Create a member from its code and meaning."""
        member = int.__new__(cls, code)
        member._value_ = code
        member.meaning = meaning
        return member

    OK = 0, "all requested outputs exist"
    FAILED = 1, "an image, participant or report failed, the others are complete"
    USAGE = 2, "wrong usage"
    NO_INPUT = 66, "no usable input"
    UNAVAILABLE = 69, "GPU, model or atlas not available"
    SOFTWARE = 70, "internal error"
    UNWRITABLE = 73, "folder not writable or disk full"
    INTERRUPTED = 130, "interrupted (Ctrl-C)"
    TERMINATED = 143, "terminated (SIGTERM)"


class UserError(Exception):
    """An error that the user can correct; the message names the cause and the remedy."""

    exit_code = ExitCode.SOFTWARE


class ConfigError(UserError):
    """An option of the command line or of a configuration file is not valid."""

    exit_code = ExitCode.USAGE


class ModelError(UserError):
    """A model bundle is missing, damaged or does not fit the images."""

    exit_code = ExitCode.UNAVAILABLE


class UnavailableError(UserError):
    """A requested resource (GPU, atlas) is not available."""

    exit_code = ExitCode.UNAVAILABLE


class StorageError(UserError):
    """A folder for outputs or intermediate files cannot be written.

    Parameters
    ----------
    folder : path-like
        The folder, or the file in it.
    code : int
        Reason, as in :mod:`errno`.
    """

    exit_code = ExitCode.UNWRITABLE

    def __init__(self, folder: str | PathLike[str], code: int) -> None:
        remedy = _STORAGE.get(code, "check its disk")
        super().__init__(
            f"{folder}: cannot be written ({os.strerror(code).lower()}); {remedy} or choose another folder, "
            "and run the same command again to continue"
        )
        self.folder, self.code = str(folder), code

    def __reduce__(self) -> tuple:
        return type(self), (self.folder, self.code)


def storage_error(message: str, folders: Sequence[Path], *, guess: bool = False) -> StorageError | None:
    """Return the storage error that an error message describes.

    Parameters
    ----------
    message : str
        Message of the error, which may come from another process or program.
    folders : sequence of pathlib.Path
        Output and work folders. The folder for temporary files is checked, too.
    guess : bool, default=False
        Whether an error without a known reason is attributed to a full disk, if one of the disks is full.

    Returns
    -------
    StorageError or None
        None if the error has another cause, such as an unreadable input.
    """
    code = next((code for text, code in _STORAGE_MESSAGES.items() if text in message), None)
    if code in (*_FULL, errno.EROFS):
        folders = [*folders, Path(gettempdir())]
    named = [folder for folder in folders if str(folder) in message or repr(str(folder))[1:-1] in message]
    if named and code is not None:
        return StorageError(max(named, key=lambda folder: len(str(folder))), code)
    if code in _FULL:
        return StorageError(min(folders, key=_free_bytes), code)
    if code == errno.EROFS:
        return StorageError(next((folder for folder in folders if not is_writable(folder)), folders[0]), code)
    full = [folder for folder in folders if _free_bytes(folder) < _DISK_FULL_BYTES]
    return StorageError(full[0], errno.ENOSPC) if guess and full else None


def describe_os_error(error: OSError, folders: Sequence[Path]) -> UserError | None:
    """Return the error for the user that describes an error of the system.

    Parameters
    ----------
    error : OSError
        Error that a file or folder has caused.
    folders : sequence of pathlib.Path
        Output and work folders; may be empty.

    Returns
    -------
    UserError or None
        None if the error names no file or folder.
    """
    if (found := storage_error(str(error), folders, guess=error.errno is None)) is not None:
        in_the_way = found.code in (errno.ENOTDIR, errno.EEXIST) and error.filename is not None
        return StorageError(error.filename, found.code) if in_the_way else found
    return None if error.filename is None else unreadable(error.filename, error)


def existing_part(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    return next((path for path in (folder, *folder.parents) if os.path.lexists(path)), folder)


def is_writable(folder: Path) -> bool:
    """Return whether files can be created in a folder; if it does not exist, whether it can be created."""
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

    exit_code = ExitCode.NO_INPUT

    def __init__(self, path: str | PathLike[str], problem: str, remedy: str) -> None:
        super().__init__(f"{path}: {problem}; {remedy}")
        self.path = str(path)
        self.problem = problem
        self.remedy = remedy

    def __reduce__(self) -> tuple:
        # The default would rebuild it from the message alone, and fail in a worker process.
        return type(self), (self.path, self.problem, self.remedy)


def unreadable(path: str | PathLike[str], error: OSError) -> InputError:
    """Return the error that reports an unreadable input file.

    Links to content that is not present (git-annex), missing files and other errors have different messages.

    Parameters
    ----------
    path : path-like
        The file.
    error : OSError
        Error raised when it was opened or read.

    Returns
    -------
    InputError
        With cause and remedy.
    """
    path = Path(path)
    # Path's own methods raise if a parent folder may not be entered.
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


def truncate_list(names: Iterable[str], most: int = 20, last: str = ",") -> str:
    """Join names by commas, and replace those after the first few by their number.

    Parameters
    ----------
    names : iterable of str
        Names, printed in this order.
    most : int, default=20
        Maximum number of names that are printed.
    last : {",", "or"}, default=","
        What joins the last two names.

    Returns
    -------
    str
        For example ``sub-01, sub-02 and 5 more``, or ``T1w, T2w or FLAIR``.
    """
    names = list(names)
    if last == "or" and 1 < len(names) <= most:
        return f"{', '.join(names[:-1])} or {names[-1]}"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def duration(seconds: float) -> str:
    """Return a duration in hours and minutes, in text."""
    hours, minutes = divmod(max(1, round(seconds / 60)), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
