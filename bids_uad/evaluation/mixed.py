"""Linear models of scans that share participants and scanners."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import optimize
from statsmodels.tools.numdiff import approx_fprime, approx_hess

MAX_DEVIATION = 100.0
"""Largest standard deviation of a random intercept that is tried, in residual standard deviations."""


@dataclass(frozen=True)
class Estimates:
    """Coefficients of a linear model with what their intervals need.

    Parameters
    ----------
    params : numpy.ndarray, shape (k,)
        Coefficients.
    covariance : numpy.ndarray, shape (k, k)
        Of the coefficients.
    df : numpy.ndarray, shape (k,)
        Degrees of freedom of the t distribution of each coefficient.
    scanner_variance, residual_variance : float
        Variance between scanners (0 where they are no random effect), and of the residuals.
    """

    params: np.ndarray
    covariance: np.ndarray
    df: np.ndarray
    scanner_variance: float
    residual_variance: float


class CrossedModel:
    """Linear model with random intercepts of participants, and of scanners, crossed.

    Participants with a single row make no difference between their own variance and that of the residuals; where
    all have one, they have no intercept.

    Parameters
    ----------
    y : numpy.ndarray, shape (n,)
        Outcome.
    x : numpy.ndarray, shape (n, k)
        Fixed effects, with the constant.
    participants : numpy.ndarray of int, shape (n,)
        Participant of each row, 0 to their number minus one.
    scanners : numpy.ndarray of int, shape (n,), optional
        Scanner of each row, likewise; without, scanners have no random intercept.
    """

    def __init__(
        self, y: np.ndarray, x: np.ndarray, participants: np.ndarray, scanners: np.ndarray | None = None
    ) -> None:
        self.x, self.y, self.participants = x, y, participants
        dummies = np.empty((len(y), 0)) if scanners is None else np.eye(scanners.max() + 1)[scanners]
        columns = np.column_stack([x, y, dummies])
        self._n_scanners = dummies.shape[1]
        self._products = columns.T @ columns
        self._sizes = np.bincount(participants)
        self._sums = np.zeros((len(self._sizes), columns.shape[1]))
        np.add.at(self._sums, participants, columns)
        self.repeated = bool((self._sizes > 1).any())

    def _weighted(self, ratios: np.ndarray) -> tuple[np.ndarray, float]:
        """Cross-products of `[x, y]` weighted by the inverse of V / residual variance, and log |V| of it."""
        participant, scanner = ratios
        weight = participant / (1 + self._sizes * participant)
        products = self._products - self._sums.T @ (weight[:, None] * self._sums)
        determinant = np.log1p(self._sizes * participant).sum()
        own = self.x.shape[1] + 1
        if self._n_scanners and scanner > 0:
            inner = np.eye(self._n_scanners) + scanner * products[own:, own:]
            cross = products[:own, own:]
            determinant += np.linalg.slogdet(inner)[1]
            return products[:own, :own] - scanner * cross @ np.linalg.solve(inner, cross.T), determinant
        return products[:own, :own], determinant

    def _deviance(self, ratios: np.ndarray, variance: float | None = None) -> float:
        """Minus twice the restricted log likelihood, but for a constant; the residual variance profiled out."""
        products, determinant = self._weighted(ratios)
        k = self.x.shape[1]
        information = products[:k, :k]
        rest = products[k, k] - products[k, :k] @ np.linalg.solve(information, products[:k, k])
        freedom = len(self.y) - k
        determinant += np.linalg.slogdet(information)[1]
        if variance is None:
            return freedom * np.log(rest) + determinant
        return freedom * np.log(variance) + rest / variance + determinant

    @cached_property
    def ratios(self) -> np.ndarray:
        """Variances of participants and of scanners divided by that of the residuals, (2,), by REML."""
        free = np.array([self.repeated, self._n_scanners > 0])
        ratios = np.zeros(2)
        if free.any():

            def deviance(deviations: np.ndarray) -> float:
                ratios[free] = deviations**2
                return self._deviance(ratios)

            bounds = [(0.0, MAX_DEVIATION)] * int(free.sum())
            found = optimize.minimize(deviance, np.full(len(bounds), 0.7), bounds=bounds, method="L-BFGS-B")
            ratios[free] = np.where(found.x < 1e-4, 0.0, found.x) ** 2
        return ratios

    def fit(self) -> Estimates:
        """Estimate by restricted maximum likelihood.

        Returns
        -------
        Estimates
            The degrees of freedom are Satterthwaite's, from the observed information of the variances; variances
            that are zero are taken as known.
        """
        n, k = self.x.shape
        products, _ = self._weighted(self.ratios)
        params = np.linalg.solve(products[:k, :k], products[:k, k])
        variance = float((products[k, k] - products[k, :k] @ params) / (n - k))
        covariance = variance * np.linalg.inv(products[:k, :k])
        free = self.ratios > 0
        logs = np.log([variance, *(variance * self.ratios[free])])

        def unpack(values: np.ndarray) -> tuple[np.ndarray, float]:
            ratios = np.zeros(2)
            ratios[free] = np.exp(values[1:] - values[0])
            return ratios, float(np.exp(values[0]))

        def log_variances(values: np.ndarray) -> np.ndarray:
            ratios, residual = unpack(values)
            return np.log(residual * np.diag(np.linalg.inv(self._weighted(ratios)[0][:k, :k])))

        # Var(log v) by the delta method; a variance v whose logarithm has variance s has 2 / s degrees of freedom.
        information = approx_hess(logs, lambda values: self._deviance(*unpack(values))) / 2
        slopes = np.atleast_2d(approx_fprime(logs, log_variances, centered=True))
        spread = np.einsum("ij,jk,ik->i", slopes, np.linalg.pinv(information, hermitian=True), slopes)
        df = np.clip(2 / np.maximum(spread, 1e-12), 1.0, n - k)
        return Estimates(params, covariance, df, variance * self.ratios[1], variance)

    def fit_robust(self) -> Estimates:
        """Estimate by weighted least squares, with a covariance that is robust and clustered by participant.

        Returns
        -------
        Estimates
            The weights are those of the random intercept of participants; without repeated participants these
            are ordinary least squares, and the covariance is HC3. The degrees of freedom are the participants
            minus the coefficients.

        Notes
        -----
        CR3, the cluster jackknife without its factor (MacKinnon, Nielsen and Webb 2023, Journal of Applied
        Econometrics 38).
        """
        x, y = self.whitened(self.x), self.whitened(self.y[:, None])[:, 0]
        inverse = np.linalg.inv(x.T @ x)
        params = inverse @ (x.T @ y)
        residuals = y - x @ params
        leverage = np.einsum("ij,jk,ik->i", x, inverse, x)
        scores = np.zeros((len(self._sizes), x.shape[1]))
        alone = self._sizes[self.participants] == 1
        scores[self.participants[alone]] = x[alone] * (residuals / (1 - leverage))[alone, None]
        for who in np.flatnonzero(self._sizes > 1):
            own = self.participants == who
            hat = x[own] @ inverse @ x[own].T
            scores[who] = x[own].T @ np.linalg.solve(np.eye(len(hat)) - hat, residuals[own])
        covariance = inverse @ (scores.T @ scores) @ inverse
        freedom = len(self._sizes) - x.shape[1]
        variance = float(residuals @ residuals / (len(y) - x.shape[1]))
        return Estimates(params, covariance, np.full(x.shape[1], float(freedom)), 0.0, variance)

    def whitened(self, table: np.ndarray) -> np.ndarray:
        """Take off from each row the part of the participant's mean that makes rows independent, (n, m)."""
        share = 1 - 1 / np.sqrt(1 + self._sizes * self.ratios[0])
        sums = np.zeros((len(self._sizes), table.shape[1]))
        np.add.at(sums, self.participants, table)
        return table - (share / self._sizes)[self.participants, None] * sums[self.participants]
