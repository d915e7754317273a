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
    from bids_uad.engine.execution import resolve_device, resolve_precision
    device = resolve_device(sys.argv[1])
    torch.zeros(1, device=device)
    precision = resolve_precision(sys.argv[2], device)
except (UserError, RuntimeError) as error:
    sys.exit(str(error).splitlines()[0])
print(device, precision)
"""


def probe_device(device: str, precision: str) -> tuple[str, str]:
    """Resolve where and how precisely detectors will run, in a process of its own.

    Parameters
    ----------
    device : str
        `auto`, `cpu`, `cuda` or `cuda:N`.
    precision : {"auto", "fp32", "bf16"}

    Returns
    -------
    device : str
        `cpu`, `cuda` or `cuda:N`.
    precision : {"fp32", "bf16"}

    Raises
    ------
    UnavailableError
        If a GPU is asked for and does not work, or cannot compute with that precision.
    """
    if device == "cpu":
        return device, "fp32" if precision == "auto" else precision
    probe = subprocess.run(
        [sys.executable, "-c", _PROBE, device, precision], capture_output=True, text=True, check=False
    )
    if probe.returncode == 0:
        device, precision = probe.stdout.split()[-2:]
        return device, precision
    lines = probe.stderr.strip().splitlines() or [f"the check ended with code {probe.returncode}"]
    reason = lines[-1]
    raise UnavailableError(reason if device in reason else f"--device {device}: {reason}")
