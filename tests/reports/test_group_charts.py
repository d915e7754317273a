"""Charts of the group report: colours, and what is drawn where."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from bids_uad.reports.group_charts import detector_colours
from bids_uad.reports.group_text import DETECTOR_NAMES

KNOWN = list(DETECTOR_NAMES)


def colours_of(detectors):
    return detector_colours(SimpleNamespace(curves=dict.fromkeys((name, "T2w") for name in detectors)))


@pytest.mark.parametrize(
    "detectors",
    [KNOWN[:10], [KNOWN[0], KNOWN[-1]], ["pls", "pls+normative", "disyre", "disyre+normative", "mine"]],
)
def test_ten_detectors_have_ten_colours(detectors):
    colours = colours_of(detectors)
    assert sorted(colours) == sorted(detectors)
    assert len(set(colours.values())) == len(detectors)


def test_a_known_detector_keeps_its_colour_in_other_company():
    alone, among = colours_of(KNOWN[3:4]), colours_of([*KNOWN[:8], "mine", "yours+normative"])
    assert alone[KNOWN[3]] == among[KNOWN[3]]


def test_more_than_ten_share():
    assert len(set(colours_of([*KNOWN, "a", "b", "c"]).values())) == 10
