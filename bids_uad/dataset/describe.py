"""The files that make a folder a BIDS derivative dataset.

Several participants may be processed at once into one folder, by jobs that know nothing of each other: every
file here is written atomically, by one job after the other, and what earlier runs put there is kept.
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

# Without trailing slashes: 'figures/' would hide the files and report the folder itself.
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
)

README = f"""# Anomaly maps made by bids_uad

T1w and T2w images of the source dataset, brought to the grid of the SRI24 atlas by rigid transforms, and maps
of how unusual detectors find each voxel of the brain. {NOT_CLINICAL}

What there may be for an image (`<T1w|T2w><Detector>` names the image and the detector):

| file | content |
|---|---|
| `*_space-SRI24_desc-preproc_T1w.nii.gz` | brain, 99.5th percentile of its intensities at 1, not cut |
| `*_desc-brain_mask.nii.gz` | brain mask, on the image's own grid and in SRI24 space |
| `*_desc-T2wBrain_mask.nii.gz` | the same of a T2w image that was registered to a T1w image |
| `*_xfm.txt` | transforms between the image and SRI24, ITK text |
| `*_qc.tsv` | quality of the image, and whether the group level leaves it out |
| `*_anomalymap.nii.gz` | anomaly score, or its deviation from a normative reference, unbounded |
| `*_label-anomaly_*_probseg.nii.gz` | score squashed to [0, 1), 0.5 at the threshold; not a probability |
| `*_label-anomaly_*_mask.nii.gz` | score above the threshold, also on the own grid (`space-orig`) |
| `*_dseg.nii.gz`, `*_dseg.tsv` | connected components of the mask and a table of them |
| `*_histogram.tsv`, `*_metrics.tsv` | score counts and volumes, which the group level reads |
| `*_lesions.tsv` | with a lesion mask: each lesion's volume and contrast, and what was found of it |
| `*_label-lesion_desc-manual_mask.nii.gz` | the lesion mask that was given, in SRI24 space |
| `sub-*.html`, `group.html` | reports of participants, and of the group level once it has run |

No threshold is chosen on these images: thresholds come with the models, and each sidecar says which
validation scans they were fixed on (`ThresholdCohort`). `*_metrics.tsv` says whether the participant was
among these, or among the training data (`seen_in_training`). `logs/CITATION.md` describes what was done.
"""


@dataclass(frozen=True)
class ModelEntry:
    """What the dataset description says about one model.

    Parameters
    ----------
    name : str
        Bundle name.
    version : str
        Code version that trained it.
    sha256 : str
        Of the bundle.
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
    """Write or complete the dataset-level files.

    Parameters
    ----------
    output_dir : pathlib.Path
        Derivative dataset.
    bids_dir : pathlib.Path
        Raw dataset; licence and name are taken from its description.
    derivatives : dict of str to pathlib.Path
        Other datasets that were read, by name.
    models : iterable of ModelEntry
        Added to those of earlier runs.
    descriptions : dict of str to str
        `desc-` labels and what they mean; added to those of earlier runs.

    Raises
    ------
    ConfigError
        If the folder holds another kind of dataset.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    # What is added to what is there must not be read before, and written after, another job adds something.
    with locked(output_dir / "logs" / "dataset.lock"):
        target = output_dir / "dataset_description.json"
        earlier = read_json(target)
        refuse_foreign(output_dir)
        _write_if_new(target, _description(output_dir, bids_dir, derivatives, models, earlier))
        text = output_dir / "README.md"
        if not text.exists():
            write_text(text, README)
        _complete_changes(output_dir / "CHANGES")
        _complete_bidsignore(output_dir / ".bidsignore")
        _complete_descriptions(output_dir, descriptions)


def refuse_foreign(output_dir: Path) -> None:
    """Refuse a folder that holds a raw dataset or another pipeline's derivatives.

    Raises
    ------
    ConfigError
    """
    earlier = read_json(output_dir / "dataset_description.json")
    names = [entry.get("Name") for entry in earlier.get("GeneratedBy", [])]
    if earlier and "bids_uad" not in names:
        raise ConfigError(
            f"{output_dir} already holds another dataset ('{earlier.get('Name', 'unnamed')}'); "
            "give a folder of its own"
        )


def dataset_link(target: Path, start: Path, description: dict[str, Any]) -> str:
    """Give the URI by which a derivative dataset refers to another, without telling paths of this host.

    Parameters
    ----------
    target : pathlib.Path
        The dataset referred to.
    start : pathlib.Path
        The derivative dataset.
    description : dict
        The target's dataset_description.json.

    Returns
    -------
    str
        A relative path where the two lie close together, else the DOI, else a name that is no path.
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
    """Give the source's authors and the app: the validator asks for more than one."""
    authors = [str(author) for author in raw.get("Authors", []) if author]
    return [*(authors or ["Authors of the source dataset"]), "bids_uad developers"]


def _complete_changes(path: Path) -> None:
    """Add an entry for this version, newest first."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if re.search(rf"^{re.escape(__version__)}\b", text, re.MULTILINE):
        return
    # Without a date: two jobs that start around midnight must write the same file.
    write_text(
        path, f"{__version__}\n  - Outputs of bids_uad {__version__}\n" + ("\n" + text if text else "")
    )


def _complete_bidsignore(path: Path) -> None:
    """Add our patterns to those that are there."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    missing = [pattern for pattern in BIDSIGNORE if pattern not in lines]
    if missing:
        write_text(path, "\n".join([*lines, *missing]) + "\n")


def _complete_descriptions(output_dir: Path, descriptions: dict[str, str]) -> None:
    """Write descriptions.tsv, one row for each `desc-` label."""
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
            "Description": "What the desc- labels in file names mean",
            "desc_id": {"Description": "Label of the desc- entity"},
            "description": {"Description": "What files with this label hold"},
        },
    )


def _write_if_new(path: Path, content: dict[str, Any]) -> None:
    """Write JSON unless the file already says the same."""
    if read_json(path) != content:
        write_json(path, content)
