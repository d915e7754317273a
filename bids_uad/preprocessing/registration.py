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
"""Voxel edge (mm) at which registrations are refined and compared: 0.1 mm from the result at 1 mm."""
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
COARSE_STAGES, FINE_STAGES = ((8.0, 1), (4.0, 1)), ((3.0, 2), (2.0, 1))
"""Stages of `register_rigid` on 4 mm and on 2 mm voxels: standard deviation of the Gaussian (mm), which
removes local maxima, and interval of the sampled voxels."""
RIM_VOXELS = 3
"""Width of the band around the mask that a registration includes, for the outline of the brain."""
DEGREES_PER_STEP = 1.0
"""Rotation that moves the surface of a brain by about as much as a shift of 1 mm."""
PRECISION = 0.01
"""Half the interval of the central differences of a transform, mm and degrees."""
SAME_HEAD_STAGES = (*FINE_STAGES, (1.0, 1))
"""Stages for two scans of one participant, whose edges agree in detail."""
COARSE_SPACING = 4.0
"""Voxel edge (mm) of the first stages, which bring two brains within 2 mm of each other."""
MIN_GAIN = 1e-7
"""Increase of the information at which a stage ends."""
FLAIR_CEILING = 15.0
"""Percentile of the intensities of a FLAIR brain that separates fluid from tissue."""


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
    reference: Volume, brain: Volume, *, asymmetric: bool = False, dark_fluid: bool = False
) -> tuple[np.ndarray, dict[str, Any]]:
    """Register a brain rigidly to the reference image.

    The registration starts with aligned centres of mass on 4 mm voxels, and is refined on 2 mm voxels. If
    similarity or mask overlap are low afterwards (head tilted far back, wrong orientation in the header), the
    best rotations of a coarse grid are tried as well, and the most similar result is kept.

    Parameters
    ----------
    reference, brain : Volume
        Skull-stripped images with masks, 0 outside them.
    asymmetric : bool, default=False
        Whether the reference is left-right asymmetric. If so, its mirror image is registered as well.
    dark_fluid : bool, default=False
        Whether the brain is a FLAIR scan, which is registered after :func:`equalise_tissue`, and then refined
        as it is.

    Returns
    -------
    pull : numpy.ndarray, shape (4, 4)
        From reference points to scan points.
    qc : dict
        ``similarity``, ``mirrored_similarity`` (None for a symmetric reference), ``local_correlation``,
        ``mask_overlap``, ``restarted``.
    """
    fixed, plain = _coarse_brain(reference), _coarse_brain(brain)
    moving = equalise_tissue(plain, plain.mask) if dark_fluid else plain
    pull, score = _register_in_two_steps(fixed, moving, [centred_start(fixed, moving)])
    restarted = mask_overlap(fixed, moving, pull) < RESTART_OVERLAP or score < RESTART_SIMILARITY
    if restarted:
        other, other_score = _register_in_two_steps(fixed, moving, rotated_starts(fixed, moving, RESTARTS))
        if other_score > score:
            pull = other
    if dark_fluid:
        # Closer to the transform of the T1w scan (a glioma: 1.4 instead of 2.0 mm), once it is near.
        pull = refine_rigid(fixed, plain, pull)
    mirrored = _mirrored_similarity(fixed, moving, pull, refined=True) if asymmetric else None
    flair = plain if dark_fluid else None
    return pull, _metrics(fixed, moving, pull, mirrored, restarted=restarted, flair=flair)


def equalise_tissue(scan: Volume, brain: np.ndarray) -> Volume:
    """Clip the intensities of a FLAIR scan so that all tissue is equal and fluid is darker.

    T1w images have the opposite contrast of grey and white matter and the same of fluid and tissue, so that
    positive and negative correlations cancel. In two gliomas, the similarity with the aligned T1w reference
    rises from 0.030 to 0.037 and from 0.018 to 0.029 (T2w reference: 0.025 to 0.032, and 0.023 to 0.031).

    Parameters
    ----------
    scan : Volume
        FLAIR scan, skull-stripped or whole head.
    brain : numpy.ndarray of bool
        Brain mask on its grid.

    Returns
    -------
    Volume
        Intensities of at most the `FLAIR_CEILING` percentile of the brain.
    """
    if not brain.any():
        return scan
    return Volume(
        np.minimum(scan.data, np.percentile(scan.data[brain], FLAIR_CEILING)), scan.affine, scan.mask
    )


