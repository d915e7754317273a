"""From a preprocessed volume to an anomaly map."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from bids_uad import space
from bids_uad.engine.median import masked_median
from bids_uad.methods.base import Detector

CPU_BATCH = 8


def slice_generators(key: str, seed: int, slices: list[int], device: torch.device) -> list[torch.Generator]:
    """One generator per slice, seeded by subject and slice and nothing else.

    Parameters
    ----------
    key : str
        Identifies the image, for example its BIDS name.
    seed : int
        The run's random seed.
    slices : list of int
        Slice indices on the SRI24 grid.
    device : torch.device

    Returns
    -------
    list of torch.Generator
    """
    generators = []
    for index in slices:
        digest = hashlib.sha256(f"{seed}/{key}/{index}".encode()).digest()
        generators.append(torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1))
    return generators


@torch.inference_mode()
def anomaly_map(
    detector: Detector,
    volume: np.ndarray,
    brain: np.ndarray,
    *,
    key: str,
    seed: int = 0,
    batch_size: int = CPU_BATCH,
) -> np.ndarray:
    """Score a volume slice by slice, then median-filter inside the brain.

    Slices without brain are skipped. On a GPU that runs out of memory the batch is halved.

    Parameters
    ----------
    detector : Detector
        In evaluation mode, on the device to use.
    volume : numpy.ndarray of float, shape (240, 240, 155)
        Preprocessed intensities in [0, 1] on the SRI24 grid.
    brain : numpy.ndarray of bool, shape (240, 240, 155)
    key : str
        Identifies the image for stochastic detectors.
    seed : int
    batch_size : int
        Slices scored at once.

    Returns
    -------
    numpy.ndarray of float32, shape (240, 240, 155)
        Higher is more anomalous; 0 outside the brain.

    Raises
    ------
    ValueError
        If the image is not on the grid, or the brain leaves the detectors' field of view.
    """
    device = next(iter(detector.state_dict().values())).device
    slices = torch.from_numpy(np.ascontiguousarray(space.to_slices(volume), dtype=np.float32))
    inside = torch.from_numpy(np.ascontiguousarray(space.to_slices(brain), dtype=bool))
    if int(inside.sum()) != int(np.count_nonzero(brain)):
        raise ValueError("the brain mask leaves the central 224 x 224 voxels of the SRI24 grid")
    result = torch.zeros_like(slices, device=device)
    todo = torch.nonzero(inside.any(2).any(1)).flatten().tolist()
    while todo:
        now = todo[:batch_size]
        mask = inside[now, None].to(device)
        x = slices[now, None].to(device, memory_format=torch.channels_last) * mask
        try:
            result[now] = detector.score(x, mask, slice_generators(key, seed, now, device))[:, 0]
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
            batch_size = max(1, batch_size // 2)
            torch.cuda.empty_cache()
            continue
        todo = todo[len(now) :]
    filtered = masked_median(result, inside.to(device))
    return space.from_slices(filtered.cpu().numpy())
