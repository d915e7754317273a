"""The brain mask of a skull-stripped scan, as generous or as tight as real ones are."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch.nn import functional as F

from bids_uad.simulation.anatomy import CLASSES
from bids_uad.simulation.spatial import random_field, smooth, tensor


def closed(tissue: torch.Tensor, reach: int) -> torch.Tensor:
    """Fill sulci and fissures up to about twice `reach` mm wide: grey closing by a cube.

    Parameters
    ----------
    tissue : torch.Tensor, shape (X, Y, Z)
    reach : int
        Half the cube's edge, voxels.
    """
    return -_dilated(-_dilated(tissue, reach), reach)


def _dilated(volume: torch.Tensor, reach: int) -> torch.Tensor:
    """Largest value in a cube about each voxel, one axis after the other."""
    for axis in range(3):
        size, padding = [1, 1, 1], [0, 0, 0]
        size[axis], padding[axis] = 2 * reach + 1, reach
        volume = F.max_pool3d(volume[None, None], size, stride=1, padding=padding)[0, 0]
    return volume


def brain_mask(fractions: torch.Tensor, rng: np.random.Generator) -> tuple[torch.Tensor, dict[str, float]]:
    """Draw a brain mask around the tissue.

    The smoothed tissue map is cut at a level that differs between scans (a low one keeps a rim of fluid)
    and, a little, between places.

    Parameters
    ----------
    fractions : torch.Tensor, shape (len(CLASSES), X, Y, Z)
    rng : numpy.random.Generator

    Returns
    -------
    mask : torch.Tensor of bool, shape (X, Y, Z)
        One component, without holes in any slice.
    drawn : dict
        The level, the smoothness and the closing that were used.
    """
    tissue = fractions.sum(0) - fractions[CLASSES.index("csf")]
    width = float(rng.uniform(1.5, 3.0))
    # Most strippers are tight; one scan in four keeps a rim of fluid.
    level = float(rng.uniform(0.20, 0.35) if rng.uniform() < 0.25 else rng.uniform(0.38, 0.55))
    reach = int(rng.integers(3, 8))
    tissue = closed(tissue, reach)
    cut = level + 0.05 * random_field(rng, 20.0)[0]
    mask = (smooth(tissue, width) > cut).cpu().numpy()
    labels, _ = ndimage.label(mask)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    mask = labels == sizes.argmax()
    # Slice by slice, so that channels of fluid that open to the outside are filled too.
    for axis in range(3):
        for plane in np.moveaxis(mask, axis, 0):
            plane[...] = ndimage.binary_fill_holes(plane)
    return tensor(mask), {"rim_level": level, "rim_smoothness_mm": width, "closing_mm": reach}
