"""Lesion detection by volume and contrast of the lesions and by the lesion load of the scan."""

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
"""Classes of lesion volume with their upper limits in mm3."""
CONTRASTS = {"below 0.5": 0.5, "0.5 to 1": 1.0, "1 to 2": 2.0, "2 and above": np.inf}
"""Classes of absolute contrast with their upper limits, in standard deviations of the surrounding brain."""
SMALL_QUANTILE = 0.25
SMALLEST = "smallest quarter"

_TABLE_COLUMNS = ("lesion", "volume_mm3", "detected_fraction", "detected", "contrast")

COLUMNS: dict[str, dict[str, Any]] = {
    "detector": {"Description": "Anomaly detector"},
    "modality": {"Description": "Modality of the images"},
    "factor": {
        "Description": "Variable by which lesions are grouped",
        "Levels": {
            ALL: "No grouping",
            VOLUME: "Volume of the lesion",
            CONTRAST: "Absolute contrast to the surrounding brain, in standard deviations",
            LESION_LOAD: "Quartile of the lesion volume of the whole scan",
        },
    },
    "level": {"Description": "Group of lesions"},
    "n_participants": {"Description": "Number of participants with lesions of this group"},
    "n_lesions": {
        "Description": "Number of lesions (26-connected, of at least min_lesion_volume_mm3 of "
        "group_benchmark), all scans"
    },
    "lesion_sensitivity": {"Description": "Fraction of these lesions that overlap with the anomaly mask"},
    "voxel_sensitivity": {"Description": "Fraction of the voxels of these lesions above the threshold"},
    **interval_columns("lesion_sensitivity", "fraction of detected lesions", share=True),
    **interval_columns("voxel_sensitivity", "fraction of detected voxels", share=True),
}
MISSED_COLUMNS: dict[str, dict[str, Any]] = {
    "modality": {"Description": "Modality of the images"},
    "lesions": {
        "Description": "Group of lesions, from images scored by all detectors",
        "Levels": {ALL: "All lesions", SMALLEST: "Lesions up to the 25th percentile of volume"},
    },
    "volume_limit_mm3": {"Description": "Largest volume of a lesion of this group", "Units": "mm^3"},
    "n_detectors": {"Description": "Number of detectors of this modality"},
    "n_participants": {"Description": "Number of participants with lesions of this group"},
    "n_lesions": {"Description": "Number of lesions of this group"},
    "missed_fraction": {"Description": "Fraction of these lesions that no detector detects"},
    **interval_columns("missed_fraction", "fraction of missed lesions", share=True),
}


