import subprocess
import sys

import pytest

from bids_uad.errors import UnavailableError
from bids_uad.levels.participant.run import probe_device


def test_cpu_needs_no_probe(monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    assert probe_device("cpu", "auto") == ("cpu", "fp32")
    assert probe_device("cpu", "bf16") == ("cpu", "bf16")


def test_explicit_gpu_without_one_fails_with_a_hint(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UnavailableError, match="--gpus all") as refused:
        probe_device("cuda", "auto")
    assert "\n" not in str(refused.value)


def test_auto_falls_back_without_a_gpu_and_leaves_cuda_alone_here(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert probe_device("auto", "auto") == ("cpu", "fp32")
    assert "torch" not in sys.modules or not sys.modules["torch"].cuda.is_initialized()
