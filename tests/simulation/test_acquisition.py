from __future__ import annotations

import numpy as np
import torch

from bids_uad.simulation import acquisition


def test_slice_matrix_averages_whole_slices():
    signal = np.arange(12, dtype=np.float32)
    thick = acquisition.slice_matrix(12, 3.0, 0.0) @ torch.from_numpy(signal)
    np.testing.assert_allclose(thick.numpy(), signal.reshape(4, 3).mean(1), rtol=1e-6)


def test_slice_matrix_shares_a_cut_slice():
    row = acquisition.slice_matrix(10, 2.5, 0.0)[0].numpy()
    np.testing.assert_allclose(row[:4], [0.4, 0.4, 0.2, 0.0], atol=1e-6)


def test_interpolation_puts_slices_back_where_they_were():
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


def test_bias_field_has_the_asked_strength():
    field = acquisition.bias_field(np.random.default_rng(0), 0.2, (64, 64, 64))
    assert abs(float(field.log().std()) - 0.2) < 0.01


def test_protocols_are_thick_more_often_for_t2w():
    scanner = acquisition.draw_scanner(0, False, np.random.default_rng(1))

    def share(modality: str) -> float:
        rng = np.random.default_rng(0)
        drawn = [acquisition.draw_scan_settings(scanner, modality, rng) for _ in range(300)]
        return np.mean([p.thickness > 1 for p in drawn])

    assert share("T2w") > share("T1w") + 0.1
