"""Quality figures of a preprocessed scan, and what a person should be told about them."""

from __future__ import annotations

from typing import Any

import numpy as np

LOW_OVERLAP = 0.80
LOW_COVERAGE = 0.85
BRAIN_VOLUME_RANGE_ML = (900.0, 1900.0)
LOW_LESION_SHARE = 0.5


def assess(
    registration: dict[str, Any],
    skull_stripped: bool,
    brain: np.ndarray,
    native_volume_mm3: float,
    reference: np.ndarray,
    lesion: np.ndarray | None,
) -> dict[str, Any]:
    """Collect the figures of one scan.

    Parameters
    ----------
    registration : dict
        ``similarity``, ``mask_overlap`` and ``restarted`` of the registration.
    skull_stripped : bool
    brain, reference : numpy.ndarray of bool, shape (240, 240, 155)
        Brain masks of the scan and of the reference image.
    native_volume_mm3 : float
        Volume of the brain mask in native space.
    lesion : numpy.ndarray of bool or None
        Manual lesion mask on the same grid.

    Returns
    -------
    dict
        ``similarity``, ``registration_overlap``, ``restarted``, ``skull_stripped``, ``mask_overlap`` (Dice of
        the brain with the reference brain), ``brain_volume_mm3`` (on the SRI24 grid),
        ``native_brain_volume_mm3``, ``kept_share`` (of the native brain volume on the SRI24 grid), and
        ``warnings``, a list of sentences.
    """
    volume = float(brain.sum())
    total = volume + float(reference.sum())
    overlap = 2.0 * float((brain & reference).sum()) / total
    kept = volume / native_volume_mm3
    warnings = []
    if overlap < LOW_OVERLAP:
        warnings.append(
            f"The brain overlaps the reference brain by only {overlap:.2f} (Dice): check the registration."
        )
    if not BRAIN_VOLUME_RANGE_ML[0] <= volume / 1000 <= BRAIN_VOLUME_RANGE_ML[1]:
        warnings.append(
            f"The brain mask holds {volume / 1000:.0f} mL, unusual for an adult: check the brain mask."
        )
    if kept < LOW_COVERAGE:
        warnings.append(
            f"Only {100 * kept:.0f} % of the brain mask lies on the SRI24 grid and in the field of view."
        )
    if registration["restarted"]:
        warnings.append("The registration had to be restarted from rotated positions: check the orientation.")
    if lesion is not None and lesion.any():
        share = float((lesion & brain).sum() / lesion.sum())
        if share < LOW_LESION_SHARE:
            warnings.append(
                f"Only {100 * share:.0f} % of the lesion mask lies in the brain: check that it fits the scan."
            )
    return {
        "similarity": registration["similarity"],
        "registration_overlap": registration["mask_overlap"],
        "restarted": registration["restarted"],
        "skull_stripped": skull_stripped,
        "mask_overlap": round(overlap, 4),
        "brain_volume_mm3": volume,
        "native_brain_volume_mm3": round(native_volume_mm3, 1),
        "kept_share": round(kept, 4),
        "warnings": warnings,
    }
