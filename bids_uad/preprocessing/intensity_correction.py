"""Corrections of raw intensities: bias field (N4), and noise in the background of MP2RAGE images."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import numpy as np
from scipy import ndimage

from bids_uad.preprocessing.registration import Volume
from bids_uad.preprocessing.resampling import resample, resample_isotropic

FIELD_SPACING_MM = 5.0
ITERATIONS = (40, 40, 40)
"""Maximum iterations per spline level. A spline span covers the brain at the first level and a quarter of it
(40 mm) at the third; a fourth level would be fine enough to remove the contrast of a large lesion."""
TOLERANCE = 1e-6
"""Coefficient of variation of the change of the field at which a level ends."""
HISTOGRAM_BINS = 200
KERNEL_FWHM = 0.15
"""Full width at half maximum of the field's histogram, logarithmic intensity."""
WIENER_NOISE = 0.01

UNIFORM_SUFFIX = "UNIT1"
MP2RAGE_DESCRIPTION = (
    "The noise around the head of the MP2RAGE image [@mp2rage], which fills the range of its intensities, "
    "was set to 0 before anything was computed on it. "
)
"""Sentence for the methods text."""
WINDOW_MM = 5.0
CLOSING_MM = 8.0
MIN_PART_MM3 = 10_000.0
MIN_AIR_ROUGHNESS = 0.1
"""Roughness of the border of the volume, as a fraction of the intensity range, above which it is noise; 0.17
is expected of uniform noise, and 0.05 at most of tissue with a signal-to-noise ratio of 10."""


def correct_bias(
    volume: np.ndarray, affine: np.ndarray, mask: np.ndarray, iterations: tuple[int, ...] = ITERATIONS
) -> np.ndarray:
    """Divide a scan by its bias field, estimated inside a mask on 5 mm voxels.

    The field is that of N4, see :func:`log_bias_field`. The scan is averaged, within the mask, to isotropic
    5 mm voxels rather than subsampled by a shrink factor: thick slices keep their detail in the plane, and
    voxels are less noisy. It is cropped to the mask, so that the knots of the spline do not depend on the
    amount of air in the scan. The field is interpolated linearly, as a logarithm, to the full grid.

    Parameters
    ----------
    volume : numpy.ndarray, three-dimensional
        Raw intensities; negative ones are set to 0.
    affine : numpy.ndarray, shape (4, 4)
        Voxel-to-world of `volume`, mm.
    mask : numpy.ndarray of bool
        Region in which the field is estimated, of the shape of `volume`. The whole volume is corrected.
    iterations : tuple of int, default=(40, 40, 40)
        Maximum iterations per level of the spline.

    Returns
    -------
    numpy.ndarray of float32
        Corrected intensities with the same median inside the mask.

    Raises
    ------
    ValueError
        If the median inside the mask is 0.
    """
    volume = np.maximum(np.asarray(volume, dtype=np.float32), 0.0)
    median = float(np.median(volume[mask]))
    if not median > 0:
        raise ValueError("most of the mask has no signal")
    weight, coarse_affine = resample_isotropic(mask, affine, FIELD_SPACING_MM)
    total, _ = resample_isotropic(np.where(mask, volume, 0.0), affine, FIELD_SPACING_MM)
    region = weight > 0.5
    coarse = np.divide(total, weight, out=np.zeros_like(total), where=region)
    box = Volume(coarse, coarse_affine, region).cropped(1)
    logarithm = log_bias_field(box.data, box.mask, iterations)
    corrected = volume / np.exp(resample(logarithm, box.affine, volume.shape, affine, extend=True))
    return (corrected * (median / float(np.median(corrected[mask])))).astype(np.float32)


