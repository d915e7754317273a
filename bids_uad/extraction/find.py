"""Find the brain in a scan of a whole head."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from scipy import ndimage

from bids_uad.errors import InputError
from bids_uad.extraction.grid import SHAPE, SPACING, grid_around, scale
from bids_uad.extraction.network import BrainNet
from bids_uad.preprocessing.brain import largest_piece
from bids_uad.preprocessing.resampling import resample, smoothed

PASSES = 2
MARGIN_VOXELS = 2


def load_network(weights: Path) -> BrainNet:
    """Load what ``python -m bids_uad.extraction`` wrote.

    Parameters
    ----------
    weights : pathlib.Path
        Safetensors file.

    Returns
    -------
    BrainNet

    Raises
    ------
    InputError
        If the file holds anything else.
    """
    network = BrainNet()
    try:
        network.load_state_dict({name: value.float() for name, value in load_file(weights).items()})
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            weights, f"no weights of the brain extraction ({reason})", "train it again"
        ) from error
    return network.eval()


def find_brain(data: np.ndarray, affine: np.ndarray, network: BrainNet) -> np.ndarray:
    """Find the brain in a scan of a whole head, whatever its contrast.

    The head is looked at from its centre of mass, then once more from where the brain was found.

    Parameters
    ----------
    data : numpy.ndarray, three-dimensional
    affine : numpy.ndarray, shape (4, 4)
        Voxel-to-world, RAS+, mm.
    network : BrainNet

    Returns
    -------
    numpy.ndarray of bool, of the shape of `data`
        Empty if there is none.
    """
    smooth = np.maximum(smoothed(data, affine, SPACING), 0.0)
    middle = np.array(ndimage.center_of_mass(np.minimum(smooth, np.percentile(smooth, 99))))
    centre = affine[:3, :3] @ middle + affine[:3, 3]
    for _ in range(PASSES):
        grid = grid_around(centre)
        scan = scale(torch.from_numpy(resample(smooth, affine, SHAPE, grid)))
        with torch.inference_mode():
            likely = torch.sigmoid(network(scan[None, None]))[0, 0].numpy()
        brain = largest_piece(likely > 0.5)
        if not brain.any():
            return np.zeros(data.shape, dtype=bool)
        centre = grid[:3, :3] @ np.array(ndimage.center_of_mass(brain)) + grid[:3, 3]
    likely[~ndimage.binary_dilation(brain, iterations=MARGIN_VOXELS)] = 0.0
    found = resample(likely, grid, data.shape, affine) > 0.5
    return ndimage.binary_fill_holes(largest_piece(found))
