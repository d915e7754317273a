"""The unit of work: one raw T1w or T2w image."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
class Prepared:
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
    prepared : Prepared
        What another pipeline has already done for it.
    """

    path: Path
    subject: str
    session: str | None
    modality: str
    entities: dict[str, str]
    anchor: ImageUnit | None = None
    sidecar: dict[str, Any] = field(default_factory=dict)
    prepared: Prepared = Prepared()

    @property
    def image(self) -> Path:
        """The image that is worked on: another pipeline's, if there is one, or the raw one."""
        return self.prepared.image or self.path

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
