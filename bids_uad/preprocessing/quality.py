"""Quality control of a preprocessed scan: coverage, image quality metrics, warnings, and failures.

A failed scan is excluded from benchmarks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from bids_uad.images import bounding_box
from bids_uad.preprocessing.brain_extraction.masks import BRAIN_VOLUME_RANGE_ML
from bids_uad.preprocessing.check import background
from bids_uad.preprocessing.registration import Volume, dice
from bids_uad.preprocessing.resampling import field_of_view, resample

LOW_OVERLAP, FAILED_OVERLAP = 0.80, 0.70
LOW_SIMILARITY, FAILED_SIMILARITY = 0.022, 0.016
LOW_COVERAGE, FAILED_COVERAGE = 0.85, 0.60
USUAL_VOLUME_RANGE_ML = (900.0, 1900.0)
REPORTED_OUTSIDE, FAILED_OUTSIDE = 0.02, 0.25
"""Fractions of the reference brain outside the field of view.

In four brains with a field of view cut at the top or the bottom, the registration moved by 0.6 to 1.6 mm
(mean over the brain) with 6 to 9 % outside, by 0.9 to 4.0 mm with 20 to 25 %, and by up to 4.9 mm beyond 30
%. Volumes and scores of a scan with less than three quarters of a brain are not comparable with others.
"""
MIN_LOCAL_CORRELATION = 0.07
"""Absolute local correlation below which a scan is refused, since it shows no brain.

With a T1w reference, phantoms (balls, cylinders, grids, rods) and a spine reach at most 0.06; T1w images of
healthy brains reach 0.36 to 0.53, of gliomas of 57 to 231 mL 0.22 to 0.39, and T2w images 0.26 to 0.52. The
largest of these gliomas has the lowest value, 0.09 in its T2w image.
"""
MAX_ROTATION_DEGREES = 60.0
MIRRORED, FAILED_MIRRORED = 1.05, 1.3
"""Ratio of the similarities of the mirror image and of the image itself.

Scans of one head differ by more than the second limit (0.03 and 0.14). With the atlas the ratio is 0.96 to
1.01 for correct images, and 1.07 to 1.15 in six that are probably flipped.
"""
MIN_LESION_IN_BRAIN = 0.5
"""Fraction of the lesion mask inside the brain below which a warning is given."""

TISSUES = {"T1w": ("csf", "gm", "wm"), "T2w": ("wm", "gm", "csf"), "FLAIR": ("csf", "wm", "gm")}
"""Tissues in ascending order of intensity."""
FITTED_VOXELS = 50_000
"""Voxels to which the tissue mixture is fitted."""
MIN_TISSUE_VOXELS = 10

MARGIN_SPACING_MM = 2.0
"""Margins of the field of view are searched on every voxel, or on every second, third, ... of finer grids."""
MIN_MARGIN_MM = 4.0
"""Depth of a margin: air and fluid also have single voxels with exactly the background's value."""
NO_SIGNAL_LEVEL = 0.04
"""Fraction of the brain's signal (75th percentile above the background) up to which a voxel may have none.

Fluid is brighter: 0.1 to 0.2 of it in T1w images.
"""
MAX_FLOOR = 0.06
"""Largest background, as a fraction of the brain's signal, that the limit is above."""
NO_SIGNAL_DEPTH_MM = 3.0
"""Depth of a region without signal; dark veins and bone at the edge of a brain mask are thinner."""
MIN_NO_SIGNAL_MM3 = 1000.0
MIN_NO_SIGNAL_CONTACT = 0.05
"""Fraction of a region's voxels at the edge of the brain mask: voids inside the brain are findings."""
REPORTED_UNSCORED = 0.01
"""Fraction of the brain mask that is not scored, from which it is reported."""
CUT_AREA = 1 / 3
"""Fraction of the largest cross-section from which the first slice of a skull-stripped brain is a cut.

At its natural end a brain tapers off: a slice 5 mm inside has at most a fifth.
"""


