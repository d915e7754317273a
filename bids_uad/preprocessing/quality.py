"""Quality figures of a preprocessed scan, what a person should be told about them, and what rules it out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage
from scipy.stats import median_abs_deviation
from sklearn.mixture import GaussianMixture

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

In four brains that were cut at the top or the bottom, the registration moved by 0.6 to 1.6 mm (mean over the
brain) where 6 to 9 % were cut, by 0.9 to 4.0 mm where 20 to 25 % were, and by up to 4.9 mm beyond 30 %.
Volumes and scores of a scan with less than three quarters of a brain are not comparable with others.
"""
LEAST_LOCAL_CORRELATION = 0.07
"""Size of the local correlation below which a scan is refused, since it shows no brain.

With a T1w reference, phantoms (balls, cylinders, grids, rods) and a spine reach 0.06 at most; T1w images of
healthy brains reach 0.36 to 0.53, of gliomas of 57 to 231 mL 0.22 to 0.39, and T2w images 0.26 to 0.52. The
largest of these gliomas has the lowest value of all, 0.09 in its T2w image.
"""
LARGE_ROTATION = 60.0
MIRRORED, SURELY_MIRRORED = 1.05, 1.3
"""How much better a mirror image fits. Scans of one head differ by more than the latter (0.03 against 0.14),
brains and atlas hardly: 0.96 to 1.01 as they are, 1.07 to 1.15 in six that are most likely mirrored."""
LOW_LESION_SHARE = 0.5


def assess_quality(
    registration: dict[str, Any],
    skull_stripped: bool,
    mask_origin: str,
    rotation: float,
    brain: np.ndarray,
    native_volume_mm3: float,
    reference: np.ndarray,
    covered: np.ndarray,
    lesion: np.ndarray | None,
    image: dict[str, float],
    warnings: Mapping[str, bool],
) -> dict[str, Any]:
    """Collect the figures of one scan and judge them.

    Parameters
    ----------
    registration : dict
        ``similarity``, ``mirrored_similarity``, ``local_correlation``, ``mask_overlap`` and ``restarted`` of
        the registration.
    skull_stripped : bool
    mask_origin : str
        Where the brain mask comes from (``brain_mask_origin`` of `dataset.sidecars.QUALITY_COLUMNS`).
    rotation : float
        Degrees by which the scan was turned to lie on the atlas.
    brain, reference : numpy.ndarray of bool, shape (240, 240, 155)
        Brain masks of the scan and of the reference image.
    native_volume_mm3 : float
        Volume of the brain mask in native space.
    covered : numpy.ndarray of bool
        Voxels of the same grid that the scan has data for.
    lesion : numpy.ndarray of bool or None
        Manual lesion mask on the same grid.
    image : dict
        Metrics of :func:`bids_uad.preprocessing.quality.image_quality_metrics`.
    warnings : mapping of str to bool
        Further sentences, and whether the scan fails by them.

    Returns
    -------
    dict
        ``similarity``, ``mirrored_similarity``, ``local_correlation``, ``registration_overlap``,
        ``restarted``, ``rotation_degrees``, ``skull_stripped``, ``brain_mask_origin``,
        ``outside_fov_fraction`` (of the reference brain), ``mask_overlap`` (Dice of the brain with the
        reference brain),
        ``brain_volume_mm3`` (on the SRI24 grid), ``native_brain_volume_mm3``, ``kept_share`` (of the native
        brain volume on the SRI24 grid), the metrics of `image`; ``warnings``, a list of sentences, and
        ``failures``, those of them for which the scan is to be left out of a benchmark.
    """
    volume = float(brain.sum())
    overlap = dice(brain, reference)
    kept = volume / native_volume_mm3
    outside = float((reference & ~covered).sum() / reference.sum())
    judged = {
        f"The brain overlaps the reference brain by only {overlap:.2f} (Dice): check the registration.": (
            not overlap >= LOW_OVERLAP,
            not overlap >= FAILED_OVERLAP,
        ),
        f"The scan resembles what it was registered to by only {registration['similarity']:.3f} (normalised "
        "mutual information): check the registration.": (
            not registration["similarity"] >= LOW_SIMILARITY,  # also where it is NaN
            not registration["similarity"] >= FAILED_SIMILARITY,
        ),
        f"The brain mask holds {volume / 1000:.0f} mL, unusual for an adult: check the brain mask.": (
            not _within(volume / 1000, USUAL_VOLUME_RANGE_ML),
            not _within(volume / 1000, BRAIN_VOLUME_RANGE_ML),
        ),
        f"Only {100 * kept:.0f} % of the brain mask lies on the SRI24 grid and in the field of view.": (
            kept < LOW_COVERAGE,
            kept < FAILED_COVERAGE,
        ),
        f"{100 * outside:.0f} % of the reference brain lie outside the field of view and are not scored.": (
            outside > REPORTED_OUTSIDE,
            outside > FAILED_OUTSIDE,
        ),
        f"The head was turned by {rotation:.0f} degrees to lie on the atlas: its header is most likely "
        "wrong, and left and right may be swapped.": (rotation > LARGE_ROTATION,) * 2,
        "The registration had to be restarted from rotated positions: check the orientation.": (
            registration["restarted"],
            False,
        ),
    }
    mirrored = (registration["mirrored_similarity"] or 0.0) / max(registration["similarity"], 1e-6)
    text = "The scan fits better with left and right swapped: check the orientation of the session's scans."
    judged[text] = (mirrored > MIRRORED, mirrored > SURELY_MIRRORED)
    if lesion is not None and lesion.any():
        share = float((lesion & brain).sum() / lesion.sum())
        text = f"Only {100 * share:.0f} % of the lesion mask lies in the brain: check that it fits the scan."
        judged[text] = (share < LOW_LESION_SHARE, False)
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
        "mask_overlap": round(overlap, 4),
        "brain_volume_mm3": volume,
        "native_brain_volume_mm3": round(native_volume_mm3, 1),
        "kept_share": round(kept, 4),
        **{name: round(value, 4) for name, value in image.items()},
        "warnings": [*warnings, *(text for text, (doubtful, _) in judged.items() if doubtful)],
        "failures": [
            *(text for text, grave in warnings.items() if grave),
            *(text for text, (_, failed) in judged.items() if failed),
        ],
    }


