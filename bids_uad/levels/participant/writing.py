"""What follows from a preprocessed image: sinks, detection, and the record that all of it is there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

from nipype.interfaces.base import BaseInterfaceInputSpec, File, SimpleInterface, TraitedSpec, traits
from nipype.interfaces.utility import IdentityInterface, Merge
from nipype.pipeline.engine import Node
from niworkflows.engine.workflows import LiterateWorkflow

from bids_uad import __version__
from bids_uad.dataset import naming, sidecars
from bids_uad.dataset.identity import source_name
from bids_uad.dataset.inheritance import SidecarReader
from bids_uad.dataset.outputs import DerivativesDataSink, sidecar_of
from bids_uad.engine.bundle import Bundle
from bids_uad.levels.participant.assumptions import deviation_sidecar
from bids_uad.levels.participant.detection import Detect, Postprocess
from bids_uad.levels.participant.means import Means
from bids_uad.levels.participant.methods import as_it_was, describe_model, describe_preprocessing
from bids_uad.levels.participant.overlap import model_has_met, scanner_seen
from bids_uad.levels.participant.plan import Task, model_identity
from bids_uad.levels.participant.quality import AddQuality, WriteQuality
from bids_uad.levels.participant.records import ModelRecord, Record, record_path, write_record
from bids_uad.space import NAME

DETECTION_GB = 3.0
POSTPROCESS_GB = 1.0
FIELDS = ("preproc", "brain_mask", "native_mask", "to_sri24", "from_sri24", "qc", "lesion")


def init_writing_wf(task: Task, means: Means, *, name: str) -> LiterateWorkflow:
    """Build what follows from preprocessing one image.

    Parameters
    ----------
    task : Task
    means : Means
    name : str

    Returns
    -------
    niworkflows.engine.workflows.LiterateWorkflow

    Inputs
    ------
    preproc, brain_mask, native_mask, to_sri24, from_sri24, qc
        From the image's preprocessing.
    lesion
        The image's lesion mask in SRI24 space, if there is one.
    """
    unit, config = task.unit, means.config
    workflow = LiterateWorkflow(name=name)
    inputs = Node(IdentityInterface(fields=list(FIELDS)), name="inputnode")
    written: list[tuple[Node, str]] = []
    metadata = sidecars.preprocessing_sidecars(unit, config.bids_dir, means.reference.metadata)
    quality = Node(AddQuality(metadata=metadata["preproc"]), name="add_quality", run_without_submitting=True)
    workflow.connect(inputs, "qc", quality, "quality")
    # Only the name is used. It is not that of the raw file, which need not be there any more.
    source = unit.folder / f"{unit.key}.nii.gz"
    for field, entities in _sink_entities(task).items():
        sink = _sink(f"ds_{field}", source, config.output_dir, entities, metadata.get(field))
        workflow.connect(inputs, field, sink, "in_file")
        if field == "preproc":
            workflow.connect(quality, "metadata", sink, "meta_dict")
        written.append((sink, "out_file"))
    table = Node(_quality_table(task, means), name="quality_table", run_without_submitting=True)
    workflow.connect(inputs, "qc", table, "quality")
    written.append((table, "out_file"))
    if task.provides_lesion:
        entities = {"space": NAME, "label": "lesion", "desc": "manual", "suffix": "mask"}
        root = config.derivatives["lesions"]
        own = SidecarReader(root).fields_if_readable(PurePosixPath(task.lesion.path.relative_to(root)))
        described = sidecars.lesion_sidecar(sidecars.lesion_uri(task.lesion.path, root), own)
        # Named after the mask, which may name fewer entities than this image.
        named = config.output_dir / task.lesion.output
        sink = _sink("ds_lesion", named, config.output_dir, entities, described)
        workflow.connect(inputs, "lesion", sink, "in_file")
        written.append((sink, "out_file"))
    if task.bundles:
        written += _connect_detection(workflow, task, means, inputs)
    _connect_record(workflow, task, means, inputs, written)
    return workflow


def _quality_table(task: Task, means: Means) -> WriteQuality:
    """Make the interface that writes the quality of an image."""
    outputs = naming.preprocessing_outputs(task.unit)
    raw = sidecars.raw_uri(task.unit, means.config.bids_dir)
    return WriteQuality(
        facts={
            "source_image": raw,
            "modality": task.unit.modality,
            "depends_on": ", ".join(task.depends_on) or "n/a",
        },
        sidecar=sidecars.quality_sidecar(outputs["preproc"], outputs["brain_mask"]),
        target=str(means.config.output_dir / naming.quality_output(task.unit)),
    )


def _connect_record(
    workflow: LiterateWorkflow, task: Task, means: Means, inputs: Node, written: list[tuple[Node, str]]
) -> None:
    """Connect the completion record to everything that is written."""
    unit, config = task.unit, means.config
    collect = Node(Merge(len(written)), name="collect", run_without_submitting=True)
    for number, (node, field) in enumerate(written, start=1):
        workflow.connect(node, field, collect, f"in{number}")
    complete = Node(
        Complete(
            output_dir=str(config.output_dir),
            record_file=str(record_path(config.output_dir, unit)),
            record=asdict(_record(task, means)),
        ),
        name="complete",
        run_without_submitting=True,
    )
    workflow.connect(collect, "out", complete, "files")
    workflow.connect(inputs, "qc", complete, "quality")


def _record(task: Task, means: Means) -> Record:
    """Make the record of what this run writes for an image, the files of its preprocessing apart."""
    unit, config = task.unit, means.config
    return Record(
        key=unit.key,
        run_id=config.run_id,
        source=unit.path.relative_to(config.bids_dir).as_posix(),
        fingerprint=task.fingerprint,
        models={
            bundle.scored_as: ModelRecord(
                label=bundle.label,
                identity=model_identity(bundle, config.precision, task.person, config.min_lesion_volume),
                covariates={} if bundle.deviation == "none" else task.person.covariates,
                outputs=_with_sidecars(_detection_files(task, bundle).values()),
                methods=describe_model(task, bundle, means),
            )
            for bundle in task.bundles
        },
        methods=describe_preprocessing(task, means),
    )


def _detection_files(task: Task, bundle: Bundle) -> dict[str, Path]:
    """Name what one model writes for an image, by kind, relative to the dataset."""
    return naming.detection_outputs(task.unit, bundle.scored_as, with_truth=task.lesion is not None)


def _with_sidecars(files: Iterable[Path]) -> list[str]:
    """List files and their sidecars."""
    return sorted({path.as_posix() for file in files for path in (file, sidecar_of(file))})


def _connect_detection(
    workflow: LiterateWorkflow,
    task: Task,
    means: Means,
    inputs: Node,
) -> list[tuple[Node, str]]:
    """Connect one detection process and, for each model, what is made of its map."""
    unit, config = task.unit, means.config
    threads = means.detection_threads
    # Scores and their deviation come from one scoring.
    models = {bundle.name: bundle for bundle in task.bundles}
    detect = Node(
        Detect(
            key=unit.key,
            seed=config.random_seed,
            bundles=[str(bundle.folder) for bundle in models.values()],
            sha256=[bundle.sha256 for bundle in models.values()],
            device=means.device,
            precision=means.precision,
            batch_size=config.batch_size or 0,
            compiled=config.compiled,
            use_cuda=means.device != "cpu",
            threads=threads,
        ),
        name="detect",
        # The scheduler reads a GPU node's process count as its number of GPU slots.
        n_procs=1 if means.device != "cpu" else threads,
        mem_gb=DETECTION_GB,
    )
    workflow.connect([(inputs, detect, [("preproc", "image"), ("brain_mask", "brain")])])
    written = []
    for bundle in task.bundles:
        name = f"post_{bundle.scored_as.replace('+', '_')}"
        post = Node(_postprocess(task, bundle, means), name=name, mem_gb=POSTPROCESS_GB)
        position = list(models).index(bundle.name)
        workflow.connect([(detect, post, [(("out_files", _pick, position), "score_map")])])
        fields = [("brain_mask", "brain_mask"), ("native_mask", "native_ref"), ("from_sri24", "from_sri24")]
        workflow.connect([(inputs, post, fields)])
        if task.lesion_provider is not None:
            workflow.connect([(inputs, post, [("lesion", "lesion"), ("preproc", "image")])])
        written.append((post, "out_files"))
    return written


def _postprocess(task: Task, bundle: Bundle, means: Means) -> Postprocess:
    """Make the interface that writes what one model found."""
    unit, config = task.unit, means.config
    threshold_name, threshold = bundle.default_threshold
    files = _detection_files(task, bundle)
    preprocessed = naming.preprocessing_outputs(unit)
    raw = sidecars.raw_uri(unit, config.bids_dir)
    inputs: dict[str, Any] = {
        "preproc": preprocessed["preproc"],
        "brain_mask": preprocessed["brain_mask"],
        "raw": raw,
    }
    if task.lesion is not None:
        inputs["lesion"] = task.lesion.output
    model = {
        "Model": bundle.name,
        "ModelVersion": bundle.info["code_version"],
        "ModelSHA256": bundle.sha256,
        "Detector": bundle.detector,
        "Preset": bundle.preset,
        "TrainingModality": bundle.modality,
        "Threshold": threshold,
        "ThresholdName": threshold_name,
        "ThresholdSource": "fixed on validation scans (ThresholdCohort) when the model was calibrated",
        "Scaling": bundle.protocol.scaling,
        "PostProcessing": bundle.post_processing,
        **bundle.origin,
    }
    run = {
        "Device": means.device,
        "Precision": means.precision,
        "TorchVersion": version("torch"),
        "RandomSeed": config.random_seed,
    }
    if bundle.deviation != "none":
        model |= deviation_sidecar(bundle.normative, **task.person.covariates)
    return Postprocess(
        bundle=str(bundle.folder),
        deviation=bundle.deviation,
        person=task.person.covariates,
        facts={
            "source_image": raw,
            "modality": unit.modality,
            "detector": bundle.scored_as,
            "preset": bundle.preset,
            "model_sha256": bundle.sha256,
            "app_version": __version__,
            "threshold": repr(threshold),
            "threshold_name": threshold_name,
            "model_has_met": model_has_met(bundle, unit, config.bids_dir),
            "scanner_seen": scanner_seen(bundle, task.person.scanner, source_name(config.bids_dir)),
        },
        files={kind: str(config.output_dir / path) for kind, path in files.items()},
        sidecars=sidecars.detection_sidecars(
            files,
            inputs,
            model,
            run,
            means.reference.parcellations,
            min_lesion_volume=config.min_lesion_volume,
        ),
        parcellations={name: str(path) for name, path in means.reference.parcellations.items()},
        min_lesion_volume=config.min_lesion_volume,
    )


def _sink_entities(task: Task) -> dict[str, dict[str, str]]:
    """Give the entities that the sink adds to each output of preprocessing."""
    unit = task.unit
    brain = naming.brain_desc(unit)
    return {
        "preproc": {"space": NAME, "desc": "preproc", "suffix": unit.modality},
        "brain_mask": {"space": NAME, "desc": brain, "suffix": "mask"},
        "native_mask": {"desc": brain, "suffix": "mask"},
        "to_sri24": {"from": unit.modality, "to": NAME, "mode": "image", "suffix": "xfm"},
        "from_sri24": {"from": NAME, "to": unit.modality, "mode": "image", "suffix": "xfm"},
    }


def _sink(
    name: str, source: Path, output_dir: Path, entities: dict[str, str], metadata: dict[str, Any] | None
) -> Node:
    """Make a data sink node."""
    sink = DerivativesDataSink(base_directory=str(output_dir), source_file=str(source), **entities)
    if metadata is not None:
        sink.inputs.meta_dict = metadata
    if entities["suffix"] != "xfm":
        sink.inputs.compress = True
        # On the image's own grid the header must stay the image's.
        sink.inputs.check_hdr = "space" in entities
    return Node(sink, name=name)


def _pick(items: list[str], position: int) -> str:
    """Take one item of a list, between two nodes."""
    return items[position]


class _CompleteInputSpec(BaseInterfaceInputSpec):
    files = traits.List(File(exists=True), mandatory=True, desc="everything that was written")
    output_dir = traits.Str(mandatory=True, desc="derivative dataset")
    record_file = traits.Str(mandatory=True, desc="path of the record")
    record = traits.Dict(mandatory=True, nohash=True, desc="the record, files of the preprocessing apart")
    quality = traits.Dict(mandatory=True, desc="what preprocessing measured")


class _CompleteOutputSpec(TraitedSpec):
    out_file = File(exists=True, desc="the record")


class Complete(SimpleInterface):
    """Write the record of an image, after all of its outputs."""

    input_spec = _CompleteInputSpec
    output_spec = _CompleteOutputSpec
    _always_run = True

    def _run_interface(self, runtime):
        root = Path(self.inputs.output_dir)
        content = dict(self.inputs.record)
        models = {name: ModelRecord(**model) for name, model in content.pop("models").items()}
        record = Record(**content, models=models)
        written = [Path(path).relative_to(root) for path in self.inputs.files]
        outputs = set(_with_sidecars(written)) - record.files
        present = sorted(name for name in outputs if (root / name).is_file())
        methods = as_it_was(record.methods, self.inputs.quality)
        record = replace(record, outputs=present, methods=methods)
        path = write_record(Path(self.inputs.record_file), root, record)
        self._results["out_file"] = str(path)
        return runtime
