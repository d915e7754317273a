"""From an anomaly map to masks, components and counts. Plain arrays, no files."""

from __future__ import annotations

from dataclasses import dataclass

import nibabel as nib
import numpy as np
import pandas as pd
from scipy import ndimage

from bids_uad.space import AFFINE, VOXEL_MM3

TOUCHING = np.ones((3, 3, 3), dtype=bool)
"""26-connected: voxels that share a face, an edge or a corner belong together."""


def anomaly_mask(scores: np.ndarray, brain: np.ndarray, threshold: float) -> np.ndarray:
    """Mark the brain voxels whose score is above the threshold.

    Parameters
    ----------
    scores : numpy.ndarray of float32
    brain : numpy.ndarray of bool
    threshold : float

    Returns
    -------
    numpy.ndarray of bool
    """
    # In double precision, as the histogram counts: the mask and the counts must agree voxel by voxel.
    return (scores > np.float64(threshold)) & brain


def squash(scores: np.ndarray, threshold: float) -> np.ndarray:
    """Map scores to [0, 1), monotone and invertible, with the threshold at 0.5.

    Parameters
    ----------
    scores : numpy.ndarray of float32
        Not negative; a negative score becomes 0.
    threshold : float
        Positive.

    Returns
    -------
    numpy.ndarray of float32
        `x / (x + threshold)`.

    Raises
    ------
    ValueError
        If the threshold is not positive.
    """
    if not threshold > 0:
        raise ValueError(f"the threshold must be positive, got {threshold}")
    squashed = np.zeros(scores.shape, dtype=np.float32)
    positive = scores > 0
    values = scores[positive].astype(np.float64)
    squashed[positive] = values / (values + threshold)
    # A score a hair above the threshold must not be rounded onto 0.5.
    above = scores > np.float64(threshold)
    squashed[above] = np.maximum(squashed[above], np.nextafter(np.float32(0.5), np.float32(1)))
    return squashed


def label_components(mask: np.ndarray) -> np.ndarray:
    """Label the 26-connected components of a mask 1..n, largest first.

    Parameters
    ----------
    mask : numpy.ndarray of bool, three-dimensional

    Returns
    -------
    numpy.ndarray of int32
        0 outside; components of equal size keep the order in which they come in the array.
    """
    labels = np.zeros(mask.shape, dtype=np.int32)
    box = bounding_box(mask)
    found, count = ndimage.label(mask[box], structure=TOUCHING)
    sizes = np.bincount(found.ravel(), minlength=count + 1)[1:]
    rank = np.zeros(count + 1, dtype=np.int32)
    rank[np.argsort(-sizes, kind="stable") + 1] = np.arange(1, count + 1)
    labels[box] = rank[found]
    return labels


def bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """Give the smallest box that holds a mask; most of a volume is background that need not be searched."""
    box = []
    for axis in range(mask.ndim):
        others = tuple(other for other in range(mask.ndim) if other != axis)
        used = np.flatnonzero(mask.any(axis=others))
        box.append(slice(int(used[0]), int(used[-1]) + 1) if used.size else slice(0, 0))
    return tuple(box)


