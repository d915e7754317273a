"""Completion records: for each image a JSON file with its outputs, their inputs and the methods text."""

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
from bids_uad.space import MNI

if TYPE_CHECKING:
    from bids_uad.levels.participant.plan import RunContext, Task


_TRAINING = ("n_scans", "n_subjects", "n_held_out_subjects", "source", "anatomies")
"""Fields of a bundle's training data that the methods text uses."""


@dataclass(frozen=True)
class ModelRecord:
    """Outputs of one model for an image.

    Parameters
    ----------
    label : str
        Name of the model bundle, with the deviation if there is one.
    identity : str
        Inputs and options that the outputs depend on, see :func:`plan.model_identity`.
    covariates : dict of str to float or None
        Age and sex used for normative deviations; empty for scores.
    outputs : list of str
        Files, relative to the dataset.
    methods : dict
        Fields of :class:`~bids_uad.reports.boilerplate.UsedModel`, for the methods text.
    """

    label: str
    identity: str
    covariates: dict[str, float | None] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)
    methods: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CompletionRecord:
    """Outputs of one image, and what they depend on.

    A record lists every file that the group level may read. Outdated files are removed from the record before
    new ones are written under their names, so that an interrupted run never leaves a listed file that does
    not match the record.

    Parameters
    ----------
    key : str
        Name of the image.
    run_id : str
        Last run that completed the image; empty if none has written all requested models.
    source : str
        Raw image, relative to the raw dataset.
    fingerprint : dict
        Inputs and options that the outputs depend on, except the models.
    outputs : list of str
        Outputs of preprocessing, relative to the dataset.
    models : dict of str to ModelRecord
        Outputs of each model by the detector name in their file names (`Bundle.scored_as`). Two bundles of
        one detector write the same files; the last one counts.
    outdated : list of str
        Outdated files that are to be removed.
    methods : dict
        Fields of :class:`~bids_uad.reports.pathways.Pathway`, and `parcellations`, for the methods text.
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
        """All outputs that are up to date, relative to the dataset."""
        return {*self.outputs, *(name for model in self.models.values() for name in model.outputs)}


def record_path(output_dir: Path, unit: ImageUnit) -> Path:
    """Return the path of an image's record."""
    return output_dir / unit.session_folder / "log" / f"{unit.key}.json"


