"""Linear mixed models with crossed random intercepts of participants and scanners."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from scipy import optimize
from statsmodels.tools.numdiff import approx_fprime, approx_hess

MAX_RATIO = 1e4
"""Upper bound of the variance of a random intercept, relative to the residual variance."""
MIN_RATIO = 1e-8
"""Relative variance of a random intercept below which it is set to zero."""


class CrossedModel:
    """Linear mixed model with crossed random intercepts, fitted by restricted maximum likelihood (REML).

    Parameters
    ----------
    y : numpy.ndarray, shape (n,)
        Outcome.
    x : numpy.ndarray, shape (n, k)
        Fixed effects, including the constant.
    participants : numpy.ndarray of int, shape (n,)
        Participant of each row, numbered from 0. If each participant has a single row, there is no random
        intercept of participants, since it could not be distinguished from the residuals.
    scanners : numpy.ndarray of int, shape (n,), optional
        Scanner of each row, numbered from 0. If None, scanners have no random intercept.

    Attributes
    ----------
    params : numpy.ndarray, shape (k,)
        Coefficients of the fixed effects.
    covariance : numpy.ndarray, shape (k, k)
        Covariance of the coefficients.
    participant_variance, scanner_variance, residual_variance : float
        Variances of the random intercepts and of the residuals.

    Notes
    -----
    The model of Laird and Ware 1982 (Biometrics 38). The likelihood depends on the data through the
    cross-products of all columns and their sums over each participant only, so that the cost of an evaluation
    grows with the number of participants.
    """

    def __init__(
        self, y: np.ndarray, x: np.ndarray, participants: np.ndarray, scanners: np.ndarray | None = None
    ) -> None:
        self._participants, self._n, self._k = participants, len(y), x.shape[1]
        dummies = np.empty((len(y), 0)) if scanners is None else np.eye(scanners.max() + 1)[scanners]
        columns = np.column_stack([x, y, dummies])
        self._n_scanners = dummies.shape[1]
        self._residual_df = max(self._n - int(np.linalg.matrix_rank(np.column_stack([x, dummies]))), 1)
        self._products = columns.T @ columns
        self._sizes = np.bincount(participants)
        self._sums = self._summed(columns)
        self._free = np.array([bool((self._sizes > 1).any()), self._n_scanners > 0])

        products, _ = self._weighted(self.ratios)
        k = self._k
        self.params = np.linalg.solve(products[:k, :k], products[:k, k])
        self.residual_variance = float((products[k, k] - products[k, :k] @ self.params) / (self._n - k))
        self.covariance = self.residual_variance * np.linalg.inv(products[:k, :k])
        self.participant_variance, self.scanner_variance = self.residual_variance * self.ratios

    def degrees_of_freedom(self, contrasts: np.ndarray) -> np.ndarray:
        """Compute the degrees of freedom of linear combinations of the coefficients.

        Parameters
        ----------
        contrasts : numpy.ndarray, shape (m, k)
            Weights of the coefficients in each combination.

        Returns
        -------
        numpy.ndarray, shape (m,)
            Satterthwaite degrees of freedom, from the observed information of the variances (Giesbrecht and
            Burns 1985, Biometrics 41). They are limited to between 1 and the residual degrees of freedom with
            scanners as fixed effects, since they are too large in small samples. A variance that is estimated
            as zero is treated as known.
        """
        free = self.ratios > 0
        logs = np.log(self.residual_variance * np.array([1.0, *self.ratios[free]]))

        def unpack(values: np.ndarray) -> tuple[np.ndarray, float]:
            ratios = np.zeros(2)
            ratios[free] = np.exp(values[1:] - values[0])
            return ratios, float(np.exp(values[0]))

        def log_variances(values: np.ndarray) -> np.ndarray:
            ratios, residual = unpack(values)
            inverse = np.linalg.inv(self._weighted(ratios)[0][: self._k, : self._k])
            return np.log(residual * np.einsum("ij,jk,ik->i", contrasts, inverse, contrasts))

        # The logarithm of a variance estimate with f degrees of freedom has a variance of about 2 / f.
        information = approx_hess(logs, lambda values: self._deviance(*unpack(values))) / 2
        slopes = approx_fprime(logs, log_variances, centered=True).reshape(len(contrasts), len(logs))
        variance = np.einsum("ij,jk,ik->i", slopes, np.linalg.pinv(information, hermitian=True), slopes)
        return np.clip(2 / np.maximum(variance, 2 / self._n), 1.0, self._residual_df)

    def whiten(self, table: np.ndarray) -> np.ndarray:
        """Remove the correlation between the rows of a participant by subtracting a part of their mean.

        Parameters
        ----------
        table : numpy.ndarray, shape (n, m)
            Columns of data, one row per observation.

        Returns
        -------
        numpy.ndarray, shape (n, m)
            Transformed columns, for which ordinary least squares equal generalised least squares of the model
            with random intercepts of participants.
        """
        part = (1 - 1 / np.sqrt(1 + self._sizes * self.ratios[0])) / self._sizes
        return table - (part[:, None] * self._summed(table))[self._participants]

    @cached_property
    def ratios(self) -> np.ndarray:
        """Variances of the participant and scanner intercepts, relative to the residual variance."""
        ratios = np.zeros(2)
        if self._free.any():

            def deviance(deviations: np.ndarray) -> float:
                ratios[self._free] = deviations**2
                return self._deviance(ratios)

            bounds = [(0.0, np.sqrt(MAX_RATIO))] * int(self._free.sum())
            found = optimize.minimize(deviance, np.full(len(bounds), 0.7), bounds=bounds, method="L-BFGS-B")
            ratios[self._free] = found.x**2
        return np.where(ratios < MIN_RATIO, 0.0, ratios)

    def _summed(self, table: np.ndarray) -> np.ndarray:
        """Sum the rows of each participant, shape (n_participants, m)."""
        sums = np.zeros((len(self._sizes), table.shape[1]))
        np.add.at(sums, self._participants, table)
        return sums

    def _weighted(self, ratios: np.ndarray) -> tuple[np.ndarray, float]:
        """Return [x, y]' V^-1 [x, y] and log |V|, where V is the covariance at residual variance 1."""
        participant, scanner = ratios
        own = self._k + 1
        weight = participant / (1 + self._sizes * participant)
        products = self._products - self._sums.T @ (weight[:, None] * self._sums)
        determinant = float(np.log1p(self._sizes * participant).sum())
        inner = np.eye(self._n_scanners) + scanner * products[own:, own:]
        cross = products[:own, own:]
        determinant += float(np.linalg.slogdet(inner)[1])
        return products[:own, :own] - scanner * cross @ np.linalg.solve(inner, cross.T), determinant

    def _deviance(self, ratios: np.ndarray, residual_variance: float | None = None) -> float:
        """Return -2 log restricted likelihood up to a constant; by default at the best residual variance."""
        products, determinant = self._weighted(ratios)
        k, freedom = self._k, self._n - self._k
        information = products[:k, :k]
        rest = products[k, k] - products[k, :k] @ np.linalg.solve(information, products[:k, k])
        determinant += float(np.linalg.slogdet(information)[1])
        if residual_variance is None:
            return float(freedom * np.log(rest) + determinant)
        return float(freedom * np.log(residual_variance) + rest / residual_variance + determinant)
