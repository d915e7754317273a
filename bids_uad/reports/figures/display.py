"""Volumes in RAS+ voxel order, and slices of them in the neurological convention (left is left).

Volumes are reoriented to RAS+ by their affine, so that the voxel order on disk has no effect on the display.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from bids_uad import images, space
from bids_uad.images import load_image

CONVENTION = "Neurological convention: the subject's left is on the left of the image"
EDGE_LABELS = {"axial": ("L", "R"), "coronal": ("L", "R"), "sagittal": ("P", "A")}
MIDLINE_X = float(space.AFFINE[0, 0] * (space.SHAPE[0] - 1) / 2 + space.AFFINE[0, 3])
_NORMAL_AXIS = {"axial": 2, "coronal": 1, "sagittal": 0}


@dataclass(frozen=True)
class Volume:
    """Volume in RAS+ voxel order.

    Attributes
    ----------
    data : numpy.ndarray, three-dimensional
        First axis left to right, second posterior to anterior, third inferior to superior.
    affine : numpy.ndarray, shape (4, 4)
        Voxel indices to RAS+ mm.
    """

    data: np.ndarray
    affine: np.ndarray

    def crop(self, box: tuple[slice, slice, slice]) -> Volume:
        """Return the part inside `box`, with the affine adapted."""
        affine = self.affine.copy()
        affine[:3, 3] = nib.affines.apply_affine(self.affine, [part.start for part in box])
        return Volume(self.data[box], affine)

    def world(self, axis: int, index: int) -> float:
        """Return the world coordinate (mm) of voxel `index` along `axis`."""
        return float(self.affine[axis, 3] + self.affine[axis, axis] * index)


def load_ras(path: Path, dtype: type = np.float32) -> Volume:
    """Read an image and reorient it to RAS+ voxel order.

    Parameters
    ----------
    path : pathlib.Path
        Three-dimensional NIfTI image.
    dtype : numpy dtype
        Type of the array; `bool` returns a mask of the values above zero.

    Returns
    -------
    Volume
        Array and affine.
    """
    image = nib.as_closest_canonical(load_image(path))
    data = np.asanyarray(image.dataobj)
    data = data > 0 if dtype is bool else data.astype(dtype, copy=False)
    return Volume(data, np.asarray(image.affine))


def plane(data: np.ndarray, name: str, index: int) -> np.ndarray:
    """Return one slice of a RAS+ array in display orientation.

    Parameters
    ----------
    data : numpy.ndarray, shape (X, Y, Z)
        RAS+ voxel order.
    name : {"axial", "coronal", "sagittal"}
        Plane of the slice.
    index : int
        Position along the plane's normal.

    Returns
    -------
    numpy.ndarray, two-dimensional
        Row 0 is anterior (axial) or superior (coronal, sagittal); column 0 is the subject's left
        (axial, coronal) or posterior (sagittal). A view.
    """
    return np.flipud(np.moveaxis(data, _NORMAL_AXIS[name], 0)[index].T)


def plane_label(volume: Volume, name: str, index: int) -> str:
    """Return the world coordinate of a slice, such as ``z = 77``, and the side of sagittal slices."""
    axis = _NORMAL_AXIS[name]
    position = volume.world(axis, index)
    words = f"{'xyz'[axis]} = {position:.0f}".replace("-", "\N{MINUS SIGN}")
    return f"{words} ({side(position)})" if name == "sagittal" else words


def side(x: float, tolerance: float = 2.0) -> str:
    """Return the side of an RAS+ x coordinate (mm) relative to the midline of the SRI24 grid."""
    if abs(x - MIDLINE_X) <= tolerance:
        return "midline"
    return "left" if x < MIDLINE_X else "right"


def bounding_box(mask: np.ndarray, margin: int = 3) -> tuple[slice, ...]:
    """Return the bounding box of a mask with a margin in voxels; the whole grid if the mask is empty."""
    return images.bounding_box(mask if mask.any() else np.ones_like(mask), margin)


def extent(mask: np.ndarray, name: str, min_area: float = 0.12) -> tuple[int, int]:
    """Return the first and last slice with a mask area of at least `min_area` times the largest area."""
    others = tuple(axis for axis in range(3) if axis != _NORMAL_AXIS[name])
    area = mask.sum(axis=others)
    used = np.flatnonzero(area >= min_area * area.max())
    return int(used[0]), int(used[-1])


def even_slices(mask: np.ndarray, name: str, number: int) -> list[int]:
    """Return indices of `number` evenly spaced slices over the extent of a mask."""
    first, last = extent(mask, name, min_area=0.25)
    return [int(index) for index in np.linspace(first, last, number).round()]


def select_slices(
    burden: np.ndarray, first: int, last: int, number: int, max_anomalous: int = 5, min_distance: int = 5
) -> tuple[list[int], list[int]]:
    """Select the slices with the largest anomalies, and others that cover the brain.

    Parameters
    ----------
    burden : numpy.ndarray, shape (Z,)
        Amount of anomaly in each slice, 0 for none.
    first, last : int
        Range of slices to cover.
    number : int
        Number of slices in total.
    max_anomalous : int, default=5
        Maximum number of slices selected by burden.
    min_distance : int, default=5
        Minimum distance in slices between two of these.

    Returns
    -------
    selected : list of int
        Slices in increasing order; those not selected by burden fill the largest gaps.
    anomalous : list of int
        Slices selected by burden, highest burden first.
    """
    anomalous: list[int] = []
    for index in np.argsort(-burden, kind="stable"):
        if len(anomalous) == min(max_anomalous, number) or burden[index] <= 0:
            break
        if all(abs(index - other) >= min_distance for other in anomalous):
            anomalous.append(int(index))
    selected = list(anomalous)
    candidates = np.arange(first, last + 1)
    while len(selected) < min(number, len(candidates)):
        if selected:
            distance = np.abs(candidates[:, None] - np.array(selected)).min(axis=1)
        else:
            distance = -np.abs(candidates - (first + last) / 2)
        selected = sorted({*selected, int(candidates[np.argmax(distance)])})
    return sorted(selected), anomalous


def to_grey(data: np.ndarray, upper: float) -> np.ndarray:
    """Map intensities from [0, `upper`] to 8-bit grey values."""
    return (np.clip(data / max(upper, np.finfo(np.float32).tiny), 0, 1) * 255).astype(np.uint8)