def read_record(path: Path) -> CompletionRecord | None:
    """Read a record.

    Parameters
    ----------
    path : pathlib.Path
        JSON file, see :func:`record_path`.

    Returns
    -------
    CompletionRecord or None
        None if the file is missing, damaged or of another version, so that the image is processed again.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        models = {name: ModelRecord(**model) for name, model in content.pop("models").items()}
        return CompletionRecord(**content, models=models)
    except (FileNotFoundError, TypeError, ValueError, KeyError, AttributeError):
        return None


def read_records(output_dir: Path, subject: str = "sub-*") -> Iterator[CompletionRecord]:
    """Read the records of one participant, or of all.

    Parameters
    ----------
    output_dir : pathlib.Path
        Root of the derivatives.
    subject : str, default="sub-*"
        `sub-<label>`, or a pattern.

    Yields
    ------
    CompletionRecord
        In the order of their file names; unreadable records are skipped.
    """
    for pattern in ("log/*.json", "ses-*/log/*.json"):
        for path in sorted(output_dir.glob(f"{subject}/{pattern}")):
            record = read_record(path)
            if record is not None:
                yield record


def withdraw_outputs(
    path: Path, output_dir: Path, fingerprint: Mapping[str, Any], models: Mapping[str, str]
) -> None:
    """Remove outdated outputs from a record and from the dataset.

    Parameters
    ----------
    path : pathlib.Path
        The record; without one, nothing is removed.
    output_dir : pathlib.Path
        Root of the derivatives.
    fingerprint : mapping
        Present inputs and options. If they differ from those of the record, all outputs are outdated.
    models : mapping of str to str
        Identity of the models that are about to write, by `Bundle.scored_as`.
    """
    with _exclusive(path):
        record = read_record(path)
        if record is None:
            return
        if record.fingerprint != fingerprint:
            remaining = replace(record, fingerprint={}, outputs=[], models={})
        else:
            current = {
                name: model
                for name, model in record.models.items()
                if models.get(name, model.identity) == model.identity
            }
            remaining = replace(record, models=current)
        outdated = sorted((record.files | set(record.outdated)) - remaining.files)
        # The record is written first, so that it lists the files as outdated if the run is killed here.
        write_json(path, asdict(replace(remaining, outdated=outdated)))
        if outdated:
            _remove(outdated, output_dir)
            # Otherwise the first model to be recorded would remove the new outputs of the others.
            write_json(path, asdict(replace(remaining, outdated=[])))


def write_record(
    path: Path, output_dir: Path, record: CompletionRecord, requested: Iterable[str] = ()
) -> Path:
    """Write the record of an image after the outputs that it lists.

    Models that are recorded already are kept if their outputs depend on the same inputs and options, so that
    the models of a run can be recorded one by one, and by several processes. Otherwise their outputs are
    removed.

    Parameters
    ----------
    path : pathlib.Path
        The record.
    output_dir : pathlib.Path
        Root of the derivatives.
    record : CompletionRecord
        Record of this run; `models` are those whose outputs exist.
    requested : iterable of str, default=()
        Models of this run, by `Bundle.scored_as`. Until all are recorded, the earlier `run_id` is kept.

    Returns
    -------
    pathlib.Path
        `path`.
    """
    with _exclusive(path):
        earlier, run_id = read_record(path), ""
        if earlier is not None:
            if earlier.fingerprint == record.fingerprint:
                models, run_id = {**earlier.models, **record.models}, earlier.run_id
                record = replace(record, models={name: models[name] for name in sorted(models)})
            _remove(sorted((earlier.files | set(earlier.outdated)) - record.files), output_dir)
        if not set(requested) <= set(record.models):
            record = replace(record, run_id=run_id)
        return write_json(path, asdict(record))


def _exclusive(path: Path) -> AbstractContextManager[None]:
    """Hold the lock of the records of a folder."""
    return locked(path.parent / "records.lock")


def _remove(names: Iterable[str], output_dir: Path) -> None:
    for name in names:
        (output_dir / name).unlink(missing_ok=True)


def all_exist(names: Iterable[str], output_dir: Path) -> bool:
    """Return whether all files, relative to the dataset, exist and are not empty."""
    paths = [output_dir / name for name in names]
    return all(path.is_file() and path.stat().st_size > 0 for path in paths)


def make_fingerprint(
    unit: ImageUnit,
    lesion: LesionMask | None,
    *,
    reference_sha256: str,
    extraction: Extraction,
) -> dict[str, Any]:
    """Return the inputs and options that the outputs of an image depend on, except the models.

    Device and number of processes are not included: an interrupted run may continue on other hardware.

    Parameters
    ----------
    unit : ImageUnit
        The image, its anchor and its external derivatives.
    lesion : LesionMask or None
        Lesion mask of the image.
    reference_sha256 : str
        Checksum of the reference image.
    extraction : Extraction
        Method of brain extraction.

    Returns
    -------
    dict
        Checksums and options, JSON types only.

    Raises
    ------
    InputError
        If a file cannot be read.
    """
    return {
        "app_version": __version__,
        "input_sha256": sha256_of(unit.path),
        "input_bytes": _size_of(unit.path),
        "anchor": None if unit.anchor is None else unit.anchor.key,
        "anchor_sha256": None if unit.anchor is None else sha256_of(unit.anchor.path),
        "lesion_sha256": [] if lesion is None else [sha256_of(path) for path in lesion.files],
        "lesion_provider": None if lesion is None else [lesion.provider, lesion.output.name],
        "prepared_sha256": _checksums(unit),
        "anchor_prepared_sha256": None if unit.anchor is None else _checksums(unit.anchor),
        "skull_stripped": unit.skull_stripped,
        "reference_sha256": reference_sha256,
        "brain_extraction": [extraction.program, *map(sha256_of, extraction.files)],
    }


def _checksums(unit: ImageUnit) -> list[str]:
    """Return the checksums of an image's external derivatives."""
    return [sha256_of(path) for path in unit.external.files]


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise unreadable(path, error) from error


def describe_preprocessing(task: Task, context: RunContext) -> dict[str, Any]:
    """Describe the planned preprocessing of an image, for the methods text.

    Parameters
    ----------
    task : Task
        The image, its anchor, external derivatives and lesion mask.
    context : RunContext
        Reference image and brain extraction.

    Returns
    -------
    dict
        Fields of :class:`~bids_uad.reports.pathways.Pathway`, and `parcellations`, the names of those of the
        atlas; JSON types only.
    """
    unit, external, reference = task.unit, task.unit.external, context.reference
    has_transform = external.to_sri24 is not None and external.reference_sha256 == reference.sha256
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
        transform_given=has_transform,
        aligned=external.aligned,
        stand_in=bool(reference.metadata.get("StandIn")),
        t2w_reference=unit.modality == "T2w" and not anchor and reference.t2w is not None,
        mp2rage=is_uniform_image(unit.image),
        lesion=_lesion_grid(task),
    )
    return {**asdict(pathway), "parcellations": list(reference.parcellations)}


