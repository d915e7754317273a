"""Claims of arXiv 2512.01534: published figures, statistics with intervals, and verdicts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from scipy.special import expit
from statsmodels.stats.libqsturng import qsturng

from bids_uad.dataset.participants import read_participants
from bids_uad.evaluation.analyses import analyse
from bids_uad.evaluation.bias import PRIOR_VOXELS, model_bias
from bids_uad.evaluation.bootstrap import CONFIDENCE, MIN_SUBJECTS, N_RESAMPLES
from bids_uad.evaluation.comparison import mean_ranks, participant_scores
from bids_uad.evaluation.curves import Curves
from bids_uad.evaluation.deviations import NORMATIVE
from bids_uad.evaluation.lesion_detection import Lesions
from bids_uad.evaluation.metrics import dice_curve, edge_index
from bids_uad.evaluation.subjects import HEALTHY, LESION, add_participant_columns, subject_row
from bids_uad.evaluation.tables import find_metrics_tables, read_unit
from bids_uad.files import write_json, write_tsv
from bids_uad.levels.participant.leakage import SEEN

RESULTS = Path(__file__).parent / "results" / "paper"

RECONSTRUCTION = ("riad", "itermask", "andi", "disyre")
DIFFUSION = ("andi", "disyre")
FEATURES = ("fae", "uniad", "rd", "patchcore")
EIGHT = RECONSTRUCTION + FEATURES
"""Detectors of the publication."""
COHORTS = {
    "T1w": ("BraTS", "ATLAS-I", "ATLAS-O", "ATLAS-N", "Shifts", "WMH"),
    "T2w": ("BraTS", "Shifts"),
}
_FIXED = {
    "riad": (".161", ".081", ".097", ".017", ".045", ".042", ".236", ".050"),
    "itermask": (".297", ".113", ".090", ".021", ".031", ".036", ".257", ".015"),
    "andi": (".232", ".281", ".209", ".118", ".125", ".052", ".425", ".104"),
    "disyre": (".264", ".432", ".384", ".191", ".139", ".109", ".645", ".172"),
    "fae": (".437", ".183", ".166", ".047", ".015", ".016", ".467", ".031"),
    "uniad": (".239", ".178", ".178", ".035", ".048", ".044", ".381", ".055"),
    "rd": (".232", ".117", ".130", ".026", ".027", ".027", ".283", ".035"),
    "patchcore": (".321", ".148", ".149", ".021", ".025", ".049", ".372", ".015"),
}
_BEST = {
    "riad": (".161", ".129", ".126", ".045", ".062", ".044", ".236", ".064"),
    "itermask": (".301", ".118", ".091", ".041", ".045", ".037", ".258", ".021"),
    "andi": (".265", ".285", ".209", ".145", ".143", ".062", ".453", ".128"),
    "disyre": (".274", ".434", ".386", ".196", ".156", ".130", ".646", ".205"),
    "fae": (".437", ".183", ".167", ".049", ".032", ".032", ".467", ".048"),
    "uniad": (".239", ".188", ".178", ".045", ".048", ".044", ".381", ".063"),
    "rd": (".232", ".122", ".130", ".032", ".040", ".039", ".283", ".045"),
    "patchcore": (".334", ".186", ".165", ".047", ".058", ".074", ".372", ".058"),
}
_CELLS = [(modality, cohort) for modality, cohorts in COHORTS.items() for cohort in cohorts]


def _published(table: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    return pd.DataFrame(table, index=pd.MultiIndex.from_tuples(_CELLS)).astype(float).T


PUBLISHED = {"fixed": _published(_FIXED), "best": _published(_BEST)}
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


REPRODUCED, NOT_REPRODUCED, UNDECIDED = "reproduced", "not reproduced", "cannot be told"
Region = tuple[tuple[float, float], ...]
POSITIVE: Region = ((0.0, np.inf),)
NEGATIVE: Region = ((-np.inf, 0.0),)
SMALL_DICE = 0.05
"""Largest difference in Dice that counts as small: about the largest published loss by a fixed threshold."""
SMALL_ODDS = float(np.log(1.05))
"""Largest log odds ratio that counts as no effect."""


def verdict(low: float, high: float, holds: Region, fails: Region) -> str:
    """Compare a confidence interval with the values that agree and that disagree with a claim.

    Parameters
    ----------
    low, high : float
        Limits of the interval; NaN if it is not known.
    holds, fails : tuple of (float, float)
        Ranges of the values with which the claim holds (open), and fails (closed).

    Returns
    -------
    str
        `NOT_REPRODUCED` if the interval is within a range of `fails`, `REPRODUCED` if it is within one of
        `holds`, `UNDECIDED` otherwise.
    """
    if not (np.isfinite(low) and np.isfinite(high)):
        return UNDECIDED
    if any(start <= low and high <= end for start, end in fails):
        return NOT_REPRODUCED
    if any(start < low and high < end for start, end in holds):
        return REPRODUCED
    return UNDECIDED


@dataclass(frozen=True)
class Claim:
    """Claim of the publication as a statement about one number.

    Parameters
    ----------
    title : str
        Subject of the claim.
    claim : str
        What is claimed.
    measure : str
        Number that is estimated.
    holds, fails : tuple of (float, float)
        See :func:`verdict`.
    ratio : bool, default=False
        Whether the number is a logarithm, shown as a ratio.
    """

    title: str
    claim: str
    measure: str
    holds: Region
    fails: Region
    ratio: bool = False


SMALL_LOSS = {"holds": ((-np.inf, SMALL_DICE),), "fails": ((SMALL_DICE, np.inf),)}
LARGER = {"holds": POSITIVE, "fails": NEGATIVE}
SMALLER = {"holds": NEGATIVE, "fails": POSITIVE}
EITHER = {"holds": (*NEGATIVE, *POSITIVE), "fails": ((-SMALL_ODDS, SMALL_ODDS),), "ratio": True}
CLAIMS = {
    "families": Claim(
        "Families of detectors",
        "Diffusion-inspired reconstruction segments lesions best.",
        "mean Dice of ANDi and Disyre minus that of the four feature-based detectors",
        **LARGER,
    ),
    "threshold": Claim(
        "Threshold ablation (experiment 1)",
        "Thresholds fixed on validation scans are nearly as good as the best ones of the test scans.",
        "mean Dice at the best threshold minus at the fixed one",
        **SMALL_LOSS,
    ),
    "scanner": Claim(
        "Domain shift (experiment 2)",
        "Dice is lower on scanners that are not in the training data.",
        "mean Dice on seen minus on unseen scanners",
        **LARGER,
    ),
    "scanner_family": Claim(
        "Domain shift, families",
        "Feature-based detectors are more robust to a domain shift than reconstruction-based ones.",
        "loss of Dice on unseen scanners, reconstruction minus feature-based",
        **LARGER,
    ),
    "scanner_fpr": Claim(
        "Domain shift, false positives",
        "Scanners have systematic effects.",
        "false-positive rate of healthy scans, unseen against seen scanners",
        **EITHER,
    ),
    "scaling": Claim(
        "Data scaling (experiment 3)",
        "More healthy training data yield modest gains only.",
        "mean Dice of models trained on all scans minus of those trained on 3 %",
        **SMALL_LOSS,
    ),
    "ablation": Claim(
        "Synthetic anomalies of Disyre",
        "Disyre depends on the variety of its synthetic anomalies.",
        "mean Dice with all kinds of anomalies minus with the best smaller set of kinds",
        **LARGER,
    ),
    "independent": Claim(
        "Thresholds, independent cohort",
        "Thresholds carry over to a cohort of other scanners.",
        "mean Dice on unseen scanners at their best threshold minus at that of the seen scanners",
        **SMALL_LOSS,
    ),
    "transfer": Claim(
        "Thresholds, other pathologies",
        "A fixed threshold loses a larger part of the Dice of small, diffuse lesions than of gliomas.",
        "relative loss against the best threshold, multiple sclerosis and white matter hyperintensities "
        "minus glioma",
        **LARGER,
    ),
    "age": Claim(
        "False positives and age",
        "False positives vary with age.",
        "odds ratio of a false positive per 10 years, mean of the detectors",
        **EITHER,
    ),
    "sex": Claim(
        "False positives and sex",
        "False positives vary with sex.",
        "odds ratio of a false positive, male against female, mean of the detectors",
        **EITHER,
    ),
    "load": Claim(
        "Misses, small lesion load",
        "Lesions are missed more often below the 25th percentile of lesion load.",
        "fraction of lesion voxels found, scans up to the 25th percentile of their pathology minus others",
        **SMALLER,
    ),
    "contrast": Claim(
        "Misses, low contrast",
        "Low-contrast lesions are missed more often.",
        "fraction of lesions found, lowest quarter of contrast minus others",
        **SMALLER,
    ),
    "ranking": Claim(
        "Ranking of the detectors",
        "The eight detectors rank as published.",
        "Kendall's tau between the published and our mean Dice",
        **LARGER,
    ),
    "winner": Claim(
        "No detector is best throughout",
        "No detector is consistently superior across lesion types and contrasts.",
        "largest fraction of pathologies and contrasts in which one detector is best",
        holds=((-np.inf, 1.0),),
        fails=((1.0, 1.0),),
    ),
    "deviation": Claim(
        "Normative deviation against residual (open question 1)",
        "Deviations from a normative reference detect lesions better than the scores.",
        "mean AUPRC of deviations minus of scores",
        **LARGER,
    ),
}


@dataclass
class Study:
    """Score tables of a cohort.

    Parameters
    ----------
    subjects : pandas.DataFrame
        One row per image and detector, with the columns of participants.tsv.
    curves : dict
        `Curves` by detector, modality and cohort.
    dice : dict
        By detector and modality: Dice of each lesion scan (rows, by participant) at each threshold (columns),
        and the index of the fixed threshold.
    lesions : Lesions
        Lesion tables.
    facts : dict, default={}
        Number of planned participants, label maps and models.
    variants : dict of str to Study, default={}
        Studies of other models on the same participants.
    real : Study, default=None
        Study of the same models on real scans.
    """

    subjects: pd.DataFrame
    curves: dict[tuple[str, str, str], Curves]
    dice: dict[tuple[str, str], tuple[pd.DataFrame, int]]
    lesions: Lesions
    facts: dict[str, Any] = field(default_factory=dict)
    variants: dict[str, Study] = field(default_factory=dict)
    real: Study | None = None

    @property
    def modalities(self) -> list[str]:
        """Contrasts with scores."""
        return sorted(set(self.subjects["modality"]) & set(COHORTS)) if len(self.subjects) else []

    def scores(self, modality: str, outcome: str, detectors: Sequence[str] = EIGHT) -> pd.DataFrame:
        """Return an outcome by participant and detector, of participants that all detectors have scored.

        Parameters
        ----------
        modality : {"T1w", "T2w"}
            Contrast.
        outcome : {"dice", "auprc", "fpr", "sensitivity"}
            Column of `subjects`.
        detectors : sequence of str
            Detectors; those without any scores are left out.

        Returns
        -------
        pandas.DataFrame
            Participants (rows) by detectors (columns), without missing values.
        """
        role = HEALTHY if outcome == "fpr" else LESION
        rows = self.subjects[(self.subjects["modality"] == modality) & (self.subjects["role"] == role)]
        table = rows.pivot_table(index="participant_id", columns="detector", values=outcome, aggfunc="mean")
        return table[[name for name in detectors if name in table]].dropna()

    def facts_of(self, participants: pd.Index, column: str) -> pd.Series:
        """Return a column of participants.tsv, such as `cohort`, of some participants."""
        return (
            self.subjects.drop_duplicates("participant_id")
            .set_index("participant_id")[column]
            .loc[participants]
        )


def read_tables(folder: Path, people_folder: Path) -> Study:
    """Read the score tables of a folder.

    Parameters
    ----------
    folder : pathlib.Path
        Folder with score tables of the participant level.
    people_folder : pathlib.Path
        Dataset with participants.tsv.

    Returns
    -------
    Study
        Rows and Dice curves; empty without tables.
    """
    people = read_participants(people_folder)
    rows, lesions, curves = [], Lesions(), {}
    dice: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    edges: dict[tuple[str, str], int] = {}
    for path in find_metrics_tables(folder):
        unit = read_unit(path, people)
        row = subject_row(unit)
        rows.append(row)
        key = (unit.detector, unit.modality)
        curves.setdefault((*key, unit.cohort), Curves(unit.edges, unit.threshold)).add(unit)
        edges[key] = edge_index(unit.edges, unit.threshold)
        if row["role"] == LESION:
            lesions.add(unit)
            if unit.n_lesion.any():
                dice.setdefault(key, {})[unit.subject] = dice_curve(unit.n_nonlesion, unit.n_lesion)
    subjects = pd.DataFrame(rows)
    if len(subjects):
        subjects, _ = add_participant_columns(subjects, people)
    tables = {key: (pd.DataFrame.from_dict(own, orient="index"), edges[key]) for key, own in dice.items()}
    return Study(subjects, curves, tables, lesions)


def read_study(out: Path, real: Sequence[Path] | None = None) -> Study:
    """Read all results of ``python -m benchmarks.paper score``.

    Parameters
    ----------
    out : pathlib.Path
        Output folder.
    real : sequence of pathlib.Path, optional
        Dataset and output folder of ``python -m benchmarks.real``.

    Returns
    -------
    Study
        Results with those of variants and real scans.
    """
    study = read_tables(out / "tables", out)
    study.facts = json.loads((out / "study.json").read_text())
    for path in sorted((out / "variants").glob("*/*")):
        study.variants[f"{path.parent.name}/{path.name}"] = read_tables(path, out)
    if real:
        study.real = read_tables(real[1], real[0])
    acquired = {path.stem: json.loads(path.read_text()) for path in (out / "drawn").glob("sub-*.json")}
    if len(study.subjects):
        thickness = [
            acquired.get(name, {}).get(modality, {}).get("protocol", {}).get("thickness", np.nan)
            for name, modality in zip(
                study.subjects["participant_id"], study.subjects["modality"], strict=True
            )
        ]
        thick = pd.Series(thickness, study.subjects.index)
        study.subjects["slices"] = np.where(thick > 1, "2 to 6 mm", "1 mm")
        study.subjects.loc[thick.isna(), "slices"] = None
    return study


def weights(n: int, seed: Sequence[int]) -> np.ndarray:
    """Draw participants with replacement.

    Parameters
    ----------
    n : int
        Number of participants.
    seed : sequence of int
        Seed of the draws.

    Returns
    -------
    numpy.ndarray, shape (1 + N_RESAMPLES, n)
        Weight of each participant; the first row is the sample itself, rows sum to 1.
    """
    drawn = np.random.default_rng([*seed, n]).multinomial(n, np.full(n, 1 / n), size=N_RESAMPLES)
    return np.vstack([np.ones(n), drawn]) / n


def cell_means(values: pd.DataFrame, strata: pd.Series) -> tuple[np.ndarray, list[str]]:
    """Compute the means of each stratum in the sample and in bootstrap samples of its participants.

    Parameters
    ----------
    values : pandas.DataFrame
        Participants (rows) by columns.
    strata : pandas.Series
        Stratum of each participant.

    Returns
    -------
    means : numpy.ndarray, shape (1 + N_RESAMPLES, n_strata, n_columns)
        Means; the first is that of the sample. NaN in all but the first if a stratum has fewer than
        `MIN_SUBJECTS` participants.
    names : list of str
        Strata, sorted.
    """
    names = sorted(set(strata))
    means = np.empty((1 + N_RESAMPLES, len(names), values.shape[1]))
    for position, name in enumerate(names):
        own = values[(strata == name).to_numpy()].to_numpy()
        means[:, position] = weights(len(own), [0, position]) @ own
        if len(own) < MIN_SUBJECTS:
            means[1:, position] = np.nan
    return means, names


def interval(samples: np.ndarray) -> tuple[float, float, float]:
    """Return the estimate and its percentile interval.

    Parameters
    ----------
    samples : numpy.ndarray, shape (1 + N_RESAMPLES,)
        Statistic of the sample and of the bootstrap samples.

    Returns
    -------
    value, low, high : float
        The limits are NaN if any sample has no value.
    """
    tail = (1 - CONFIDENCE) / 2
    low, high = (
        np.quantile(samples[1:], [tail, 1 - tail]) if np.isfinite(samples[1:]).all() else (np.nan, np.nan)
    )
    return float(samples[0]), float(low), float(high)


@dataclass(frozen=True)
class Estimate:
    """Estimate of the number of a claim.

    Parameters
    ----------
    claim : str
        Key of `CLAIMS`.
    modality : str
        Contrast, or ``T1w and T2w``.
    value, low, high : float
        Estimate and limits of its interval; NaN if not measured.
    n : int
        Number of participants.
    detector : str, default=""
        Detector; empty for the mean of the detectors, on which the verdict is based.
    """

    claim: str
    modality: str
    value: float
    low: float
    high: float
    n: int
    detector: str = ""

    @property
    def row(self) -> dict[str, Any]:
        """Row of the table of claims."""
        claim = CLAIMS[self.claim]
        published = np.nan if self.detector else published_value(self.claim, self.modality)
        conclusion = verdict(self.low, self.high, claim.holds, claim.fails)
        return {**vars(self), "published": published, "verdict": conclusion}


def _estimates(
    claim: str,
    modality: str,
    samples: np.ndarray,
    detectors: Sequence[str],
    n: int,
) -> list[Estimate]:
    """Summarise a statistic of each detector (columns of `samples`) and its mean over the eight."""
    eight = [position for position, name in enumerate(detectors) if name in EIGHT]
    rows = []
    if eight:
        rows.append(Estimate(claim, modality, *interval(samples[:, eight].mean(1)), n))
    for position, name in enumerate(detectors):
        rows.append(Estimate(claim, modality, *interval(samples[:, position]), n, detector=name))
    return rows


def _mean_over(detectors: Sequence[str], family: Sequence[str]) -> np.ndarray:
    """Return the weights of the mean over a family; NaN without any of it."""
    member = np.array([name in family for name in detectors], float)
    return member / member.sum() if member.sum() else np.full(len(member), np.nan)


def _difference(detectors: Sequence[str], first: Sequence[str], second: Sequence[str]) -> np.ndarray:
    """Return the weights of the mean over one family minus that over another."""
    return _mean_over(detectors, first) - _mean_over(detectors, second)


def published_value(claim: str, modality: str) -> float:
    """Return the number of a claim that follows from the published Dice.

    Parameters
    ----------
    claim : str
        Key of `CLAIMS`.
    modality : str
        Contrast, or ``T1w and T2w``.

    Returns
    -------
    float
        NaN if it does not follow from the published figures.
    """
    fixed, best = PUBLISHED["fixed"], PUBLISHED["best"]
    if claim == "winner":
        return float(fixed.idxmax().value_counts(normalize=True).max())
    fixed, best = fixed[modality], best[modality]
    if claim == "families":
        figures = pd.DataFrame({p: [published_dice(modality, p, d) for d in EIGHT] for p in PATHOLOGIES})
        return float(figures.mean(axis=1).to_numpy() @ _difference(EIGHT, DIFFUSION, FEATURES))
    if claim == "threshold":
        return float((best - fixed).to_numpy().mean())
    if claim == "transfer":
        lost = 1 - fixed / best
        diffuse = [name for name in ("Shifts", "WMH") if name in lost]
        return float(lost[diffuse].to_numpy().mean() - lost["BraTS"].mean())
    if claim in ("scanner", "scanner_family") and modality == "T1w":
        drop = (fixed["ATLAS-I"] - fixed["ATLAS-O"]).loc[list(EIGHT)].to_numpy()
        return float(
            drop.mean() if claim == "scanner" else drop @ _difference(EIGHT, RECONSTRUCTION, FEATURES)
        )
    return float("nan")


def families(study: Study, modality: str) -> list[Estimate]:
    """Compare diffusion-inspired with feature-based detectors on the pathologies with published figures."""
    dice = study.scores(modality, "dice")
    cohort = study.facts_of(dice.index, "cohort")
    known = cohort.isin([name for name in PATHOLOGIES if np.isfinite(published_dice(modality, name, "fae"))])
    dice, cohort = dice[known], cohort[known]
    if dice.empty:
        return []
    means, _ = cell_means(dice, cohort)
    contrast = _difference(dice.columns, DIFFUSION, FEATURES)
    return [Estimate("families", modality, *interval(means.mean(1) @ contrast), len(dice))]


def _best_and_fixed(
    study: Study, modality: str, groups: Mapping[str, str], detectors: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, list[str], list[str], int]:
    """Return Dice at the best and at the fixed threshold by sample, group and detector."""
    names = [name for name in detectors if (name, modality) in study.dice]
    shared = (
        set(groups).intersection(*(study.dice[name, modality][0].index for name in names)) if names else set()
    )
    members = {
        group: sorted(p for p in shared if groups[p] == group)
        for group in sorted({groups[p] for p in shared})
    }
    best = np.empty((1 + N_RESAMPLES, len(members), len(names)))
    fixed = np.empty_like(best)
    for i, own in enumerate(members.values()):
        drawn = weights(len(own), [0, i])
        for j, name in enumerate(names):
            curves, edge = study.dice[name, modality]
            means = drawn @ curves.loc[own].to_numpy()
            best[:, i, j], fixed[:, i, j] = means.max(1), means[:, edge]
        if len(own) < MIN_SUBJECTS:
            best[1:, i], fixed[1:, i] = np.nan, np.nan
    return best, fixed, list(members), names, len(shared)


def _lesion_cohorts(study: Study, modality: str) -> dict[str, str]:
    """Return the pathology of each participant with a lesion scan."""
    rows = study.subjects[(study.subjects["modality"] == modality) & (study.subjects["role"] == LESION)]
    return dict(zip(rows["participant_id"], rows["cohort"], strict=True))


def thresholds(study: Study, modality: str) -> list[Estimate]:
    """Estimate the loss by a fixed threshold, and its difference between pathologies."""
    best, fixed, groups, names, n = _best_and_fixed(study, modality, _lesion_cohorts(study, modality), EIGHT)
    if not groups:
        return []
    rows = _estimates("threshold", modality, (best - fixed).mean(1), names, n)
    small = [name for name in ("multiple sclerosis", "white matter hyperintensities") if name in groups]
    if "glioma" in groups and small:
        relative = 1 - fixed / np.maximum(best, 1e-9)
        where = [groups.index(name) for name in small]
        samples = relative[:, where].mean(1) - relative[:, groups.index("glioma")]
        rows += _estimates("transfer", modality, samples, names, n)
    return rows


def scanners(study: Study, modality: str) -> list[Estimate]:
    """Compare seen with unseen scanners: Dice, families, false positives, and thresholds carried over."""
    rows: list[Estimate] = []
    seen = study.subjects[study.subjects["modality"] == modality]
    known = seen.groupby("participant_id")["scanner_seen"].agg(lambda own: (own.dropna() == SEEN).any())
    dice = study.scores(modality, "dice")
    is_seen = known.reindex(dice.index).astype(bool)
    if is_seen.nunique() == 2:
        # Pathologies alternate between seen and unseen scanners, and are comparable relative to their means.
        centred = dice - dice.groupby(study.facts_of(dice.index, "cohort")).transform("mean")
        means, names = cell_means(centred, is_seen.map({True: "seen", False: "unseen"}))
        drops = means[:, names.index("seen")] - means[:, names.index("unseen")]
        rows += _estimates("scanner", modality, drops, dice.columns, len(dice))
        contrast = _difference(dice.columns, RECONSTRUCTION, FEATURES)
        rows.append(Estimate("scanner_family", modality, *interval(drops @ contrast), len(dice)))
        rows += _carried(study, modality, known)
    fpr = study.scores(modality, "fpr")
    is_seen = known.reindex(fpr.index).astype(bool)
    if is_seen.nunique() == 2:
        means, names = cell_means(fpr, is_seen.map({True: "seen", False: "unseen"}))
        logs = np.log(means + 1e-6)
        ratio = logs[:, names.index("unseen")] - logs[:, names.index("seen")]
        rows += _estimates("scanner_fpr", modality, ratio, fpr.columns, len(fpr))
    return rows


def _carried(study: Study, modality: str, known: pd.Series) -> list[Estimate]:
    """Apply the best threshold of the seen scanners to the unseen ones."""
    lesions = [name for name in _lesion_cohorts(study, modality) if name in known.index]
    groups = {True: [p for p in lesions if known[p]], False: [p for p in lesions if not known[p]]}
    names = [name for name in EIGHT if (name, modality) in study.dice]
    losses = []
    for name in names:
        curves = study.dice[name, modality][0]
        own = {key: curves.loc[[p for p in members if p in curves.index]] for key, members in groups.items()}
        if min(map(len, own.values())) < MIN_SUBJECTS:
            return []
        means = {key: weights(len(table), [0, int(key)]) @ table.to_numpy() for key, table in own.items()}
        target = means[False]
        carried = np.take_along_axis(target, means[True].argmax(1)[:, None], 1)[:, 0]
        losses.append(target.max(1) - carried)
    if not losses:
        return []
    return _estimates("independent", modality, np.stack(losses, 1), names, len(lesions))


def mean_detector(rows: pd.DataFrame) -> pd.DataFrame:
    """Average the log odds of a false positive of each healthy scan over the detectors.

    Parameters
    ----------
    rows : pandas.DataFrame
        Rows of one modality; each image has one row per detector.

    Returns
    -------
    pandas.DataFrame
        A row for each image, called detector ``mean``, whose false-positive rate has the mean log odds in
        :func:`bids_uad.evaluation.bias.model_bias`.
    """
    healthy = rows[(rows["role"] == HEALTHY) & rows["detector"].isin(EIGHT)]
    voxels = healthy["n_brain_voxels"] - healthy["n_lesion_voxels"].fillna(0)
    positive = healthy["fpr"] * voxels
    odds = np.log((positive + PRIOR_VOXELS) / (voxels - positive + PRIOR_VOXELS))
    first = healthy.drop_duplicates("source_image").set_index("source_image", drop=False)
    mean = odds.groupby(healthy["source_image"]).mean().reindex(first.index)
    total = first["n_brain_voxels"] - first["n_lesion_voxels"].fillna(0)
    first["fpr"] = ((total + 2 * PRIOR_VOXELS) * expit(mean) - PRIOR_VOXELS) / total
    first["detector"] = "mean"
    return first.reset_index(drop=True)


def demographics(study: Study, modality: str) -> list[Estimate]:
    """Estimate the effects of age and sex on false positives, adjusted for brain volume and scanner."""
    rows = study.subjects[study.subjects["modality"] == modality]
    counts = rows[rows["detector"].isin(EIGHT)].groupby("source_image")["detector"].nunique()
    complete = rows[rows["source_image"].isin(counts[counts == counts.max()].index)]
    healthy = complete[complete["role"] == HEALTHY]
    if healthy.empty:
        return []
    table = model_bias(pd.concat([mean_detector(healthy), healthy], ignore_index=True)).coefficients
    estimates = []
    for term in ("age", "sex"):
        for row in table[(table["outcome"] == "fpr") & (table["term"] == term)].to_dict("records"):
            name = "" if row["detector"] == "mean" else row["detector"]
            if name and name not in EIGHT:
                continue
            numbers = (row["estimate"], row["ci_low"], row["ci_high"], row["n_participants"])
            estimates.append(Estimate(term, modality, *numbers, detector=name))
    return estimates


def misses(study: Study, modality: str) -> list[Estimate]:
    """Compare small with larger lesion loads, and low with higher contrasts."""
    found = study.scores(modality, "sensitivity")
    rows = []
    if len(found):
        load = study.subjects[study.subjects["modality"] == modality].groupby("participant_id")[
            "lesion_volume_mm3"
        ]
        load = load.first().reindex(found.index)
        limit = load.groupby(study.facts_of(found.index, "cohort")).transform(lambda own: own.quantile(0.25))
        means, names = cell_means(found, (load <= limit).map({True: "small", False: "larger"}))
        if len(names) == 2:
            samples = means[:, names.index("small")] - means[:, names.index("larger")]
            rows += _estimates("load", modality, samples, found.columns, len(found))
    lesions = study.lesions.table
    lesions = lesions[lesions["modality"].astype(str) == modality]
    detectors = [name for name in EIGHT if (lesions["detector"].astype(str) == name).any()]
    samples = [_by_contrast(lesions[lesions["detector"].astype(str) == name]) for name in detectors]
    if samples and all(each is not None for each in samples):
        n = lesions["participant_id"].astype(str).nunique()
        rows += _estimates("contrast", modality, np.stack(samples, 1), detectors, n)
    return rows


def _by_contrast(lesions: pd.DataFrame) -> np.ndarray | None:
    """Return the fraction of lesions found in the lowest quarter of contrast minus that of the others."""
    contrast = lesions["contrast"].abs()
    known = contrast.notna()
    low = (contrast <= contrast.quantile(0.25)).astype(float)[known]
    detected = lesions["detected"][known]
    totals = pd.DataFrame(
        {"low": low, "found_low": low * detected, "high": 1 - low, "found_high": (1 - low) * detected}
    )
    totals = totals.groupby(lesions["participant_id"][known].astype(str)).sum()
    if len(totals) < MIN_SUBJECTS:
        return None
    sums = weights(len(totals), [0, 0]) @ totals.to_numpy()
    with np.errstate(invalid="ignore"):
        return sums[:, 1] / sums[:, 0] - sums[:, 3] / sums[:, 2]


def ranking(study: Study, modality: str) -> list[Estimate]:
    """Compare the order of the detectors with the published one."""
    dice = study.scores(modality, "dice")
    cohort = study.facts_of(dice.index, "cohort")
    known = cohort.isin([name for name in PATHOLOGIES if np.isfinite(published_dice(modality, name, "fae"))])
    dice, cohort = dice[known], cohort[known]
    if dice.empty or dice.shape[1] < 3:
        return []
    means, names = cell_means(dice, cohort)
    figures = np.array([[published_dice(modality, p, name) for name in dice.columns] for p in names]).mean(0)
    ours = means.mean(1)
    samples = np.array([stats.kendalltau(own, figures)[0] for own in ours])
    samples[1:][~np.isfinite(ours[1:]).all(1)] = np.nan
    return [Estimate("ranking", modality, *interval(samples), len(dice))]


def winners(study: Study) -> list[Estimate]:
    """Estimate the largest fraction of cells (contrast and pathology) in which one detector is best."""
    best, n = [], 0
    for modality in study.modalities:
        dice = study.scores(modality, "dice")
        if dice.empty:
            continue
        n = max(n, len(dice))
        means, _ = cell_means(dice, study.facts_of(dice.index, "cohort"))
        names = np.array([EIGHT.index(name) for name in dice.columns])
        first = names[means.argmax(2)].astype(float)
        first[~np.isfinite(means).all(2)] = np.nan
        best.append(first)
    if len(best) < 2:
        return []
    cells = np.concatenate(best, axis=1)
    shares = np.max([(cells == k).mean(1) for k in range(len(EIGHT))], axis=0)
    shares[~np.isfinite(cells).all(1)] = np.nan
    return [Estimate("winner", "T1w and T2w", *interval(shares), n)]


def deviations(study: Study, modality: str) -> list[Estimate]:
    """Compare normative deviations with the scores they are computed from."""
    everyone = sorted(set(study.subjects["detector"]))
    plain = [name for name in everyone if f"{name}{NORMATIVE}" in everyone]
    both = study.scores(modality, "auprc", [*plain, *(f"{name}{NORMATIVE}" for name in plain)])
    plain = [name for name in plain if name in both and f"{name}{NORMATIVE}" in both]
    if not plain or both.empty:
        return []
    gain = pd.DataFrame({name: both[f"{name}{NORMATIVE}"] - both[name] for name in plain})
    means, _ = cell_means(gain, study.facts_of(gain.index, "cohort"))
    return _estimates("deviation", modality, means.mean(1), plain, len(gain))


def variants(study: Study, modality: str) -> list[Estimate]:
    """Compare the models with those trained on 3 % of the scans, and Disyre with single anomalies."""
    rows = []
    least = study.variants.get("scaling/3")
    if least is not None and modality in least.modalities:
        rows += _against(study, least, "scaling", modality, EIGHT)
    single = {name: own for name, own in study.variants.items() if name.startswith("ablation/")}
    scored = {
        name: own.scores(modality, "dice", ["disyre"]) for name, own in single.items() if len(own.subjects)
    }
    scored = {name: table for name, table in scored.items() if len(table.columns)}
    if scored:
        best = max(scored, key=lambda name: scored[name]["disyre"].mean())
        rows += _against(study, single[best], "ablation", modality, ["disyre"])
    return rows


def _against(
    study: Study, other: Study, claim: str, modality: str, detectors: Sequence[str]
) -> list[Estimate]:
    """Estimate the paired difference in Dice between the models and others on the same participants."""
    ours, theirs = (each.scores(modality, "dice", detectors) for each in (study, other))
    names = [name for name in ours if name in theirs]
    gain = (ours[names] - theirs[names]).dropna()
    if gain.empty or not names:
        return []
    means, _ = cell_means(gain, study.facts_of(gain.index, "cohort"))
    return _estimates(claim, modality, means.mean(1), names, len(gain))


BY_MODALITY: tuple[Callable[[Study, str], list[Estimate]], ...] = (
    *(families, thresholds, scanners, variants, demographics, misses, ranking, deviations),
)


def estimate(study: Study) -> pd.DataFrame:
    """Estimate the numbers of all claims.

    Parameters
    ----------
    study : Study
        Score tables.

    Returns
    -------
    pandas.DataFrame
        A row for each claim and contrast with its verdict, and for each detector. What is not measured has
        no value and cannot be told.
    """
    rows = [each for modality in study.modalities for part in BY_MODALITY for each in part(study, modality)]
    rows += winners(study)
    nothing = (np.nan, np.nan, np.nan, 0)
    for claim in CLAIMS:
        measured = {row.modality for row in rows if row.claim == claim and not row.detector}
        modalities = ["T1w and T2w"] if claim == "winner" else list(COHORTS)
        rows += [Estimate(claim, name, *nothing) for name in modalities if name not in measured]
    order = {name: position for position, name in enumerate(CLAIMS)}
    rows.sort(key=lambda row: (order[row.claim], row.modality, row.detector != ""))
    return pd.DataFrame([row.row for row in rows])


def dice_table(study: Study) -> pd.DataFrame:
    """Tabulate the mean Dice of each contrast, pathology and detector beside the published one.

    Parameters
    ----------
    study : Study
        Score tables.

    Returns
    -------
    pandas.DataFrame
        Means at the fixed threshold with their intervals, at the best threshold, and published ones.
    """
    rows = []
    for modality in study.modalities:
        detectors = sorted({name for name, own in study.dice if own == modality})
        groups = _lesion_cohorts(study, modality)
        for name in detectors:
            best, fixed, pathologies, _, _ = _best_and_fixed(study, modality, groups, [name])
            for position, pathology in enumerate(pathologies):
                value, low, high = interval(fixed[:, position, 0])
                row = {"modality": modality, "pathology": pathology, "detector": name}
                row["n"] = sum(
                    own == pathology for p, own in groups.items() if p in study.dice[name, modality][0].index
                )
                row |= {"dice": value, "low": low, "high": high, "dice_best": float(best[0, position, 0])}
                if pathology in PATHOLOGIES:
                    row["published"] = published_dice(modality, pathology, name)
                    row["published_best"] = published_dice(modality, pathology, name, "best")
                rows.append(row)
    columns = ["modality", "pathology", "detector", "n", "dice", "low", "high", "dice_best"]
    return pd.DataFrame(rows, columns=[*columns, "published", "published_best"])


def critical_difference(detectors: int, participants: int) -> float:
    """Return the smallest difference of mean ranks that is significant (Nemenyi test, 5 %).

    Parameters
    ----------
    detectors, participants : int
        Numbers of detectors and of participants.

    Returns
    -------
    float
        Critical difference (Demšar 2006, JMLR 7).
    """
    quantile = float(qsturng(CONFIDENCE, detectors, np.inf)) / np.sqrt(2)
    return quantile * float(np.sqrt(detectors * (detectors + 1) / (6 * participants)))


def rank_table(study: Study) -> pd.DataFrame:
    """Tabulate the mean ranks of the detectors in Dice.

    Parameters
    ----------
    study : Study
        Score tables.

    Returns
    -------
    pandas.DataFrame
        Mean rank of each contrast and detector, critical difference and p value of Friedman's test.
    """
    rows = []
    for modality in study.modalities:
        plain = study.subjects[~study.subjects["detector"].str.endswith(NORMATIVE)]
        scores = participant_scores(plain, modality, "dice").dropna()
        if len(scores) < MIN_SUBJECTS or scores.shape[1] < 3:
            continue
        p = float(stats.friedmanchisquare(*scores.to_numpy().T).pvalue)
        distance = critical_difference(scores.shape[1], len(scores))
        rows += [
            {
                "modality": modality,
                "detector": name,
                "mean_rank": rank,
                "n": len(scores),
                "cd": distance,
                "p": p,
            }
            for name, rank in mean_ranks(scores, "dice").items()
        ]
    return pd.DataFrame(rows, columns=["modality", "detector", "mean_rank", "n", "cd", "p"])


def cohort_table(study: Study) -> pd.DataFrame:
    """Tabulate participants, scanners and lesion volumes of each group.

    Parameters
    ----------
    study : Study
        Score tables.

    Returns
    -------
    pandas.DataFrame
        A row for each contrast and group.
    """
    rows = []
    for (modality, cohort), own in study.subjects.groupby(["modality", "cohort"]):
        scans = own.drop_duplicates("participant_id")
        seen = own.groupby("participant_id")["scanner_seen"].agg(lambda each: (each.dropna() == SEEN).any())
        quartiles = (scans["lesion_volume_mm3"] / 1000).quantile([0.25, 0.5, 0.75]).to_numpy()
        if cohort == HEALTHY:
            quartiles = np.full(3, np.nan)
        row = {"modality": modality, "group": cohort, "n": len(scans), "unseen_scanner": int((~seen).sum())}
        row |= {"women": int((scans["sex"] == "female").sum()), "age_min": scans["age"].min()}
        row |= {"age_max": scans["age"].max(), "scanners": scans["scanner"].nunique()}
        rows.append(row | dict(zip(("load_q1", "load_median", "load_q3"), quartiles, strict=True)))
    return pd.DataFrame(rows)


def variant_table(study: Study) -> pd.DataFrame:
    """Tabulate the mean Dice of variants by contrast and detector.

    Parameters
    ----------
    study : Study
        Score tables.

    Returns
    -------
    pandas.DataFrame
        A row for each variant, contrast and detector: mean over the participants of the variant, and gain of
        the models against it with its interval.
    """
    rows = []
    for name, other in study.variants.items():
        for modality in other.modalities:
            for each in _against(study, other, "scaling", modality, EIGHT):
                if each.detector:
                    mean = other.scores(modality, "dice", [each.detector])[each.detector].mean()
                    row = {"variant": name, "modality": modality, "detector": each.detector, "n": each.n}
                    rows.append(row | {"dice": mean, "gain": each.value, "low": each.low, "high": each.high})
    columns = ["variant", "modality", "detector", "n", "dice", "gain", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def write_results(study: Study, results: Path = RESULTS) -> None:
    """Write the tables of the study.

    Parameters
    ----------
    study : Study
        Score tables.
    results : pathlib.Path
        Folder of the tables; earlier ones are replaced.
    """
    results.mkdir(parents=True, exist_ok=True)
    analyses = analyse(
        study.subjects,
        study.curves,
        ("sex", "age", "manufacturer", "field_strength", "slices", "scanner_seen", "lesion load"),
        seed=0,
        lesions=study.lesions,
    )
    tables = {
        "claims": estimate(study),
        "cohort": cohort_table(study),
        "dice": dice_table(study),
        "ranks": rank_table(study),
        "variants": variant_table(study),
        "subgroups": analyses.subgroups,
        "lesions": analyses.lesions,
        "missed": analyses.missed,
        "bias": analyses.bias.coefficients,
        "transfer": analyses.thresholds,
        "deviations": analyses.deviations,
    }
    if study.real is not None:
        tables["real"] = dice_table(study.real)
    for name, table in tables.items():
        numbers = dict.fromkeys(table.select_dtypes("number").columns, 5)
        write_tsv(results / f"{name}.tsv", table.round(numbers))
    models = study.subjects.groupby(["modality", "participant_id"])["detector"].nunique()
    # A participant whose scoring was interrupted is not counted.
    complete = models[models == models.groupby("modality").transform("max")]
    scored = complete.groupby("modality").size().to_dict()
    write_json(results / "study.json", study.facts | {"scored": scored})
