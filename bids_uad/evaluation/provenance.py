"""Provenance of the models behind the score tables: training data, steps and changed hyperparameters."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from bids_uad.dataset.naming import score_sidecar
from bids_uad.files import read_json


@dataclass(frozen=True)
class ModelProvenance:
    """Training data and settings of a model; None for what the sidecars do not state.

    Parameters
    ----------
    model : str, optional
        Name of the bundle.
    n_subjects : int, optional
        Number of training participants.
    fraction : float, optional
        Fraction of the available training participants that was used (0 to 1).
    n_steps : int, optional
        Number of training steps.
    source : str, optional
        Training dataset.
    threshold_cohort : str, optional
        Dataset that the thresholds were chosen on.
    hyper : dict, default={}
        Hyperparameters that differ from the preset.
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
        """Changed hyperparameters as text, `name=value` joined by semicolons; empty without any."""
        return "; ".join(f"{name}={_text(value)}" for name, value in sorted(self.hyper.items()))


def read_model_provenance(
    output_dir: str | Path, subjects: pd.DataFrame
) -> dict[tuple[str, str], ModelProvenance]:
    """Read the provenance of each model, from one sidecar for each detector and modality.

    Parameters
    ----------
    output_dir : path-like
        Root of the derivatives.
    subjects : pandas.DataFrame
        One row per image and detector.

    Returns
    -------
    dict
        Provenance by detector and modality.

    Raises
    ------
    ConfigError
        If a sidecar is not valid JSON.
    """
    provenance = {}
    for row in subjects.drop_duplicates(["detector", "modality"]).itertuples():
        sidecar = score_sidecar(row.source_image, row.modality, row.detector)
        metadata = read_json(Path(output_dir) / sidecar)
        provenance[row.detector, row.modality] = ModelProvenance(
            model=metadata.get("Model"),
            n_subjects=metadata.get("TrainingSubjects"),
            fraction=metadata.get("TrainingFraction"),
            n_steps=metadata.get("TrainingSteps"),
            source=metadata.get("TrainingSource"),
            threshold_cohort=metadata.get("ThresholdCohort"),
            hyper=metadata.get("HyperParameters", {}),
        )
    return provenance


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