def _within(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= value <= limits[1]


TISSUES = {"T1w": ("csf", "gm", "wm"), "T2w": ("wm", "gm", "csf")}
"""From dark to bright."""
FITTED_VOXELS = 50_000
FEWEST_VOXELS = 10
"""Of a tissue; with fewer there is none to speak of."""


@dataclass(frozen=True)
class TissueIntensities:
    """What the metrics are computed from.

    Attributes
    ----------
    csf, gm, wm : numpy.ndarray, one-dimensional
        Intensities of the voxels that are most likely cerebrospinal fluid, grey and white matter.
    shares : dict
        Share of each tissue in the brain.
    """

    csf: np.ndarray
    gm: np.ndarray
    wm: np.ndarray
    shares: dict[str, float]


def tissue_intensities(values: np.ndarray, modality: str, seed: int = 0) -> TissueIntensities:
    """Tell three tissues apart by intensity.

    Parameters
    ----------
    values : numpy.ndarray, one-dimensional
        Bias-corrected intensities in the brain.
    modality : {"T1w", "T2w"}
        Says which tissue is dark and which is bright.
    seed : int
        Of the voxels that the mixture is fitted to.

    Returns
    -------
    TissueIntensities
    """
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
    shares = {name: float(posterior[:, k].mean()) for k, name in enumerate(names)}
    return TissueIntensities(**tissues, shares=shares)


def snr(tissue: np.ndarray) -> float:
    """Signal-to-noise ratio within a tissue: median over standard deviation."""
    return float(np.median(tissue) / np.std(tissue, ddof=1))


def cnr(wm: np.ndarray, gm: np.ndarray, air_std: float) -> float:
    """Contrast-to-noise ratio (Magnotta and Friedman 2006).

    Difference of the medians of white and grey matter over the noise of both and of the air.
    """
    noise = np.sqrt(air_std**2 + np.var(wm) + np.var(gm))
    return float(abs(np.median(wm) - np.median(gm)) / noise)


def cjv(wm: np.ndarray, gm: np.ndarray) -> float:
    """Coefficient of joint variation (Ganzetti et al. 2016): spread of both tissues over their contrast.

    Medians, and median absolute deviations scaled to standard deviations; higher is worse.
    """
    spread = median_abs_deviation(wm, scale="normal") + median_abs_deviation(gm, scale="normal")
    return float(spread / abs(np.median(wm) - np.median(gm)))


def efc(image: np.ndarray) -> float:
    """Entropy focus criterion (Atkinson et al. 1997), relative to that of a uniform image.

    Shannon entropy of the voxels' shares in the energy of the image: 1 if all are alike, 0 if one voxel has
    it all. Ghosts and blur from motion raise it.
    """
    values = np.abs(np.asarray(image, dtype=np.float64)).ravel()
    share = values / np.sqrt(np.sum(values**2))
    share = share[share > 0]
    largest = np.sqrt(values.size) * np.log(np.sqrt(values.size))
    return float(-(share * np.log(share)).sum() / largest)


def wm2max(wm: np.ndarray, image: np.ndarray) -> float:
    """Median of white matter over the 99.95th percentile of the image."""
    return float(np.median(wm) / np.percentile(image, 99.95))


def image_quality_metrics(
    image: np.ndarray, mask: np.ndarray, air: np.ndarray, modality: str
) -> dict[str, float]:
    """Compute all metrics of a scan.

    Parameters
    ----------
    image : numpy.ndarray, three-dimensional
        Bias-corrected, whole head or brain.
    mask, air : numpy.ndarray of bool
        Brain, and the air around the head; the latter is empty in skull-stripped scans.
    modality : {"T1w", "T2w"}

    Returns
    -------
    dict
        ``snr_csf``, ``snr_gm``, ``snr_wm``, ``snr_total`` (their mean), ``cnr``, ``cjv``, ``efc``,
        ``wm2max``, ``icvs_csf``, ``icvs_gm`` and ``icvs_wm``; ``efc`` alone if no three tissues can be told
        apart. A ratio is left out where its denominator is 0.
    """
    tissues = tissue_intensities(image[mask], modality)
    if min(len(tissues.csf), len(tissues.gm), len(tissues.wm)) < FEWEST_VOXELS:
        return {"efc": efc(image)}
    ratios = {f"snr_{name}": snr(getattr(tissues, name)) for name in TISSUES["T1w"]}
    measured = {
        **ratios,
        "snr_total": float(np.mean(list(ratios.values()))),
        "cnr": cnr(tissues.wm, tissues.gm, float(np.std(image[air])) if air.any() else 0.0),
        "cjv": cjv(tissues.wm, tissues.gm),
        "efc": efc(image),
        "wm2max": wm2max(tissues.wm, image),
        **{f"icvs_{name}": tissues.shares[name] for name in TISSUES["T1w"]},
    }
    return {name: value for name, value in measured.items() if np.isfinite(value)}


SPACING = 2.0
"""mm; margins are looked for on every voxel, or on every second, third, ... of finer grids."""
LEAST_MARGIN_MM = 4.0
"""Depth of a margin. Air and fluid have single voxels of exactly the background's value, too."""
ABRUPT = 1 / 3
"""Share of the largest cross-section from which the first slice of a skull-stripped brain is a cut.

A brain tapers off: a slice that touches it by 5 mm shows at most a fifth.
"""


def coverage_mask(
    scan: Volume, stripped: bool, shape: tuple[int, int, int], affine: np.ndarray, pull: np.ndarray
):
    """Find the voxels of a grid that a scan has data for.

    Resampling (to the grid of another image, or to 256 x 256 x 256 voxels) fills what lies outside the field
    of view with the value of the background. Such margins are no data.

    Parameters
    ----------
    scan : Volume
        On its own grid, with the intensities it came with.
    stripped : bool
        Whether the scan is skull-stripped. Then only slices beyond an abrupt end of the brain are margins.
    shape : tuple of int
        Shape of the grid.
    affine : numpy.ndarray, shape (4, 4)
        Its voxel-to-world.
    pull : numpy.ndarray, shape (4, 4)
        World matrix from points of the grid to points of the scan.

    Returns
    -------
    numpy.ndarray of bool, of `shape`
    """
    inside = field_of_view(scan.data.shape, scan.affine, shape, affine, pull)
    steps = np.maximum(SPACING / np.linalg.norm(scan.affine[:3, :3], axis=0), 1).astype(int)
    empty = scan.data[:: steps[0], :: steps[1], :: steps[2]] == background(scan.data)
    thinned = scan.affine @ np.diag([*steps, 1.0])
    margin = _beyond_cuts(empty) if stripped else _deep_margin(empty, np.linalg.norm(thinned[:3, :3], axis=0))
    if not margin.any():
        return inside
    return inside & (resample(margin, thinned, shape, affine, pull, order=0, extend=True) < 0.5)


def _beyond_cuts(empty: np.ndarray) -> np.ndarray:
    """Mark the empty slices at the ends of the three axes, where the brain ends abruptly."""
    margin = np.zeros_like(empty)
    for axis in range(3):
        area = np.count_nonzero(~empty, axis=tuple(other for other in range(3) if other != axis))
        filled = np.flatnonzero(area)
        if not filled.size:
            return np.zeros_like(empty)
        slices = np.moveaxis(margin, axis, 0)
        if area[filled[0]] >= ABRUPT * area.max():
            slices[: filled[0]] = True
        if area[filled[-1]] >= ABRUPT * area.max():
            slices[filled[-1] + 1 :] = True
    return margin


def _deep_margin(empty: np.ndarray, zooms: np.ndarray) -> np.ndarray:
    """Keep the regions of empty voxels that are deep and reach the border of the grid."""
    # What lies outside the grid is empty, so that a single slice at its border is deep enough if it is thick.
    wide = np.pad(empty, 1, constant_values=True)
    core = ndimage.distance_transform_edt(wide, sampling=zooms) > LEAST_MARGIN_MM
    labels, _ = ndimage.label(core | np.pad(np.zeros_like(empty), 1, constant_values=True))
    core = labels == labels[0, 0, 0]
    near = ndimage.distance_transform_edt(~core, sampling=zooms) <= LEAST_MARGIN_MM
    inner = (slice(1, -1),) * 3
    return (near & wide)[inner]
