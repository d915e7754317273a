"""Numbers of the participant report: findings of a detector, components, and image quality."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from bids_uad.calibration.thresholds import HealthyMarked
from bids_uad.evaluation.metrics import Confusion
from bids_uad.reports.boilerplate import describe_rule, describe_threshold
from bids_uad.reports.derivatives import Detection
from bids_uad.reports.figures.display import side
from bids_uad.space import VOXEL_MM3

PARCELLATIONS = ("region", "lpba40", "tzo116plus")
"""Columns with region names in the table of components: built-in atlas, and parcellations of SRI24."""
MAX_COMPONENTS = 20
"""Rows of the table of components in the report."""
MISSING = "\N{EN DASH}"
TAU = "\N{GREEK SMALL LETTER TAU}"
QUALITY_COLUMNS = {
    "snr_total": "SNR",
    "cnr": "CNR",
    "cjv": "CJV",
    "efc": "EFC",
    "brain_volume_mm3": "Brain, mL",
    "outside_fov_fraction": "Outside FOV, %",
    "unscored_fraction": "Not scored, %",
    "mask_overlap": "Overlap with the atlas",
    "similarity": "Similarity to the atlas",
    "rotation_degrees": "Rotation, degrees",
}
"""Keys of ``PreprocessingQuality`` in the sidecar of an image, and their column titles."""
_QUALITY_FORMATS = {
    "snr_total": "{:.1f}",
    "brain_volume_mm3": "{:,.0f}",
    "outside_fov_fraction": "{:.0f}",
    "unscored_fraction": "{:.1f}",
    "rotation_degrees": "{:.0f}",
}


@dataclass(frozen=True)
class Finding:
    """Numbers of one detector in one scan; None if the outputs do not contain them.

    Attributes
    ----------
    threshold : float or None
        The fixed threshold on the score.
    threshold_source : str
        How the threshold was fixed, in words.
    rule : str
        Decision rule besides the threshold in words; empty for a plain threshold.
    volume_ml : float or None
        Volume of the anomaly mask in mL.
    brain_fraction : float or None
        Fraction of the brain in the anomaly mask.
    n_components : int or None
        Number of connected components of the anomaly mask.
    peak : float or None
        Highest score in the brain.
    min_lesion_volume : float or None
        Minimum volume in mm3 of counted lesions and false-positive components.
    n_lesions, n_lesions_found, n_false_components : int or None
        Numbers of lesions, of those found, and of false-positive components of at least that volume.
    agreement : Confusion or None
        Anomaly mask against ground truth, inside the brain.
    excess : str
        Warning if the marked fraction is far above that of healthy scans, else empty.
    """

    threshold: float | None
    threshold_source: str
    rule: str
    volume_ml: float | None
    brain_fraction: float | None
    n_components: int | None
    peak: float | None
    min_lesion_volume: float | None
    n_lesions: int | None
    n_lesions_found: int | None
    n_false_components: int | None
    agreement: Confusion | None
    excess: str

    @property
    def peak_ratio(self) -> float | None:
        """Ratio of the highest score and the threshold."""
        return None if self.peak is None or not self.threshold else self.peak / self.threshold


def summarise(
    detection: Detection,
    *,
    scores: np.ndarray | None,
    mask: np.ndarray | None,
    brain: np.ndarray | None,
    lesion: np.ndarray | None,
) -> Finding:
    """Collect the numbers of a detection from its tables or, if they lack them, from its images.

    Parameters
    ----------
    detection : Detection
        Files and tables of the detection.
    scores, mask, brain, lesion : numpy.ndarray or None
        Anomaly map and masks of anomalies, brain and ground truth, all on one grid.

    Returns
    -------
    Finding
    """
    metrics = detection.metrics
    volume = metrics.get("anomaly_volume_mm3", None if mask is None else mask.sum() * VOXEL_MM3)
    min_volume = metrics.get("min_lesion_volume_mm3")
    brain_volume = metrics.get("brain_volume_mm3", None if brain is None else brain.sum() * VOXEL_MM3)
    fraction = None if volume is None or not brain_volume else float(volume) / float(brain_volume)
    return Finding(
        threshold=detection.threshold,
        threshold_source=describe_threshold(detection.threshold_name),
        rule=describe_rule(detection.rule),
        volume_ml=None if volume is None else float(volume) / 1000,
        brain_fraction=fraction,
        n_components=_count(metrics, "n_components"),
        peak=None if scores is None else float(scores.max()),
        min_lesion_volume=None if min_volume is None else float(min_volume),
        n_lesions=_count(metrics, "n_lesions"),
        n_lesions_found=_count(metrics, "n_lesions_detected"),
        n_false_components=_count(metrics, "n_false_components"),
        agreement=None if mask is None or lesion is None else agreement(mask, lesion, brain),
        excess="" if fraction is None else HealthyMarked.read(metrics).warning(fraction, detection.title),
    )


def agreement(mask: np.ndarray, lesion: np.ndarray, brain: np.ndarray | None) -> Confusion:
    """Compute the confusion matrix of anomaly mask and ground truth, inside the brain if it is known."""
    inside = np.ones(mask.shape, dtype=bool) if brain is None else brain
    predicted, true = mask & inside, lesion & inside
    true_positive = int((predicted & true).sum())
    false_positive, false_negative = int(predicted.sum()) - true_positive, int(true.sum()) - true_positive
    true_negative = int(inside.sum()) - true_positive - false_positive - false_negative
    return Confusion(true_positive, false_positive, false_negative, true_negative)


def summary_tiles(finding: Finding) -> list[tuple[str, str]]:
    """Return the numbers at the top of a detector's section, each with its label."""
    fraction = _percent(finding.brain_fraction, 2)
    shown = [
        (_format(finding.threshold, "{:.3g}"), f"fixed threshold {TAU}: {finding.threshold_source}"),
        (
            _format(finding.volume_ml, "{:,.1f} mL"),
            f"{finding.rule or f'above {TAU}'} ({fraction} of the brain)",
        ),
        (_format(finding.n_components, "{:,}"), "components"),
        (_format(finding.peak_ratio, "{:.2f}"), f"highest score, relative to {TAU}"),
    ]
    if finding.agreement is not None:
        shown += [
            (f"{finding.agreement.dice:.3f}", "Dice with the ground truth"),
            (_percent(finding.agreement.sensitivity), "sensitivity, voxel-wise"),
            (_percent(finding.agreement.precision), "precision, voxel-wise"),
        ]
        if finding.agreement.truth_empty:
            label = "Dice: no lesion voxel in the brain, so it is 1 without findings, else 0"
            shown[-3:] = [(f"{finding.agreement.dice:.3f}", label)]
        shown = [(MISSING if value.startswith("nan") else value, label) for value, label in shown]
    at_least = ""
    if finding.min_lesion_volume is not None:
        at_least = f" of at least {finding.min_lesion_volume:g} mm\N{SUPERSCRIPT THREE}"
    if finding.n_lesions:
        found = f"{_format(finding.n_lesions_found, '{}')} of {finding.n_lesions}"
        shown.append((found, f"lesions{at_least} found"))
    if finding.n_lesions is not None:
        shown.append((_format(finding.n_false_components, "{:,}"), f"false-positive components{at_least}"))
    return shown


