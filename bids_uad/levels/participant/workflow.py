"""Nipype workflow of a run: for each participant, preprocessing, detection and outputs of each image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from nipype.interfaces.utility import IdentityInterface, Merge
from nipype.pipeline.engine import Node
from niworkflows.engine.workflows import LiterateWorkflow

from bids_uad import __version__
from bids_uad.dataset import naming, sidecars
from bids_uad.dataset.lesion_masks import LesionMask
from bids_uad.dataset.naming import ImageUnit
from bids_uad.dataset.participants import source_name
from bids_uad.dataset.raw_metadata import SidecarReader
from bids_uad.engine.bundle import Bundle
from bids_uad.files import read_json
from bids_uad.levels.participant.completion_records import (
    CompletionRecord,
    ModelRecord,
    describe_model,
    describe_preprocessing,
    record_path,
)
from bids_uad.levels.participant.interfaces import (
    AddQuality,
    AlignMask,
    Complete,
    DerivativesDataSink,
    Detect,
    Postprocess,
    WriteInTemplates,
    WriteQuality,
    sidecar_of,
    with_sidecars,
)
from bids_uad.levels.participant.leakage import normative_metadata, scanner_seen, seen_in_training
from bids_uad.levels.participant.plan import (
    RunContext,
    Task,
    crash_dir,
    model_identity,
    split_tasks,
)
from bids_uad.preprocessing.workflow import ExternalInputs, init_lesion_wf, init_preproc_wf
from bids_uad.space import MNI, NAME, output_spaces

FROM_PREPROCESSING = ("preproc", "brain_mask", "native_mask", "to_sri24", "from_sri24", "qc")
"""Outputs of preprocessing that are inputs of the derivatives of an image."""
FROM_ANCHOR = {"brain": "anchor_file", "own_mask": "anchor_mask", "xfm": "anchor_xfm"}
"""Outputs of the anchor's preprocessing, and the inputs that they connect to."""
DETECTION_GB = 3.0
POSTPROCESS_GB = 1.0
"""Memory in GB that the scheduler reserves for one anomaly map, and for the outputs of one anomaly map."""

_PARTS = ("_preproc_wf", "_derivatives_wf", "_lesion_wf", "_lesion")
"""Suffixes of the workflows and nodes of an image."""


def workflow_name() -> str:
    """Return the name of the working folder; versions of bids_uad do not share one."""
    return f"bids_uad_{_identifier(__version__)}_wf"


def node_key(subject: str, image: str) -> tuple[str, str]:
    """Return participant and image as they occur in the full names of the image's nodes.

    Parameters
    ----------
    subject : str
        Label without `sub-`.
    image : str
        Name of the image, such as `sub-01_T1w`.

    Returns
    -------
    tuple of str
        For example `("sub_01_wf", "sub_01_T1w")`.
    """
    return f"sub_{_identifier(subject)}_wf", _identifier(image)


def node_key_of(name: str) -> tuple[str, str]:
    """Return participant and image of a node's full name, as :func:`node_key` does."""
    _, subject, part, *_ = [*name.split("."), "", ""]
    for suffix in _PARTS:
        part = part.removesuffix(suffix)
    return subject, part


def working_folders(work_dir: Path, unit: ImageUnit) -> list[Path]:
    """List the working folders of an image.

    Parameters
    ----------
    work_dir : pathlib.Path
        Working directory of the run.
    unit : ImageUnit
        The image.

    Returns
    -------
    list of pathlib.Path
        Folders, which need not exist.
    """
    subject, name = node_key(unit.subject, unit.key)
    return [work_dir / workflow_name() / subject / f"{name}{part}" for part in _PARTS]


def build_workflow(tasks: Sequence[Task], context: RunContext) -> LiterateWorkflow:
    """Build the workflow that takes a participant through a run.

    Parameters
    ----------
    tasks : sequence of Task
        Tasks of one participant, at least one of them pending.
    context : RunContext
        Options, reference image, brain extraction and device.

    Returns
    -------
    niworkflows.engine.workflows.LiterateWorkflow
        The workflow of :func:`init_subject_wf` in the working folder of the run.
    """
    workflow = LiterateWorkflow(name=workflow_name(), base_dir=str(context.config.work_dir))
    subject = tasks[0].unit.subject
    part = init_subject_wf(subject, tasks, context)
    part.config["execution"]["crashdump_dir"] = str(crash_dir(context.config, subject))
    for node in part._get_all_nodes():
        node.config = deepcopy(part.config)
    workflow.add_nodes([part])
    return workflow