def component_table(labels: np.ndarray, scores: np.ndarray, affine: np.ndarray = AFFINE) -> pd.DataFrame:
    """Measure each component.

    Parameters
    ----------
    labels : numpy.ndarray of int, shape (x, y, z)
        Components 1..n.
    scores : numpy.ndarray of float32, same shape
    affine : numpy.ndarray, shape (4, 4)
        Voxel to RAS+ mm.

    Returns
    -------
    pandas.DataFrame
        Columns `index, name, volume_mm3, peak_score, mean_score, centroid_x, centroid_y, centroid_z`
        (mm, RAS+); one row each.
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
        }
    )


def regions(labels: np.ndarray, parcellation: np.ndarray, names: dict[int, str]) -> list[str | None]:
    """Name the region of an atlas that holds most of each component.

    Parameters
    ----------
    labels : numpy.ndarray of int, shape (x, y, z)
        Components 1..n.
    parcellation : numpy.ndarray of int, same shape
        Regions, 0 where there is none.
    names : dict of int to str

    Returns
    -------
    list of str or None
        One for each component; None if it lies outside all regions. A region without a name is given by its
        number.
    """
    inside = (labels > 0) & (parcellation > 0)
    owner, region = labels[inside], parcellation[inside].astype(np.int64)
    votes = pd.Series(region).groupby(owner).agg(lambda own: own.value_counts().sort_index().idxmax())
    return [
        names.get(int(votes[k]), str(votes[k])) if k in votes.index else None
        for k in range(1, int(labels.max(initial=0)) + 1)
    ]


@dataclass(frozen=True)
class LesionHits:
    """Lesion-wise agreement of an anomaly mask with the truth.

    Parameters
    ----------
    n_lesions : int
        26-connected components of the truth of at least the minimum volume.
    n_detected : int
        Those that share a voxel with the anomaly mask.
    n_false : int
        Components of the anomaly mask, of at least the minimum volume, that share no voxel with any lesion.
    """

    n_lesions: int
    n_detected: int
    n_false: int


def counted_components(labels: np.ndarray, min_volume: float) -> np.ndarray:
    """List the components that are large enough to be counted.

    Parameters
    ----------
    labels : numpy.ndarray of int
        Components 1..n on the SRI24 grid.
    min_volume : float
        Least volume in mm3.

    Returns
    -------
    numpy.ndarray of int
        Their labels.
    """
    sizes = np.bincount(labels[labels > 0], minlength=1)
    sizes[0] = 0
    # A hair of tolerance, since a volume in mm3 need not be a multiple of a voxel's to the last digit.
    return np.flatnonzero(sizes * VOXEL_MM3 >= max(min_volume, VOXEL_MM3) * (1 - 1e-9))


def lesion_hits(components: np.ndarray, lesion: np.ndarray, min_volume: float = 0.0) -> LesionHits:
    """Count lesions, detected lesions and false components.

    What is smaller than the minimum is not counted: a lesion is neither found nor missed, a component of the
    anomaly mask is not false. A component that shares voxels with such a lesion alone is not false either. A
    counted lesion is found by any component, however small.

    Parameters
    ----------
    components : numpy.ndarray of int
        Labelled anomaly mask on the SRI24 grid, 1..n.
    lesion : numpy.ndarray of bool, same shape
    min_volume : float, default=0
        Least volume of lesions and of false components in mm3.

    Returns
    -------
    LesionHits
    """
    lesions = label_components(lesion)
    counted = counted_components(lesions, min_volume)
    found, truth = components[lesion], lesions[lesion]
    n_detected = np.intersect1d(truth[found > 0], counted).size
    false = np.setdiff1d(counted_components(components, min_volume), found)
    return LesionHits(counted.size, n_detected, false.size)


def histogram_table(edges: np.ndarray, n_nonlesion: np.ndarray, n_lesion: np.ndarray | None) -> pd.DataFrame:
    """Put score counts into a table.

    Parameters
    ----------
    edges : numpy.ndarray, shape (n + 1,)
        Bin edges of the model bundle; the last is infinite.
    n_nonlesion : numpy.ndarray of int64, shape (n,)
    n_lesion : numpy.ndarray of int64, shape (n,), or None
        None without ground truth.

    Returns
    -------
    pandas.DataFrame
        Columns `score_lower, score_upper, n_nonlesion, n_lesion`, as text: edges to the last digit, `inf`
        for the open upper edge, missing lesion counts as `n/a`.

    Raises
    ------
    ValueError
        If counts and edges do not fit.
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
    facts: dict[str, str | float],
    components: np.ndarray,
    brain: np.ndarray,
    lesion: np.ndarray | None,
    min_lesion_volume: float,
) -> pd.DataFrame:
    """Sum up one image and detector in one row.

    Parameters
    ----------
    facts : dict
        The columns that say where the numbers come from, `source_image` to `threshold_name`.
    components : numpy.ndarray of int
        Labelled anomaly mask.
    brain : numpy.ndarray of bool
    lesion : numpy.ndarray of bool, optional
        Ground truth; only what lies inside the brain counts.
    min_lesion_volume : float
        Least volume in mm3 of lesions, and of components of the anomaly mask that are called false.

    Returns
    -------
    pandas.DataFrame
        One row; the lesion columns are missing without ground truth.
    """
    row: dict[str, str | float | None] = {
        **facts,
        "brain_volume_mm3": int(brain.sum()) * VOXEL_MM3,
        "anomaly_volume_mm3": int((components > 0).sum()) * VOXEL_MM3,
        "lesion_volume_mm3": None,
        "n_components": int(components.max(initial=0)),
        "min_lesion_volume_mm3": min_lesion_volume,
        "n_counted_components": counted_components(components, min_lesion_volume).size,
        "n_lesions": None,
        "n_lesions_detected": None,
        "n_false_components": None,
    }
    if lesion is not None:
        inside = lesion & brain
        hits = lesion_hits(components, inside, min_lesion_volume)
        row["lesion_volume_mm3"] = int(inside.sum()) * VOXEL_MM3
        row["n_lesions"] = hits.n_lesions
        row["n_lesions_detected"] = hits.n_detected
        row["n_false_components"] = hits.n_false
    return pd.DataFrame([row])


