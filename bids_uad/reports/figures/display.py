"""From a volume in any voxel order to pictures a reader can trust.

Every volume is first brought to RAS+ by its affine, so that the order on disk never decides what is
shown as left. Pictures follow the neurological convention: the subject's left is on the left.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from bids_uad import space

CONVENTION = "Neurological convention: the subject's left is on the left of the image"
EDGE_LABELS = {"axial": ("L", "R"), "coronal": ("L", "R"), "sagittal": ("P", "A")}
MIDLINE_X = float(space.AFFINE[0, 0] * (space.SHAPE[0] - 1) / 2 + space.AFFINE[0, 3])
_NORMAL_AXIS = {"axial": 2, "coronal": 1, "sagittal": 0}


@dataclass(frozen=True)
class Volume:
    """A volume in RAS+ voxel order.

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
        """Cut out `box`, keeping world coordinates right."""
        affine = self.affine.copy()
        affine[:3, 3] = nib.affines.apply_affine(self.affine, [part.start for part in box])
        return Volume(self.data[box], affine)

    def world(self, axis: int, index: int) -> float:
        """Coordinate (mm) of voxel `index` along `axis`."""
        return float(self.affine[axis, 3] + self.affine[axis, axis] * index)


def load_ras(path: Path, dtype: type = np.float32) -> Volume:
    """Read an image and bring it to RAS+ voxel order.

    Parameters
    ----------
    path : pathlib.Path
        A three-dimensional NIfTI image.
    dtype : numpy dtype
        Type of the array; `bool` makes a mask of all values above zero.

    Returns
    -------
    Volume
    """
    image = nib.as_closest_canonical(nib.load(path))
    data = np.asanyarray(image.dataobj)
    data = data > 0 if dtype is bool else data.astype(dtype, copy=False)
    return Volume(data, np.asarray(image.affine))


def plane(data: np.ndarray, name: str, index: int) -> np.ndarray:
    """Cut one slice of a RAS+ array and turn it as it is shown.

    Parameters
    ----------
    data : numpy.ndarray, shape (X, Y, Z)
        RAS+ voxel order.
    name : {"axial", "coronal", "sagittal"}
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
    """World coordinate of a slice, such as ``z = 77``; sagittal ones also say which side."""
    axis = _NORMAL_AXIS[name]
    position = volume.world(axis, index)
    words = f"{'xyz'[axis]} = {position:.0f}".replace("-", "\N{MINUS SIGN}")
    return f"{words} ({side(position)})" if name == "sagittal" else words


def side(x: float, tolerance: float = 2.0) -> str:
    """Say on which side of the SRI24 grid's midline an RAS+ x coordinate (mm) lies."""
    if abs(x - MIDLINE_X) <= tolerance:
        return "midline"
    return "left" if x < MIDLINE_X else "right"


def bounding_box(mask: np.ndarray, margin: int = 3) -> tuple[slice, slice, slice]:
    """Smallest box around a mask, `margin` voxels wider on each side; all of it if the mask is empty."""
    if not mask.any():
        return tuple(slice(0, size) for size in mask.shape)
    box = []
    for axis, size in enumerate(mask.shape):
        used = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
        box.append(slice(max(int(used[0]) - margin, 0), min(int(used[-1]) + 1 + margin, size)))
    return tuple(box)


def extent(mask: np.ndarray, name: str, share: float = 0.12) -> tuple[int, int]:
    """First and last slice whose mask area is at least `share` of the largest slice's."""
    others = tuple(axis for axis in range(3) if axis != _NORMAL_AXIS[name])
    area = mask.sum(axis=others)
    used = np.flatnonzero(area >= share * area.max())
    return int(used[0]), int(used[-1])


def even_slices(mask: np.ndarray, name: str, number: int) -> list[int]:
    """Evenly spread slices of a plane over the extent of a mask."""
    first, last = extent(mask, name, share=0.25)
    return [int(index) for index in np.linspace(first, last, number).round()]


def telling_slices(
    burden: np.ndarray, first: int, last: int, number: int, wanted: int = 5, apart: int = 5
) -> tuple[list[int], list[int]]:
    """Choose slices that hold the worst findings and still cover the brain.

    Parameters
    ----------
    burden : numpy.ndarray, shape (Z,)
        How anomalous each slice is; zero is nothing.
    first, last : int
        Range to cover.
    number : int
        How many slices in all.
    wanted : int
        How many are chosen by burden at most.
    apart : int
        Smallest distance between two of them.

    Returns
    -------
    chosen : list of int
        In increasing order; the rest is filled where the largest gap is.
    worst : list of int
        Those chosen by burden, worst first.
    """
    worst: list[int] = []
    for index in np.argsort(-burden, kind="stable"):
        if len(worst) == min(wanted, number) or burden[index] <= 0:
            break
        if all(abs(index - other) >= apart for other in worst):
            worst.append(int(index))
    chosen = list(worst)
    candidates = np.arange(first, last + 1)
    while len(chosen) < min(number, len(candidates)):
        if chosen:
            distance = np.abs(candidates[:, None] - np.array(chosen)).min(axis=1)
        else:
            distance = -np.abs(candidates - (first + last) / 2)
        chosen.append(int(candidates[np.argmax(distance)]))
        chosen = sorted(set(chosen))
    return sorted(chosen), worst


def to_grey(data: np.ndarray, upper: float) -> np.ndarray:
    """Map intensities from [0, `upper`] to 8-bit grey."""
    return (np.clip(data / max(upper, np.finfo(np.float32).tiny), 0, 1) * 255).astype(np.uint8)
