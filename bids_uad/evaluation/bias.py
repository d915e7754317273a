"""Bias models: regression of the false-positive rate and of Dice on age, sex, brain volume and scanner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import statsmodels.api as sm
from scipy import stats
from scipy.special import expit

from bids_uad.dataset.raw_metadata import SEXES
from bids_uad.evaluation.bootstrap import CONFIDENCE
from bids_uad.evaluation.comparison import corrected
from bids_uad.evaluation.mixed import CrossedModel
from bids_uad.evaluation.subjects import HEALTHY, LESION

ROLES = {"fpr": HEALTHY, "dice": LESION}
PRIOR_VOXELS = 50.0
"""Pseudo-count added to both sides of the odds, so that a brain without false positives has finite log odds
(50 voxels are 50 mm3)."""
MIN_PARTICIPANTS = 20
"""Minimum number of participants for a model."""
MIN_PER_COEFFICIENT = 5
"""Minimum number of participants per coefficient."""
MIN_PER_LEVEL = 5
"""Minimum number of participants of a scanner with a coefficient of its own."""
MIN_RANDOM_LEVELS = 6
"""Minimum number of scanners for a random effect; with fewer, each scanner has a coefficient."""
MIN_REPEATED = 5
"""Minimum number of participants on several scanners for a random intercept of participants: with three,
tests of scanners at a nominal level of 5 % have a type I error rate of 7 to 8 %."""
MIN_VARIANCE_RATIO = 2e-3
"""Variance between scanners, relative to the variance within, below which it is treated as zero."""
MAX_R2 = 0.9
"""Maximum R2 of a covariate given the others (a variance inflation factor of 10)."""

LINEAR = "linear, HC3"
REPEATED = "mixed, random participant"
MIXED = "mixed, random scanner"
CROSSED = "mixed, random scanner and participant"

COLUMNS: dict[str, dict[str, Any]] = {
    "detector": {"Description": "Anomaly detector"},
    "modality": {"Description": "Modality of the images"},
    "outcome": {
        "Description": "Modelled outcome",
        "Levels": {
            "fpr": "Log odds of a false positive in a healthy brain voxel at the fixed threshold "
            f"(pseudo-count of {PRIOR_VOXELS:g} voxels)",
            "dice": "Dice at the fixed threshold, lesion scans",
        },
    },
    "term": {
        "Description": "Covariate; 'scanner: NAME' is the difference of a scanner from the mean of scanners"
    },
    "unit": {"Description": "Change of the covariate to which the estimate refers"},
    "n_participants": {"Description": "Number of participants in the model"},
    "n_scans": {
        "Description": "Number of images in the model; images of a participant on one scanner are averaged"
    },
    "model": {
        "Description": "Type of model",
        "Levels": {
            LINEAR: "Ordinary least squares, heteroscedasticity-robust intervals (HC3), t distribution; also "
            "used if the variance between six or more scanners is zero",
            REPEATED: "Linear mixed model with a random intercept of participants, used if some were scanned "
            "on several scanners (REML, t distribution with Satterthwaite degrees of freedom)",
            MIXED: "Linear mixed model with a random intercept of scanners (REML, Satterthwaite)",
            CROSSED: "Linear mixed model with crossed random intercepts of scanners and participants (REML, "
            "Satterthwaite)",
        },
    },
    "estimate": {
        "Description": "Coefficient, adjusted for all other covariates; for the term 'scanner (SD)', the "
        "standard deviation between scanners"
    },
    "ci_low": {"Description": "Lower limit of the 95 % confidence interval of estimate"},
    "ci_high": {"Description": "Upper limit of the 95 % confidence interval of estimate"},
    "odds_ratio": {"Description": "exp(estimate), the odds ratio of a false positive; n/a for Dice"},
    "p": {
        "Description": "Two-sided p value; for 'scanner (SD)', of an F test of differences between scanners"
    },
    "p_fdr": {"Description": "p, corrected over the whole table (Benjamini and Hochberg)"},
}


@dataclass(frozen=True)
class Effect:
    """Effect of one covariate on the outcome, at the means of the other covariates, for a figure.

    Parameters
    ----------
    detector, modality, outcome, term : str
        Row of the table of coefficients.
    values : numpy.ndarray, shape (n,)
        Covariate in the units of its column.
    partial : numpy.ndarray, shape (n,)
        Outcome of each participant (a fraction), adjusted to the means of the other covariates.
    line : numpy.ndarray, shape (m, 4)
        Covariate, expected outcome, and lower and upper limit of its 95 % confidence band.
    """

    detector: str
    modality: str
    outcome: str
    term: str
    values: np.ndarray
    partial: np.ndarray
    line: np.ndarray


@dataclass(frozen=True)
class Bias:
    """Results of the bias models.

    Parameters
    ----------
    coefficients : pandas.DataFrame
        Columns of `COLUMNS`.
    effects : list of Effect
        Effects of the covariates for figures.
    remarks : list of str
        Models and covariates that were left out, with the reason.
    """

    coefficients: pd.DataFrame
    effects: list[Effect]
    remarks: list[str]


@dataclass(frozen=True)
class Covariate:
    """Covariate of the models.

    Parameters
    ----------
    name : str
        Name in tables and figures.
    unit : str
        Change to which the coefficient refers, in words.
    column : str
        Column of the table of subjects.
    step : float, default=1.0
        Change to which the coefficient refers, in units of the column.
    """

    name: str
    unit: str
    column: str
    step: float = 1.0


AGE = Covariate("age", "10 years", "age", 10.0)
SEX = Covariate("sex", "male against female", "sex")
BRAIN_VOLUME = Covariate("brain volume", "100 mL", "brain_volume_mm3", 1e5)
LESION_VOLUME = Covariate("lesion volume", "tenfold", "lesion_volume_mm3")
COVARIATES = {
    "fpr": (AGE, SEX, BRAIN_VOLUME),
    "dice": (AGE, SEX, BRAIN_VOLUME, LESION_VOLUME),
}


def model_bias(subjects: pd.DataFrame) -> Bias:
    """Fit models of the false-positive rate and of Dice for each detector and modality.

    Parameters
    ----------
    subjects : pandas.DataFrame
        One row per image and detector: columns of :data:`bids_uad.evaluation.subjects.COLUMNS` and of
        participants.tsv, of which `age`, `sex` and `scanner` are used if present.

    Returns
    -------
    Bias
        Coefficients, effects and remarks.
    """
    rows: list[dict[str, Any]] = []
    effects: list[Effect] = []
    remarks: dict[str, list[str]] = {}
    for (detector, modality), scans in subjects.groupby(["detector", "modality"], sort=True):
        for outcome, role in ROLES.items():
            chosen = scans[(scans["role"] == role) & scans[outcome].notna()]
            if chosen.empty:
                continue
            labels = {"detector": str(detector), "modality": str(modality), "outcome": outcome}
            try:
                design = make_design(chosen, outcome)
            except NotModelledError as reason:
                remarks.setdefault(str(reason), []).append(f"{detector} {modality}")
                continue
            for remark in design.remarks:
                remarks.setdefault(remark, []).append(f"{detector} {modality}")
            coefficients, lines = fit(design)
            rows += [labels | row for row in coefficients]
            effects += [Effect(**labels, **line) for line in lines]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    table["p_fdr"] = corrected(table["p"], "fdr_bh")
    return Bias(
        table,
        effects,
        [f"{text.removesuffix('.')} ({', '.join(models)})." for text, models in remarks.items()],
    )


class NotModelledError(Exception):
    """A model cannot be fitted; the message is the reason."""


@dataclass(frozen=True)
class Design:
    """Data of one model, with a row for each participant and scanner.

    Parameters
    ----------
    outcome : {"fpr", "dice"}
        Modelled outcome.
    y : numpy.ndarray, shape (n,)
        Outcome on the scale of the model (log odds for `fpr`).
    participants : numpy.ndarray of int, shape (n,)
        Participant of each row, numbered from 0.
    n_scans : int
        Number of images that the rows are averaged from.
    x : pandas.DataFrame, shape (n, k)
        Centred covariates, one column each.
    means : mapping of str to float
        Means of the covariates before centring.
    covariates : sequence of Covariate
        Covariates in the order of the columns of `x`.
    scanners : pandas.Series or None
        Scanner of each row; None with fewer than two scanners.
    remarks : list of str
        Covariates and scanners that were left out, with the reason.
    """

    outcome: str
    y: np.ndarray
    participants: np.ndarray
    n_scans: int
    x: pd.DataFrame
    means: Mapping[str, float]
    covariates: Sequence[Covariate]
    scanners: pd.Series | None
    remarks: list[str]

    @property
    def n_participants(self) -> int:
        """Number of participants."""
        return int(self.participants.max()) + 1

    @property
    def repeated(self) -> bool:
        """Whether any participant has several rows."""
        return self.n_participants < len(self.y)


def make_design(scans: pd.DataFrame, outcome: str) -> Design:
    """Arrange the scans of one detector and modality for a regression.

    Parameters
    ----------
    scans : pandas.DataFrame
        Images of one detector and modality.
    outcome : {"fpr", "dice"}
        Modelled outcome.

    Returns
    -------
    Design
        Data of the model.

    Raises
    ------
    NotModelledError
        If there are too few participants, or the covariates are collinear.
    """
    what = "the false-positive rate" if outcome == "fpr" else "Dice"
    table = _outcome_and_covariates(scans, outcome)
    _require(table["participant"].nunique(), MIN_PARTICIPANTS, what)
    remarks, used = [], []
    for covariate in COVARIATES[outcome]:
        known = table[covariate.name].notna()
        if (
            table.loc[known, "participant"].nunique() < MIN_PARTICIPANTS
            or table.loc[known, covariate.name].nunique() < 2
        ):
            if known.any() or covariate.column not in scans:
                remarks.append(
                    f"The model of {what} does not include {covariate.name}, which is unknown or constant."
                )
            continue
        used.append(covariate)
    names = [covariate.name for covariate in used]
    table = table.dropna(subset=names)
    if "scanner" in table and table["scanner"].nunique() > 1:
        table, left_out = _usable_scanners(table.dropna(subset="scanner"), what)
        remarks += left_out
    scanners = None
    if "scanner" in table and table["scanner"].nunique() > 1:
        scanners = table["scanner"].reset_index(drop=True)
    elif not len(names):
        raise NotModelledError(
            f"No bias model for {what}: age, sex, brain volume and scanner are unknown or constant."
        )
    else:
        table = _averaged(table, ["participant"])
    fixed_levels = 0 if scanners is None or _is_random(scanners) else scanners.nunique() - 1
    minimum = max(MIN_PARTICIPANTS, MIN_PER_COEFFICIENT * (1 + len(names) + fixed_levels))
    participants = pd.factorize(table["participant"])[0]
    _require(len(set(participants)), minimum, what)
    means = {name: float(table[name].mean()) for name in names}
    x = (table[names] - pd.Series(means, dtype=float)).reset_index(drop=True)
    _check_collinearity(x, scanners, what)
    n_scans = int(table["n_scans"].sum())
    return Design(
        outcome, table["y"].to_numpy(float), participants, n_scans, x, means, used, scanners, remarks
    )


def _usable_scanners(table: pd.DataFrame, what: str) -> tuple[pd.DataFrame, list[str]]:
    """Drop small scanners, and all but one scanner of each participant if few were scanned on several."""
    remarks = []
    while True:
        sizes = table.groupby("scanner").size()
        # With a random effect, small scanners are kept: their estimates are shrunk towards the mean.
        small = [] if (sizes > 1).sum() >= MIN_RANDOM_LEVELS else sorted(sizes[sizes < MIN_PER_LEVEL].index)
        repeated = table.loc[table["participant"].duplicated(), "participant"].nunique()
        if small:
            table = table[~table["scanner"].isin(small)]
            remarks.append(
                f"The model of {what} excludes scanners with fewer than {MIN_PER_LEVEL} participants: "
                f"{', '.join(small)}."
            )
        elif 0 < repeated < MIN_REPEATED:
            most = table.sort_values("n_scans", ascending=False, kind="stable")
            table = most.drop_duplicates("participant").sort_index()
            remarks.append(
                f"The model of {what} includes only one scanner per participant, the one with most scans: "
                f"{repeated} participants on several scanners are too few to estimate the variance between "
                f"participants (minimum {MIN_REPEATED})."
            )
        else:
            return table, remarks


def _is_random(scanners: pd.Series) -> bool:
    """Return whether there are enough scanners for a random effect."""
    return scanners.nunique() >= MIN_RANDOM_LEVELS


def _require(n: int, minimum: int, what: str) -> None:
    """Raise NotModelledError if there are too few participants."""
    if n < minimum:
        raise NotModelledError(f"No bias model for {what}: {n} participants, at least {minimum} are needed.")


def _outcome_and_covariates(scans: pd.DataFrame, outcome: str) -> pd.DataFrame:
    """Return outcome and covariates of each participant (on each scanner), in the units of the model.

    Column `n_scans` is the number of images that a row is averaged from.
    """
    table = pd.DataFrame({"participant": scans["participant_id"], "n_scans": 1})
    if outcome == "fpr":
        voxels = scans["n_brain_voxels"] - scans["n_lesion_voxels"].fillna(0)
        positive = scans["fpr"] * voxels
        table["y"] = np.log((positive + PRIOR_VOXELS) / (voxels - positive + PRIOR_VOXELS))
    else:
        table["y"] = scans["dice"].astype(float)
    for covariate in COVARIATES[outcome]:
        table[covariate.name] = _column(scans, covariate)
    keys = ["participant"]
    if "scanner" in scans:
        table["scanner"] = scans["scanner"]
        keys.append("scanner")
    return _averaged(table, keys)


def _averaged(table: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Average the rows with the same keys, and sum their numbers of images."""
    numbers = table.select_dtypes("number").columns.union(keys)
    groups = table[numbers].groupby(keys, dropna=False, sort=True)
    return groups.mean().assign(n_scans=groups["n_scans"].sum()).reset_index()


