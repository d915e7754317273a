"""From a preprocessed volume to an anomaly map."""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from bids_uad import space
from bids_uad.engine.bundle import load_bundle, load_detector
from bids_uad.engine.execution import PLAIN, Execution, ran_out_of_memory, resolve_device
from bids_uad.engine.protocol import CORRECTED, Protocol
from bids_uad.errors import ModelError, UserError, truncate_list
from bids_uad.images import save_image
from bids_uad.methods.base import Detector
from bids_uad.networks.counter_rng import SliceGenerator
from bids_uad.space import BRAIN_CENTRE, CROP


@dataclass(frozen=True)
class Field:
    """A rectangle of cropped slices.

    Parameters
    ----------
    rows, columns : slice
    """

    rows: slice
    columns: slice

    def cut(self, slices: Tensor) -> Tensor:
        """Give the rectangle of slices, shape (..., 224, 224), as a view."""
        return slices[..., self.rows, self.columns]


def usual_field(size: tuple[int, int], shift: tuple[int, int] = (0, 0)) -> Field:
    """Place a field where brains lie in SRI24.

    Parameters
    ----------
    size : tuple of int
        Height and width.
    shift : tuple of int
        Pixels by which it is moved, as far as the slices reach.
    """
    return Field(*(_piece(_usual_start(axis, n, shift[axis]), n) for axis, n in enumerate(size)))


def covering_fields(inside: Tensor, size: tuple[int, int]) -> list[Field]:
    """Place fields so that they hold the whole brain of a volume.

    Parameters
    ----------
    inside : Tensor of bool, shape (Z, 224, 224)
        Brain mask.
    size : tuple of int
        Height and width of a field.

    Returns
    -------
    list of Field
        One, where brains usually lie, moved no further than it must be. A brain that is larger than a field
        gets several that overlap.
    """
    rows = _starts(inside.any(2).any(0), size[0], 0)
    columns = _starts(inside.any(1).any(0), size[1], 1)
    return [Field(_piece(row, size[0]), _piece(column, size[1])) for row in rows for column in columns]


def _piece(start: int, length: int) -> slice:
    return slice(start, start + length)


