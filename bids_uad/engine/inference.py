"""From a preprocessed volume to an anomaly map."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bids_uad import space
from bids_uad.engine.execution import PLAIN, Execution, ran_out_of_memory
from bids_uad.engine.field import Field, covering_fields
from bids_uad.engine.median import masked_median, published_median
from bids_uad.engine.protocol import CORRECTED, Protocol
from bids_uad.engine.smoothing import smooth_across_slices
from bids_uad.errors import ModelError
from bids_uad.listing import listed
from bids_uad.methods.base import Detector
from bids_uad.networks.keyed import SliceGenerator


@torch.inference_mode()
def anomaly_map(
    detector: Detector,
    volume: np.ndarray,
    brain: np.ndarray,
    *,
    key: str,
    seed: int = 0,
    protocol: Protocol = CORRECTED,
    execution: Execution = PLAIN,
) -> np.ndarray:
    """Score a volume slice by slice, then smooth (where the detector asks for it) and filter the map.

    Slices without brain are skipped, and so is the margin that the detector need not see.

    Parameters
    ----------
    detector : Detector
        In evaluation mode, on the device to use, prepared by `execution`.
    volume : numpy.ndarray of float, shape (240, 240, 155)
        Preprocessed intensities on the SRI24 grid, the 99.5th percentile of the brain at 1.
    brain : numpy.ndarray of bool, shape (240, 240, 155)
    key : str
        Identifies the image for stochastic detectors.
    seed : int
    protocol : Protocol
        Scaling and filter that the detector was trained and calibrated with.
    execution : Execution

    Returns
    -------
    numpy.ndarray of float32, shape (240, 240, 155)
        Higher is more anomalous; 0 outside the brain.

    Raises
    ------
    ValueError
        If the image is not on the grid or not finite, or the brain leaves the detectors' field of view.
    ModelError
        If the detector gives NaN or infinite scores.
    """
    if not np.isfinite(volume).all():
        raise ValueError(f"the preprocessed image of {key} holds NaN or infinite intensities")
    device = next(iter(detector.state_dict().values())).device
    scaled, taken = protocol.prepare(volume, brain)
    slices = torch.from_numpy(np.ascontiguousarray(space.to_slices(scaled)))
    inside = torch.from_numpy(np.ascontiguousarray(space.to_slices(taken), dtype=bool))
    if int(np.count_nonzero(space.to_slices(brain))) != int(np.count_nonzero(brain)):
        raise ValueError("the brain mask leaves the central 224 x 224 voxels of the SRI24 grid")
    fields = covering_fields(inside, detector.field_of_view)
    total = torch.zeros_like(slices, device=device)
    times = torch.zeros_like(slices[0], device=device)
    for field in fields:
        field.cut(times).add_(1)
        _add_scores(detector, slices, inside, field, total, key=key, seed=seed, execution=execution)
    # Here, since neither the smoothing nor the median filters below would keep every NaN.
    _check_finite(detector, total, key)
    scores = total / times.clamp_min(1) if len(fields) > 1 else total
    if detector.depth:
        scores = smooth_across_slices(scores, inside.to(device), detector.depth)
    smooth = published_median(scores) if protocol.published else masked_median(scores, inside.to(device))
    return space.from_slices(smooth.cpu().numpy()) * brain


def _check_finite(detector: Detector, scores: Tensor, key: str) -> None:
    """Refuse scores of shape (Z, H, W) that hold NaN or infinite values."""
    wrong = ~torch.isfinite(scores).flatten(1).all(1)
    if not wrong.any():
        return
    numbers = torch.nonzero(wrong).flatten().tolist()
    raise ModelError(
        f"{detector.name} gave NaN or infinite scores for {key} in axial slice{'s' if numbers[1:] else ''} "
        f"{listed(map(str, numbers), 5)} of the SRI24 grid (counted from 0); check the preprocessed "
        "image, or train the model again"
    )


def _add_scores(
    detector: Detector,
    slices: Tensor,
    inside: Tensor,
    field: Field,
    total: Tensor,
    *,
    key: str,
    seed: int,
    execution: Execution,
) -> None:
    """Add the scores of one field's slices to `total`, shape (Z, 224, 224), batch by batch."""
    device = total.device
    batch_size = execution.first_batch(device)
    todo = torch.nonzero(field.cut(inside).flatten(1).any(1)).flatten().tolist()
    target = field.cut(total)
    while todo:
        now = todo[:batch_size]
        mask = field.cut(inside)[now, None].to(device)
        x = field.cut(slices)[now, None].to(device).contiguous(memory_format=torch.channels_last)
        if execution.measures(device, batch_size):
            torch.cuda.reset_peak_memory_stats(device)
        try:
            scores = detector.score(x, mask, SliceGenerator.of_slices(key, seed, now, device))
        except RuntimeError as error:
            if batch_size == 1 or not ran_out_of_memory(error):
                raise
            batch_size = max(1, batch_size // 2)
            torch.cuda.empty_cache()
            continue
        target[now] += scores[:, 0]
        batch_size = execution.next_batch(device, batch_size)
        todo = todo[len(now) :]
