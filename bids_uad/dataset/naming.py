"""Images of a run with their entities, and the names of all outputs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bids_uad.space import MNI, NAME, OutputSpace

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
"""Entities that identify an image, in BIDS order: name in pybids and key in file names."""
IDENTIFYING_KEYS = {key: name for name, key in PREFIX_ENTITIES}
"""pybids name of these entities by the key in file names."""
_OUTPUT_ENTITIES = (
    ("from", "from"),
    ("to", "to"),
    ("mode", "mode"),
    ("space", "space"),
    ("segmentation", "seg"),
    ("resolution", "res"),
    ("label", "label"),
    ("desc", "desc"),
)

ENTITIES: list[dict[str, Any]] = [
    {"name": name, "pattern": rf"[_/\\]+{key}-([a-zA-Z0-9+]+)"}
    for name, key in (*PREFIX_ENTITIES, *_OUTPUT_ENTITIES)
] + [
    {"name": "suffix", "pattern": r"[_/\\]([a-zA-Z0-9]+)\.[^/\\]+$"},
    {"name": "extension", "pattern": r"[^./\\](\.[^/\\]+)$"},
    {"name": "datatype", "pattern": r"[/\\](anat)[/\\]"},
]
"""pybids entities of the outputs, in the order in which names have them."""

_FOLDER = "sub-{subject}[/ses-{session}]/anat/"
_PREFIX = "_".join(["sub-{subject}"]) + "".join(f"[_{key}-{{{name}}}]" for name, key in PREFIX_ENTITIES[1:])

PATTERNS = [
    _FOLDER + _PREFIX + "_from-{from}_to-{to}_mode-{mode|image}_{suffix<xfm>}{extension<.txt>|.txt}",
    _FOLDER + _PREFIX + "[_space-{space}][_seg-{segmentation}][_res-{resolution}][_label-{label}]"
    "[_desc-{desc}]_{suffix<T1w|T2w|FLAIR|mask|roi|dseg|probseg|anomalymap|histogram|metrics|lesions|qc>}"
    "{extension<.nii.gz|.tsv|.json|.lut|.txt|.label|.ctbl>|.nii.gz}",
]  # fmt: skip
"""pybids path patterns of the outputs."""
LOOK_UP_TABLES = {"FSLeyes": ".lut", "Freeview": ".txt", "ITK-SNAP": ".label", "3D Slicer": ".ctbl"}
"""Extension of the look-up table of the components for each program."""
_ENTITY = re.compile(r"(?:^|_)([a-z]+)-([0-9a-zA-Z+]+)(?=_)")


@dataclass(frozen=True)
class ExternalInputs:
    """External derivatives of an image: files that another pipeline or an earlier run has made from it.

    Parameters
    ----------
    dataset : str, default=""
        Name of the derivative dataset (``-d NAME=PATH``); empty if there are no files.
    root : pathlib.Path, default=Path()
        Root of the derivative dataset.
    image : pathlib.Path, optional
        Bias-corrected image in native space, whole head or brain.
    brain_mask : pathlib.Path, optional
        Brain mask on the grid of `image`, or of the raw image if there is no `image`.
    from_raw : pathlib.Path, optional
        ITK transform that resamples the raw image to the space of `image`.
    to_sri24 : pathlib.Path, optional
        ITK transform that resamples `image`, or else the raw image, to SRI24.
    reference_sha256 : str, optional
        SHA-256 of the reference image of `to_sri24`.
    aligned : bool, default=False
        Whether `image` is on the grid of the anchor, so that it needs no registration.
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
        """All external files of the image."""
        files = (self.image, self.brain_mask, self.from_raw, self.to_sri24)
        return tuple(path for path in files if path is not None)


