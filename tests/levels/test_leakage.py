from pathlib import Path

import pytest

from bids_uad.engine.bundle import Bundle
from bids_uad.levels.participant.leakage import scanner_seen


@pytest.mark.parametrize(
    ("scanner", "dataset", "training", "expected"),
    [
        ("A", "Second", {"source": "First; Second", "scanners": ["A", "B"]}, "seen"),
        ("A", "Third", {"source": "First; Second", "scanners": ["A", "B"]}, "name seen elsewhere"),
        ("A", None, {"source": "First", "scanners": ["A"]}, "name seen elsewhere"),
        ("C", "First", {"source": "First", "scanners": ["A"]}, "unseen"),
        (None, "First", {"source": "First", "scanners": ["A"]}, None),
        ("A", "First", {"source": "First", "scanners": None}, None),
        ("A", "First", {}, None),
    ],
)
def test_scanner_seen_compares_names_within_a_dataset(scanner, dataset, training, expected):
    bundle = Bundle(Path("x"), {"training": training}, None)
    assert scanner_seen(bundle, scanner, dataset) == expected
