"""The methods text: records keep how each image was processed, and the text is written from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bids_uad.atomic import locked
from bids_uad.calibration.normative import HealthyCohort
from bids_uad.engine.bundle import Bundle
from bids_uad.levels.participant.assumptions import deviation_sidecar
from bids_uad.levels.participant.means import Means
from bids_uad.levels.participant.overlap import STRANGER, model_has_met
from bids_uad.levels.participant.plan import Task
from bids_uad.levels.participant.records import Record, records_of
from bids_uad.preprocessing.mp2rage import is_uniform_image
from bids_uad.reports import pathways
from bids_uad.reports.boilerplate import UsedModel, methods_text, write_citation
from bids_uad.reports.pathways import Pathway

_TRAINING = ("n_scans", "n_subjects", "n_held_out_subjects", "source", "anatomies")


def describe_preprocessing(task: Task, means: Means) -> dict[str, Any]:
    """Describe how an image is preprocessed, as far as it is known before.

    Parameters
    ----------
    task : Task
    means : Means

    Returns
    -------
    dict
        A :class:`~bids_uad.reports.pathways.Pathway` of JSON types, and `parcellations`, those of the atlas.
    """
    unit, prepared, reference = task.unit, task.unit.prepared, means.reference
    given = prepared.to_sri24 is not None and prepared.reference_sha256 == reference.sha256
    anchor = ""
    if unit.anchor is not None:
        same = unit.anchor.session == unit.session
        anchor = pathways.SAME_SESSION if same else pathways.OTHER_SESSION
    pathway = Pathway(
        modality=unit.modality,
        mask_origin=pathways.GIVEN if prepared.brain_mask is not None and not anchor else "",
        skull_stripped=bool(unit.skull_stripped),
        extraction=means.extraction.program,
        anchor=anchor,
        image_given=prepared.image is not None,
        transform_given=given,
        aligned=prepared.aligned,
        stand_in=bool(reference.metadata.get("StandIn")),
        t2w_reference=unit.modality == "T2w" and not anchor and reference.t2w is not None,
        mp2rage=is_uniform_image(unit.image),
        lesion=_lesion(task),
    )
    return {**asdict(pathway), "parcellations": list(reference.parcellations)}


def _lesion(task: Task) -> str:
    """Say what the lesion mask of an image lies on."""
    lesion = task.lesion
    if lesion is None:
        return ""
    if lesion.on_atlas:
        return pathways.ON_ATLAS
    if lesion.other is not None:
        return pathways.ON_OTHER
    return pathways.ON_SCAN if lesion.transform is None else pathways.BY_TRANSFORM


def as_it_was(methods: Mapping[str, Any], quality: Mapping[str, Any]) -> dict[str, Any]:
    """Add what preprocessing found out about an image.

    Parameters
    ----------
    methods : mapping
        Of :func:`describe_preprocessing`.
    quality : mapping
        Of :func:`bids_uad.preprocessing.quality.assess`.

    Returns
    -------
    dict
    """
    stripped = bool(quality.get("skull_stripped", methods["skull_stripped"]))
    origin = pathways.ANCHOR if methods["anchor"] else methods["mask_origin"]
    origin = origin or (pathways.BACKGROUND if stripped else pathways.EXTRACTED)
    return {**methods, "skull_stripped": stripped, "mask_origin": quality.get("brain_mask_origin", origin)}


def describe_model(task: Task, bundle: Bundle, means: Means) -> dict[str, Any]:
    """Describe a model that is applied to an image: a `UsedModel` of JSON types."""
    name, threshold = bundle.default_threshold
    training = bundle.info.get("training", {})
    met = model_has_met(bundle, task.unit, means.config.bids_dir)
    model = UsedModel(
        detector=bundle.scored_as,
        modality=bundle.modality,
        preset=bundle.preset,
        threshold=threshold,
        threshold_name=name,
        training={key: training[key] for key in _TRAINING if key in training},
        post_processing=bundle.post_processing,
        precision=means.precision,
        met=() if met == STRANGER else tuple(met.split(" and ")),
    )
    if bundle.deviation != "none":
        cohort = HealthyCohort.read(bundle.normative["reference"]["covariates"])
        known = {"age": cohort.age_mean, "sex": cohort.sex_mean}
        model = replace(
            model,
            covariates=tuple(key for key, mean in known.items() if mean is not None),
            reference=bundle.normative.get("cohort", {}).get("source", ""),
            assumed=bool(deviation_sidecar(bundle.normative, **task.person.covariates)["NormativeRemarks"]),
        )
    return asdict(model)


def methods_of(records: Iterable[Record]) -> str:
    """Write the methods text of images.

    Parameters
    ----------
    records : iterable of Record

    Returns
    -------
    str
        Markdown; empty if no image was processed. It does not depend on the order of the records.
    """
    ways: Counter[Pathway] = Counter()
    models: dict[str, UsedModel] = {}
    parcellations: set[str] = set()
    versions: set[str] = set()
    for record in records:
        if not record.outputs:
            continue
        told = dict(record.methods)
        parcellations |= set(told.pop("parcellations"))
        ways[Pathway(**told)] += 1
        versions.add(record.fingerprint["app_version"])
        for model in record.models.values():
            _add_model(models, model.methods)
    if not ways:
        return ""
    used = sorted(models.values(), key=lambda model: (model.detector, model.modality, repr(model)))
    version = " and ".join(sorted(versions))
    return methods_text(used, pathways=ways, parcellations=sorted(parcellations), version=version)


def _add_model(models: dict[str, UsedModel], told: Mapping[str, Any]) -> None:
    """Add a model to those that are known; what differs from image to image is summed up."""
    model = UsedModel(
        **{key: tuple(value) if isinstance(value, list) else value for key, value in told.items()}
    )
    key = repr(replace(model, met=(), assumed=False))
    known = models.get(key, model)
    met = tuple(sorted({*known.met, *model.met}))
    models[key] = replace(model, met=met, assumed=known.assumed or model.assumed)


def write_methods(output_dir: Path) -> None:
    """Write the methods text of all that the dataset holds; nothing without records.

    Jobs that end at the same moment write it one after the other, the last of them from the records of all.
    """
    with locked(output_dir / "logs" / "dataset.lock"):
        text = methods_of(records_of(output_dir))
        if text:
            write_citation(output_dir, text)