def register_to_anchor(
    anchor: Volume, scan: Volume, *, dark_fluid: bool = False
) -> tuple[np.ndarray, dict[str, Any]]:
    """Register a T2w or FLAIR scan rigidly to the brain of its T1w scan.

    The metric is evaluated inside the anchor's brain only, so the scan may be a whole head, and may cover
    a part of the brain. The registration starts from the scanner coordinates, which one session shares, and
    from aligned centres; the more similar result is kept. The mirror image of the anchor is registered as
    well: two scans of one head are more similar than a scan and a mirror image, unless left and right are
    swapped in one of them.

    Parameters
    ----------
    anchor : Volume
        Skull-stripped T1w scan with its brain mask.
    scan : Volume
        T2w or FLAIR scan; with its brain mask if it is skull-stripped.
    dark_fluid : bool, default=False
        Whether it is a FLAIR scan.

    Returns
    -------
    pull : numpy.ndarray, shape (4, 4)
        From anchor points to scan points.
    qc : dict
        ``similarity``, ``mirrored_similarity``, ``local_correlation``, ``mask_overlap`` (None for a whole
        head), ``restarted``.
    """
    fixed, moving = _coarse_brain(anchor), scan.coarse()
    pull = _coregister(fixed, moving)
    mirrored = _mirrored_similarity(fixed, moving, pull, refined=False)
    return pull, _metrics(fixed, moving, pull, mirrored, flair=moving if dark_fluid else None)


def coregister(anchor: Volume, scan: Volume) -> np.ndarray:
    """Register a scan as :func:`register_to_anchor` does, without quality metrics.

    Parameters
    ----------
    anchor, scan
        As for :func:`register_to_anchor`.

    Returns
    -------
    numpy.ndarray, shape (4, 4)
        Pull matrix from anchor points to scan points.
    """
    return _coregister(_coarse_brain(anchor), scan.coarse())


def _coregister(fixed: Volume, moving: Volume) -> np.ndarray:
    starts = [np.eye(4), centred_start(fixed, moving)]
    apart = float(np.linalg.norm(starts[1][:3, 3]))
    starts = starts if apart > COARSE_SPACING else starts[:1]
    return _register_in_two_steps(fixed, moving, starts, SAME_HEAD_STAGES)[0]


def _register_in_two_steps(
    fixed: Volume,
    moving: Volume,
    starts: Sequence[np.ndarray],
    stages: Sequence[tuple[float, int]] = FINE_STAGES,
) -> tuple[np.ndarray, float]:
    """Register on 4 mm voxels from several starts, refine the most similar result, and measure it."""
    near, far = (volume.coarse(COARSE_SPACING) for volume in (fixed, moving))
    results = [refine_rigid(near, far, start, COARSE_STAGES) for start in starts]
    best = max(results, key=lambda pull: similarity(near, far, pull))
    pull = refine_rigid(fixed, moving, best, stages)
    return pull, similarity(fixed, moving, pull)


def registration_metrics(
    fixed: Volume, moving: Volume, pull: np.ndarray, *, mirrored: bool = False, dark_fluid: bool = False
) -> dict[str, Any]:
    """Compute the quality metrics of an existing transform.

    Parameters
    ----------
    fixed, moving : Volume
        `fixed` with its mask.
    pull : numpy.ndarray, shape (4, 4)
        From points of `fixed` to points of `moving`.
    mirrored : bool, default=False
        Whether to register the mirror image of `fixed`, too.
    dark_fluid : bool, default=False
        Whether `moving` is a FLAIR scan.

    Returns
    -------
    dict
        As of :func:`register_to_anchor`; ``mirrored_similarity`` is None unless `mirrored`.
    """
    fixed, moving = _coarse_brain(fixed), moving.coarse()
    score = _mirrored_similarity(fixed, moving, pull, refined=False) if mirrored else None
    return _metrics(fixed, moving, pull, score, flair=moving if dark_fluid else None)