def log_bias_field(
    volume: np.ndarray, mask: np.ndarray, iterations: Sequence[int] = ITERATIONS
) -> np.ndarray:
    """Estimate the logarithm of a bias field with N4 (Tustison et al. 2010, doi:10.1109/TMI.2010.2046908).

    The steps and constants are those of ITK, whose fields differ by less than 0.02 %. On a regular grid the
    B-spline approximation of scattered data is a product of small matrices along the three axes, which takes
    a thirtieth of ITK's time.

    Parameters
    ----------
    volume : numpy.ndarray, three-dimensional
        Intensities; voxels that are not positive are left out of the mask.
    mask : numpy.ndarray of bool
        Region in which the field is estimated, of the shape of `volume`.
    iterations : sequence of int, default=(40, 40, 40)
        Maximum iterations per level. The spline of the first level has one span, each next one twice as many.

    Returns
    -------
    numpy.ndarray of float64
        Logarithm of the field, on the whole grid.
    """
    mask = mask & (volume > 0)
    log = np.log(volume[mask].astype(np.float64))
    field, lattice, bases = np.zeros(mask.shape), np.zeros((4, 4, 4)), None
    for level, most in enumerate(iterations):
        previous, bases = bases, [_spline_basis(size, 2**level) for size in mask.shape]
        if previous is not None:
            # The finer spline that equals the field of the last level.
            finer = [np.linalg.lstsq(*pair)[0] for pair in zip(bases, previous, strict=True)]
            lattice = _along_axes(lattice, finer)
        squares = [(basis**2).T for basis in bases]
        weights = _along_axes(mask.astype(np.float64), squares)
        norm = _along_axes(np.ones((1, 1, 1)), [basis.sum(axis=0)[:, None] for basis in squares])[mask]
        cubes = [(basis**3).T for basis in bases]
        residual = np.zeros(mask.shape)
        for _ in range(most):
            corrected = log - field[mask]
            residual[mask] = (corrected - _sharpened(corrected)) / norm
            step = _along_axes(residual, cubes)
            lattice = lattice + np.divide(step, weights, out=np.zeros_like(step), where=weights > 0)
            before, field = field, _along_axes(lattice, bases)
            change = np.exp(before[mask] - field[mask])
            if change.std(ddof=1) / change.mean() <= TOLERANCE:
                break
    return field


def _along_axes(volume: np.ndarray, matrices: Sequence[np.ndarray]) -> np.ndarray:
    """Multiply a volume by one matrix along each axis."""
    for matrix in matrices:
        volume = np.tensordot(volume, matrix, axes=(0, 1))
    return volume


def _spline_basis(size: int, spans: int) -> np.ndarray:
    """Evaluate the cubic B-splines of `spans` spans over an axis; shape (size, spans + 3)."""
    position = np.linspace(0, spans, size)
    first = np.minimum(position.astype(int), spans - 1)
    t = position - first
    values = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]) / 6
    basis = np.zeros((size, spans + 3))
    for k in range(4):
        basis[np.arange(size), first + k] = values[k]
    return basis


def _sharpened(log: np.ndarray) -> np.ndarray:
    """Replace logarithmic intensities by their expectation under the deconvolved histogram.

    Sled et al. 1998, doi:10.1109/42.668698.
    """
    low, high = float(log.min()), float(log.max())
    width = (high - low) / (HISTOGRAM_BINS - 1)
    if width == 0.0:
        return log
    position = (log - low) / width
    below = np.minimum(position.astype(int), HISTOGRAM_BINS - 2)
    histogram = np.bincount(below, 1 - (position - below), HISTOGRAM_BINS)
    histogram += np.bincount(below + 1, position - below, HISTOGRAM_BINS)
    size = 2 ** (int(np.ceil(np.log2(HISTOGRAM_BINS))) + 1)
    start = (size - HISTOGRAM_BINS) // 2
    padded = np.zeros(size)
    padded[start : start + HISTOGRAM_BINS] = histogram
    fwhm = KERNEL_FWHM / width
    distance = np.minimum(np.arange(size), size - np.arange(size))
    kernel = 2 * np.sqrt(np.log(2) / np.pi) / fwhm * np.exp(-4 * np.log(2) * (distance / fwhm) ** 2)
    blur = np.fft.fft(kernel)
    wiener = (np.conj(blur) / (np.abs(blur) ** 2 + WIENER_NOISE)).real
    density = np.maximum(np.fft.ifft(np.fft.fft(padded) * wiener).real, 0.0)
    levels = low + (np.arange(size) - start) * width
    moment, total = (np.fft.ifft(np.fft.fft(values) * blur).real for values in (levels * density, density))
    expected = np.divide(moment, total, out=np.zeros(size), where=total != 0)[start : start + HISTOGRAM_BINS]
    return np.interp(position, np.arange(HISTOGRAM_BINS), expected)


