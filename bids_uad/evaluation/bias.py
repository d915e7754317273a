"""How false alarms in healthy brains, and Dice on lesions, depend on who was scanned and where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import statsmodels.api as sm
from scipy import stats

from bids_uad.dataset.raw_metadata import SEXES
from bids_uad.evaluation.bootstrap import CONFIDENCE
from bids_uad.evaluation.comparison import corrected
from bids_uad.evaluation.mixed import CrossedModel
from bids_uad.evaluation.subjects import HEALTHY, LESION

ROLES = {"fpr": HEALTHY, "dice": LESION}
PRIOR_VOXELS = 50.0
"""Voxels added to both sides of the odds: what is less than 0.05 mL is not told from nothing."""
MIN_PARTICIPANTS = 20
MIN_PER_COEFFICIENT = 5
MIN_PER_LEVEL = 5
MIN_RANDOM_LEVELS = 6
"""With fewer scanners their spread cannot be estimated, and each gets a coefficient."""
MIN_REPEATED = 5
"""With fewer participants on several scanners, the variance between participants is not estimated well
enough: with three, tests of scanners at 0.05 have an error rate of 7 to 8 %."""
NO_SPREAD = 2e-3
"""Variance between scanners, as a fraction of that within, below which there is none."""
MAX_EXPLAINED = 0.9
"""Share of a covariate's variance that the others may explain (a variance inflation of ten)."""

LINEAR = "linear, HC3"
REPEATED = "mixed, random participant"
MIXED = "mixed, random scanner"
CROSSED = "mixed, random scanner and participant"

COLUMNS: dict[str, dict[str, Any]] = {
    "detector": {"Description": "Anomaly detector"},
    "modality": {"Description": "Modality of the images"},
    "outcome": {
        "Description": "What is explained",
        "Levels": {
            "fpr": "Log odds of a healthy brain voxel being called anomalous at the fixed threshold "
            f"({PRIOR_VOXELS:g} voxels added to both sides)",
            "dice": "Dice at the fixed threshold, lesion scans",
        },
    },
    "term": {"Description": "Covariate; for a scanner the difference from the mean of all scanners"},
    "unit": {"Description": "Change of the covariate that the estimate belongs to"},
    "n_participants": {"Description": "Participants in the model, each counted once"},
    "n_scans": {"Description": "Images in the model (those of a participant on one scanner are averaged)"},
    "model": {
        "Description": "How it was fitted",
        "Levels": {
            LINEAR: "Ordinary least squares, heteroscedasticity-robust (HC3) intervals, t distribution; also "
            "where many scanners show no spread",
            REPEATED: "Mixed model with a random intercept for each participant, where some were scanned on "
            "several scanners (REML, t distribution with Satterthwaite's degrees of freedom)",
            MIXED: "Mixed model with a random intercept for each scanner (the same)",
            CROSSED: "Mixed model with crossed random intercepts of scanners and participants (the same)",
        },
    },
    "estimate": {
        "Description": "Coefficient, all other covariates held; for the term 'scanner (spread)' the standard "
        "deviation between scanners"
    },
    "ci_low": {"Description": "Lower end of its 95 % confidence interval"},
    "ci_high": {"Description": "Upper end of the same"},
    "odds_ratio": {"Description": "exp(estimate): factor on the odds of a false positive; n/a for Dice"},
    "p": {"Description": "Two-sided p value; for the spread the F test of a coefficient for each scanner"},
    "p_fdr": {"Description": "The same, corrected over the whole table (Benjamini and Hochberg)"},
}


