"""NIfTI images as this package writes them: one header contract for every file.

Data type uint8, int32 or float32 (int16 for simulated raw scans alone), no scaling (``scl_slope`` 1,
``scl_inter`` 0), millimetres, and an sform and a qform that are both set and agree. Programs differ in which
of the two they read, and some apply a slope that is not a number.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import nibabel as nib
import numpy as np
from isal import igzip
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from bids_uad.errors import InputError, unreadable
from bids_uad.files import atomic_path

DTYPES = (np.uint8, np.int16, np.int32, np.float32)
GRID_TOLERANCE_MM = 0.1
GZIP_LEVEL = 2
"""Level of ISA-L: files as small as at level 6 of zlib, in a twentieth of the time."""

Grid = tuple[tuple[int, ...], np.ndarray]
"""Shape of the first three axes, and affine."""


def make_image(volume: np.ndarray, affine: np.ndarray, dtype: type, *, code: int = 1) -> nib.Nifti1Image:
    """Make an image whose header keeps the contract of this package.

    Parameters
    ----------
    volume : numpy.ndarray, three- or four-dimensional
        Its values must fit into `dtype`; they are not scaled.
    affine : numpy.ndarray, shape (4, 4)
        Voxel-to-world (RAS+, mm). The sform holds it in single precision. The qform holds the nearest
        matrix without shear; since it is stored as a quaternion in single precision, it may differ by
        0.2 mm at the corners of a head.
    dtype : {numpy.uint8, numpy.int16, numpy.int32, numpy.float32}
        Type on disk.
    code : int, default=1
        NIfTI code of both forms: 1 for the scanner's coordinates, 2 for those of another image.

    Returns
    -------
    nibabel.Nifti1Image

    Raises
    ------
    ValueError
        If `dtype` is another type.
    """
    if dtype not in DTYPES:
        names = ", ".join(np.dtype(known).name for known in DTYPES)
        raise ValueError(f"dtype of an image must be one of {names}; got {np.dtype(dtype).name}")
    image = nib.Nifti1Image(np.asarray(volume, dtype=dtype), affine)
    image.header.set_xyzt_units("mm")
    image.header.set_slope_inter(1.0, 0.0)
    image.set_sform(affine, code=code)
    image.set_qform(affine, code=code)
    return image


def save_image(image: nib.Nifti1Image, target: str | Path) -> Path:
    """Write an image of :func:`make_image` atomically; equal images give files with equal bytes.

    Files are compressed with ISA-L, and contain neither a file name nor a time.

    Parameters
    ----------
    image : nibabel.Nifti1Image
        Image to write.
    target : path-like
        File whose name ends in ``.nii`` or ``.nii.gz``.

    Returns
    -------
    pathlib.Path
        `target`.
    """
    with atomic_path(target) as temporary:
        content = image.to_bytes()
        if temporary.suffix == ".gz":
            content = igzip.compress(content, GZIP_LEVEL, mtime=0)
        temporary.write_bytes(content)
    return Path(target)


def load_image(path: str | PathLike[str]) -> nib.Nifti1Image:
    """Load an image of :func:`save_image` as `nibabel.load` does, but decompress it as a whole with ISA-L.

    Parameters
    ----------
    path : path-like
        NIfTI-1 file, uncompressed or compressed.

    Returns
    -------
    nibabel.Nifti1Image
        Image; that of a compressed file is in memory.
    """
    path = Path(path)
    if path.suffix != ".gz":
        return nib.load(path)
    return nib.Nifti1Image.from_bytes(igzip.decompress(path.read_bytes()))


_COPY_AGAIN = "copy or download the file again"
# What nibabel, NumPy, gzip, ISA-L and zlib raise for damaged headers and streams.
_DAMAGED = (
    ImageFileError,
    HeaderDataError,
    EOFError,
    OSError,
    OverflowError,
    TypeError,
    ValueError,
    zlib.error,
    igzip.isal_zlib.error,
)
_GZIP = b"\x1f\x8b"
_NIFTI_MAGIC = {344: (b"n+1\0", b"ni1\0"), 4: (b"n+2\0", b"ni2\0")}
_FOREIGN = (
    (b"/annex/objects/", "a git-annex pointer, not its content", "fetch it with `datalad get`"),
    (b"version https://git-lfs", "a Git LFS pointer, not its content", "fetch it with `git lfs pull`"),
    (b"<!doctype html", "a web page, not an image", "download the file itself"),
    (b"<html", "a web page, not an image", "download the file itself"),
    (b"<?xml", "an XML text, not an image", "download the file itself; a server may have sent an error"),
    (b"pk\x03\x04", "a ZIP archive, not an image", "unpack it"),
)


def open_nifti(path: str | PathLike[str]) -> nib.Nifti1Image:
    """Open a single-file NIfTI-1 or NIfTI-2 image without reading its data.

    Parameters
    ----------
    path : path-like
        NIfTI file.

    Returns
    -------
    nibabel.Nifti1Image
        Image; for NIfTI-2 an instance of the derived class `nibabel.Nifti2Image`.

    Raises
    ------
    bids_uad.errors.InputError
        If the file is missing, empty, a git-annex or Git LFS pointer, or not a NIfTI file.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise InputError(path, "a folder, not a file", "replace it by the image")
        if path.stat().st_size == 0:
            raise InputError(path, "the file is empty", _COPY_AGAIN)
        image = nib.load(path)
    except _DAMAGED as error:
        raise _explain(path, error) from error
    if not isinstance(image, nib.Nifti1Image):
        raise InputError(path, f"a {type(image).__name__}, not a NIfTI file", "convert it to NIfTI")
    return image


