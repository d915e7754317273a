"""Errors that are told to the user in one line, without a traceback."""

from __future__ import annotations

from os import PathLike
from pathlib import Path


class UserError(Exception):
    """Something the user can put right; the message says what and how."""


class ConfigError(UserError):
    """The command line or a configuration file asks for something impossible."""


class ModelError(UserError):
    """A model bundle is missing, damaged or does not fit the images."""


class UnavailableError(UserError):
    """A resource that was asked for (GPU, atlas) is not on this machine."""


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
    if path.is_symlink() and not path.exists():
        problem = "the file is a link to content that is not here"
        return InputError(path, problem, "fetch it with `datalad get`")
    if isinstance(error, FileNotFoundError):
        return InputError(
            path, "there is no such file (any more)", "check that it was not removed and its disk is mounted"
        )
    return InputError(
        path, f"the file cannot be read ({error.strerror or error})", "check its permissions and its disk"
    )
