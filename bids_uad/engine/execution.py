"""Device, precision and batch size with which a detector is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from bids_uad.constraints import Constrained, Count, OneOf
from bids_uad.errors import UnavailableError
from bids_uad.methods.base import Detector
from bids_uad.methods.registry import cpu_precision, warn_if_emulated
from bids_uad.networks.backbones import fold_batch_norm
from bids_uad.networks.ddpmpp import DDPMpp, ResidualBlock

CPU_BATCH = 8
"""Largest number of slices per batch on a CPU; larger batches are not faster."""
CPU_CACHE = 16 * 2**20
"""Bytes that the feature maps of a batch may take at the finest level of a U-Net, for the cache of a CPU."""
GPU_BATCH = 16
"""Slices per batch on a GPU in fp32, fixed so that results do not depend on free memory."""
LARGEST_BATCH = 64
"""Largest number of slices per batch."""
FREE_MEMORY_FRACTION = 0.7
"""Fraction of the free GPU memory that a batch may take."""


def resolve_device(device: str) -> torch.device:
    """Resolve the name of a device.

    Parameters
    ----------
    device : str
        ``auto`` (a CUDA GPU if there is one), ``cpu``, ``cuda``, ``cuda:N``, or ``mps`` (Apple silicon).

    Returns
    -------
    torch.device
        The device.

    Raises
    ------
    UnavailableError
        If a GPU is requested and none is visible, or ``mps`` where PyTorch does not have it.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UnavailableError(
            f"--device {device}: no GPU is visible; start the container with `--gpus all` (Docker) or `--nv` "
            "(Apptainer), or use --device cpu"
        )
    if device == "mps" and not torch.backends.mps.is_available():
        raise UnavailableError(
            "--device mps: PyTorch finds no GPU of Apple silicon, which requires macOS 14 on an arm64 Mac "
            "and is not visible in containers; use --device cpu"
        )
    return torch.device(device)


def resolve_precision(
    precision: str, device: torch.device, detector: str | None = None, *, published: bool = False
) -> str:
    """Resolve ``auto`` to ``bf16`` on GPUs that support it, and on a CPU by the detector.

    A warning is logged if ``bf16`` is requested on a CPU without instructions for it.

    Parameters
    ----------
    precision : {"auto", "fp32", "bf16"}
        Requested precision.
    device : torch.device
        Device on which the detector is run.
    detector : str, optional
        Name of the detector whose scores are computed. In training and calibration (None), ``auto`` is
        ``fp32`` on a CPU.
    published : bool, default=False
        Whether the preset is ``paper``, for which ``auto`` is ``fp32``.

    Returns
    -------
    str
        ``fp32`` or ``bf16``; on a CPU that of :func:`~bids_uad.methods.registry.cpu_precision`.

    Raises
    ------
    UnavailableError
        If ``bf16`` is requested on a GPU that does not support it, or with ``mps``.
    """
    if precision == "auto" and published:
        return "fp32"
    if precision == "auto" and device.type == "cpu":
        return "fp32" if detector is None else cpu_precision(detector)
    if precision == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else "fp32"
    warn_if_emulated(precision, device.type)
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise UnavailableError("--precision bf16: this GPU does not support bfloat16; use fp32 or auto")
    if precision == "bf16" and device.type == "mps":
        raise UnavailableError("--precision bf16: not supported with --device mps; use fp32 or auto")
    return precision


@dataclass(frozen=True)
class Execution(Constrained):
    """Precision and batch size with which a detector is run.

    Parameters
    ----------
    precision : {"fp32", "bf16"}, default="fp32"
        ``fp32`` is reproducible to the bit on one machine; ``bf16`` runs the convolutions and matrix products
        of networks in bfloat16.
    batch_size : int, optional
        Slices per batch. By default 8 on a CPU, fewer for large U-Nets, 16 on a GPU in ``fp32``, and as many
        as the free memory of the GPU holds in ``bf16``. Halved if memory runs out.
    compiled : bool, default=False
        Whether to compile the networks, which delays the first slices by about a minute.
    """

    precision: Annotated[str, OneOf("fp32", "bf16")] = "fp32"
    batch_size: Count | None = None
    compiled: bool = False

    def prepare(self, detector: Detector) -> Detector:
        """Set precision and memory layout of the networks of a detector, in place.

        Computations on the outputs of the networks remain in float32, because differences such as those of
        structural similarity are below the resolution of bfloat16.

        Parameters
        ----------
        detector : Detector
            Detector in evaluation mode.

        Returns
        -------
        Detector
            The same object.
        """
        detector.to(memory_format=torch.channels_last)
        if next(iter(detector.state_dict().values())).device.type == "cpu":
            fold_batch_norm(detector)
            _use_onednn(detector)
            for block in detector.modules():
                if isinstance(block, ResidualBlock):
                    block.fuse()
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

    def first_batch(self, device: torch.device, detector: Detector) -> int:
        """Return the size of the first batch: 1 if the memory per slice is to be measured on it."""
        if self.batch_size is not None:
            return self.batch_size
        if device.type != "cuda":
            sizes = [part.bytes_per_slice for part in detector.modules() if isinstance(part, DDPMpp)]
            return max(1, min(CPU_BATCH, CPU_CACHE // max(sizes, default=1)))
        return GPU_BATCH if self.precision == "fp32" else 1

    def measures_memory(self, device: torch.device, batch_size: int) -> bool:
        """Return whether a batch of this size serves to measure the memory per slice."""
        is_adaptive = self.batch_size is None and self.precision != "fp32"
        return device.type == "cuda" and is_adaptive and batch_size == 1

    def next_batch(self, device: torch.device, batch_size: int) -> int:
        """Return the size of the next batch.

        Parameters
        ----------
        device : torch.device
            Device; its peak memory since the last reset is taken for that of the last batch.
        batch_size : int
            Size of the last batch.

        Returns
        -------
        int
            Slices, at most `LARGEST_BATCH` if measured.
        """
        if not self.measures_memory(device, batch_size):
            return batch_size
        free, _ = torch.cuda.mem_get_info(device)
        need = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
        return max(1, min(LARGEST_BATCH, int(FREE_MEMORY_FRACTION * free / max(1, need))))


DEFAULT_EXECUTION = Execution()


def _use_onednn(module: nn.Module) -> None:
    """Let oneDNN compute all convolutions on a CPU, in place.

    PyTorch computes 1 x 1 convolutions of fewer than 16 images by a path that is slower and leaves the
    channels-last layout, unless they are dilated. The dilation of a single pixel changes nothing.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
            layer.dilation = (2, 2)


@contextmanager
def in_precision(detector: Detector, precision: str) -> Iterator[None]:
    """Context in which the networks of a detector, and only these, run in `precision`."""
    networks = list(detector.children()) if precision == "bf16" else []
    for network in networks:
        network.forward = _in_bfloat16(network.forward)
    try:
        yield
    finally:
        for network in networks:
            del network.forward


def _in_bfloat16(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the forward of a network to run in bfloat16 and to return float32."""

    @wraps(forward)
    def run(x: Tensor | list[Tensor], *others: Any) -> Tensor | list[Tensor]:
        device = (x if isinstance(x, Tensor) else x[0]).device
        with torch.autocast(device.type, torch.bfloat16):
            output = forward(x, *others)
        return output.float() if isinstance(output, Tensor) else [part.float() for part in output]

    return run


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error means that GPU or main memory ran out."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