def summary_row(finding: Finding) -> dict[str, str]:
    """Return the cells of a detection in the table of all detectors."""
    dice = MISSING
    if finding.agreement is not None:
        dice = f"{finding.agreement.dice:.3f}{' (empty mask)' if finding.agreement.truth_empty else ''}"
    return {
        "threshold": _format(finding.threshold, "{:.3g}"),
        "threshold_source": finding.threshold_source,
        "volume": _format(finding.volume_ml, "{:,.1f}"),
        "fraction": _percent(finding.brain_fraction, 2),
        "excess": finding.excess,
        "components": _format(finding.n_components, "{:,}"),
        "peak": _format(finding.peak_ratio, "{:.2f}"),
        "dice": dice,
    }


def component_rows(
    table: pd.DataFrame, labels: np.ndarray | None, lesion: np.ndarray | None
) -> list[dict[str, object]]:
    """Return the rows of the table of components, largest first.

    Parameters
    ----------
    table : pandas.DataFrame
        Contents of a ``_dseg.tsv``.
    labels : numpy.ndarray of int, optional
        Label image of the components.
    lesion : numpy.ndarray of bool, optional
        Ground truth on the same grid.

    Returns
    -------
    list of dict
        At most `MAX_COMPONENTS` rows; `hit` is True for components that touch a lesion.
    """
    parcellations = [name for name in PARCELLATIONS if name in table.columns]
    hits = set() if labels is None or lesion is None else set(np.unique(labels[lesion]).tolist())
    largest = table.sort_values(["volume_mm3", "index"], ascending=[False, True]).head(MAX_COMPONENTS)
    rows = []
    for row in largest.itertuples(index=False):
        regions = [getattr(row, name) for name in parcellations]
        rows.append(
            {
                "index": int(row.index),
                "side": side(row.centroid_x),
                "volume": f"{row.volume_mm3:,.0f}",
                "peak": _score(row.peak_score),
                "mean": _score(row.mean_score),
                "centroid": _point(row, "centroid"),
                "mni": _point(row, "mni"),
                "class": row.location_class if pd.notna(getattr(row, "location_class", None)) else "",
                "regions": ", ".join(region for region in regions if pd.notna(region)),
                "hit": int(row.index) in hits,
            }
        )
    return rows


def _point(row: Any, prefix: str) -> str:
    """Return the coordinates `prefix_x` to `prefix_z` of a row as text; empty if it has none."""
    values = [getattr(row, f"{prefix}_{axis}", None) for axis in "xyz"]
    if None in values:
        return ""
    return ", ".join(f"{value:.0f}".replace("-", "\N{MINUS SIGN}") for value in values)


def quality_row(quality: Mapping[str, Any]) -> list[str]:
    """Return the quality metrics of one scan as text, a dash for missing ones.

    Parameters
    ----------
    quality : mapping
        ``PreprocessingQuality`` of the sidecar.

    Returns
    -------
    list of str
        Values in the order of `QUALITY_COLUMNS`.
    """
    shown = dict(quality)
    if "brain_volume_mm3" in shown:
        shown["brain_volume_mm3"] /= 1000  # mL
    for name in ("outside_fov_fraction", "unscored_fraction"):
        if name in shown:
            shown[name] *= 100
    return [_format(shown.get(name), _QUALITY_FORMATS.get(name, "{:.2f}")) for name in QUALITY_COLUMNS]


def _format(value: float | None, pattern: str) -> str:
    """Format a number; return a dash for None."""
    return MISSING if value is None else pattern.format(value)


def _percent(fraction: float | None, digits: int = 0) -> str:
    """Format a fraction as a percentage; return a dash for None."""
    return MISSING if fraction is None else f"{100 * fraction:.{digits}f}\N{NO-BREAK SPACE}%"


def _score(value: float) -> str:
    """Format with three significant digits and trailing zeros, so that the columns align."""
    return f"{value:#.3g}".rstrip(".")


def _count(metrics: dict[str, object], name: str) -> int | None:
    return int(metrics[name]) if name in metrics else None
