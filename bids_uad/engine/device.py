"""Which device to compute on."""

from __future__ import annotations

import torch

from bids_uad.errors import UnavailableError


def resolve_device(device: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` into a device.

    Raises
    ------
    UnavailableError
        If a GPU is asked for and there is none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UnavailableError(
            f"--device {device}: no GPU is visible; start the container with `--gpus all` (Docker) or `--nv` "
            "(Apptainer), or use --device cpu"
        )
    return torch.device(device)
