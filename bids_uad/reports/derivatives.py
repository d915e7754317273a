"""Find the derivatives of a participant by their file names."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from bids_uad.config import MODALITIES
from bids_uad.dataset.lesion_masks import written_mask
from bids_uad.dataset.naming import PREFIX_ENTITIES
from bids_uad.files import DEPRECATED_COLUMNS
from bids_uad.methods.registry import detector_name
from bids_uad.space import NAME

_MODALITY = rf"(?P<modality>{'|'.join(MODALITIES)})"
_PREPROC = re.compile(rf"^(?P<prefix>sub-[a-zA-Z0-9+_-]+)_space-{NAME}_desc-preproc_{_MODALITY}\.nii\.gz$")
_DETECTION = re.compile(
    rf"^(?P<prefix>sub-[a-zA-Z0-9+_-]+)_space-{NAME}_(?:label-anomaly_)?(?:desc|seg)-{_MODALITY}"
    r"(?P<detector>[A-Z][a-zA-Z0-9]*)_(?:anomalymap|mask|dseg|histogram|metrics)\.(?:nii\.gz|tsv)$"
)
_ENTITY_NAMES = {key: name for name, key in PREFIX_ENTITIES if name != "subject"}


@dataclass(frozen=True)
class Detection:
    """Outputs of one detector for one image; each may be missing.

    Attributes
    ----------
    detector : str
        Name as in the file names, such as ``Patchcore``.
    desc : str
        Modality and detector, such as ``T1wPatchcore``.
    anomaly_map, mask, components, component_table, histogram : pathlib.Path or None
        Paths of the outputs.
    metrics : dict
        Row of the metrics table without missing values.
    sidecar : dict
        Metadata of the anomaly mask.
    """

    detector: str
    desc: str
    anomaly_map: Path | None
    mask: Path | None
    components: Path | None
    component_table: Path | None
    histogram: Path | None
    metrics: dict[str, Any]
    sidecar: dict[str, Any]

    @property
    def title(self) -> str:
        """Name of the detector, printed in the report."""
        return detector_name(self.detector.lower())

    @property
    def threshold(self) -> float | None:
        """Threshold of the anomaly mask."""
        value = self.metrics.get("threshold", self.sidecar.get("Threshold"))
        return None if value is None else float(value)

    @property
    def threshold_name(self) -> str:
        """Name of the threshold, such as ``max_dice``."""
        return str(
            self.metrics.get("threshold_name", self.sidecar.get("ThresholdName", "source not recorded"))
        )

    @property
    def rule(self) -> dict[str, Any]:
        """Decision rule besides the threshold, as for `describe_rule`; empty for a plain threshold."""
        fields = {
            "low_threshold": "LowThreshold",
            "min_volume_mm3": "MinComponentVolume",
            "holes": "FilledHoles",
        }
        if not set(fields.values()) <= set(self.sidecar):
            return {}
        fields["min_volume_source"] = "MinComponentVolumeSource"
        return {name: self.sidecar.get(field) for name, field in fields.items()}


@dataclass(frozen=True)
class Image:
    """Derivatives of one raw image.

    Attributes
    ----------
    prefix : str
        Entities at the start of the names of its outputs.
    modality : {"T1w", "T2w", "FLAIR"}
        Suffix of the image.
    preproc, brain, lesion : pathlib.Path or None
        Preprocessed image, brain mask and lesion mask in SRI24 space.
    detections : tuple of Detection
        Outputs of each detector.
    """

    prefix: str
    modality: str
    preproc: Path | None
    brain: Path | None
    lesion: Path | None
    detections: tuple[Detection, ...] = field(default=())

    @property
    def entities(self) -> dict[str, str]:
        """Entities except the subject, by their PyBIDS names."""
        pairs = (part.split("-", 1) for part in self.prefix.split("_")[1:])
        return {_ENTITY_NAMES[key]: value for key, value in pairs if key in _ENTITY_NAMES}

    @property
    def name(self) -> str:
        """Name printed in the report, such as ``T1w, session 01, run 2``."""
        return ", ".join([self.modality, *(f"{key} {value}" for key, value in self.entities.items())])


def find_images(out_dir: Path, subject: str) -> list[Image]:
    """Find the images of a participant with at least one output in SRI24 space.

    Parameters
    ----------
    out_dir : pathlib.Path
        Root of the derivative dataset.
    subject : str
        Label without ``sub-``.

    Returns
    -------
    list of Image
        Images sorted by session and name.
    """
    root = out_dir / f"sub-{subject}"
    folders = [root / "anat", *sorted(root.glob("ses-*/anat"))]
    return [image for folder in folders if folder.is_dir() for image in _images_in(folder)]


def read_sidecar(path: Path) -> dict[str, Any]:
    """Read the JSON sidecar of an output; empty if there is none."""
    sidecar = path.with_name(path.name.split(".", 1)[0] + ".json")
    return json.loads(sidecar.read_text(encoding="utf-8")) if sidecar.is_file() else {}


def _images_in(folder: Path) -> list[Image]:
    detectors: dict[tuple[str, str], set[str]] = {}
    for path in folder.iterdir():
        if match := _PREPROC.match(path.name):
            detectors.setdefault((match["prefix"], match["modality"]), set())
        elif match := _DETECTION.match(path.name):
            if match["detector"] == "Brain":  # desc-T2wBrain is the brain mask of a T2w, no detector's
                continue
            detectors.setdefault((match["prefix"], match["modality"]), set()).add(match["detector"])
    images = []
    for (prefix, modality), found in sorted(detectors.items()):
        start = folder / f"{prefix}_space-{NAME}"
        images.append(
            Image(
                prefix,
                modality,
                _existing(start, f"_desc-preproc_{modality}.nii.gz"),
                _existing(start, f"_desc-{modality}Brain_mask.nii.gz")
                or _existing(start, "_desc-brain_mask.nii.gz"),
                written_mask(folder / f"{start.name}_desc-preproc_{modality}.nii.gz"),
                tuple(_detection(start, modality, detector) for detector in sorted(found)),
            )
        )
    return images


def _detection(start: Path, modality: str, detector: str) -> Detection:
    desc = f"{modality}{detector}"
    mask = _existing(start, f"_label-anomaly_desc-{desc}_mask.nii.gz")
    metrics = _existing(start, f"_desc-{desc}_metrics.tsv")
    return Detection(
        detector,
        desc,
        _existing(start, f"_desc-{desc}_anomalymap.nii.gz"),
        mask,
        _existing(start, f"_seg-{desc}_dseg.nii.gz"),
        _existing(start, f"_seg-{desc}_dseg.tsv"),
        _existing(start, f"_desc-{desc}_histogram.tsv"),
        {}
        if metrics is None
        else pd.read_csv(metrics, sep="\t").rename(columns=DEPRECATED_COLUMNS).iloc[0].dropna().to_dict(),
        {} if mask is None else read_sidecar(mask),
    )


def _existing(start: Path, rest: str) -> Path | None:
    path = start.with_name(start.name + rest)
    return path if path.is_file() else None