def read_data(path: str | PathLike[str], image: nib.Nifti1Image) -> np.ndarray:
    """Read the voxels of an image as float32, scaled by the slope and intercept of its header.

    Parameters
    ----------
    path : path-like
        The file of the image.
    image : nibabel.Nifti1Image
        Image from :func:`open_nifti`.

    Returns
    -------
    numpy.ndarray of float32
        Voxels in the shape of the header.

    Raises
    ------
    bids_uad.errors.InputError
        If the voxels are complex, RGB or RGBA, or the data are incomplete or damaged.
    """
    path = Path(path)
    dtype = image.get_data_dtype()
    if dtype.kind == "c":
        raise InputError(
            path, f"the voxels are complex numbers ({dtype})", "provide the magnitude image (part-mag)"
        )
    if dtype.names:
        raise InputError(
            path, f"an {''.join(dtype.names)} colour image, not a scan", "provide an image of intensities"
        )
    expected = int(np.prod(image.shape, dtype=object)) * dtype.itemsize
    try:
        size = path.stat().st_size
        if path.name.lower().endswith(".gz"):
            # Read to the end of the stream, where its checksum is; nibabel stops at the last voxel.
            content = igzip.decompress(path.read_bytes())
            image, size = type(image).from_bytes(content), len(content)
        offset = int(image.dataobj.offset)
        if offset < image.header.single_vox_offset:
            problem = f"the header places the image data inside itself (vox_offset {offset})"
            raise InputError(
                path, problem, "repair the header, or convert the scan from its DICOM files again"
            )
        if size - offset < expected:
            problem = f"the image data are cut short ({max(size - offset, 0)} of {expected} bytes)"
            raise InputError(path, problem, _COPY_AGAIN)
        # Intensities beyond the range of float32 become infinite, which later checks report.
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray(image.dataobj, dtype=np.float32)
    except _DAMAGED as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise unreadable(path, error) from error
        raise InputError(
            path, f"the image data cannot be read ({_first_line(error)})", _COPY_AGAIN
        ) from error


def _explain(path: Path, error: Exception) -> InputError:
    """Return an error that describes a file which is not a readable image."""
    if isinstance(error, OSError) and error.errno is not None:
        return unreadable(path, error)
    # nibabel reports a missing file without an error number.
    if not path.exists():
        return unreadable(path, FileNotFoundError())
    with path.open("rb") as stream:
        start = stream.read(400)
    text = start.lstrip().lower()
    for mark, problem, remedy in _FOREIGN:
        if text.startswith(mark):
            return InputError(path, problem, remedy)
    if start[128:132] == b"DICM":
        return InputError(path, "a DICOM file, not a NIfTI file", "convert it, e.g. with dcm2niix")
    zipped = path.name.lower().endswith(".gz")
    if zipped and not start.startswith(_GZIP):
        if any(start[offset : offset + 4] in magic for offset, magic in _NIFTI_MAGIC.items()):
            problem = "an uncompressed NIfTI file, though its name ends in .gz"
            return InputError(path, problem, "name it .nii, or compress it with gzip")
        return InputError(path, "not a gzip file, though its name ends in .gz", _COPY_AGAIN)
    if not zipped and start.startswith(_GZIP):
        return InputError(path, "a gzip file with a name that lacks .gz", "name it .nii.gz")
    return InputError(path, f"not a readable image ({_first_line(error)})", _COPY_AGAIN)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