def is_uniform_image(path: str | PathLike[str]) -> bool:
    """Return whether a file name has the suffix of an MP2RAGE image (``UNIT1``)."""
    return Path(path).name.split(".", 1)[0].endswith(f"_{UNIFORM_SUFFIX}")


def mask_background(data: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, float]:
    """Set the noise around the head of an MP2RAGE image to 0.

    The roughness of a voxel is the smaller of the differences to its two neighbours along an axis, averaged
    over the axes and over 5 mm. It is high in noise and low in tissue, also at edges, where one of the two
    neighbours is similar. The head is the region with less than half the roughness of the border of the
    volume: connected parts of at least 10 mL (brain and scalp), closed by 8 mm across bone and sinuses, with
    holes filled.

    Parameters
    ----------
    data : numpy.ndarray, three-dimensional
        Non-negative intensities.
    affine : numpy.ndarray, shape (4, 4)
        Voxel-to-world of `data`, mm.

    Returns
    -------
    data : numpy.ndarray
        Intensities, 0 outside the head; unchanged if the border of the volume is not noise (in an image that
        is masked or denoised).
    masked : float
        Fraction of the voxels that were set to 0.
    """
    zooms = np.linalg.norm(affine[:3, :3], axis=0)
    low, high = np.percentile(data, [1, 99])
    roughness = _roughness(data, zooms) / max(high - low, np.finfo(np.float32).tiny)
    faces = np.concatenate([roughness.take([0, -1], axis=axis).ravel() for axis in range(3)])
    air = float(np.median(faces))
    if air < MIN_AIR_ROUGHNESS:
        return data, 0.0
    labels, _ = ndimage.label(roughness < air / 2)
    sizes = np.bincount(labels.ravel()) * float(np.prod(zooms))
    sizes[0] = 0.0
    if sizes.max() < MIN_PART_MM3:
        return data, 0.0
    head = ndimage.binary_fill_holes(_closed(sizes[labels] >= MIN_PART_MM3, zooms))
    return np.where(head, data, np.float32(0)), float(1 - head.mean())


def _roughness(data: np.ndarray, zooms: np.ndarray) -> np.ndarray:
    total = np.zeros(data.shape, dtype=np.float32)
    for axis in range(3):
        step = np.abs(np.diff(data, axis=axis))
        # At either end of an axis there is only one neighbour.
        before = np.concatenate([step.take([0], axis=axis), step], axis=axis)
        after = np.concatenate([step, step.take([-1], axis=axis)], axis=axis)
        total += np.minimum(before, after) / 3
    size = [max(3, 2 * round(WINDOW_MM / zoom / 2) + 1) for zoom in zooms]
    return ndimage.uniform_filter(total, size=size, mode="nearest")


def _closed(mask: np.ndarray, zooms: np.ndarray) -> np.ndarray:
    """Close a mask by a ball; the volume is padded so that its border does not act as background."""
    margin = [int(np.ceil(CLOSING_MM / zoom)) + 1 for zoom in zooms]
    inner = tuple(slice(width, -width) for width in margin)
    padded = np.pad(mask, [(width, width) for width in margin])
    dilated = ndimage.distance_transform_edt(~padded, sampling=zooms) <= CLOSING_MM
    closed = ndimage.distance_transform_edt(dilated, sampling=zooms) > CLOSING_MM
    return closed[inner] | mask
