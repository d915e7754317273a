"""Hyper-parameters to and from the plain values of a bundle's JSON."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints


def hyper_from_values(kind: type, values: dict[str, Any]) -> Any:
    """Rebuild a (nested) hyper-parameter dataclass.

    Parameters
    ----------
    kind : type
        The dataclass.
    values : dict
        As read from JSON: lists for tuples, dictionaries for nested dataclasses.

    Returns
    -------
    instance of `kind`

    Raises
    ------
    ValueError
        If a value is missing or unknown: a bundle says everything about its detector.
    """
    hints = get_type_hints(kind)
    names = {entry.name for entry in fields(kind)}
    if names != set(values):
        odd = sorted(names.symmetric_difference(values))
        raise ValueError(f"hyper-parameters of {kind.__name__} do not match: {', '.join(odd)}")

    def rebuilt(name: str, value: Any) -> Any:
        if is_dataclass(hints[name]):
            return hyper_from_values(hints[name], value)
        return tuple(value) if isinstance(value, list) else value

    return kind(**{name: rebuilt(name, value) for name, value in values.items()})
