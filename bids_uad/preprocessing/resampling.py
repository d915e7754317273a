"""Put a volume on another grid through one affine, in one interpolation."""

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
from bids_uad.images import make_image

if TYPE_CHECKING:
    from ants import ANTsImage


def resample(
    volume: np.ndarray,
    affine: np.ndarray,
    shape: tuple[int, int, int],
    target_affine: np.ndarray,
    pull: np.ndarray | None = None,
    order: int = 1,
    extend: bool = False,
) -> np.ndarray:
    """Resample a volume; outside its field of view the result is 0 (or the nearest edge value).

    Parameters
    ----------
    volume : numpy.ndarray, three-dimensional
        Boolean volumes are interpolated as 0/1.
    affine : numpy.ndarray, shape (4, 4)
        Voxel-to-world (RAS+, mm) of `volume`.
    shape : tuple of int
        Shape of the result.
    target_affine : numpy.ndarray, shape (4, 4)
        Voxel-to-world of the result.
    pull : numpy.ndarray, shape (4, 4), optional
        World matrix from points of the result to points of `volume`; identity by default.
    order : int
        0 nearest neighbour, 1 linear.
    extend : bool
        Repeat the edge values outside the field of view instead of 0.

    Returns
    -------
    numpy.ndarray of float32, of `shape`
    """
    matrix = _voxel_matrix(affine, target_affine, pull)
    # A sample belongs to the image up to half a voxel beyond its outermost centres (thick slices!); the
    # edge value is repeated there, and what lies further out is cleared by the field of view.
    sampled = ndimage.affine_transform(
        np.asarray(volume, dtype=np.float32),
        matrix[:3, :3],
        matrix[:3, 3],
        output_shape=shape,
        order=order,
        mode="nearest",
        prefilter=False,
    )
    if not extend:
        sampled[~_inside(volume.shape, shape, matrix)] = 0.0
    return sampled


def resample_mask(
    mask: np.ndarray,
    affine: np.ndarray,
    shape: tuple[int, int, int],
    target_affine: np.ndarray,
    pull: np.ndarray | None = None,
) -> np.ndarray:
    """Resample a binary mask: linear interpolation of its indicator, cut at one half.

    This is ITK's generic-label interpolation with a linear kernel. It keeps the volume of a mask, and its
    edge is smoother than the staircase that nearest neighbours leave of thick slices.

    Parameters
    ----------
    mask, affine, shape, target_affine, pull
        As in :func:`resample`; `mask` is boolean.

    Returns
    -------
    numpy.ndarray of bool, of `shape`
    """
    return resample(mask, affine, shape, target_affine, pull) > 0.5


def resample_mask_through(
    mask: np.ndarray,
    affine: np.ndarray,
    shape: tuple[int, int, int],
    target_affine: np.ndarray,
    transforms: Sequence[str],
) -> np.ndarray:
    """Resample a binary mask as :func:`resample_mask` does, through a chain of ITK transforms of any kind.

    Parameters
    ----------
    mask, affine, shape, target_affine
        As in :func:`resample`; `mask` is boolean.
    transforms : sequence of str
        Files. The first takes points of the result, each other points that the one before gives.

    Returns
    -------
    numpy.ndarray of bool, of `shape`

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
            # Otherwise an affine that stands alone or last is inverted.
            whichtoinvert=[False] * len(transforms),
            interpolator="linear",
        )
    return moved.numpy() > 0.5


def field_of_view(
    volume_shape: tuple[int, int, int],
    affine: np.ndarray,
    shape: tuple[int, int, int],
    target_affine: np.ndarray,
    pull: np.ndarray | None = None,
) -> np.ndarray:
    """Tell which voxels of a grid an image covers.

    Parameters
    ----------
    volume_shape : tuple of int
        Shape of the image.
    affine, shape, target_affine, pull
        As in :func:`resample`.

    Returns
    -------
    numpy.ndarray of bool, of `shape`
    """
    return _inside(volume_shape, shape, _voxel_matrix(affine, target_affine, pull))


def resample_isotropic(
    volume: np.ndarray, affine: np.ndarray, spacing: float
) -> tuple[np.ndarray, np.ndarray]:
    """Resample to isotropic voxels along the image's own axes, smoothing first where it gets coarser.

    Parameters
    ----------
    volume : numpy.ndarray, three-dimensional
    affine : numpy.ndarray, shape (4, 4)
    spacing : float
        New voxel edge in mm.

    Returns
    -------
    volume : numpy.ndarray of float32
    affine : numpy.ndarray, shape (4, 4)
        The corner of the first voxel stays where it was.
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
    """Smooth a volume as far as voxels of `spacing` mm would, along each axis that is finer.

    Parameters
    ----------
    volume : numpy.ndarray, three-dimensional
    affine : numpy.ndarray, shape (4, 4)
    spacing : float

    Returns
    -------
    numpy.ndarray of float32
    """
    zooms = np.linalg.norm(affine[:3, :3], axis=0)
    widths = np.sqrt(np.maximum(spacing**2 - zooms**2, 0.0)) / zooms
    return ndimage.gaussian_filter(
        np.asarray(volume, dtype=np.float32), widths / np.sqrt(8 * np.log(2)), mode="nearest"
    )


