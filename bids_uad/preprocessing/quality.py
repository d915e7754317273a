"""Quality figures of a preprocessed scan, what a person should be told about them, and what rules it out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bids_uad.preprocessing.brain import VOLUME_ML
from bids_uad.preprocessing.overlap import dice

LOW_OVERLAP, FAILED_OVERLAP = 0.80, 0.70
LOW_SIMILARITY, FAILED_SIMILARITY = 0.022, 0.016
LOW_COVERAGE, FAILED_COVERAGE = 0.85, 0.60
USUAL_VOLUME_ML = (900.0, 1900.0)
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


def assess(
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
    doubts: Mapping[str, bool],
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
        Metrics of :func:`bids_uad.preprocessing.image_quality.measure_image`.
    doubts : mapping of str to bool
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
            not _within(volume / 1000, USUAL_VOLUME_ML),
            not _within(volume / 1000, VOLUME_ML),
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
        "warnings": [*doubts, *(text for text, (doubtful, _) in judged.items() if doubtful)],
        "failures": [
            *(text for text, grave in doubts.items() if grave),
            *(text for text, (_, failed) in judged.items() if failed),
        ],
    }


def _within(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= value <= limits[1]
