"""Synthetic heads to learn from: label maps of whole heads, deformed, in contrasts of any kind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from bids_uad.preprocessing.brain_extraction.network import SHAPE, SPACING, scale

FLUID = 24  # FreeSurfer's label of cerebrospinal fluid around the brain
LAST_INSIDE = 499  # labels above are skull, skin, eyes and so on
BONE = (515, 516)
CLOSING_MM, RIM_MM = 6, 1
FINE = 2  # heads are drawn on voxels of half the size, so that the borders of tissues are mixed
WHITE = (2, 41, 7, 46)
GREY = (3, 42, 8, 47, 17, 53, 18, 54, 11, 50, 12, 51)
BETWEEN = (10, 49, 13, 52, 16, 28, 60)
VENTRICLES = (4, 5, 14, 15, 43, 44, 72)
RIGHT_OF = {41: 2, 42: 3, 43: 4, 44: 5, 46: 7, 47: 8, 49: 10, 50: 11, 51: 12, 52: 13, 53: 17, 54: 18, 60: 28}


@dataclass(frozen=True)
class Head:
    """A label map, cut to the head.

    Attributes
    ----------
    values : tuple of int
        Labels.
    index : Tensor, shape (X, Y, Z), float32
        Place of each voxel's label in `values`; 1 mm, RAS+.
    brain : Tensor, of the same shape
        1 in the brain, its sulci and a rim of fluid, 0 elsewhere.
    centre : numpy.ndarray, shape (3,)
        Middle of the brain, voxels.
    """

    values: tuple[int, ...]
    index: Tensor
    brain: Tensor
    centre: np.ndarray


def read_head(path: Path) -> Head:
    """Read a label map of a whole head: FreeSurfer's labels, and numbers from 500 for all but the brain.

    Parameters
    ----------
    path : pathlib.Path
        About 1 mm.

    Returns
    -------
    Head
    """
    image = nib.as_closest_canonical(nib.load(path))
    labels = np.asarray(image.dataobj).astype(np.int32)
    (box,) = ndimage.find_objects((labels > 0).astype(np.uint8))
    labels = np.pad(labels[box], 2)
    inside = (labels > 0) & (labels <= LAST_INSIDE)
    tissue = inside & (labels != FLUID)
    padded = np.pad(tissue, CLOSING_MM + 2)
    grown = ndimage.distance_transform_edt(~padded) <= CLOSING_MM
    closed = ndimage.distance_transform_edt(grown) > CLOSING_MM
    edge = CLOSING_MM + 2
    closed = closed[edge:-edge, edge:-edge, edge:-edge] | tissue
    rim = ndimage.distance_transform_edt(~closed) <= RIM_MM
    brain = ndimage.binary_fill_holes(closed | (rim & inside))
    values, index = np.unique(labels, return_inverse=True)
    return Head(
        tuple(int(value) for value in values),
        torch.from_numpy(index.reshape(labels.shape).astype(np.float32)),
        torch.from_numpy(brain.astype(np.float32)),
        np.array(ndimage.center_of_mass(brain)),
    )


def simulate_head(head: Head, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Draw a scan of a head that nobody has.

    Parameters
    ----------
    head : Head
    rng : numpy.random.Generator

    Returns
    -------
    scan : Tensor, shape `grid.SHAPE`
        As the network sees scans.
    brain : Tensor, of the same shape
        Share of brain in each voxel.
    """
    places = _places(head, rng)
    labels = F.grid_sample(head.index[None, None], places, mode="nearest", align_corners=True)[0, 0].long()
    brain = F.grid_sample(head.brain[None, None], places, mode="bilinear", align_corners=True)[0, 0]
    image = _signal(head.values, labels, rng)
    if rng.uniform() < 0.4:
        image = _with_lesion(image, brain > 0.5, rng)
    image, brain = (F.avg_pool3d(volume[None], FINE)[0] for volume in (image, brain))
    image = _acquired(image, rng)
    return _cut(image, brain, rng)


def _places(head: Head, rng: np.random.Generator) -> Tensor:
    """Where each fine voxel reads the label map: turned, sized, shifted and bent."""
    fine = tuple(size * FINE for size in SHAPE)
    step = SPACING / FINE
    angles = np.deg2rad(rng.normal(0, 1, 3) * np.array([18, 8, 8]))
    size = np.exp(rng.normal(0, 0.07) + rng.normal(0, 0.035, 3))
    mirror = np.diag([-1.0 if rng.uniform() < 0.5 else 1.0, 1.0, 1.0])
    matrix = mirror @ nib.eulerangles.euler2mat(*angles[::-1]) @ np.diag(1 / size)
    shift = rng.normal(0, 14, 3)
    axes = [step * (np.arange(n) - (n - 1) / 2) - shift[axis] for axis, n in enumerate(fine)]
    axes = [torch.from_numpy(axis.astype(np.float32)) for axis in axes]
    bend = _field(rng, (7, 8, 8), fine, 3) * rng.uniform(0, 5) + _field(
        rng, (16, 19, 19), fine, 3
    ) * rng.uniform(0, 1.5)
    places = []
    for axis in range(3):
        x, y, z = (float(matrix[axis, k]) * axes[k] for k in range(3))
        position = (
            x[:, None, None] + y[None, :, None] + z[None, None, :] + bend[axis] + float(head.centre[axis])
        )
        places.append(position * (2 / (head.index.shape[axis] - 1)) - 1)
    return torch.stack(places[::-1], dim=-1)[None]


