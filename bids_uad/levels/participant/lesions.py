"""What is measured of each lesion of the truth. Plain arrays, no files."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import ndimage

from bids_uad.levels.participant.maps import component_table, label_components

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
