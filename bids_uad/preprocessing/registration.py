"""Linear registration of one volume to another with ANTs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from scipy import ndimage

from bids_uad.constraints import Constrained, Count, Interval, Items, NonNegative, invalid
from bids_uad.preprocessing.antspy import load_ants, to_ants
from bids_uad.preprocessing.overlap import dice
from bids_uad.preprocessing.resampling import field_of_view, isotropic, resample, resample_mask
from bids_uad.preprocessing.transforms import from_itk_parameters, nearest_rigid, rotation_about, translation

SPACING = 2.0
"""Voxel edge (mm) at which images are registered: 0.1 mm off the 1 mm result, ten times faster."""
BINS = 32
CUBE, EDGE = 6, 2


@dataclass(frozen=True)
class Volume:
    """An array, where it lies in the world, and (optionally) which voxels count.

    Attributes
    ----------
    data : numpy.ndarray, three-dimensional
    affine : numpy.ndarray, shape (4, 4)
        Voxel-to-world, RAS+, mm.
    mask : numpy.ndarray of bool or None
        Same shape as `data`.
    """

    data: np.ndarray
    affine: np.ndarray
    mask: np.ndarray | None = None

    def coarse(self, spacing: float = SPACING) -> Volume:
        """Return the volume on isotropic voxels of `spacing` mm."""
        data, affine = isotropic(self.data, self.affine, spacing)
        if self.mask is None:
            return Volume(data, affine)
        return Volume(data, affine, isotropic(self.mask, self.affine, spacing)[0] > 0.5)

    def centre(self) -> np.ndarray:
        """Return the world position of the centre of the mask (of the grid if there is none)."""
        if self.mask is None or not self.mask.any():
            voxel = (np.array(self.data.shape) - 1) / 2
        else:
            voxel = np.array(ndimage.center_of_mass(self.mask))
        return self.affine[:3, :3] @ voxel + self.affine[:3, 3]

    def cropped(self, margin: int) -> Volume:
        """Return the part around the mask, `margin` voxels wider on each side."""
        if self.mask is None or not self.mask.any():
            return self
        box = ndimage.find_objects(self.mask.astype(np.uint8))[0]
        cut = tuple(
            slice(max(part.start - margin, 0), min(part.stop + margin, size))
            for part, size in zip(box, self.mask.shape, strict=True)
        )
        affine = self.affine.copy()
        affine[:3, 3] += affine[:3, :3] @ np.array([part.start for part in cut])
        return Volume(self.data[cut], affine, self.mask[cut])

    def moved(self, pull: np.ndarray) -> Volume:
        """Return the volume as it lies after a rigid `pull`, by changing its affine only."""
        return Volume(self.data, np.linalg.inv(pull) @ self.affine, self.mask)


@dataclass(frozen=True)
class Schedule(Constrained):
    """Resolution levels of a linear registration, coarse to fine.

    Attributes
    ----------
    iterations, shrink_factors, smoothing_sigmas : tuple
        Most iterations, subsampling and smoothing (voxels) per level.
    sampling_rate : float
        Share of the voxels at which the metric looks.
    """

    iterations: Annotated[tuple[Count, ...], Items()] = (500, 250, 100)
    shrink_factors: tuple[Count, ...] = (4, 2, 1)
    smoothing_sigmas: tuple[NonNegative, ...] = (2, 1, 0)
    sampling_rate: Annotated[float, Interval(0, 1, closed="right")] = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("shrink_factors", "smoothing_sigmas"):
            if len(getattr(self, name)) != len(self.iterations):
                raise invalid(self, name, f"of the length of 'iterations', {len(self.iterations)}")


FULL = Schedule()


def register_rigid(
    fixed: Volume, moving: Volume, start: np.ndarray, folder: Path, schedule: Schedule = FULL
) -> np.ndarray:
    """Find the rigid transform that maximises mutual information (Mattes) inside the fixed mask.

    Parameters
    ----------
    fixed, moving : Volume
        Both at the resolution to register at. Where `fixed` has a mask, nothing outside it is looked at.
    start : numpy.ndarray, shape (4, 4)
        First guess: pull matrix, fixed points to moving points.
    folder : pathlib.Path
        Where ANTs leaves its files.
    schedule : Schedule

    Returns
    -------
    numpy.ndarray, shape (4, 4)
        Pull matrix, exactly rigid.
    """
    return nearest_rigid(_register(fixed, moving, start, folder, schedule, "Rigid"), fixed.centre())


def register_affine(
    fixed: Volume, moving: Volume, start: np.ndarray, folder: Path, schedule: Schedule = FULL
) -> np.ndarray:
    """Find the affine transform that maximises mutual information; see :func:`register_rigid`."""
    return _register(fixed, moving, start, folder, schedule, "Affine")


def _register(
    fixed: Volume, moving: Volume, start: np.ndarray, folder: Path, schedule: Schedule, kind: str
) -> np.ndarray:
    ants = load_ants()
    # ANTs would take commas and brackets in the path of the folder for its own syntax.
    with chdir(folder):
        result = ants.registration(
            fixed=to_ants(fixed.data, fixed.affine),
            # A rigid start goes into the moving image's affine: no file, no convention to get wrong.
            moving=to_ants(moving.data, moving.moved(start).affine),
            type_of_transform=kind,
            initial_transform="Identity",
            mask=None if fixed.mask is None else to_ants(fixed.mask, fixed.affine),
            mask_all_stages=True,
            outprefix=f"{kind.lower()}_",
            aff_random_sampling_rate=schedule.sampling_rate,
            aff_iterations=schedule.iterations,
            aff_shrink_factors=schedule.shrink_factors,
            aff_smoothing_sigmas=schedule.smoothing_sigmas,
        )
        found = ants.read_transform(result["fwdtransforms"][0])
    return start @ from_itk_parameters(found.parameters, found.fixed_parameters)


def register_best(
    fixed: Volume, moving: Volume, starts: Sequence[np.ndarray], folder: Path, schedule: Schedule = FULL
) -> tuple[np.ndarray, float]:
    """Run :func:`register_rigid` from several starts and keep the most similar result.

    Parameters
    ----------
    fixed, moving : Volume
    starts : sequence of numpy.ndarray, shape (4, 4)
    folder : pathlib.Path
    schedule : Schedule

    Returns
    -------
    pull : numpy.ndarray, shape (4, 4)
    similarity : float
        :func:`similarity` of the result.
    """
    results = [register_rigid(fixed, moving, start, folder, schedule) for start in starts]
    scores = [similarity(fixed, moving, pull) for pull in results]
    best = int(np.argmax(scores))
    return results[best], scores[best]


def similarity(fixed: Volume, moving: Volume, pull: np.ndarray) -> float:
    """Measure how well two volumes agree, whatever their contrasts.

    Normalised mutual information (H(a) + H(b)) / H(a, b) - 1 over the voxels of either mask (of the fixed
    mask alone if the moving image has none): 0 for independent images, 1 for a one-to-one relation. After
    Studholme et al. 1999, doi:10.1016/S0031-3203(98)00091-0.

    Parameters
    ----------
    fixed, moving : Volume
    pull : numpy.ndarray, shape (4, 4)

    Returns
    -------
    float
    """
    shape = fixed.data.shape
    values = resample(moving.data, moving.affine, shape, fixed.affine, pull)
    region = np.ones(shape, dtype=bool) if fixed.mask is None else fixed.mask
    if moving.mask is not None:
        region = region | (resample(moving.mask, moving.affine, shape, fixed.affine, pull) > 0.5)
    joint, _, _ = np.histogram2d(binned(fixed.data[region]), binned(values[region]), bins=BINS)
    return mutual_information(joint)


def local_correlation(fixed: Volume, moving: Volume, pull: np.ndarray) -> float:
    """Measure whether two volumes show the same kind of object, such as two brains.

    The median, over cubes of `CUBE` voxels inside both masks, of Pearson's correlation of the intensities.
    Brains have the same folds, fluid and nuclei in about the same places, so that the correlation has the
    same sign in most cubes (a negative one between T1w and T2w), even with a tumour in some; with any other
    object its sign varies. The outermost `EDGE` voxels of the masks are left out: all objects are darker
    around.

    Parameters
    ----------
    fixed, moving : Volume
        `fixed` with its mask, on voxels of some 2 mm.
    pull : numpy.ndarray, shape (4, 4)

    Returns
    -------
    float
        0 if no cube lies in the masks.
    """
    shape = fixed.data.shape
    region = fixed.mask & field_of_view(moving.data.shape, moving.affine, shape, fixed.affine, pull)
    if moving.mask is not None:
        region &= resample_mask(moving.mask, moving.affine, shape, fixed.affine, pull)
    region = ndimage.binary_erosion(region, iterations=EDGE)
    values = resample(moving.data, moving.affine, shape, fixed.affine, pull)[region].astype(np.float64)
    others = fixed.data[region].astype(np.float64)
    places = np.argwhere(region) // CUBE
    _, cube, counts = np.unique(places, axis=0, return_inverse=True, return_counts=True)
    cube = cube.ravel()

    def mean(numbers: np.ndarray) -> np.ndarray:
        return np.bincount(cube, numbers) / counts

    covariance = mean(values * others) - mean(values) * mean(others)
    variances = (mean(values**2) - mean(values) ** 2) * (mean(others**2) - mean(others) ** 2)
    full = (counts >= CUBE**3 / 2) & (variances > 0)
    return float(np.median(covariance[full] / np.sqrt(variances[full]))) if full.any() else 0.0


def mutual_information(joint: np.ndarray) -> float:
    """Normalise the mutual information of two images; see :func:`similarity`.

    Parameters
    ----------
    joint : numpy.ndarray, shape (bins, bins)
        Their joint histogram.

    Returns
    -------
    float
        0 where both are constant.
    """
    p = joint / joint.sum()
    together = _entropy(p)
    if together == 0.0:
        return 0.0
    return float((_entropy(p.sum(axis=0)) + _entropy(p.sum(axis=1))) / together - 1.0)


def mask_overlap(fixed: Volume, moving: Volume, pull: np.ndarray) -> float:
    """Compute the Dice overlap of the two masks once the moving one is pulled to the fixed grid."""
    moved = resample(moving.mask, moving.affine, fixed.data.shape, fixed.affine, pull) > 0.5
    return dice(moved, fixed.mask)


def centred_start(fixed: Volume, moving: Volume) -> np.ndarray:
    """Return the pull matrix that only brings the centres of the two masks together."""
    return translation(moving.centre() - fixed.centre())


def rotated_starts(fixed: Volume, moving: Volume, keep: int) -> list[np.ndarray]:
    """Search a grid of rotations about the centre, coarsely, for the most promising first guesses.

    Tilts of up to 40 degrees about each axis and the quarter turns of a mislabelled header, ranked by
    similarity on 8 mm voxels.

    Parameters
    ----------
    fixed, moving : Volume
    keep : int
        How many to return.

    Returns
    -------
    list of numpy.ndarray, shape (4, 4)
        Best first.
    """
    tiny_fixed, tiny_moving = fixed.coarse(8.0), moving.coarse(8.0)
    to_centre = centred_start(fixed, moving)
    tilts = [(x, y, z) for x in (-40, -20, 0, 20, 40) for y in (-20, 0, 20) for z in (-30, 0, 30)]
    turns = [
        (x, y, z)
        for x in (0, 90, 180, 270)
        for y in (0, 90, 180, 270)
        for z in (0, 90, 180, 270)
        if x or y or z
    ]
    candidates = [to_centre @ rotation_about(fixed.centre(), angles) for angles in [*tilts, *turns]]
    scores = [similarity(tiny_fixed, tiny_moving, pull) for pull in candidates]
    return [candidates[i] for i in np.argsort(scores)[::-1][:keep]]


def binned(values: np.ndarray) -> np.ndarray:
    """Scale values to [0, 1] between their 0.5th and 99.5th percentile; constant values become 0."""
    low, high = np.percentile(values, [0.5, 99.5])
    if high <= low:
        return np.zeros(values.shape)
    return np.clip((values - low) / (high - low), 0.0, 1.0)


def _entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())
