"""Specification of the participant report for nireports, from the packaged outline."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import Any

import yaml

from bids_uad.dataset.naming import PREFIX_ENTITIES
from bids_uad.reports.derivatives import Detection, Image
from bids_uad.space import NAME

_PREFIX_ENTITIES = [name for name, _ in PREFIX_ENTITIES if name != "subject"]


def expand_outline(subject: str, images: Sequence[Image], template_path: str) -> dict[str, Any]:
    """Expand the sections that are repeated for every image and detector.

    Parameters
    ----------
    subject : str
        Label without ``sub-``.
    images : sequence of Image
        Images of the participant.
    template_path : str
        Absolute path of the page template.

    Returns
    -------
    dict
        Specification for nireports. Every query names all entities, so that it matches at most one file.
    """
    text = resources.files("bids_uad").joinpath("data/reports/participant.yml").read_text(encoding="utf-8")
    outline = yaml.safe_load(text)
    sections = []
    for section in outline["sections"]:
        if section.get("repeat") == "image":
            sections.extend(_image_section(section, image) for image in images)
        else:
            sections.append(section)
    return {
        "package": outline["package"],
        "title": outline["title"].format(subject=subject),
        "template_path": template_path,
        "sections": sections,
    }


def anchor(image: Image, detection: Detection) -> str:
    """Return the HTML id of the results of a detector."""
    return f"{image.prefix}_{detection.desc}"


def _image_section(section: dict[str, Any], image: Image) -> dict[str, Any]:
    entities: dict[str, Any] = dict.fromkeys(_PREFIX_ENTITIES) | image.entities | {"space": NAME}
    if entities["run"] is not None:
        entities["run"] = int(entities["run"])
    reportlets = []
    for reportlet in section["reportlets"]:
        if reportlet.get("repeat") == "detector":
            for detection in image.detections:
                reportlets.extend(_detector_group(reportlet["reportlets"], image, detection, entities))
        else:
            query = {**entities, "suffix": image.modality, **reportlet["bids"]}
            name = f"{image.prefix}_{image.modality}_{query['desc']}"
            reportlets.append({**reportlet, "bids": query, "name": name})
    return {"name": f"{image.prefix}_{image.modality}", "title": image.name, "reportlets": reportlets}


def _detector_group(
    reportlets: Sequence[dict[str, Any]], image: Image, detection: Detection, entities: dict[str, Any]
) -> list[dict[str, Any]]:
    group = []
    for position, reportlet in enumerate(reportlets):
        query = {**entities, "desc": detection.desc, **reportlet["bids"]}
        own = {**reportlet, "bids": query, "name": f"{anchor(image, detection)}_{query['suffix']}"}
        if position == 0:
            own |= {"name": anchor(image, detection), "title": detection.title}
        group.append(own)
    return group
