"""Hyper-parameters from plain values: those of a bundle's JSON, and those that a user changes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass, replace
from typing import Any, get_type_hints

from bids_uad.constraints import check_parameters


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
        If a name is unknown, one without a default is missing, or a value is not allowed. The default of an
        option stands for what was done before it came, which is what older bundles mean.
    """
    hints = get_type_hints(kind)
    names = {entry.name for entry in fields(kind)}
    needed = {
        entry.name for entry in fields(kind) if entry.default is MISSING and entry.default_factory is MISSING
    }
    odd = sorted((set(values) - names) | (needed - set(values)))
    if odd:
        raise ValueError(f"hyper-parameters of {kind.__name__} do not match: {', '.join(odd)}")

    def rebuilt(name: str, value: Any) -> Any:
        if is_dataclass(hints[name]) and isinstance(value, dict):
            return hyper_from_values(hints[name], value)
        return tuple(value) if isinstance(value, list) else value

    hyper = kind(**{name: rebuilt(name, value) for name, value in values.items()})
    check_parameters(hyper)
    return hyper


def change_hyper(hyper: Any, changes: Sequence[str]) -> Any:
    """Replace hyper-parameters by what a user gave.

    Parameters
    ----------
    hyper : dataclass
    changes : sequence of str
        ``NAME=VALUE``, the value as in JSON: ``stride=4``, ``labels=[74, 24]``.

    Returns
    -------
    dataclass
        Of the same kind.

    Raises
    ------
    ValueError
        If there is no such hyper-parameter, or the value is not allowed.
    """
    plain = {
        entry.name: getattr(hyper, entry.name)
        for entry in fields(hyper)
        if not is_dataclass(getattr(hyper, entry.name))
    }
    found = {}
    for change in changes:
        name, _, text = change.partition("=")
        if name not in plain:
            raise ValueError(f"no hyper-parameter {name!r}; there are {', '.join(plain)}")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        if isinstance(value, list):
            value = tuple(value)
        if isinstance(plain[name], float) and type(value) is int:
            value = float(value)
        found[name] = value
    changed = replace(hyper, **found)
    check_parameters(changed)
    return changed


def names_of(changes: Sequence[str]) -> list[str]:
    """Give the names of the hyper-parameters that ``NAME=VALUE`` items change."""
    return [change.partition("=")[0] for change in changes]
