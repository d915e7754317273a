"""Which lesions are found: by their volume, their contrast, and the load of the scan they are in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from bids_uad.errors import InputError
from bids_uad.evaluation.bootstrap import interval_columns, share_interval
from bids_uad.evaluation.subgroups import levels_of
from bids_uad.evaluation.subjects import LESION_LOAD
from bids_uad.evaluation.tables import UnitScores
from bids_uad.files import REMEDY, read_numbers

ALL, VOLUME, CONTRAST = "all lesions", "lesion volume", "lesion contrast"
VOLUMES = {
    "below 0.01 mL": 10.0,
    "0.01 to 0.1 mL": 100.0,
    "0.1 to 1 mL": 1_000.0,
    "1 to 10 mL": 10_000.0,
    "10 mL and above": np.inf,
}
"""Classes of lesion volume and where they end, in mm3."""
CONTRASTS = {"below 0.5": 0.5, "0.5 to 1": 1.0, "1 to 2": 2.0, "2 and above": np.inf}
"""Classes of contrast, bright or dark, and where they end, in standard deviations of the tissue around."""
SMALL = 0.25
SMALLEST = "smallest quarter"

_TABLE_COLUMNS = ("lesion", "volume_mm3", "found_share", "detected", "contrast")
_SHARES = {
    "lesion_sensitivity": "Share of these lesions that the prediction touches",
    "voxel_sensitivity": "Share of their voxels that is above the threshold",
}


COLUMNS: dict[str, dict[str, Any]] = {
    "detector": {"Description": "Anomaly detector"},
    "modality": {"Description": "Modality of the images"},
    "factor": {
        "Description": "What divides the lesions",
        "Levels": {
            ALL: "Nothing",
            VOLUME: "Volume of the lesion",
            CONTRAST: "Contrast to the brain around it, in standard deviations, dark or bright",
            LESION_LOAD: "Quartile of the lesion volume of the whole scan",
        },
    },
    "level": {"Description": "The part"},
    "n_participants": {"Description": "Participants with such lesions"},
    "n_lesions": {
        "Description": "26-connected lesions inside the brain of at least the least volume "
        "(min_lesion_volume_mm3 of group_benchmark), of all their scans"
    },
    **{name: {"Description": what} for name, what in _SHARES.items()},
    **interval_columns("lesion_sensitivity", "share of lesions touched", share=True),
    **interval_columns("voxel_sensitivity", "share of voxels found", share=True),
}
MISSED_COLUMNS: dict[str, dict[str, Any]] = {
    "modality": {"Description": "Modality of the images"},
    "lesions": {
        "Description": "Which lesions, of the images that every detector has scored",
        "Levels": {ALL: "All", SMALLEST: "Those up to the 25th percentile of volume"},
    },
    "volume_limit_mm3": {"Description": "The largest volume among them", "Units": "mm^3"},
    "n_detectors": {"Description": "Detectors of this modality"},
    "n_participants": {"Description": "Participants with such lesions"},
    "n_lesions": {"Description": "Number of them"},
    "missed_share": {"Description": "Share of them that no detector touches"},
    **interval_columns("missed_share", "share missed", share=True),
}


@dataclass
class Lesions:
    """The lesion tables of a cohort.

    Parameters
    ----------
    units : list of (str, str, str, str, numpy.ndarray)
        Participant, image, modality and detector, and what was measured: a row for each lesion that is
        counted, columns `_TABLE_COLUMNS`.
    without : int
        Images with lesions (times detectors) that have no such table, or no least volume of a lesion, since
        an earlier version scored them.
    """

    units: list[tuple[str, str, str, str, np.ndarray]] = field(default_factory=list)
    without: int = 0

    def add(self, unit: UnitScores) -> None:
        """Read the lesion table of an image and detector.

        Raises
        ------
        InputError
            If it is damaged, or has not as many lesions as the metrics table says.
        """
        path = unit.path.with_name(unit.path.name.replace("_metrics.tsv", "_lesions.tsv"))
        least = unit.min_lesion_volume_mm3
        if np.isnan(least) or not path.is_file():
            self.without += bool(unit.n_lesion.any() if np.isnan(least) else unit.n_lesions > 0)
            return
        values = read_numbers(path, _TABLE_COLUMNS)
        values = values[values[:, _TABLE_COLUMNS.index("volume_mm3")] >= least * (1 - 1e-9)]
        if len(values) != unit.n_lesions:
            problem = (
                f"{len(values)} lesions of {least:g} mm3 or more, but {unit.n_lesions:g} in the metrics table"
            )
            raise InputError(path, problem, REMEDY)
        self.units.append((unit.subject, unit.source_image, unit.modality, unit.detector, values))

    def include(self, other: Lesions) -> None:
        """Add those of another part of the cohort."""
        self.units += other.units
        self.without += other.without

    @property
    def table(self) -> pd.DataFrame:
        """One row for each lesion, image and detector."""
        sizes = [len(values) for *_, values in self.units]
        names = ("participant_id", "source_image", "modality", "detector")
        labels = {
            name: pd.Categorical([unit[k] for unit in self.units]).repeat(sizes)
            for k, name in enumerate(names)
        }
        values = np.concatenate([np.empty((0, len(_TABLE_COLUMNS))), *(values for *_, values in self.units)])
        return pd.DataFrame(labels | dict(zip(_TABLE_COLUMNS, values.T, strict=True)))


def lesion_sensitivity(lesions: pd.DataFrame, subjects: pd.DataFrame, *, seed: int) -> pd.DataFrame:
    """Say which share of the lesions, and of their voxels, each detector finds.

    Parameters
    ----------
    lesions : pandas.DataFrame
        One row for each lesion, image and detector (`Lesions.table`).
    subjects : pandas.DataFrame
        One row per image and detector: the lesion load.
    seed : int
        Seed of the bootstrap.

    Returns
    -------
    pandas.DataFrame
        Columns of `COLUMNS`.
    """
    load = levels_of(subjects, LESION_LOAD)
    load = load.groupby(subjects["source_image"]).first()
    factors = {
        ALL: pd.Series(ALL, index=lesions.index),
        VOLUME: _classes(lesions["volume_mm3"], VOLUMES),
        CONTRAST: _classes(lesions["contrast"].abs(), CONTRASTS),
        LESION_LOAD: lesions["source_image"].astype(str).map(load),
    }
    counts = lesions[["detector", "modality", "participant_id"]].assign(
        n=1.0,
        touched=lesions["detected"],
        volume=lesions["volume_mm3"],
        found=lesions["volume_mm3"] * lesions["found_share"],
    )
    rows = []
    for factor, levels in factors.items():
        people = (
            counts.assign(level=levels)
            .dropna(subset="level")
            .groupby(["detector", "modality", "level", "participant_id"], observed=True)
            .sum()
            .reset_index()
        )
        for (detector, modality, level), part in people.groupby(
            ["detector", "modality", "level"], observed=True, sort=True
        ):
            row = {"detector": detector, "modality": modality, "factor": factor, "level": level}
            row |= {"n_participants": len(part), "n_lesions": int(part["n"].sum())}
            row |= _share("lesion_sensitivity", part, "touched", "n", seed)
            row |= _share("voxel_sensitivity", part, "found", "volume", seed)
            rows.append(row)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def missed_by_all(lesions: pd.DataFrame, *, seed: int) -> pd.DataFrame:
    """Say which share of the lesions no detector touches.

    Parameters
    ----------
    lesions : pandas.DataFrame
        One row for each lesion, image and detector (`Lesions.table`).
    seed : int
        Seed of the bootstrap.

    Returns
    -------
    pandas.DataFrame
        Columns of `MISSED_COLUMNS`.
    """
    rows = []
    for modality, own in lesions.groupby("modality", observed=True, sort=True):
        n_detectors = own["detector"].nunique()
        # The volume tells an image apart that was preprocessed anew between two detectors.
        keys = ["participant_id", "source_image", "lesion", "volume_mm3"]
        found = own.groupby(keys, observed=True)["detected"].agg(["size", "max"]).reset_index()
        shared = found[found["size"] == n_detectors].assign(n=1.0)
        shared["missed"] = 1 - shared["max"]
        small = shared["volume_mm3"] <= shared["volume_mm3"].quantile(SMALL)
        for name, part in {ALL: shared, SMALLEST: shared[small]}.items():
            if part.empty:
                continue
            people = part.groupby("participant_id", observed=True)[["n", "missed"]].sum().reset_index()
            row = {"modality": modality, "lesions": name, "volume_limit_mm3": part["volume_mm3"].max()}
            row |= {"n_detectors": n_detectors, "n_participants": len(people), "n_lesions": len(part)}
            rows.append(row | _share("missed_share", people, "missed", "n", seed))
    return pd.DataFrame(rows, columns=list(MISSED_COLUMNS))


def _classes(values: pd.Series, ends: dict[str, float]) -> pd.Series:
    return pd.cut(values, [-np.inf, *ends.values()], right=False, labels=list(ends))


def _share(name: str, people: pd.DataFrame, part: str, whole: str, seed: int) -> dict[str, float]:
    """Share of totals over participants, with its interval."""
    low, high = share_interval(people[part], people[whole], people["participant_id"], seed=seed)
    share = float(people[part].sum() / people[whole].sum())
    return {name: share, f"{name}_ci_low": low, f"{name}_ci_high": high}
