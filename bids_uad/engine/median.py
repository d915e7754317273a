"""Three-dimensional median filters of anomaly maps."""

from __future__ import annotations

import torch
from scipy import ndimage
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
