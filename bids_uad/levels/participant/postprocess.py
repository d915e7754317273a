"""Postprocessing of an anomaly map: mask, components, histogram, metrics, lesions; arrays only, no files."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
from scipy import ndimage

from bids_uad.calibration.thresholds import (
    CONNECTIVITY,
    DecisionRule,
    reaches_volume,
    score_counts,
)
from bids_uad.images import bounding_box
from bids_uad.space import AFFINE, VOXEL_MM3, icbm_to_sri24, lesion_classes, probable_regions

SHELL_MM = (2, 6)
"""Distances in mm of the reference tissue for the contrast of a lesion: more than the first from all lesions,
since voxels next to a lesion mask are partly lesion, and at most the second from this lesion."""
MIN_SHELL_VOXELS = 20
"""Minimum number of voxels of reference tissue, below which a lesion's contrast is NaN."""


@dataclass(frozen=True)
class Detection:
    """Images and tables of one anomaly map on the SRI24 grid.

    Parameters
    ----------
    mask : numpy.ndarray of bool
        Brain voxels that the decision rule marks.
    components : numpy.ndarray of int32
        26-connected components of `mask`, labelled 1..n by decreasing size.
    probseg : numpy.ndarray of float32
        Scores rescaled to [0, 1), see :func:`rescale_scores`.
    component_table, histogram, metrics : pandas.DataFrame
        See :func:`component_table`, :func:`histogram_table` and :func:`metrics_row`.
    lesions : pandas.DataFrame or None
        See :func:`lesion_table`; None without ground truth.
    """

    mask: np.ndarray
    components: np.ndarray
    probseg: np.ndarray
    component_table: pd.DataFrame
    histogram: pd.DataFrame
    metrics: pd.DataFrame
    lesions: pd.DataFrame | None


def detect_anomalies(
    scores: np.ndarray,
    brain: np.ndarray,
    lesion: np.ndarray | None = None,
    image: np.ndarray | None = None,
    *,
    rule: DecisionRule,
    edges: np.ndarray,
    provenance: Mapping[str, Any],
    min_lesion_volume: float,
    parcellations: Mapping[str, tuple[np.ndarray, Mapping[int, str]]],
) -> Detection:
    """Derive the images and tables of one anomaly map.

    Parameters
    ----------
    scores : numpy.ndarray of float32, SRI24 grid
        Anomaly scores, 0 outside the brain.
    brain : numpy.ndarray of bool, same shape
        Brain mask.
    lesion : numpy.ndarray of bool, same shape, optional
        Ground truth.
    image : numpy.ndarray, same shape, optional
        Preprocessed image, for the contrast of lesions; required with `lesion`.
    rule : DecisionRule
        Threshold, which must be positive, and the other steps from the map to the mask.
    edges : numpy.ndarray of float64, shape (n + 1,)
        Bin edges of the score histogram.
    provenance : mapping
        First columns of the metrics table, `source_image` to `scanner_seen`.
    min_lesion_volume : float
        Minimum volume in mm3 of lesions and false components that are counted.
    parcellations : mapping of str to (numpy.ndarray of int, mapping of int to str)
        Label image on the same grid, and region names by label, of each atlas.

    Returns
    -------
    Detection
        Arrays and tables, not written to disk.
    """
    mask = rule.mask(scores, brain)
    components = label_components(mask)
    table = component_table(components, scores)
    inside = components > 0
    voxels, owner = np.argwhere(inside), components[inside] - 1
    regions, probabilities = probable_regions(voxels, owner)
    table["region"], table["region_probability"] = regions, probabilities.round(2)
    table["location_class"] = lesion_classes(voxels, owner)
    for atlas, (parcellation, names) in parcellations.items():
        table[atlas.lower()] = region_names(components, parcellation, names)
    return Detection(
        mask=mask,
        components=components,
        probseg=rescale_scores(scores, rule.threshold),
        component_table=table,
        histogram=histogram_table(edges, *score_counts(scores, brain, lesion, edges)),
        metrics=metrics_row(provenance, components, brain, lesion, min_lesion_volume),
        lesions=None if lesion is None else lesion_table(lesion, mask, image, brain),
    )


