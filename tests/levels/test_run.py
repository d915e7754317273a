import subprocess
import sys

import pytest

from bids_uad.errors import UnavailableError
from bids_uad.levels.participant import run
from bids_uad.levels.participant.run import probe_device


def test_probe_device_starts_no_process_for_cpu(monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    monkeypatch.setattr(run, "has_gpu_driver", lambda: False)
    assert probe_device("auto", "auto") == ("cpu", "auto")
    assert probe_device("cpu", "auto") == ("cpu", "auto")
    assert probe_device("cpu", "bf16") == ("cpu", "bf16")


def test_probe_device_refuses_a_missing_gpu_in_one_line(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UnavailableError, match="--gpus all") as refused:
        probe_device("cuda", "auto")
    assert "\n" not in str(refused.value)


def test_probe_device_falls_back_to_cpu_without_initializing_cuda(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(run, "has_gpu_driver", lambda: True)
    assert probe_device("auto", "auto") == ("cpu", "auto")
    assert "torch" not in sys.modules or not sys.modules["torch"].cuda.is_initialized()
