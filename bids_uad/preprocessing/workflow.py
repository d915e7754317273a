"""Preprocessing workflow of one T1w, T2w or FLAIR scan, from its native grid to SRI24."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nipype.interfaces import utility as niu
from nipype.pipeline import engine as pe
from niworkflows.engine.workflows import LiterateWorkflow

from bids_uad.config import MODALITIES
from bids_uad.errors import truncate_list
from bids_uad.preprocessing.brain_extraction.masks import Extraction
from bids_uad.preprocessing.interfaces import (
    AssessQuality,
    BrainMask,
    Conform,
    CorrectBias,
    RegisterRaw,
    RegisterToAnchor,
    RegisterToReference,
    ResampleLesion,
    ResampleToSRI24,
)
from bids_uad.preprocessing.reference import Reference

INPUTS = (
    "in_file",
    "anchor_file",
    "anchor_mask",
    "anchor_xfm",
    "lesion_mask",
    "lesion_xfm",
    "external_mask",
    "external_xfm",
    "raw_file",
    "from_raw",
)
OUTPUTS = (
    "preproc",
    "brain_mask",
    "own_mask",
    "brain",
    "xfm",
    "native_mask",
    "to_sri24",
    "from_sri24",
    "lesion",
    "qc",
    "in_templates",
)


@dataclass(frozen=True)
class ExternalInputs:
    """Inputs that another pipeline provides for a scan.

    Parameters
    ----------
    image : bool, default=False
        Bias-corrected image, used instead of the raw scan.
    mask : bool, default=False
        Brain mask.
    xfm : bool, default=False
        Transform to SRI24.
    aligned : bool, default=False
        Whether the image is aligned with its anchor.
    """

    image: bool = False
    mask: bool = False
    xfm: bool = False
    aligned: bool = False


NO_EXTERNAL_INPUTS = ExternalInputs()


def init_preproc_wf(
    *,
    name: str,
    modality: str,
    is_anchor: bool,
    skull_stripped: bool | None,
    omp_nthreads: int,
    reference: Reference,
    external: ExternalInputs = NO_EXTERNAL_INPUTS,
    lesion_on_raw: bool = True,
    extraction: Extraction,
    templates: Sequence[str] = (),
) -> LiterateWorkflow:
    """Build the preprocessing of one scan.

    An *anchor* (the T1w, or any scan of a participant without one) is registered to the reference image. Any
    other scan is registered to its anchor, and the two transforms are composed, so that every scan is
    interpolated once.

    Workflow Graph
        .. workflow::
            :graph2use: orig
            :simple_form: yes

            from bids_uad.preprocessing.brain_extraction.masks import resolve_extraction
            from bids_uad.preprocessing.reference import resolve_reference
            from bids_uad.preprocessing.workflow import init_preproc_wf
            wf = init_preproc_wf(
                name="preproc_wf",
                modality="T1w",
                is_anchor=True,
                skull_stripped=None,
                omp_nthreads=1,
                reference=resolve_reference(None, "."),
                extraction=resolve_extraction("combined", None),
            )

    Parameters
    ----------
    name : str
        Name of the workflow.
    modality : {"T1w", "T2w", "FLAIR"}
        Contrast of the scan.
    is_anchor : bool
        Whether the scan is registered to the reference itself.
    skull_stripped : bool or None
        Whether the scan is skull-stripped; if None, it is detected when the workflow runs.
    omp_nthreads : int
        Maximum number of threads that the scheduler reserves for a node. ANTs always runs with one thread,
        which makes its results reproducible to the bit.
    reference : bids_uad.preprocessing.reference.Reference
        Reference images on the SRI24 grid.
    external : ExternalInputs, default=NO_EXTERNAL_INPUTS
        Inputs that another pipeline provides.
    lesion_on_raw : bool, default=True
        Whether the lesion mask is on the grid of the raw scan instead of another pipeline's image.
    extraction : Extraction
        Brain-extraction method for whole heads.
    templates : sequence of str, default=()
        Spaces of templates to which the scan is resampled, see :func:`bids_uad.space.output_spaces`.

    Inputs
    ------
    in_file
        Raw scan, or image of another pipeline.
    anchor_file
        Bias-corrected brain of the anchor in its native space (output ``brain`` of the anchor's workflow).
        This and the next two inputs are not used by an anchor.
    anchor_mask
        Brain mask of the anchor on the same grid (its ``own_mask``).
    anchor_xfm
        ITK transform of the anchor to SRI24 (its ``xfm``).
    lesion_mask, lesion_xfm
        Manual lesion mask, and the ITK transform from its space to that of the scan, if they differ.
        Optional.
    external_mask, external_xfm
        Brain mask on the grid of the scan and ITK transform from the scan to SRI24, of another pipeline.
    raw_file, from_raw
        With an image of another pipeline: the raw scan, and the ITK transform from it to that image.

    Outputs
    -------
    preproc
        Scan on the SRI24 grid, float32, the 99.5th percentile of the brain at 1 and 0 outside.
    brain_mask
        Brain mask on the SRI24 grid, within the field of view of the scan and where it has signal.
    own_mask
        Brain mask on the grid of the scan.
    brain
        Bias-corrected brain on the grid of the scan.
    xfm
        ITK text file: one rigid transform that resamples the scan to SRI24.
    native_mask
        Brain mask on the grid of the raw scan.
    to_sri24, from_sri24
        ITK text files, one rigid transform each, between the raw scan and SRI24.
    lesion
        Lesion mask on the SRI24 grid; undefined without ``lesion_mask``.
    qc
        Dictionary of :func:`bids_uad.preprocessing.quality.assess_quality`.
    in_templates
        Scan and brain mask in each of `templates`, with properties as of `preproc` and `brain_mask`;
        undefined without `templates`.

    Returns
    -------
    niworkflows.engine.workflows.LiterateWorkflow
        The workflow.

    Raises
    ------
    ValueError
        If the modality is unknown.
    """
    if modality not in MODALITIES:
        raise ValueError(f"modality must be {truncate_list(MODALITIES, last='or')}, not {modality!r}")
    workflow = LiterateWorkflow(name=name)
    inputnode = pe.Node(niu.IdentityInterface(fields=list(INPUTS)), name="inputnode")
    outputnode = pe.Node(niu.IdentityInterface(fields=list(OUTPUTS)), name="outputnode")
    conform = pe.Node(Conform(), name="conform", mem_gb=0.5)
    correct_bias = pe.Node(CorrectBias(corrected=external.image), name="correct_bias", mem_gb=1.0)
    resample = pe.Node(ResampleToSRI24(), name="resample", mem_gb=1.0)
    if templates:
        resample.inputs.spaces = list(templates)
    lesion = pe.Node(ResampleLesion(), name="lesion", mem_gb=0.5)
    assess = AssessQuality(reference_mask=str(reference.brain_mask), modality=modality)
    quality = pe.Node(assess, name="quality", mem_gb=1.0)
    if is_anchor:
        mask, register = _connect_anchor(workflow, correct_bias, modality, reference)
        mask.inputs.program = extraction.program
        if extraction.weights is not None:
            mask.inputs.weights = str(extraction.weights)
        workflow.connect(inputnode, "in_file", mask, "source")
    else:
        mask = register = _connect_to_anchor(workflow, inputnode, aligned=external.aligned)
        register.inputs.dark_fluid = modality == "FLAIR"
        workflow.connect([
            (inputnode, resample, [("anchor_mask", "brain_mask"), ("anchor_xfm", "brain_xfm")]),
        ])  # fmt: skip
    if external.mask and is_anchor:
        workflow.connect(inputnode, "external_mask", mask, "external_mask")
    if external.xfm:
        workflow.connect(inputnode, "external_xfm", register, "external_xfm")
    native = _connect_to_raw(workflow, inputnode, conform, mask, register) if external.image else None
    workflow.connect((native if native and lesion_on_raw else register), "to_sri24", lesion, "to_sri24")
    if skull_stripped is not None:
        mask.inputs.skull_stripped = skull_stripped
    workflow.connect([
        (inputnode, conform, [("in_file", "in_file")]),
        (inputnode, lesion, [("lesion_mask", "in_file"), ("lesion_xfm", "xfm")]),
        (conform, mask, [("out_file", "in_file")]),
        (conform, correct_bias, [("out_file", "in_file")]),
        (conform, resample, [("out_file", "conformed")]),
        (mask, correct_bias, [("out_mask", "mask")]),
        (correct_bias, resample, [("out_file", "in_file")]),
        (mask, resample, [("out_mask", "native_mask"), ("skull_stripped", "skull_stripped")]),
        (register, resample, [("to_sri24", "to_sri24")]),
        (inputnode, register, [("in_file", "source")]),
        (conform, quality, [("warnings", "header_warnings")]),
        (mask, quality, [("warnings", "mask_warnings"), ("origin", "mask_origin")]),
        (correct_bias, quality, [("out_file", "in_file")]),
        (register, quality, [("qc", "registration"), ("to_sri24", "to_sri24")]),
        (mask, quality, [("skull_stripped", "skull_stripped"), ("out_mask", "native_mask")]),
        (resample, quality, [("out_mask", "brain_mask"), ("coverage", "coverage"), ("unscored", "unscored")]),
        (lesion, quality, [("out_file", "lesion")]),
        (resample, outputnode, [
            ("out_file", "preproc"),
            ("out_mask", "brain_mask"),
            ("in_templates", "in_templates"),
        ]),
        (mask, outputnode, [("out_mask", "own_mask")]),
        (correct_bias, outputnode, [("out_brain", "brain")]),
        (register, outputnode, [("to_sri24", "xfm")]),
        (native or mask, outputnode, [("out_mask", "native_mask")]),
        (native or register, outputnode, [("to_sri24", "to_sri24"), ("from_sri24", "from_sri24")]),
        (lesion, outputnode, [("out_file", "lesion")]),
        (quality, outputnode, [("qc", "qc")]),
    ])  # fmt: skip
    return workflow


def init_lesion_wf(*, name: str) -> LiterateWorkflow:
    """Build the workflow of a lesion mask drawn on an image that is not preprocessed, such as a PDw.

    The image is registered to a preprocessed scan, and the mask is resampled once through both transforms.

    Workflow Graph
        .. workflow::
            :graph2use: orig
            :simple_form: yes

            from bids_uad.preprocessing.workflow import init_lesion_wf
            wf = init_lesion_wf(name="lesion_wf")

    Parameters
    ----------
    name : str
        Name of the workflow.

    Inputs
    ------
    in_file
        Image on which the mask was drawn.
    lesion_mask
        Lesion mask on its grid.
    anchor_file, anchor_mask, anchor_xfm
        As for :func:`init_preproc_wf`, of the preprocessed scan.

    Outputs
    -------
    lesion
        Lesion mask on the SRI24 grid.

    Returns
    -------
    niworkflows.engine.workflows.LiterateWorkflow
        The workflow.
    """
    workflow = LiterateWorkflow(name=name)
    fields = ["in_file", "lesion_mask", "anchor_file", "anchor_mask", "anchor_xfm"]
    inputnode = pe.Node(niu.IdentityInterface(fields=fields), name="inputnode")
    outputnode = pe.Node(niu.IdentityInterface(fields=["lesion"]), name="outputnode")
    conform = pe.Node(Conform(), name="conform", mem_gb=0.5)
    register = _connect_to_anchor(workflow, inputnode, aligned=False)
    register.inputs.measure_agreement = False
    lesion = pe.Node(ResampleLesion(), name="lesion", mem_gb=0.5)
    workflow.connect([
        (inputnode, conform, [("in_file", "in_file")]),
        (conform, register, [("out_file", "in_file")]),
        (register, lesion, [("to_sri24", "to_sri24")]),
        (inputnode, lesion, [("lesion_mask", "in_file")]),
        (lesion, outputnode, [("out_file", "lesion")]),
    ])  # fmt: skip
    return workflow


def _connect_anchor(
    workflow: LiterateWorkflow,
    correct_bias: pe.Node,
    modality: str,
    reference: Reference,
) -> tuple[pe.Node, pe.Node]:
    target = _registration_target(modality, reference)
    mask = pe.Node(
        BrainMask(template=str(target), template_mask=str(reference.brain_mask)),
        name="brain_mask",
        mem_gb=1.5,
    )
    register = pe.Node(
        RegisterToReference(
            reference=str(target),
            reference_mask=str(reference.brain_mask),
            # The stand-in is the symmetric ICBM152, which has no left-right asymmetry.
            asymmetric=not reference.metadata.get("StandIn", False),
            dark_fluid=modality == "FLAIR",
        ),
        name="register",
        mem_gb=0.7,
    )
    workflow.connect([
        (correct_bias, register, [("out_brain", "in_file")]),
        (mask, register, [("out_mask", "mask")]),
    ])  # fmt: skip
    return mask, register


def _connect_to_raw(
    workflow: LiterateWorkflow, inputnode: pe.Node, conform: pe.Node, mask: pe.Node, register: pe.Node
) -> pe.Node:
    native = pe.Node(RegisterRaw(), name="native", mem_gb=0.7)
    workflow.connect([
        (inputnode, native, [("raw_file", "raw"), ("from_raw", "from_raw")]),
        (conform, native, [("out_file", "in_file")]),
        (mask, native, [("out_mask", "mask")]),
        (register, native, [("to_sri24", "to_sri24")]),
    ])  # fmt: skip
    return native


def _connect_to_anchor(workflow: LiterateWorkflow, inputnode: pe.Node, *, aligned: bool) -> pe.Node:
    register = pe.Node(RegisterToAnchor(aligned=aligned), name="register", mem_gb=1.0)
    workflow.connect([
        (inputnode, register, [
            ("anchor_file", "anchor"),
            ("anchor_mask", "anchor_mask"),
            ("anchor_xfm", "anchor_xfm"),
        ]),
    ])  # fmt: skip
    return register


def _registration_target(modality: str, reference: Reference) -> Path:
    return reference.t2w if modality == "T2w" and reference.t2w is not None else reference.t1w