def _column(scans: pd.DataFrame, covariate: Covariate) -> pd.Series:
    """Return a covariate in the units of the model, NaN if it is not known."""
    if covariate.column not in scans:
        return pd.Series(np.nan, index=scans.index)
    values = scans[covariate.column]
    if covariate is SEX:
        return values.map(SEXES).astype(float)
    values = pd.to_numeric(values, errors="coerce")
    if covariate is LESION_VOLUME:
        return np.log10(values.where(values > 0))
    return values / covariate.step


def _check_collinearity(x: pd.DataFrame, scanners: pd.Series | None, what: str) -> None:
    """Raise NotModelledError if the other covariates explain too much of the variance of one covariate."""
    dummies = pd.DataFrame(index=x.index)
    if scanners is not None:
        dummies = pd.get_dummies(scanners, drop_first=True, dtype=float)
    for name in x:
        others = pd.concat([x.drop(columns=name), dummies], axis=1)
        if others.shape[1] == 0:
            continue
        r2 = sm.OLS(x[name].to_numpy(), sm.add_constant(others.to_numpy())).fit().rsquared
        if r2 > MAX_R2:
            names = ", ".join([*x.columns.drop(name), *([] if scanners is None else ["scanner"])])
            raise NotModelledError(
                f"No bias model for {what}: {name} is collinear with {names} (R2 = {r2:.2f}, limit "
                f"{MAX_R2:.2f}); a cohort in which these vary independently is needed."
            )


