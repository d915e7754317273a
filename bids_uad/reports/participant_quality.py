"""The quality of a scan in numbers, for the participant report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

UNKNOWN = "\N{EN DASH}"

COLUMNS = {
    "snr_total": "SNR",
    "cnr": "CNR",
    "cjv": "CJV",
    "efc": "EFC",
    "brain_volume_mm3": "Brain, ml",
    "mask_overlap": "Overlap with the atlas",
    "similarity": "Similarity",
    "rotation_degrees": "Turned by, degrees",
}
"""Keys of ``PreprocessingQuality`` and what they are called."""
_PATTERNS = {"snr_total": "{:.1f}", "rotation_degrees": "{:.0f}"}


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
    return [_written(name, quality.get(name)) for name in COLUMNS]


def _written(name: str, value: float | None) -> str:
    if value is None:
        return UNKNOWN
    if name == "brain_volume_mm3":
        return f"{value / 1000:,.0f}"
    return _PATTERNS.get(name, "{:.2f}").format(value)
