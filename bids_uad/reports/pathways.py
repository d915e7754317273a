"""How images came to the SRI24 grid, in sentences of the methods text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bids_uad.preprocessing.brain_extraction.masks import COMBINED, NETWORK, PROGRAMS
from bids_uad.preprocessing.intensity_correction import DESCRIPTION

SAME_SESSION, OTHER_SESSION = "the same session", "another session"
GIVEN, BACKGROUND, EXTRACTED, ANCHOR = "given", "background", "extracted", "anchor"
"""Where a brain mask is from: another pipeline, a skull-stripped image, a whole head, the T1w image."""
ON_SCAN, ON_ATLAS, BY_TRANSFORM, ON_OTHER = "scan", "atlas", "transform", "other image"
"""Grids on which lesion masks lie: that of a scan, SRI24, a space with a given transform, another image."""

_TEMPLATE = (
    "by registering the skull-stripped template to the head (SyN) [@ants_syn] and carrying its brain mask "
    "back"
)
_NETWORK = (
    "by a convolutional network that was trained on synthetic heads of random contrast, after SynthStrip "
    "[@synthstrip]"
)
_LESIONS = {
    ON_SCAN: "Lesion masks on the grid of a scan were brought to the SRI24 grid with the scan's transform.",
    ON_ATLAS: "Lesion masks in SRI24 space were used as they were given.",
    BY_TRANSFORM: "Lesion masks in other spaces were resampled once, through a transform that was given and "
    "that of the scan.",
    ON_OTHER: "Images that lesion masks were drawn on were registered rigidly to a scan of their session "
    "(mutual information inside its brain mask), and the masks resampled once through both transforms.",
}


@dataclass(frozen=True)
class Pathway:
    """What was done to an image before anomaly detection.

    Parameters
    ----------
    modality : str
        `T1w` or `T2w`.
    mask_origin : str
        `given`, `background`, `extracted` or `anchor`.
    skull_stripped : bool
        Whether the image came skull-stripped.
    extraction : str
        What finds brains in whole heads (`preprocessing.extraction.EXTRACTIONS`).
    anchor : str
        Session of the T1w image that it was registered to, `the same session` or `another session`; empty for
        an image that went to the reference image itself.
    image_given : bool
        Whether the image is another pipeline's, corrected for intensity non-uniformity.
    transform_given : bool
        Whether its transform to SRI24 was given.
    aligned : bool
        Whether it was on the grid of its T1w image already.
    stand_in : bool
        Whether the built-in reference image took the place of the SRI24 atlas.
    t2w_reference : bool
        Whether the T2w channel of the reference image was the target.
    mp2rage : bool
        Whether the image is the uniform image of MP2RAGE, whose background is masked.
    lesion : str
        What the lesion mask lies on: `scan`, `atlas`, `transform` or `other image`; empty without a mask.
    """

    modality: str
    mask_origin: str
    skull_stripped: bool
    extraction: str
    anchor: str = ""
    image_given: bool = False
    transform_given: bool = False
    aligned: bool = False
    stand_in: bool = False
    t2w_reference: bool = False
    mp2rage: bool = False
    lesion: str = ""


def preprocessing_text(pathways: Mapping[Pathway, int]) -> str:
    """Describe the preprocessing of images.

    Parameters
    ----------
    pathways : mapping of Pathway to int
        Number of images of each.

    Returns
    -------
    str
        A paragraph for each way that images went, by modality, with citations in Markdown.
    """
    counts: dict[str, dict[str, int]] = {}
    for pathway, number in pathways.items():
        texts = counts.setdefault(pathway.modality, {})
        text = _paragraph(pathway)
        texts[text] = texts.get(text, 0) + number
    return "\n\n".join(
        f"**Preprocessing of {modality} images (n = {number}).** {text}"
        for modality in sorted(counts)
        for text, number in sorted(counts[modality].items())
    )


def lesion_text(pathways: Mapping[Pathway, int]) -> str:
    """Describe how lesion masks came to SRI24; empty if no image has one."""
    kinds = {pathway.lesion for pathway in pathways}
    return " ".join(text for kind, text in _LESIONS.items() if kind in kinds)


def _paragraph(pathway: Pathway) -> str:
    corrected = (
        "The images had been corrected for intensity non-uniformity by an earlier pipeline."
        if pathway.image_given
        else "The images were corrected for intensity non-uniformity inside the brain mask with N4 [@n4], "
        "distributed with ANTs [@ants]."
    )
    registered = _to_anchor(pathway) if pathway.anchor else _to_reference(pathway)
    scaled = (
        "They were resampled once, with linear interpolation to the SRI24 grid (240 x 240 x 155 voxels of "
        "1 mm), divided by the 99.5th percentile of the intensities in the brain, and set to 0 outside."
    )
    masked = [DESCRIPTION.strip()] if pathway.mp2rage else []
    return " ".join([*masked, _brain_mask(pathway), corrected, registered, scaled])


def _brain_mask(pathway: Pathway) -> str:
    if pathway.mask_origin == GIVEN:
        return "The brain mask was that of an earlier pipeline."
    if pathway.mask_origin == BACKGROUND:
        return "The images were skull-stripped already; their background gave the brain mask."
    if pathway.mask_origin == ANCHOR:
        text = "The brain mask of the T1w image was carried over"
        cut = ", and restricted to the brain of the T2w image, which was skull-stripped already"
        return f"{text}{cut if pathway.skull_stripped else ''}."
    if pathway.extraction == COMBINED:
        return (
            f"The brain was extracted twice, {_TEMPLATE}, and {_NETWORK}; the surface halfway between the "
            "two masks was taken, or the network's where they contradicted each other."
        )
    program = PROGRAMS.get(pathway.extraction)
    by = f"by {program.title} [@{program.citation}]" if program else _TEMPLATE
    return f"The brain was extracted {_NETWORK if pathway.extraction == NETWORK else by}."


def _to_anchor(pathway: Pathway) -> str:
    t1w = f"a T1w image of {pathway.anchor}"
    if pathway.aligned:
        text = f"They were on the grid of {t1w}"
    elif pathway.transform_given:
        text = f"They were brought to {t1w} by a transform that was given"
    else:
        text = f"They were registered rigidly to {t1w} (mutual information inside its brain mask)"
    return f"{text}, and follow its transform to the SRI24 grid."


def _to_reference(pathway: Pathway) -> str:
    target = "the SRI24 atlas [@sri24]"
    if pathway.stand_in:
        target = (
            "the ICBM152 template [@icbm152] as distributed with nilearn [@nilearn], brought to the grid of "
            "the SRI24 atlas [@sri24] by an affine transform"
        )
    target += ", T2w channel" if pathway.t2w_reference else ""
    if pathway.transform_given:
        return f"The brain was brought to {target}, by a rigid transform that was given."
    return (
        f"The brain was registered rigidly (six degrees of freedom, mutual information) to {target}, and the "
        "transform refined over all voxels by Powell's method [@powell]."
    )