def fit(design: Design) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Fit the linear or mixed model of a design.

    Parameters
    ----------
    design : Design
        Data of the model.

    Returns
    -------
    rows : list of dict
        Columns of `COLUMNS` from `term` on, without `p_fdr`.
    effects : list of dict
        Fields of `Effect` from `term` on.
    """
    mixed = design.scanners is not None and _is_random(design.scanners)
    return _fit_mixed(design) if mixed else _fit_linear(design)


def _fit_linear(design: Design) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Fit a model with a coefficient for each scanner, and random intercepts of participants if repeated."""
    codes, levels = _sum_coded(design.scanners, len(design.y))
    matrix = np.column_stack([np.ones(len(design.y)), design.x.to_numpy(), codes])
    contrasts = np.eye(matrix.shape[1])[1:]
    if levels:
        contrasts = np.vstack([contrasts, np.zeros(matrix.shape[1])])
        contrasts[-1, -codes.shape[1] :] = -1.0
    terms = [(covariate.name, covariate.unit) for covariate in design.covariates]
    terms += [(f"scanner: {level}", "against the mean scanner") for level in levels]
    if design.repeated:
        model = CrossedModel(design.y, matrix, design.participants)
        estimates = _Estimates(REPEATED, model.params, model.covariance, model.degrees_of_freedom(contrasts))
    else:
        result = sm.OLS(design.y, matrix).fit(cov_type="HC3", use_t=True)
        df = np.full(len(contrasts), result.df_resid)
        estimates = _Estimates(LINEAR, result.params, result.cov_params(), df)
    rows = [
        _row(design, *term, estimates, contrast, freedom)
        for term, contrast, freedom in zip(terms, contrasts, estimates.df, strict=True)
    ]
    residuals = design.y - matrix @ estimates.params
    return rows, _effects(design, estimates, residuals)


