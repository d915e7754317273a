"""Stand-ins for preprocessing and detection that take a second; importable by worker processes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path

import nibabel as nib
import numpy as np
from nipype.interfaces.base import (
    BaseInterfaceInputSpec,
    File,
    SimpleInterface,
    TraitedSpec,
    isdefined,
    traits,
)
from nipype.interfaces.utility import IdentityInterface
from nipype.pipeline.engine import Node
from niworkflows.engine.workflows import LiterateWorkflow

from bids_uad import space
from bids_uad.calibration.normative import (
    GRID,
    TERMS,
    HealthyCohort,
    NormativeReference,
)
from bids_uad.engine.bundle import CORRECTED
from bids_uad.errors import InputError
from bids_uad.files import atomic_path
from bids_uad.images import make_image, open_nifti, save_image
from bids_uad.preprocessing.reference import Reference
from bids_uad.preprocessing.resampling import read_itk, write_itk
from bids_uad.preprocessing.workflow import INPUTS, OUTPUTS

THRESHOLD = 0.5
BRAIN = (slice(100, 130), slice(100, 130), slice(60, 90))
"""Voxels of the brain on the SRI24 grid."""
HUNGER = 3 << 30
"""Memory in bytes that the participant `hungry` requests."""


def note(folder: str, line: str) -> None:
    """Add a line to calls.txt beside the working folder, which is named `work`."""
    work = next(parent for parent in Path(folder).parents if parent.name == "work")
    with (work.parent / "calls.txt").open("a") as calls:
        calls.write(f"{line}\n")


class _FakePreprocInputSpec(BaseInterfaceInputSpec):
    # As in preprocessing: what users give may vanish, what the anchor's workflow gives does not.
    in_file = File(mandatory=True)
    anchor_file = File(exists=True)
    anchor_mask = File(exists=True)
    anchor_xfm = File(exists=True)
    lesion_mask = File()
    lesion_xfm = File()
    external_mask = File()
    external_xfm = File()
    raw_file = File()
    from_raw = File()
    templates = traits.List(traits.Str)


class _FakePreprocOutputSpec(TraitedSpec):
    preproc = File(exists=True)
    brain_mask = File(exists=True)
    own_mask = File(exists=True)
    native_mask = File(exists=True)
    brain = File(exists=True)
    xfm = File(exists=True)
    to_sri24 = File(exists=True)
    from_sri24 = File(exists=True)
    lesion = File(exists=True)
    qc = traits.Dict()
    in_templates = traits.List(File(exists=True))


class FakePreproc(SimpleInterface):
    """Write plausible files; fail for participants named crash, killed, hungry and refused."""

    input_spec = _FakePreprocInputSpec
    output_spec = _FakePreprocOutputSpec

    def _run_interface(self, runtime):
        name = Path(self.inputs.in_file).name
        if name.startswith("sub-crash"):
            raise ZeroDivisionError("nothing to divide by")
        if name.startswith("sub-refused"):
            raise InputError(self.inputs.in_file, "no brain was found", "give a brain mask")
        if name.startswith("sub-killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        if name.startswith("sub-hungry"):
            b"a" * HUNGER
        folder = Path(runtime.cwd)
        native = open_nifti(self.inputs.in_file)
        for given in (self.inputs.external_mask, self.inputs.lesion_mask):
            if isdefined(given):
                open_nifti(given)
        if isdefined(self.inputs.external_xfm):
            read_itk(self.inputs.external_xfm)
        mask = make_image(np.ones(native.shape[:3]), native.affine, np.uint8)
        nib.save(mask, folder / "native_mask.nii.gz")
        nib.save(native, folder / "brain.nii.gz")
        brain, image = np.zeros(space.SHAPE, np.uint8), np.zeros(space.SHAPE, np.float32)
        brain[BRAIN] = 1
        save_image(space.to_image(brain, np.uint8), folder / "brain_mask.nii.gz")
        image[BRAIN] = np.random.default_rng(0).random(image[BRAIN].shape)
        save_image(space.to_image(image), folder / "preproc.nii.gz")
        for transform in ("to_sri24", "from_sri24"):
            write_itk(folder / f"{transform}.txt", np.eye(4))
            self._results[transform] = str(folder / f"{transform}.txt")
        for output in ("native_mask", "brain", "brain_mask", "preproc"):
            self._results[output] = str(folder / f"{output}.nii.gz")
        self._results |= {"own_mask": self._results["native_mask"], "xfm": self._results["to_sri24"]}
        if isdefined(self.inputs.lesion_mask):
            lesion = np.zeros(space.SHAPE, np.uint8)
            lesion[110:115, 110:115, 70:75] = 1
            nib.save(space.to_image(lesion, np.uint8), folder / "lesion.nii.gz")
            self._results["lesion"] = str(folder / "lesion.nii.gz")
        if self.inputs.templates:
            self._results["in_templates"] = []
            for template in space.output_spaces(self.inputs.templates):
                shape, affine = template.grid
                for kind, dtype in (("preproc", np.float32), ("brain_mask", np.uint8)):
                    path = folder / f"{template.kind(kind)}.nii.gz"
                    save_image(make_image(np.ones(shape), affine, dtype, code=4), path)
                    self._results["in_templates"].append(str(path))
        self._results["qc"] = {"warnings": [f"look at {name}"], "skull_stripped": True}
        note(runtime.cwd, f"preproc {name}")
        return runtime


def init_fake_preproc_wf(
    *,
    name,
    modality,
    is_anchor,
    skull_stripped,
    omp_nthreads,
    reference,
    external,
    lesion_on_raw,
    extraction,
    templates,
):
    """Replacement of `preprocessing.workflow.init_preproc_wf` with the same parameters."""
    workflow = LiterateWorkflow(name=name)
    inputnode = Node(IdentityInterface(fields=list(INPUTS)), name="inputnode")
    outputnode = Node(IdentityInterface(fields=list(OUTPUTS)), name="outputnode")
    work = Node(FakePreproc(templates=list(templates)), name="work")
    connected = INPUTS if not is_anchor else [field for field in INPUTS if not field.startswith("anchor_")]
    workflow.connect([(inputnode, work, [(field, field) for field in connected])])
    workflow.connect([(work, outputnode, [(field, field) for field in OUTPUTS])])
    return workflow


class _FakeDetectInputSpec(BaseInterfaceInputSpec):
    image = File(exists=True, mandatory=True)
    brain = File(exists=True, mandatory=True)
    key = traits.Str(mandatory=True)
    seed = traits.Int()
    bundle = traits.Str()
    sha256 = traits.Str()
    device = traits.Str(nohash=True)
    precision = traits.Str()
    batch_size = traits.Int(nohash=True)
    compiled = traits.Bool(nohash=True)
    use_cuda = traits.Bool(nohash=True)
    threads = traits.Int(nohash=True)


class _FakeDetectOutputSpec(TraitedSpec):
    out_file = File(exists=True)


class FakeDetect(SimpleInterface):
    """Score two cubes, one of which overlaps the fake lesion."""

    input_spec = _FakeDetectInputSpec
    output_spec = _FakeDetectOutputSpec

    def _run_interface(self, runtime):
        scores = np.zeros(space.SHAPE, np.float32)
        scores[110:115, 110:115, 70:80] = 0.75
        scores[120:122, 120:122, 80:82] = 1.5
        scores[0:10, 0:10, 0:10] = 9.0  # outside the brain
        name = Path(self.inputs.bundle).name
        self._results["out_file"] = str(save_image(space.to_image(scores), Path(runtime.cwd) / f"{name}.nii"))
        note(runtime.cwd, f"detect {self.inputs.key} {name}")
        return runtime


def write_page(output_dir, subject, participants, viewer):
    """Stand in for `summary.write_report`."""
    (output_dir / f"sub-{subject}.html").write_text("report")
    return []


def refuse_page(output_dir, subject, participants, viewer):
    """Stand in for `summary.write_report`; fail."""
    raise ValueError("no template")


def fake_reference(folder: Path) -> Reference:
    """Write reference images on the SRI24 grid, unless another job of the test has done so."""
    folder.mkdir(parents=True, exist_ok=True)
    brain = np.zeros(space.SHAPE, np.uint8)
    brain[BRAIN] = 1
    for name, dtype in (("T1w", np.float32), ("mask", np.uint8)):
        if not (folder / f"{name}.nii.gz").is_file():
            with atomic_path(folder / f"{name}.nii.gz") as temporary:
                nib.save(space.to_image(brain, dtype), temporary)
    return Reference(
        t1w=folder / "T1w.nii.gz",
        t2w=None,
        brain_mask=folder / "mask.nii.gz",
        name="phantom",
        source="tests",
        licence="CC0",
        sha256="0" * 64,
        metadata={"Name": "phantom", "License": "CC0", "SHA256": "0" * 64, "StandIn": True},
    )


def fake_bundle(folder: Path, detector: str, modality: str, threshold: float = THRESHOLD) -> Path:
    """Write a bundle that passes every check but holds no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights.safetensors").write_bytes(folder.name.encode())
    info = {
        "detector": detector,
        "preset": "lite",
        "modality": modality,
        "hyper": {},
        "input": CORRECTED.input_contract,
        "code_version": "0.1.0",
        "sha256": {"weights.safetensors": hashlib.sha256(folder.name.encode()).hexdigest()},
    }
    (folder / "bundle.json").write_text(json.dumps(info))
    calibration = {
        "thresholds": {"max_dice": threshold},
        "default_threshold": "max_dice",
        "bin_edges": [0.0, 0.25, threshold, 1.25],
    }
    (folder / "calibration.json").write_text(json.dumps(calibration))
    return folder


def add_reference(bundle: Path) -> None:
    """Add a normative reference: scores 0.25 + 0.01 (age - 50), standard deviation 0.1, at every voxel."""
    coefficients = np.zeros((len(TERMS), *GRID), np.float32)
    coefficients[0], coefficients[1] = 0.25, 0.1
    cohort = HealthyCohort(age_mean=50.0, age_range=(30.0, 60.0), sex_mean=0.0)
    flat = np.zeros(GRID, np.float32)
    reference = NormativeReference(cohort, coefficients, flat + np.float32(0.1), flat)
    reference.write(bundle / "normative.nii.gz")
    calibration = json.loads((bundle / "calibration.json").read_text())
    calibration["normative"] = {
        "thresholds": {"max_dice": 4.0},
        "default_threshold": "max_dice",
        "bin_edges": [0.0, 2.0, 4.0, 10.0],
        "reference": reference.describe(),
        "n_healthy_subjects": 40,
        "sha256": hashlib.sha256((bundle / "normative.nii.gz").read_bytes()).hexdigest(),
    }
    (bundle / "calibration.json").write_text(json.dumps(calibration))