def assess_quality(
    registration: dict[str, Any],
    skull_stripped: bool,
    mask_origin: str,
    rotation: float,
    brain: np.ndarray,
    native_volume_mm3: float,
    reference: np.ndarray,
    covered: np.ndarray,
    unscored: float,
    lesion: np.ndarray | None,
    image: dict[str, float],
    warnings: Mapping[str, bool],
) -> dict[str, Any]:
    """Collect the quality metrics of one scan, and derive warnings and failures.

    Parameters
    ----------
    registration : dict
        ``similarity``, ``mirrored_similarity``, ``local_correlation``, ``mask_overlap`` and ``restarted`` of
        the registration; see :func:`.registration.register_to_reference`.
    skull_stripped : bool
        Whether the scan is skull-stripped.
    mask_origin : str
        Origin of the brain mask (``brain_mask_origin`` of `dataset.sidecars.QUALITY_COLUMNS`).
    rotation : float
        Rotation angle of the transform to the atlas, degrees.
    brain, reference : numpy.ndarray of bool, shape (240, 240, 155)
        Brain masks of the scan and of the reference image.
    native_volume_mm3 : float
        Volume of the brain mask in native space.
    covered : numpy.ndarray of bool, shape (240, 240, 155)
        Coverage mask of the scan, see :func:`coverage_mask`.
    unscored : float
        Fraction of the brain mask that the scan did not cover or where it has no signal.
    lesion : numpy.ndarray of bool or None
        Manual lesion mask on the same grid.
    image : dict
        Metrics of :func:`image_quality_metrics`.
    warnings : mapping of str to bool
        Further warnings, and whether the scan fails because of them.

    Returns
    -------
    dict
        ``similarity``, ``mirrored_similarity``, ``local_correlation``, ``registration_overlap``,
        ``restarted``, ``rotation_degrees``, ``skull_stripped``, ``brain_mask_origin``,
        ``outside_fov_fraction`` (of the reference brain), ``unscored_fraction``,
        ``mask_overlap`` (Dice of the brain with the reference brain), ``brain_volume_mm3`` (on the SRI24
        grid), ``native_brain_volume_mm3``,
        ``kept_fraction`` (fraction of the native brain volume in the SRI24 brain mask), the metrics of
        `image`, ``warnings`` (list of sentences), and ``failures`` (those for which the scan is excluded).
    """
    volume = float(brain.sum())
    overlap = dice(brain, reference)
    kept = volume / native_volume_mm3
    outside = float((reference & ~covered).sum() / reference.sum())
    checks = {
        f"The brain overlaps the reference brain by only {overlap:.2f} (Dice): check the registration.": (
            not overlap >= LOW_OVERLAP,
            not overlap >= FAILED_OVERLAP,
        ),
        f"The similarity of the scan and its registration target is only {registration['similarity']:.3f} "
        "(normalised mutual information): check the registration.": (
            not registration["similarity"] >= LOW_SIMILARITY,  # also where it is NaN
            not registration["similarity"] >= FAILED_SIMILARITY,
        ),
        f"The brain mask holds {volume / 1000:.0f} mL, unusual for an adult: check the brain mask.": (
            not _within(volume / 1000, USUAL_VOLUME_RANGE_ML),
            not _within(volume / 1000, BRAIN_VOLUME_RANGE_ML),
        ),
        f"{100 * unscored:.1f} % of the brain mask lie outside the field of view or have no signal; they are "
        "not scored.": (unscored >= REPORTED_UNSCORED, False),
        f"Only {100 * kept:.0f} % of the brain mask lies on the SRI24 grid and in the field of view, with "
        "signal.": (
            kept < LOW_COVERAGE,
            kept < FAILED_COVERAGE,
        ),
        f"{100 * outside:.0f} % of the reference brain lie outside the field of view and are not scored.": (
            outside > REPORTED_OUTSIDE,
            outside > FAILED_OUTSIDE,
        ),
        f"The registration rotated the head by {rotation:.0f} degrees: its header is probably wrong, and "
        "left and right may be swapped.": (rotation > MAX_ROTATION_DEGREES,) * 2,
        "The registration had to be restarted from rotated positions: check the orientation.": (
            registration["restarted"],
            False,
        ),
    }
    mirrored = (registration["mirrored_similarity"] or 0.0) / max(registration["similarity"], 1e-6)
    text = "The scan fits better with left and right swapped: check the orientation of the session's scans."
    checks[text] = (mirrored > MIRRORED, mirrored > FAILED_MIRRORED)
    if lesion is not None and lesion.any():
        inside = float((lesion & brain).sum() / lesion.sum())
        text = f"Only {100 * inside:.0f} % of the lesion mask lies in the brain: check that it fits the scan."
        checks[text] = (inside < MIN_LESION_IN_BRAIN, False)
    return {
        "similarity": registration["similarity"] if np.isfinite(registration["similarity"]) else None,
        "registration_overlap": registration["mask_overlap"],
        "mirrored_similarity": registration["mirrored_similarity"],
        "local_correlation": registration["local_correlation"],
        "restarted": registration["restarted"],
        "rotation_degrees": round(rotation, 1),
        "skull_stripped": skull_stripped,
        "brain_mask_origin": mask_origin,
        "outside_fov_fraction": round(outside, 4),
        "unscored_fraction": round(unscored, 5),
        "mask_overlap": round(overlap, 4),
        "brain_volume_mm3": volume,
        "native_brain_volume_mm3": round(native_volume_mm3, 1),
        "kept_fraction": round(kept, 4),
        **{name: round(value, 4) for name, value in image.items()},
        "warnings": [*warnings, *(text for text, (warned, _) in checks.items() if warned)],
        "failures": [
            *(text for text, failed in warnings.items() if failed),
            *(text for text, (_, failed) in checks.items() if failed),
        ],
    }


