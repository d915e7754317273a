"""Anomaly maps of preprocessed volumes: score slices, smooth across slices, filter by a median.

``python -m bids_uad.engine.inference`` is the process that computes the maps of a run, image after image, see
:class:`bids_uad.resources.RequestProcess`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from bids_uad import space
from bids_uad.engine.bundle import CORRECTED, Bundle, Protocol, load_bundle, load_detector
from bids_uad.engine.execution import DEFAULT_EXECUTION, Execution, is_out_of_memory, resolve_device
from bids_uad.errors import ModelError, truncate_list
from bids_uad.images import save_image
from bids_uad.methods.base import Detector
from bids_uad.networks.counter_rng import SliceGenerator
from bids_uad.resources import serve_requests
from bids_uad.space import BRAIN_CENTRE, CROP

MEDIAN_CHUNK, GPU_MEDIAN_CHUNK = 2**14, 2**19
"""Voxels whose neighbours are gathered at once by :func:`masked_median`; on a CPU they fit into its cache."""
PUBLISHED_SIDE = 4
"""Side of the published median filter in voxels."""
IDLE_SECONDS = 300.0
"""Time in s without an image after which the detection process ends."""
MEMORY_GROWTH = 2e9
"""Growth of the memory in bytes since the first image, by models and whatever is not freed, above which the
detection process ends after an image."""


@torch.inference_mode()
def anomaly_map(
    detector: Detector,
    volume: np.ndarray,
    brain: np.ndarray,
    *,
    key: str,
    seed: int = 0,
    protocol: Protocol = CORRECTED,
    execution: Execution = DEFAULT_EXECUTION,
) -> np.ndarray:
    """Compute the anomaly map of a volume.

    Slices without brain are skipped, and only the field of view of the detector is processed.

    Parameters
    ----------
    detector : Detector
        Detector in evaluation mode, on the device to use, prepared by `execution`.
    volume : numpy.ndarray of float, shape (240, 240, 155)
        Preprocessed intensities on the SRI24 grid, the 99.5th percentile of the brain at 1.
    brain : numpy.ndarray of bool, shape (240, 240, 155)
        Brain mask.
    key : str
        Name of the image, part of the seed of stochastic detectors.
    seed : int, default=0
        Random seed of the run.
    protocol : Protocol, default=CORRECTED
        Scaling and filter with which the detector was trained and calibrated.
    execution : Execution, default=DEFAULT_EXECUTION
        Precision and batch size.

    Returns
    -------
    numpy.ndarray of float32, shape (240, 240, 155)
        Scores, higher for more anomalous voxels, 0 outside the brain.

    Raises
    ------
    ValueError
        If the image is not on the grid or not finite, or the brain exceeds the central 224 x 224 voxels.
    ModelError
        If the detector gives NaN or infinite scores.
    """
    if not np.isfinite(volume).all():
        raise ValueError(f"the preprocessed image of {key} holds NaN or infinite intensities")
    device = next(iter(detector.state_dict().values())).device
    scaled, mask = protocol.prepare(volume, brain)
    slices = torch.from_numpy(np.ascontiguousarray(space.to_slices(scaled)))
    inside = torch.from_numpy(np.ascontiguousarray(space.to_slices(mask), dtype=bool))
    if int(np.count_nonzero(space.to_slices(brain))) != int(np.count_nonzero(brain)):
        raise ValueError("the brain mask leaves the central 224 x 224 voxels of the SRI24 grid")
    fields = covering_fields(inside, detector.field_of_view)
    total = torch.zeros_like(slices, device=device)
    count = torch.zeros_like(slices[0], device=device)
    for field in fields:
        field.cut(count).add_(1)
        _add_scores(detector, slices, inside, field, total, key=key, seed=seed, execution=execution)
    # Checked before smoothing and median, which would hide some NaN values.
    _check_finite(detector, total, key)
    scores = total / count.clamp_min(1) if len(fields) > 1 else total
    if detector.slice_smoothing:
        scores = smooth_across_slices(scores, inside.to(device), detector.slice_smoothing)
    filtered = published_median(scores) if protocol.published else masked_median(scores, inside.to(device))
    return space.from_slices(filtered.cpu().numpy()) * brain


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
    """Add the scores of one field of all slices to `total`, shape (Z, 224, 224), batch by batch."""
    device = total.device
    batch_size = execution.first_batch(device, detector)
    todo = torch.nonzero(field.cut(inside).flatten(1).any(1)).flatten().tolist()
    target = field.cut(total)
    while todo:
        now = todo[:batch_size]
        mask = field.cut(inside)[now, None].to(device)
        x = detector.inputs(slices, now, field.rows, field.columns)
        x = x.to(device).contiguous(memory_format=torch.channels_last)
        if execution.measures_memory(device, batch_size):
            torch.cuda.reset_peak_memory_stats(device)
        try:
            scores = detector.score(x, mask, SliceGenerator.of_slices(key, seed, now, device))
        except RuntimeError as error:
            if batch_size == 1 or not is_out_of_memory(error):
                raise
            batch_size = max(1, batch_size // 2)
            torch.cuda.empty_cache()
            continue
        target[now] += scores[:, 0]
        batch_size = execution.next_batch(device, batch_size)
        todo = todo[len(now) :]


def _check_finite(detector: Detector, scores: Tensor, key: str) -> None:
    """Raise an error if scores of shape (Z, H, W) contain NaN or infinite values."""
    wrong = ~torch.isfinite(scores).flatten(1).all(1)
    if not wrong.any():
        return
    numbers = torch.nonzero(wrong).flatten().tolist()
    raise ModelError(
        f"{detector.name} gave NaN or infinite scores for {key} in axial slice{'s' if numbers[1:] else ''} "
        f"{truncate_list(map(str, numbers), 5)} of the SRI24 grid (counted from 0); check the preprocessed "
        "image, or train the model again"
    )


@dataclass(frozen=True)
class Field:
    """Position of a field of view in slices of 224 x 224 pixels.

    Parameters
    ----------
    rows, columns : slice
        Pixels along the two axes.
    """

    rows: slice
    columns: slice

    def cut(self, slices: Tensor) -> Tensor:
        """Return the field of slices of shape (..., 224, 224), as a view."""
        return slices[..., self.rows, self.columns]


def default_field(size: tuple[int, int], shift: tuple[int, int] = (0, 0)) -> Field:
    """Place a field of view around the centre of brains in SRI24.

    Parameters
    ----------
    size : tuple of int
        Height and width in pixels.
    shift : tuple of int, default=(0, 0)
        Shift in pixels along rows and columns, limited by the border of the slice.

    Returns
    -------
    Field
        Position of the field.
    """
    return Field(*(_span(_default_start(axis, n, shift[axis]), n) for axis, n in enumerate(size)))


def covering_fields(inside: Tensor, size: tuple[int, int]) -> list[Field]:
    """Place fields of view that together contain the brain of a volume.

    Parameters
    ----------
    inside : Tensor of bool, shape (Z, 224, 224)
        Brain mask.
    size : tuple of int
        Height and width of a field in pixels.

    Returns
    -------
    list of Field
        One field, shifted from :func:`default_field` by as little as necessary; several that overlap if the
        brain is larger than a field.
    """
    rows = _starts(inside.any(2).any(0), size[0], 0)
    columns = _starts(inside.any(1).any(0), size[1], 1)
    return [Field(_span(row, size[0]), _span(column, size[1])) for row in rows for column in columns]


def _span(start: int, length: int) -> slice:
    return slice(start, start + length)


def _default_start(axis: int, length: int, shift: int = 0) -> int:
    return min(max(BRAIN_CENTRE[axis] - length // 2 + shift, 0), CROP - length)


def _starts(occupied: Tensor, length: int, axis: int) -> list[int]:
    """Return the first pixels of the intervals that cover all `occupied` pixels of one axis."""
    default = _default_start(axis, length)
    positions = torch.nonzero(occupied).flatten().tolist()
    if not positions:
        return [default]
    first, last = positions[0], positions[-1]
    extent = last + 1 - first
    if extent <= length:
        return [min(max(default, last + 1 - length), first)]
    count = -(-extent // length)
    return [first + round(number * (extent - length) / (count - 1)) for number in range(count)]


def smooth_across_slices(scores: Tensor, brain: Tensor, sigma: float) -> Tensor:
    """Smooth scores across slices by a Gaussian, normalised over the brain.

    Lesions usually extend over several slices, false positives of a single slice do not.

    Parameters
    ----------
    scores : Tensor of float, shape (Z, H, W)
        Scores, 0 outside the brain.
    brain : Tensor of bool, shape (Z, H, W)
        Brain mask; pixels outside have weight 0.
    sigma : float
        Standard deviation in slices (1 mm). The Gaussian is truncated at three standard deviations.

    Returns
    -------
    Tensor, shape (Z, H, W)
        Smoothed scores, 0 outside the brain.
    """
    radius = math.ceil(3 * sigma)
    total, weight = torch.zeros_like(scores), torch.zeros_like(scores)
    for step in range(-radius, radius + 1):
        factor = math.exp(-0.5 * (step / sigma) ** 2)
        target = slice(max(0, -step), min(len(scores), len(scores) - step))
        source = slice(max(0, step), min(len(scores), len(scores) + step))
        total[target].add_(scores[source], alpha=factor)
        weight[target].add_(brain[source], alpha=factor)
    return torch.where(brain, total / weight.clamp_min(1e-6), 0.0)


def masked_median(volume: Tensor, brain: Tensor) -> Tensor:
    """Compute the median over those of the 3 x 3 x 3 neighbours of each voxel that are brain.

    Parameters
    ----------
    volume : Tensor of float, shape (X, Y, Z)
        Scores, finite in the brain.
    brain : Tensor of bool, shape (X, Y, Z)
        Brain mask.

    Returns
    -------
    Tensor, shape (X, Y, Z)
        Medians, 0 outside the brain; of an even number of neighbours the lower of the two middle values.
    """
    around = (1,) * 6
    padded = F.pad(torch.where(brain, volume, torch.inf), around, value=torch.inf)
    known = F.pad(brain, around)
    surrounded = known
    for axis, size in enumerate(brain.shape):
        first, second, third = (surrounded.narrow(axis, start, size) for start in range(3))
        surrounded = first & second & third
    surrounded = F.pad(surrounded, around)
    strides = torch.tensor(padded.stride(), device=padded.device)
    steps = torch.arange(-1, 2, device=padded.device)
    offsets = (torch.cartesian_prod(steps, steps, steps) * strides).sum(1)[:, None]
    values, result = padded.flatten(), torch.zeros_like(padded)
    chunk = MEDIAN_CHUNK if volume.device.type == "cpu" else GPU_MEDIAN_CHUNK
    for is_complete, where in ((True, surrounded), (False, known & ~surrounded)):
        for centres in where.flatten().nonzero().flatten().split(chunk):
            neighbours = values.index_select(0, (centres + offsets).flatten()).view(len(offsets), -1)
            if not is_complete:
                # Every other missing neighbour becomes the smallest value, so that the middle of all 27 is
                # the lower median of the others.
                is_odd = torch.zeros_like(centres, dtype=torch.bool)
                for row, is_missing in zip(neighbours, neighbours.isinf(), strict=True):
                    is_odd ^= is_missing
                    row.masked_fill_(is_odd & is_missing, -torch.inf)
            result.view(-1)[centres] = _middle_row(neighbours)
    return result[1:-1, 1:-1, 1:-1].contiguous()


def _middle_row(values: Tensor) -> Tensor:
    """Compute the median over an odd number of rows of values of shape (N, M), which are overwritten."""
    rows, spare = [*values], torch.empty_like(values[0])
    for low, high, needs_low, needs_high in _median_network(len(rows)):
        first, second = rows[low], rows[high]
        if needs_low and needs_high:
            rows[low] = torch.minimum(first, second, out=spare)
            torch.maximum(first, second, out=second)
            spare = first
        elif needs_low:
            torch.minimum(first, second, out=first)
        else:
            torch.maximum(first, second, out=second)
    return rows[len(rows) // 2]


@cache
def _median_network(count: int) -> tuple[tuple[int, int, bool, bool], ...]:
    """Return the comparisons of Batcher's odd-even merge sort that the middle one of `count` values needs.

    Each consists of two positions, and of whether the smaller and the larger of their values is needed
    (Knuth 1998, "The art of computer programming" vol. 3, algorithm 5.2.2M).
    """
    comparisons = []
    for length in (2**power for power in range((count - 1).bit_length())):
        for step in (length >> power for power in range(length.bit_length())):
            for start in range(step % length, count - step, 2 * step):
                for low in range(start, min(start + step, count - step)):
                    if low // (2 * length) == (low + step) // (2 * length):
                        comparisons.append((low, low + step))
    needed, kept = {count // 2}, []
    for low, high in reversed(comparisons):
        if low in needed or high in needed:
            kept.append((low, high, low in needed, high in needed))
            needed |= {low, high}
    return tuple(reversed(kept))


def published_median(volume: Tensor) -> Tensor:
    """Compute the published median filter, SciPy's ``median_filter`` with a side of 4 voxels.

    The window reaches two voxels back and one ahead, which shifts the map by half a voxel. It includes
    background. Of 64 values the upper of the two middle ones is taken; borders are reflected.

    Parameters
    ----------
    volume : Tensor of float, shape (X, Y, Z)
        Scores.

    Returns
    -------
    Tensor, shape (X, Y, Z)
        Filtered scores.
    """
    result = torch.zeros_like(volume)
    values = volume.cpu().numpy()
    if not values.any():
        return result
    (occupied,) = ndimage.find_objects(values != 0, max_label=1)
    # Only windows within this distance of a nonzero voxel can have a nonzero median.
    margin = 2 * PUBLISHED_SIDE
    box = tuple(slice(max(side.start - margin, 0), side.stop + margin) for side in occupied)
    filtered = ndimage.median_filter(values[box], size=PUBLISHED_SIDE)
    result[box] = torch.from_numpy(filtered).to(result)
    return result


class Scorer:
    """Compute anomaly maps on request; loaded detectors and the last image are kept for the next request."""

    def __init__(self) -> None:
        self._detectors: dict[tuple[Any, ...], tuple[Bundle, Detector]] = {}
        self._image: tuple[Any, tuple[np.ndarray, np.ndarray]] | None = None

    def __call__(self, request: Mapping[str, Any]) -> dict[str, str]:
        """Write the anomaly map of one image.

        Parameters
        ----------
        request : mapping
            `bundle`, `sha256` (folder and checksum of the model), `image`, `brain` (preprocessed image and
            brain mask on the SRI24 grid), `key`, `seed` (see :func:`anomaly_map`), `device`, `precision`,
            `batch_size`, `compiled`, `threads` (CPU threads) and `output` (path of the map).

        Returns
        -------
        dict
            `device`, with `auto` resolved.

        Raises
        ------
        UserError
            If the bundle or the device cannot be used, or scores are not finite.
        """
        torch.set_num_threads(request["threads"])
        device = resolve_device(request["device"])
        execution = Execution(request["precision"], request["batch_size"], request["compiled"])
        bundle, detector = self._load(request["bundle"], request["sha256"], device, execution)
        volume, brain = self._read(Path(request["image"]), Path(request["brain"]))
        scores = anomaly_map(
            detector,
            volume,
            brain,
            key=request["key"],
            seed=request["seed"],
            protocol=bundle.protocol,
            execution=execution,
        )
        save_image(space.to_image(scores), request["output"])
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return {"device": str(device)}

    def _load(
        self, folder: str, sha256: str, device: torch.device, execution: Execution
    ) -> tuple[Bundle, Detector]:
        """Return a bundle and its detector, ready to score."""
        key = (folder, sha256, device, execution)
        if key not in self._detectors:
            bundle = load_bundle(folder)
            detector = execution.prepare(load_detector(bundle, str(device)))
            self._detectors[key] = bundle, detector
        return self._detectors[key]

    def _read(self, image: Path, brain: Path) -> tuple[np.ndarray, np.ndarray]:
        """Return intensities and brain mask of an image."""
        key = [(path, path.stat().st_size, path.stat().st_mtime_ns) for path in (image, brain)]
        if self._image is None or self._image[0] != key:
            volume = np.asarray(nib.load(image).dataobj, dtype=np.float32)
            self._image = key, (volume, np.asarray(nib.load(brain).dataobj) > 0)
        return self._image[1]


if __name__ == "__main__":
    serve_requests(Scorer(), int(sys.argv[1]), idle_seconds=IDLE_SECONDS, memory_growth=MEMORY_GROWTH)
