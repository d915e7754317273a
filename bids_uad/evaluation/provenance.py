"""What the sidecars of the score tables tell about the models behind them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from bids_uad.dataset.naming import score_sidecar
from bids_uad.files import read_json


@dataclass(frozen=True)
class Origin:
    """Where a model comes from; None where its tables do not say.

    Parameters
    ----------
    model : str or None
        Name of the bundle.
    n_subjects : int or None
        Subjects that it has learnt from.
    fraction : float or None
        Share of the training subjects that these are.
    n_steps : int or None
        Training steps.
    source : str or None
        Dataset that it has learnt from.
    threshold_cohort : str or None
        Dataset that its thresholds were fixed on.
    hyper : dict
        Hyper-parameters that were changed from the preset.
    """

    model: str | None = None
    n_subjects: int | None = None
    fraction: float | None = None
    n_steps: int | None = None
    source: str | None = None
    threshold_cohort: str | None = None
    hyper: dict[str, Any] = field(default_factory=dict)

    @property
    def changes(self) -> str:
        """The changed hyper-parameters as text, `name=value`; empty without any."""
        return "; ".join(f"{name}={_text(value)}" for name, value in sorted(self.hyper.items()))


def read_origins(output_dir: str | Path, subjects: pd.DataFrame) -> dict[tuple[str, str], Origin]:
    """Read one sidecar for each detector and modality; all of these have the same model.

    Parameters
    ----------
    output_dir : path-like
        Root of the derivatives.
    subjects : pandas.DataFrame
        One row per image and detector.

    Returns
    -------
    dict
        (detector, modality) -> `Origin`.

    Raises
    ------
    ConfigError
        If a sidecar is no JSON.
    """
    origins = {}
    for row in subjects.drop_duplicates(["detector", "modality"]).itertuples():
        sidecar = score_sidecar(row.source_image, row.modality, row.detector)
        told = read_json(Path(output_dir) / sidecar)
        origins[row.detector, row.modality] = Origin(
            model=told.get("Model"),
            n_subjects=told.get("TrainingSubjects"),
            fraction=told.get("TrainingFraction"),
            n_steps=told.get("TrainingSteps"),
            source=told.get("TrainingSource"),
            threshold_cohort=told.get("ThresholdCohort"),
            hyper=told.get("HyperParameters", {}),
        )
    return origins


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
