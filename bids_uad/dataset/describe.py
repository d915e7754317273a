"""Dataset-level files of the derivatives: dataset_description.json, README, CHANGES and so on.

Several jobs may write into one folder at the same time. Each file is therefore written atomically and under a
lock, and the entries of earlier runs are kept.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from bids_uad import __version__
from bids_uad.dataset.sidecars import NOT_CLINICAL
from bids_uad.errors import ConfigError
from bids_uad.files import locked, read_json, write_json, write_text, write_tsv

BIDS_VERSION = "1.10.1"
HED_VERSION = "8.4.0"
MAX_STEPS_UP = 2
"""Parent folders up to which another dataset is linked by a relative path."""


BIDSIGNORE = (
    "*.html",
    "figures",
    "log",
    "/group*",
    "*_xfm.*",
    "*_anomalymap.*",
    "*_metrics.*",
    "*_histogram.*",
    "*_lesions.*",
    "*_qc.*",
    "*_roi.*",
    "*_dseg.lut",
    "*_dseg.txt",
    "*_dseg.label",
    "*_dseg.ctbl",
)
"""Patterns of .bidsignore, without trailing slashes: with `figures/` the validator reports the folder
itself."""

README = f"""# Anomaly maps of brain MRI (bids_uad)

This dataset contains T1w, T2w and FLAIR images of the source dataset, rigidly registered to the SRI24 atlas,
and the anomaly scores that unsupervised detectors assign to each brain voxel. {NOT_CLINICAL}

Files of an image (`<T1w|T2w|FLAIR><Detector>` in a name is modality and detector, such as `T1wDisyre`):

| file | content |
|---|---|
| `*_space-SRI24_desc-preproc_T1w.nii.gz` | skull-stripped image, 99.5th percentile of the brain at 1 |
| `*_desc-brain_mask.nii.gz` | brain mask, in native and in SRI24 space |
| `*_desc-T2wBrain_mask.nii.gz` | brain mask of a T2w image registered to a T1w image; also `FLAIRBrain` |
| `*_xfm.txt` | rigid transforms between native and SRI24 space (ITK text format) |
| `*_qc.tsv` | image quality metrics, and whether the group level excludes the image |
| `*_anomalymap.nii.gz` | anomaly score, or its deviation from a normative reference; unbounded |
| `*_label-anomaly_*_probseg.nii.gz` | score rescaled to [0, 1), 0.5 at the threshold; not a probability |
| `*_label-anomaly_*_mask.nii.gz` | voxels above the threshold, in SRI24 and in native space (`space-orig`) |
| `*_dseg.nii.gz`, `*_dseg.tsv` | connected components of the mask, and a table of them with their regions |
| `*_dseg.lut`, `.txt`, `.label`, `.ctbl` | look-up tables for FSLeyes, Freeview, ITK-SNAP, 3D Slicer |
| `*_label-lesion_roi.nii.gz` | mask on the grid of the raw T1w image, for fMRIPrep and FastSurfer |
| `*_histogram.tsv`, `*_metrics.tsv` | score histogram, volumes and lesion counts, read by the group level |
| `*_space-MNI152NLin2009cAsym_*` | with `--output-spaces`: the same, by an affine transform from SRI24 |
| `*_lesions.tsv` | if there is a lesion mask: volume, contrast and detected fraction of each lesion |
| `*_desc-longitudinal_lesions.tsv` | with several sessions: change of each lesion between two sessions |
| `*_label-lesion_desc-manual_mask.nii.gz` | lesion mask provided by the user, in SRI24 space |
| `sub-*.html`, `group.html` | reports of participants, of each of several sessions, and of the group level |

The thresholds are not chosen on these images. They are part of the models; the field `ThresholdCohort` of
each sidecar names the validation scans they were chosen on. The column `seen_in_training` of `*_metrics.tsv`
states whether the participant is part of the training or validation data. `logs/CITATION.md` describes the
methods.
"""


@dataclass(frozen=True)
class ModelEntry:
    """Entry of a model in dataset_description.json.

    Parameters
    ----------
    name : str
        Name of the model bundle.
    version : str
        Version of bids_uad that trained the model.
    sha256 : str
        SHA-256 of the bundle.
    """

    name: str
    version: str
    sha256: str


def describe_dataset(
    output_dir: Path,
    bids_dir: Path,
    derivatives: dict[str, Path],
    models: Iterable[ModelEntry],
    descriptions: dict[str, str],
) -> None:
    """Write or update the dataset-level files.

    Parameters
    ----------
    output_dir : pathlib.Path
        Derivative dataset.
    bids_dir : pathlib.Path
        Raw dataset; name, licence and authors are taken from its description.
    derivatives : dict of str to pathlib.Path
        Other input datasets of the run, by name.
    models : iterable of ModelEntry
        Models of the run, added to those of earlier runs.
    descriptions : dict of str to str
        Meaning of each `desc-` label of the run, added to those of earlier runs.

    Raises
    ------
    ConfigError
        If the folder holds a dataset that bids_uad did not write.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    # The lock covers reading and writing, so that no entry of another job is lost in between.
    with locked(output_dir / "logs" / "dataset.lock"):
        target = output_dir / "dataset_description.json"
        earlier = read_json(target)
        refuse_foreign(output_dir)
        _write_if_new(target, _description(output_dir, bids_dir, derivatives, models, earlier))
        readme = output_dir / "README.md"
        if not readme.exists():
            write_text(readme, README)
        _update_changes(output_dir / "CHANGES")
        _update_bidsignore(output_dir / ".bidsignore")
        _update_descriptions(output_dir, descriptions)


