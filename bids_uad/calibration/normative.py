"""Normative reference: scores of healthy controls by location, age, sex and brain volume.

Normative modelling (Marquand et al. 2016, Biological Psychiatry 80) with the terms of PCNtoolkit. The score
s of a voxel of a healthy control is modelled as s = x'b + e, x = (1, age, sex, brain volume), where the
variance of e is linear in age. Brain volume is a covariate because registration to the atlas is rigid, so
that the same location holds other tissue in a large head than in a small one.

The sums of the normal equations are accumulated in blocks of `BLOCK` mm and smoothed by a Gaussian kernel of
`FWHM` mm before they are solved (local regression): coefficients and standard deviation vary smoothly, and
locations that few brains cover take information from their neighbours. Since sums are additive, a person can
be removed again, which gives exactly the reference of the others (leave-one-out). PCNtoolkit 1.3 itself holds
all participants in memory and fits one model per response; sums suit a million voxels better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates

from bids_uad.errors import ModelError
from bids_uad.images import make_image, save_image
from bids_uad.space import AFFINE, SHAPE, VOXEL_MM3

BLOCK = 8
"""Edge length of a block in mm."""
FWHM = 40.0
"""Full width at half maximum of the smoothing kernel in mm."""
SD_FLOOR = 0.3
"""Smallest standard deviation of a location, as a fraction of that of the whole brain."""
MAX_VARIANCE_SLOPE = 0.3
"""Largest change of the variance in ten years of age, as a fraction of the variance at the mean age."""
VARIANCE_LIMITS = (0.2, 3.0)
"""Smallest and largest variance at any age, as fractions of the variance at the mean age."""
MIN_SUBJECTS = 20
"""Smallest number of healthy controls for which a reference is fitted."""
TERMS = ("intercept", "age", "sex", "brain volume")
VOLUMES = (
    "mean at the means of the covariates: score",
    "age: score per 10 years",
    "sex: score, male minus female",
    "brain volume: score per 100 mL",
    "standard deviation at the mean age: score",
    "slope of the variance: fraction per 10 years",
)
"""Volumes of the image of a reference, with their units."""
FORMULA = "Z = max(0, (score - mean) / standard deviation)"
TYPICAL_VOLUME = 1400.0
"""Brain volume in mL at which the covariate is 0; a constant that keeps numbers small."""
GRID = tuple(-(-size // BLOCK) for size in SHAPE)
GRID_AFFINE = AFFINE @ np.array(
    [
        [BLOCK, 0, 0, (BLOCK - 1) / 2],
        [0, BLOCK, 0, (BLOCK - 1) / 2],
        [0, 0, BLOCK, (BLOCK - 1) / 2],
        [0, 0, 0, 1],
    ]
)
_SIGMA = FWHM / np.sqrt(8 * np.log(2)) / BLOCK
_RIDGE = 1e-9


@dataclass(frozen=True)
class HealthyCohort:
    """Age and sex of the healthy controls of a reference; None if it is known of none of them.

    Parameters
    ----------
    age_mean : float or None
        Mean age in years.
    age_range : tuple of float or None
        Lowest and highest age in years.
    sex_mean : float or None
        Mean of the sexes, coded as 0.5 (male) and -0.5 (female).
    """

    age_mean: float | None
    age_range: tuple[float, float] | None
    sex_mean: float | None

    @classmethod
    def from_participants(cls, participants: Sequence[Mapping[str, float | None]]) -> HealthyCohort:
        """Summarise participants.

        Parameters
        ----------
        participants : sequence of mapping
            `age` in years and `sex` (0.5 male, -0.5 female) of each; None if not known.

        Returns
        -------
        HealthyCohort
            Summary of the known ages and sexes.
        """
        ages = [person["age"] for person in participants if person["age"] is not None]
        sexes = [person["sex"] for person in participants if person["sex"] is not None]
        return cls(
            float(np.mean(ages)) if ages else None,
            (float(min(ages)), float(max(ages))) if ages else None,
            float(np.mean(sexes)) if sexes else None,
        )

    def impute_covariates(
        self, age: float | None, sex: float | None
    ) -> tuple[dict[str, float | None], list[str]]:
        """Replace unknown covariates by the mean of the cohort, and clip age to its range.

        Parameters
        ----------
        age : float or None
            Age in years; None if not known.
        sex : float or None
            0.5 male, -0.5 female; None if not known.

        Returns
        -------
        used : dict
            `age` and `sex` that are used; None if the cohort has no known values.
        warnings : list of str
            One sentence for each covariate that was replaced or clipped.
        """
        used: dict[str, float | None] = {"age": self.age_mean, "sex": self.sex_mean}
        warnings = []
        if self.age_range is not None:
            low, high = self.age_range
            if age is None:
                warnings.append(
                    f"age is not known; the mean of the reference ({self.age_mean:.0f} years) is used"
                )
            else:
                used["age"] = float(np.clip(age, low, high))
                if used["age"] != age:
                    warnings.append(
                        f"age is outside the range of the reference; {used['age']:.0f} years is used "
                        f"(range {low:.0f} to {high:.0f} years)"
                    )
        if self.sex_mean is not None:
            if sex is None:
                warnings.append("sex is not known; the mean of the reference is used")
            else:
                used["sex"] = sex
        return used, warnings

    def row(self, age: float | None, sex: float | None, brain: np.ndarray) -> np.ndarray:
        """Return the centred covariates of a person.

        Parameters
        ----------
        age, sex : float or None
            As in :meth:`impute_covariates`.
        brain : numpy.ndarray of bool
            Brain mask on the SRI24 grid, from which the brain volume is computed.

        Returns
        -------
        numpy.ndarray of float64, shape (4,)
            Covariates in the order of `TERMS`: 1, age in 10 years, sex, brain volume in 100 mL.
        """
        used, _ = self.impute_covariates(age, sex)
        volume = np.count_nonzero(brain) * VOXEL_MM3 / 1000
        return np.array(
            [
                1.0,
                0.0 if used["age"] is None else (used["age"] - self.age_mean) / 10,
                0.0 if used["sex"] is None else used["sex"] - self.sex_mean,
                (volume - TYPICAL_VOLUME) / 100,
            ]
        )

    def describe(self) -> dict[str, Any]:
        """Return a description of JSON types, which :meth:`read` reads."""
        return {"age_mean": self.age_mean, "age_range": self.age_range, "sex_mean": self.sex_mean}

    @classmethod
    def read(cls, description: Mapping[str, Any]) -> HealthyCohort:
        """Make a cohort from the description of :meth:`describe`."""
        ages = description["age_range"]
        return cls(
            description["age_mean"], None if ages is None else (ages[0], ages[1]), description["sex_mean"]
        )


@dataclass(frozen=True)
class NormativeReference:
    """Mean and standard deviation of the scores of healthy controls.

    Parameters
    ----------
    cohort : HealthyCohort
        Ages and sexes of the controls.
    coefficients : numpy.ndarray of float32, shape (4, *GRID)
        Regression coefficients of `TERMS`.
    sd : numpy.ndarray of float32, shape GRID
        Standard deviation of the score at the mean age.
    variance_slope : numpy.ndarray of float32, shape GRID
        Change of the variance in ten years, as a fraction of the variance at the mean age.
    """

    cohort: HealthyCohort
    coefficients: np.ndarray
    sd: np.ndarray
    variance_slope: np.ndarray

    def deviations(
        self, scores: np.ndarray, brain: np.ndarray, *, age: float | None, sex: float | None
    ) -> np.ndarray:
        """Compute Z scores, with negative values set to 0, because a score below normal is no anomaly.

        Parameters
        ----------
        scores : numpy.ndarray of float, shape SHAPE
            Anomaly map on the SRI24 grid.
        brain : numpy.ndarray of bool, shape SHAPE
            Brain mask.
        age, sex : float or None
            See `HealthyCohort.impute_covariates`.

        Returns
        -------
        numpy.ndarray of float32, shape SHAPE
            Z scores, 0 outside the brain.
        """
        x = self.cohort.row(age, sex, brain)
        mean = np.tensordot(x, self.coefficients, 1)
        variance = np.clip(1 + self.variance_slope * x[TERMS.index("age")], *VARIANCE_LIMITS)
        sd = self.sd * np.sqrt(variance)
        voxels = np.nonzero(brain)
        positions = [(axis + 0.5) / BLOCK - 0.5 for axis in voxels]
        mean, sd = (map_coordinates(values, positions, order=1, mode="nearest") for values in (mean, sd))
        z = np.zeros(scores.shape, dtype=np.float32)
        z[voxels] = np.maximum((scores[voxels] - mean) / sd, 0)
        return z

    def describe(self) -> dict[str, Any]:
        """Return formula, covariates and constants, for ``calibration.json``."""
        return {
            "formula": FORMULA,
            "volumes": list(VOLUMES),
            "covariates": {
                **self.cohort.describe(),
                "sexes": {"male": 0.5, "female": -0.5},
                "brain_volume_centre_ml": TYPICAL_VOLUME,
            },
            "block_mm": BLOCK,
            "kernel_fwhm_mm": FWHM,
            "sd_floor": SD_FLOOR,
            "variance_limits": list(VARIANCE_LIMITS),
        }

    def write(self, path: Path) -> None:
        """Write `VOLUMES` as one NIfTI image of float32, shape (*GRID, 6)."""
        volumes = np.stack([*self.coefficients, self.sd, self.variance_slope], axis=-1)
        # Rounding to 11 binary digits makes the file smaller; the sampling error is far larger.
        mantissa, exponent = np.frexp(volumes)
        rounded = np.ldexp(np.round(mantissa * 2**11) / 2**11, exponent).astype(np.float32)
        save_image(make_image(rounded, GRID_AFFINE, np.float32, code=2), path)

    @classmethod
    def read(cls, path: Path, description: Mapping[str, Any]) -> NormativeReference:
        """Read a reference that :meth:`write` has written.

        Parameters
        ----------
        path : pathlib.Path
            NIfTI image of the `VOLUMES`.
        description : mapping
            Result of :meth:`describe`, from ``calibration.json``.

        Returns
        -------
        NormativeReference
            The reference.

        Raises
        ------
        ModelError
            If the image is on another grid, not finite, or has a standard deviation of 0.
        """
        image = nib.load(path)
        if image.shape != (*GRID, len(VOLUMES)) or not np.allclose(image.affine, GRID_AFFINE):
            raise ModelError(f"{path} is no normative reference of this version; run `calibrate` again")
        volumes = np.moveaxis(np.asarray(image.dataobj, dtype=np.float32), -1, 0)
        if not np.isfinite(volumes).all() or not (volumes[-2] > 0).all():
            raise ModelError(
                f"{path} holds NaN or infinite values, or a standard deviation of 0; run `calibrate` again"
            )
        return cls(HealthyCohort.read(description["covariates"]), volumes[:-2], *volumes[-2:])


class NormativeEstimator:
    """Accumulates the sums of the normal equations map by map, in constant memory.

    Parameters
    ----------
    cohort : HealthyCohort
        Ages and sexes of all healthy controls that will be added.
    """

    def __init__(self, cohort: HealthyCohort) -> None:
        self.cohort = cohort
        # First axis: plain sums, and sums weighted with centred age.
        self._xx = np.zeros((2, len(TERMS), len(TERMS), *GRID))
        self._xy = np.zeros((2, len(TERMS), *GRID))
        self._yy = np.zeros((2, *GRID))

    def add(self, scores: np.ndarray, brain: np.ndarray, *, age: float | None, sex: float | None) -> None:
        """Add the map of a healthy control; parameters as in :meth:`NormativeReference.deviations`."""
        self._accumulate(1.0, scores, brain, age, sex)

    def remove(self, scores: np.ndarray, brain: np.ndarray, *, age: float | None, sex: float | None) -> None:
        """Remove a map that was added."""
        self._accumulate(-1.0, scores, brain, age, sex)

    def _accumulate(
        self, sign: float, scores: np.ndarray, brain: np.ndarray, age: float | None, sex: float | None
    ) -> None:
        x = self.cohort.row(age, sex, brain)
        weights = sign * np.array([1.0, x[TERMS.index("age")]])
        voxels = np.nonzero(brain)
        block = np.ravel_multi_index([axis // BLOCK for axis in voxels], GRID)
        y = scores[voxels].astype(np.float64)
        n, s, q = (
            np.bincount(block, weights=v, minlength=np.prod(GRID)).reshape(GRID) for v in (None, y, y * y)
        )
        self._xx += np.multiply.outer(np.multiply.outer(weights, np.outer(x, x)), n)
        self._xy += np.multiply.outer(np.outer(weights, x), s)
        self._yy += np.multiply.outer(weights, q)

    def fit(self) -> NormativeReference:
        """Solve the smoothed normal equations.

        Returns
        -------
        NormativeReference
            Coefficients, standard deviation and slope of the variance.

        Raises
        ------
        ValueError
            If no map was added.
        ModelError
            If all scores are equal.
        """
        sums = (self._xx, self._xy, self._yy)
        total = self._xx[0, 0, 0].sum()
        if not total > 0:
            raise ValueError("no healthy map was added")
        whole = _solve(*(part.sum((-3, -2, -1)) for part in sums))
        # A smaller variance is rounding error of sums in double precision.
        if not whole[1] > max(1e-12 * self._yy[0].sum() / total, np.finfo(np.float32).tiny):
            raise ModelError(
                "the scores of the healthy scans are all equal, so that no Z score can be computed; "
                "train the model again"
            )
        smooth = [_smooth(part) for part in sums]
        local = _solve(*(np.moveaxis(part, (-3, -2, -1), (0, 1, 2)) for part in smooth))
        # Blocks that no brain covers, even after smoothing, get the values of the whole brain.
        covered = smooth[0][0, 0, 0] > total / np.prod(GRID) * 1e-3
        coefficients = np.where(covered[..., None], local[0], whole[0])
        variance, slope = (np.where(covered, *pair) for pair in zip(local[1:], whole[1:], strict=True))
        sd = np.sqrt(np.maximum(variance, SD_FLOOR**2 * whole[1]))
        return NormativeReference(
            self.cohort,
            np.moveaxis(coefficients, -1, 0).astype(np.float32),
            sd.astype(np.float32),
            np.clip(slope, -MAX_VARIANCE_SLOPE, MAX_VARIANCE_SLOPE).astype(np.float32),
        )


def _solve(xx: np.ndarray, xy: np.ndarray, yy: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Solve least squares from sums, first for the scores, then for the squared residuals on age.

    A constant covariate gets a coefficient of 0.

    Parameters
    ----------
    xx, xy, yy : numpy.ndarray, shapes (..., 2, p, p), (..., 2, p) and (..., 2)
        Plain sums and sums weighted with centred age.

    Returns
    -------
    coefficients : numpy.ndarray, shape (..., p)
        Regression coefficients.
    variance, slope : numpy.ndarray, shape (...)
        Variance of the residuals at centred age 0, and its change with age as a fraction.
    """
    tiny = np.finfo(float).tiny
    weight = np.maximum(xx[..., 0, 0, 0], tiny)
    ridge = _RIDGE * weight[..., None, None] * np.eye(xx.shape[-1])
    ridge[..., 0, 0] = tiny
    coefficients = np.linalg.solve(xx[..., 0, :, :] + ridge, xy[..., 0, :, None])[..., 0]
    fitted = np.einsum("...i,...kij,...j->...k", coefficients, xx, coefficients)
    squares = yy - 2 * np.einsum("...ki,...i->...k", xy, coefficients) + fitted
    age, age_squared = xx[..., 0, 0, 1], xx[..., 0, 1, 1] + _RIDGE * weight
    slope = (squares[..., 1] - age / weight * squares[..., 0]) / (age_squared - age**2 / weight)
    variance = np.maximum((squares[..., 0] - slope * age) / weight, tiny)
    return coefficients, variance, slope / variance


def _smooth(sums: np.ndarray) -> np.ndarray:
    """Smooth the last three axes; values outside the grid are 0."""
    sigma = [0.0] * (sums.ndim - 3) + [_SIGMA] * 3
    return gaussian_filter(sums, sigma, mode="constant")
