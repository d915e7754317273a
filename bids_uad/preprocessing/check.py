"""Reading of scans and lesion masks, with checks of header and intensities before anything is computed.

An unusable image raises an `InputError` with one line: the file, the problem and the remedy.
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scipy import ndimage

from bids_uad.errors import InputError
from bids_uad.images import open_nifti, read_data
from bids_uad.preprocessing.intensity_correction import is_uniform_image, mask_background

VOXEL_RANGE_MM = (0.2, 10.0)
EXTENT_RANGE_MM = (40.0, 700.0)
MIN_VOXELS_PER_AXIS = 8
MIN_CONTENT_MM3 = 100_000.0
MAX_NEGATIVE_FRACTION = 0.1
STRIPPED_VOLUME_MM3 = (600_000.0, 2_100_000.0)
STRIPPED_BORDER_FRACTION = 0.98
STRIPPED_BACKGROUND_FRACTION = 0.3
MAX_SHEAR = 1e-2
WHOLE_NUMBER_TOLERANCE = 1e-3
"""Maximum deviation from a whole number of labels that are stored with a scale factor."""
MAX_FORM_DISTANCE_MM = 1.0
MAX_PIXDIM_DIFFERENCE_MM = 0.05
DARK_FRACTION = 0.1
"""Finite voxels below this fraction of the 99th percentile may be background."""
MAX_POCKET_FRACTION = 1e-3
"""Maximum number of enclosed NaN voxels in an image with a NaN background, as a fraction of the voxels with
signal. Most of 58 skull-stripped scans have enclosed voxels of 0, in fluid and at the surface: up to 631,
0.04 %.
"""


@dataclass(frozen=True)
class Scan:
    """Checked scan.

    Parameters
    ----------
    data : numpy.ndarray of float32, three-dimensional
        Finite intensities. Trailing axes of length one are dropped.
    affine : numpy.ndarray, shape (4, 4)
        Voxel-to-world (RAS+, mm): the sform if it is set, else the qform.
    notes : tuple of str
        Sentences on changes of the data on reading; empty for most scans.
    """

    data: np.ndarray
    affine: np.ndarray
    notes: tuple[str, ...] = ()


def check_image(path: str | PathLike[str]) -> None:
    """Read a scan completely and raise an error if it is unusable.

    Parameters
    ----------
    path : path-like
        NIfTI file.

    Raises
    ------
    bids_uad.errors.InputError
        If the file is missing, truncated or corrupt; voxels are complex or RGB; the image is not
        three-dimensional; the header has no orientation, shear, or implausible voxel sizes; voxels of the
        head are NaN or infinite; intensities are constant, nearly empty or normalised (negative).
    """
    _read_checked(Path(path))


def read_scan(path: str | PathLike[str]) -> Scan:
    """Read a scan, with the checks of :func:`check_image`.

    NaN and infinite voxels of the background are set to 0. In an MP2RAGE image (suffix ``UNIT1``) the noise
    outside the head is set to 0 as well, see :func:`.intensity_correction.mask_background`.

    Parameters
    ----------
    path : path-like
        NIfTI file.

    Returns
    -------
    Scan
        Finite intensities, affine, and notes on changes.

    Raises
    ------
    bids_uad.errors.InputError
        As for :func:`check_image`.
    """
    scan = _read_checked(Path(path))
    if not is_uniform_image(path):
        return scan
    data, masked = mask_background(scan.data, scan.affine)
    if not masked:
        return Scan(data, scan.affine, scan.notes)
    text = f"The noise around the head of the MP2RAGE image ({masked:.0%} of the image) was set to 0."
    return Scan(data, scan.affine, (*scan.notes, text))


def read_volume(path: str | PathLike[str]) -> tuple[np.ndarray, np.ndarray]:
    """Read a three-dimensional NIfTI file (a scan or a mask), with checks of its geometry.

    Parameters
    ----------
    path : path-like
        NIfTI file.

    Returns
    -------
    data : numpy.ndarray of float32, three-dimensional
        Finite values.
    affine : numpy.ndarray, shape (4, 4)
        Voxel-to-world (RAS+, mm).

    Raises
    ------
    bids_uad.errors.InputError
        If the file is missing, truncated or corrupt; voxels are complex or RGB; the image is not
        three-dimensional; the header has no orientation, shear, or implausible voxel sizes; values are NaN or
        infinite.
    """
    data, affine = _read(Path(path))
    if not np.isfinite(data).all():
        raise InputError(
            path, "the image has NaN or infinite voxels", "replace them in the source data and run again"
        )
    return data, affine


def read_lesion(path: str | PathLike[str]) -> tuple[np.ndarray, np.ndarray]:
    """Read a lesion mask.

    Parameters
    ----------
    path : path-like
        NIfTI file of any data type with 0 in the background and whole numbers from 1 in lesions.

    Returns
    -------
    lesion : numpy.ndarray of bool, three-dimensional
        True in lesions.
    affine : numpy.ndarray, shape (4, 4)
        Voxel-to-world (RAS+, mm).

    Raises
    ------
    bids_uad.errors.InputError
        As for :func:`read_volume`, and if the mask has several volumes, colours or complex numbers, negative
        values or fractions, or a background other than 0.
    """
    image = open_nifti(path)
    if image.get_data_dtype().kind not in "biuf":
        raise InputError(
            path,
            f"lesion mask of colours or complex numbers ({image.get_data_dtype()})",
            "use whole numbers, 0 in the background and 1 in lesions",
        )
    if np.prod(image.shape[3:], dtype=int) > 1:
        shape = " x ".join(map(str, image.shape))
        raise InputError(path, f"lesion mask of more than one volume ({shape})", "provide one volume")
    data, affine = read_volume(path)
    labels = np.rint(data)
    fractions = data[np.abs(data - labels) > WHOLE_NUMBER_TOLERANCE]
    if fractions.size:
        raise InputError(
            path,
            f"lesion mask with values that are not whole numbers (such as {fractions[0]:.3g})",
            "threshold probabilities, for example at 0.5",
        )
    if labels.min() < 0:
        raise InputError(
            path, f"lesion mask with negative values (lowest {labels.min():g})", "set the background to 0"
        )
    if background(labels) != 0:
        raise InputError(
            path, f"lesion mask whose background is {background(labels):g}, not 0", "set the background to 0"
        )
    return labels > 0, affine


def is_skull_stripped(data: np.ndarray, affine: np.ndarray, sidecar: dict[str, Any] | None = None) -> bool:
    """Return whether a scan is skull-stripped.

    ``SkullStripped`` of the sidecar is used if it is there. Otherwise a scan is skull-stripped if at least 98
    % of its border have one value, at least 30 % of its voxels have this value, and the volume of the rest,
    with holes filled, is 0.6 to 2.1 L (that of a brain and not of a head).

    Parameters
    ----------
    data : numpy.ndarray, three-dimensional
        Scan.
    affine : numpy.ndarray, shape (4, 4)
        Voxel-to-world, mm.
    sidecar : dict, default=None
        BIDS metadata of the scan.

    Returns
    -------
    bool
        True for a skull-stripped scan.
    """
    value = (sidecar or {}).get("SkullStripped")
    if isinstance(value, bool):
        return value
    value = background(data)
    if np.mean(_border(data) == value) < STRIPPED_BORDER_FRACTION:
        return False
    content = data != value
    if 1.0 - content.mean() < STRIPPED_BACKGROUND_FRACTION:
        return False
    volume = ndimage.binary_fill_holes(content).sum() * abs(np.linalg.det(affine[:3, :3]))
    return bool(STRIPPED_VOLUME_MM3[0] <= volume <= STRIPPED_VOLUME_MM3[1])


def background(data: np.ndarray) -> float:
    """Return the most frequent value on the six faces of a volume."""
    values, counts = np.unique(_border(data), return_counts=True)
    return float(values[np.argmax(counts)])


def header_warnings(path: str | PathLike[str]) -> dict[str, bool]:
    """Compare the orientations and voxel sizes of a header, of which the sform is used.

    Parameters
    ----------
    path : path-like
        Readable NIfTI file.

    Returns
    -------
    dict
        Warnings, and whether the scan is excluded from benchmarks because of each.
    """
    image = open_nifti(path)
    sform, sform_code = image.get_sform(coded=True)
    qform, qform_code = image.get_qform(coded=True)
    if sform_code and not qform_code:
        return _pixdim_warnings(image)
    if not sform_code:
        return {}
    if np.linalg.det(sform[:3, :3]) * np.linalg.det(qform[:3, :3]) < 0:
        return {"The header's sform and qform disagree about left and right.": True}
    size = np.array(image.shape[:3]) - 1
    corners = np.array(np.meshgrid(*[(0, n) for n in size])).reshape(3, -1).T
    apart = nib.affines.apply_affine(sform, corners) - nib.affines.apply_affine(qform, corners)
    distance = float(np.linalg.norm(apart, axis=1).max())
    if distance < MAX_FORM_DISTANCE_MM:
        return {}
    return {f"The header's sform and qform differ by up to {distance:.0f} mm; the sform was used.": False}


def _pixdim_warnings(image: nib.Nifti1Image) -> dict[str, bool]:
    """Compare the voxel sizes of pixdim and sform."""
    pixdim = np.array(image.header.get_zooms()[:3], dtype=float)
    zooms = nib.affines.voxel_sizes(image.affine)
    if np.abs(pixdim - zooms).max() < MAX_PIXDIM_DIFFERENCE_MM:
        return {}
    text = f"The header's pixdim ({_mm(pixdim)}) and sform ({_mm(zooms)}) disagree; the sform was used."
    return {text: False}


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read the voxels and the affine of an image; the voxels may be NaN or infinite."""
    image = open_nifti(path)
    shape = _spatial_shape(path, image.shape)
    affine = _checked_affine(path, image, shape)
    return read_data(path, image).reshape(shape), affine


