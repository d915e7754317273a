"""Records of what was written: one small file for each image, written when all of its outputs are there."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bids_uad import __version__
from bids_uad.calibration.normative import HealthyCohort
from bids_uad.dataset.lesion_masks import LesionMask
from bids_uad.dataset.naming import ImageUnit
from bids_uad.dataset.participants import source_name
from bids_uad.engine.bundle import Bundle
from bids_uad.errors import unreadable
from bids_uad.files import locked, sha256_of, write_json
from bids_uad.levels.participant.leakage import NOT_SEEN, normative_metadata, seen_in_training
from bids_uad.preprocessing.brain_extraction.masks import Extraction
from bids_uad.preprocessing.intensity_correction import is_uniform_image
from bids_uad.reports import pathways
from bids_uad.reports.boilerplate import UsedModel, methods_text, write_citation
from bids_uad.reports.pathways import Pathway

if TYPE_CHECKING:
    from bids_uad.levels.participant.plan import RunContext, Task


@dataclass(frozen=True)
class ModelRecord:
    """What one model has written for an image.

    Parameters
    ----------
    label : str
        Name of the model bundle, and the deviation where there is one.
    identity : str
        Of model, thresholds and what else the outputs depend on (:func:`plan.model_identity`).
    covariates : dict of str to float or None
        Age and sex that deviations were computed with; empty for scores.
    outputs : list of str
        Files, relative to the dataset.
    methods : dict
        What the methods text says about the model (`reports.boilerplate.UsedModel`).
    """

    label: str
    identity: str
    covariates: dict[str, float | None] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)
    methods: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CompletionRecord:
    """What was written for one image, and what it depends on.

    Every file in the dataset that the group level may read is listed in a record. What holds no longer is
    taken out of the record before anything else is written under the same name, so that an interrupted run
    leaves no file listed that is not what the record says.

    Parameters
    ----------
    key : str
        Name of the image.
    run_id : str
        The run that finished it last.
    source : str
        The raw image, relative to the raw dataset.
    fingerprint : dict
        What the outputs depend on, models apart.
    outputs : list of str
        Files of the preprocessing, relative to the dataset.
    models : dict of str to ModelRecord
        By the name that the outputs carry (`Bundle.scored_as`): two bundles of one detector write the same
        files, and the last one holds.
    outdated : list of str
        Files that hold no longer and are to be removed.
    methods : dict
        What the methods text says about the preprocessing (`reports.pathways.Pathway`).
    """

    key: str
    run_id: str
    source: str
    fingerprint: dict[str, Any]
    outputs: list[str] = field(default_factory=list)
    models: dict[str, ModelRecord] = field(default_factory=dict)
    outdated: list[str] = field(default_factory=list)
    methods: dict[str, Any] = field(default_factory=dict)

    @property
    def files(self) -> set[str]:
        """Every file that holds, relative to the dataset."""
        return {*self.outputs, *(name for model in self.models.values() for name in model.outputs)}


def record_path(output_dir: Path, unit: ImageUnit) -> Path:
    """Return the path of an image's record."""
    return output_dir / unit.session_folder / "log" / f"{unit.key}.json"