@dataclass
class Lesions:
    """Lesion tables of a cohort.

    Parameters
    ----------
    units : list of (str, str, str, str, numpy.ndarray), default=[]
        Participant, image, modality, detector, and an array with a row for each counted lesion and the
        columns `_TABLE_COLUMNS`.
    without : int, default=0
        Number of images with lesions (times detectors) without a lesion table or a minimum lesion volume,
        since an early app version scored them.
    """

    units: list[tuple[str, str, str, str, np.ndarray]] = field(default_factory=list)
    without: int = 0

    def add(self, unit: UnitScores) -> None:
        """Read the lesion table of an image and detector.

        Parameters
        ----------
        unit : UnitScores
            Scores of the image.

        Raises
        ------
        InputError
            If the table is damaged, or its number of lesions differs from that in the metrics table.
        """
        path = unit.path.with_name(unit.path.name.replace("_metrics.tsv", "_lesions.tsv"))
        minimum = unit.min_lesion_volume_mm3
        if np.isnan(minimum) or not path.is_file():
            self.without += bool(unit.n_lesion.any() if np.isnan(minimum) else unit.n_lesions > 0)
            return
        values = read_numbers(path, _TABLE_COLUMNS)
        values = values[values[:, _TABLE_COLUMNS.index("volume_mm3")] >= minimum * (1 - 1e-9)]
        if len(values) != unit.n_lesions:
            counts = f"{len(values)} lesions of at least {minimum:g} mm3, but {unit.n_lesions:g}"
            raise InputError(path, f"{counts} in the metrics table", REMEDY)
        self.units.append((unit.subject, unit.source_image, unit.modality, unit.detector, values))

    def include(self, other: Lesions) -> None:
        """Add the lesion tables of other participants."""
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
    """Compute the fraction of lesions and of lesion voxels that each detector detects.

    Parameters
    ----------
    lesions : pandas.DataFrame
        One row for each lesion, image and detector (`Lesions.table`).
    subjects : pandas.DataFrame
        One row per image and detector, for the lesion load.
    seed : int
        Seed of the bootstrap.

    Returns
    -------
    pandas.DataFrame
        Columns of `COLUMNS`.
    """
    load = levels_of(subjects, LESION_LOAD)
    load = load.groupby(subjects["source_image"]).first()
    groups = {
        ALL: pd.Series(ALL, index=lesions.index),
        VOLUME: _classes(lesions["volume_mm3"], VOLUMES),
        CONTRAST: _classes(lesions["contrast"].abs(), CONTRASTS),
        LESION_LOAD: lesions["source_image"].astype(str).map(load),
    }
    counts = lesions[["detector", "modality", "participant_id"]].assign(
        n=1.0,
        detected=lesions["detected"],
        volume=lesions["volume_mm3"],
        detected_volume=lesions["volume_mm3"] * lesions["detected_fraction"],
    )
    rows = []
    for factor, levels in groups.items():
        totals = (
            counts.assign(level=levels)
            .dropna(subset="level")
            .groupby(["detector", "modality", "level", "participant_id"], observed=True)
            .sum()
            .reset_index()
        )
        keys = ["detector", "modality", "level"]
        for (detector, modality, level), part in totals.groupby(keys, observed=True, sort=True):
            row = {"detector": detector, "modality": modality, "factor": factor, "level": level}
            row |= {"n_participants": len(part), "n_lesions": int(part["n"].sum())}
            row |= _fraction("lesion_sensitivity", part, "detected", "n", seed)
            row |= _fraction("voxel_sensitivity", part, "detected_volume", "volume", seed)
            rows.append(row)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def missed_by_all(lesions: pd.DataFrame, *, seed: int) -> pd.DataFrame:
    """Compute the fraction of lesions that no detector detects.

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
        # The volume is a key, since it differs if an image was preprocessed again between two detectors.
        keys = ["participant_id", "source_image", "lesion", "volume_mm3"]
        detected = own.groupby(keys, observed=True)["detected"].agg(["size", "max"]).reset_index()
        shared = detected[detected["size"] == n_detectors].assign(n=1.0)
        shared["missed"] = 1 - shared["max"]
        small = shared["volume_mm3"] <= shared["volume_mm3"].quantile(SMALL_QUANTILE)
        for name, part in {ALL: shared, SMALLEST: shared[small]}.items():
            if part.empty:
                continue
            totals = part.groupby("participant_id", observed=True)[["n", "missed"]].sum().reset_index()
            row = {"modality": modality, "lesions": name, "volume_limit_mm3": part["volume_mm3"].max()}
            row |= {"n_detectors": n_detectors, "n_participants": len(totals), "n_lesions": len(part)}
            rows.append(row | _fraction("missed_fraction", totals, "missed", "n", seed))
    return pd.DataFrame(rows, columns=list(MISSED_COLUMNS))


def _classes(values: pd.Series, limits: dict[str, float]) -> pd.Series:
    """Return the class of each value, given the upper limits of the classes."""
    return pd.cut(values, [-np.inf, *limits.values()], right=False, labels=list(limits))


def _fraction(name: str, totals: pd.DataFrame, part: str, whole: str, seed: int) -> dict[str, float]:
    """Return a fraction of sums over participants with its confidence interval."""
    low, high = share_interval(totals[part], totals[whole], totals["participant_id"], seed=seed)
    fraction = float(totals[part].sum() / totals[whole].sum())
    return {name: fraction, f"{name}_ci_low": low, f"{name}_ci_high": high}
