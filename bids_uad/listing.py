"""Lists of names within sentences."""

from __future__ import annotations

from collections.abc import Iterable


def listed(names: Iterable[str], most: int = 20) -> str:
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
