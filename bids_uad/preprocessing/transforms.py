"""Rigid and affine transforms as 4 x 4 matrices, and their ITK text files.

One convention throughout: a matrix *pulls*. It takes a point of the output (reference) image to the point of
the input image whose intensity belongs there, in world coordinates, RAS+, millimetres. That is what an ITK
file stores (in LPS+) and what ``antsApplyTransforms`` expects, so the file named ``from-T1w_to-SRI24`` holds
the matrix that takes SRI24 points to T1w points.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import numpy as np

from bids_uad.atomic import write_text
from bids_uad.errors import unreadable

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