def _within(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= value <= limits[1]


@dataclass(frozen=True)
class TissueIntensities:
    """Intensities of three tissues, from which the metrics are computed.

    Attributes
    ----------
    csf, gm, wm : numpy.ndarray, one-dimensional
        Intensities of the voxels that are most likely cerebrospinal fluid, grey and white matter.
    fractions : dict
        Fraction of the brain by tissue.
    """

    csf: np.ndarray
    gm: np.ndarray
    wm: np.ndarray
    fractions: dict[str, float]


def tissue_intensities(values: np.ndarray, modality: str, seed: int = 0) -> TissueIntensities:
    """Segment three tissues by a Gaussian mixture of the intensities.

    Parameters
    ----------
    values : numpy.ndarray, one-dimensional
        Bias-corrected intensities in the brain.
    modality : {"T1w", "T2w", "FLAIR"}
        Contrast, which determines the order of the tissues.
    seed : int, default=0
        Seed of the random sample of voxels to which the mixture is fitted.

    Returns
    -------
    TissueIntensities
        Intensities between the 1st and 99th percentile, by tissue.
    """
    from sklearn.mixture import GaussianMixture  # slow to import, and used in worker processes alone

    values = np.asarray(values, dtype=np.float64)
    low, high = np.percentile(values, [1, 99])
    kept = values[(values >= low) & (values <= high)]
    rng = np.random.default_rng(seed)
    fitted = rng.choice(kept, min(len(kept), FITTED_VOXELS), replace=False)[:, None]
    start = np.percentile(fitted, [10, 50, 85])[:, None]
    mixture = GaussianMixture(3, means_init=start, random_state=seed, max_iter=200).fit(fitted)
    order = np.argsort(mixture.means_[:, 0])
    posterior = mixture.predict_proba(kept[:, None])[:, order]
    names = TISSUES[modality]
    likeliest = posterior.argmax(axis=1)
    tissues = {name: kept[likeliest == k] for k, name in enumerate(names)}
    fractions = {name: float(posterior[:, k].mean()) for k, name in enumerate(names)}
    return TissueIntensities(**tissues, fractions=fractions)


def snr(tissue: np.ndarray) -> float:
    """Compute the signal-to-noise ratio within a tissue: median over standard deviation."""
    return float(np.median(tissue) / np.std(tissue, ddof=1))


def cnr(wm: np.ndarray, gm: np.ndarray, air_std: float) -> float:
    """Compute the contrast-to-noise ratio (Magnotta and Friedman 2006).

    The difference of the medians of white and grey matter, divided by the square root of the sum of the
    variances of both and of the air.
    """
    noise = np.sqrt(air_std**2 + np.var(wm) + np.var(gm))
    return float(abs(np.median(wm) - np.median(gm)) / noise)


def cjv(wm: np.ndarray, gm: np.ndarray) -> float:
    """Compute the coefficient of joint variation (Ganzetti et al. 2016); higher is worse.

    The sum of the median absolute deviations of both tissues (scaled to standard deviations), divided by the
    difference of their medians.
    """
    from scipy.stats import median_abs_deviation

    deviation = median_abs_deviation(wm, scale="normal") + median_abs_deviation(gm, scale="normal")
    return float(deviation / abs(np.median(wm) - np.median(gm)))


def efc(image: np.ndarray) -> float:
    """Compute the entropy focus criterion (Atkinson et al. 1997), relative to that of a uniform image.

    Shannon entropy of the voxels' fractions of the root of the image's energy: 1 if all voxels are equal, 0
    if only one is not 0. Ghosting and blurring from motion increase it.
    """
    values = np.abs(np.asarray(image, dtype=np.float64)).ravel()
    fraction = values / np.sqrt(np.sum(values**2))
    fraction = fraction[fraction > 0]
    maximum = np.sqrt(values.size) * np.log(np.sqrt(values.size))
    return float(-(fraction * np.log(fraction)).sum() / maximum)


def wm2max(wm: np.ndarray, image: np.ndarray) -> float:
    """Compute the median of white matter over the 99.95th percentile of the image."""
    return float(np.median(wm) / np.percentile(image, 99.95))


def image_quality_metrics(
    image: np.ndarray, mask: np.ndarray, air: np.ndarray, modality: str
) -> dict[str, float]:
    """Compute the image quality metrics of a scan.

    Parameters
    ----------
    image : numpy.ndarray, three-dimensional
        Bias-corrected scan, whole head or skull-stripped.
    mask : numpy.ndarray of bool
        Brain mask.
    air : numpy.ndarray of bool
        Mask of the air around the head; empty for skull-stripped scans.
    modality : {"T1w", "T2w", "FLAIR"}
        Contrast.

    Returns
    -------
    dict
        ``snr_csf``, ``snr_gm``, ``snr_wm``, ``snr_total`` (their mean), ``cnr``, ``cjv``, ``efc``,
        ``wm2max``, ``icvs_csf``, ``icvs_gm`` and ``icvs_wm``; only ``efc`` if a tissue has fewer than 10
        voxels. A ratio is left out if its denominator is 0.
    """
    tissues = tissue_intensities(image[mask], modality)
    if min(len(tissues.csf), len(tissues.gm), len(tissues.wm)) < MIN_TISSUE_VOXELS:
        return {"efc": efc(image)}
    ratios = {f"snr_{name}": snr(getattr(tissues, name)) for name in TISSUES["T1w"]}
    measured = {
        **ratios,
        "snr_total": float(np.mean(list(ratios.values()))),
        "cnr": cnr(tissues.wm, tissues.gm, float(np.std(image[air])) if air.any() else 0.0),
        "cjv": cjv(tissues.wm, tissues.gm),
        "efc": efc(image),
        "wm2max": wm2max(tissues.wm, image),
        **{f"icvs_{name}": tissues.fractions[name] for name in TISSUES["T1w"]},
    }
    return {name: value for name, value in measured.items() if np.isfinite(value)}


def coverage_mask(
    scan: Volume, skull_stripped: bool, shape: tuple[int, int, int], affine: np.ndarray, pull: np.ndarray
) -> np.ndarray:
    """Mark the voxels of a grid for which a scan has data.

    Resampling by other software (to the grid of another image, or to 256 x 256 x 256 voxels) fills voxels
    outside the field of view with the value of the background. Such margins have no data.

    Parameters
    ----------
    scan : Volume
        Scan on its own grid, with its original intensities.
    skull_stripped : bool
        Whether the scan is skull-stripped. If so, only slices beyond an abrupt end of the brain are margins.
    shape : tuple of int
        Shape of the grid.
    affine : numpy.ndarray, shape (4, 4)
        Voxel-to-world of the grid.
    pull : numpy.ndarray, shape (4, 4)
        World matrix from points of the grid to points of the scan.

    Returns
    -------
    numpy.ndarray of bool, of `shape`
        True for voxels with data.
    """
    inside = field_of_view(scan.data.shape, scan.affine, shape, affine, pull)
    steps = np.maximum(MARGIN_SPACING_MM / np.linalg.norm(scan.affine[:3, :3], axis=0), 1).astype(int)
    empty = scan.data[:: steps[0], :: steps[1], :: steps[2]] == background(scan.data)
    thinned = scan.affine @ np.diag([*steps, 1.0])
    margin = (
        _beyond_cuts(empty)
        if skull_stripped
        else _deep_margin(empty, np.linalg.norm(thinned[:3, :3], axis=0))
    )
    if not margin.any():
        return inside
    return inside & (resample(margin, thinned, shape, affine, pull, order=0, extend=True) < 0.5)


def no_signal_mask(scan: Volume) -> np.ndarray:
    """Mark the regions of the brain mask in which a scan has no signal.

    Such regions are parts that the acquisition did not cover but that later processing filled with values
    near the background, and signal voids at the base of the brain. They have the intensity of the background,
    are deep and large, and reach the edge of the brain mask, unlike cavities and haemorrhages inside the
    brain, fluid that a FLAIR sequence suppresses, and dark voxels at the edge of the mask.

    Parameters
    ----------
    scan : Volume
        Scan on its own grid with its brain mask, any contrast, with its original intensities.

    Returns
    -------
    numpy.ndarray of bool, shape of the scan
        True for voxels without signal, all of them in the brain mask.
    """
    found = np.zeros(scan.data.shape, dtype=bool)
    level = float(np.percentile(scan.data[scan.mask], 75))
    # Air, noise included; skull-stripped scans have a constant there.
    air = scan.data.ravel()[::7][~scan.mask.ravel()[::7]]
    air = air[air < 0.1 * level]
    floor = float(np.clip(np.median(air), 0.0, MAX_FLOOR * level)) if air.size and level > 0 else 0.0
    limit = floor + NO_SIGNAL_LEVEL * (level - floor)
    zooms = np.linalg.norm(scan.affine[:3, :3], axis=0)
    voxel = float(np.prod(zooms))
    if level <= 0 or np.count_nonzero(scan.data[scan.mask] <= limit) * voxel < MIN_NO_SIGNAL_MM3 / 2:
        return found
    margin = np.ceil(2 * NO_SIGNAL_DEPTH_MM / zooms).astype(int) + 1
    box = bounding_box(scan.mask, margin)
    data, brain = scan.data[box], scan.mask[box]
    # A mean over neighbours, since single voxels of noise exceed the limit.
    dark = ndimage.uniform_filter(data, 3, mode="nearest") <= limit
    core = ndimage.distance_transform_edt(dark, sampling=zooms) > NO_SIGNAL_DEPTH_MM
    if not (core & brain).any():
        return found
    reach = NO_SIGNAL_DEPTH_MM + 2 * zooms.max()  # the mean is brighter up to one voxel from tissue
    near = ndimage.distance_transform_edt(~core, sampling=zooms) <= reach
    labels, count = ndimage.label(near & brain & (data <= 2 * limit - floor))
    edge = brain & ~ndimage.binary_erosion(brain)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    at_edge = np.bincount(labels[edge], minlength=count + 1)
    inside = np.bincount(labels[core & brain], minlength=count + 1)
    kept = (sizes * voxel >= MIN_NO_SIGNAL_MM3) & (at_edge >= MIN_NO_SIGNAL_CONTACT * sizes) & (inside > 0)
    kept[0] = False
    found[box] = kept[labels]
    return found


def _beyond_cuts(empty: np.ndarray) -> np.ndarray:
    """Mark the empty slices beyond an abrupt end of the brain, along each axis."""
    margin = np.zeros_like(empty)
    for axis in range(3):
        area = np.count_nonzero(~empty, axis=tuple(other for other in range(3) if other != axis))
        filled = np.flatnonzero(area)
        if not filled.size:
            return np.zeros_like(empty)
        slices = np.moveaxis(margin, axis, 0)
        if area[filled[0]] >= CUT_AREA * area.max():
            slices[: filled[0]] = True
        if area[filled[-1]] >= CUT_AREA * area.max():
            slices[filled[-1] + 1 :] = True
    return margin


def _deep_margin(empty: np.ndarray, zooms: np.ndarray) -> np.ndarray:
    """Keep the regions of empty voxels that are deep and reach the border of the grid."""
    # Voxels outside the grid count as empty, so that a single thick slice at the border is deep enough.
    wide = np.pad(empty, 1, constant_values=True)
    core = ndimage.distance_transform_edt(wide, sampling=zooms) > MIN_MARGIN_MM
    labels, _ = ndimage.label(core | np.pad(np.zeros_like(empty), 1, constant_values=True))
    core = labels == labels[0, 0, 0]
    near = ndimage.distance_transform_edt(~core, sampling=zooms) <= MIN_MARGIN_MM
    inner = (slice(1, -1),) * 3
    return (near & wide)[inner]
