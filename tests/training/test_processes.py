"""Training by several processes gives the weights of a single process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from bids_uad.training.store import SliceStore

from .test_loop import store  # noqa: F401 - a fixture
from .train_toy import PaintedToy, Toy, ToyHyper


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_training_with_two_processes_equals_one(store: SliceStore, tmp_path):  # noqa: F811
    for processes in (1, 2):
        script = Path(__file__).with_name("train_toy.py")
        folder, weights = tmp_path / f"of-{processes}", tmp_path / f"weights-{processes}"
        command = [sys.executable, script, store.folder, folder, str(processes), weights]
        subprocess.run(command, check=True, capture_output=True, timeout=240)
    for kind in (Toy, PaintedToy):
        torch.manual_seed(0)
        start = kind(ToyHyper()).state_dict()
        alone, first, second = (
            load_file(tmp_path / f"weights-{processes}-{kind.name}-{rank}.safetensors")
            for processes, rank in ((1, 0), (2, 0), (2, 1))
        )
        for name, value in alone.items():
            assert torch.equal(first[name], second[name])
            torch.testing.assert_close(first[name], value, atol=1e-5, rtol=1e-4)
            assert (value - start[name]).abs().max() > 5e-3
        losses = [
            pd.read_csv(tmp_path / f"of-{count}" / kind.name / "training.csv")["loss"] for count in (1, 2)
        ]
        np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)
