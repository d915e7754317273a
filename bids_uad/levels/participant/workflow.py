"""The nipype workflow of a run: preprocessing of each image, and what follows from it, by participant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path

from nipype.pipeline.engine import Node
from niworkflows.engine.workflows import LiterateWorkflow

from bids_uad import __version__
from bids_uad.dataset.lesions import LesionMask
from bids_uad.dataset.units import ImageUnit
from bids_uad.levels.participant.detection import AlignMask
from bids_uad.levels.participant.means import Means, crash_dir
from bids_uad.levels.participant.plan import Task, by_subject, with_support
from bids_uad.levels.participant.writing import init_writing_wf
from bids_uad.preprocessing.workflow import Given, init_lesion_wf, init_preproc_wf

FROM_PREPROCESSING = ("preproc", "brain_mask", "native_mask", "to_sri24", "from_sri24", "qc")
FROM_ANCHOR = {"brain": "anchor_file", "own_mask": "anchor_mask", "xfm": "anchor_xfm"}

_PARTS = ("_preproc_wf", "_writing_wf", "_lesion_wf", "_lesion")


def workflow_name() -> str:
    """Name the working folder; it holds the version, so that another version reuses nothing."""
    return f"bids_uad_{_identifier(__version__)}_wf"


def place_of_unit(subject: str, key: str) -> tuple[str, str]:
    """Give participant and image as they come in the full names of an image's nodes."""
    return f"sub_{_identifier(subject)}_wf", _identifier(key)


def folders_of_unit(work_dir: Path, unit: ImageUnit) -> list[Path]:
    """List the working folders of an image's part of the workflow."""
    subject, name = place_of_unit(unit.subject, unit.key)
    return [work_dir / workflow_name() / subject / f"{name}{part}" for part in _PARTS]


def place_of_node(name: str) -> tuple[str, str]:
    """Find participant and image in a node's full name; see :func:`place_of_unit`."""
    _, subject, part, *_ = [*name.split("."), "", ""]
    for ending in _PARTS:
        part = part.removesuffix(ending)
    return subject, part


def build_workflow(tasks: Sequence[Task], means: Means) -> LiterateWorkflow:
    """Build the workflow of a run.

    Parameters
    ----------
    tasks : sequence of Task
        Of all participants; what is done is left out.
    means : Means

    Returns
    -------
    niworkflows.engine.workflows.LiterateWorkflow
    """
    workflow = LiterateWorkflow(name=workflow_name(), base_dir=str(means.config.work_dir))
    for subject, own in by_subject(tasks).items():
        if all(task.done for task in own):
            continue
        part = init_subject_wf(subject, own, means)
        part.config["execution"]["crashdump_dir"] = str(crash_dir(means.config, subject))
        for node in part._get_all_nodes():
            node.config = deepcopy(part.config)
        workflow.add_nodes([part])
    return workflow


def init_subject_wf(subject: str, tasks: Sequence[Task], means: Means) -> LiterateWorkflow:
    """Build the workflow of one participant.

    Parameters
    ----------
    subject : str
        Label without `sub-`.
    tasks : sequence of Task
        The participant's images, anchors first.
    means : Means

    Returns
    -------
    niworkflows.engine.workflows.LiterateWorkflow
    """
    workflow = LiterateWorkflow(name=place_of_unit(subject, "")[0])
    to_do, support = with_support(tasks)
    preprocessed, lesions = {}, {}
    for task in (*to_do, *support):
        key, name = task.unit.key, _identifier(task.unit.key)
        preprocessed[key] = _init_preprocessing(task, means, f"{name}_preproc_wf")
        workflow.add_nodes([preprocessed[key]])
        if not task.provides_lesion:
            continue
        lesions[key] = _connect_lesion(workflow, task.lesion, preprocessed[key], name)
    for task in (*to_do, *support):
        if task.unit.anchor is not None:
            anchor = preprocessed[task.unit.anchor.key]
            workflow.connect([(anchor, preprocessed[task.unit.key], _fields(FROM_ANCHOR))])
    for task in to_do:
        writing = init_writing_wf(task, means, name=f"{_identifier(task.unit.key)}_writing_wf")
        fields = {field: field for field in FROM_PREPROCESSING}
        workflow.connect([(preprocessed[task.unit.key], writing, _fields(fields))])
        if task.lesion_provider is not None:
            workflow.connect(*lesions[task.lesion_provider], writing, "inputnode.lesion")
    return workflow


def _connect_lesion(
    workflow: LiterateWorkflow, lesion: LesionMask, provider: LiterateWorkflow, name: str
) -> tuple[Node | LiterateWorkflow, str]:
    """Bring a lesion mask to SRI24; give what holds it and the name of its output."""
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
    """Connections between an output node and an input node."""
    return [(f"outputnode.{ours}", f"inputnode.{theirs}") for ours, theirs in pairs.items()]


def _init_preprocessing(task: Task, means: Means, name: str) -> LiterateWorkflow:
    """Build the preprocessing of one image."""
    unit, prepared = task.unit, task.unit.prepared
    # A transform to another reference image leads elsewhere.
    xfm = prepared.to_sri24 if prepared.reference_sha256 == means.reference.sha256 else None
    given = Given(
        image=prepared.image is not None,
        mask=prepared.brain_mask is not None,
        xfm=xfm is not None,
        aligned=prepared.aligned,
    )
    workflow = init_preproc_wf(
        name=name,
        modality=unit.modality,
        is_anchor=unit.is_anchor,
        skull_stripped=unit.skull_stripped if prepared.image is None else None,
        omp_nthreads=means.config.omp_nthreads,
        reference=means.reference,
        given=given,
        lesion_on_raw=task.lesion is None or not task.lesion.on_prepared,
        extraction=means.extraction,
    )
    files = {
        "in_file": unit.image,
        "raw_file": unit.path if given.image else None,
        "from_raw": prepared.from_raw,
        "given_mask": prepared.brain_mask,
        "given_xfm": xfm,
    }
    for field, path in files.items():
        if path is not None:
            setattr(workflow.inputs.inputnode, field, str(path))
    return workflow


def _identifier(text: str) -> str:
    """Turn a label into something nipype takes as a name."""
    return "".join(character if character.isalnum() else "_" for character in text)
