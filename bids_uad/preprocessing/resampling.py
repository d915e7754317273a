"""Resampling in one interpolation, rigid transforms, ITK transform files, and conversion to ANTs images."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np
from scipy import ndimage

from bids_uad import space
from bids_uad.errors import unreadable
from bids_uad.files import write_text
from bids_uad.images import bounding_box, make_image

if TYPE_CHECKING:
    from ants import ANTsImage

ANTS_SEED = "20251201"
_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_ITK_HEADER = "#Insight Transform File V1.0\n#Transform 0\nTransform: AffineTransform_double_3_3\n"


def resample(
    volume: np.ndarray,
    affine: np.ndarray,
    shape: tuple[int, int, int],
    target_affine: np.ndarray,
    pull: np.ndarray | None = None,
    order: int = 1,
    extend: bool = False,
    region: np.ndarray | None = None,
) -> np.ndarray:
    """Resample a volume to another grid through one affine transform.

    Only voxels that may differ from 0 are computed: those of `region`, or else those in the box that contains
    the volume's own voxels other than 0.

    Parameters
    ----------
    volume : numpy.ndarray, three-dimensional
        Intensities; boolean volumes are interpolated as 0 and 1.
    affine : numpy.ndarray, shape (4, 4)
        Voxel-to-world (RAS+, mm) of `volume`.
    shape : tuple of int
        Shape of the result.
    target_affine : numpy.ndarray, shape (4, 4)
        Voxel-to-world of the result.
    pull : numpy.ndarray, shape (4, 4), default=None
        World matrix from points of the result to points of `volume`; identity if None.
    order : int, default=1
        0 for nearest-neighbour, 1 for linear interpolation.
    extend : bool, default=False
        Whether voxels outside the field of view get the nearest edge value. If False, they are 0.
    region : numpy.ndarray of bool, of `shape`, default=None
        Voxels of the result that are needed; others are 0. All if None.

    Returns
    -------
    numpy.ndarray of float32, of `shape`
        Resampled volume.
    """
    volume = np.asarray(volume, dtype=np.float32)
    matrix = _voxel_matrix(affine, target_affine, pull)
    resampled = np.zeros(shape, dtype=np.float32)
    box = tuple(slice(0, size) for size in shape)
    if region is not None:
        box = bounding_box(region)
    elif not extend:
        box = _box_of_content(volume, matrix, shape)
    size = tuple(part.stop - part.start for part in box)
    if 0 in size:
        return resampled
    matrix = matrix @ translation(np.array([part.start for part in box]))
    # The field of view extends half a voxel beyond the outermost voxel centres, which matters for thick
    # slices. The edge value is repeated there, and voxels further outside are set to 0 afterwards.
    sampled = ndimage.affine_transform(
        volume,
        matrix[:3, :3],
        matrix[:3, 3],
        output_shape=size,
        order=order,
        mode="nearest",
        prefilter=False,
    )
    if not extend:
        sampled[~_inside(volume.shape, size, matrix)] = 0.0
    if region is not None:
        sampled[~region[box]] = 0.0
    resampled[box] = sampled
    return resampled


def _box_of_content(volume: np.ndarray, matrix: np.ndarray, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Return the box of a grid outside of which interpolation of a volume gives 0.

    Parameters
    ----------
    volume : numpy.ndarray
        Volume that is interpolated.
    matrix : numpy.ndarray, shape (4, 4)
        From voxels of the grid to voxels of the volume.
    shape : tuple of int
        Shape of the grid.

    Returns
    -------
    tuple of slice
        One slice per axis.
    """
    # Interpolation reaches the next voxel.
    limits = [(part.start - 1, part.stop) for part in bounding_box(volume)]
    corners = np.array(np.meshgrid(*limits)).reshape(3, -1)
    positions = nib.affines.apply_affine(np.linalg.inv(matrix), corners.T)
    low, high = np.floor(positions.min(axis=0)), np.ceil(positions.max(axis=0)) + 1
    return tuple(
        slice(int(min(max(start, 0), size)), int(max(min(stop, size), 0)))
        for start, stop, size in zip(low, high, shape, strict=True)
    )


def resample_mask(
    mask: np.ndarray,
    affine: np.ndarray,
    shape: tuple[int, int, int],
    target_affine: np.ndarray,
    pull: np.ndarray | None = None,
) -> np.ndarray:
    """Resample a binary mask by linear interpolation and a threshold of 0.5.

    This is ITK's generic-label interpolation with a linear kernel. It preserves the volume of a mask, and its
    edge is smoother than that of nearest-neighbour interpolation of thick slices.

    Parameters
    ----------
    mask : numpy.ndarray of bool, three-dimensional
        Mask.
    affine, shape, target_affine, pull
        As for :func:`resample`.

    Returns
    -------
    numpy.ndarray of bool, of `shape`
        Resampled mask.
    """
    return resample(mask, affine, shape, target_affine, pull) > 0.5


