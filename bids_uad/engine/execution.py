"""How a detector is run: on what device, how precisely, how many slices at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Annotated, Any

import torch
from torch import Tensor

from bids_uad.constraints import Constrained, Count, OneOf
from bids_uad.errors import UnavailableError
from bids_uad.methods.base import Detector

CPU_BATCH = 8  # more slices at once are no faster on a CPU
GPU_BATCH = 16  # when the batch must not follow from the memory that happens to be free
LARGEST_BATCH = 64
SHARE_OF_FREE = 0.7


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


def resolve_precision(precision: str, device: torch.device) -> str:
    """Turn ``auto`` into ``fp32`` or ``bf16``.

    Half precision is chosen on GPUs that compute in it. On a CPU it is not: it moves about one voxel in a
    hundred of a mask, and small networks hardly gain from it.

    Parameters
    ----------
    precision : {"auto", "fp32", "bf16"}
    device : torch.device

    Raises
    ------
    UnavailableError
        If ``bf16`` is asked for on a GPU that lacks it.
    """
    if precision == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else "fp32"
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise UnavailableError("--precision bf16: this GPU does not compute in bfloat16; use fp32 or auto")
    return precision


@dataclass(frozen=True)
class Execution(Constrained):
    """How a detector is run.

    Parameters
    ----------
    precision : {"fp32", "bf16"}
        ``fp32`` repeats bit for bit on one machine; ``bf16`` lets the convolutions and matrix products of
        networks run in bfloat16.
    batch_size : int, optional
        Slices at once. By default 8 on a CPU, and on a GPU as many as its free memory holds (16 in ``fp32``,
        where nothing may depend on what else the GPU is doing). Halved where memory runs out.
    compiled : bool
        Compile the networks. The first slices then take a minute.
    """

    precision: Annotated[str, OneOf("fp32", "bf16")] = "fp32"
    batch_size: Count | None = None
    compiled: bool = False

    def prepare(self, detector: Detector) -> Detector:
        """Move a detector's networks, in place, to the precision and layout they are run in.

        What a detector computes from its networks' outputs stays in single precision: structural similarity
        and distances lose all their digits in bfloat16.
        """
        detector.to(memory_format=torch.channels_last)
        for network in detector.children():
            if self.precision == "bf16":
                network.forward = _in_bfloat16(network.forward)
            if self.compiled:
                network.compile()
        if self.precision == "fp32":
            torch.backends.cudnn.benchmark = False
            torch.backends.cudnn.deterministic = True
            torch.backends.cudnn.allow_tf32 = False
            torch.backends.cuda.matmul.allow_tf32 = False
        return detector

    def first_batch(self, device: torch.device) -> int:
        """Slices of the first batch; one where a GPU's need has yet to be measured."""
        if self.batch_size is not None:
            return self.batch_size
        if device.type != "cuda":
            return CPU_BATCH
        return GPU_BATCH if self.precision == "fp32" else 1

    def measures(self, device: torch.device, batch_size: int) -> bool:
        """Say whether a batch of `batch_size` is run to learn how much memory a slice takes."""
        free_to_choose = self.batch_size is None and self.precision != "fp32"
        return device.type == "cuda" and free_to_choose and batch_size == 1

    def next_batch(self, device: torch.device, batch_size: int) -> int:
        """Slices of the next batch, after one of `batch_size` went well.

        Parameters
        ----------
        device : torch.device
            Its peak of memory since the last reset is what the batch needed.
        batch_size : int
        """
        if not self.measures(device, batch_size):
            return batch_size
        free, _ = torch.cuda.mem_get_info(device)
        need = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
        return max(1, min(LARGEST_BATCH, int(SHARE_OF_FREE * free / max(1, need))))


PLAIN = Execution()


@contextmanager
def in_precision(detector: Detector, precision: str) -> Iterator[None]:
    """Run a detector's networks in `precision` for a while; what it computes from their outputs is not."""
    networks = list(detector.children()) if precision == "bf16" else []
    for network in networks:
        network.forward = _in_bfloat16(network.forward)
    try:
        yield
    finally:
        for network in networks:
            del network.forward


def _in_bfloat16(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Run a network's forward in bfloat16, and give its outputs back in single precision."""

    @wraps(forward)
    def run(x: Tensor | list[Tensor], *others: Any) -> Tensor | list[Tensor]:
        device = (x if isinstance(x, Tensor) else x[0]).device
        with torch.autocast(device.type, torch.bfloat16):
            output = forward(x, *others)
        return output.float() if isinstance(output, Tensor) else [part.float() for part in output]

    return run


def ran_out_of_memory(error: RuntimeError) -> bool:
    """Say whether an error means that a GPU's or the machine's memory did not suffice."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