def _usual_start(axis: int, length: int, shift: int = 0) -> int:
    return min(max(BRAIN_CENTRE[axis] - length // 2 + shift, 0), CROP - length)


def _starts(occupied: Tensor, length: int, axis: int) -> list[int]:
    """First indices along one axis, of which `occupied` must be covered."""
    usual = _usual_start(axis, length)
    positions = torch.nonzero(occupied).flatten().tolist()
    if not positions:
        return [usual]
    first, last = positions[0], positions[-1]
    span = last + 1 - first
    if span <= length:
        return [min(max(usual, last + 1 - length), first)]
    count = -(-span // length)
    return [first + round(number * (span - length) / (count - 1)) for number in range(count)]


ROWS = 400_000
PUBLISHED_SIDE = 4


def masked_median(volume: Tensor, brain: Tensor) -> Tensor:
    """Median of each brain voxel's 3 x 3 x 3 neighbours that are brain, itself included.

    Parameters
    ----------
    volume : Tensor of float, shape (X, Y, Z)
    brain : Tensor of bool, shape (X, Y, Z)

    Returns
    -------
    Tensor, shape (X, Y, Z)
        0 outside the brain. Of an even number of neighbours the lower middle one is taken, so that every
        value is one that occurs.
    """
    result = torch.zeros_like(volume)
    if not brain.any():
        return result
    padded = torch.full(
        [size + 2 for size in volume.shape], torch.nan, dtype=volume.dtype, device=volume.device
    )
    padded[1:-1, 1:-1, 1:-1] = torch.where(brain, volume, torch.nan)
    centres = torch.nonzero(brain) + 1
    result[brain] = _neighbour_medians(padded, centres)
    return result


def published_median(volume: Tensor) -> Tensor:
    """Filter with SciPy's ``median_filter`` of side 4, the published one.

    An even window has no centre: it reaches two voxels back and one ahead, which moves what it filters by
    half a voxel. Of 64 values the upper middle one is taken. Borders are reflected.

    Parameters
    ----------
    volume : Tensor of float, shape (X, Y, Z)

    Returns
    -------
    Tensor, shape (X, Y, Z)
    """
    result = torch.zeros_like(volume)
    values = volume.cpu().numpy()
    if not values.any():
        return result
    (occupied,) = ndimage.find_objects(values != 0, max_label=1)
    # Windows of the voxels next to what is not zero lie within twice the side of the window.
    margin = 2 * PUBLISHED_SIDE
    box = tuple(slice(max(side.start - margin, 0), side.stop + margin) for side in occupied)
    filtered = ndimage.median_filter(values[box], size=PUBLISHED_SIDE)
    result[box] = torch.from_numpy(filtered).to(result)
    return result


def _neighbour_medians(padded: Tensor, centres: Tensor) -> Tensor:
    """Return the lower middle of the values that are not NaN in the 3 x 3 x 3 cube about each centre."""
    strides = torch.tensor(padded.stride(), device=padded.device)
    steps = torch.arange(-1, 2, device=padded.device)
    offsets = (torch.cartesian_prod(steps, steps, steps) * strides).sum(1)
    values = padded.flatten()
    # A row of neighbours for each centre, some hundred thousand rows at a time.
    rows = (centres * strides).sum(1).split(ROWS)
    return torch.cat([values[part[:, None] + offsets].nanmedian(1).values for part in rows])


def smooth_across_slices(scores: Tensor, brain: Tensor, sigma: float) -> Tensor:
    """Average each pixel with those above and below it in the brain, by a Gaussian.

    Slices are scored one by one. A lesion goes on in the next slice; what a network takes for one in a single
    slice mostly does not.

    Parameters
    ----------
    scores : Tensor of float, shape (Z, H, W)
        0 outside the brain.
    brain : Tensor of bool, shape (Z, H, W)
    sigma : float
        Standard deviation in slices (1 mm). The Gaussian is cut at three of them.

    Returns
    -------
    Tensor, shape (Z, H, W)
        0 outside the brain, which has no weight.
    """
    radius = math.ceil(3 * sigma)
    total, weight = torch.zeros_like(scores), torch.zeros_like(scores)
    for step in range(-radius, radius + 1):
        share = math.exp(-0.5 * (step / sigma) ** 2)
        here = slice(max(0, -step), min(len(scores), len(scores) - step))
        there = slice(max(0, step), min(len(scores), len(scores) + step))
        total[here].add_(scores[there], alpha=share)
        weight[here].add_(brain[there], alpha=share)
    return torch.where(brain, total / weight.clamp_min(1e-6), 0.0)


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
    if detector.slice_smoothing:
        scores = smooth_across_slices(scores, inside.to(device), detector.slice_smoothing)
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
        f"{truncate_list(map(str, numbers), 5)} of the SRI24 grid (counted from 0); check the preprocessed "
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bids_uad.engine.inference", description=__doc__)
    parser.add_argument("--image", type=Path, required=True, help="preprocessed scan on the SRI24 grid")
    parser.add_argument("--brain", type=Path, required=True, help="its brain mask")
    parser.add_argument("--key", required=True, help="name of the image, seeds stochastic detectors")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch-size", type=int, default=None, help="slices at once")
    parser.add_argument("--compile", dest="compiled", action="store_true", help="compile the networks")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    parser.add_argument(
        "--job",
        nargs=2,
        action="append",
        required=True,
        metavar=("BUNDLE", "MAP"),
        help="model bundle, output map",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the jobs; 0, or 69 when a bundle or device cannot be used."""
    args = _parser().parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        device = resolve_device(args.device)
        volume = np.asarray(nib.load(args.image).dataobj, dtype=np.float32)
        brain = np.asarray(nib.load(args.brain).dataobj) > 0
        execution = Execution(args.precision, args.batch_size, args.compiled)
        for folder, output in args.job:
            bundle = load_bundle(folder)
            detector = execution.prepare(load_detector(bundle, str(device)))
            scores = anomaly_map(
                detector,
                volume,
                brain,
                key=args.key,
                seed=args.seed,
                protocol=bundle.protocol,
                execution=execution,
            )
            save_image(space.to_image(scores), output)
    except UserError as error:
        print(error, file=sys.stderr)
        return 69
    print(f"device: {device}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
