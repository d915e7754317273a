"""Simulated whole heads to train the brain extraction: deformed label maps in random contrasts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from bids_uad.preprocessing.brain_extraction.network import (
    INPUT_SHAPE,
    INPUT_SPACING_MM,
    scale_to_bright_tissue,
)

CSF = 24  # FreeSurfer's label of cerebrospinal fluid around the brain
LAST_INTRACRANIAL = 499  # higher labels are skull, skin, eyes and so on
BONE = (515, 516)
WHITE = (2, 41, 7, 46)
GREY = (3, 42, 8, 47, 17, 53, 18, 54, 11, 50, 12, 51)
WHITE_GREY_MIXTURE = (10, 49, 13, 52, 16, 28, 60)
VENTRICLES = (4, 5, 14, 15, 43, 44, 72)
LEFT_OF = {41: 2, 42: 3, 43: 4, 44: 5, 46: 7, 47: 8, 49: 10, 50: 11, 51: 12, 52: 13, 53: 17, 54: 18, 60: 28}
"""Label of the left hemisphere by that of the right one."""
CLOSING_MM, CSF_RIM_MM = 6, 1
OVERSAMPLING = 2  # heads are drawn on voxels of half the size, which gives partial volume at tissue borders


@dataclass(frozen=True)
class Head:
    """Label map of a whole head, cropped to the head.

    Attributes
    ----------
    values : tuple of int
        Labels.
    index : Tensor of float32, shape (X, Y, Z)
        Index into `values` for each voxel; voxels of 1 mm, RAS+.
    brain : Tensor of float32, shape (X, Y, Z)
        1 in the brain, its sulci and 1 mm of fluid around it, 0 elsewhere.
    centre : numpy.ndarray, shape (3,)
        Centre of mass of the brain, voxels.
    """

    values: tuple[int, ...]
    index: Tensor
    brain: Tensor
    centre: np.ndarray


def read_head(path: Path) -> Head:
    """Read a label map of a whole head.

    Parameters
    ----------
    path : pathlib.Path
        NIfTI file of about 1 mm with FreeSurfer's labels, and labels from 500 for extracerebral tissue.

    Returns
    -------
    Head
        Label map and brain mask, cropped and padded by two voxels.
    """
    image = nib.as_closest_canonical(nib.load(path))
    labels = np.asarray(image.dataobj).astype(np.int32)
    (box,) = ndimage.find_objects((labels > 0).astype(np.uint8))
    labels = np.pad(labels[box], 2)
    inside = (labels > 0) & (labels <= LAST_INTRACRANIAL)
    tissue = inside & (labels != CSF)
    margin = CLOSING_MM + 2
    dilated = ndimage.distance_transform_edt(~np.pad(tissue, margin)) <= CLOSING_MM
    closed = ndimage.distance_transform_edt(dilated) > CLOSING_MM
    closed = closed[margin:-margin, margin:-margin, margin:-margin] | tissue
    rim = ndimage.distance_transform_edt(~closed) <= CSF_RIM_MM
    brain = ndimage.binary_fill_holes(closed | (rim & inside))
    values, index = np.unique(labels, return_inverse=True)
    return Head(
        tuple(int(value) for value in values),
        torch.from_numpy(index.reshape(labels.shape).astype(np.float32)),
        torch.from_numpy(brain.astype(np.float32)),
        np.array(ndimage.center_of_mass(brain)),
    )


def simulate_head(head: Head, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Simulate a scan of a randomly deformed head.

    Parameters
    ----------
    head : Head
        Label map.
    rng : numpy.random.Generator
        Source of all random numbers.

    Returns
    -------
    scan : Tensor, shape `INPUT_SHAPE`
        Input of the network.
    brain : Tensor, shape `INPUT_SHAPE`
        Fraction of brain in each voxel.
    """
    points = _sampling_points(head, rng)
    labels = F.grid_sample(head.index[None, None], points, mode="nearest", align_corners=True)[0, 0].long()
    brain = F.grid_sample(head.brain[None, None], points, mode="bilinear", align_corners=True)[0, 0]
    image = _tissue_signal(head.values, labels, rng)
    if rng.uniform() < 0.4:
        image = _add_lesions(image, brain > 0.5, rng)
    image, brain = (F.avg_pool3d(volume[None], OVERSAMPLING)[0] for volume in (image, brain))
    image = _acquire(image, rng)
    return _crop_field_of_view(image, brain, rng)


def _sampling_points(head: Head, rng: np.random.Generator) -> Tensor:
    """Draw a rotation, scaling, shift and deformation; return where each fine voxel reads the label map."""
    fine = tuple(size * OVERSAMPLING for size in INPUT_SHAPE)
    step = INPUT_SPACING_MM / OVERSAMPLING
    angles = np.deg2rad(rng.normal(0, 1, 3) * np.array([18, 8, 8]))
    size = np.exp(rng.normal(0, 0.07) + rng.normal(0, 0.035, 3))
    mirror = np.diag([-1.0 if rng.uniform() < 0.5 else 1.0, 1.0, 1.0])
    matrix = mirror @ nib.eulerangles.euler2mat(*angles[::-1]) @ np.diag(1 / size)
    shift = rng.normal(0, 14, 3)
    axes = [step * (np.arange(n) - (n - 1) / 2) - shift[axis] for axis, n in enumerate(fine)]
    axes = [torch.from_numpy(axis.astype(np.float32)) for axis in axes]
    displacement = _random_field(rng, (7, 8, 8), fine, 3) * rng.uniform(0, 5)
    displacement = displacement + _random_field(rng, (16, 19, 19), fine, 3) * rng.uniform(0, 1.5)
    points = []
    for axis in range(3):
        x, y, z = (float(matrix[axis, k]) * axes[k] for k in range(3))
        position = x[:, None, None] + y[None, :, None] + z[None, None, :] + displacement[axis]
        position = position + float(head.centre[axis])
        points.append(position * (2 / (head.index.shape[axis] - 1)) - 1)
    return torch.stack(points[::-1], dim=-1)[None]