def rescale_scores(scores: np.ndarray, threshold: float) -> np.ndarray:
    """Rescale scores monotonically to [0, 1), with the threshold at 0.5.

    Parameters
    ----------
    scores : numpy.ndarray of float32
        Anomaly scores; negative scores become 0.
    threshold : float
        Positive score that becomes 0.5.

    Returns
    -------
    numpy.ndarray of float32
        `scores / (scores + threshold)`. Scores above the threshold stay above 0.5 after rounding.

    Raises
    ------
    ValueError
        If the threshold is not positive.
    """
    if not threshold > 0:
        raise ValueError(f"the threshold must be positive, got {threshold}")
    rescaled = np.zeros(scores.shape, dtype=np.float32)
    positive = scores > 0
    values = scores[positive].astype(np.float64)
    rescaled[positive] = values / (values + threshold)
    above = scores > np.float64(threshold)
    rescaled[above] = np.maximum(rescaled[above], np.nextafter(np.float32(0.5), np.float32(1)))
    return rescaled


def label_components(mask: np.ndarray) -> np.ndarray:
    """Label the 26-connected components of a mask by decreasing size.

    Parameters
    ----------
    mask : numpy.ndarray of bool, three-dimensional
        Anomaly or lesion mask.

    Returns
    -------
    numpy.ndarray of int32
        Labels 1..n, 0 outside the mask. Components of equal size are ordered by their first voxel.
    """
    labels = np.zeros(mask.shape, dtype=np.int32)
    box = bounding_box(mask)  # most of a volume is background
    found, count = ndimage.label(mask[box], structure=CONNECTIVITY)
    sizes = np.bincount(found.ravel(), minlength=count + 1)[1:]
    rank = np.zeros(count + 1, dtype=np.int32)
    rank[np.argsort(-sizes, kind="stable") + 1] = np.arange(1, count + 1)
    labels[box] = rank[found]
    return labels


def component_table(labels: np.ndarray, scores: np.ndarray, affine: np.ndarray = AFFINE) -> pd.DataFrame:
    """Measure volume, scores and centroid of each component.

    Parameters
    ----------
    labels : numpy.ndarray of int, shape (x, y, z)
        Components, labelled 1..n.
    scores : numpy.ndarray of float32, same shape
        Anomaly scores.
    affine : numpy.ndarray, shape (4, 4), default=space.AFFINE
        Transform from voxel indices to SRI24 coordinates (RAS+) in mm.

    Returns
    -------
    pandas.DataFrame
        One row per component: `index, name, volume_mm3, peak_score, mean_score, centroid_x, centroid_y,
        centroid_z` (SRI24, mm), `mni_x, mni_y, mni_z` (the same point in MNI152NLin2009aSym, mm).
    """
    voxels = np.nonzero(labels)
    owner = labels[voxels]
    values = scores[voxels].astype(np.float64)
    count = int(owner.max(initial=0))
    size = np.bincount(owner, minlength=count + 1)[1:]
    peak = np.full(count + 1, -np.inf)
    np.maximum.at(peak, owner, values)
    centre = np.stack(
        [np.bincount(owner, weights=axis, minlength=count + 1)[1:] / size for axis in voxels], axis=-1
    )
    centroid = nib.affines.apply_affine(affine, centre).round(2)
    mni = nib.affines.apply_affine(np.linalg.inv(icbm_to_sri24()), centroid).round(1)
    return pd.DataFrame(
        {
            "index": np.arange(1, count + 1),
            "name": [f"anomaly{number:04d}" for number in range(1, count + 1)],
            "volume_mm3": size * abs(float(np.linalg.det(affine[:3, :3]))),
            "peak_score": peak[1:],
            "mean_score": np.bincount(owner, weights=values, minlength=count + 1)[1:] / size,
            "centroid_x": centroid[:, 0],
            "centroid_y": centroid[:, 1],
            "centroid_z": centroid[:, 2],
            "mni_x": mni[:, 0],
            "mni_y": mni[:, 1],
            "mni_z": mni[:, 2],
        }
    )