def resample_mask_through(
    mask: np.ndarray,
    affine: np.ndarray,
    shape: tuple[int, int, int],
    target_affine: np.ndarray,
    transforms: Sequence[str],
) -> np.ndarray:
    """Resample a binary mask as :func:`resample_mask` does, through a chain of ITK transform files.

    Parameters
    ----------
    mask : numpy.ndarray of bool, three-dimensional
        Mask.
    affine, shape, target_affine
        As for :func:`resample`.
    transforms : sequence of str
        ITK transform files of any kind. The first is applied to points of the result, each other one to the
        output of the one before.

    Returns
    -------
    numpy.ndarray of bool, of `shape`
        Resampled mask.

    Raises
    ------
    bids_uad.errors.InputError
        If one of the files cannot be opened.
    """
    for path in transforms:
        try:
            Path(path).open("rb").close()
        except OSError as error:
            raise unreadable(path, error) from error
    ants = load_ants()
    with link_plain_names(transforms) as names:
        moved = ants.apply_transforms(
            fixed=to_ants(np.zeros(shape, dtype=np.float32), target_affine),
            moving=to_ants(mask.astype(np.float32), affine),
            transformlist=names,
            # Without this, ANTs inverts an affine that is alone or last in the list.
            whichtoinvert=[False] * len(transforms),
            interpolator="linear",
        )
    return moved.numpy() > 0.5


def resample_isotropic(
    volume: np.ndarray, affine: np.ndarray, spacing: float
) -> tuple[np.ndarray, np.ndarray]:
    """Resample to isotropic voxels along the image's own axes, with smoothing along axes that get coarser.

    Parameters
    ----------
    volume : numpy.ndarray, three-dimensional
        Intensities or a mask.
    affine : numpy.ndarray, shape (4, 4)
        Voxel-to-world of `volume`.
    spacing : float
        New voxel edge, mm.

    Returns
    -------
    volume : numpy.ndarray of float32
        Resampled volume.
    affine : numpy.ndarray, shape (4, 4)
        Its voxel-to-world matrix; the corner of the first voxel is unchanged.
    """
    zooms = np.linalg.norm(affine[:3, :3], axis=0)
    smooth = smooth_to_spacing(volume, affine, spacing)
    shape = tuple(int(n) for n in np.maximum(np.ceil(np.array(volume.shape) * zooms / spacing - 1e-3), 1))
    step = spacing / zooms
    to_old = np.diag([*step, 1.0])
    to_old[:3, 3] = step / 2 - 0.5
    coarse_affine = affine @ to_old
    return resample(smooth, affine, shape, coarse_affine), coarse_affine


def smooth_to_spacing(volume: np.ndarray, affine: np.ndarray, spacing: float) -> np.ndarray:
    """Smooth a volume to the resolution of voxels of `spacing` mm, along each axis that is finer.

    Parameters
    ----------
    volume : numpy.ndarray, three-dimensional
        Intensities.
    affine : numpy.ndarray, shape (4, 4)
        Voxel-to-world of `volume`.
    spacing : float
        Voxel edge, mm. The full width at half maximum of the Gaussian is sqrt(spacing^2 - zoom^2).

    Returns
    -------
    numpy.ndarray of float32
        Smoothed volume on the same grid.
    """
    zooms = np.linalg.norm(affine[:3, :3], axis=0)
    deviations = np.sqrt(np.maximum(spacing**2 - zooms**2, 0.0)) / zooms / np.sqrt(8 * np.log(2))
    # The filter reaches 4 standard deviations; further away from the voxels other than 0 the result is 0.
    box = bounding_box(volume, np.ceil(4 * deviations + 1).astype(int))
    smooth = np.zeros(volume.shape, dtype=np.float32)
    smooth[box] = ndimage.gaussian_filter(
        np.asarray(volume[box], dtype=np.float32), deviations, mode="nearest"
    )
    return smooth