def refuse_foreign(output_dir: Path) -> None:
    """Check that the output folder does not hold a dataset that bids_uad did not write.

    Parameters
    ----------
    output_dir : pathlib.Path
        Output folder of the run.

    Raises
    ------
    ConfigError
        If the folder holds a raw dataset or the derivatives of another pipeline.
    """
    earlier = read_json(output_dir / "dataset_description.json")
    if earlier and not is_own(earlier):
        raise ConfigError(
            f"{output_dir}: already holds another dataset ('{earlier.get('Name', 'unnamed')}'); "
            "choose another output folder"
        )


def is_own(description: dict[str, Any]) -> bool:
    """Return whether bids_uad wrote a dataset, by the content of its dataset_description.json."""
    return any(entry.get("Name") == "bids_uad" for entry in description.get("GeneratedBy", []))


def dataset_link(target: Path, start: Path, description: dict[str, Any]) -> str:
    """Return the URI of another dataset for `DatasetLinks`, without absolute paths of this computer.

    Parameters
    ----------
    target : pathlib.Path
        Dataset that is linked to.
    start : pathlib.Path
        Derivative dataset that holds the link.
    description : dict
        Content of the dataset_description.json of `target`.

    Returns
    -------
    str
        Relative path if it goes up at most `MAX_STEPS_UP` folders, else the DOI, else a URN with the name of
        the dataset.
    """
    relative = Path(os.path.relpath(target, start))
    if relative.parts.count("..") <= MAX_STEPS_UP or target.is_relative_to(start):
        return quote(relative.as_posix())
    doi = str(description.get("DatasetDOI", ""))
    if doi:
        return doi if ":" in doi else f"doi:{doi}"
    return f"urn:bids-dataset:{quote(str(description.get('Name') or target.name), safe='')}"


def _description(
    output_dir: Path,
    bids_dir: Path,
    derivatives: dict[str, Path],
    models: Iterable[ModelEntry],
    earlier: dict[str, Any],
) -> dict[str, Any]:
    raw = read_json(bids_dir / "dataset_description.json")
    links = dict(earlier.get("DatasetLinks", {}))
    links["raw"] = dataset_link(bids_dir, output_dir, raw)
    for name, path in derivatives.items():
        links[name] = dataset_link(path, output_dir, read_json(path / "dataset_description.json"))
    app: dict[str, Any] = {
        "Name": "bids_uad",
        "Version": __version__,
        "Description": "Unsupervised anomaly detection in brain MRI",
    }
    if tag := os.environ.get("BIDS_UAD_CONTAINER_TAG"):
        app["Container"] = {"Type": os.environ.get("BIDS_UAD_CONTAINER_TYPE", "docker"), "Tag": tag}
    weights = {
        (entry["Name"], entry.get("Version")): entry
        for entry in earlier.get("GeneratedBy", [])
        if entry.get("Name") != "bids_uad"
    }
    for model in models:
        weights[model.name, model.version] = {
            "Name": model.name,
            "Version": model.version,
            "Description": f"Model bundle, SHA-256 {model.sha256}",
        }
    source = {"URL": links["raw"]}
    if doi := raw.get("DatasetDOI"):
        source["DOI"] = doi
    return {
        "Name": f"bids_uad: anomaly maps of {raw.get('Name', bids_dir.name)}",
        "BIDSVersion": BIDS_VERSION,
        "HEDVersion": HED_VERSION,
        "DatasetType": "derivative",
        "License": raw.get("License") or "as the source dataset",
        "Authors": _authors(raw),
        "HowToAcknowledge": "See logs/CITATION.md, and cite the source dataset",
        "Keywords": ["anomaly detection", "brain MRI", "SRI24"],
        "GeneratedBy": [app, *(weights[key] for key in sorted(weights, key=str))],
        "SourceDatasets": [source],
        "DatasetLinks": dict(sorted(links.items())),
    }


def _authors(raw: dict[str, Any]) -> list[str]:
    """Return the authors of the source dataset and of the app, since the validator requires two or more."""
    authors = [str(author) for author in raw.get("Authors", []) if author]
    return [*(authors or ["Authors of the source dataset"]), "bids_uad developers"]


def _update_changes(path: Path) -> None:
    """Add an entry for this version, newest first."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if re.search(rf"^{re.escape(__version__)}\b", text, re.MULTILINE):
        return
    # Without a date, so that jobs that start around midnight write the same text.
    write_text(
        path, f"{__version__}\n  - Outputs of bids_uad {__version__}\n" + ("\n" + text if text else "")
    )


def _update_bidsignore(path: Path) -> None:
    """Add the patterns that are missing."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    missing = [pattern for pattern in BIDSIGNORE if pattern not in lines]
    if missing:
        write_text(path, "\n".join([*lines, *missing]) + "\n")


def _update_descriptions(output_dir: Path, descriptions: dict[str, str]) -> None:
    """Add the `desc-` labels of the run to descriptions.tsv."""
    path = output_dir / "descriptions.tsv"
    rows = {}
    if path.exists():
        table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
        rows = dict(zip(table["desc_id"], table["description"], strict=True))
    merged = {**rows, **{f"desc-{label}": text for label, text in descriptions.items()}}
    if merged != rows:
        ordered = sorted(merged.items())
        write_tsv(path, pd.DataFrame(ordered, columns=["desc_id", "description"]))
    _write_if_new(
        output_dir / "descriptions.json",
        {
            "Description": "Meaning of the desc- labels in file names",
            "desc_id": {"Description": "Label of the desc- entity"},
            "description": {"Description": "Content of the files with this label"},
        },
    )


def _write_if_new(path: Path, content: dict[str, Any]) -> None:
    """Write JSON unless the file already has this content."""
    if read_json(path) != content:
        write_json(path, content)