def _voxel_matrix(affine: np.ndarray, target_affine: np.ndarray, pull: np.ndarray | None) -> np.ndarray:
    world = target_affine if pull is None else pull @ target_affine
    return np.linalg.inv(affine) @ world


def _inside(volume_shape: tuple[int, ...], shape: tuple[int, ...], matrix: np.ndarray) -> np.ndarray:
    inside = np.ones(shape, dtype=bool)
    grid = np.ogrid[tuple(slice(n) for n in shape)]
    for axis, size in enumerate(volume_shape):
        x, y, z = (np.float32(matrix[axis, k]) * grid[k].astype(np.float32) for k in range(3))
        position = x + (y + z + np.float32(matrix[axis, 3]))
        # The tolerance keeps an image that fills the grid exactly.
        inside &= position > -0.5 - 1e-3
        inside &= position < size - 0.5 + 1e-3
    return inside


_FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])
_HEADER = "#Insight Transform File V1.0\n#Transform 0\n"


def lps_to_ras(matrix: np.ndarray) -> np.ndarray:
    """Change the coordinate convention of a 4 x 4 world matrix, LPS+ to RAS+ or back (its own inverse)."""
    return _FLIP @ matrix @ _FLIP


def write_itk(path: str | PathLike[str], pull: np.ndarray) -> Path:
    """Write one affine as an ITK text file.

    Parameters
    ----------
    path : path-like
        Ends in ``.txt``.
    pull : numpy.ndarray, shape (4, 4)
        RAS+ matrix from output points to input points.

    Returns
    -------
    pathlib.Path
    """
    lps = lps_to_ras(np.asarray(pull, dtype=np.float64))
    # + 0.0 turns a negative zero into zero
    numbers = " ".join(repr(float(x) + 0.0) for x in [*lps[:3, :3].ravel(), *lps[:3, 3]])
    return write_text(
        path,
        f"{_HEADER}Transform: AffineTransform_double_3_3\nParameters: {numbers}\nFixedParameters: 0 0 0\n",
    )


def read_itk(path: str | PathLike[str]) -> np.ndarray:
    """Read an ITK text file that holds one affine.

    Parameters
    ----------
    path : path-like

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
    """Build the RAS+ matrix from ITK's twelve parameters and its centre of rotation.

    Parameters
    ----------
    parameters : numpy.ndarray, shape (12,)
        Row-major 3 x 3 matrix, then the translation (LPS+).
    centre : numpy.ndarray, shape (3,)
        Fixed parameters of the transform (LPS+, mm).

    Returns
    -------
    numpy.ndarray, shape (4, 4)
    """
    lps = np.eye(4)
    lps[:3, :3] = np.reshape(parameters[:9], (3, 3))
    lps[:3, 3] = np.asarray(parameters[9:]) + centre - lps[:3, :3] @ centre
    return lps_to_ras(lps)


def nearest_rigid(matrix: np.ndarray, fixed_point: np.ndarray) -> np.ndarray:
    """Replace the linear part by the closest rotation, keeping the image of one point.

    ITK optimises in single precision and its rotations drift by about 1e-7.

    Parameters
    ----------
    matrix : numpy.ndarray, shape (4, 4)
    fixed_point : numpy.ndarray, shape (3,)
        Point whose image must not change, e.g. the centre of the brain.

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


