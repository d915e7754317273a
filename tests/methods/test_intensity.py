"""Intensity baseline: polarity of fluid."""

from __future__ import annotations

import pytest
import torch

from bids_uad.methods.base import Batch
from bids_uad.methods.intensity import Intensity, IntensityHyper


@pytest.mark.parametrize(("fluid", "expected"), [(0.95, 0.6), (0.05, 0.4)])
def test_fluid_has_high_scores(fluid, expected):
    brain = torch.zeros(1, 1, 224, 224, dtype=torch.bool)
    brain[..., 50:150, 50:150] = True
    x = torch.full(brain.shape, 0.6) * brain
    x[..., 90:110, 90:110] = fluid
    detector = Intensity(IntensityHyper())
    detector.fit_polarity(iter([Batch(x, brain)]), torch.Generator())
    score = detector.score(x, brain, [])
    assert score[0, 0, 60, 60] == pytest.approx(expected)
    assert score[0, 0, 100, 100] == pytest.approx(0.95)
    assert score[~brain].abs().max() == 0


def test_bright_voxels_of_flair_have_high_scores_though_fluid_is_dark():
    brain = torch.ones(1, 1, 224, 224, dtype=torch.bool)
    x = torch.full(brain.shape, 0.6)
    x[..., 90:110, 90:110], x[..., 10:12, 10:12] = 0.05, 0.9
    detector = Intensity(IntensityHyper(modality="FLAIR"))
    detector.fit_polarity(iter([Batch(x, brain)]), torch.Generator())
    torch.testing.assert_close(detector.score(x, brain, []), x)
