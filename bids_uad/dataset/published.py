"""Where the outputs of an image lie, for who knows the image only by its score tables."""

from __future__ import annotations

import re
from pathlib import Path

from bids_uad.space import NAME

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