def rotation_about(point: np.ndarray, degrees_xyz: tuple[float, float, float]) -> np.ndarray:
    """Rotate about `point` by Euler angles (x, then y, then z; degrees).

    Parameters
    ----------
    point : numpy.ndarray, shape (3,)
    degrees_xyz : tuple of float

    Returns
    -------
    numpy.ndarray, shape (4, 4)
    """
    from scipy.spatial.transform import Rotation

    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", degrees_xyz, degrees=True).as_matrix()
    matrix[:3, 3] = np.asarray(point) - matrix[:3, :3] @ np.asarray(point)
    return matrix


def rotation_angle(matrix: np.ndarray) -> float:
    """Angle of a rigid transform's rotation, degrees."""
    cosine = (np.trace(matrix[:3, :3]) - 1) / 2
    return float(np.degrees(np.arccos(np.clip(cosine, -1.0, 1.0))))


def translation(vector: np.ndarray) -> np.ndarray:
    """Make the 4 x 4 matrix that adds `vector` (mm)."""
    matrix = np.eye(4)
    matrix[:3, 3] = vector
    return matrix


SEED = "20251201"


def load_ants() -> ModuleType:
    """Import antspyx with one thread and a fixed seed.

    Returns
    -------
    module
        ``ants``
    """
    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = "1"
    os.environ["ANTS_RANDOM_SEED"] = SEED
    import ants

    return ants


@contextmanager
def link_plain_names(paths: Sequence[str]) -> Iterator[list[str]]:
    """Give files names that ANTs can read, whatever their paths hold.

    ANTs takes commas and brackets in a path for its own syntax. The files are linked to from a temporary
    folder, which is the working directory of the process meanwhile.

    Parameters
    ----------
    paths : sequence of str

    Yields
    ------
    list of str
        Names without a folder, with the endings of the files.
    """
    targets = [Path(path).absolute() for path in paths]
    with TemporaryDirectory() as folder, chdir(folder):
        names = [f"{number}{''.join(target.suffixes)}" for number, target in enumerate(targets)]
        for name, target in zip(names, targets, strict=True):
            Path(name).symlink_to(target)
        yield names


def to_ants(volume: np.ndarray, affine: np.ndarray) -> ANTsImage:
    """Make an ANTs image of an array.

    Parameters
    ----------
    volume : numpy.ndarray, three-dimensional
    affine : numpy.ndarray, shape (4, 4)
        Voxel-to-world (RAS+, mm), without shear.

    Returns
    -------
    ants.ANTsImage
        Pixel type float.
    """
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    return load_ants().from_numpy(
        np.ascontiguousarray(volume, dtype=np.float32),
        origin=lps[:3, 3].tolist(),
        spacing=spacing.tolist(),
        direction=lps[:3, :3] / spacing,
    )


def map_to_native(
    mask_sri24: np.ndarray, native_image: str | PathLike[str], from_sri24: str | PathLike[str]
) -> nib.Nifti1Image:
    """Resample a label volume from SRI24 to the grid of a raw scan, with nearest neighbours.

    Parameters
    ----------
    mask_sri24 : numpy.ndarray, shape (240, 240, 155)
        Boolean or small non-negative integers.
    native_image : path-like
        An image on the grid of the raw scan; only its header is read.
    from_sri24 : path-like
        ITK text file ``from-SRI24_to-T1w`` (or ``-T2w``) of that scan.

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
    native = nib.load(native_image)
    values = resample(labels, space.AFFINE, native.shape[:3], native.affine, read_itk(from_sri24), order=0)
    return make_image(values, native.affine, dtype)
