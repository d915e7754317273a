"""A normative reference: what scores healthy people have, by place, age, sex and brain volume.

Normative modelling (Marquand et al. 2016, Biological Psychiatry 80) in the terms of PCNtoolkit (covariates,
Z). PCNtoolkit 1.3 itself holds all subjects in memory, fits a model and writes a JSON file for each response,
and brings PyMC, numba and Jupyter along; for a million voxels, sums that grow scan by scan do it with NumPy.

Of the score s of a voxel it is taken that healthy people have s = x'b + e, x = (1, age, sex, brain volume),
with a variance of e that is linear in age: what is rare in the young may be common in the old. Brain volume
is there because the way to the atlas is rigid, so that in a large head other tissue lies at a place than in
a small one. The sums of least squares are gathered in blocks of `BLOCK` mm and smoothed by a Gaussian
kernel of `FWHM` mm before they are solved (local regression): coefficients and spread vary smoothly, and
places that few brains reach borrow from their neighbours. The sums of one person can be taken out again,
which leaves exactly what the others alone would have given: no person need be judged by a reference that
knows that person.
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
"""Edge of a block, mm."""
FWHM = 40.0
"""Of the kernel, mm."""
FLOOR = 0.3
"""Lowest spread of a place, as a share of that of the whole brain."""
MAX_GROWTH = 0.3
"""Most that the variance may change with ten years, as a share of that at the mean age."""
VARIANCES = (0.2, 3.0)
"""Least and most that it may become so."""
MIN_SUBJECTS = 20
"""Healthy people for whom the coefficients can be told."""
TERMS = ("intercept", "age", "sex", "brain volume")
VOLUMES = (
    "location at the means of the covariates: score",
    "age: score per 10 years",
    "sex: score, male minus female",
    "brain volume: score per 100 mL",
    "spread at the mean age: score",
    "growth of the variance: share per 10 years",
)
FORMULA = "Z = max(0, (score - location) / spread)"
TYPICAL_VOLUME = 1400.0
"""Brain volume in mL that volumes are told from; any other would do."""
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
    """Ages and sexes of the healthy people behind a reference; None where nobody's is known.

    Parameters
    ----------
    age_mean : float or None
        Years.
    age_range : tuple of float or None
        Youngest and oldest.
    sex_mean : float or None
        Mean of sexes told as 0.5 (male) and -0.5 (female).
    """

    age_mean: float | None
    age_range: tuple[float, float] | None
    sex_mean: float | None

    @classmethod
    def of(cls, people: Sequence[Mapping[str, float | None]]) -> HealthyCohort:
        """Sum up people, each with `age` and `sex` (None where it is not known)."""
        ages = [person["age"] for person in people if person["age"] is not None]
        sexes = [person["sex"] for person in people if person["sex"] is not None]
        return cls(
            float(np.mean(ages)) if ages else None,
            (float(min(ages)), float(max(ages))) if ages else None,
            float(np.mean(sexes)) if sexes else None,
        )

    def place(self, age: float | None, sex: float | None) -> tuple[dict[str, float | None], list[str]]:
        """Say which age and sex a person is given, and why where these are not the person's own.

        Parameters
        ----------
        age : float or None
            Years.
        sex : float or None
            0.5 male, -0.5 female.

        Returns
        -------
        used : dict
            `age` and `sex`: within the cohort's range, or its mean; None where the cohort does not know.
        remarks : list of str
        """
        used: dict[str, float | None] = {"age": self.age_mean, "sex": self.sex_mean}
        remarks = []
        if self.age_range is not None:
            low, high = self.age_range
            if age is None:
                remarks.append(
                    f"age is not known: the mean of the reference ({self.age_mean:.0f} years) stands for it"
                )
            else:
                used["age"] = float(np.clip(age, low, high))
                if used["age"] != age:
                    remarks.append(
                        f"age is outside the reference ({low:.0f} to {high:.0f} years): its end stands for it"
                    )
        if self.sex_mean is not None:
            if sex is None:
                remarks.append("sex is not known: the mean of the reference stands for it")
            else:
                used["sex"] = sex
        return used, remarks

    def row(self, age: float | None, sex: float | None, brain: np.ndarray) -> np.ndarray:
        """Give a person's covariates, centred.

        Parameters
        ----------
        age, sex : float or None
        brain : numpy.ndarray of bool
            Brain mask on the SRI24 grid.

        Returns
        -------
        numpy.ndarray of float64, shape (4,)
            In the order of `TERMS`.
        """
        used, _ = self.place(age, sex)
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
        """Give what :meth:`read` takes back, as JSON types."""
        return {"age_mean": self.age_mean, "age_range": self.age_range, "sex_mean": self.sex_mean}

    @classmethod
    def read(cls, description: Mapping[str, Any]) -> HealthyCohort:
        """Take back what :meth:`describe` gave."""
        ages = description["age_range"]
        return cls(
            description["age_mean"], None if ages is None else (ages[0], ages[1]), description["sex_mean"]
        )


@dataclass(frozen=True)
class NormativeReference:
    """What healthy people have.

    Parameters
    ----------
    cohort : HealthyCohort
    coefficients : numpy.ndarray of float32, shape (4, *GRID)
        Of `TERMS`.
    spread : numpy.ndarray of float32, shape GRID
        Standard deviation of a voxel's score about the location, at the mean age.
    growth : numpy.ndarray of float32, shape GRID
        Change of its square with ten years, as a share.
    """

    cohort: HealthyCohort
    coefficients: np.ndarray
    spread: np.ndarray
    growth: np.ndarray

    def deviations(
        self, scores: np.ndarray, brain: np.ndarray, *, age: float | None, sex: float | None
    ) -> np.ndarray:
        """Turn scores into Z scores; those below 0 become 0, for what is less than normal is no anomaly.

        Parameters
        ----------
        scores : numpy.ndarray of float, shape SHAPE
        brain : numpy.ndarray of bool, shape SHAPE
        age, sex : float or None
            See `HealthyCohort.place`.

        Returns
        -------
        numpy.ndarray of float32, shape SHAPE
            0 outside the brain; within, a monotone function of the score at every voxel.
        """
        x = self.cohort.row(age, sex, brain)
        location = np.tensordot(x, self.coefficients, 1)
        spread = self.spread * np.sqrt(np.clip(1 + self.growth * x[TERMS.index("age")], *VARIANCES))
        voxels = np.nonzero(brain)
        places = [(axis + 0.5) / BLOCK - 0.5 for axis in voxels]
        location, spread = (map_coordinates(v, places, order=1, mode="nearest") for v in (location, spread))
        z = np.zeros(scores.shape, dtype=np.float32)
        z[voxels] = np.maximum((scores[voxels] - location) / spread, 0)
        return z

    def describe(self) -> dict[str, Any]:
        """Say what the reference is, for ``calibration.json``."""
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
            "spread_floor": FLOOR,
            "variance_limits": list(VARIANCES),
        }

    def write(self, path: Path) -> None:
        """Write `VOLUMES` as one NIfTI image of float32, shape (*GRID, 6)."""
        volumes = np.stack([*self.coefficients, self.spread, self.growth], axis=-1)
        # Eleven digits after the binary point say more than the cohort does, and make a small file.
        mantissa, exponent = np.frexp(volumes)
        rounded = np.ldexp(np.round(mantissa * 2**11) / 2**11, exponent).astype(np.float32)
        save_image(make_image(rounded, GRID_AFFINE, np.float32, code=2), path)

    @classmethod
    def read(cls, path: Path, description: Mapping[str, Any]) -> NormativeReference:
        """Read what :meth:`write` wrote.

        Parameters
        ----------
        path : pathlib.Path
        description : mapping
            What `describe` gave.

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
    """Gathers healthy maps; memory does not grow with their number.

    Parameters
    ----------
    cohort : HealthyCohort
        Whom they belong to.
    """

    def __init__(self, cohort: HealthyCohort) -> None:
        self.cohort = cohort
        # Each twice: as they are, and weighted with age.
        self._xx = np.zeros((2, len(TERMS), len(TERMS), *GRID))
        self._xy = np.zeros((2, len(TERMS), *GRID))
        self._yy = np.zeros((2, *GRID))

    def add(self, scores: np.ndarray, brain: np.ndarray, *, age: float | None, sex: float | None) -> None:
        """Take in the map of a healthy person; shapes as in `NormativeReference.deviations`."""
        self._gather(1.0, scores, brain, age, sex)

    def remove(self, scores: np.ndarray, brain: np.ndarray, *, age: float | None, sex: float | None) -> None:
        """Take a map out again."""
        self._gather(-1.0, scores, brain, age, sex)

    def _gather(
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
        """Solve for coefficients and spread.

        Raises
        ------
        ValueError
            If nothing was gathered.
        ModelError
            If the scores do not vary.
        """
        sums = (self._xx, self._xy, self._yy)
        total = self._xx[0, 0, 0].sum()
        if not total > 0:
            raise ValueError("no healthy map was gathered")
        whole = _solve(*(part.sum((-3, -2, -1)) for part in sums))
        # Squares are summed in double precision: less than this is the rounding of a constant.
        if not whole[1] > max(1e-12 * self._yy[0].sum() / total, np.finfo(np.float32).tiny):
            raise ModelError("the scores of the healthy scans do not vary; a deviation from them has no unit")
        smooth = [_smooth(part) for part in sums]
        local = _solve(*(np.moveaxis(part, (-3, -2, -1), (0, 1, 2)) for part in smooth))
        # Where no brain reaches, even with its neighbours, the whole brain stands.
        reached = smooth[0][0, 0, 0] > total / np.prod(GRID) * 1e-3
        coefficients = np.where(reached[..., None], local[0], whole[0])
        variance, growth = (np.where(reached, *pair) for pair in zip(local[1:], whole[1:], strict=True))
        spread = np.sqrt(np.maximum(variance, FLOOR**2 * whole[1]))
        return NormativeReference(
            self.cohort,
            np.moveaxis(coefficients, -1, 0).astype(np.float32),
            spread.astype(np.float32),
            np.clip(growth, -MAX_GROWTH, MAX_GROWTH).astype(np.float32),
        )


def _solve(xx: np.ndarray, xy: np.ndarray, yy: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Least squares from sums, of squared residuals on age in turn.

    A covariate that does not vary has a coefficient of 0.

    Parameters
    ----------
    xx, xy, yy : numpy.ndarray, shapes (..., 2, p, p), (..., 2, p) and (..., 2)
        Sums as they are, and weighted with age.

    Returns
    -------
    coefficients : numpy.ndarray, shape (..., p)
    variance, growth : numpy.ndarray, shape (...)
        Of the residuals at age 0, and its change with age as a share.
    """
    tiny = np.finfo(float).tiny
    weight = np.maximum(xx[..., 0, 0, 0], tiny)
    ridge = _RIDGE * weight[..., None, None] * np.eye(xx.shape[-1])
    ridge[..., 0, 0] = tiny
    found = np.linalg.solve(xx[..., 0, :, :] + ridge, xy[..., 0, :, None])[..., 0]
    fitted = np.einsum("...i,...kij,...j->...k", found, xx, found)
    squares = yy - 2 * np.einsum("...ki,...i->...k", xy, found) + fitted
    age, age_squared = xx[..., 0, 0, 1], xx[..., 0, 1, 1] + _RIDGE * weight
    slope = (squares[..., 1] - age / weight * squares[..., 0]) / (age_squared - age**2 / weight)
    variance = np.maximum((squares[..., 0] - slope * age) / weight, tiny)
    return found, variance, slope / variance


def _smooth(sums: np.ndarray) -> np.ndarray:
    """Smooth the last three axes; outside the grid there is nothing."""
    sigma = [0.0] * (sums.ndim - 3) + [_SIGMA] * 3
    return gaussian_filter(sums, sigma, mode="constant")
