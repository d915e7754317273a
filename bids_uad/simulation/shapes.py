"""Shapes of real lesions: binary masks in ICBM152 (MNI) space, resampled to simulated brains."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from scipy import ndimage

from bids_uad.errors import InputError
from bids_uad.simulation.spatial import sample, smooth, tensor
from bids_uad.space import icbm_to_sri24

PATHOLOGIES = {
    "stroke": "stroke",
    "acute stroke": "stroke",
    "chronic stroke": "stroke",
    "multiple sclerosis": "ms",
    "ms": "ms",
    "white matter hyperintensities": "wmh",
    "wmh": "wmh",
}
"""Kind of lesion by the pathology in lesions.tsv. Tumours are always drawn, because of their mass effect."""
EDGE_MM = 0.6
"""Smoothing after which the edge of a mask is about one voxel wide."""
SHIFT_MM = 4.0
"""Standard deviation of the random shift along each axis."""
MIN_COMPONENT_ML = 0.5
"""Volume below which a component of a mask is not used as a shape."""

Shape = Callable[[float], torch.Tensor]


def lesion_shapes(folder: Path) -> dict[str, tuple[str, ...]]:
    """List the lesion masks of a folder by kind of lesion.

    Parameters
    ----------
    folder : pathlib.Path
        Folder with masks in ICBM152 space and ``lesions.tsv`` with columns `file` and `pathology`.

    Returns
    -------
    dict
        Sorted paths by kind of lesion.

    Raises
    ------
    InputError
        If the table is missing, lacks a column or lists a missing file.
    """
    table = folder / "lesions.tsv"
    if not table.is_file():
        raise InputError(table, "is missing", "list the masks in it, with columns `file` and `pathology`")
    rows = pd.read_csv(table, sep="\t")
    if not {"file", "pathology"} <= set(rows.columns):
        raise InputError(table, "lacks a column `file` or `pathology`", "add it")
    found: dict[str, list[str]] = {}
    for file, pathology in zip(rows["file"], rows["pathology"], strict=True):
        kind = PATHOLOGIES.get(str(pathology).lower())
        if kind is None:
            continue
        if not (folder / file).is_file():
            raise InputError(folder / file, "is listed in lesions.tsv but missing", "copy it again")
        found.setdefault(kind, []).append(str(folder / file))
    return {kind: tuple(sorted(paths)) for kind, paths in found.items()}


def component_shapes(folder: Path) -> list[torch.Tensor]:
    """Read the connected components of real lesion masks, at 1 mm.

    Parameters
    ----------
    folder : pathlib.Path
        See :func:`lesion_shapes`.

    Returns
    -------
    list of torch.Tensor of bool, shape (x, y, z)
        Cropped components of at least 0.5 mL, with holes filled.
    """
    shapes = []
    for path in chain.from_iterable(lesion_shapes(folder).values()):
        image = nib.as_closest_canonical(nib.load(path))
        labels, _ = ndimage.label(np.asarray(image.dataobj) > 0)
        spacing = nib.affines.voxel_sizes(image.affine)
        for number, box in enumerate(ndimage.find_objects(labels), 1):
            inside = ndimage.binary_fill_holes(labels[box] == number)
            if inside.sum() * spacing.prod() >= 1000 * MIN_COMPONENT_ML:
                shapes.append(torch.from_numpy(ndimage.zoom(inside, spacing, order=0)))
    return shapes


def real_shape(path: str, points: torch.Tensor, rng: np.random.Generator) -> Shape:
    """Read a real lesion and shift it at random.

    Parameters
    ----------
    path : str
        Mask in ICBM152 space.
    points : torch.Tensor, shape (X, Y, Z, 3)
        Source position of the tissue of each voxel of the box, SRI24 world coordinates, mm; see
        `deformation.source_points`.
    rng : numpy.random.Generator
        Source of the shift.

    Returns
    -------
    callable
        ``shape(scale)`` returns the fraction of lesion per voxel, 0 to 1, shape (X, Y, Z), with all lengths
        multiplied by `scale`.
    """
    image = nib.as_closest_canonical(nib.load(path))
    mask = np.asarray(image.dataobj) > 0
    affine = icbm_to_sri24() @ image.affine
    corner = np.maximum(np.argwhere(mask).min(0) - 3, 0)
    cut = tuple(slice(a, b + 4) for a, b in zip(corner, np.argwhere(mask).max(0), strict=True))
    affine = affine @ nib.affines.from_matvec(np.eye(3), corner)
    spacing = nib.affines.voxel_sizes(image.affine)
    soft = smooth(tensor(mask[cut].astype(np.float32)), tuple(float(EDGE_MM / size) for size in spacing))
    centre = tensor((affine[:3, :3] @ np.argwhere(mask[cut]).mean(0) + affine[:3, 3]).astype(np.float32))
    shift = tensor(rng.normal(0.0, SHIFT_MM, 3).astype(np.float32))

    def shape(scale: float) -> torch.Tensor:
        return sample(soft[None], affine, (points - centre - shift) / scale + centre)[0].clamp(0, 1)

    return shape