@dataclass(frozen=True)
class Effect:
    """One covariate against the outcome, all others held at their means.

    Parameters
    ----------
    detector, modality, outcome, term : str
        Where it belongs in the table.
    values : numpy.ndarray, shape (n,)
        The covariate, in its own units.
    partial : numpy.ndarray, shape (n,)
        Outcome of each participant on its own scale (a share), as it would be at the means of the others.
    line : numpy.ndarray, shape (m, 4)
        Covariate, expected outcome, and the 95 % band around it.
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
    """What the models say.

    Parameters
    ----------
    coefficients : pandas.DataFrame
        Columns of `COLUMNS`.
    effects : list of Effect
    remarks : list of str
        What was not modelled, and why.
    """

    coefficients: pd.DataFrame
    effects: list[Effect]
    remarks: list[str]


@dataclass(frozen=True)
class Covariate:
    """A column of the design.

    Parameters
    ----------
    name, unit : str
    column : str
        Where it comes from.
    step : float
        What one unit of the design is in units of the column.
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
    """Model false-positive rate and Dice for every detector and modality.

    Parameters
    ----------
    subjects : pandas.DataFrame
        One row per image and detector: columns of :data:`bids_uad.evaluation.subjects.COLUMNS` and those of
        participants.tsv; `age`, `sex` and `scanner` are used where they are there.

    Returns
    -------
    Bias
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
            found, drawn = fit(design)
            rows += [labels | row for row in found]
            effects += [Effect(**labels, **effect) for effect in drawn]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    table["p_fdr"] = corrected(table["p"], "fdr_bh")
    return Bias(table, effects, [f"{text} ({', '.join(who)})" for text, who in remarks.items()])


class NotModelledError(Exception):
    """Why there is no model."""


@dataclass(frozen=True)
class Design:
    """A table ready to be fitted.

    Parameters
    ----------
    outcome : str
        `fpr` or `dice`.
    y : numpy.ndarray, shape (n,)
        Outcome on the scale of the model; a row for each participant and scanner.
    participants : numpy.ndarray of int, shape (n,)
        Participant of each row, 0 to their number minus one.
    n_scans : int
        Images that the rows are averaged from.
    x : pandas.DataFrame, shape (n, k)
        Centred covariates, one column each.
    means : mapping of str to float
        What was taken off.
    covariates : sequence of Covariate
        In the order of the columns of `x`.
    scanners : pandas.Series or None
        Scanner of each row; None where there are not two.
    remarks : list of str
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
        """Number of different participants."""
        return int(self.participants.max()) + 1

    @property
    def repeated(self) -> bool:
        """Whether a participant has several rows."""
        return self.n_participants < len(self.y)


def make_design(scans: pd.DataFrame, outcome: str) -> Design:
    """Bring scans into the shape of a regression.

    Parameters
    ----------
    scans : pandas.DataFrame
        Images of one detector and modality.
    outcome : {"fpr", "dice"}

    Returns
    -------
    Design

    Raises
    ------
    NotModelledError
        If there are too few participants, or covariates that cannot be told apart.
    """
    what = "false alarms" if outcome == "fpr" else "Dice"
    table = _numbers(scans, outcome)
    _refuse_few(table["participant"].nunique(), MIN_PARTICIPANTS, what)
    remarks, used = [], []
    for covariate in COVARIATES[outcome]:
        known = table[covariate.name].notna()
        if (
            table.loc[known, "participant"].nunique() < MIN_PARTICIPANTS
            or table.loc[known, covariate.name].nunique() < 2
        ):
            if known.any() or covariate.column not in scans:
                remarks.append(
                    f"{what}: {covariate.name} is not in the model, since it is not known or does not vary."
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
            f"No model of {what}: neither age, sex, brain volume nor scanner is known or varies."
        )
    else:
        table = _averaged(table, ["participant"])
    fixed_levels = 0 if scanners is None or _enough(scanners) else scanners.nunique() - 1
    wanted = max(MIN_PARTICIPANTS, MIN_PER_COEFFICIENT * (1 + len(names) + fixed_levels))
    participants = pd.factorize(table["participant"])[0]
    _refuse_few(len(set(participants)), wanted, what)
    means = {name: float(table[name].mean()) for name in names}
    x = (table[names] - pd.Series(means, dtype=float)).reset_index(drop=True)
    _refuse_confounded(x, scanners, what)
    n_scans = int(table["n_scans"].sum())
    return Design(
        outcome, table["y"].to_numpy(float), participants, n_scans, x, means, used, scanners, remarks
    )


