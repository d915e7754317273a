"""Charts of the group report: colours, and what is drawn where."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from bids_uad.methods.registry import DETECTORS
from bids_uad.reports.group_charts import detector_colours

KNOWN = list(DETECTORS)


def colours_of(detectors):
    return detector_colours(SimpleNamespace(curves=dict.fromkeys((name, "T2w") for name in detectors)))


@pytest.mark.parametrize(
    "detectors",
    [KNOWN, [KNOWN[0], KNOWN[-1]], ["pls", "pls+normative", "disyre", "disyre+normative", "mine"]],
)
def test_detector_colours_differ_between_detectors(detectors):
    colours = colours_of(detectors)
    assert sorted(colours) == sorted(detectors)
    assert len(set(colours.values())) == len(detectors)


def test_detector_colours_of_registered_detectors_do_not_depend_on_the_cohort():
    alone, among = colours_of(KNOWN[3:4]), colours_of([*KNOWN[:8], "mine", "yours+normative"])
    assert alone[KNOWN[3]] == among[KNOWN[3]]


def test_detector_colours_repeat_if_there_are_more_detectors_than_colours():
    assert len(set(colours_of([*KNOWN, "a", "b", "c"]).values())) == len(KNOWN)
