"""The mean of the weights of two models."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.interpolate import interpolate, mean_weights
from bids_uad.engine.bundle import load_bundle, load_detector, save_bundle
from bids_uad.errors import ModelError
from bids_uad.methods.pls.detector import PLS
from bids_uad.training.model_card import VALIDATION


def test_bundle_has_the_mean_of_both_weights(tmp_path):
    card = f"# pls\n\n- Seed 3\n{VALIDATION}\nResults of other weights\n"
    for seed, name in enumerate(("before", "after")):
        torch.manual_seed(seed)
        detector = PLS(PLS.presets["lite"])
        save_bundle(
            tmp_path / name, detector, preset="paper", modality="T1w", training={"steps": seed}, card=card
        )
    bundle = interpolate(tmp_path / "before", tmp_path / "after", tmp_path / "out")
    first, second, mean = (
        load_detector(load_bundle(tmp_path / name)).state_dict() for name in ("before", "after", "out")
    )
    for key, weight in mean.items():
        expected = (first[key].double().numpy() + second[key].double().numpy()) / 2
        np.testing.assert_allclose(weight.numpy(), expected, atol=1e-7)
    assert bundle.info["training"]["steps"] == 1
    assert bundle.info["training"]["mean_with"]["sha256"] == load_bundle(tmp_path / "before").sha256
    text = (tmp_path / "out" / "MODEL_CARD.md").read_text()
    assert f"of before\n(SHA-256 {load_bundle(tmp_path / 'before').sha256[:12]})" in text
    assert "- Seed 3" in text
    assert "Results of other weights" not in text


def test_networks_of_other_shapes_are_refused():
    with pytest.raises(ModelError, match="not of the same network"):
        mean_weights({"weight": torch.zeros(2)}, {"weight": torch.zeros(3)})
