"""How outputs are named: one set of patterns, for the data sink and for whoever looks for files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bids_uad.dataset.published import detector_desc
from bids_uad.dataset.units import PREFIX_ENTITIES, ImageUnit
from bids_uad.space import NAME

_OWN_ENTITIES = (
    ("from", "from"),
    ("to", "to"),
    ("mode", "mode"),
    ("space", "space"),
    ("segmentation", "seg"),
    ("label", "label"),
    ("desc", "desc"),
)

ENTITIES: list[dict[str, Any]] = [
    {"name": name, "pattern": rf"[_/\\]+{key}-([a-zA-Z0-9+]+)"}
    for name, key in (*PREFIX_ENTITIES, *_OWN_ENTITIES)
] + [
    {"name": "suffix", "pattern": r"[_/\\]([a-zA-Z0-9]+)\.[^/\\]+$"},
    {"name": "extension", "pattern": r"[^./\\](\.[^/\\]+)$"},
    {"name": "datatype", "pattern": r"[/\\](anat)[/\\]"},
]
"""Entities of our outputs, in the order of their names."""

_FOLDER = "sub-{subject}[/ses-{session}]/anat/"
_PREFIX = "_".join(["sub-{subject}"]) + "".join(f"[_{key}-{{{name}}}]" for name, key in PREFIX_ENTITIES[1:])

PATTERNS = [
    _FOLDER + _PREFIX + "_from-{from}_to-{to}_mode-{mode|image}_{suffix<xfm>}{extension<.txt>|.txt}",
    _FOLDER + _PREFIX + "[_space-{space}][_seg-{segmentation}][_label-{label}][_desc-{desc}]"
    "_{suffix<T1w|T2w|mask|dseg|probseg|anomalymap|histogram|metrics|lesions|qc>}{extension<.nii.gz|.tsv|.json>|.nii.gz}",
]  # fmt: skip
"""pybids path patterns of our outputs."""


_ENTITY = re.compile(r"(?:^|_)([a-z]+)-([0-9a-zA-Z+]+)(?=_)")


def entities_of(path: Path) -> dict[str, str]:
    """Read the `key-value` pairs of a BIDS file name."""
    return dict(_ENTITY.findall(path.name))


def output_path(unit: ImageUnit, *, suffix: str, extension: str = ".nii.gz", **entities: str) -> Path:
    """Name one output of an image, relative to the derivative dataset.

    Parameters
    ----------
    unit : ImageUnit
        The image whose entities the name starts with.
    suffix, extension : str
    **entities : str
        pybids names: `space`, `segmentation`, `label`, `desc`, or `from`, `to`, `mode` for transforms.

    Returns
    -------
    pathlib.Path

    Raises
    ------
    ValueError
        If no pattern takes these entities.
    """
    return _named({**unit.output_entities, **entities, "suffix": suffix, "extension": extension})


def _named(values: Mapping[str, str]) -> Path:
    # Here, since levels that only look for lesion masks need not wait for pybids.
    from bids.layout.writing import build_path

    name = build_path(dict(values), PATTERNS, strict=True)
    if name is None:
        raise ValueError(f"no output is named with {values}")
    return Path(name)


def brain_desc(unit: ImageUnit) -> str:
    """Give the `desc-` of an image's brain mask: a T2w beside a T1w has its own, named apart."""
    return "brain" if unit.is_anchor else f"{unit.modality}Brain"


def preprocessing_outputs(unit: ImageUnit) -> dict[str, Path]:
    """Name what preprocessing writes for an image, by the name of the workflow's output field."""
    brain = brain_desc(unit)
    forward = {"from": unit.modality, "to": NAME, "mode": "image"}
    inverse = {"from": NAME, "to": unit.modality, "mode": "image"}
    return {
        "preproc": output_path(unit, space=NAME, desc="preproc", suffix=unit.modality),
        "brain_mask": output_path(unit, space=NAME, desc=brain, suffix="mask"),
        "native_mask": output_path(unit, desc=brain, suffix="mask"),
        "to_sri24": output_path(unit, suffix="xfm", extension=".txt", **forward),
        "from_sri24": output_path(unit, suffix="xfm", extension=".txt", **inverse),
    }


def quality_output(unit: ImageUnit) -> Path:
    """Name the table of an image's quality."""
    return output_path(unit, space=NAME, desc=f"{unit.modality}Preproc", suffix="qc", extension=".tsv")


def lesion_output(entities: Mapping[str, str]) -> Path:
    """Name a lesion mask in SRI24 space, relative to the derivative dataset.

    Parameters
    ----------
    entities : mapping of str to str
        Those of the images it belongs to, by pybids name (`subject`, `session`, `run`).

    Returns
    -------
    pathlib.Path
    """
    own = {"space": NAME, "label": "lesion", "desc": "manual", "suffix": "mask", "extension": ".nii.gz"}
    return _named({**entities, **own})


def detection_outputs(unit: ImageUnit, detector: str, *, with_truth: bool = False) -> dict[str, Path]:
    """Name what one detector writes for an image, by kind; `lesions` only with ground truth."""
    desc = detector_desc(unit.modality, detector)
    in_space = {"space": NAME, "desc": desc}
    components = {"space": NAME, "segmentation": desc, "suffix": "dseg"}
    lesions = {"lesions": output_path(unit, **in_space, suffix="lesions", extension=".tsv")}
    return {
        **(lesions if with_truth else {}),
        "anomalymap": output_path(unit, **in_space, suffix="anomalymap"),
        "probseg": output_path(unit, **in_space, label="anomaly", suffix="probseg"),
        "mask": output_path(unit, **in_space, label="anomaly", suffix="mask"),
        "dseg": output_path(unit, **components),
        "components": output_path(unit, **components, extension=".tsv"),
        "native_mask": output_path(unit, space="orig", label="anomaly", desc=desc, suffix="mask"),
        "histogram": output_path(unit, **in_space, suffix="histogram", extension=".tsv"),
        "metrics": output_path(unit, **in_space, suffix="metrics", extension=".tsv"),
    }