def _random_field(
    rng: np.random.Generator, coarse: tuple[int, ...], shape: tuple[int, ...], channels: int
) -> Tensor:
    """Draw a smooth random field: white noise on a coarse grid, interpolated linearly to `shape`."""
    noise = torch.from_numpy(rng.standard_normal((1, channels, *coarse)).astype(np.float32))
    return F.interpolate(noise, size=shape, mode="trilinear", align_corners=True)[0]


def _tissue_signal(values: tuple[int, ...], labels: Tensor, rng: np.random.Generator) -> Tensor:
    """Draw mean and standard deviation of each label; in 65 % of heads the brain is T1w- or T2w-like."""
    mean, std = rng.uniform(0, 1, len(values)), rng.uniform(0, 0.09, len(values))
    position = {value: number for number, value in enumerate(values)}
    for right, left in LEFT_OF.items():
        if right in position and left in position:
            mean[position[right]], std[position[right]] = mean[position[left]], std[position[left]]
    if rng.uniform() < 0.65:
        for value, intensity in _realistic_means(rng).items():
            if value in position:
                mean[position[value]] = intensity
        if rng.uniform() < 0.7:
            for value in BONE:
                if value in position:
                    mean[position[value]] = rng.uniform(0, 0.15)
    if rng.uniform() < 0.7:
        mean[position[0]] = std[position[0]] = 0.0
    mean, std = (torch.from_numpy(part.astype(np.float32)) for part in (mean, std))
    noise = torch.from_numpy(rng.standard_normal(tuple(n // 2 for n in labels.shape)).astype(np.float32))
    noise = F.interpolate(noise[None, None], size=labels.shape, mode="nearest")[0, 0]
    return (mean[labels] + std[labels] * noise).clamp_min(0)


def _realistic_means(rng: np.random.Generator) -> dict[int, float]:
    """Draw mean intensities of the brain's labels as in T1w (dark fluid) or T2w (bright fluid)."""
    if rng.uniform() < 0.5:
        white, grey, fluid = 1.0, rng.uniform(0.5, 0.92), rng.uniform(0.05, 0.5)
    else:
        white, grey, fluid = rng.uniform(0.15, 0.5), rng.uniform(0.25, 0.6), rng.uniform(0.6, 1.0)
    gain = rng.uniform(0.4, 1.0)
    means = dict.fromkeys(WHITE, white) | dict.fromkeys(VENTRICLES, fluid)
    means |= {value: grey * rng.uniform(0.93, 1.07) for value in GREY}
    means |= {value: (grey + white) / 2 * rng.uniform(0.93, 1.07) for value in WHITE_GREY_MIXTURE}
    means[CSF] = fluid * rng.uniform(0.8, 1.1)
    return {value: gain * mean for value, mean in means.items()}


def _add_lesions(image: Tensor, brain: Tensor, rng: np.random.Generator) -> Tensor:
    """Paint blobs of one intensity into the brain, so that the network includes lesions in the mask."""
    coarse = tuple(int(n) for n in rng.integers(5, 16, 3))
    blobs = _random_field(rng, coarse, tuple(image.shape), 1)[0] > float(rng.uniform(0.9, 1.6))
    return torch.where(blobs & brain, 0.2 * image + 0.8 * float(rng.uniform(0, 1.1)), image)


def _acquire(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Apply a bias field, blur or thick slices, a gamma curve and Rician noise."""
    image = image * torch.exp(_random_field(rng, (4, 4, 4), INPUT_SHAPE, 1)[0] * float(rng.uniform(0, 0.35)))
    kind = rng.uniform()
    if kind < 0.4:
        axis, thickness = int(rng.integers(3)), rng.uniform(1, 2.7)
        size = list(INPUT_SHAPE)
        size[axis] = max(8, int(INPUT_SHAPE[axis] / thickness))
        thick = F.interpolate(image[None, None], size=size, mode="area")
        image = F.interpolate(thick, size=INPUT_SHAPE, mode="trilinear", align_corners=False)[0, 0]
    elif kind < 0.7:
        blur = float(rng.uniform(0, 0.8))
        image = (1 - blur) * image + blur * F.avg_pool3d(image[None], 3, stride=1, padding=1)[0]
    image = image / (torch.quantile(image.flatten()[::7], 0.99) + 1e-6)
    image = image.clamp_min(0) ** float(np.exp(rng.normal(0, 0.25)))
    level = float(rng.uniform(0, 0.07))
    noise = level * torch.from_numpy(rng.standard_normal((2, *INPUT_SHAPE)).astype(np.float32))
    return torch.hypot(image + noise[0], noise[1])


def _crop_field_of_view(image: Tensor, brain: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Set margins of a random field of view to 0, and in 20 % of heads tissue away from the brain."""
    for axis in range(3):
        for side in (0, 1):
            if rng.uniform() < 0.2:
                width = int(rng.integers(1, 22))
                outside = [slice(None)] * 3
                outside[axis] = slice(-width, None) if side else slice(0, width)
                image[tuple(outside)] = 0
                brain[tuple(outside)] = 0
    if rng.uniform() < 0.2:
        reach = int(rng.integers(1, 6))
        near = F.max_pool3d((brain > 0.3).float()[None], 2 * reach + 1, stride=1, padding=reach)[0]
        if rng.uniform() < 0.7:
            near[:, : INPUT_SHAPE[1] // 2] = 1  # keep the back of the head
        image = image * near
    return scale_to_bright_tissue(image), brain
