"""Score tables of a study, read from the output folder of the command `score`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.paper.published import COHORTS, EIGHT
from bids_uad.dataset.participants import read_participants
from bids_uad.evaluation.curves import Curves
from bids_uad.evaluation.lesion_detection import Lesions
from bids_uad.evaluation.metrics import dice_curve
from bids_uad.evaluation.subjects import HEALTHY, LESION, add_participant_columns, subject_row
from bids_uad.evaluation.tables import find_metrics_tables, read_unit
from bids_uad.levels.participant.leakage import SEEN


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
        By detector and modality: Dice of each lesion scan (rows, by participant) at each threshold (columns).
    lesions : Lesions
        Lesion tables.
    facts : dict, default={}
        Number of planned participants, label maps and models.
    variants : dict of str to Study, default={}
        Studies of other models on the same participants.
    """

    subjects: pd.DataFrame
    curves: dict[tuple[str, str, str], Curves]
    dice: dict[tuple[str, str], pd.DataFrame]
    lesions: Lesions
    facts: dict[str, Any] = field(default_factory=dict)
    variants: dict[str, Study] = field(default_factory=dict)

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

    def column(self, participants: pd.Index, name: str) -> pd.Series:
        """Return a column of participants.tsv, such as `cohort`, of some participants."""
        return (
            self.subjects.drop_duplicates("participant_id")
            .set_index("participant_id")[name]
            .loc[participants]
        )

    def pathologies(self, modality: str) -> dict[str, str]:
        """Return the pathology of each participant with a lesion scan of a contrast."""
        rows = self.subjects[(self.subjects["modality"] == modality) & (self.subjects["role"] == LESION)]
        return dict(zip(rows["participant_id"], rows["cohort"], strict=True))

    def on_seen_scanner(self, modality: str) -> pd.Series:
        """Return for each participant whether any of the models was trained on scans of the scanner."""
        rows = self.subjects[self.subjects["modality"] == modality]
        return rows.groupby("participant_id")["scanner_seen"].agg(lambda own: (own.dropna() == SEEN).any())


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
    for path in find_metrics_tables(folder):
        unit = read_unit(path, people)
        row = subject_row(unit)
        rows.append(row)
        key = (unit.detector, unit.modality)
        curves.setdefault((*key, unit.cohort), Curves(unit.edges, unit.threshold)).add(unit)
        if row["role"] == LESION:
            lesions.add(unit)
            if unit.n_lesion.any():
                dice.setdefault(key, {})[unit.subject] = dice_curve(unit.n_nonlesion, unit.n_lesion)
    subjects = pd.DataFrame(rows)
    if len(subjects):
        subjects, _ = add_participant_columns(subjects, people)
    tables = {key: pd.DataFrame.from_dict(own, orient="index") for key, own in dice.items()}
    return Study(subjects, curves, tables, lesions)


def read_study(out: Path) -> Study:
    """Read all results of ``python -m benchmarks.paper score``.

    Parameters
    ----------
    out : pathlib.Path
        Output folder.

    Returns
    -------
    Study
        Results with those of variants.
    """
    study = read_tables(out / "tables", out)
    study.facts = json.loads((out / "study.json").read_text())
    for path in sorted((out / "variants").glob("*/*")):
        study.variants[f"{path.parent.name}/{path.name}"] = read_tables(path, out)
    if len(study.subjects):
        _add_slices(study.subjects, out / "drawn")
    return study


def _add_slices(subjects: pd.DataFrame, folder: Path) -> None:
    """Add the column `slices`: slice thickness by the drawn parameters in a folder, None if unknown."""
    drawn = {path.stem: json.loads(path.read_text()) for path in folder.glob("sub-*.json")}
    scans = zip(subjects["participant_id"], subjects["modality"], strict=True)
    thickness = pd.Series(
        [
            drawn.get(name, {}).get(modality, {}).get("protocol", {}).get("thickness", np.nan)
            for name, modality in scans
        ],
        subjects.index,
    )
    subjects["slices"] = np.where(thickness > 1, "2 to 6 mm", "1 mm")
    subjects.loc[thickness.isna(), "slices"] = None