def _read_checked(path: Path) -> Scan:
    """Read a scan, fill its background and check its values."""
    data, affine = _read(path)
    finite = np.isfinite(data)
    if is_uniform_image(path) and (low := data[finite].min(initial=0)) < 0:
        # Stored from -0.5 to 0.5, or around 0 in other units: the origin of the scale has no meaning.
        data = data - low
    notes: tuple[str, ...] = ()
    if not finite.all():
        if not finite.any() or _has_invalid_inside(data, finite):
            raise InputError(
                path, "the image has NaN or infinite voxels in the head", "replace them in the source data"
            )
        data = np.where(finite, data, np.float32(0))
        notes = (f"{np.sum(~finite):,} NaN or infinite voxels of the background were set to 0.",)
    _check_values(path, data, affine)
    return Scan(data, affine, notes)


def _has_invalid_inside(data: np.ndarray, finite: np.ndarray) -> bool:
    """Return whether a voxel that is not finite lies in the head.

    The background is the region of dark or non-finite voxels that is connected to the border of the volume,
    without slices that have no finite voxel between slices with signal. If the border itself is not finite, a
    few enclosed voxels count as background too, since software that replaces 0 by NaN leaves them in
    skull-stripped images. At least one voxel must be finite.
    """
    signal = finite & (np.where(finite, data, 0) > DARK_FRACTION * np.percentile(data[finite], 99))
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        with_signal = np.flatnonzero(signal.any(axis=others))
        if with_signal.size and not finite.any(axis=others)[with_signal[0] : with_signal[-1]].all():
            return True
    labels, _ = ndimage.label(~signal)
    outside = np.isin(labels, np.unique(_border(labels)))
    allowed = MAX_POCKET_FRACTION * signal.sum() if np.mean(_border(finite)) < 0.5 else 0
    return bool((~finite & ~outside).sum() > allowed)