def region_names(labels: np.ndarray, parcellation: np.ndarray, names: Mapping[int, str]) -> list[str | None]:
    """Return the atlas region that contains most voxels of each component.

    Parameters
    ----------
    labels : numpy.ndarray of int, shape (x, y, z)
        Components, labelled 1..n.
    parcellation : numpy.ndarray of int, same shape
        Atlas labels, 0 for voxels without a region.
    names : mapping of int to str
        Region names by label.

    Returns
    -------
    list of str or None
        One entry per component: the region's name, or its label if it has none; None if the component
        overlaps no region.
    """
    inside = (labels > 0) & (parcellation > 0)
    owner, region = labels[inside], parcellation[inside].astype(np.int64)
    votes = pd.Series(region).groupby(owner).agg(lambda own: own.value_counts().sort_index().idxmax())
    return [
        names.get(int(votes[k]), str(votes[k])) if k in votes.index else None
        for k in range(1, int(labels.max(initial=0)) + 1)
    ]


def look_up_tables(table: pd.DataFrame) -> dict[str, str]:
    """Return names and colours of components in the formats of viewers.

    Parameters
    ----------
    table : pandas.DataFrame
        Components: `index`, `name`, and `region` (None if unknown), which is added to the name.

    Returns
    -------
    dict of str to str
        Text of the file for each program of :data:`bids_uad.dataset.naming.LOOK_UP_TABLES`. Neighbouring
        indices have different colours; those of an index are always the same.
    """
    names = {0: "background"}
    for index, name, region in zip(table["index"], table["name"], table["region"], strict=True):
        names[int(index)] = name if pd.isna(region) else f"{name} {region}"
    rows = []
    for index, name in names.items():
        hue = index * 0.618034 % 1  # golden section
        colour = colorsys.hsv_to_rgb(hue, 0.85 if index % 2 else 0.55, 1.0) if index else (0.0, 0.0, 0.0)
        rows.append((index, name, [round(255 * value) for value in colour]))
    words = [(index, name.replace(" ", "_"), f"{r} {g} {b}") for index, name, (r, g, b) in rows]
    lines = {
        # FSLeyes needs at least two lines.
        "FSLeyes": [f"{k} {r / 255:.5f} {g / 255:.5f} {b / 255:.5f} {name}" for k, name, (r, g, b) in rows],
        "Freeview": ["#No. Label Name: R G B A", *(f"{k} {name} {rgb} 0" for k, name, rgb in words)],
        "ITK-SNAP": [
            "# ITK-SnAP Label Description File",
            "# IDX -R- -G- -B- -A- VIS MSH LABEL",
            '0 0 0 0 0 0 0 "Clear Label"',
            *(f'{k} {r} {g} {b} 1 1 1 "{name}"' for k, name, (r, g, b) in rows[1:]),
        ],
        "3D Slicer": [
            "# Color table file",
            f"# {len(words)} values",
            *(f"{k} {name} {rgb} {255 if k else 0}" for k, name, rgb in words),
        ],
    }
    return {program: "".join(f"{line}\n" for line in own) for program, own in lines.items()}


def counted_labels(labels: np.ndarray, min_volume: float) -> np.ndarray:
    """Return the labels of components that reach the minimum volume.

    Parameters
    ----------
    labels : numpy.ndarray of int, SRI24 grid
        Components, labelled 1..n.
    min_volume : float
        Minimum volume in mm3.

    Returns
    -------
    numpy.ndarray of int
        Labels in increasing order.
    """
    sizes = np.bincount(labels[labels > 0], minlength=1)
    sizes[0] = 0
    return np.flatnonzero(reaches_volume(sizes, max(min_volume, VOXEL_MM3)))


