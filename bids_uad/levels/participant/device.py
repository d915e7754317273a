"""Find out about the GPU without touching CUDA in this process, whose workers are still to be started."""

from __future__ import annotations

import subprocess
import sys

from bids_uad.errors import UnavailableError

_PROBE = """
import sys
from bids_uad.errors import UserError
try:
    import torch
    from bids_uad.engine.device import resolve_device
    device = resolve_device(sys.argv[1])
    torch.zeros(1, device=device)
except (UserError, RuntimeError) as error:
    sys.exit(str(error).splitlines()[0])
print(device)
"""


def probe_device(device: str) -> str:
    """Resolve the device that detectors will run on, in a process of its own.

    Parameters
    ----------
    device : str
        `auto`, `cpu`, `cuda` or `cuda:N`.

    Returns
    -------
    str
        `cpu`, `cuda` or `cuda:N`.

    Raises
    ------
    UnavailableError
        If a GPU is asked for and does not work.
    """
    if device == "cpu":
        return device
    probe = subprocess.run(
        [sys.executable, "-c", _PROBE, device], capture_output=True, text=True, check=False
    )
    if probe.returncode == 0:
        return probe.stdout.split()[-1]
    lines = probe.stderr.strip().splitlines() or [f"the check ended with code {probe.returncode}"]
    reason = lines[-1]
    raise UnavailableError(reason if device in reason else f"--device {device}: {reason}")