def _usable_scanners(table: pd.DataFrame, what: str) -> tuple[pd.DataFrame, list[str]]:
    """Leave out scanners with too few participants, and scanners of participants too few to be repeated."""
    remarks = []
    while True:
        sizes = table.groupby("scanner").size()
        # Scanners enough for a random effect may be small, for they lend each other strength.
        small = [] if (sizes > 1).sum() >= MIN_RANDOM_LEVELS else sorted(sizes[sizes < MIN_PER_LEVEL].index)
        repeated = table.loc[table["participant"].duplicated(), "participant"].nunique()
        if small:
            table = table[~table["scanner"].isin(small)]
            remarks.append(
                f"The model of {what} leaves out scanners with fewer than {MIN_PER_LEVEL} participants: "
                f"{', '.join(small)}."
            )
        elif 0 < repeated < MIN_REPEATED:
            most = table.sort_values("n_scans", ascending=False, kind="stable")
            table = most.drop_duplicates("participant").sort_index()
            remarks.append(
                f"The model of {what} uses one scanner of each participant, that with most scans: "
                f"{repeated} on several scanners are too few to separate participants from scanners, "
                f"{MIN_REPEATED} are needed."
            )
        else:
            return table, remarks


def _enough(scanners: pd.Series) -> bool:
    """Say whether there are scanners enough for a random effect."""
    return scanners.nunique() >= MIN_RANDOM_LEVELS


def _refuse_few(found: int, wanted: int, what: str) -> None:
    if found < wanted:
        raise NotModelledError(f"No model of {what}: {found} participants are too few, {wanted} are needed.")


def _numbers(scans: pd.DataFrame, outcome: str) -> pd.DataFrame:
    """Outcome and covariates of each participant (on each scanner), in the units of the model.

    The column `n_scans` counts the images that a row is the mean of.
    """
    table = pd.DataFrame({"participant": scans["participant_id"], "n_scans": 1})
    if outcome == "fpr":
        voxels = scans["n_brain_voxels"] - scans["n_lesion_voxels"].fillna(0)
        found = scans["fpr"] * voxels
        table["y"] = np.log((found + PRIOR_VOXELS) / (voxels - found + PRIOR_VOXELS))
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
    """Average rows with the same keys, and count their images."""
    numbers = table.select_dtypes("number").columns.union(keys)
    groups = table[numbers].groupby(keys, dropna=False, sort=True)
    return groups.mean().assign(n_scans=groups["n_scans"].sum()).reset_index()


def _column(scans: pd.DataFrame, covariate: Covariate) -> pd.Series:
    if covariate.column not in scans:
        return pd.Series(np.nan, index=scans.index)
    values = scans[covariate.column]
    if covariate is SEX:
        return values.map(SEXES).astype(float)
    values = pd.to_numeric(values, errors="coerce")
    if covariate is LESION_VOLUME:
        return np.log10(values.where(values > 0))
    return values / covariate.step


def _refuse_confounded(x: pd.DataFrame, scanners: pd.Series | None, what: str) -> None:
    """Compare each covariate with all others together."""
    dummies = pd.DataFrame(index=x.index)
    if scanners is not None:
        dummies = pd.get_dummies(scanners, drop_first=True, dtype=float)
    for name in x:
        others = pd.concat([x.drop(columns=name), dummies], axis=1)
        if others.shape[1] == 0:
            continue
        explained = sm.OLS(x[name].to_numpy(), sm.add_constant(others.to_numpy())).fit().rsquared
        if explained > MAX_EXPLAINED:
            of = ", ".join([*x.columns.drop(name), *([] if scanners is None else ["scanner"])])
            raise NotModelledError(
                f"No model of {what}: {name} cannot be told from the other covariates ({of}), which "
                f"explain {explained:.0%} of it; the cohort would need to mix them."
            )