@dataclass(frozen=True)
class LesionCounts:
    """Lesion-wise agreement of an anomaly mask with the ground truth.

    Parameters
    ----------
    n_lesions : int
        Lesions (26-connected components of the ground truth) of at least the minimum volume.
    n_detected : int
        Lesions among these that share a voxel with the anomaly mask.
    n_false : int
        Components of the anomaly mask, of at least the minimum volume, that share no voxel with any lesion.
    """

    n_lesions: int
    n_detected: int
    n_false: int


def count_lesions(components: np.ndarray, lesion: np.ndarray, min_volume: float = 0.0) -> LesionCounts:
    """Count lesions, detected lesions and false components.

    Lesions below the minimum volume are neither detected nor missed, and a component that overlaps only such
    lesions is not false. A counted lesion is detected by a component of any volume.

    Parameters
    ----------
    components : numpy.ndarray of int, SRI24 grid
        Components of the anomaly mask, labelled 1..n.
    lesion : numpy.ndarray of bool, same shape
        Ground truth.
    min_volume : float, default=0
        Minimum volume in mm3 of lesions and false components.

    Returns
    -------
    LesionCounts
        Numbers of lesions, detected lesions and false components.
    """
    lesions = label_components(lesion)
    counted = counted_labels(lesions, min_volume)
    found, truth = components[lesion], lesions[lesion]
    n_detected = np.intersect1d(truth[found > 0], counted).size
    false = np.setdiff1d(counted_labels(components, min_volume), found)
    return LesionCounts(counted.size, n_detected, false.size)


def histogram_table(edges: np.ndarray, n_nonlesion: np.ndarray, n_lesion: np.ndarray | None) -> pd.DataFrame:
    """Tabulate the score histogram.

    Parameters
    ----------
    edges : numpy.ndarray of float64, shape (n + 1,)
        Bin edges of the model bundle; the last is infinite.
    n_nonlesion : numpy.ndarray of int64, shape (n,)
        Brain voxels outside the ground truth in each bin; all brain voxels without ground truth.
    n_lesion : numpy.ndarray of int64, shape (n,), or None
        Brain voxels inside the ground truth in each bin; None without ground truth.

    Returns
    -------
    pandas.DataFrame
        Columns `score_lower, score_upper, n_nonlesion, n_lesion`. Edges are text in full precision, the last
        is `inf`; missing lesion counts are `n/a`.

    Raises
    ------
    ValueError
        If the number of counts does not match the number of edges.
    """
    if len(edges) != len(n_nonlesion) + 1:
        raise ValueError(f"{len(edges)} edges do not make {len(n_nonlesion)} bins")
    return pd.DataFrame(
        {
            "score_lower": [repr(float(edge)) for edge in edges[:-1]],
            "score_upper": [repr(float(edge)) for edge in edges[1:]],
            "n_nonlesion": n_nonlesion,
            "n_lesion": "n/a" if n_lesion is None else n_lesion,
        }
    )


