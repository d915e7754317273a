"""Scaling of both protocols against values computed by hand."""

from __future__ import annotations

import numpy as np

from bids_uad.engine.bundle import CORRECTED, PUBLISHED


def example():
    brain = np.zeros((4, 4, 4), dtype=bool)
    brain[1:3, 1:3, 1:3] = True
    volume = np.full(brain.shape, 9.0)  # intensities outside the brain are ignored
    volume[brain] = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.6]
    return volume, brain


def test_corrected_protocol_clips_at_one():
    scaled, brain = CORRECTED.prepare(*example())
    np.testing.assert_allclose(scaled[brain], [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0])
    assert scaled[~brain].max() == 0
    assert brain.sum() == 8


def test_published_protocol_scales_by_extremes_and_takes_zero_as_background():
    volume, mask = example()
    scaled, brain = PUBLISHED.prepare(volume, mask)
    np.testing.assert_allclose(scaled[mask], np.array([0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.6]) / 1.6)
    assert scaled[~mask].max() == 0
    assert brain.sum() == 7


def test_an_empty_volume_remains_empty():
    nothing = np.zeros((4, 4, 4))
    for protocol in (CORRECTED, PUBLISHED):
        scaled, _ = protocol.prepare(nothing, nothing > 0)
        assert scaled.max() == 0
