"""Tables of the study: Dice, ranks, cohort and variants; written for the page and read from there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.libqsturng import qsturng

from benchmarks.paper.bootstrap import dice_by_threshold, interval
from benchmarks.paper.estimates import estimate_claims, gains
from benchmarks.paper.published import PATHOLOGIES, published_dice
from benchmarks.paper.study import Study
from bids_uad.evaluation.analyses import analyse
from bids_uad.evaluation.bootstrap import CONFIDENCE, MIN_SUBJECTS
from bids_uad.evaluation.comparison import mean_ranks, participant_scores
from bids_uad.evaluation.deviations import NORMATIVE
from bids_uad.evaluation.subjects import HEALTHY
from bids_uad.files import write_json, write_tsv

RESULTS = Path(__file__).parents[1] / "results" / "paper"


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
        for name in sorted({name for name, own in study.dice if own == modality}):
            best, fixed, counts, _ = dice_by_threshold(study, modality, [name])
            for position, (pathology, n) in enumerate(counts.items()):
                value, low, high = interval(fixed[:, position, 0])
                row = {"modality": modality, "pathology": pathology, "detector": name, "n": n}
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
            (modality, name, rank, len(scores), distance, p)
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
        quartiles = (scans["lesion_volume_mm3"] / 1000).quantile([0.25, 0.5, 0.75]).to_numpy()
        if cohort == HEALTHY:
            quartiles = np.full(3, np.nan)
        seen = study.on_seen_scanner(modality)[scans["participant_id"]]
        rows.append(
            {
                "modality": modality,
                "group": cohort,
                "n": len(scans),
                "unseen_scanner": int((~seen).sum()),
                "women": int((scans["sex"] == "female").sum()),
                "age_min": scans["age"].min(),
                "age_max": scans["age"].max(),
                "scanners": scans["scanner"].nunique(),
                **dict(zip(("load_q1", "load_median", "load_q3"), quartiles, strict=True)),
            }
        )
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
            for each in gains(study, other, "scaling", modality):
                if each.detector:
                    mean = other.scores(modality, "dice", [each.detector])[each.detector].mean()
                    gain = (each.value, each.low, each.high)
                    rows.append((name, modality, each.detector, each.n, mean, *gain))
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
        "claims": estimate_claims(study),
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
    for name, table in tables.items():
        _write(table, results / f"{name}.tsv")
    models = study.subjects.groupby(["modality", "participant_id"])["detector"].nunique()
    # A participant whose scoring was interrupted is not counted.
    complete = models[models == models.groupby("modality").transform("max")]
    scored = complete.groupby("modality").size().to_dict()
    write_json(results / "study.json", study.facts | {"scored": scored})


def write_real(study: Study, results: Path = RESULTS) -> None:
    """Write the table of real scans, ``real.tsv``.

    Parameters
    ----------
    study : Study
        Score tables of real scans.
    results : pathlib.Path
        Folder of the table; an earlier one is replaced.
    """
    results.mkdir(parents=True, exist_ok=True)
    _write(dice_table(study), results / "real.tsv")


def _write(table: pd.DataFrame, path: Path) -> None:
    """Write a table with five decimals."""
    write_tsv(path, table.round(dict.fromkeys(table.select_dtypes("number").columns, 5)))


def read_results(results: Path = RESULTS) -> tuple[dict[str, pd.DataFrame], dict]:
    """Read the tables of the study.

    Parameters
    ----------
    results : pathlib.Path
        Folder of the tables.

    Returns
    -------
    tables : dict of str to pandas.DataFrame
        Tables by name; those without rows have none.
    facts : dict
        Contents of study.json.
    """
    tables = {}
    for path in sorted(results.glob("*.tsv")):
        tables[path.stem] = pd.read_csv(path, sep="\t", keep_default_na=False, na_values=["n/a", ""])
    return tables, json.loads((results / "study.json").read_text())
