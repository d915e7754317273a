"""What one detector found in one scan, in numbers for the participant report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from bids_uad.evaluation.metrics import Confusion
from bids_uad.reports.boilerplate import describe_threshold
from bids_uad.reports.derivatives import Detection
from bids_uad.reports.figures.display import side
from bids_uad.space import VOXEL_MM3

PARCELLATIONS = ("lpba40", "tzo116plus")
"""Columns of a table of components that name regions, where the atlas has them."""
MAX_COMPONENTS = 20
UNKNOWN = "\N{EN DASH}"
TAU = "\N{GREEK SMALL LETTER TAU}"


@dataclass(frozen=True)
class Finding:
    """Numbers of one detector in one scan; None where the outputs do not tell.

    Attributes
    ----------
    threshold : float or None
    threshold_source : str
        How the threshold was fixed, in words.
    volume_ml : float or None
        Volume above the threshold.
    share : float or None
        Fraction of the brain that is above the threshold.
    n_components : int or None
    peak : float or None
        Highest score in the brain.
    min_lesion_volume : float or None
        Least volume in mm3 of lesions and of false components.
    n_lesions, n_lesions_found, n_false_components : int or None
        Of those of at least that volume.
    agreement : Confusion or None
        Anomaly mask against ground truth, inside the brain.
    """

    threshold: float | None
    threshold_source: str
    volume_ml: float | None
    share: float | None
    n_components: int | None
    peak: float | None
    min_lesion_volume: float | None
    n_lesions: int | None
    n_lesions_found: int | None
    n_false_components: int | None
    agreement: Confusion | None

    @property
    def peak_ratio(self) -> float | None:
        """Highest score over the threshold."""
        return None if self.peak is None or not self.threshold else self.peak / self.threshold


def summarise(
    detection: Detection,
    *,
    scores: np.ndarray | None,
    mask: np.ndarray | None,
    brain: np.ndarray | None,
    lesion: np.ndarray | None,
) -> Finding:
    """Collect the numbers of a detection from its tables and, where they say nothing, from its images.

    Parameters
    ----------
    detection : Detection
    scores, mask, brain, lesion : numpy.ndarray or None
        On the same grid.

    Returns
    -------
    Finding
    """
    metrics = detection.metrics
    volume = metrics.get("anomaly_volume_mm3", None if mask is None else mask.sum() * VOXEL_MM3)
    least = metrics.get("min_lesion_volume_mm3")
    brain_volume = metrics.get("brain_volume_mm3", None if brain is None else brain.sum() * VOXEL_MM3)
    return Finding(
        threshold=detection.threshold,
        threshold_source=describe_threshold(detection.threshold_name),
        volume_ml=None if volume is None else float(volume) / 1000,
        share=None if volume is None or not brain_volume else float(volume) / float(brain_volume),
        n_components=_count(metrics, "n_components"),
        peak=None if scores is None else float(scores.max()),
        min_lesion_volume=None if least is None else float(least),
        n_lesions=_count(metrics, "n_lesions"),
        n_lesions_found=_count(metrics, "n_lesions_detected"),
        n_false_components=_count(metrics, "n_false_components"),
        agreement=None if mask is None or lesion is None else agreement(mask, lesion, brain),
    )


def agreement(mask: np.ndarray, lesion: np.ndarray, brain: np.ndarray | None) -> Confusion:
    """Count voxels by anomaly mask and ground truth, inside the brain where its mask is known."""
    inside = np.ones(mask.shape, dtype=bool) if brain is None else brain
    found, true = mask & inside, lesion & inside
    both = int((found & true).sum())
    false_positive, false_negative = int(found.sum()) - both, int(true.sum()) - both
    true_negative = int(inside.sum()) - both - false_positive - false_negative
    return Confusion(both, false_positive, false_negative, true_negative)


def tiles(finding: Finding) -> list[tuple[str, str]]:
    """Numbers to show first, each with its label."""
    share = written(finding.share, "{:.2%}")
    shown = [
        (written(finding.threshold, "{:.3g}"), f"fixed threshold {TAU}: {finding.threshold_source}"),
        (written(finding.volume_ml, "{:,.1f} ml"), f"above {TAU} ({share} of the brain)"),
        (written(finding.n_components, "{:,}"), "components"),
        (written(finding.peak_ratio, f"{{:.2f}} \N{MULTIPLICATION SIGN} {TAU}"), "highest score"),
    ]
    if finding.agreement is not None:
        shown += [
            (f"{finding.agreement.dice:.3f}", "Dice with the ground truth"),
            (f"{finding.agreement.sensitivity:.0%}", "of the lesion voxels found"),
            (f"{finding.agreement.precision:.0%}", "of the found voxels are lesion"),
        ]
        if finding.agreement.truth_empty:
            label = "Dice: no lesion voxel in the brain, so it is 1 if nothing is found and else 0"
            shown[-3:] = [(f"{finding.agreement.dice:.3f}", label)]
        shown = [(UNKNOWN if value.startswith("nan") else value, label) for value, label in shown]
    least = written(finding.min_lesion_volume, " of at least {:g} mm\N{SUPERSCRIPT THREE}")
    least = "" if finding.min_lesion_volume is None else least
    if finding.n_lesions:
        found = f"{written(finding.n_lesions_found, '{}')} of {finding.n_lesions}"
        shown.append((found, f"lesions{least} found"))
    if finding.n_lesions is not None:
        shown.append((written(finding.n_false_components, "{:,}"), f"false components{least}"))
    return shown


def summary_row(finding: Finding) -> dict[str, str]:
    """Numbers of a detection for the table of all detectors."""
    dice = UNKNOWN
    if finding.agreement is not None:
        dice = f"{finding.agreement.dice:.3f}{' (empty mask)' if finding.agreement.truth_empty else ''}"
    return {
        "threshold": written(finding.threshold, "{:.3g}"),
        "threshold_source": finding.threshold_source,
        "volume": written(finding.volume_ml, "{:,.1f}"),
        "share": written(finding.share, "{:.2%}"),
        "components": written(finding.n_components, "{:,}"),
        "peak": written(finding.peak_ratio, "{:.2f}"),
        "dice": dice,
    }


def component_rows(
    table: pd.DataFrame, labels: np.ndarray | None, lesion: np.ndarray | None
) -> list[dict[str, object]]:
    """Rows of the table of components, largest first.

    Parameters
    ----------
    table : pandas.DataFrame
        A ``_dseg.tsv``.
    labels : numpy.ndarray of int, optional
        The components' image; with `lesion` it tells which of them touch a lesion.
    lesion : numpy.ndarray of bool, optional
        Ground truth on the same grid.

    Returns
    -------
    list of dict
        `MAX_COMPONENTS` at most.
    """
    named = [name for name in PARCELLATIONS if name in table.columns]
    hits = set() if labels is None or lesion is None else set(np.unique(labels[lesion]).tolist())
    largest = table.sort_values(["volume_mm3", "index"], ascending=[False, True]).head(MAX_COMPONENTS)
    rows = []
    for row in largest.itertuples(index=False):
        centroid = (row.centroid_x, row.centroid_y, row.centroid_z)
        regions = [getattr(row, name) for name in named]
        rows.append(
            {
                "index": int(row.index),
                "side": side(row.centroid_x),
                "volume": f"{row.volume_mm3:,.0f}",
                "peak": _score(row.peak_score),
                "mean": _score(row.mean_score),
                "centroid": ", ".join(f"{value:.0f}".replace("-", "\N{MINUS SIGN}") for value in centroid),
                "regions": ", ".join(region for region in regions if pd.notna(region)),
                "hit": int(row.index) in hits,
            }
        )
    return rows


def _count(metrics: dict[str, object], name: str) -> int | None:
    return int(metrics[name]) if name in metrics else None


def written(value: float | None, pattern: str) -> str:
    """Write a number, or a dash where there is none."""
    return UNKNOWN if value is None else pattern.format(value)


def _score(value: float) -> str:
    """Three significant digits, trailing zeros kept so that columns line up."""
    return f"{value:#.3g}".rstrip(".")


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
