from __future__ import annotations

import numpy as np
import torch
from scipy import stats

from bids_uad.simulation import acquisition


def test_slice_matrix_averages_whole_slices():
    signal = np.arange(12, dtype=np.float32)
    thick = acquisition.slice_matrix(12, 3.0, 0.0) @ torch.from_numpy(signal)
    np.testing.assert_allclose(thick.numpy(), signal.reshape(4, 3).mean(1), rtol=1e-6)


def test_slice_matrix_shares_a_cut_slice():
    row = acquisition.slice_matrix(10, 2.5, 0.0)[0].numpy()
    np.testing.assert_allclose(row[:4], [0.4, 0.4, 0.2, 0.0], atol=1e-6)


def test_interpolation_matrix_inverts_slice_matrix_for_a_ramp():
    offset, thickness = 1.5, 4.0
    thick = acquisition.slice_matrix(60, thickness, offset)
    back = acquisition.interpolation_matrix(60, thickness, offset, len(thick))
    ramp = torch.arange(60, dtype=torch.float32)
    np.testing.assert_allclose((back @ thick @ ramp)[8:50].numpy(), ramp[8:50].numpy(), atol=1e-3)


def test_rician_moments():
    noise = acquisition.add_rician_noise(torch.zeros(40, 40, 40), 0.1, np.random.default_rng(0))
    # Rayleigh: mean sigma * sqrt(pi / 2).
    assert abs(float(noise.mean()) - 0.1 * np.sqrt(np.pi / 2)) < 0.002
    bright = acquisition.add_rician_noise(torch.ones(40, 40, 40), 0.05, np.random.default_rng(1))
    assert abs(float(bright.std()) - 0.05) < 0.002


def test_bias_field_has_the_requested_standard_deviation():
    field = acquisition.bias_field(np.random.default_rng(0), 0.2, (64, 64, 64))
    assert abs(float(field.log().std()) - 0.2) < 0.01


def test_draw_scan_settings_has_more_thick_slices_for_t2w():
    scanner = acquisition.draw_scanner(0, False, np.random.default_rng(1))

    for modality, probability in (("T1w", scanner.thick), ("T2w", min(scanner.thick + 0.25, 0.9))):
        rng = np.random.default_rng(0)
        drawn = [acquisition.draw_scan_settings(scanner, modality, rng) for _ in range(3000)]
        thick = sum(settings.thickness > 1 for settings in drawn)
        assert stats.binomtest(thick, len(drawn), probability).pvalue > 0.01
