"""Methods text about preprocessing: one paragraph for each combination of steps that images went through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bids_uad.preprocessing.brain_extraction.masks import COMBINED, NETWORK, PROGRAMS
from bids_uad.preprocessing.intensity_correction import MP2RAGE_DESCRIPTION

SAME_SESSION, OTHER_SESSION = "the same session", "another session"
GIVEN, BACKGROUND, EXTRACTED, ANCHOR = "given", "background", "extracted", "anchor"
"""Origins of brain masks: another pipeline, background of a skull-stripped image, extraction, T1w image."""
ON_SCAN, ON_ATLAS, BY_TRANSFORM, ON_OTHER = "scan", "atlas", "transform", "other image"
"""Grids of lesion masks: a scan, SRI24, a space with a provided transform, another image of the session."""

_TEMPLATE = (
    "by registering the skull-stripped template to the head (SyN) [@ants_syn] and transforming its brain "
    "mask to the image"
)
_NETWORK = (
    "by a convolutional network that was trained on synthetic heads of random contrast, after SynthStrip "
    "[@synthstrip]"
)
_REGISTRATION = "gradient ascent of the normalised mutual information, from coarse to fine [@migradient]"
_LESIONS = {
    ON_SCAN: "Lesion masks on the grid of a scan were resampled to SRI24 with the transform of the scan.",
    ON_ATLAS: "Lesion masks in SRI24 space were used as provided.",
    BY_TRANSFORM: "Lesion masks in other spaces were resampled once, through a provided transform and that "
    "of the scan.",
    ON_OTHER: "Images on which lesion masks were drawn were registered rigidly to a scan of their session "
    "(mutual information inside its brain mask), and the masks were resampled once through both transforms.",
}


@dataclass(frozen=True)
class Pathway:
    """Preprocessing steps of an image.

    Parameters
    ----------
    modality : str
        `T1w`, `T2w` or `FLAIR`.
    mask_origin : str
        `given`, `background`, `extracted` or `anchor`.
    skull_stripped : bool
        Whether the input image was skull-stripped.
    extraction : str
        Method of brain extraction, one of `bids_uad.config.EXTRACTIONS`.
    anchor : str, default=""
        Session of the T1w image to which it was registered, `the same session` or `another session`; empty
        for an image that was registered to the reference image.
    image_given : bool, default=False
        Whether a preprocessed image of another pipeline was used, corrected for intensity non-uniformity.
    transform_given : bool, default=False
        Whether its transform to SRI24 was provided.
    aligned : bool, default=False
        Whether the image was already on the grid of its T1w image.
    stand_in : bool, default=False
        Whether the built-in reference image was used instead of the SRI24 atlas.
    t2w_reference : bool, default=False
        Whether the T2w channel of the reference image was the target.
    mp2rage : bool, default=False
        Whether the image is the uniform image of MP2RAGE, whose background is masked.
    lesion : str, default=""
        Grid of the lesion mask: `scan`, `atlas`, `transform` or `other image`; empty without a mask.
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
        Number of images of each pathway.

    Returns
    -------
    str
        A paragraph for each pathway, by modality, with citations in Markdown.
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
    """Describe how lesion masks were resampled to SRI24; empty if no image has one."""
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
        "The images were resampled once, with linear interpolation to the SRI24 grid (240 x 240 x 155 voxels "
        "of 1 mm), divided by the 99.5th percentile of the intensities in the brain, and set to 0 outside."
    )
    masked = [MP2RAGE_DESCRIPTION.strip()] if pathway.mp2rage else []
    return " ".join([*masked, _brain_mask(pathway), corrected, registered, scaled])


def _brain_mask(pathway: Pathway) -> str:
    if pathway.mask_origin == GIVEN:
        return "The brain mask was that of an earlier pipeline."
    if pathway.mask_origin == BACKGROUND:
        return "The images were already skull-stripped; the brain mask was derived from their background."
    if pathway.mask_origin == ANCHOR:
        text = f"The brain mask of the T1w image was transformed to the {pathway.modality} image"
        cut = (
            f", and restricted to the brain of the {pathway.modality} image, which was already skull-stripped"
        )
        return f"{text}{cut if pathway.skull_stripped else ''}."
    if pathway.extraction == COMBINED:
        return (
            f"The brain was extracted twice, {_TEMPLATE}, and {_NETWORK}; the surface halfway between the "
            "two masks was used, or the mask of the network if the two disagreed."
        )
    program = PROGRAMS.get(pathway.extraction)
    by = f"by {program.title} [@{program.citation}]" if program else _TEMPLATE
    return f"The brain was extracted {_NETWORK if pathway.extraction == NETWORK else by}."


def _to_anchor(pathway: Pathway) -> str:
    t1w = f"a T1w image of {pathway.anchor}"
    if pathway.aligned:
        text = f"They were already on the grid of {t1w}"
    elif pathway.transform_given:
        text = f"They were transformed to {t1w} by a provided transform"
    else:
        text = f"They were registered rigidly to {t1w} ({_REGISTRATION}, inside its brain mask)"
    return f"{text}; the transform of the T1w image to the SRI24 grid was then applied."


def _to_reference(pathway: Pathway) -> str:
    target = "the SRI24 atlas [@sri24]"
    if pathway.stand_in:
        target = (
            "the ICBM152 template [@icbm152] as distributed with nilearn [@nilearn], resampled to the grid "
            "of the SRI24 atlas [@sri24] by an affine transform"
        )
    target += ", T2w channel" if pathway.t2w_reference else ""
    if pathway.transform_given:
        return f"The brain was transformed to {target}, by a provided rigid transform."
    how = _REGISTRATION
    if pathway.modality == "FLAIR":
        how += "; first with intensities clipped at their 15th percentile in the brain, which leaves the "
        how += "contrast of fluid, then as they are"
    return f"The brain was registered rigidly (six degrees of freedom) to {target} ({how})."