def _spatial_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, int, int]:
    kept = list(shape)
    while len(kept) > 3 and kept[-1] == 1:
        kept.pop()
    if len(kept) > 3:
        raise InputError(
            path, f"the image has {len(kept)} dimensions {tuple(shape)}", "provide one volume, e.g. the mean"
        )
    if len(kept) < 3 or min(kept) < MIN_VOXELS_PER_AXIS:
        raise InputError(
            path,
            f"the image of shape {tuple(shape)} is not a volume",
            f"provide an image with at least {MIN_VOXELS_PER_AXIS} voxels along each of three axes",
        )
    return kept[0], kept[1], kept[2]


def _checked_affine(path: Path, image: nib.Nifti1Image, shape: tuple[int, int, int]) -> np.ndarray:
    header = image.header
    if int(header["sform_code"]) == 0 and int(header["qform_code"]) == 0:
        raise InputError(
            path,
            "the header has no orientation (sform and qform codes are 0)",
            "convert the scan from its DICOM files again, or set the code of the form that is correct",
        )
    affine = np.asarray(image.affine, dtype=np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise InputError(path, "the header's affine is singular or not finite", "repair the NIfTI header")
    with np.errstate(over="ignore"):  # infinite values fail the next checks
        zooms = np.linalg.norm(affine[:3, :3], axis=0)
        extents = zooms * np.array(shape)
    if zooms.min() < VOXEL_RANGE_MM[0] or zooms.max() > VOXEL_RANGE_MM[1]:
        raise InputError(
            path, f"the voxel size {_mm(zooms)} is implausible for a head", "check the header's units"
        )
    if extents.min() < EXTENT_RANGE_MM[0] or extents.max() > EXTENT_RANGE_MM[1]:
        raise InputError(
            path, f"the field of view {_mm(extents)} is implausible for a head", "check the voxel size"
        )
    axes = affine[:3, :3] / zooms
    if np.abs(axes.T @ axes - np.eye(3)).max() > MAX_SHEAR:
        raise InputError(
            path, "the header's affine has shear", "resample the scan to a grid with perpendicular axes"
        )
    return affine


def _check_values(path: str | PathLike[str], data: np.ndarray, affine: np.ndarray) -> None:
    low, high = float(data.min()), float(data.max())
    if low == high:
        raise InputError(path, f"every voxel has the value {low:g}", "exclude the scan or export it again")
    content = data[data != background(data)]
    volume = content.size * abs(np.linalg.det(affine[:3, :3]))
    if volume < MIN_CONTENT_MM3:
        raise InputError(
            path,
            f"only {volume / 1000:.1f} mL of the image are not background",
            "provide a scan of a whole brain",
        )
    if np.mean(content < 0) > MAX_NEGATIVE_FRACTION:
        raise InputError(
            path,
            "many voxels are negative",
            "provide magnitude intensities instead of normalised ones (z-scores)",
        )


def _border(data: np.ndarray) -> np.ndarray:
    faces = (data[[0, -1]], data[:, [0, -1]], data[:, :, [0, -1]])
    return np.concatenate([face.ravel() for face in faces])


def _mm(values: np.ndarray) -> str:
    return " x ".join(f"{value:g}" for value in np.round(values, 4)) + " mm"