def _lesion_grid(task: Task) -> str:
    """Return the grid of an image's lesion mask, see :class:`~bids_uad.reports.pathways.Pathway`."""
    lesion = task.lesion
    if lesion is None:
        return ""
    if lesion.on_atlas:
        return pathways.ON_ATLAS
    if lesion.other is not None:
        return pathways.ON_OTHER
    return pathways.ON_SCAN if lesion.transform is None else pathways.BY_TRANSFORM


def add_measured_methods(methods: Mapping[str, Any], quality: Mapping[str, Any]) -> dict[str, Any]:
    """Add what is known only after preprocessing: skull-stripping, and the origin of the brain mask.

    Parameters
    ----------
    methods : mapping
        Description by :func:`describe_preprocessing`.
    quality : mapping
        Measures of :func:`bids_uad.preprocessing.quality.assess`.

    Returns
    -------
    dict
        `methods` with `skull_stripped` and `mask_origin` replaced.
    """
    stripped = bool(quality.get("skull_stripped", methods["skull_stripped"]))
    origin = pathways.ANCHOR if methods["anchor"] else methods["mask_origin"]
    origin = origin or (pathways.BACKGROUND if stripped else pathways.EXTRACTED)
    return {**methods, "skull_stripped": stripped, "mask_origin": quality.get("brain_mask_origin", origin)}


def describe_model(task: Task, bundle: Bundle, context: RunContext) -> dict[str, Any]:
    """Describe a model that is applied to an image, for the methods text.

    Parameters
    ----------
    task : Task
        The image, and age and sex of the participant.
    bundle : Bundle
        The model.
    context : RunContext
        Raw dataset and precision.

    Returns
    -------
    dict
        Fields of :class:`~bids_uad.reports.boilerplate.UsedModel`; JSON types only.
    """
    name, threshold = bundle.default_threshold
    training = bundle.info.get("training", {})
    seen_in = seen_in_training(bundle, task.unit, source_name(context.config.bids_dir))
    model = UsedModel(
        detector=bundle.scored_as,
        modality=bundle.modality,
        preset=bundle.preset,
        threshold=threshold,
        threshold_name=name,
        rule={}
        if bundle.rule.is_plain
        else {**bundle.rule.entries(), "min_volume_source": bundle.min_component_volume_source},
        training={key: training[key] for key in _TRAINING if key in training},
        post_processing=bundle.post_processing,
        precision=context.precision_of(bundle),
        seen_in=() if seen_in == NOT_SEEN else tuple(seen_in.split(" and ")),
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


def describe_methods(records: Iterable[CompletionRecord]) -> str:
    """Write the methods text of the images of completion records.

    Parameters
    ----------
    records : iterable of CompletionRecord
        Records in any order; those without outputs are skipped.

    Returns
    -------
    str
        Markdown; empty if no image was processed.
    """
    preprocessing: Counter[Pathway] = Counter()
    models: dict[str, UsedModel] = {}
    parcellations: set[str] = set()
    versions: set[str] = set()
    template = ""
    for record in records:
        if not record.outputs:
            continue
        fields = dict(record.methods)
        parcellations |= set(fields.pop("parcellations", ()))  # absent from records of early versions
        preprocessing[Pathway(**fields)] += 1
        versions.add(record.fingerprint["app_version"])
        if any(f"_space-{MNI}_" in name for name in record.outputs):
            template = MNI
        for model in record.models.values():
            _merge_model(models, UsedModel.from_record(model.methods))
    if not preprocessing:
        return ""
    used = sorted(models.values(), key=lambda model: (model.detector, model.modality, repr(model)))
    version = " and ".join(sorted(versions))
    return methods_text(
        used,
        pathways=preprocessing,
        parcellations=sorted(parcellations),
        template=template,
        version=version,
    )


def _merge_model(models: dict[str, UsedModel], model: UsedModel) -> None:
    """Add a model; merge the fields that differ between images of the same model."""
    key = repr(replace(model, seen_in=(), imputed=False))
    known = models.get(key, model)
    seen_in = tuple(sorted({*known.seen_in, *model.seen_in}))
    models[key] = replace(model, seen_in=seen_in, imputed=known.imputed or model.imputed)


def write_methods(output_dir: Path, *, md_only: bool = False) -> None:
    """Write the methods text of all images in a dataset, under a lock; nothing without records.

    Parameters
    ----------
    output_dir : pathlib.Path
        Root of the derivatives.
    md_only : bool, default=False
        Whether the text is written as Markdown only.
    """
    with locked(output_dir / "logs" / "dataset.lock"):
        text = describe_methods(read_records(output_dir))
        if text:
            write_citation(output_dir, text, md_only=md_only)
