"""Requirements on every registered detector."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bids_uad.methods.base import GradientStage, hyper_from_values
from bids_uad.methods.registry import DETECTORS, build_detector, detector_class
from bids_uad.reports.boilerplate import assets


@pytest.mark.parametrize("name", DETECTORS)
class TestEveryDetector:
    def test_has_its_name_and_a_citation(self, name):
        kind = detector_class(name)
        assert kind.name == name
        bibliography = (assets() / "bids_uad.bib").read_text(encoding="utf-8")
        assert re.search(rf"^@\w+{{{kind.citation},", bibliography, re.MULTILINE)
        fragment = Path(str(assets())) / "methods" / f"{name}.md"
        assert f"@{kind.citation}" in fragment.read_text(encoding="utf-8")

    def test_presets_are_rebuilt_from_plain_values(self, name):
        for preset, hyper in detector_class(name).presets.items():
            with torch.device("meta"):
                detector = build_detector(name, preset)
            assert hyper_from_values(type(hyper), detector.describe()) == hyper

    def test_lite_is_smaller_than_16_mb(self, name):
        detector = build_detector(name, "lite")
        size = sum(value.numel() * value.element_size() for value in detector.state_dict().values())
        assert size < 16e6

    def test_stages_of_lite_have_different_names(self, name):
        stages = build_detector(name, "lite").stages()
        assert len({stage.name for stage in stages}) == len(stages) > 0
        assert all(stage.steps <= 10_000 for stage in stages if isinstance(stage, GradientStage))


def test_unknown_names_raise_an_error_with_the_known_names():
    with pytest.raises(KeyError, match="no detector named 'dog'; there are ddpmpp, andi"):
        build_detector("dog", "lite")
    with pytest.raises(KeyError, match="has no preset 'dog'; it has"):
        build_detector("andi", "dog")


def test_registry_and_report_texts_do_not_import_torch():
    code = (
        "import sys; from bids_uad.reports.group_text import detector_name; "
        "assert detector_name('pls+normative') == 'PLS (Z)'; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
