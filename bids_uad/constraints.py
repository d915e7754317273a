"""Constraints of parameters, written in their annotations and checked when a dataclass is constructed.

A dataclass that inherits from :class:`Constrained` checks each of its fields against its annotation::

    @dataclass(frozen=True)
    class Example(Constrained):
        method: Annotated[str, OneOf("mean", "median")] = "mean"
        window: Annotated[int, Interval(1, odd=True)] = 3

The messages are worded as those of scikit-learn: owner, parameter, allowed values, value received.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints


class InvalidParameterError(ValueError):
    """A parameter has a value that is not allowed."""


class OneOf:
    """A choice.

    Parameters
    ----------
    *choices : str
        The allowed values.
    """

    def __init__(self, *choices: str) -> None:
        self.choices = choices

    def allows(self, value: Any) -> bool:
        """Return whether the value is one of the choices."""
        return value in self.choices

    def describe(self, kind: str) -> str:
        """Return the choices in words."""
        return f"one of {{{', '.join(map(repr, self.choices))}}}"


@dataclass(frozen=True)
class Interval:
    """A range of numbers.

    Parameters
    ----------
    low : float
        Smallest number.
    high : float, default=inf
        Largest number; infinity itself is never allowed.
    closed : {"both", "left", "right", "neither"}, default="both"
        Which of the bounds belong to the range.
    odd : bool, default=False
        Whether the number must be odd.
    """

    low: float
    high: float = math.inf
    closed: str = "both"
    odd: bool = False

    def allows(self, value: float) -> bool:
        """Return whether a number lies in the range."""
        above = value >= self.low if self.closed in ("both", "left") else value > self.low
        below = value <= self.high if self.closed in ("both", "right") else value < self.high
        return above and below and value < math.inf and (not self.odd or value % 2 == 1)

    def describe(self, kind: str) -> str:
        """Return the range in words."""
        left = "[" if self.closed in ("both", "left") else "("
        right = "]" if self.closed in ("both", "right") and math.isfinite(self.high) else ")"
        article = "an odd int" if self.odd else kind
        return f"{article} in the range {left}{self.low}, {self.high}{right}"


@dataclass(frozen=True)
class Matches:
    """A pattern that a text must match as a whole.

    Parameters
    ----------
    pattern : str
        Regular expression.
    words : str
        The pattern in words.
    """

    pattern: str
    words: str

    def allows(self, value: str) -> bool:
        """Return whether the text matches."""
        return re.fullmatch(self.pattern, value) is not None

    def describe(self, kind: str) -> str:
        """Return the pattern in words."""
        return self.words


@dataclass(frozen=True)
class Items:
    """Constraints of a sequence as a whole.

    Parameters
    ----------
    least : int, default=1
        Smallest number of items.
    ascending : {"", "strictly", "weakly"}, default=""
        Whether each item must be larger than the one before, or at least as large.
    """

    least: int = 1
    ascending: str = ""

    def allows(self, value: Sequence[Any]) -> bool:
        """Return whether number and order of the items are allowed."""
        pairs = list(pairwise(value))
        if self.ascending == "strictly" and not all(a < b for a, b in pairs):
            return False
        if self.ascending == "weakly" and not all(a <= b for a, b in pairs):
            return False
        return len(value) >= self.least

    def describe(self, kind: str) -> str:
        """Return number and order in words."""
        order = {"": "", "strictly": ", in strictly ascending order", "weakly": ", in ascending order"}
        number = f" of at least {self.least} item(s)" if kind.endswith("...)") else ""
        return f"{kind}{number}{order[self.ascending]}"


Constraint = OneOf | Interval | Matches | Items

Probability = Annotated[float, Interval(0, 1)]
NonNegative = Annotated[float, Interval(0)]
Positive = Annotated[float, Interval(0, closed="right")]
Count = Annotated[int, Interval(1)]
CountOrZero = Annotated[int, Interval(0)]
PositiveRange = Annotated[tuple[Positive, Positive], Items(2, "weakly")]


class Constrained:
    """A dataclass whose fields are checked on construction.

    Constraints on several fields belong in the ``__post_init__`` of a subclass, after that of this class.
    """

    def __post_init__(self) -> None:
        """Check every field."""
        check_parameters(self)


def check_parameters(owner: Any) -> None:
    """Check every field of a dataclass instance against its annotation.

    Parameters
    ----------
    owner : dataclass instance
        Instance whose fields are checked.

    Raises
    ------
    InvalidParameterError
        If a value is not allowed.
    """
    for name, annotation in annotations(type(owner)).items():
        if not allows(annotation, getattr(owner, name)):
            raise invalid(owner, name, describe(annotation))


def invalid(owner: Any, name: str, allowed: str) -> InvalidParameterError:
    """Return the error for a field whose value is not allowed.

    Parameters
    ----------
    owner : dataclass instance
        Instance with the field.
    name : str
        Field of `owner`.
    allowed : str
        Description of the allowed values, which follows "must be".

    Returns
    -------
    InvalidParameterError
        With class, field, allowed values and value in its message.
    """
    return InvalidParameterError(
        f"The {name!r} parameter of {type(owner).__name__} must be {allowed}. "
        f"Got {getattr(owner, name)!r} instead."
    )


@cache
def annotations(kind: type) -> dict[str, Any]:
    """Return the annotation of each field of a dataclass, with its constraints."""
    hints = get_type_hints(kind, include_extras=True)
    return {entry.name: hints[entry.name] for entry in fields(kind)}


def is_constrained(annotation: Any) -> bool:
    """Return whether an annotation constrains the values of numbers and texts, and not only their type.

    Parameters
    ----------
    annotation : type or typing construct
        Annotation of a field. Flags, paths and other classes need no constraint.

    Returns
    -------
    bool
        Whether all numbers and texts in it are constrained.
    """
    if annotation in (int, float, str, Any):
        return False
    origin = get_origin(annotation)
    if origin is Annotated:
        kind, *constraints = get_args(annotation)
        bounds = any(isinstance(constraint, OneOf | Interval | Matches) for constraint in constraints)
        return bounds or is_constrained(kind)
    if origin in (tuple, list, dict, Union, types.UnionType):
        return all(is_constrained(part) for part in get_args(annotation) if part is not ...)
    return True


def allows(annotation: Any, value: Any) -> bool:
    """Return whether a value is of the type of an annotation, and within its constraints.

    Parameters
    ----------
    annotation : type or typing construct
        A class, ``Annotated``, ``tuple``, ``list``, ``dict`` or a union of these. An int is a valid float;
        a bool is not a number.
    value : object
        Value to check.

    Returns
    -------
    bool
        Whether the value is allowed.
    """
    origin, parts = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return True
    if origin is Annotated:
        kind, *constraints = parts
        return allows(kind, value) and all(constraint.allows(value) for constraint in constraints)
    if origin in (Union, types.UnionType):
        return any(allows(part, value) for part in parts)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if parts[-1] is ...:
            return all(allows(parts[0], item) for item in value)
        return len(value) == len(parts) and all(map(allows, parts, value))
    if origin is list:
        return isinstance(value, list) and all(allows(parts[0], item) for item in value)
    if origin is dict:
        key, item = parts
        return isinstance(value, dict) and all(
            allows(key, name) and allows(item, value[name]) for name in value
        )
    if annotation in (int, float) and isinstance(value, bool):
        return False
    if annotation is float:
        return isinstance(value, int | float)
    return isinstance(value, origin or annotation)


def describe(annotation: Any) -> str:
    """Describe the values that an annotation allows, as in "must be an int in the range [1, inf)".

    Parameters
    ----------
    annotation : type or typing construct
        Annotation, see :func:`allows`.

    Returns
    -------
    str
        Phrase without a final stop.
    """
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        kind, *constraints = parts
        words = describe(kind)
        for constraint in constraints:
            words = constraint.describe(words)
        return words
    if origin in (Union, types.UnionType):
        return " or ".join("None" if part is type(None) else describe(part) for part in parts)
    if origin is tuple:
        items = ", ".join("..." if part is ... else describe(part) for part in parts)
        return f"a tuple ({items})"
    if origin in (list, dict):
        return f"a {origin.__name__} ({', '.join(map(describe, parts))}, ...)"
    plain = {Any: "anything", int: "an int", float: "a float", str: "a str", bool: "a bool", Path: "a path"}
    return plain.get(annotation, f"an instance of {getattr(origin or annotation, '__name__', annotation)!r}")