def _fit_mixed(design: Design) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Fit a model with random intercepts of scanners, and of participants if repeated."""
    matrix = np.column_stack([np.ones(len(design.y)), design.x.to_numpy()])
    model = CrossedModel(design.y, matrix, design.participants, pd.factorize(design.scanners)[0])
    scanner = _labels(design, "scanner (SD)", "standard deviation", CROSSED if design.repeated else MIXED)
    scanner |= {"estimate": np.sqrt(model.scanner_variance), "p": _scanner_p(design, matrix)}
    scanner |= dict.fromkeys(("ci_low", "ci_high", "odds_ratio"), np.nan)
    if model.scanner_variance < MIN_VARIANCE_RATIO * (model.participant_variance + model.residual_variance):
        # At a variance of zero the curvature of the likelihood gives no intervals.
        rows, effects = _fit_linear(replace(design, scanners=None))
        return [*rows, scanner], effects
    contrasts = np.eye(matrix.shape[1])[1:]
    df = model.degrees_of_freedom(contrasts)
    estimates = _Estimates(scanner["model"], model.params, model.covariance, df)
    rows = [
        _row(design, covariate.name, covariate.unit, estimates, contrast, freedom)
        for covariate, contrast, freedom in zip(design.covariates, contrasts, df, strict=True)
    ]
    return [*rows, scanner], _effects(design, estimates, design.y - matrix @ estimates.params)


@dataclass(frozen=True)
class _Estimates:
    """Type of a model, coefficients (the constant first), their covariance, and degrees of freedom.

    `df` has an entry for each row of the table, those of the covariates first.
    """

    model: str
    params: np.ndarray
    covariance: np.ndarray
    df: np.ndarray


def _scanner_p(design: Design, matrix: np.ndarray) -> float:
    """Test for differences between scanners: F test of the model with a coefficient for each scanner."""
    codes, _ = _sum_coded(design.scanners, len(design.y))
    full = np.column_stack([matrix, codes])
    model = CrossedModel(design.y, full, design.participants)
    y, full = model.whiten(design.y[:, None])[:, 0], model.whiten(full)
    restricted = sm.OLS(y, full[:, : matrix.shape[1]]).fit()
    return float(sm.OLS(y, full).fit().compare_f_test(restricted)[1])


def _sum_coded(scanners: pd.Series | None, n: int) -> tuple[np.ndarray, list[str]]:
    """Return sum-coded columns, whose coefficients are differences from the unweighted mean of scanners."""
    if scanners is None:
        return np.empty((n, 0)), []
    levels = sorted(scanners.unique())
    codes = pd.get_dummies(scanners, dtype=float)[levels].to_numpy()
    return codes[:, :-1] - codes[:, -1:], levels


def _labels(design: Design, term: str, unit: str, model: str) -> dict[str, Any]:
    counts = {"n_participants": design.n_participants, "n_scans": design.n_scans}
    return {"term": term, "unit": unit, **counts, "model": model}


def _row(
    design: Design, term: str, unit: str, estimates: _Estimates, contrast: np.ndarray, df: float
) -> dict[str, Any]:
    estimate = float(contrast @ estimates.params)
    error = float(np.sqrt(contrast @ estimates.covariance @ contrast))
    margin = stats.t.ppf(0.5 + CONFIDENCE / 2, df) * error
    return _labels(design, term, unit, estimates.model) | {
        "estimate": estimate,
        "ci_low": estimate - margin,
        "ci_high": estimate + margin,
        "odds_ratio": np.exp(estimate) if design.outcome == "fpr" else np.nan,
        "p": 2 * stats.t.sf(abs(estimate) / error, df),
    }


def _effects(design: Design, estimates: _Estimates, residuals: np.ndarray) -> list[dict[str, Any]]:
    """Compute line, confidence band and adjusted outcomes of each covariate."""
    first = 1 + design.x.shape[1]
    params, covariance = estimates.params[:first], estimates.covariance[:first, :first]
    effects = []
    for k, covariate in enumerate(design.covariates, start=1):
        x = design.x[covariate.name].to_numpy()
        grid = np.linspace(x.min(), x.max(), 2 if covariate is SEX else 50)
        rows = np.zeros((len(grid), len(params)))
        rows[:, 0], rows[:, k] = 1.0, grid
        expected = rows @ params
        margin = stats.t.ppf(0.5 + CONFIDENCE / 2, estimates.df[k - 1])
        error = margin * np.sqrt(np.einsum("ij,jk,ik->i", rows, covariance, rows))
        scale = expit if design.outcome == "fpr" else np.asarray
        line = [_uncentred(design, covariate, grid), *(scale(expected + sign * error) for sign in (0, -1, 1))]
        effects.append(
            {
                "term": covariate.name,
                "values": _uncentred(design, covariate, x),
                "partial": scale(params[0] + params[k] * x + residuals),
                "line": np.column_stack(line),
            }
        )
    return effects


def _uncentred(design: Design, covariate: Covariate, x: np.ndarray) -> np.ndarray:
    """Return a centred covariate in the units of its column."""
    return (x + design.means[covariate.name]) * covariate.step