def map_to_native(
    mask_sri24: np.ndarray, native_image: nib.Nifti1Image, from_sri24: np.ndarray
) -> nib.Nifti1Image:
    """Resample a label volume from SRI24 to the grid of a raw scan by nearest-neighbour interpolation.

    Parameters
    ----------
    mask_sri24 : numpy.ndarray, shape (240, 240, 155)
        Boolean or non-negative integers.
    native_image : nibabel.Nifti1Image
        An image on the grid of the raw scan; its voxels are not used.
    from_sri24 : numpy.ndarray, shape (4, 4)
        RAS+ matrix from points of the raw scan to SRI24, of its ITK file ``from-SRI24_to-T1w`` (or ``-T2w``,
        ``-FLAIR``).

    Returns
    -------
    nibabel.Nifti1Image
        uint8 (int32 if a label exceeds 255), three-dimensional, with the affine of `native_image`.

    Raises
    ------
    ValueError
        If the volume is not on the SRI24 grid.
    """
    labels = np.asarray(mask_sri24)
    if labels.shape != space.SHAPE:
        raise ValueError(f"expected a volume of shape {space.SHAPE}, got {labels.shape}")
    dtype = np.uint8 if labels.dtype == bool or labels.max() <= 255 else np.int32
    shape, affine = native_image.shape[:3], native_image.affine
    return make_image(resample(labels, space.AFFINE, shape, affine, from_sri24, order=0), affine, dtype)


def field_of_view(
    volume_shape: tuple[int, int, int],
    affine: np.ndarray,
    shape: tuple[int, int, int],
    target_affine: np.ndarray,
    pull: np.ndarray | None = None,
) -> np.ndarray:
    """Mark the voxels of a grid that lie in the field of view of an image.

    Parameters
    ----------
    volume_shape : tuple of int
        Shape of the image.
    affine, shape, target_affine, pull
        As for :func:`resample`.

    Returns
    -------
    numpy.ndarray of bool, of `shape`
        True inside the field of view.
    """
    return _inside(volume_shape, shape, _voxel_matrix(affine, target_affine, pull))


def _voxel_matrix(affine: np.ndarray, target_affine: np.ndarray, pull: np.ndarray | None) -> np.ndarray:
    world = target_affine if pull is None else pull @ target_affine
    return np.linalg.inv(affine) @ world


def _inside(volume_shape: tuple[int, ...], shape: tuple[int, ...], matrix: np.ndarray) -> np.ndarray:
    inside = np.ones(shape, dtype=bool)
    grid = np.ogrid[tuple(slice(n) for n in shape)]
    for axis, size in enumerate(volume_shape):
        x, y, z = (np.float32(matrix[axis, k]) * grid[k].astype(np.float32) for k in range(3))
        position = x + (y + z + np.float32(matrix[axis, 3]))
        # The tolerance includes the edges of an image that fills the grid exactly.
        inside &= position > -0.5 - 1e-3
        inside &= position < size - 0.5 + 1e-3
    return inside


def translation(vector: np.ndarray) -> np.ndarray:
    """Return the 4 x 4 matrix of a translation by `vector` (mm)."""
    matrix = np.eye(4)
    matrix[:3, 3] = vector
    return matrix


def rotation_about(point: np.ndarray, degrees_xyz: tuple[float, float, float]) -> np.ndarray:
    """Return the matrix of a rotation about a point.

    Parameters
    ----------
    point : numpy.ndarray, shape (3,)
        Fixed point, mm.
    degrees_xyz : tuple of float
        Euler angles about x, then y, then z; degrees.

    Returns
    -------
    numpy.ndarray, shape (4, 4)
        Rigid transform.
    """
    from scipy.spatial.transform import Rotation

    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", degrees_xyz, degrees=True).as_matrix()
    matrix[:3, 3] = np.asarray(point) - matrix[:3, :3] @ np.asarray(point)
    return matrix


def rotation_angle(matrix: np.ndarray) -> float:
    """Return the rotation angle of a rigid transform in degrees."""
    cosine = (np.trace(matrix[:3, :3]) - 1) / 2
    return float(np.degrees(np.arccos(np.clip(cosine, -1.0, 1.0))))


def nearest_rigid(matrix: np.ndarray, fixed_point: np.ndarray) -> np.ndarray:
    """Replace the linear part of an affine by the closest rotation, and preserve the image of one point.

    ITK optimises in single precision, so that its rotations deviate from orthonormality by about 1e-7.

    Parameters
    ----------
    matrix : numpy.ndarray, shape (4, 4)
        Nearly rigid transform.
    fixed_point : numpy.ndarray, shape (3,)
        Point whose image is preserved, such as the centre of the brain; mm.

    Returns
    -------
    numpy.ndarray, shape (4, 4)
        Determinant +1, orthonormal to double precision.
    """
    u, _, vt = np.linalg.svd(matrix[:3, :3])
    rotation = u @ np.diag([1.0, 1.0, np.sign(np.linalg.det(u @ vt))]) @ vt
    rigid = np.eye(4)
    rigid[:3, :3] = rotation
    rigid[:3, 3] = matrix[:3, :3] @ fixed_point + matrix[:3, 3] - rotation @ fixed_point
    return rigid


