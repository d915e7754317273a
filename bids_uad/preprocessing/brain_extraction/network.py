"""The network: a three-dimensional U-Net on 3 mm voxels that looks at blocks of 2 x 2 x 2 of them."""

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

GROUPS = 8
FOLD = 2


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(inputs, outputs, 3, padding=1, bias=False),
        nn.GroupNorm(GROUPS, outputs),
        nn.SiLU(),
        nn.Conv3d(outputs, outputs, 3, padding=1, bias=False),
        nn.GroupNorm(GROUPS, outputs),
        nn.SiLU(),
    )


class BrainNet(nn.Module):
    """Says of each voxel how likely it is brain.

    After SynthStrip (Hoopes et al. 2022, doi:10.1016/j.neuroimage.2022.119474), which taught such a network
    with synthetic heads of random contrast; this one is small enough for a second on one CPU core.

    Parameters
    ----------
    widths : tuple of int
        Channels at each of four resolutions, the finest first.
    """

    def __init__(self, widths: tuple[int, int, int, int] = (24, 48, 72, 96)) -> None:
        super().__init__()
        inputs = (FOLD**3, *widths[:-1])
        self.down = nn.ModuleList([_block(*pair) for pair in zip(inputs, widths, strict=True)])
        coarse = widths[:0:-1]
        self.up = nn.ModuleList(
            [_block(below + level, level) for below, level in zip(coarse, widths[-2::-1], strict=True)]
        )
        self.head = nn.Conv3d(widths[0], FOLD**3, 3, padding=1)

    def forward(self, volumes: Tensor) -> Tensor:
        """Logits of each voxel.

        Parameters
        ----------
        volumes : Tensor, shape (B, 1, X, Y, Z)
            Sizes divisible by 16; the head's bright tissue at about 1, air at 0.

        Returns
        -------
        Tensor, of the same shape
        """
        x = _fold(volumes)
        skips = []
        for level, block in enumerate(self.down):
            x = block(F.max_pool3d(x, 2) if level else x)
            skips.append(x)
        for block, skip in zip(self.up, skips[-2::-1], strict=True):
            x = F.interpolate(x, size=skip.shape[2:], mode="nearest")
            x = block(torch.cat([x, skip], dim=1))
        return _unfold(self.head(x))


def _fold(volumes: Tensor) -> Tensor:
    """Put blocks of voxels into channels."""
    batch, _, x, y, z = volumes.shape
    blocks = volumes.reshape(batch, x // FOLD, FOLD, y // FOLD, FOLD, z // FOLD, FOLD)
    return blocks.permute(0, 2, 4, 6, 1, 3, 5).reshape(batch, FOLD**3, x // FOLD, y // FOLD, z // FOLD)


def _unfold(blocks: Tensor) -> Tensor:
    """Undo `_fold`."""
    batch, _, x, y, z = blocks.shape
    volumes = blocks.reshape(batch, FOLD, FOLD, FOLD, x, y, z).permute(0, 4, 1, 5, 2, 6, 3)
    return volumes.reshape(batch, 1, FOLD * x, FOLD * y, FOLD * z)


SHAPE = (80, 96, 96)
SPACING = 3.0
"""mm; isotropic, RAS+."""
BRIGHT = 0.98
AIR = 0.02


def grid_affine(centre: np.ndarray) -> np.ndarray:
    """Affine of the grid whose middle is a point of the world.

    Parameters
    ----------
    centre : numpy.ndarray, shape (3,)
        RAS+, mm.

    Returns
    -------
    numpy.ndarray, shape (4, 4)
    """
    affine = np.diag([SPACING, SPACING, SPACING, 1.0])
    affine[:3, 3] = centre - SPACING * (np.array(SHAPE) - 1) / 2
    return affine


def scale(volume: Tensor) -> Tensor:
    """Bring what is bright in a head to 1.

    Parameters
    ----------
    volume : Tensor
        Not negative.

    Returns
    -------
    Tensor
        Divided by the 98th percentile of what is not air, cut at 2; as it was if there is next to nothing.
    """
    tissue = volume[volume > AIR * volume.max()]
    if tissue.numel() < 100:
        return volume
    step = max(1, tissue.numel() // 200_000)
    return (volume / torch.quantile(tissue[::step], BRIGHT)).clamp(0, 2)


PASSES = 2
MARGIN_VOXELS = 2


def load_network(weights: Path) -> BrainNet:
    """Load what ``bids_uad extraction`` wrote.

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


def predict_brain_mask(data: np.ndarray, affine: np.ndarray, network: BrainNet) -> np.ndarray:
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
    smooth = np.maximum(smooth_to_spacing(data, affine, SPACING), 0.0)
    middle = np.array(ndimage.center_of_mass(np.minimum(smooth, np.percentile(smooth, 99))))
    centre = affine[:3, :3] @ middle + affine[:3, 3]
    for _ in range(PASSES):
        grid = grid_affine(centre)
        scan = scale(torch.from_numpy(resample(smooth, affine, SHAPE, grid)))
        with torch.inference_mode():
            likely = torch.sigmoid(network(scan[None, None]))[0, 0].numpy()
        brain = largest_component(likely > 0.5)
        if not brain.any():
            return np.zeros(data.shape, dtype=bool)
        centre = grid[:3, :3] @ np.array(ndimage.center_of_mass(brain)) + grid[:3, 3]
    likely[~ndimage.binary_dilation(brain, iterations=MARGIN_VOXELS)] = 0.0
    found = resample(likely, grid, data.shape, affine) > 0.5
    return ndimage.binary_fill_holes(largest_component(found))
