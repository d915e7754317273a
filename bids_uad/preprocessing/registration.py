"""Rigid and affine registration with ANTs, its refinement and its quality metrics.

Transforms are *pull* matrices: shape (4, 4), RAS+ world coordinates in mm, from points of the fixed image to
points of the moving image.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from scipy import ndimage, optimize

from bids_uad.constraints import (
    Constrained,
    Count,
    Interval,
    Items,
    NonNegative,
    invalid,
)
from bids_uad.preprocessing.resampling import (
    field_of_view,
    from_itk_parameters,
    load_ants,
    nearest_rigid,
    resample,
    resample_isotropic,
    resample_mask,
    rotation_about,
    to_ants,
    translation,
)

SPACING = 2.0
"""Voxel edge (mm) at which images are registered: 0.1 mm from the result at 1 mm, and ten times faster."""
MARGIN = 6
"""Voxels of `SPACING` kept around a brain; more background would only cost time."""
BINS = 32
"""Intensity bins per image of the joint histogram."""
RESTART_OVERLAP = 0.80
RESTART_SIMILARITY = 0.027
"""Mask overlap and similarity with the reference below which rotated starts are tried as well.

Brains overlap by 0.8 even if they are rotated. Their similarity is 0.029 to 0.12 if they are aligned, and
0.011 to 0.025 if they are rotated by 20 degrees or more.
"""
RESTARTS = 3
PAIR_SPACING, PAIR_MARGIN = 3.0, 3
"""Voxel edge (mm) and margin (voxels) for the comparison of two images of one participant."""
CUBE, EDGE = 6, 2
"""Edge of the cubes of `local_correlation`, and depth of the mask's surface layer left out (voxels)."""
SMOOTHING_MM = 2.0
"""Standard deviation of the Gaussian of `refine_rigid`, which removes local optima."""
RIM_VOXELS = 3
"""Width of the band around the mask that `refine_rigid` includes, for the outline of the brain."""
DEGREES_PER_STEP = 1.0
"""Rotation that moves the surface of a brain by about as much as a shift of 1 mm."""
PRECISION = 0.01
"""Tolerance of `refine_rigid`, mm and degrees."""


@dataclass(frozen=True)
class Volume:
    """Array with its affine and, optionally, a mask.

    Attributes
    ----------
    data : numpy.ndarray, three-dimensional
        Intensities.
    affine : numpy.ndarray, shape (4, 4)
        Voxel-to-world, RAS+, mm.
    mask : numpy.ndarray of bool or None
        Mask of the shape of `data`, such as a brain mask.
    """

    data: np.ndarray
    affine: np.ndarray
    mask: np.ndarray | None = None

    def coarse(self, spacing: float = SPACING) -> Volume:
        """Return the volume on isotropic voxels of `spacing` mm."""
        data, affine = resample_isotropic(self.data, self.affine, spacing)
        if self.mask is None:
            return Volume(data, affine)
        return Volume(data, affine, resample_isotropic(self.mask, self.affine, spacing)[0] > 0.5)

    def centre(self) -> np.ndarray:
        """Return the centre of mass of the mask (centre of the grid without a mask) in world coordinates."""
        if self.mask is None or not self.mask.any():
            voxel = (np.array(self.data.shape) - 1) / 2
        else:
            voxel = np.array(ndimage.center_of_mass(self.mask))
        return self.affine[:3, :3] @ voxel + self.affine[:3, 3]

    def cropped(self, margin: int) -> Volume:
        """Return the bounding box of the mask, extended by `margin` voxels on each side."""
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
        """Return the volume after a rigid transform, by a change of its affine only."""
        return Volume(self.data, np.linalg.inv(pull) @ self.affine, self.mask)