@dataclass(frozen=True)
class ImageUnit:
    """Raw image with its metadata, the image it is registered to, and its external derivatives.

    Parameters
    ----------
    path : pathlib.Path
        Raw image file.
    subject : str
        Participant label without `sub-`.
    session : str or None
        Session label without `ses-`; None without sessions.
    modality : {"T1w", "T2w", "FLAIR"}
        Modality; that of an MP2RAGE image (`UNIT1`) is T1w.
    entities : dict of str to str
        Entities that identify the image, by pybids name (first column of `PREFIX_ENTITIES`).
    anchor : ImageUnit, optional
        T1w image that this image of another modality is registered to; None for an image that is registered
        to the reference image directly.
    sidecar : dict, default={}
        BIDS metadata of the image.
    external : ExternalInputs, default=ExternalInputs()
        External derivatives of the image.
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
        """Image that is processed: the preprocessed image of another pipeline, else the raw image."""
        return self.external.image or self.path

    @property
    def suffix(self) -> str:
        """Suffix of the raw file: the modality, or `UNIT1` for an MP2RAGE image."""
        return self.path.name.split(".", 1)[0].rsplit("_", 1)[-1]

    @property
    def output_entities(self) -> dict[str, str]:
        """Entities at the start of the names of all outputs.

        Outputs of an MP2RAGE image (``UNIT1``), which is processed as T1w, have `rec-UNIT1` (or
        `rec-<label>UNIT1`), which distinguishes them from those of a T1w image with the same entities.
        """
        if self.suffix != "UNIT1":
            return self.entities
        label = self.entities.get("reconstruction", "") + self.suffix
        return {**self.entities, "reconstruction": label}

    @property
    def prefix(self) -> str:
        """Start of the name of every output, `sub-X[_ses-Y][_acq-Z]...`."""
        entities = self.output_entities
        return "_".join(f"{key}-{entities[name]}" for name, key in PREFIX_ENTITIES if name in entities)

    @property
    def key(self) -> str:
        """Name of the image in logs, completion records and random streams, `<prefix>_<modality>`."""
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
        """Whether the image is registered to the reference image directly."""
        return self.anchor is None

    @property
    def skull_stripped(self) -> bool | None:
        """Field `SkullStripped` of the sidecar; None if it is missing or not a boolean."""
        value = self.sidecar.get("SkullStripped")
        return value if isinstance(value, bool) else None


@dataclass(frozen=True)
class Problem:
    """Input file or participant that cannot be processed.

    Parameters
    ----------
    subject : str
        Participant label without `sub-`.
    message : str
        File, problem and remedy, on one line.
    key : str, optional
        Key of the image concerned; None if the problem concerns the whole participant.
    """

    subject: str
    message: str
    key: str | None = None


def entities_of(path: Path) -> dict[str, str]:
    """Return the entities of a BIDS file name by key, such as ``{"sub": "01", "run": "2"}``."""
    return dict(_ENTITY.findall(path.name))


def natural_key(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Return a sort key with which ``sub-2`` comes before ``sub-10``."""
    parts = filter(None, re.split(r"([0-9]+)", name))
    return [(0, int(part), "") if "0" <= part[0] <= "9" else (1, 0, part) for part in parts], name


def output_path(unit: ImageUnit, *, suffix: str, extension: str = ".nii.gz", **entities: str) -> Path:
    """Return the path of an output of an image, relative to the derivative dataset.

    Parameters
    ----------
    unit : ImageUnit
        Image whose entities the name starts with.
    suffix : str
        Suffix, such as `mask`.
    extension : str, default=".nii.gz"
        File extension.
    **entities : str
        Further entities by pybids name: `space`, `segmentation`, `resolution`, `label`, `desc`, or `from`,
        `to`, `mode` for transforms.

    Returns
    -------
    pathlib.Path
        Path of the output.

    Raises
    ------
    ValueError
        If none of `PATTERNS` has these entities.
    """
    return _build({**unit.output_entities, **entities, "suffix": suffix, "extension": extension})


def _build(values: Mapping[str, str]) -> Path:
    """Return the path that a pattern makes of these entities."""
    # Imported here, since pybids is slow to import and most levels only search for lesion masks.
    from bids.layout.writing import build_path

    name = build_path(dict(values), PATTERNS, strict=True)
    if name is None:
        raise ValueError(f"no path pattern for {values}")
    return Path(name)


def brain_desc(unit: ImageUnit) -> str:
    """Return the `desc-` of the brain mask: `brain`, or such as `T2wBrain` for a T2w registered to a T1w."""
    return "brain" if unit.is_anchor else f"{unit.modality}Brain"


def preprocessing_outputs(unit: ImageUnit) -> dict[str, Path]:
    """Return the paths of the preprocessing outputs of an image, by output field of the workflow."""
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


def template_outputs(unit: ImageUnit, spaces: Iterable[OutputSpace]) -> dict[str, Path]:
    """Return the paths of the preprocessing outputs in the spaces of templates.

    Parameters
    ----------
    unit : ImageUnit
        The image.
    spaces : iterable of OutputSpace
        Spaces of the run.

    Returns
    -------
    dict of str to pathlib.Path
        Image and brain mask in each space (`OutputSpace.kind`), in this order, and the transforms
        `to_template` and `from_template`; empty if none of the spaces is that of a template.
    """
    images = {}
    for space in spaces:
        if space.is_template:
            images[space.kind("preproc")] = output_path(
                unit, **space.entities, desc="preproc", suffix=unit.modality
            )
            images[space.kind("brain_mask")] = output_path(
                unit, **space.entities, desc=brain_desc(unit), suffix="mask"
            )
    ends = {"to_template": (unit.modality, MNI), "from_template": (MNI, unit.modality)}
    transforms = {
        kind: output_path(unit, suffix="xfm", extension=".txt", **{"from": start, "to": end, "mode": "image"})
        for kind, (start, end) in ends.items()
        if images
    }
    return images | transforms


def quality_output(unit: ImageUnit) -> Path:
    """Return the path of the quality-control table of an image."""
    return output_path(unit, space=NAME, desc=f"{unit.modality}Preproc", suffix="qc", extension=".tsv")


