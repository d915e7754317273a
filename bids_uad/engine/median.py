"""Three-dimensional median filters of anomaly maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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
    result[brain] = _medians(padded, centres, torch.arange(-1, 2, device=volume.device), ignore_nan=True)
    return result


def published_median(volume: Tensor) -> Tensor:
    """Filter with SciPy's ``median_filter`` of side 4, the published one.

    An even window has no centre: it reaches two voxels back and one ahead, which moves what it filters by
    half a voxel. Of 64 values the upper middle one is taken. Borders are reflected.

    Parameters
    ----------
    volume : Tensor of float, shape (X, Y, Z)
        At least 2 voxels along each axis.

    Returns
    -------
    Tensor, shape (X, Y, Z)
    """
    # Where all neighbours are zero the median is, too.
    reach = PUBLISHED_SIDE + 1
    near = F.max_pool3d((volume != 0)[None, None].float(), reach, stride=1, padding=reach // 2)[0, 0] > 0
    result = torch.zeros_like(volume)
    before, after = PUBLISHED_SIDE // 2, PUBLISHED_SIDE - PUBLISHED_SIDE // 2 - 1
    padded = volume
    for axis, size in enumerate(volume.shape):
        # The border voxel is repeated, as SciPy's "reflect" does and torch's does not.
        index = torch.arange(-before, size + after, device=volume.device)
        index = torch.where(index < 0, -1 - index, index)
        padded = padded.index_select(axis, torch.where(index >= size, 2 * size - 1 - index, index))
    steps = torch.arange(-before, after + 1, device=volume.device)
    result[near] = _medians(padded, torch.nonzero(near) + before, steps, ignore_nan=False)
    return result


def _medians(padded: Tensor, centres: Tensor, steps: Tensor, *, ignore_nan: bool) -> Tensor:
    """Medians over the cube of `steps` about each of `centres`, shape (N, 3).

    The lower middle one of the values that are not NaN, or the upper middle one of all.
    """
    strides = torch.tensor(padded.stride(), device=padded.device)
    offsets = (torch.cartesian_prod(steps, steps, steps) * strides).sum(1)
    values = padded.flatten()
    found = []
    # A row of neighbours for each centre, some hundred thousand rows at a time.
    for rows in (centres * strides).sum(1).split(ROWS):
        neighbours = values[rows[:, None] + offsets]
        if ignore_nan:
            found.append(neighbours.nanmedian(1).values)
        else:
            found.append(neighbours.kthvalue(len(offsets) // 2 + 1, 1).values)
    return torch.cat(found)
