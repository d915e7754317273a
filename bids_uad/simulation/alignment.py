"""Rigid alignment of a label map with the template on the SRI24 grid.

Classes are compared, not intensities, so a squared difference on a coarse grid suffices and the optimum
is found by a quasi-Newton search in about a second.
"""

from __future__ import annotations

from functools import lru_cache

import nibabel as nib
import numpy as np
import torch
from torch.nn import functional as F

from bids_uad.simulation.anatomy import CLASSES, Source, built_in_source, read_label_map
from bids_uad.simulation.spatial import box_points, sample, smooth, tensor

STEP = 4
GROUPS = (
    ("cortex", "cerebellar_cortex", "hippocampus"),
    ("white", "cerebellar_white", "brainstem"),
    ("ventricle",),
    ("thalamus", "striatum", "pallidum"),
)


def _coarse(maps: list[torch.Tensor], affine: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    """Halve the resolution of the group maps and smooth them enough for the coarse grid."""
    halved = F.avg_pool3d(torch.stack(maps), 2)
    # The first coarse voxel is centred between the first two fine ones.
    return smooth(halved, STEP * 0.375), affine @ nib.affines.from_matvec(np.diag([2, 2, 2]), [0.5] * 3)


@lru_cache(maxsize=1)
def _target() -> tuple[torch.Tensor, torch.Tensor]:
    """Put the grouped template maps on the coarse grid; also return the points of that grid."""
    source: Source = built_in_source()
    points = box_points()[::STEP, ::STEP, ::STEP].contiguous()
    maps = [sum(source.fractions[CLASSES.index(name)] for name in group) for group in GROUPS]
    return sample(*_coarse(maps, source.affine), points), points


def rotation(angles: torch.Tensor) -> torch.Tensor:
    """Rotation matrix of three Euler angles in radians (about x, then y, then z)."""
    (cx, cy, cz), (sx, sy, sz) = torch.cos(angles), torch.sin(angles)
    one, zero = torch.ones_like(cx), torch.zeros_like(cx)
    about_x = torch.stack([one, zero, zero, zero, cx, -sx, zero, sx, cx]).reshape(3, 3)
    about_y = torch.stack([cy, zero, sy, zero, one, zero, -sy, zero, cy]).reshape(3, 3)
    about_z = torch.stack([cz, -sz, zero, sz, cz, zero, zero, zero, one]).reshape(3, 3)
    return about_z @ about_y @ about_x


@lru_cache(maxsize=64)
def label_map_to_sri24(path: str) -> np.ndarray:
    """Rigid transform of a label map into SRI24 space.

    A similarity is fitted, so that a small brain is centred well, and its scale is then left out: sizes
    differ between people after a rigid registration too.

    Parameters
    ----------
    path : str

    Returns
    -------
    numpy.ndarray, shape (4, 4)
        World of the label map -> SRI24 world, mm.
    """
    classes, affine = read_label_map(path)
    indices = tensor(classes)
    maps = [sum((indices == CLASSES.index(name) + 1).float() for name in group) for group in GROUPS]
    moving, coarse_affine = _coarse(maps, affine)
    target, points = _target()
    weight = target.sum(0).flatten()
    centre_target = (points.reshape(-1, 3) * weight[:, None]).sum(0) / weight.sum()
    mass = np.argwhere(classes[::STEP, ::STEP, ::STEP] > 2).mean(0) * STEP
    centre_moving = tensor(affine[:3, :3] @ mass + affine[:3, 3]).float()

    # Angles in units of 0.1 rad, shifts in cm: parameters of one order of magnitude.
    parameters = torch.zeros(7, requires_grad=True)
    optimiser = torch.optim.LBFGS([parameters], lr=0.5, max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        turn = rotation(parameters[:3] * 0.1) * torch.exp(parameters[6] * 0.1)
        moved = (points - centre_target) @ turn.T + centre_moving + parameters[3:6] * 10.0
        value = ((sample(moving, coarse_affine, moved) - target) ** 2).mean() * 100
        value.backward()
        return value

    optimiser.step(loss)
    with torch.no_grad():
        turn = rotation(parameters[:3] * 0.1).double().cpu().numpy()
        shift = (centre_moving + parameters[3:6] * 10.0).double().cpu().numpy()
    pull = np.eye(4)
    pull[:3, :3] = turn
    pull[:3, 3] = shift - turn @ centre_target.double().cpu().numpy()
    return np.linalg.inv(pull)