def _metrics(
    fixed: Volume,
    moving: Volume,
    pull: np.ndarray,
    mirrored: float | None,
    *,
    restarted: bool = False,
    flair: Volume | None = None,
) -> dict[str, Any]:
    """Return the metrics of a registration; `flair` is the unclipped scan if `moving` is a FLAIR scan."""
    overlap = None if moving.mask is None else round(mask_overlap(fixed, moving, pull), 4)
    return {
        "similarity": round(similarity(fixed, moving, pull), 4),
        "mirrored_similarity": mirrored,
        "local_correlation": round(
            local_correlation(fixed, moving, pull)
            if flair is None
            else _local_correlation_of_flair(fixed, flair, pull),
            4,
        ),
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


def refine_rigid(
    fixed: Volume,
    moving: Volume,
    pull: np.ndarray,
    stages: Sequence[tuple[float, int]] = FINE_STAGES,
) -> np.ndarray:
    """Refine a rigid transform to the nearest maximum of normalised mutual information.

    L-BFGS follows the gradient (Thévenaz and Unser 2000, doi:10.1109/83.887976), first on strongly smoothed
    images. Intensities are sampled at positions that are shifted at random within their voxels, since a
    regular grid makes local maxima where it coincides with that of the other image (Tsao 2003,
    doi:10.1109/TMI.2003.815077). ANTs, which samples other voxels in each iteration, takes four times as long
    on the same voxels, and stops up to some millimetres from the maximum.

    Parameters
    ----------
    fixed, moving : Volume
        Images on voxels of about 2 mm; `fixed` is skull-stripped with its mask. `moving` is skull-stripped
        with its mask, or a whole head, of which the brain inside the mask of `fixed` is used.
    pull : numpy.ndarray, shape (4, 4)
        Initial pull matrix.
    stages : sequence of (float, int), default=FINE_STAGES
        Standard deviation of the Gaussian in mm, and interval of the sampled voxels, of each stage.

    Returns
    -------
    numpy.ndarray, shape (4, 4)
        Refined pull matrix, exactly rigid if `pull` is.
    """
    for smoothing, interval in stages:
        pull = _climb(fixed, moving, pull, smoothing, interval)
    return pull


def _climb(fixed: Volume, moving: Volume, pull: np.ndarray, smoothing: float, interval: int) -> np.ndarray:
    """Follow the gradient of the information of two smoothed images; see :func:`refine_rigid`."""
    stripped = moving.mask is not None
    region = ndimage.binary_dilation(fixed.mask, iterations=RIM_VOXELS) if stripped else fixed.mask
    voxels = np.argwhere(region)[::interval].T
    voxels = voxels + np.random.default_rng(0).uniform(-0.5, 0.5, voxels.shape)
    points = fixed.affine @ np.vstack([voxels, np.ones(voxels.shape[1])])
    values, to_voxels, centre = _smooth(moving, smoothing), np.linalg.inv(moving.affine), fixed.centre()
    tissue = values[moving.mask] if stripped else values
    if not stripped:
        last = np.array(values.shape)[:, None] - 1
        start = (to_voxels @ pull @ points)[:3]
        inside = ((start >= 0) & (start <= last)).all(axis=0)
        voxels, points = voxels[:, inside], points[:, inside]
        tissue = ndimage.map_coordinates(values, start[:, inside], order=1)
    if not tissue.size:
        return pull
    low, high = np.percentile(tissue, [0.5, 99.5])
    scale = (BINS - 1) / max(float(high - low), np.finfo(np.float32).tiny)
    own = ndimage.map_coordinates(_smooth(fixed, smoothing), voxels, order=1, mode="nearest")
    fixed_bins = np.rint(rescale_percentiles(own) * (BINS - 1)).astype(np.intp)
    slopes = np.gradient(values)

    def matrix(step: np.ndarray) -> np.ndarray:
        turn = rotation_about(centre, tuple(DEGREES_PER_STEP * step[:3]))
        return pull @ translation(step[3:]) @ turn

    def cost(step: np.ndarray) -> tuple[float, np.ndarray]:
        positions = (to_voxels @ matrix(step) @ points)[:3]
        level = (ndimage.map_coordinates(values, positions, order=1, mode="constant") - low) * scale
        # A value between two bins is divided between them, which makes the cost continuous.
        below = np.clip(level.astype(np.intp), 0, BINS - 2)
        upper = np.clip(level - below, 0.0, 1.0)
        cells = fixed_bins * BINS + below
        joint = np.bincount(cells, 1.0 - upper, BINS * BINS)
        joint += np.bincount(cells + 1, upper, BINS * BINS)
        information, slope = _information_slope(joint.reshape(BINS, BINS) / len(cells))
        # Change of the information per change of each sampled value, and by position along with it.
        weights = np.diff(slope, axis=1, append=0.0).ravel()[cells] * (scale / len(cells))
        used = np.flatnonzero((level > 0) & (level < BINS - 1))
        pulls = [
            ndimage.map_coordinates(part, positions[:, used], order=1, mode="constant") for part in slopes
        ]
        moments = np.stack(pulls) * weights[used] @ points[:, used].T
        changes = [
            to_voxels @ (matrix(step + unit) - matrix(step - unit)) / (2 * PRECISION)
            for unit in PRECISION * np.eye(6)
        ]
        return -information, -np.array([np.sum(moments * change[:3]) for change in changes])

    options = {"ftol": MIN_GAIN}
    return matrix(optimize.minimize(cost, np.zeros(6), jac=True, method="L-BFGS-B", options=options).x)


def _information_slope(p: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the normalised mutual information of a joint distribution, and its derivative by each cell.

    The distribution of the first image is taken as constant.
    """
    tiny = np.finfo(float).tiny
    log, log_other = np.log(np.maximum(p, tiny)), np.log(np.maximum(p.sum(axis=0), tiny))
    joint = -float((p * log).sum())
    if joint == 0.0:
        return 0.0, np.zeros_like(p)
    entropies = _entropy(p.sum(axis=1)) + _entropy(p.sum(axis=0))
    slope = (entropies / joint * (log + 1.0) - (log_other + 1.0)) / joint
    return entropies / joint - 1.0, slope


def _smooth(volume: Volume, smoothing: float) -> np.ndarray:
    edges = np.linalg.norm(volume.affine[:3, :3], axis=0)
    return ndimage.gaussian_filter(volume.data.astype(np.float32), smoothing / edges)


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


def _local_correlation_of_flair(fixed: Volume, moving: Volume, pull: np.ndarray) -> float:
    """Return the local correlation of a FLAIR scan or, if stronger, that of its fluid alone.

    With the T1w reference, the stronger is 0.10 to 0.21 for two gliomas and a participant with multiple
    sclerosis, and 0.03 to 0.07 if these scans are rotated by 20 degrees; with the own T1w it is 0.26 to 0.48.
    Each alone is near 0 in one of the scans.
    """
    brain = moving.mask
    if brain is None:
        back = np.linalg.inv(pull)
        brain = resample_mask(fixed.mask, fixed.affine, moving.data.shape, moving.affine, back)
    scans = (moving, equalise_tissue(moving, brain))
    return max((local_correlation(fixed, scan, pull) for scan in scans), key=abs)


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


def _mirrored_similarity(fixed: Volume, moving: Volume, pull: np.ndarray, *, refined: bool) -> float:
    """Register the mirror image of `fixed`, starting from `pull`, and return its similarity.

    With an atlas the similarities of both sides are close, and only refined ones can be compared; two scans
    of one head with swapped sides are several times more similar with the mirror image, also unrefined.
    """
    mirrored = mirror_image(fixed)
    if refined:
        return round(_register_in_two_steps(mirrored, moving, [pull])[1], 4)
    near, far = (volume.coarse(COARSE_SPACING) for volume in (mirrored, moving))
    return round(similarity(mirrored, moving, refine_rigid(near, far, pull, COARSE_STAGES)), 4)
