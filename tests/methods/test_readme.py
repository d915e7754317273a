"""The README's new detector is the registered one, and one file and one line are enough."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import bids_uad.methods
from bids_uad.constraints import Constrained, Count
from bids_uad.engine.bundle import load_detector, save_bundle
from bids_uad.methods.base import Batch, Detector, FitStage
from bids_uad.methods.intensity import Intensity
from bids_uad.methods.registry import DETECTORS, build_detector
from bids_uad.networks.counter_rng import SliceGenerator
from bids_uad.reports.boilerplate import UsedModel, methods_text

README = Path(bids_uad.methods.__file__).parent / "README.md"


@pytest.fixture
def written():
    """The class that the README spells out."""
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    names = {"dataclass": dataclass, "Constrained": Constrained, "Count": Count, "torch": torch}
    names |= {"Detector": Detector, "FitStage": FitStage}
    exec(compile(code, str(README), "exec", dont_inherit=True), names)  # noqa: S102
    return names["Intensity"]


def test_it_does_what_the_registered_one_does(written):
    generator = torch.Generator().manual_seed(0)
    slices = torch.rand(4, 1, 224, 224, generator=generator) ** 3
    batch = Batch(slices, slices > 0.01)
    none = SliceGenerator(torch.zeros(4, dtype=torch.int64))
    maps = []
    for kind in (written, Intensity):
        detector = kind(kind.presets["lite"])
        (stage,) = detector.stages()
        stage.fit(iter([batch]), generator)
        maps.append(detector.score(slices, batch.brain, none))
    assert maps[0].max() > 0
    assert torch.equal(*maps)


def test_one_line_registers_it(written, monkeypatch, tmp_path):
    monkeypatch.setattr(written, "name", "brightness")
    monkeypatch.setitem(DETECTORS, "brightness", written)
    detector = build_detector("brightness", "lite")
    bundle = save_bundle(
        tmp_path / "brightness-T2w-lite", detector, preset="lite", modality="T2w", training={}, card=""
    )
    assert load_detector(bundle).hyper == detector.hyper
    text = methods_text([UsedModel("brightness", "T2w", "lite", 0.5, "fpr_1pct")])
    assert "Brightness on T2w" in text
