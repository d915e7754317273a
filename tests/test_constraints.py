"""Constraints in annotations: what is allowed, and how it is worded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest

from bids_uad.constraints import (
    Constrained,
    Count,
    Interval,
    InvalidParameterError,
    Items,
    Matches,
    OneOf,
    PositiveRange,
    Probability,
    allows,
    describe,
    is_constrained,
)

NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Inner(Constrained):
    """A nested dataclass."""

    side: Count = 1


@dataclass(frozen=True)
class Outer(Constrained):
    """A dataclass with a nested one."""

    inner: Inner = Inner()
    method: Annotated[str, OneOf("mean", "median")] = "mean"


@pytest.mark.parametrize(
    ("annotation", "good", "bad", "words"),
    [
        (bool, [True, False], [1, "yes", None], "a bool"),
        (str, ["", "x"], [1, b"x"], "a str"),
        (Path, [Path("x")], ["x"], "a path"),
        (Inner, [Inner()], [Inner, {"side": 1}], "an instance of 'Inner'"),
        (Count, [1, 10**400], [0, -1, 1.0, True, "1", None, NAN], "an int in the range [1, inf)"),
        (Probability, [0, 0.5, 1], [-1e-9, 1.01, NAN, INF, True, "0"], "a float in the range [0, 1]"),
        (Annotated[float, Interval(0, 1, closed="right")], [0.1, 1], [0], "a float in the range (0, 1]"),
        (Annotated[float, Interval(0, 1, closed="left")], [0, 0.99], [1, 1.0], "a float in the range [0, 1)"),
        (Annotated[float, Interval(0, 1, closed="neither")], [0.5], [0, 1], "a float in the range (0, 1)"),
        (Annotated[float, Interval(-INF)], [-1e300, 0], [INF, NAN], "a float in the range [-inf, inf)"),
        (Annotated[int, Interval(1, 9, odd=True)], [1, 3, 9], [2, 11, 0], "an odd int in the range [1, 9]"),
        (Annotated[str, OneOf("a", "b")], ["a", "b"], ["c", "", None, 1], "one of {'a', 'b'}"),
        (Annotated[str, Matches("x+", "some x")], ["x", "xx"], ["", "xy", 3], "some x"),
        (Count | None, [None, 1], [0, "None"], "an int in the range [1, inf) or None"),
        (
            PositiveRange,
            [(1.0, 2.0), (1, 1)],
            [(2.0, 1.0), (0.0, 1.0), (1.0,), (1.0, 2.0, 3.0), [1.0, 2.0], 1.0],
            "a tuple (a float in the range (0, inf), a float in the range (0, inf)), in ascending order",
        ),
        (
            Annotated[tuple[Count, ...], Items(2, "strictly")],
            [(1, 2), (1, 5, 9)],
            [(), (1,), (1, 1), (2, 1), (0, 1)],
            "a tuple (an int in the range [1, inf), ...) of at least 2 item(s), in strictly ascending order",
        ),
        (tuple[Count, ...], [(), (1,)], [(0,), [1]], "a tuple (an int in the range [1, inf), ...)"),
        (list[Count], [[], [1]], [(1,), [0]], "a list (an int in the range [1, inf), ...)"),
        (dict[str, Count], [{"a": 1}], [{"a": 0}], "a dict (a str, an int in the range [1, inf), ...)"),
        (Any, [None, 1], [], "anything"),
    ],
)  # fmt: skip
def test_annotations_allow_and_describe(annotation, good, bad, words):
    assert [value for value in good if not allows(annotation, value)] == []
    assert [value for value in bad if allows(annotation, value)] == []
    assert describe(annotation) == words


@pytest.mark.parametrize(
    ("annotation", "constrained"),
    [
        (int, False),
        (float | None, False),
        (tuple[int, ...], False),
        (tuple[Count, int], False),
        (Annotated[tuple[int, ...], Items(1)], False),
        (dict[str, Path], False),
        (Any, False),
        (bool, True),
        (Inner, True),
        (Count | None, True),
        (Annotated[tuple[Count, ...], Items(1)], True),
        (Annotated[str, OneOf("a")], True),
    ],
)
def test_plain_number_and_text_types_are_not_constrained(annotation, constrained):
    assert is_constrained(annotation) is constrained


def test_messages_name_owner_parameter_allowed_values_and_value():
    with pytest.raises(InvalidParameterError) as refused:
        Outer(method="maen")
    assert str(refused.value) == (
        "The 'method' parameter of Outer must be one of {'mean', 'median'}. Got 'maen' instead."
    )
    with pytest.raises(
        ValueError, match=r"The 'inner' parameter of Outer must be an instance of 'Inner'\. Got 3"
    ):
        Outer(inner=3)
    with pytest.raises(ValueError, match=r"The 'side' parameter of Inner must be an int .* Got 0 instead\."):
        Outer(inner=Inner(side=0))