def lps_to_ras(matrix: np.ndarray) -> np.ndarray:
    """Convert a 4 x 4 world matrix from LPS+ to RAS+ or back."""
    return _LPS @ matrix @ _LPS


def write_itk(path: str | PathLike[str], pull: np.ndarray) -> Path:
    """Write an affine transform as an ITK text file.

    Parameters
    ----------
    path : path-like
        File whose name ends in ``.txt``.
    pull : numpy.ndarray, shape (4, 4)
        RAS+ matrix from output points to input points.

    Returns
    -------
    pathlib.Path
        The file.
    """
    lps = lps_to_ras(np.asarray(pull, dtype=np.float64))
    # + 0.0 turns a negative zero into zero
    numbers = " ".join(repr(float(x) + 0.0) for x in [*lps[:3, :3].ravel(), *lps[:3, 3]])
    return write_text(path, f"{_ITK_HEADER}Parameters: {numbers}\nFixedParameters: 0 0 0\n")


def read_itk(path: str | PathLike[str]) -> np.ndarray:
    """Read an ITK text file with one affine transform.

    Parameters
    ----------
    path : path-like
        Text file.

    Returns
    -------
    numpy.ndarray, shape (4, 4)
        RAS+ matrix from output points to input points.

    Raises
    ------
    ValueError
        If the file does not hold exactly one three-dimensional affine.
    bids_uad.errors.InputError
        If the file cannot be read.
    """
    fields: dict[str, str] = {}
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise unreadable(path, error) from error
    for line in text.splitlines():
        key, separator, value = line.partition(":")
        if not separator or line.startswith("#"):
            continue
        if key.strip() in fields:
            raise ValueError(f"{path}: more than one transform in the file")
        fields[key.strip()] = value.strip()
    try:
        parameters = np.array(fields.get("Parameters", "").split(), dtype=np.float64)
        centre = np.array(fields.get("FixedParameters", "").split(), dtype=np.float64)
    except ValueError:
        parameters = centre = np.empty(0)
    if parameters.size != 12 or centre.size != 3:
        raise ValueError(f"{path}: not an ITK text file with one three-dimensional affine")
    return from_itk_parameters(parameters, centre)


def from_itk_parameters(parameters: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Convert the parameters of an ITK affine to a RAS+ matrix.

    Parameters
    ----------
    parameters : numpy.ndarray, shape (12,)
        Row-major 3 x 3 matrix, then the translation (LPS+, mm).
    centre : numpy.ndarray, shape (3,)
        Centre of rotation: the fixed parameters of the transform (LPS+, mm).

    Returns
    -------
    numpy.ndarray, shape (4, 4)
        RAS+ matrix, mm.
    """
    lps = np.eye(4)
    lps[:3, :3] = np.reshape(parameters[:9], (3, 3))
    lps[:3, 3] = np.asarray(parameters[9:]) + centre - lps[:3, :3] @ centre
    return lps_to_ras(lps)


def load_ants() -> ModuleType:
    """Import antspyx with one thread and a fixed random seed, which makes its results reproducible.

    Returns
    -------
    module
        ``ants``
    """
    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = "1"
    os.environ["ANTS_RANDOM_SEED"] = ANTS_SEED
    import ants

    return ants


def to_ants(volume: np.ndarray, affine: np.ndarray) -> ANTsImage:
    """Convert an array to an ANTs image.

    Parameters
    ----------
    volume : numpy.ndarray, three-dimensional
        Intensities or a mask.
    affine : numpy.ndarray, shape (4, 4)
        Voxel-to-world (RAS+, mm), without shear.

    Returns
    -------
    ants.ANTsImage
        Image of pixel type float.
    """
    lps = _LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    return load_ants().from_numpy(
        np.ascontiguousarray(volume, dtype=np.float32),
        origin=lps[:3, 3].tolist(),
        spacing=spacing.tolist(),
        direction=lps[:3, :3] / spacing,
    )


@contextmanager
def link_plain_names(paths: Sequence[str]) -> Iterator[list[str]]:
    """Link files to names without special characters, and change to their folder.

    ANTs parses commas and brackets in a path as its own syntax. The links are in a temporary folder, which is
    the working directory of the process inside the context.

    Parameters
    ----------
    paths : sequence of str
        Files.

    Yields
    ------
    list of str
        Names relative to the working directory, with the suffixes of the files.
    """
    targets = [Path(path).absolute() for path in paths]
    with TemporaryDirectory() as folder, chdir(folder):
        names = [f"{number}{''.join(target.suffixes)}" for number, target in enumerate(targets)]
        for name, target in zip(names, targets, strict=True):
            Path(name).symlink_to(target)
        yield names