@dataclass(frozen=True)
class RegistrationSchedule(Constrained):
    """Resolution levels of a linear registration, coarse to fine.

    Attributes
    ----------
    iterations : tuple of int, default=(500, 250, 100)
        Maximum number of iterations per level.
    shrink_factors : tuple of int, default=(4, 2, 1)
        Subsampling factor per level.
    smoothing_sigmas : tuple of float, default=(2, 1, 0)
        Gaussian smoothing per level, voxels.
    sampling_rate : float, default=0.3
        Fraction of the voxels at which the metric is evaluated.
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


DEFAULT_SCHEDULE = RegistrationSchedule()


def register_to_reference(
    reference: Volume, brain: Volume, folder: Path, *, asymmetric: bool = False
) -> tuple[np.ndarray, dict[str, Any]]:
    """Register a brain rigidly to the reference image.

    The registration starts with aligned centres of mass. If similarity or mask overlap are low afterwards
    (head tilted far back, wrong orientation in the header), the best rotations of a coarse grid are tried as
    well. The most similar result is refined.

    Parameters
    ----------
    reference, brain : Volume
        Skull-stripped images with masks, 0 outside them.
    folder : pathlib.Path
        Working folder for the files that ANTs writes.
    asymmetric : bool, default=False
        Whether the reference is left-right asymmetric. If so, its mirror image is registered as well.

    Returns
    -------
    pull : numpy.ndarray, shape (4, 4)
        From reference points to scan points.
    qc : dict
        ``similarity``, ``mirrored_similarity`` (None for a symmetric reference), ``local_correlation``,
        ``mask_overlap``, ``restarted``.
    """
    fixed, moving = _coarse_brain(reference), _coarse_brain(brain)
    # Without masks, so that the outline of the brain on black contributes to the metric.
    outline, moving_outline = Volume(fixed.data, fixed.affine), Volume(moving.data, moving.affine)
    pull = register_rigid(outline, moving_outline, centred_start(fixed, moving), folder)
    score = similarity(fixed, moving, pull)
    restarted = mask_overlap(fixed, moving, pull) < RESTART_OVERLAP or score < RESTART_SIMILARITY
    if restarted:
        for start in rotated_starts(fixed, moving, RESTARTS):
            other = register_rigid(outline, moving_outline, start, folder)
            other_score = similarity(fixed, moving, other)
            if other_score > score:
                pull, score = other, other_score
    pull = refine_rigid(fixed, moving, pull)
    mirrored = _mirrored_similarity(fixed, moving, pull, folder) if asymmetric else None
    return pull, _metrics(fixed, moving, pull, mirrored, restarted=restarted)


def register_to_anchor(anchor: Volume, scan: Volume, folder: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """Register a T2w scan rigidly to the brain of its T1w scan.

    The metric is evaluated inside the anchor's brain only, so the T2w scan may be a whole head, and may cover
    a part of the brain. The registration starts from the scanner coordinates, which one session shares, and
    from aligned centres; the more similar result is kept. The mirror image of the anchor is registered as
    well: two scans of one head are more similar than a scan and a mirror image, unless left and right are
    swapped in one of them.

    Parameters
    ----------
    anchor : Volume
        Skull-stripped T1w scan with its brain mask.
    scan : Volume
        T2w scan; with its brain mask if it is skull-stripped.
    folder : pathlib.Path
        Working folder for the files that ANTs writes.

    Returns
    -------
    pull : numpy.ndarray, shape (4, 4)
        From anchor points to scan points.
    qc : dict
        ``similarity``, ``mirrored_similarity``, ``local_correlation``, ``mask_overlap`` (None for a whole
        head), ``restarted``.
    """
    fixed, moving = _coarse_brain(anchor), scan.coarse()
    pull = _coregister(fixed, moving, folder)
    return pull, _metrics(fixed, moving, pull, _mirrored_similarity(fixed, moving, pull, folder))


def coregister(anchor: Volume, scan: Volume, folder: Path) -> np.ndarray:
    """Register a scan as :func:`register_to_anchor` does, without quality metrics.

    Parameters
    ----------
    anchor, scan, folder
        As for :func:`register_to_anchor`.

    Returns
    -------
    numpy.ndarray, shape (4, 4)
        Pull matrix from anchor points to scan points.
    """
    return _coregister(_coarse_brain(anchor), scan.coarse(), folder)


def _coregister(fixed: Volume, moving: Volume, folder: Path) -> np.ndarray:
    return register_best(fixed, moving, [np.eye(4), centred_start(fixed, moving)], folder)[0]


def registration_metrics(
    fixed: Volume, moving: Volume, pull: np.ndarray, folder: Path | None = None
) -> dict[str, Any]:
    """Compute the quality metrics of an existing transform.

    Parameters
    ----------
    fixed, moving : Volume
        `fixed` with its mask.
    pull : numpy.ndarray, shape (4, 4)
        From points of `fixed` to points of `moving`.
    folder : pathlib.Path, optional
        Working folder for the files that ANTs writes. If given, the mirror image of `fixed` is registered,
        too.

    Returns
    -------
    dict
        As of :func:`register_to_anchor`; ``mirrored_similarity`` is None without `folder`.
    """
    fixed, moving = _coarse_brain(fixed), moving.coarse()
    mirrored = None if folder is None else _mirrored_similarity(fixed, moving, pull, folder)
    return _metrics(fixed, moving, pull, mirrored)


def _metrics(
    fixed: Volume, moving: Volume, pull: np.ndarray, mirrored: float | None, *, restarted: bool = False
) -> dict[str, Any]:
    overlap = None if moving.mask is None else round(mask_overlap(fixed, moving, pull), 4)
    return {
        "similarity": round(similarity(fixed, moving, pull), 4),
        "mirrored_similarity": mirrored,
        "local_correlation": round(local_correlation(fixed, moving, pull), 4),
        "mask_overlap": overlap,
        "restarted": restarted,
    }


def _coarse_brain(brain: Volume) -> Volume:
    """Resample a brain to the voxel size of the registration, without most of its background."""
    return brain.coarse().cropped(MARGIN)


def register_rigid(
    fixed: Volume,
    moving: Volume,
    start: np.ndarray,
    folder: Path,
    schedule: RegistrationSchedule = DEFAULT_SCHEDULE,
) -> np.ndarray:
    """Find the rigid transform that maximises Mattes mutual information inside the fixed mask.

    Parameters
    ----------
    fixed, moving : Volume
        Images at the resolution of the registration. If `fixed` has a mask, the metric is
        evaluated inside it.
    start : numpy.ndarray, shape (4, 4)
        Initial pull matrix.
    folder : pathlib.Path
        Working folder for the files that ANTs writes.
    schedule : RegistrationSchedule, default=DEFAULT_SCHEDULE
        Resolution levels.

    Returns
    -------
    numpy.ndarray, shape (4, 4)
        Pull matrix, orthonormal to double precision.
    """
    return nearest_rigid(_register(fixed, moving, start, folder, schedule, "Rigid"), fixed.centre())


def register_affine(
    fixed: Volume,
    moving: Volume,
    start: np.ndarray,
    folder: Path,
    schedule: RegistrationSchedule = DEFAULT_SCHEDULE,
) -> np.ndarray:
    """Find the affine transform that maximises Mattes mutual information; see :func:`register_rigid`."""
    return _register(fixed, moving, start, folder, schedule, "Affine")


def _register(
    fixed: Volume, moving: Volume, start: np.ndarray, folder: Path, schedule: RegistrationSchedule, kind: str
) -> np.ndarray:
    ants = load_ants()
    # ANTs parses commas and brackets in a path as its own syntax, so it gets relative names.
    with chdir(folder):
        result = ants.registration(
            fixed=to_ants(fixed.data, fixed.affine),
            # The start is applied to the affine of the moving image, which needs no transform file.
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
        transform = ants.read_transform(result["fwdtransforms"][0])
    return start @ from_itk_parameters(transform.parameters, transform.fixed_parameters)


def register_best(
    fixed: Volume,
    moving: Volume,
    starts: Sequence[np.ndarray],
    folder: Path,
    schedule: RegistrationSchedule = DEFAULT_SCHEDULE,
) -> tuple[np.ndarray, float]:
    """Run :func:`register_rigid` from several starts and keep the most similar result.

    Parameters
    ----------
    fixed, moving : Volume
        As for :func:`register_rigid`.
    starts : sequence of numpy.ndarray, shape (4, 4)
        Initial pull matrices.
    folder : pathlib.Path
        Working folder for the files that ANTs writes.
    schedule : RegistrationSchedule, default=DEFAULT_SCHEDULE
        Resolution levels.

    Returns
    -------
    pull : numpy.ndarray, shape (4, 4)
        Pull matrix of the best result.
    similarity : float
        Its :func:`similarity`.
    """
    results = [register_rigid(fixed, moving, start, folder, schedule) for start in starts]
    scores = [similarity(fixed, moving, pull) for pull in results]
    best = int(np.argmax(scores))
    return results[best], scores[best]


def centred_start(fixed: Volume, moving: Volume) -> np.ndarray:
    """Return the translation that aligns the centres of the two masks, as a pull matrix."""
    return translation(moving.centre() - fixed.centre())


def rotated_starts(fixed: Volume, moving: Volume, keep: int) -> list[np.ndarray]:
    """Rank rotations about the centre by similarity on 8 mm voxels.

    Candidates are tilts of up to 40 degrees about each axis, and the multiples of 90 degrees that a wrong
    orientation in the header causes.

    Parameters
    ----------
    fixed, moving : Volume
        Images with masks.
    keep : int
        Number of starts to return.

    Returns
    -------
    list of numpy.ndarray, shape (4, 4)
        Pull matrices, the most similar first.
    """
    tiny_fixed, tiny_moving = fixed.coarse(8.0), moving.coarse(8.0)
    to_centre = centred_start(fixed, moving)
    tilts = [(x, y, z) for x in (-40, -20, 0, 20, 40) for y in (-20, 0, 20) for z in (-30, 0, 30)]
    quarters = (0, 90, 180, 270)
    turns = [(x, y, z) for x in quarters for y in quarters for z in quarters if x or y or z]
    candidates = [to_centre @ rotation_about(fixed.centre(), angles) for angles in [*tilts, *turns]]
    scores = [similarity(tiny_fixed, tiny_moving, pull) for pull in candidates]
    return [candidates[i] for i in np.argsort(scores)[::-1][:keep]]


def refine_rigid(fixed: Volume, moving: Volume, pull: np.ndarray) -> np.ndarray:
    """Refine a rigid transform to the nearest maximum of normalised mutual information.

    ANTs evaluates a random sample of the voxels and stops up to a millimetre from the maximum, elsewhere for
    each start. Powell's method (Powell 1964, doi:10.1093/comjnl/7.2.155) over all voxels converges to one
    result from all of them.

    Parameters
    ----------
    fixed, moving : Volume
        Skull-stripped images with masks, on voxels of about 2 mm.
    pull : numpy.ndarray, shape (4, 4)
        Initial pull matrix, within a few mm of the maximum.

    Returns
    -------
    numpy.ndarray, shape (4, 4)
        Refined pull matrix, exactly rigid if `pull` is.
    """
    region = ndimage.binary_dilation(fixed.mask, iterations=RIM_VOXELS)
    voxels = np.argwhere(region)
    points = fixed.affine @ np.vstack([voxels.T, np.ones(len(voxels))])
    fixed_bins = np.rint(rescale_percentiles(_smooth(fixed)[region]) * (BINS - 1)).astype(np.intp)
    values = _smooth(moving)
    low, high = np.percentile(values[moving.mask], [0.5, 99.5])
    to_voxels, centre = np.linalg.inv(moving.affine), fixed.centre()

    def moved(step: np.ndarray) -> np.ndarray:
        turn = rotation_about(centre, tuple(DEGREES_PER_STEP * step[:3]))
        return pull @ translation(step[3:]) @ turn

    def cost(step: np.ndarray) -> float:
        voxels = (to_voxels @ moved(step) @ points)[:3]
        sampled = ndimage.map_coordinates(values, voxels, order=1, mode="constant")
        level = np.clip((sampled - low) / (high - low), 0.0, 1.0) * (BINS - 1)
        below = np.floor(level).astype(np.intp)
        # A value between two bins is divided between them, which makes the cost continuous.
        upper = level - below
        cells = fixed_bins * BINS + below
        joint = np.bincount(cells, 1.0 - upper, BINS * BINS)
        joint += np.bincount(cells + (below < BINS - 1), upper, BINS * BINS)
        return -mutual_information(joint.reshape(BINS, BINS))

    result = optimize.minimize(
        cost, np.zeros(6), method="Powell", options={"xtol": PRECISION, "ftol": PRECISION * 1e-5}
    )
    return moved(result.x)


def _smooth(volume: Volume) -> np.ndarray:
    edges = np.linalg.norm(volume.affine[:3, :3], axis=0)
    return ndimage.gaussian_filter(volume.data.astype(np.float32), SMOOTHING_MM / edges)


def similarity(fixed: Volume, moving: Volume, pull: np.ndarray) -> float:
    """Compute the normalised mutual information of two volumes.

    (H(a) + H(b)) / H(a, b) - 1 over the union of the masks (over the fixed mask if the moving image has
    none): 0 for independent images, 1 for a one-to-one relation of the intensities. After Studholme et al.
    1999, doi:10.1016/S0031-3203(98)00091-0.

    Parameters
    ----------
    fixed, moving : Volume
        Images of any contrasts; all voxels of `fixed` are used if it has no mask.
    pull : numpy.ndarray, shape (4, 4)
        From points of `fixed` to points of `moving`.

    Returns
    -------
    float
        From 0 to 1.
    """
    shape = fixed.data.shape
    values = resample(moving.data, moving.affine, shape, fixed.affine, pull)
    region = np.ones(shape, dtype=bool) if fixed.mask is None else fixed.mask
    if moving.mask is not None:
        region = region | (resample(moving.mask, moving.affine, shape, fixed.affine, pull) > 0.5)
    levels = [rescale_percentiles(intensities[region]) for intensities in (fixed.data, values)]
    return mutual_information(np.histogram2d(*levels, bins=BINS)[0])


def mutual_information(joint: np.ndarray) -> float:
    """Compute normalised mutual information from a joint histogram; see :func:`similarity`.

    Parameters
    ----------
    joint : numpy.ndarray, shape (bins, bins)
        Joint histogram of two images.

    Returns
    -------
    float
        From 0 to 1; 0 if both images are constant.
    """
    p = joint / joint.sum()
    joint_entropy = _entropy(p)
    if joint_entropy == 0.0:
        return 0.0
    return float((_entropy(p.sum(axis=0)) + _entropy(p.sum(axis=1))) / joint_entropy - 1.0)


def _entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def rescale_percentiles(values: np.ndarray) -> np.ndarray:
    """Map the 0.5th to 99.5th percentile of values to 0 to 1, with clipping; constant values become 0."""
    low, high = np.percentile(values, [0.5, 99.5])
    if high <= low:
        return np.zeros(values.shape)
    return np.clip((values - low) / (high - low), 0.0, 1.0)


def local_correlation(fixed: Volume, moving: Volume, pull: np.ndarray) -> float:
    """Compute the median local correlation of two volumes, which is near 0 if one of them shows no brain.

    The median, over cubes of `CUBE` voxels inside both masks, of Pearson's correlation of the intensities.
    Aligned brains have gyri, fluid and nuclei at similar positions, so that the correlation has one sign in
    most cubes (negative between T1w and T2w), even with a tumour in some; with any other object its sign
    varies. The outermost `EDGE` voxels of the masks are left out, since all objects have dark edges.

    Parameters
    ----------
    fixed, moving : Volume
        `fixed` with its mask, on voxels of about 2 mm.
    pull : numpy.ndarray, shape (4, 4)
        From points of `fixed` to points of `moving`.

    Returns
    -------
    float
        From -1 to 1; 0 if no cube lies in the masks.
    """
    shape = fixed.data.shape
    region = fixed.mask & field_of_view(moving.data.shape, moving.affine, shape, fixed.affine, pull)
    if moving.mask is not None:
        region &= resample_mask(moving.mask, moving.affine, shape, fixed.affine, pull)
    region = ndimage.binary_erosion(region, iterations=EDGE)
    values = resample(moving.data, moving.affine, shape, fixed.affine, pull)[region].astype(np.float64)
    others = fixed.data[region].astype(np.float64)
    _, cube, counts = np.unique(np.argwhere(region) // CUBE, axis=0, return_inverse=True, return_counts=True)
    cube = cube.ravel()

    def mean(numbers: np.ndarray) -> np.ndarray:
        return np.bincount(cube, numbers) / counts

    covariance = mean(values * others) - mean(values) * mean(others)
    variances = (mean(values**2) - mean(values) ** 2) * (mean(others**2) - mean(others) ** 2)
    full = (counts >= CUBE**3 / 2) & (variances > 0)
    return float(np.median(covariance[full] / np.sqrt(variances[full]))) if full.any() else 0.0


def mask_overlap(fixed: Volume, moving: Volume, pull: np.ndarray) -> float:
    """Compute the Dice coefficient of the two masks on the fixed grid."""
    moved = resample(moving.mask, moving.affine, fixed.data.shape, fixed.affine, pull) > 0.5
    return dice(moved, fixed.mask)


def dice(one: np.ndarray, other: np.ndarray) -> float:
    """Compute the Dice coefficient of two masks (Dice 1945).

    Parameters
    ----------
    one, other : numpy.ndarray of bool, same shape
        Masks.

    Returns
    -------
    float
        From 0 to 1; 0 if both are empty.
    """
    total = int(one.sum()) + int(other.sum())
    return 2.0 * int((one & other).sum()) / total if total else 0.0


def mirror_ratio(one: Volume, other: Volume) -> float:
    """Compute the ratio of the similarities of two images of one brain with and without a left-right flip.

    Brains are asymmetric, each in its own way. On 3 mm voxels the ratio is 0.43 to 0.61 for seven pairs of
    T1w and T2w images of one participant, each registered to the atlas (five with gliomas), and at least 1.64
    if one image is flipped. For six pairs of images of different participants it is 0.86 to 1.14.

    Parameters
    ----------
    one, other : Volume
        Brains with their masks, registered to the same atlas. Both registrations are refined.

    Returns
    -------
    float
        Similarity with the mirror image, divided by the similarity with the image itself.
    """
    fixed = one.coarse(PAIR_SPACING).cropped(PAIR_MARGIN)
    moving = other.coarse(PAIR_SPACING).cropped(PAIR_MARGIN)
    scores = [
        similarity(brain, moving, refine_rigid(brain, moving, np.eye(4)))
        for brain in (mirror_image(fixed), fixed)
    ]
    return scores[0] / max(scores[1], 1e-6)


def mirror_image(brain: Volume) -> Volume:
    """Flip a brain left to right about the centre of its grid."""
    axis = int(np.argmax(np.abs(brain.affine[0, :3])))
    return Volume(np.flip(brain.data, axis), brain.affine, np.flip(brain.mask, axis))


def _mirrored_similarity(fixed: Volume, moving: Volume, pull: np.ndarray, folder: Path) -> float:
    """Register the mirror image of `fixed`, starting from `pull`, and return its similarity."""
    return round(register_best(mirror_image(fixed), moving, [pull], folder)[1], 4)
