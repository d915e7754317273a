"""How outputs are named: one set of patterns, for the data sink and for whoever looks for files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bids_uad.space import NAME

PREFIX_ENTITIES = (
    ("subject", "sub"),
    ("session", "ses"),
    ("task", "task"),
    ("acquisition", "acq"),
    ("ceagent", "ce"),
    ("reconstruction", "rec"),
    ("run", "run"),
    ("echo", "echo"),
    ("part", "part"),
)
"""pybids entity name and key in file names, in BIDS order, of what identifies an image."""


@dataclass(frozen=True)
class ExternalInputs:
    """What another pipeline has already done for an image.

    Parameters
    ----------
    dataset : str
        Name of the derivative dataset; empty if nothing was done.
    root : pathlib.Path
        Its folder.
    image : pathlib.Path, optional
        Bias-corrected image in native space, whole head or brain.
    brain_mask : pathlib.Path, optional
        On the grid of `image`, or of the raw image if there is none.
    from_raw : pathlib.Path, optional
        ITK transform that resamples the raw image to the space of `image`.
    to_sri24 : pathlib.Path, optional
        ITK transform that resamples `image` to SRI24, or the raw image if there is none.
    reference_sha256 : str, optional
        The reference image that transform leads to.
    aligned : bool
        Whether `image` lies on the grid of the anchor and needs no registration.
    """

    dataset: str = ""
    root: Path = Path()
    image: Path | None = None
    brain_mask: Path | None = None
    from_raw: Path | None = None
    to_sri24: Path | None = None
    reference_sha256: str | None = None
    aligned: bool = False

    @property
    def files(self) -> tuple[Path, ...]:
        """All that there is."""
        found = (self.image, self.brain_mask, self.from_raw, self.to_sri24)
        return tuple(path for path in found if path is not None)


@dataclass(frozen=True)
class ImageUnit:
    """One raw image and what it is registered to.

    Parameters
    ----------
    path : pathlib.Path
        The raw file.
    subject : str
        Label without `sub-`.
    session : str, optional
        Label without `ses-`.
    modality : str
        `T1w` (also of an MP2RAGE image, `UNIT1`) or `T2w`.
    entities : dict
        pybids entities that identify the image (keys of `PREFIX_ENTITIES`), as text.
    anchor : ImageUnit, optional
        The T1w that this T2w is registered to; none for an image that goes to the atlas directly.
    sidecar : dict
        BIDS metadata of the image.
    external : ExternalInputs
        What another pipeline has already done for it.
    """

    path: Path
    subject: str
    session: str | None
    modality: str
    entities: dict[str, str]
    anchor: ImageUnit | None = None
    sidecar: dict[str, Any] = field(default_factory=dict)
    external: ExternalInputs = ExternalInputs()

    @property
    def image(self) -> Path:
        """The image that is worked on: another pipeline's, if there is one, or the raw one."""
        return self.external.image or self.path

    @property
    def suffix(self) -> str:
        """Suffix of the raw file: the modality, or `UNIT1` for an MP2RAGE image."""
        return self.path.name.split(".", 1)[0].rsplit("_", 1)[-1]

    @property
    def output_entities(self) -> dict[str, str]:
        """Entities that the names of all outputs start with.

        The outputs of an MP2RAGE image (``UNIT1``), which is processed as a T1w image, get `rec-UNIT1` (or
        `rec-<label>UNIT1`), so that they are told from those of a T1w image with the same entities.
        """
        if self.suffix != "UNIT1":
            return self.entities
        label = self.entities.get("reconstruction", "") + self.suffix
        return {**self.entities, "reconstruction": label}

    @property
    def prefix(self) -> str:
        """First part of every output's name, `sub-X[_ses-Y][_acq-Z]...`."""
        named = self.output_entities
        return "_".join(f"{key}-{named[name]}" for name, key in PREFIX_ENTITIES if name in named)

    @property
    def key(self) -> str:
        """Name of the unit in logs, records and random streams, `<prefix>_<modality>`."""
        return f"{self.prefix}_{self.modality}"

    @property
    def session_folder(self) -> Path:
        """`sub-X[/ses-Y]`, relative to the dataset."""
        folder = Path(f"sub-{self.subject}")
        return folder / f"ses-{self.session}" if self.session else folder

    @property
    def folder(self) -> Path:
        """`sub-X[/ses-Y]/anat`, relative to the dataset."""
        return self.session_folder / "anat"

    @property
    def is_anchor(self) -> bool:
        """Whether the image goes to the atlas directly."""
        return self.anchor is None

    @property
    def skull_stripped(self) -> bool | None:
        """What the sidecar says about skull-stripping; none if it says nothing."""
        value = self.sidecar.get("SkullStripped")
        return value if isinstance(value, bool) else None


@dataclass(frozen=True)
class Problem:
    """Something that could not be used, told by name.

    Parameters
    ----------
    subject : str
        Label without `sub-`.
    message : str
        One line.
    key : str, optional
        The unit it concerns; none if it concerns the participant.
    """

    subject: str
    message: str
    key: str | None = None


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


_LABEL = re.compile(r"(?P<entity>sub|ses)-(?P<label>[A-Za-z0-9+]+)(?=_)")


def detector_desc(modality: str, detector: str) -> str:
    """Give the `desc-` of a detector's outputs: `T1wPatchcore`, or `T1wPatchcoreNormative` of deviations."""
    return modality + "".join(part[:1].upper() + part[1:] for part in detector.split("+"))


def published(source_image: str, modality: str, rest: str) -> Path:
    """Name an output of an image in SRI24 space, relative to the derivatives.

    Parameters
    ----------
    source_image : str
        The raw image, as its score tables name it (a BIDS URI or a relative path).
    modality : str
        Its suffix.
    rest : str
        What the output's name has after the space, such as ``desc-preproc_T1w.nii.gz``.

    Returns
    -------
    pathlib.Path
    """
    stem = source_image.rsplit("/", 1)[-1].split(f"_{modality}.")[0]
    labels = {match["entity"]: match["label"] for match in _LABEL.finditer(f"{stem}_")}
    session = f"ses-{labels['ses']}" if "ses" in labels else ""
    return Path(f"sub-{labels['sub']}") / session / "anat" / f"{stem}_space-{NAME}_{rest}"


def score_sidecar(source_image: str, modality: str, detector: str) -> Path:
    """Name the sidecar of the score table of an image and detector, relative to the derivatives."""
    return published(source_image, modality, f"desc-{detector_desc(modality, detector)}_metrics.json")