def metrics_row(
    provenance: Mapping[str, Any],
    components: np.ndarray,
    brain: np.ndarray,
    lesion: np.ndarray | None,
    min_lesion_volume: float,
) -> pd.DataFrame:
    """Summarize one image and detector in one row.

    Parameters
    ----------
    provenance : mapping
        First columns of the table: image, model and threshold.
    components : numpy.ndarray of int, SRI24 grid
        Components of the anomaly mask, labelled 1..n.
    brain : numpy.ndarray of bool, same shape
        Brain mask.
    lesion : numpy.ndarray of bool, same shape, or None
        Ground truth; its voxels outside the brain are ignored.
    min_lesion_volume : float
        Minimum volume in mm3 of lesions and false components that are counted.

    Returns
    -------
    pandas.DataFrame
        One row; the lesion columns are None without ground truth.
    """
    row: dict[str, Any] = {
        **provenance,
        "brain_volume_mm3": int(brain.sum()) * VOXEL_MM3,
        "anomaly_volume_mm3": int((components > 0).sum()) * VOXEL_MM3,
        "lesion_volume_mm3": None,
        "detected_volume_mm3": None,
        "n_components": int(components.max(initial=0)),
        "min_lesion_volume_mm3": min_lesion_volume,
        "n_counted_components": counted_labels(components, min_lesion_volume).size,
        "n_lesions": None,
        "n_lesions_detected": None,
        "n_false_components": None,
    }
    if lesion is not None:
        inside = lesion & brain
        counts = count_lesions(components, inside, min_lesion_volume)
        row["lesion_volume_mm3"] = int(inside.sum()) * VOXEL_MM3
        row["detected_volume_mm3"] = int((inside & (components > 0)).sum()) * VOXEL_MM3
        row["n_lesions"] = counts.n_lesions
        row["n_lesions_detected"] = counts.n_detected
        row["n_false_components"] = counts.n_false
    return pd.DataFrame([row])


def lesion_table(lesion: np.ndarray, mask: np.ndarray, image: np.ndarray, brain: np.ndarray) -> pd.DataFrame:
    """Measure volume, detected fraction and contrast of each lesion in the brain.

    Parameters
    ----------
    lesion : numpy.ndarray of bool, SRI24 grid
        Ground truth.
    mask : numpy.ndarray of bool, same shape
        Anomaly mask.
    image : numpy.ndarray, same shape
        Preprocessed image.
    brain : numpy.ndarray of bool, same shape
        Brain mask.

    Returns
    -------
    pandas.DataFrame
        Columns of :data:`bids_uad.dataset.sidecars.LESION_COLUMNS`; one row per 26-connected lesion, largest
        first.
    """
    labels = label_components(lesion & brain)
    measures = component_table(labels, mask)
    fraction = measures["mean_score"]
    return pd.DataFrame(
        {
            "lesion": measures["index"],
            "volume_mm3": measures["volume_mm3"],
            "detected_fraction": fraction,
            "detected": (fraction > 0).astype(int),
            "contrast": lesion_contrasts(labels, image, brain),
            **{
                f"{point}_{axis}": measures[f"{point}_{axis}"]
                for point in ("centroid", "mni")
                for axis in "xyz"
            },
        }
    )


def lesion_contrasts(labels: np.ndarray, image: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """Compare the mean intensity of each lesion with that of the surrounding brain.

    Parameters
    ----------
    labels : numpy.ndarray of int, SRI24 grid (1 mm)
        Lesions, labelled 1..n.
    image : numpy.ndarray, same shape
        Preprocessed image.
    brain : numpy.ndarray of bool, same shape
        Brain mask.

    Returns
    -------
    numpy.ndarray of float64, shape (n,)
        (mean of the lesion - mean of its shell) / standard deviation of the shell, see `SHELL_MM`; NaN if
        the shell has fewer than `MIN_SHELL_VOXELS` voxels or is constant.
    """
    near, far = SHELL_MM
    values = []
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        # The margin contains every other lesion that may be too near to the shell.
        wide = tuple(slice(max(side.start - far - near, 0), side.stop + far + near) for side in box)
        nearby, voxels = labels[wide], image[wide].astype(np.float64)
        own = nearby == number
        shell = brain[wide] & (ndimage.distance_transform_edt(~own) <= far)
        shell &= ndimage.distance_transform_edt(nearby == 0) > near
        tissue = voxels[shell]
        deviation = tissue.std(ddof=1) if tissue.size >= MIN_SHELL_VOXELS else 0.0
        values.append((voxels[own].mean() - tissue.mean()) / deviation if deviation > 0 else np.nan)
    return np.array(values, dtype=np.float64)
