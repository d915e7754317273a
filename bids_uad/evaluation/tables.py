"""Reading of the score tables that the participant level writes for each image and detector."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from bids_uad.calibration.thresholds import HealthyMarked
from bids_uad.config import MODALITIES
from bids_uad.dataset.participants import Participants
from bids_uad.errors import InputError
from bids_uad.files import MISSING, REMEDY, read_columns, read_row

_NAME = re.compile(
    r"^(?P<prefix>sub-[A-Za-z0-9+]+(?:_[a-z]+-[A-Za-z0-9+]+)*?)"
    rf"_space-SRI24_desc-(?P<modality>{'|'.join(MODALITIES)})(?P<detector>[A-Za-z0-9]+)_metrics\.tsv$"
)
_METRICS_COLUMNS = (
    "source_image",
    "modality",
    "detector",
    "preset",
    "model_sha256",
    "app_version",
    "threshold",
    "threshold_name",
    "seen_in_training",
    "brain_volume_mm3",
    "anomaly_volume_mm3",
    "lesion_volume_mm3",
    "n_components",
    "n_lesions",
    "n_lesions_detected",
    "n_false_components",
)
_COUNTING_COLUMNS = ("min_lesion_volume_mm3", "n_counted_components")
"""Columns that depend on the minimum lesion volume."""
_OPTIONAL_NUMBERS = ("detected_volume_mm3", "min_component_volume_mm3", *_COUNTING_COLUMNS)
_HEALTHY_COLUMNS = ("healthy_mean", "healthy_p95")
_OPTIONAL_COLUMNS = ("scanner_seen", *_HEALTHY_COLUMNS, *_OPTIONAL_NUMBERS)
"""Columns that tables of earlier versions lack."""
_COUNTS = ("n_lesions", "n_lesions_detected", "n_false_components")
"""Counts that are not comparable in tables without a minimum lesion volume."""
_TEXTS = ("preset", "model_sha256", "app_version", "source_image", "threshold_name", "seen_in_training")
_HISTOGRAM_COLUMNS = ("score_lower", "score_upper", "n_nonlesion", "n_lesion")


@dataclass(frozen=True)
class UnitScores:
    """Score tables of one image and detector ("unit").

    Parameters
    ----------
    path : pathlib.Path
        Metrics table that the values were read from.
    prefix : str
        Entities of the image, `sub-X[_ses-Y][_acq-...]...`.
    entities : dict of str to str
        The same entities by key.
    modality : {"T1w", "T2w", "FLAIR"}
        Modality of the image.
    detector : str
        Registry name, followed by `+normative` for deviations.
    preset : str
        Hyperparameter preset of the bundle.
    healthy : bool or None
        Whether the participant is a healthy control at this session, by participants.tsv or sessions.tsv;
        None if no group is given.
    cohort : str
        `healthy`, the value of the column that names cohorts, or `unspecified`.
    edges : numpy.ndarray
        Lower edges of the score bins, float64, shape (n_bins,).
    n_nonlesion : numpy.ndarray
        Brain voxels per bin outside the lesion mask (all brain voxels without one), int64,
        shape (n_bins,).
    n_lesion : numpy.ndarray or None
        Brain voxels per bin inside the lesion mask; None without a lesion mask.
    threshold : float
        Fixed threshold, one of `edges`.
    threshold_name : str
        Criterion by which the threshold was chosen.
    model_sha256 : str
        SHA-256 of the model bundle.
    app_version : str
        Version of bids_uad that scored the image.
    source_image : str
        BIDS URI of the raw image.
    seen_in_training : str
        Data of the model that include the participant: `training`, `validation`, several, or `no`.
    scanner_seen : str or None
        `seen`, `name seen elsewhere` or `unseen` in the training data; None if not known.
    healthy_marked : HealthyMarked
        Fraction of the brain that the model marks in healthy validation scans.
    brain_volume_mm3, anomaly_volume_mm3, lesion_volume_mm3 : float
        Volumes in mm3; the last is NaN without a lesion mask.
    detected_volume_mm3 : float
        Volume of the anomaly mask inside the lesion mask in mm3; NaN without a lesion mask, and in tables of
        earlier versions, whose anomaly masks are plain thresholds.
    min_component_volume_mm3 : float
        Minimum volume of components of the anomaly mask in mm3; NaN in tables of earlier versions.
    min_lesion_volume_mm3 : float
        Minimum volume of counted lesions and false-positive components in mm3; NaN in tables of early
        versions, which counted all.
    n_components : float
        Number of 26-connected components of the anomaly mask.
    n_counted_components, n_lesions, n_lesions_detected, n_false_components : float
        Numbers of components and lesions of at least `min_lesion_volume_mm3`; NaN if that is not known, the
        last three also without a lesion mask.
    """

    path: Path
    prefix: str
    entities: dict[str, str]
    modality: str
    detector: str
    preset: str
    healthy: bool | None
    cohort: str
    edges: np.ndarray
    n_nonlesion: np.ndarray
    n_lesion: np.ndarray | None
    threshold: float
    threshold_name: str
    model_sha256: str
    app_version: str
    source_image: str
    seen_in_training: str
    scanner_seen: str | None
    healthy_marked: HealthyMarked
    brain_volume_mm3: float
    anomaly_volume_mm3: float
    lesion_volume_mm3: float
    detected_volume_mm3: float
    min_component_volume_mm3: float
    min_lesion_volume_mm3: float
    n_components: float
    n_counted_components: float
    n_lesions: float
    n_lesions_detected: float
    n_false_components: float

    @property
    def subject(self) -> str:
        """Participant, as `sub-<label>`."""
        return f"sub-{self.entities['sub']}"

    @property
    def session(self) -> str | None:
        """Session label; None without sessions."""
        return self.entities.get("ses")

    @property
    def has_lesion_mask(self) -> bool:
        """Whether there is a lesion mask for this image."""
        return self.n_lesion is not None


def find_metrics_tables(output_dir: str | Path, only: frozenset[str] = frozenset()) -> list[Path]:
    """List the metrics tables of the derivatives.

    Parameters
    ----------
    output_dir : path-like
        Root of the derivatives.
    only : frozenset of str, default=frozenset()
        Participants (`sub-<label>`) to include; empty means all.

    Returns
    -------
    list of pathlib.Path
        One table for each image and detector, sorted.
    """
    paths = find_tables(output_dir, "_metrics.tsv", only)
    return [path for path in paths if "_space-SRI24_desc-" in path.name]


def find_tables(output_dir: str | Path, ending: str, only: frozenset[str] = frozenset()) -> list[Path]:
    """List files of participants by the end of their name.

    Parameters
    ----------
    output_dir : path-like
        Root of the derivatives.
    ending : str
        End of the file names.
    only : frozenset of str, default=frozenset()
        Participants (`sub-<label>`) whose folders are searched; empty means all.

    Returns
    -------
    list of pathlib.Path
        Files that are not hidden, sorted.
    """
    folders = [Path(output_dir) / name for name in only] or Path(output_dir).glob("sub-*")
    return sorted(
        Path(parent, name)
        for folder in folders
        for parent, _, names in os.walk(folder)
        for name in names
        if name.endswith(ending) and not name.startswith(".")
    )


def subject_of(path: Path) -> str:
    """Return the participant, `sub-<label>`, from the name of a file."""
    return path.name.split("_", 1)[0]


def parse_entities(prefix: str) -> dict[str, str]:
    """Split `sub-01_ses-2_run-1` into a dictionary of entities."""
    return dict(part.split("-", 1) for part in prefix.split("_"))


def read_unit(path: Path, participants: Participants) -> UnitScores:
    """Read the metrics table and the score histogram of one image and detector.

    Parameters
    ----------
    path : pathlib.Path
        Metrics table (`_metrics.tsv`); the histogram (`_histogram.tsv`) is in the same folder.
    participants : Participants
        Participants of the raw dataset, with their groups.

    Returns
    -------
    UnitScores
        Content of both tables.

    Raises
    ------
    InputError
        If a table is missing, incomplete, or not consistent with itself or its file name.
    """
    name = _NAME.match(path.name)
    if name is None:
        raise InputError(path, "not a file name of this app", "move it out of the derivatives")
    row = read_row(path, _METRICS_COLUMNS, _OPTIONAL_COLUMNS)
    # File names do not contain the `+` of a detector with a deviation (`disyre+normative`).
    detector = row["detector"].lower()
    if (row["modality"], detector.replace("+", "")) != (name["modality"], name["detector"].lower()):
        raise InputError(path, "modality or detector differ from the file name", REMEDY)
    histogram = path.with_name(path.name.replace("_metrics.tsv", "_histogram.tsv"))
    edges, n_nonlesion, n_lesion = _read_histogram(histogram)

    entities = parse_entities(name["prefix"])
    visit = f"sub-{entities['sub']}", entities.get("ses")
    numbers = {key: _number(path, row, key) for key in _METRICS_COLUMNS if key.startswith("n_")}
    numbers |= {key: _number(path, row, key) for key in _METRICS_COLUMNS if key.endswith("_mm3")}
    numbers |= {key: _number(path, row, key) for key in _OPTIONAL_NUMBERS}
    if np.isnan(numbers["min_lesion_volume_mm3"]):
        numbers |= dict.fromkeys(_COUNTS, np.nan)
    healthy_marked = HealthyMarked.read({key: _number(path, row, key) for key in _HEALTHY_COLUMNS})
    threshold = _number(path, row, "threshold")
    if not np.isfinite(threshold):
        raise InputError(path, "no threshold", REMEDY)
    texts = {key: row[key] for key in _TEXTS}
    return UnitScores(
        path=path,
        prefix=name["prefix"],
        entities=entities,
        modality=name["modality"],
        detector=detector,
        healthy=participants.person(*visit).healthy,
        cohort=participants.cohort(*visit),
        edges=edges,
        n_nonlesion=n_nonlesion,
        n_lesion=n_lesion,
        threshold=threshold,
        scanner_seen=None if row["scanner_seen"] in MISSING else row["scanner_seen"],
        healthy_marked=healthy_marked,
        **texts,
        **numbers,
    )


def _number(path: Path, row: dict[str, str], column: str) -> float:
    if row[column] in MISSING:
        return float("nan")
    try:
        value = float(row[column])
    except ValueError as error:
        raise InputError(path, f"{column} is {row[column]!r}, not a number", REMEDY) from error
    if not np.isfinite(value):
        raise InputError(path, f"{column} is {row[column]}, not a finite number", REMEDY)
    return value


def _read_histogram(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return lower edges (float64), non-lesion and lesion counts (int64), each (n_bins,)."""
    columns = read_columns(path, _HISTOGRAM_COLUMNS)
    lower, upper, nonlesion, lesion = (columns[name] for name in _HISTOGRAM_COLUMNS)
    no_mask = MISSING.issuperset(lesion)
    try:
        edges = _edges(tuple(lower), tuple(upper))
        counts = [np.array(list(map(float, values))) for values in (nonlesion, () if no_mask else lesion)]
    except _InvalidBinsError as error:
        raise InputError(path, str(error), REMEDY) from error
    except ValueError as error:
        raise InputError(path, f"not only numbers ({error})", REMEDY) from error
    for values in counts:
        if not np.all((values >= 0) & np.isfinite(values) & (values == np.floor(values))):
            raise InputError(path, "voxel counts are not whole numbers", REMEDY)
    n_nonlesion, n_lesion = (values.astype(np.int64) for values in counts)
    return edges, n_nonlesion, None if no_mask else n_lesion


class _InvalidBinsError(Exception):
    """The edges of a histogram do not define bins."""


@lru_cache(maxsize=64)
def _edges(lower: tuple[str, ...], upper: tuple[str, ...]) -> np.ndarray:
    """Return the lower edges, float64, shape (n_bins,); cached, since all tables of a model share them."""
    below, above = (np.array(list(map(float, texts))) for texts in (lower, upper))
    if len(below) == 0 or not np.all(np.diff(below) > 0) or not np.isposinf(above[-1]):
        raise _InvalidBinsError("score bins do not increase to infinity")
    if not np.array_equal(above[:-1], below[1:]):
        raise _InvalidBinsError("gaps or overlaps between the score bins")
    below.flags.writeable = False
    return below
