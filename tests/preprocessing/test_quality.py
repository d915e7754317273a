"""What is doubted, and what is ruled out."""

from __future__ import annotations

import numpy as np
import pytest

from bids_uad.preprocessing.quality import assess_quality
from bids_uad.space import SHAPE

REGISTRATION = {
    "similarity": 0.3,
    "mirrored_similarity": 0.29,
    "local_correlation": 0.5,
    "mask_overlap": 0.95,
    "restarted": False,
}


def box(low: int, high: int) -> np.ndarray:
    """A cube of (high - low)^3 mm3."""
    mask = np.zeros(SHAPE, bool)
    mask[low:high, low:high, 20 : 20 + high - low] = True
    return mask


REFERENCE = box(60, 172)  # 1.4 L


def seen_up_to(height: int) -> np.ndarray:
    """A field of view that ends below a slice."""
    covered = np.ones(SHAPE, bool)
    covered[:, :, height:] = False
    return covered


def judged(**changes):
    inputs = {
        "registration": REGISTRATION,
        "skull_stripped": True,
        "mask_origin": "background",
        "rotation": 8.0,
        "brain": REFERENCE,
        "reference": REFERENCE,
        "covered": np.ones(SHAPE, bool),
        "lesion": None,
        "image": {"cjv": 0.43219},
        "warnings": {},
    }
    inputs |= {"native_volume_mm3": float(changes.get("brain", REFERENCE).sum())}
    return assess_quality(**inputs | changes)


def test_a_good_scan_has_neither_doubts_nor_failures() -> None:
    found = judged()
    assert (found["warnings"], found["failures"]) == ([], [])
    assert found["mask_overlap"] == 1.0
    assert found["brain_volume_mm3"] == 112**3
    assert found["cjv"] == 0.4322


@pytest.mark.parametrize(
    ("changes", "word", "failed"),
    [
        ({"brain": np.roll(REFERENCE, 25, axis=0)}, "only 0.78 (Dice)", False),  # 87 / 112 by hand
        ({"brain": np.roll(REFERENCE, 40, axis=0)}, "check the registration", True),
        ({"brain": box(70, 164)}, "831 mL", False),
        ({"brain": box(76, 152)}, "439 mL", True),
        ({"brain": box(72, 160)}, "681 mL", True),
        ({"covered": seen_up_to(128)}, "4 % of the reference brain lie outside", False),  # 4 of 112 slices
        ({"covered": seen_up_to(90)}, "38 % of the reference brain lie outside", True),  # 42 of 112
        ({"native_volume_mm3": 1.25 * REFERENCE.sum()}, "Only 80 %", False),
        ({"native_volume_mm3": 2.0 * REFERENCE.sum()}, "Only 50 %", True),
        ({"rotation": 95.0}, "rotated the head by 95 degrees", True),
        ({"registration": REGISTRATION | {"restarted": True}}, "restarted", False),
        ({"lesion": ~REFERENCE}, "of the lesion mask", False),
        (
            {"registration": REGISTRATION | {"similarity": 0.02, "mirrored_similarity": None}},
            "is only 0.020",
            False,
        ),
        (
            {"registration": REGISTRATION | {"similarity": 0.01, "mirrored_similarity": None}},
            "is only 0.010",
            True,
        ),
        ({"registration": REGISTRATION | {"mirrored_similarity": 0.33}}, "left and right swapped", False),
        ({"registration": REGISTRATION | {"mirrored_similarity": 0.6}}, "left and right swapped", True),
        ({"warnings": {"The forms disagree.": False}}, "forms disagree", False),
        ({"warnings": {"Left is right.": True}}, "Left is right", True),
    ],
)
def test_doubts_are_told_and_failures_ruled_out(changes, word: str, failed: bool) -> None:
    found = judged(**changes)
    assert any(word in text for text in found["warnings"])
    assert bool(found["failures"]) == failed
    assert set(found["failures"]) <= set(found["warnings"])


def test_a_similarity_that_is_not_a_number_is_a_failed_registration() -> None:
    found = judged(registration=REGISTRATION | {"similarity": float("nan")})
    assert found["similarity"] is None
    assert any("similarity of the scan and its registration target" in text for text in found["failures"])
