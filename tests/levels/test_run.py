import subprocess
import sys

import pytest

from bids_uad.errors import UnavailableError
from bids_uad.levels.participant import run
from bids_uad.levels.participant.run import probe_device
from tests.dataset.skeleton import write_dataset


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


_START = """
import sys
from pathlib import Path
from bids_uad.config import RunConfig
from bids_uad.levels.participant.run import prepare_run
folder = Path(sys.argv[1])
config = RunConfig(folder / "raw", folder / "out", ("participant",), folder / "work", models=("all",))
_, _, context = prepare_run(config)
print(len(context.bundles), "torch" in sys.modules)
"""


def test_start_of_a_run_reads_no_image_and_does_not_import_torch(tmp_path):
    names = [f"sub-01/anat/sub-01_{modality}.nii.gz" for modality in ("T1w", "T2w")]
    write_dataset(tmp_path / "raw", dict.fromkeys(names))
    for name in names:
        (tmp_path / "raw" / name).write_bytes(b"")  # cannot be read
    started = subprocess.run(
        [sys.executable, "-c", _START, str(tmp_path)], capture_output=True, text=True, check=True
    )
    n_models, has_torch = started.stdout.split()
    assert int(n_models) >= 20
    assert has_torch == "False"