UPPER_PERCENTILE = 99.5
SCALING = {"method": "percentile", "lower": 0.0, "upper": UPPER_PERCENTILE, "region": "brain mask"}


def scale_intensity(volume: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """Scale a scan so that the 99.5th percentile of the brain is 1.

    Higher values are not clipped (see :mod:`bids_uad.engine.bundle`). Zero is unchanged, since magnitude
    images have a physical origin, and a lower percentile would depend on the amount of cerebrospinal fluid in
    the brain mask. The upper percentile is robust to bright vessels.

    Parameters
    ----------
    volume : numpy.ndarray
        Bias-corrected intensities of any shape.
    brain : numpy.ndarray of bool
        Brain mask of the same shape.

    Returns
    -------
    numpy.ndarray of float32
        Scaled intensities, at least 0; 0 outside the brain.

    Raises
    ------
    ValueError
        If the mask is empty or the brain is not brighter than zero.
    """
    brain = np.asarray(brain, dtype=bool)
    if not brain.any():
        raise ValueError("the brain mask is empty")
    upper = float(np.percentile(volume[brain], UPPER_PERCENTILE))
    if not upper > 0:
        raise ValueError("the image has no positive intensity inside the brain mask")
    scaled = np.maximum(np.asarray(volume, dtype=np.float32) / np.float32(upper), 0.0)
    return np.where(brain, scaled, np.float32(0.0)).astype(np.float32)


def bounding_box(mask: np.ndarray, margin: int | Sequence[int] = 0) -> tuple[slice, ...]:
    """Return the smallest box that contains the voxels of an array that are not 0.

    Parameters
    ----------
    mask : numpy.ndarray
        Mask or image.
    margin : int or sequence of int, default=0
        Voxels by which the box is extended on each side of each axis, within the array.

    Returns
    -------
    tuple of slice
        One slice per axis; empty slices if all voxels are 0.
    """
    box = []
    for axis, width in enumerate(np.broadcast_to(margin, mask.ndim)):
        used = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        if not used.size:
            return (slice(0, 0),) * mask.ndim
        box.append(slice(max(int(used[0] - width), 0), min(int(used[-1] + width) + 1, mask.shape[axis])))
    return tuple(box)


def grid_of(path: Path) -> Grid:
    """Read the grid of an image from its header.

    Parameters
    ----------
    path : pathlib.Path
        NIfTI image.

    Returns
    -------
    shape : tuple of int
        Voxels along the first three axes.
    affine : numpy.ndarray, shape (4, 4)
        Voxel-to-world matrix, mm.

    Raises
    ------
    InputError
        If the file is missing or not an image, see :func:`open_nifti`, or its affine is singular.
    """
    image = open_nifti(path)
    affine = np.asarray(image.affine)
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine) < 4:
        raise InputError(path, "the header's affine is singular or not finite", "repair the NIfTI header")
    return tuple(int(size) for size in image.shape[:3]), affine


def same_grid(one: Grid, other: Grid) -> bool:
    """Return whether two grids have their voxels at the same positions, in any storage order.

    Parameters
    ----------
    one, other : tuple of shape and affine
        Grids as :func:`grid_of` returns them.

    Returns
    -------
    bool
        True if, after reordering both to RAS, the shapes are equal and no corner differs by more than 0.1 mm.
    """
    (shape_one, affine_one), (shape_other, affine_other) = _to_ras(*one), _to_ras(*other)
    if shape_one != shape_other:
        return False
    corners = np.array(np.meshgrid(*[(0, size - 1) for size in shape_one])).reshape(3, -1).T
    offset = nib.affines.apply_affine(affine_one, corners) - nib.affines.apply_affine(affine_other, corners)
    return bool(np.linalg.norm(offset, axis=1).max() < GRID_TOLERANCE_MM)


def _to_ras(shape: tuple[int, ...], affine: np.ndarray) -> Grid:
    """Return shape and affine of a grid after reordering its voxels to RAS."""
    orientation = nib.io_orientation(affine)
    reordered = affine @ nib.orientations.inv_ornt_aff(orientation, shape)
    new_shape = [0, 0, 0]
    for axis, (target, _) in enumerate(orientation):
        new_shape[int(target)] = shape[axis]
    return tuple(new_shape), reordered
