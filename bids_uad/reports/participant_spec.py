"""Specification of the participant report for nireports, from the packaged outline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import yaml

from bids_uad.dataset.naming import PREFIX_ENTITIES
from bids_uad.reports.derivatives import Detection, Image
from bids_uad.reports.longitudinal import Series
from bids_uad.space import NAME

_PREFIX_ENTITIES = [name for name, _ in PREFIX_ENTITIES if name != "subject"]


def expand_outline(
    name: str, images: Sequence[Image], series: Sequence[Series], template_path: str
) -> dict[str, Any]:
    """Expand the sections that are repeated for every image, detector and comparison of sessions.

    Parameters
    ----------
    name : str
        Participant and perhaps session, printed in the title.
    images : sequence of Image
        Images of the page.
    series : sequence of Series
        Comparisons of sessions of the page.
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
        elif section.get("repeat") == "sessions":
            sections.extend([_sessions_section(section, series)] if series else [])
        else:
            sections.append(section)
    return {
        "package": outline["package"],
        "title": outline["title"].format(name=name),
        "template_path": template_path,
        "sections": sections,
    }


def anchor(image: Image, detection: Detection) -> str:
    """Return the HTML id of the results of a detector."""
    return f"{image.prefix}_{detection.desc}"


def _sessions_section(section: dict[str, Any], series: Sequence[Series]) -> dict[str, Any]:
    reportlets = []
    for own in series:
        entities = _queried(own.entities) | {"desc": own.desc}
        start = f"{own.prefix}_{own.desc}"
        for position, reportlet in enumerate(section["reportlets"]):
            query = {**entities, **reportlet["bids"]}
            titled = {"title": own.title} if position == 0 else {}
            reportlets.append({**reportlet, **titled, "bids": query, "name": f"{start}_{query['suffix']}"})
    return {"name": "Sessions", "title": "Change between sessions", "reportlets": reportlets}


def _queried(entities: Mapping[str, str]) -> dict[str, Any]:
    """Return a query of all entities in names of images."""
    query: dict[str, Any] = dict.fromkeys(_PREFIX_ENTITIES) | dict(entities) | {"space": NAME}
    if query["run"] is not None:
        query["run"] = int(query["run"])
    return query


def _image_section(section: dict[str, Any], image: Image) -> dict[str, Any]:
    entities = _queried(image.entities)
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
