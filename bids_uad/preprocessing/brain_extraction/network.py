"""Network for brain extraction: a three-dimensional U-Net on 3 mm voxels, and its inference on a scan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F

from bids_uad.errors import InputError
from bids_uad.preprocessing.brain_extraction.masks import largest_component
from bids_uad.preprocessing.resampling import resample, smooth_to_spacing

INPUT_SHAPE = (80, 96, 96)
INPUT_SPACING_MM = 3.0
"""Isotropic voxel size of the network's input grid, whose axes are RAS+."""
BLOCK = 2
"""Edge (voxels) of the blocks that are moved into channels: the U-Net runs on 6 mm voxels."""
NORM_GROUPS = 8
BRIGHT_QUANTILE = 0.98
AIR_FRACTION = 0.02
"""Voxels below this fraction of the maximum are air in `scale_to_bright_tissue`."""
PASSES = 2
MARGIN_VOXELS = 2


class BrainNet(nn.Module):
    """U-Net that predicts the brain mask of a whole head of any contrast.

    After SynthStrip (Hoopes et al. 2022, doi:10.1016/j.neuroimage.2022.119474), which trained such a network
    on synthetic heads of random contrast; this one is small enough to run in a second on one CPU core.

    Parameters
    ----------
    widths : tuple of int, default=(24, 48, 72, 96)
        Channels at each of four resolutions, the finest first.
    """

    def __init__(self, widths: tuple[int, int, int, int] = (24, 48, 72, 96)) -> None:
        super().__init__()
        inputs = (BLOCK**3, *widths[:-1])
        self.down = nn.ModuleList([_conv_block(*pair) for pair in zip(inputs, widths, strict=True)])
        coarse = widths[:0:-1]
        self.up = nn.ModuleList(
            [_conv_block(below + level, level) for below, level in zip(coarse, widths[-2::-1], strict=True)]
        )
        self.head = nn.Conv3d(widths[0], BLOCK**3, 3, padding=1)

    def forward(self, volumes: Tensor) -> Tensor:
        """Compute the logit of the brain probability of each voxel.

        Parameters
        ----------
        volumes : Tensor, shape (B, 1, X, Y, Z)
            Scans with bright tissue at about 1 and air at 0. X, Y and Z are divisible by 16.

        Returns
        -------
        Tensor, shape (B, 1, X, Y, Z)
            Logits.
        """
        x = _space_to_depth(volumes)
        skips = []
        for level, block in enumerate(self.down):
            x = block(F.max_pool3d(x, 2) if level else x)
            skips.append(x)
        for block, skip in zip(self.up, skips[-2::-1], strict=True):
            x = F.interpolate(x, size=skip.shape[2:], mode="nearest")
            x = block(torch.cat([x, skip], dim=1))
        return _depth_to_space(self.head(x))


def _conv_block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(inputs, outputs, 3, padding=1, bias=False),
        nn.GroupNorm(NORM_GROUPS, outputs),
        nn.SiLU(),
        nn.Conv3d(outputs, outputs, 3, padding=1, bias=False),
        nn.GroupNorm(NORM_GROUPS, outputs),
        nn.SiLU(),
    )


