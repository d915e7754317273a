"""The quality of a scan in numbers, for the participant report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bids_uad.reports.participant_findings import written

COLUMNS = {
    "snr_total": "SNR",
    "cnr": "CNR",
    "cjv": "CJV",
    "efc": "EFC",
    "brain_volume_mm3": "Brain, ml",
    "outside_fov_fraction": "Outside the field of view, %",
    "mask_overlap": "Overlap with the atlas",
    "similarity": "Similarity",
    "rotation_degrees": "Turned by, degrees",
}
"""Keys of ``PreprocessingQuality`` and what they are called."""
_PATTERNS = {
    "snr_total": "{:.1f}",
    "brain_volume_mm3": "{:,.0f}",
    "outside_fov_fraction": "{:.0f}",
    "rotation_degrees": "{:.0f}",
}


def quality_row(quality: Mapping[str, Any]) -> list[str]:
    """Write the figures of one scan, a dash where there is none.

    Parameters
    ----------
    quality : mapping
        ``PreprocessingQuality`` of its sidecar.

    Returns
    -------
    list of str
        In the order of `COLUMNS`.
    """
    shown = dict(quality)
    if "brain_volume_mm3" in shown:
        shown["brain_volume_mm3"] /= 1000  # ml
    if "outside_fov_fraction" in shown:
        shown["outside_fov_fraction"] *= 100
    return [written(shown.get(name), _PATTERNS.get(name, "{:.2f}")) for name in COLUMNS]