def init_subject_wf(subject: str, tasks: Sequence[Task], context: RunContext) -> LiterateWorkflow:
    """Build the workflow of one participant.

    Parameters
    ----------
    subject : str
        Label without `sub-`.
    tasks : sequence of Task
        Tasks of the participant, anchors first.
    context : RunContext
        Options, reference image, brain extraction and device.

    Returns
    -------
    niworkflows.engine.workflows.LiterateWorkflow
        For each image a workflow of preprocessing (`*_preproc_wf`) and one of the derivatives
        (`*_derivatives_wf`, see :func:`init_derivatives_wf`).
    """
    workflow = LiterateWorkflow(name=node_key(subject, "")[0])
    to_do, to_preprocess = split_tasks(tasks)
    preprocessed, lesions = {}, {}
    for task in to_preprocess:
        key, name = task.unit.key, _identifier(task.unit.key)
        preprocessed[key] = _init_preprocessing(task, context, f"{name}_preproc_wf")
        workflow.add_nodes([preprocessed[key]])
        if not task.provides_lesion:
            continue
        lesions[key] = _connect_lesion(workflow, task.lesion, preprocessed[key], name)
    for task in to_preprocess:
        if task.unit.anchor is not None:
            anchor = preprocessed[task.unit.anchor.key]
            workflow.connect([(anchor, preprocessed[task.unit.key], _fields(FROM_ANCHOR))])
    for task in to_do:
        name = f"{_identifier(task.unit.key)}_derivatives_wf"
        if task.preprocessed:
            workflow.add_nodes([init_models_wf(task, context, name=name)])
            continue
        derivatives = init_derivatives_wf(task, context, name=name)
        fields = {field: field for field in FROM_PREPROCESSING}
        if _templates(context):
            fields["in_templates"] = "in_templates"
        workflow.connect([(preprocessed[task.unit.key], derivatives, _fields(fields))])
        if task.lesion_provider is not None:
            workflow.connect(*lesions[task.lesion_provider], derivatives, "inputnode.lesion")
    return workflow


def _connect_lesion(
    workflow: LiterateWorkflow, lesion: LesionMask, provider: LiterateWorkflow, name: str
) -> tuple[Node | LiterateWorkflow, str]:
    """Connect the transform of a lesion mask to SRI24; return the node and field that hold the result."""
    if lesion.on_atlas:
        return Node(AlignMask(in_file=str(lesion.path)), name=f"{name}_lesion"), "out_file"
    if lesion.other is not None:
        own = init_lesion_wf(name=f"{name}_lesion_wf")
        own.inputs.inputnode.in_file = str(lesion.other)
        own.inputs.inputnode.lesion_mask = str(lesion.path)
        workflow.connect([(provider, own, _fields(FROM_ANCHOR))])
        return own, "outputnode.lesion"
    provider.inputs.inputnode.lesion_mask = str(lesion.path)
    if lesion.transform is not None:
        provider.inputs.inputnode.lesion_xfm = str(lesion.transform)
    return provider, "outputnode.lesion"


