"""Progress of long loops."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from bids_uad import progress
from bids_uad.errors import duration
from bids_uad.progress import LINES, is_reported, track


def test_lines_state_what_is_done_and_how_long_the_others_take(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    lines: list[str] = []
    for number in track(iter("abcd"), 4, "Scoring", lines.append):
        now[0] += 3000.0 if number == "a" else 600.0
    assert lines == [
        "Scoring: 1 of 4; about 2 h 30 min left",
        "Scoring: 2 of 4; about 1 h 0 min left",
        "Scoring: 3 of 4; about 23 min left",
        "Scoring: 4 of 4",
    ]


def test_a_terminal_has_a_bar_and_no_lines(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=screen, force_terminal=True, width=100))
    lines: list[str] = []
    assert list(track("abc", 3, "Scoring [1]", lines.append)) == ["a", "b", "c"]
    assert lines == []
    assert "Scoring [1]" in screen.getvalue()
    assert "3/3" in screen.getvalue()


@pytest.mark.parametrize("steps", [1, 7, 40, 79, 80, 1000, 12_345])
def test_number_of_lines_is_limited_and_the_last_step_is_reported(steps):
    reported = [step for step in range(1, steps + 1) if is_reported(step, steps)]
    assert min(steps, LINES) <= len(reported) < 2 * LINES
    assert reported[-1] == steps


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "1 min"), (89, "1 min"), (3599, "1 h 0 min"), (9000, "2 h 30 min")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text
