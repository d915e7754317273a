"""Published figures: detectors, test cohorts, Dice, and the lesion volumes of their pathologies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

RECONSTRUCTION = ("riad", "itermask", "andi", "disyre")
DIFFUSION = ("andi", "disyre")
FEATURES = ("fae", "uniad", "rd", "patchcore")
EIGHT = RECONSTRUCTION + FEATURES
"""Detectors of the publication."""
COHORTS = {
    "T1w": ("BraTS", "ATLAS-I", "ATLAS-O", "ATLAS-N", "Shifts", "WMH"),
    "T2w": ("BraTS", "Shifts"),
}
"""Test cohorts of the publication by contrast, in the order of the figures below."""
_FIXED = {
    "riad": (0.161, 0.081, 0.097, 0.017, 0.045, 0.042, 0.236, 0.050),
    "itermask": (0.297, 0.113, 0.090, 0.021, 0.031, 0.036, 0.257, 0.015),
    "andi": (0.232, 0.281, 0.209, 0.118, 0.125, 0.052, 0.425, 0.104),
    "disyre": (0.264, 0.432, 0.384, 0.191, 0.139, 0.109, 0.645, 0.172),
    "fae": (0.437, 0.183, 0.166, 0.047, 0.015, 0.016, 0.467, 0.031),
    "uniad": (0.239, 0.178, 0.178, 0.035, 0.048, 0.044, 0.381, 0.055),
    "rd": (0.232, 0.117, 0.130, 0.026, 0.027, 0.027, 0.283, 0.035),
    "patchcore": (0.321, 0.148, 0.149, 0.021, 0.025, 0.049, 0.372, 0.015),
}
_BEST = {
    "riad": (0.161, 0.129, 0.126, 0.045, 0.062, 0.044, 0.236, 0.064),
    "itermask": (0.301, 0.118, 0.091, 0.041, 0.045, 0.037, 0.258, 0.021),
    "andi": (0.265, 0.285, 0.209, 0.145, 0.143, 0.062, 0.453, 0.128),
    "disyre": (0.274, 0.434, 0.386, 0.196, 0.156, 0.130, 0.646, 0.205),
    "fae": (0.437, 0.183, 0.167, 0.049, 0.032, 0.032, 0.467, 0.048),
    "uniad": (0.239, 0.188, 0.178, 0.045, 0.048, 0.044, 0.381, 0.063),
    "rd": (0.232, 0.122, 0.130, 0.032, 0.040, 0.039, 0.283, 0.045),
    "patchcore": (0.334, 0.186, 0.165, 0.047, 0.058, 0.074, 0.372, 0.058),
}


def _by_cohort(table: Mapping[str, Sequence[float]]) -> pd.DataFrame:
    columns = [(modality, cohort) for modality, cohorts in COHORTS.items() for cohort in cohorts]
    return pd.DataFrame(table, index=pd.MultiIndex.from_tuples(columns)).T


PUBLISHED = {"fixed": _by_cohort(_FIXED), "best": _by_cohort(_BEST)}
"""Published Dice by detector (rows), modality and cohort (columns), at the threshold of the validation scans
and at the best threshold: the bars of results.svg in the repository of the publication, within .001."""


@dataclass(frozen=True)
class Load:
    """Log-normal distribution of the lesion volume of a cohort.

    Parameters
    ----------
    median : float
        Median, mL.
    spread : float
        Standard deviation of the natural logarithm.
    low, high : float
        Smallest and largest volume, mL, to which draws are limited.
    """

    median: float
    spread: float
    low: float
    high: float

    def draw(self, rng: np.random.Generator) -> float:
        """Draw a volume (mL)."""
        return float(np.clip(self.median * np.exp(self.spread * rng.standard_normal()), self.low, self.high))


@dataclass(frozen=True)
class Pathology:
    """Simulated pathology.

    Parameters
    ----------
    kind : str
        Kind of lesion of the simulator.
    cohorts : tuple of str
        Published cohorts with this pathology.
    load : Load
        Lesion volumes.
    source : str
        Origin of the lesion volumes.
    """

    kind: str
    cohorts: tuple[str, ...]
    load: Load
    source: str


PATHOLOGIES = {
    "glioma": Pathology(
        "tumour",
        ("BraTS",),
        Load(78.0, 0.6, 5.0, 270.0),
        "BraTS 2021, sum of the median volumes of the three compartments; the spread is an assumption",
    ),
    "chronic stroke": Pathology(
        "stroke",
        ("ATLAS-I", "ATLAS-O", "ATLAS-N"),
        Load(5.0, 1.7, 0.1, 497.0),
        "ATLAS 2.0: median 5, range 0.01 to 497 mL in 655 scans",
    ),
    "acute stroke": Pathology(
        "stroke",
        (),
        Load(17.5, 2.2, 0.1, 392.0),
        "SOOP: quartiles 2.6, 17.5 and 50.3 mL of 150 masks",
    ),
    "multiple sclerosis": Pathology(
        "ms",
        ("Shifts",),
        Load(14.9, 2.0, 0.3, 35.0),
        "Ljubljana, a part of Shifts 2.0: quartiles 1.8, 14.9 and 27.5 mL of 14 masks",
    ),
    "white matter hyperintensities": Pathology(
        "wmh",
        ("WMH",),
        Load(15.0, 1.0, 0.8, 75.0),
        "WMH challenge: median 15, range 0.8 to 75 mL in 60 scans",
    ),
}
"""Pathologies of the cohort. If only a range of n volumes is known, the spread is that of n normal values."""
DIFFUSE = ("multiple sclerosis", "white matter hyperintensities")
"""Pathologies with small, diffuse lesions."""


def published_dice(modality: str, pathology: str, detector: str, threshold: str = "fixed") -> float:
    """Return the published mean Dice, averaged over the cohorts of a pathology.

    Parameters
    ----------
    modality : {"T1w", "T2w"}
        Contrast.
    pathology : str
        Key of `PATHOLOGIES`.
    detector : str
        Name of the detector.
    threshold : {"fixed", "best"}, default="fixed"
        Threshold of the validation scans, or best threshold of the cohort.

    Returns
    -------
    float
        NaN if not published.
    """
    cohorts = [name for name in PATHOLOGIES[pathology].cohorts if name in COHORTS[modality]]
    if detector not in EIGHT or not cohorts:
        return float("nan")
    return float(PUBLISHED[threshold].loc[detector, [(modality, name) for name in cohorts]].mean())


def family_difference(detectors: Sequence[str], first: Sequence[str], second: Sequence[str]) -> np.ndarray:
    """Return the weights of the mean over one family of detectors minus that over another.

    Parameters
    ----------
    detectors : sequence of str
        Detectors, in the order of the weights.
    first, second : sequence of str
        Families, such as `RECONSTRUCTION`.

    Returns
    -------
    numpy.ndarray, shape (n_detectors,)
        Weights; NaN if a family has no detector.
    """
    members = [np.isin(detectors, family).astype(float) for family in (first, second)]
    with np.errstate(invalid="ignore"):
        of_first, of_second = (member / member.sum() for member in members)
    return of_first - of_second