def _space_to_depth(volumes: Tensor) -> Tensor:
    """Move blocks of 2 x 2 x 2 voxels into channels."""
    batch, _, x, y, z = volumes.shape
    blocks = volumes.reshape(batch, x // BLOCK, BLOCK, y // BLOCK, BLOCK, z // BLOCK, BLOCK)
    return blocks.permute(0, 2, 4, 6, 1, 3, 5).reshape(batch, BLOCK**3, x // BLOCK, y // BLOCK, z // BLOCK)


def _depth_to_space(blocks: Tensor) -> Tensor:
    """Invert `_space_to_depth`."""
    batch, _, x, y, z = blocks.shape
    volumes = blocks.reshape(batch, BLOCK, BLOCK, BLOCK, x, y, z).permute(0, 4, 1, 5, 2, 6, 3)
    return volumes.reshape(batch, 1, BLOCK * x, BLOCK * y, BLOCK * z)


def load_network(weights: Path) -> BrainNet:
    """Load the weights that ``bids_uad.training.brain_extraction`` writes.

    Parameters
    ----------
    weights : pathlib.Path
        Safetensors file.

    Returns
    -------
    BrainNet
        Network in evaluation mode.

    Raises
    ------
    InputError
        If the file cannot be read or holds other weights.
    """
    network = BrainNet()
    try:
        network.load_state_dict({name: value.float() for name, value in load_file(weights).items()})
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            weights, f"not the weights of the brain-extraction network ({reason})", "train the network again"
        ) from error
    return network.eval()


def predict_brain_mask(data: np.ndarray, affine: np.ndarray, network: BrainNet) -> np.ndarray:
    """Predict the brain mask of a whole-head scan of any contrast.

    The input grid is centred on the head's centre of mass first, then on the predicted brain.

    Parameters
    ----------
    data : numpy.ndarray, three-dimensional
        Whole-head scan.
    affine : numpy.ndarray, shape (4, 4)
        Voxel-to-world, RAS+, mm.
    network : BrainNet
        Trained network.

    Returns
    -------
    numpy.ndarray of bool, of the shape of `data`
        Brain mask: one component without holes; empty if no brain is found.
    """
    smooth = np.maximum(smooth_to_spacing(data, affine, INPUT_SPACING_MM), 0.0)
    if not smooth.any():
        return np.zeros(data.shape, dtype=bool)
    middle = np.array(ndimage.center_of_mass(np.minimum(smooth, np.percentile(smooth, 99))))
    centre = affine[:3, :3] @ middle + affine[:3, 3]
    for _ in range(PASSES):
        grid = grid_affine(centre)
        scan = scale_to_bright_tissue(torch.from_numpy(resample(smooth, affine, INPUT_SHAPE, grid)))
        with torch.inference_mode():
            probability = torch.sigmoid(network(scan[None, None]))[0, 0].numpy()
        brain = largest_component(probability > 0.5)
        if not brain.any():
            return np.zeros(data.shape, dtype=bool)
        centre = grid[:3, :3] @ np.array(ndimage.center_of_mass(brain)) + grid[:3, 3]
    probability[~ndimage.binary_dilation(brain, iterations=MARGIN_VOXELS)] = 0.0
    mask = resample(probability, grid, data.shape, affine) > 0.5
    return ndimage.binary_fill_holes(largest_component(mask))


def grid_affine(centre: np.ndarray) -> np.ndarray:
    """Return the affine of the network's input grid, centred at a point.

    Parameters
    ----------
    centre : numpy.ndarray, shape (3,)
        World coordinates, RAS+, mm.

    Returns
    -------
    numpy.ndarray, shape (4, 4)
        Voxel-to-world, mm.
    """
    affine = np.diag([INPUT_SPACING_MM, INPUT_SPACING_MM, INPUT_SPACING_MM, 1.0])
    affine[:3, 3] = centre - INPUT_SPACING_MM * (np.array(INPUT_SHAPE) - 1) / 2
    return affine


def scale_to_bright_tissue(volume: Tensor) -> Tensor:
    """Divide a scan by the 98th percentile of its voxels that are not air.

    Parameters
    ----------
    volume : Tensor
        Non-negative intensities.

    Returns
    -------
    Tensor
        Scaled and clipped at 2; unchanged if fewer than 100 voxels are not air.
    """
    tissue = volume[volume > AIR_FRACTION * volume.max()]
    if tissue.numel() < 100:
        return volume
    step = max(1, tissue.numel() // 200_000)
    return (volume / torch.quantile(tissue[::step], BRIGHT_QUANTILE)).clamp(0, 2)