def lesion_output(entities: Mapping[str, str]) -> Path:
    """Return the path of a lesion mask in SRI24 space, relative to the derivative dataset.

    Parameters
    ----------
    entities : mapping of str to str
        Entities shared by the images of the mask, by pybids name (`subject`, `session`, `run`).

    Returns
    -------
    pathlib.Path
        Path of the mask.
    """
    fixed = {"space": NAME, "label": "lesion", "desc": "manual", "suffix": "mask", "extension": ".nii.gz"}
    return _build({**entities, **fixed})


def longitudinal_output(entities: Mapping[str, str], desc: str) -> Path:
    """Return the path of the table of lesions in several sessions, relative to the derivative dataset.

    Parameters
    ----------
    entities : mapping of str to str
        Entities shared by the images of the sessions, by pybids name, with `subject` and without `session`.
    desc : str
        Modality and detector, see :func:`detector_desc`.

    Returns
    -------
    pathlib.Path
        Path of the table.
    """
    fixed = {"space": NAME, "segmentation": desc, "desc": "longitudinal", "suffix": "lesions"}
    return _build({**entities, **fixed, "extension": ".tsv"})


def detection_outputs(
    unit: ImageUnit, detector: str, *, with_lesions: bool = False, spaces: Iterable[OutputSpace] = ()
) -> dict[str, Path]:
    """Return the paths of the outputs of one detector for an image.

    Parameters
    ----------
    unit : ImageUnit
        The image.
    detector : str
        Name of the detector, such as `disyre` or `disyre+normative`.
    with_lesions : bool, default=False
        Whether the image has a lesion mask, so that there is a table of its lesions (`lesions`).
    spaces : iterable of OutputSpace, default=()
        Further spaces of map, components and, since that in `orig` is always written, mask.

    Returns
    -------
    dict of str to pathlib.Path
        Paths by kind of output, relative to the derivative dataset; the look-up tables by program, outputs in
        further spaces by `OutputSpace.kind`. Only T1w images have a mask for the registration of other
        pipelines (`roi`).
    """
    desc = detector_desc(unit.modality, detector)
    in_space = {"space": NAME, "desc": desc}
    components = {"space": NAME, "segmentation": desc, "suffix": "dseg"}
    lesions = {"lesions": output_path(unit, **in_space, suffix="lesions", extension=".tsv")}
    roi = {"roi": output_path(unit, segmentation=desc, label="lesion", suffix="roi")}
    return {
        **(lesions if with_lesions else {}),
        **(roi if unit.modality == "T1w" else {}),
        "anomalymap": output_path(unit, **in_space, suffix="anomalymap"),
        "probseg": output_path(unit, **in_space, label="anomaly", suffix="probseg"),
        "mask": output_path(unit, **in_space, label="anomaly", suffix="mask"),
        "dseg": output_path(unit, **components),
        "components": output_path(unit, **components, extension=".tsv"),
        **{
            program: output_path(unit, **components, extension=ending)
            for program, ending in LOOK_UP_TABLES.items()
        },
        "native_mask": output_path(unit, space="orig", label="anomaly", desc=desc, suffix="mask"),
        "histogram": output_path(unit, **in_space, suffix="histogram", extension=".tsv"),
        "metrics": output_path(unit, **in_space, suffix="metrics", extension=".tsv"),
        **{
            space.kind(kind): output_path(unit, **space.entities, **entities)
            for space in spaces
            for kind, entities in {
                "anomalymap": {"desc": desc, "suffix": "anomalymap"},
                "mask": {"desc": desc, "label": "anomaly", "suffix": "mask"},
                "dseg": {"segmentation": desc, "suffix": "dseg"},
            }.items()
            if space.is_template or kind != "mask"
        },
    }


def detector_desc(modality: str, detector: str) -> str:
    """Return the `desc-` of the outputs of a detector, such as `T1wPatchcore` or `T1wPatchcoreNormative`."""
    return modality + "".join(part[:1].upper() + part[1:] for part in detector.split("+"))


def output_of_source(source_image: str, modality: str, ending: str) -> Path:
    """Return the path of an output in SRI24 space, relative to the derivative dataset.

    Parameters
    ----------
    source_image : str
        Raw image as in the column `source_image` of score tables: a BIDS URI or a relative path.
    modality : {"T1w", "T2w", "FLAIR"}
        Modality of the image.
    ending : str
        Part of the output's name after the space, such as ``desc-preproc_T1w.nii.gz``.

    Returns
    -------
    pathlib.Path
        Path of the output.
    """
    path = Path(source_image)
    labels = entities_of(path)
    entities = {IDENTIFYING_KEYS[key]: label for key, label in labels.items() if key in IDENTIFYING_KEYS}
    unit = ImageUnit(path, labels["sub"], labels.get("ses"), modality, entities)
    return unit.folder / f"{unit.prefix}_space-{NAME}_{ending}"


def score_sidecar(source_image: str, modality: str, detector: str) -> Path:
    """Return the path of the sidecar of a score table, relative to the derivative dataset."""
    return output_of_source(source_image, modality, f"desc-{detector_desc(modality, detector)}_metrics.json")