def _field(
    rng: np.random.Generator, coarse: tuple[int, ...], shape: tuple[int, ...], channels: int
) -> Tensor:
    """Smooth random field: noise on a few points, and lines between."""
    noise = torch.from_numpy(rng.standard_normal((1, channels, *coarse)).astype(np.float32))
    return F.interpolate(noise, size=shape, mode="trilinear", align_corners=True)[0]


def _signal(values: tuple[int, ...], labels: Tensor, rng: np.random.Generator) -> Tensor:
    """Give each label an intensity and a texture; in most heads the brain's are as in T1w or T2w."""
    mean, spread = rng.uniform(0, 1, len(values)), rng.uniform(0, 0.09, len(values))
    place = {value: number for number, value in enumerate(values)}
    for right, left in RIGHT_OF.items():
        if right in place and left in place:
            mean[place[right]], spread[place[right]] = mean[place[left]], spread[place[left]]
    if rng.uniform() < 0.65:
        for value, intensity in _brainlike(rng).items():
            if value in place:
                mean[place[value]] = intensity
        if rng.uniform() < 0.7:
            for value in BONE:
                if value in place:
                    mean[place[value]] = rng.uniform(0, 0.15)
    if rng.uniform() < 0.7:
        mean[place[0]] = spread[place[0]] = 0.0
    mean, spread = (torch.from_numpy(part.astype(np.float32)) for part in (mean, spread))
    grain = torch.from_numpy(rng.standard_normal(tuple(n // 2 for n in labels.shape)).astype(np.float32))
    grain = F.interpolate(grain[None, None], size=labels.shape, mode="nearest")[0, 0]
    return (mean[labels] + spread[labels] * grain).clamp_min(0)


def _brainlike(rng: np.random.Generator) -> dict[int, float]:
    """Intensities of the brain's labels as in T1w (fluid dark) or T2w (fluid bright)."""
    if rng.uniform() < 0.5:
        white, grey, fluid = 1.0, rng.uniform(0.5, 0.92), rng.uniform(0.05, 0.5)
    else:
        white, grey, fluid = rng.uniform(0.15, 0.5), rng.uniform(0.25, 0.6), rng.uniform(0.6, 1.0)
    gain = rng.uniform(0.4, 1.0)
    means = dict.fromkeys(WHITE, white) | dict.fromkeys(VENTRICLES, fluid)
    means |= {value: grey * rng.uniform(0.93, 1.07) for value in GREY}
    means |= {value: (grey + white) / 2 * rng.uniform(0.93, 1.07) for value in BETWEEN}
    means[FLUID] = fluid * rng.uniform(0.8, 1.1)
    return {value: gain * mean for value, mean in means.items()}


def _with_lesion(image: Tensor, brain: Tensor, rng: np.random.Generator) -> Tensor:
    """Paint blobs of one intensity somewhere in the brain: what is not healthy is brain, too."""
    coarse = tuple(int(n) for n in rng.integers(5, 16, 3))
    blobs = _field(rng, coarse, tuple(image.shape), 1)[0] > float(rng.uniform(0.9, 1.6))
    return torch.where(blobs & brain, 0.2 * image + 0.8 * float(rng.uniform(0, 1.1)), image)


def _acquired(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Bias field, blur or thick slices, contrast curve and noise."""
    image = image * torch.exp(_field(rng, (4, 4, 4), SHAPE, 1)[0] * float(rng.uniform(0, 0.35)))
    kind = rng.uniform()
    if kind < 0.4:
        axis, thickness = int(rng.integers(3)), rng.uniform(1, 2.7)
        size = list(SHAPE)
        size[axis] = max(8, int(SHAPE[axis] / thickness))
        thick = F.interpolate(image[None, None], size=size, mode="area")
        image = F.interpolate(thick, size=SHAPE, mode="trilinear", align_corners=False)[0, 0]
    elif kind < 0.7:
        share = float(rng.uniform(0, 0.8))
        image = (1 - share) * image + share * F.avg_pool3d(image[None], 3, stride=1, padding=1)[0]
    image = image / (torch.quantile(image.flatten()[::7], 0.99) + 1e-6)
    image = image.clamp_min(0) ** float(np.exp(rng.normal(0, 0.25)))
    noise = float(rng.uniform(0, 0.07)) * torch.from_numpy(
        rng.standard_normal((2, *SHAPE)).astype(np.float32)
    )
    return torch.hypot(image + noise[0], noise[1])


def _cut(image: Tensor, brain: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Leave out what a field of view misses, and sometimes the face, or all but the brain's surroundings."""
    for axis in range(3):
        for side in (0, 1):
            if rng.uniform() < 0.2:
                width = int(rng.integers(1, 22))
                lost = [slice(None)] * 3
                lost[axis] = slice(-width, None) if side else slice(0, width)
                image[tuple(lost)] = 0
                brain[tuple(lost)] = 0
    if rng.uniform() < 0.2:
        reach = int(rng.integers(1, 6))
        near = F.max_pool3d((brain > 0.3).float()[None], 2 * reach + 1, stride=1, padding=reach)[0]
        if rng.uniform() < 0.7:
            near[:, : SHAPE[1] // 2] = 1  # the back of the head stays
        image = image * near
    return scale(image), brain