def read_record(path: Path) -> CompletionRecord | None:
    """Read a record.

    Parameters
    ----------
    path : pathlib.Path

    Returns
    -------
    Record or None
        None if there is no such file, or it is damaged or of another version: the image is processed again.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        models = {name: ModelRecord(**model) for name, model in content.pop("models").items()}
        return CompletionRecord(**content, models=models)
    except (FileNotFoundError, TypeError, ValueError, KeyError, AttributeError):
        return None


def records_of(output_dir: Path, subject: str = "sub-*") -> Iterator[CompletionRecord]:
    """Read the records of a participant, or of all.

    Parameters
    ----------
    output_dir : pathlib.Path
    subject : str, default="sub-*"
        `sub-<label>`.

    Yields
    ------
    Record
        In the order of their names; what cannot be read is left out.
    """
    for pattern in ("log/*.json", "ses-*/log/*.json"):
        for path in sorted(output_dir.glob(f"{subject}/{pattern}")):
            record = read_record(path)
            if record is not None:
                yield record


def withdraw(path: Path, output_dir: Path, fingerprint: Mapping[str, Any], models: Mapping[str, str]) -> None:
    """Take outputs that hold no longer out of a record, and remove them from the dataset.

    Parameters
    ----------
    path : pathlib.Path
        Of the record; nothing is done without one.
    output_dir : pathlib.Path
    fingerprint : mapping
        What the outputs depend on now. If it is another than the record's, none of them holds.
    models : mapping of str to str
        Identity of the models that are about to write, by the name that their outputs carry.
    """
    with _exclusive(path):
        record = read_record(path)
        if record is None:
            return
        if record.fingerprint != fingerprint:
            kept = replace(record, fingerprint={}, outputs=[], models={})
        else:
            holding = {
                name: model
                for name, model in record.models.items()
                if models.get(name, model.identity) == model.identity
            }
            kept = replace(record, models=holding)
        outdated = sorted((record.files | set(record.outdated)) - kept.files)
        # First the record: a run that is killed in between leaves files that it knows to be outdated.
        write_json(path, asdict(replace(kept, outdated=outdated)))
        _remove(outdated, output_dir)


def write_record(path: Path, output_dir: Path, record: CompletionRecord) -> Path:
    """Write the record of an image whose outputs are all there.

    What other runs have written for it since this one began is kept, if it depends on the same inputs and
    options; otherwise it is removed.

    Parameters
    ----------
    path : pathlib.Path
    output_dir : pathlib.Path
    record : CompletionRecord
        Of this run: `models` are those that it has run.

    Returns
    -------
    pathlib.Path
    """
    with _exclusive(path):
        earlier = read_record(path)
        if earlier is not None:
            if earlier.fingerprint == record.fingerprint:
                record = replace(record, models={**earlier.models, **record.models})
            _remove(sorted((earlier.files | set(earlier.outdated)) - record.files), output_dir)
        return write_json(path, asdict(record))


def _exclusive(path: Path) -> AbstractContextManager[None]:
    """Let one run at a time read and write the records of a folder."""
    return locked(path.parent / "records.lock")


def _remove(names: Iterable[str], output_dir: Path) -> None:
    for name in names:
        (output_dir / name).unlink(missing_ok=True)


def make_fingerprint(
    unit: ImageUnit,
    lesion: LesionMask | None,
    *,
    reference_sha256: str,
    random_seed: int,
    extraction: Extraction,
) -> dict[str, Any]:
    """List what the outputs of an image depend on, models apart.

    The device and the number of processes are left out on purpose: an interrupted run may go on elsewhere.

    Parameters
    ----------
    unit : ImageUnit
    lesion : LesionMask or None
        The lesion mask that belongs to the image.
    reference_sha256 : str
    random_seed : int
    extraction : Extraction
        What finds brains in whole heads.

    Returns
    -------
    dict
        JSON types only.
    """
    return {
        "app_version": __version__,
        "input_sha256": sha256_of(unit.path),
        "input_bytes": _size_of(unit.path),
        "anchor": None if unit.anchor is None else unit.anchor.key,
        "anchor_sha256": None if unit.anchor is None else sha256_of(unit.anchor.path),
        "lesion_sha256": [] if lesion is None else [sha256_of(path) for path in lesion.files],
        "lesion_provider": None if lesion is None else [lesion.provider, lesion.output.name],
        "prepared_sha256": _prepared(unit),
        "anchor_prepared_sha256": None if unit.anchor is None else _prepared(unit.anchor),
        "skull_stripped": unit.skull_stripped,
        "reference_sha256": reference_sha256,
        "random_seed": random_seed,
        "brain_extraction": [extraction.program, *map(sha256_of, extraction.files)],
    }


def _prepared(unit: ImageUnit) -> list[str]:
    """Checksums of what another pipeline has done for an image."""
    return [sha256_of(path) for path in unit.external.files]


def all_there(names: Iterable[str], output_dir: Path) -> bool:
    """Check that files, named relative to the dataset, exist and are not empty."""
    return all(_has_content(output_dir / name) for name in names)


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise unreadable(path, error) from error


def _has_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


_TRAINING = ("n_scans", "n_subjects", "n_held_out_subjects", "source", "anatomies")


def describe_preprocessing(task: Task, context: RunContext) -> dict[str, Any]:
    """Describe how an image is preprocessed, as far as it is known before.

    Parameters
    ----------
    task : Task
    context : RunContext

    Returns
    -------
    dict
        A :class:`~bids_uad.reports.pathways.Pathway` of JSON types, and `parcellations`, those of the atlas.
    """
    unit, external, reference = task.unit, task.unit.external, context.reference
    given = external.to_sri24 is not None and external.reference_sha256 == reference.sha256
    anchor = ""
    if unit.anchor is not None:
        same = unit.anchor.session == unit.session
        anchor = pathways.SAME_SESSION if same else pathways.OTHER_SESSION
    pathway = Pathway(
        modality=unit.modality,
        mask_origin=pathways.GIVEN if external.brain_mask is not None and not anchor else "",
        skull_stripped=bool(unit.skull_stripped),
        extraction=context.extraction.program,
        anchor=anchor,
        image_given=external.image is not None,
        transform_given=given,
        aligned=external.aligned,
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


def add_measured_methods(methods: Mapping[str, Any], quality: Mapping[str, Any]) -> dict[str, Any]:
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


def describe_model(task: Task, bundle: Bundle, context: RunContext) -> dict[str, Any]:
    """Describe a model that is applied to an image: a `UsedModel` of JSON types."""
    name, threshold = bundle.default_threshold
    training = bundle.info.get("training", {})
    met = seen_in_training(bundle, task.unit, source_name(context.config.bids_dir))
    model = UsedModel(
        detector=bundle.scored_as,
        modality=bundle.modality,
        preset=bundle.preset,
        threshold=threshold,
        threshold_name=name,
        training={key: training[key] for key in _TRAINING if key in training},
        post_processing=bundle.post_processing,
        precision=context.precision,
        seen_in=() if met == NOT_SEEN else tuple(met.split(" and ")),
    )
    if bundle.deviation != "none":
        cohort = HealthyCohort.read(bundle.normative["reference"]["covariates"])
        known = {"age": cohort.age_mean, "sex": cohort.sex_mean}
        model = replace(
            model,
            covariates=tuple(key for key, mean in known.items() if mean is not None),
            normative_cohort=bundle.normative.get("cohort", {}).get("source", ""),
            imputed=bool(normative_metadata(bundle.normative, **task.person.covariates)["NormativeRemarks"]),
        )
    return asdict(model)


def methods_of(records: Iterable[CompletionRecord]) -> str:
    """Write the methods text of images.

    Parameters
    ----------
    records : iterable of CompletionRecord

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
    model = UsedModel.from_record(told)
    key = repr(replace(model, seen_in=(), imputed=False))
    known = models.get(key, model)
    seen_in = tuple(sorted({*known.seen_in, *model.seen_in}))
    models[key] = replace(model, seen_in=seen_in, imputed=known.imputed or model.imputed)


def write_methods(output_dir: Path) -> None:
    """Write the methods text of all that the dataset holds; nothing without records.

    Jobs that end at the same moment write it one after the other, the last of them from the records of all.
    """
    with locked(output_dir / "logs" / "dataset.lock"):
        text = methods_of(records_of(output_dir))
        if text:
            write_citation(output_dir, text)
