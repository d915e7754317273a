"""The processes of a training: one, or several on the GPUs of one or more nodes."""

from __future__ import annotations

import warnings

import torch
from lightning_fabric import Fabric


def start_fabric(device: torch.device, devices: int = 1, nodes: int = 1) -> Fabric:
    """Start the processes that share a training.

    With several devices the command is run once more for each by Fabric, or by SLURM (``srun`` with a task
    for each device); all of them come to this place.

    Parameters
    ----------
    device : torch.device
        Its type is that of all devices. An index picks the only one.
    devices : int
        Per node; processes on a CPU.
    nodes : int

    Returns
    -------
    Fabric
        Launched. Arithmetic is left alone: detectors choose the precision of their networks.
    """
    # A node of a cluster has srun, and a training that was not started by it means that.
    warnings.filterwarnings("ignore", "The `srun` command is available", category=UserWarning)
    if devices * nodes == 1:
        fabric = Fabric(
            accelerator=device.type, devices=1 if device.index is None else [device.index], num_nodes=1
        )
    else:
        fabric = Fabric(accelerator=device.type, devices=devices, num_nodes=nodes, strategy="ddp")
    fabric.launch()
    return fabric