def _fields(pairs: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the connections between the output node of one workflow and the input node of another."""
    return [(f"outputnode.{source}", f"inputnode.{target}") for source, target in pairs.items()]


def _init_preprocessing(task: Task, context: RunContext, name: str) -> LiterateWorkflow:
    """Build the preprocessing of one image."""
    unit, external = task.unit, task.unit.external
    # A transform to another reference image cannot be used.
    xfm = external.to_sri24 if external.reference_sha256 == context.reference.sha256 else None
    inputs = ExternalInputs(
        image=external.image is not None,
        mask=external.brain_mask is not None,
        xfm=xfm is not None,
        aligned=external.aligned,
    )
    workflow = init_preproc_wf(
        name=name,
        modality=unit.modality,
        is_anchor=unit.is_anchor,
        skull_stripped=unit.skull_stripped if external.image is None else None,
        omp_nthreads=context.config.omp_nthreads,
        reference=context.reference,
        external=inputs,
        lesion_on_raw=task.lesion is None or not task.lesion.on_external,
        extraction=context.extraction,
        # An image that is only an anchor is not written.
        templates=() if task.done or task.preprocessed else _templates(context),
    )
    files = {
        "in_file": unit.image,
        "raw_file": unit.path if inputs.image else None,
        "from_raw": external.from_raw,
        "external_mask": external.brain_mask,
        "external_xfm": xfm,
    }
    for field, path in files.items():
        if path is not None:
            setattr(workflow.inputs.inputnode, field, str(path))
    return workflow


def _templates(context: RunContext) -> list[str]:
    """Return the output spaces of the run that are templates, as on the command line."""
    return [name for name in context.config.output_spaces if name.startswith(MNI)]


def _identifier(text: str) -> str:
    """Replace the characters of a label that node names cannot contain by underscores."""
    return "".join(character if character.isalnum() else "_" for character in text)


def init_derivatives_wf(task: Task, context: RunContext, *, name: str) -> LiterateWorkflow:
    """Build the workflow that writes the derivatives of a preprocessed image, runs detectors and the record.

    Parameters
    ----------
    task : Task
        The image, its models and lesion mask.
    context : RunContext
        Options, reference image, brain extraction and device.
    name : str
        Name of the workflow.

    Returns
    -------
    niworkflows.engine.workflows.LiterateWorkflow
        Data sinks, detection, and the completion record after all of them.

    Inputs
    ------
    preproc, brain_mask, native_mask, to_sri24, from_sri24, qc
        Outputs of the image's preprocessing.
    lesion
        Lesion mask of the image in SRI24 space, if there is one.
    in_templates
        Image and brain mask in the spaces of templates, if there are any.
    """
    unit, config = task.unit, context.config
    spaces = output_spaces(config.output_spaces)
    workflow = LiterateWorkflow(name=name)
    fields = [*FROM_PREPROCESSING, "lesion", "in_templates"]
    inputs = Node(IdentityInterface(fields=fields), name="inputnode")
    written: list[tuple[Node, str]] = []
    metadata = sidecars.preprocessing_sidecars(unit, config.bids_dir, context.reference.metadata, spaces)
    quality = Node(AddQuality(metadata=metadata["preproc"]), name="add_quality", run_without_submitting=True)
    workflow.connect(inputs, "qc", quality, "quality")
    # The sinks use only the name. The raw file itself may have been removed.
    source = unit.folder / f"{unit.key}.nii.gz"
    for field, entities in _sink_entities(task).items():
        sink = _sink(f"ds_{field}", source, config.output_dir, entities, metadata.get(field))
        workflow.connect(inputs, field, sink, "in_file")
        if field == "preproc":
            workflow.connect(quality, "metadata", sink, "meta_dict")
        written.append((sink, "out_file"))
    if templates := naming.template_outputs(unit, spaces):
        write = WriteInTemplates(
            files={kind: str(config.output_dir / path) for kind, path in templates.items()},
            sidecars={kind: metadata[kind] for kind in templates if kind in metadata},
        )
        in_templates = Node(write, name="in_templates")
        workflow.connect([(inputs, in_templates, [("in_templates", "in_files"), ("to_sri24", "to_sri24")])])
        written.append((in_templates, "out_files"))
    table = Node(_quality_table(task, context), name="quality_table", run_without_submitting=True)
    workflow.connect(inputs, "qc", table, "quality")
    written.append((table, "out_file"))
    if task.provides_lesion:
        entities = {"space": NAME, "label": "lesion", "desc": "manual", "suffix": "mask"}
        root = config.derivatives["lesions"]
        own = SidecarReader(root).fields_if_readable(PurePosixPath(task.lesion.path.relative_to(root)))
        described = sidecars.lesion_sidecar(sidecars.lesion_uri(task.lesion.path, root), own)
        # The output has the entities of the mask, which may be fewer than those of this image.
        template = config.output_dir / task.lesion.output
        sink = _sink("ds_lesion", template, config.output_dir, entities, described)
        workflow.connect(inputs, "lesion", sink, "in_file")
        written.append((sink, "out_file"))
    models = _connect_detection(workflow, task, context, inputs)
    connect_record(workflow, task, context, inputs, written, models)
    return workflow


def init_models_wf(task: Task, context: RunContext, *, name: str) -> LiterateWorkflow:
    """Build the workflow that runs detectors on the outputs of preprocessing of an earlier run.

    Parameters
    ----------
    task : Task
        The image, its models and lesion mask.
    context : RunContext
        Options, reference image and device.
    name : str
        Name of the workflow.

    Returns
    -------
    niworkflows.engine.workflows.LiterateWorkflow
        Detection, and the completion record.
    """
    root = context.config.output_dir
    workflow = LiterateWorkflow(name=name)
    inputs = Node(IdentityInterface(fields=[*FROM_PREPROCESSING, "lesion", "files"]), name="inputnode")
    paths = naming.preprocessing_outputs(task.unit)
    for field, path in paths.items():
        setattr(inputs.inputs, field, str(root / path))
    inputs.inputs.qc = read_json(sidecar_of(root / paths["preproc"]))["PreprocessingQuality"]
    inputs.inputs.files = [str(root / path) for path in task.preprocessed]
    if task.lesion is not None:
        inputs.inputs.lesion = str(root / task.lesion.output)
    models = _connect_detection(workflow, task, context, inputs)
    connect_record(workflow, task, context, inputs, [(inputs, "files")], models)
    return workflow


def _quality_table(task: Task, context: RunContext) -> WriteQuality:
    """Return the interface that writes the quality table of an image."""
    outputs = naming.preprocessing_outputs(task.unit)
    raw = sidecars.raw_uri(task.unit, context.config.bids_dir)
    return WriteQuality(
        provenance={
            "source_image": raw,
            "modality": task.unit.modality,
            "depends_on": ", ".join(task.depends_on) or "n/a",
        },
        sidecar=sidecars.quality_sidecar(outputs["preproc"], outputs["brain_mask"]),
        target=str(context.config.output_dir / naming.quality_output(task.unit)),
    )


def connect_record(
    workflow: LiterateWorkflow,
    task: Task,
    context: RunContext,
    inputs: Node,
    written: list[tuple[Node, str]],
    models: Mapping[str, Node] = MappingProxyType({}),
) -> None:
    """Add the nodes that write the completion record.

    Preprocessing and each model are recorded when their outputs exist, so that a model that fails does not
    affect the others.

    Parameters
    ----------
    workflow : niworkflows.engine.workflows.LiterateWorkflow
        Workflow of the image's derivatives.
    task : Task
        The image, its models and lesion mask.
    context : RunContext
        Options, reference image, brain extraction and device.
    inputs : nipype.pipeline.engine.Node
        Input node of the workflow, with the field `qc`.
    written : list of (nipype.pipeline.engine.Node, str)
        Nodes that write outputs of preprocessing, and their fields with the written files.
    models : mapping of str to nipype.pipeline.engine.Node, optional
        Node that writes the outputs of each model, with the field `out_files`, by `Bundle.scored_as`.
    """
    collect = Node(Merge(len(written)), name="collect", run_without_submitting=True)
    for number, (node, field) in enumerate(written, start=1):
        workflow.connect(node, field, collect, f"in{number}")
    nodes = {"record_preprocessing": None, **{f"record_{_identifier(name)}": name for name in models}}
    record = _record(task, context)
    for node_name, name in nodes.items():
        own = {} if name is None else {name: record.models[name]}
        node = _record_node(node_name, replace(record, models=own), list(models), task, context)
        workflow.connect([(collect, node, [("out", "files")]), (inputs, node, [("qc", "quality")])])
        if name is not None:
            workflow.connect(models[name], "out_files", node, "after")


def _record_node(
    name: str, record: CompletionRecord, requested: list[str], task: Task, context: RunContext
) -> Node:
    """Return a node that writes a completion record, or adds its models to the existing one."""
    output_dir = context.config.output_dir
    write = Complete(
        output_dir=str(output_dir),
        record_file=str(record_path(output_dir, task.unit)),
        record=asdict(record),
        requested=requested,
    )
    return Node(write, name=name, run_without_submitting=True)


def _record(task: Task, context: RunContext) -> CompletionRecord:
    """Return the record of what this run writes for an image, without the outputs of preprocessing."""
    unit, config = task.unit, context.config
    return CompletionRecord(
        key=unit.key,
        run_id=config.run_id,
        source=unit.path.relative_to(config.bids_dir).as_posix(),
        fingerprint=task.fingerprint,
        models={
            bundle.scored_as: ModelRecord(
                label=bundle.label,
                identity=model_identity(bundle, config, task.person),
                covariates={} if bundle.deviation == "none" else task.person.covariates,
                outputs=with_sidecars(_detection_files(task, bundle, context).values()),
                methods=describe_model(task, bundle, context),
            )
            for bundle in task.bundles
        },
        methods=describe_preprocessing(task, context),
    )


def _detection_files(task: Task, bundle: Bundle, context: RunContext) -> dict[str, Path]:
    """Return the outputs of one model for an image by kind, relative to the dataset."""
    return naming.detection_outputs(
        task.unit,
        bundle.scored_as,
        with_lesions=task.lesion is not None,
        spaces=output_spaces(context.config.output_spaces),
    )


def _connect_detection(
    workflow: LiterateWorkflow,
    task: Task,
    context: RunContext,
    inputs: Node,
) -> dict[str, Node]:
    """Add the nodes that score the image, and return those that write the outputs of each model."""
    # Scores and normative deviations of a model are derived from one anomaly map.
    maps = {bundle.name: _detection(task, bundle, context) for bundle in task.bundles}
    for detect in maps.values():
        workflow.connect([(inputs, detect, [("preproc", "image"), ("brain_mask", "brain")])])
    written = {}
    for bundle in task.bundles:
        name = f"post_{_identifier(bundle.scored_as)}"
        post = Node(_postprocess(task, bundle, context), name=name, mem_gb=POSTPROCESS_GB)
        workflow.connect(maps[bundle.name], "out_file", post, "score_map")
        fields = [("brain_mask", "brain_mask"), ("native_mask", "native_ref"), ("from_sri24", "from_sri24")]
        workflow.connect([(inputs, post, fields)])
        if task.lesion_provider is not None:
            workflow.connect([(inputs, post, [("lesion", "lesion"), ("preproc", "image")])])
        written[bundle.scored_as] = post
    return written


def _detection(task: Task, bundle: Bundle, context: RunContext) -> Node:
    """Return the node that scores an image with one detector."""
    config, threads, on_cpu = context.config, context.detection_threads, context.device == "cpu"
    detect = Detect(
        key=task.unit.key,
        seed=config.random_seed,
        bundle=str(bundle.folder),
        sha256=bundle.sha256,
        device=context.device,
        precision=context.precision_of(bundle),
        batch_size=config.batch_size or int(config.low_mem),
        compiled=config.compiled,
        use_cuda=not on_cpu,
        threads=threads,
    )
    # For GPU nodes, the scheduler takes the number of processes as the number of GPU slots.
    n_procs = threads if on_cpu else 1
    return Node(detect, name=f"detect_{bundle.detector}", n_procs=n_procs, mem_gb=DETECTION_GB)


def _postprocess(task: Task, bundle: Bundle, context: RunContext) -> Postprocess:
    """Return the interface that writes the outputs of one model."""
    unit, config = task.unit, context.config
    threshold_name, threshold = bundle.default_threshold
    files = _detection_files(task, bundle, context)
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
        **_rule_fields(bundle),
        "ThresholdSource": "fixed on validation scans (ThresholdCohort) when the model was calibrated",
        "Scaling": bundle.protocol.scaling,
        "PostProcessing": bundle.post_processing,
        **bundle.provenance,
    }
    run = {
        "Device": context.device,
        "Precision": context.precision_of(bundle),
        "TorchVersion": version("torch"),
        "RandomSeed": config.random_seed,
    }
    if bundle.deviation != "none":
        model |= normative_metadata(bundle.normative, **task.person.covariates)
    return Postprocess(
        bundle=str(bundle.folder),
        deviation=bundle.deviation,
        covariates=task.person.covariates,
        provenance={
            "source_image": raw,
            "modality": unit.modality,
            "detector": bundle.scored_as,
            "preset": bundle.preset,
            "model_sha256": bundle.sha256,
            "app_version": __version__,
            "threshold": repr(threshold),
            "threshold_name": threshold_name,
            "min_component_volume_mm3": bundle.rule.min_volume,
            **bundle.healthy_marked.columns(),
            "seen_in_training": seen_in_training(bundle, unit, source_name(config.bids_dir)),
            "scanner_seen": scanner_seen(bundle, task.person.scanner, source_name(config.bids_dir)),
        },
        files={kind: str(config.output_dir / path) for kind, path in files.items()},
        sidecars=sidecars.detection_sidecars(
            files,
            inputs,
            model,
            run,
            context.reference.parcellations,
            min_lesion_volume=config.min_counted_volume,
            spaces=output_spaces(config.output_spaces),
        ),
        spaces=list(config.output_spaces),
        parcellations={name: str(path) for name, path in context.reference.parcellations.items()},
        min_component_volume=bundle.min_component_volume,
        min_lesion_volume=config.min_counted_volume,
    )


def _rule_fields(bundle: Bundle) -> dict[str, Any]:
    """Return the sidecar fields of a decision rule; only the minimum volume for a plain threshold."""
    rule = bundle.rule
    minimum = {
        "MinComponentVolume": rule.min_volume,
        "MinComponentVolumeSource": bundle.min_component_volume_source,
    }
    return minimum if rule.is_plain else {"LowThreshold": rule.low, **minimum, "FilledHoles": rule.holes}


def _sink_entities(task: Task) -> dict[str, dict[str, str]]:
    """Return the BIDS entities of each output of preprocessing."""
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
    """Return a data sink node."""
    sink = DerivativesDataSink(base_directory=str(output_dir), source_file=str(source), **entities)
    if metadata is not None:
        sink.inputs.meta_dict = metadata
    if entities["suffix"] != "xfm":
        sink.inputs.compress = True
    return Node(sink, name=name)