def fit(design: Design) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Fit the model of a design.

    Parameters
    ----------
    design : Design

    Returns
    -------
    rows : list of dict
        Columns of `COLUMNS` from `term` on, `p_fdr` apart.
    effects : list of dict
        Fields of `Effect` from `term` on.
    """
    mixed = design.scanners is not None and _enough(design.scanners)
    return _fit_mixed(design) if mixed else _fit_linear(design)


def _fit_linear(design: Design) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Fit with a coefficient for each scanner, and a random intercept of participants with several rows."""
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
    """Fit with random intercepts of scanners, and of participants with several rows."""
    matrix = np.column_stack([np.ones(len(design.y)), design.x.to_numpy()])
    model = CrossedModel(design.y, matrix, design.participants, pd.factorize(design.scanners)[0])
    spread = _labels(design, "scanner (spread)", "standard deviation", CROSSED if design.repeated else MIXED)
    spread |= {"estimate": np.sqrt(model.scanner_variance), "p": _spread_p(design, matrix)}
    spread |= dict.fromkeys(("ci_low", "ci_high", "odds_ratio"), np.nan)
    if model.scanner_variance < NO_SPREAD * (model.participant_variance + model.residual_variance):
        # The likelihood has no curvature to take intervals from, and there is nothing to allow for.
        rows, effects = _fit_linear(replace(design, scanners=None))
        return [*rows, spread], effects
    contrasts = np.eye(matrix.shape[1])[1:]
    df = model.degrees_of_freedom(contrasts)
    estimates = _Estimates(spread["model"], model.params, model.covariance, df)
    rows = [
        _row(design, covariate.name, covariate.unit, estimates, contrast, freedom)
        for covariate, contrast, freedom in zip(design.covariates, contrasts, df, strict=True)
    ]
    return [*rows, spread], _effects(design, estimates, design.y - matrix @ estimates.params)


@dataclass(frozen=True)
class _Estimates:
    """Name of a model, its coefficients with the constant first, their covariance, and the t distributions.

    `df` has the degrees of freedom of each row of the table; those of the covariates come first.
    """

    model: str
    params: np.ndarray
    covariance: np.ndarray
    df: np.ndarray


def _spread_p(design: Design, matrix: np.ndarray) -> float:
    """Test whether scanners differ at all: F test of a coefficient for each against none."""
    codes, _ = _sum_coded(design.scanners, len(design.y))
    full = np.column_stack([matrix, codes])
    model = CrossedModel(design.y, full, design.participants)
    y, full = model.whiten(design.y[:, None])[:, 0], model.whiten(full)
    without = sm.OLS(y, full[:, : matrix.shape[1]]).fit()
    return float(sm.OLS(y, full).fit().compare_f_test(without)[1])


def _sum_coded(scanners: pd.Series | None, n: int) -> tuple[np.ndarray, list[str]]:
    """Code scanners so that coefficients are differences from the unweighted mean of all scanners."""
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
    """Draw each covariate's line with its band, and the participants about it."""
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
        scale = _share if design.outcome == "fpr" else np.asarray
        line = [_own(design, covariate, grid), *(scale(expected + sign * error) for sign in (0, -1, 1))]
        effects.append(
            {
                "term": covariate.name,
                "values": _own(design, covariate, x),
                "partial": scale(params[0] + params[k] * x + residuals),
                "line": np.column_stack(line),
            }
        )
    return effects


def _own(design: Design, covariate: Covariate, x: np.ndarray) -> np.ndarray:
    """Give a centred covariate in the units of its column."""
    return (x + design.means[covariate.name]) * covariate.step


def _share(log_odds: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-log_odds))