SHELL_MM = (2, 6)
"""Tissue around a lesion: further than this from every lesion, and no further than that from this one. Nearer
voxels are partly lesion, and masks are seldom drawn more exactly than that."""
MIN_SHELL_VOXELS = 20


def lesion_table(lesion: np.ndarray, found: np.ndarray, image: np.ndarray, brain: np.ndarray) -> pd.DataFrame:
    """Measure each 26-connected lesion inside the brain.

    Parameters
    ----------
    lesion : numpy.ndarray of bool, SRI24 grid
        The truth.
    found : numpy.ndarray of bool, same shape
        Anomaly mask.
    image : numpy.ndarray, same shape
        Preprocessed image.
    brain : numpy.ndarray of bool, same shape

    Returns
    -------
    pandas.DataFrame
        Columns of :data:`bids_uad.dataset.sidecars.LESION_COLUMNS`, largest lesion first.
    """
    labels = label_components(lesion & brain)
    hits = component_table(labels, found)
    share = hits["mean_score"]
    return pd.DataFrame(
        {
            "lesion": hits["index"],
            "volume_mm3": hits["volume_mm3"],
            "found_share": share,
            "detected": (share > 0).astype(int),
            "contrast": contrasts(labels, image, brain),
            **{axis: hits[axis] for axis in ("centroid_x", "centroid_y", "centroid_z")},
        }
    )


def contrasts(labels: np.ndarray, image: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """Compare each lesion with the brain around it.

    Parameters
    ----------
    labels : numpy.ndarray of int, SRI24 grid (1 mm)
        Lesions 1..n.
    image : numpy.ndarray, same shape
    brain : numpy.ndarray of bool, same shape

    Returns
    -------
    numpy.ndarray of float64, shape (n,)
        (mean of the lesion - mean of its shell, see `SHELL_MM`) / standard deviation of the shell; NaN where
        the shell has fewer than `MIN_SHELL_VOXELS` voxels or does not vary.
    """
    near, far = SHELL_MM
    values = []
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        wide = tuple(
            slice(max(side.start - far - near, 0), side.stop + far + near) for side in box
        )  # so that other lesions that are too near to the shell are seen
        others, voxels = labels[wide], image[wide].astype(np.float64)
        own = others == number
        shell = brain[wide] & (ndimage.distance_transform_edt(~own) <= far)
        shell &= ndimage.distance_transform_edt(others == 0) > near
        tissue = voxels[shell]
        spread = tissue.std(ddof=1) if tissue.size >= MIN_SHELL_VOXELS else 0.0
        values.append((voxels[own].mean() - tissue.mean()) / spread if spread > 0 else np.nan)
    return np.array(values, dtype=np.float64)
