"""Nipype interfaces of the participant level: data sink, detection, postprocessing, quality, completion."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
from nipype.interfaces.base import (
    BaseInterfaceInputSpec,
    File,
    SimpleInterface,
    TraitedSpec,
    isdefined,
    traits,
)

from bids_uad.calibration.normative import NormativeReference
from bids_uad.dataset.naming import ENTITIES, PATTERNS
from bids_uad.dataset.sidecars import QUALITY_COLUMNS
from bids_uad.engine.bundle import NORMATIVE_FILE, Bundle, load_bundle
from bids_uad.errors import InputError, ModelError, UserError
from bids_uad.files import atomic_path, read_row, write_json, write_text, write_tsv
from bids_uad.images import load_image, make_image, save_image
from bids_uad.levels.participant.completion_records import (
    CompletionRecord,
    ModelRecord,
    add_measured_methods,
    write_record,
)
from bids_uad.levels.participant.postprocess import detect_anomalies, look_up_tables
from bids_uad.preprocessing.check import read_lesion
from bids_uad.preprocessing.resampling import map_to_native, read_itk, resample, write_itk
from bids_uad.resources import NoAnswerError, RequestProcess, describe_exit
from bids_uad.space import AFFINE, MNI_CODE, SHAPE, OutputSpace, icbm_to_sri24, output_spaces, to_image

_EMPTY_ARCHIVE = Path(__file__).parents[2] / "data" / "templateflow"
_EXCLUSION = ("exclude", "exclude_reasons", "exclude_dependents")
"""Columns of the quality table that users may edit."""


def sidecar_of(path: Path) -> Path:
    """Return the path of an output's JSON sidecar."""
    return path.with_name(path.name.split(".", 1)[0] + ".json")


def with_sidecars(files: Iterable[Path]) -> list[str]:
    """Return the sorted paths of files and their sidecars, in POSIX form."""
    return sorted({path.as_posix() for file in files for path in (file, sidecar_of(file))})


def read_sri24(path: str | Path) -> np.ndarray:
    """Read an image on the SRI24 grid.

    Parameters
    ----------
    path : path-like
        NIfTI file.

    Returns
    -------
    numpy.ndarray
        Voxels, shape `space.SHAPE`.

    Raises
    ------
    ValueError
        If the image is on another grid.
    """
    image = load_image(path)
    if image.shape != SHAPE or not np.allclose(image.affine, AFFINE, atol=1e-3):
        raise ValueError(f"{path} is not on the SRI24 grid")
    return np.asanyarray(image.dataobj)


def _import_sink() -> type:
    """Import niworkflows' sink with an empty TemplateFlow archive, so that the user's is not indexed."""
    variable = "TEMPLATEFLOW_HOME"
    previous = os.environ.get(variable)
    os.environ[variable] = str(_EMPTY_ARCHIVE)
    try:
        from niworkflows.interfaces.bids import DerivativesDataSink
    finally:
        if previous is None:
            del os.environ[variable]
        else:
            os.environ[variable] = previous
    return DerivativesDataSink


_NiworkflowsSink = _import_sink()


class DerivativesDataSink(_NiworkflowsSink):
    """niworkflows' data sink with the entities of bids_uad, no subfolder, and atomic writing.

    SRI24 is not among the standard spaces, so that headers do not depend on whether the user's TemplateFlow
    archive contains `tpl-SRI24`. Each sink takes one file. niworkflows determines its path and sidecar from
    an empty placeholder, and the file is copied unchanged, since niworkflows would compress an image again.
    Pass `compress=True` for images: inside a workflow the inherited default is lost.
    """

    out_path_base = ""
    _config_entities = frozenset(entity["name"] for entity in ENTITIES)
    _config_entities_dict = ENTITIES
    _standard_spaces = frozenset()
    _file_patterns = PATTERNS

    def _run_interface(self, runtime):
        target, (file,) = Path(self.inputs.base_directory).absolute(), self.inputs.in_file
        # The sink removes a file before it writes it: not in the dataset, where it may be read.
        with TemporaryDirectory(dir=runtime.cwd) as staging:
            placeholder = Path(staging) / Path(file).name
            placeholder.touch()
            self.inputs.base_directory, self.inputs.in_file = staging, [str(placeholder)]
            try:
                runtime = super()._run_interface(runtime)
            finally:
                self.inputs.base_directory, self.inputs.in_file = str(target), [file]
            self._results["out_file"] = _publish(file, self._results["out_file"][0], staging, target)
            if "out_meta" in self._results:
                staged = self._results["out_meta"]
                self._results["out_meta"] = _publish(staged, staged, staging, target)
        return runtime


def _publish(file: str, staged: str, staging: str, target: Path) -> str:
    """Copy a file to the dataset, to the relative path that it has in the staging folder; return its path."""
    final = target / Path(staged).relative_to(staging)
    with atomic_path(final) as temporary:
        shutil.copyfile(file, temporary)
    return str(final)


class _DetectInputSpec(BaseInterfaceInputSpec):
    image = File(exists=True, mandatory=True, desc="preprocessed image, SRI24")
    brain = File(exists=True, mandatory=True, desc="brain mask, SRI24")
    key = traits.Str(mandatory=True, desc="name of the image, for the random number streams")
    seed = traits.Int(0, usedefault=True, desc="random seed")
    bundle = traits.Str(mandatory=True, desc="model bundle folder")
    sha256 = traits.Str(mandatory=True, desc="checksum of the bundle, so that a new model is a new input")
    # Device and threads are not hashed: an interrupted run may continue on other hardware.
    device = traits.Str("cpu", usedefault=True, nohash=True, desc="torch device")
    precision = traits.Enum("fp32", "bf16", usedefault=True, desc="arithmetic of the networks")
    batch_size = traits.Int(0, usedefault=True, nohash=True, desc="slices per batch; 0: as memory allows")
    compiled = traits.Bool(False, usedefault=True, nohash=True, desc="compile the networks")
    use_cuda = traits.Bool(False, usedefault=True, nohash=True, desc="occupy a GPU slot of the scheduler")
    threads = traits.Int(1, usedefault=True, nohash=True, desc="CPU threads")


class _DetectOutputSpec(TraitedSpec):
    out_file = File(exists=True, desc="anomaly map")


DETECTION = RequestProcess("bids_uad.engine.inference")
"""Detection process of this worker, started with its first image."""


class Detect(SimpleInterface):
    """Score one image with one detector, in a process that PyTorch and the detectors stay loaded in.

    An error or the end of that process concerns this detector only.
    """

    input_spec = _DetectInputSpec
    output_spec = _DetectOutputSpec
    keeps_process = True
    """The plugin gives such nodes to the workers that have run one before."""

    def _run_interface(self, runtime):
        inputs = self.inputs
        target = Path(runtime.cwd) / f"{Path(inputs.bundle).name}_map.nii"
        fields = ("image", "brain", "key", "seed", "bundle", "sha256", "device", "precision")
        request = {name: getattr(inputs, name) for name in (*fields, "compiled", "threads")}
        request |= {"batch_size": inputs.batch_size or None, "output": str(target)}
        threads = str(inputs.threads)
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        try:
            DETECTION.ask(request, environment)
        except UserError as error:
            raise ModelError(str(error)) from error
        except NoAnswerError as error:
            cause = describe_failure(error.returncode, error.stderr, error.oom_kills_before)
            raise RuntimeError(f"detection failed: {cause}") from error
        self._results["out_file"] = str(target)
        return runtime


def describe_failure(returncode: int | None, stderr: str, oom_kills_before: int) -> str:
    """Describe in one line why scoring has failed.

    Parameters
    ----------
    returncode : int or None
        Exit code of the detection process, negative for a signal; None if it has reported an error.
    stderr : str
        Its standard error, or the traceback of the error.
    oom_kills_before : int
        Number of processes killed for memory before the request, see :func:`bids_uad.resources.oom_kills`.

    Returns
    -------
    str
        Cause, and remedy if memory ran out.
    """
    if returncode is not None and returncode < 0:
        return f"the process {describe_exit(returncode, oom_kills_before)}"
    lines = [line for line in stderr.strip().splitlines() if line.strip()]
    last = lines[-1].strip() if lines else "no error message"
    if "out of memory" in stderr.lower():
        return f"out of memory ({last}); free the GPU or use --device cpu"
    return last if returncode is None else f"{last} (exit code {returncode})"


class _PostprocessInputSpec(BaseInterfaceInputSpec):
    score_map = File(exists=True, mandatory=True, desc="anomaly map, SRI24")
    brain_mask = File(exists=True, mandatory=True, desc="brain mask, SRI24")
    lesion = File(exists=True, desc="ground truth, SRI24")
    image = File(exists=True, desc="preprocessed image, SRI24; required with ground truth")
    native_ref = File(exists=True, mandatory=True, desc="brain mask on the grid of the raw image")
    from_sri24 = File(exists=True, mandatory=True, desc="transform from SRI24 to the raw image, ITK text")
    bundle = traits.Str(mandatory=True, desc="model bundle folder")
    deviation = traits.Enum("none", "normative", usedefault=True, desc="scores, or normative deviations")
    covariates = traits.Dict(desc="age and sex of the participant, None if unknown")
    provenance = traits.Dict(
        mandatory=True, desc="first columns of the metrics table: image, model, threshold"
    )
    min_component_volume = traits.Either(
        None, traits.Float, usedefault=True, desc="minimum volume of components, mm3; None: the model's"
    )
    min_lesion_volume = traits.Float(mandatory=True, desc="minimum volume of counted lesions, mm3")
    files = traits.Dict(mandatory=True, desc="path of each output, by kind")
    sidecars = traits.Dict(mandatory=True, desc="metadata of each output, by kind")
    parcellations = traits.Dict(desc="label image of each atlas parcellation, by name")
    spaces = traits.List(traits.Str, desc="further spaces of the outputs, see --output-spaces")


class _PostprocessOutputSpec(TraitedSpec):
    out_files = traits.List(File(exists=True), desc="all files written")


class Postprocess(SimpleInterface):
    """Write the images and tables that are derived from one anomaly map.

    Runs every time, since its outputs may have been removed from the dataset.
    """

    input_spec = _PostprocessInputSpec
    output_spec = _PostprocessOutputSpec
    _always_run = True

    def _run_interface(self, runtime):
        bundle = load_bundle(self.inputs.bundle).with_deviation(self.inputs.deviation)
        bundle = replace(bundle, min_component_volume=self.inputs.min_component_volume)
        brain = read_sri24(self.inputs.brain_mask) > 0
        scores = self._scores(bundle, brain)
        has_lesion = isdefined(self.inputs.lesion)
        detection = detect_anomalies(
            scores,
            brain,
            read_sri24(self.inputs.lesion) > 0 if has_lesion else None,
            read_sri24(self.inputs.image) if has_lesion else None,
            rule=bundle.rule,
            edges=bundle.bin_edges,
            provenance=self.inputs.provenance,
            min_lesion_volume=self.inputs.min_lesion_volume,
            parcellations={
                name: _parcellation(path) for name, path in (self.inputs.parcellations or {}).items()
            },
        )
        files = {kind: Path(path) for kind, path in self.inputs.files.items()}
        for kind, path in files.items():
            write_json(sidecar_of(path), self.inputs.sidecars[kind])
        save_image(to_image(scores, np.float32), files["anomalymap"])
        save_image(to_image(detection.probseg, np.float32), files["probseg"])
        save_image(to_image(detection.mask, np.uint8), files["mask"])
        save_image(to_image(detection.components, np.int32), files["dseg"])
        native, from_sri24 = nib.load(self.inputs.native_ref), read_itk(self.inputs.from_sri24)
        native_mask = map_to_native(detection.mask, native, from_sri24)
        for kind in {"native_mask", "roi"} & files.keys():
            save_image(native_mask, files[kind])
        volumes = {"anomalymap": scores, "mask": detection.mask, "dseg": detection.components}
        for space in output_spaces(self.inputs.spaces if isdefined(self.inputs.spaces) else ()):
            _write_in_space(space, volumes, files, native, from_sri24)
        write_tsv(files["components"], detection.component_table)
        for program, text in look_up_tables(detection.component_table).items():
            write_text(files[program], text)
        write_tsv(files["histogram"], detection.histogram)
        write_tsv(files["metrics"], detection.metrics)
        if detection.lesions is not None:
            write_tsv(files["lesions"], detection.lesions)
        self._results["out_files"] = with_sidecars(files.values())
        return runtime

    def _scores(self, bundle: Bundle, brain: np.ndarray) -> np.ndarray:
        """Read the anomaly map, 0 outside the brain; return scores or their normative deviations."""
        scores = np.where(brain, read_sri24(self.inputs.score_map).astype(np.float32), np.float32(0))
        if bundle.deviation != "none":
            reference = NormativeReference.read(bundle.folder / NORMATIVE_FILE, bundle.normative["reference"])
            scores = reference.deviations(scores, brain, **self.inputs.covariates)
        if not np.isfinite(scores).all():
            raise ModelError(
                f"{bundle.scored_as}: NaN or infinite scores for {self.inputs.provenance['source_image']}; "
                "train and calibrate the model again"
            )
        return scores


def _write_in_space(
    space: OutputSpace,
    volumes: Mapping[str, np.ndarray],
    files: Mapping[str, Path],
    native: nib.Nifti1Image,
    from_sri24: np.ndarray,
) -> None:
    """Resample map, mask and components once to another space, and write those among `files`."""
    if space.is_template:
        shape, affine = space.grid
        pull, code = icbm_to_sri24(), MNI_CODE
    else:
        shape, affine = native.shape, native.affine
        pull, code = from_sri24, 1
    for kind, dtype in (("anomalymap", np.float32), ("mask", np.uint8), ("dseg", np.int32)):
        if space.kind(kind) in files:
            order = 1 if kind == "anomalymap" else 0
            values = resample(volumes[kind], AFFINE, shape, affine, pull, order=order)
            save_image(make_image(values, affine, dtype, code=code), files[space.kind(kind)])


def _parcellation(path: str) -> tuple[np.ndarray, dict[int, str]]:
    """Read an atlas label image and the region names from the table beside it."""
    names = pd.read_csv(path.replace(".nii.gz", ".tsv"), sep="\t").set_index("index")["name"]
    return read_sri24(path), names.to_dict()


class _WriteInTemplatesInputSpec(BaseInterfaceInputSpec):
    in_files = traits.List(File(exists=True), mandatory=True, desc="scan and brain mask in each space")
    to_sri24 = File(exists=True, mandatory=True, desc="ITK transform from the raw image to SRI24")
    files = traits.Dict(mandatory=True, desc="path of each output, by kind, images first")
    sidecars = traits.Dict(mandatory=True, desc="metadata of the images, by kind")


class _WriteInTemplatesOutputSpec(TraitedSpec):
    out_files = traits.List(File(exists=True), desc="all files written, without sidecars")


class WriteInTemplates(SimpleInterface):
    """Write scan and brain mask in the spaces of templates, and the transforms to and from the template.

    Runs every time, since its outputs may have been removed from the dataset.
    """

    input_spec = _WriteInTemplatesInputSpec
    output_spec = _WriteInTemplatesOutputSpec
    _always_run = True

    def _run_interface(self, runtime):
        files = {kind: Path(path) for kind, path in self.inputs.files.items()}
        transforms = files.pop("to_template"), files.pop("from_template")
        for source, (kind, path) in zip(self.inputs.in_files, files.items(), strict=True):
            with atomic_path(path) as temporary:
                shutil.copyfile(source, temporary)
            write_json(sidecar_of(path), self.inputs.sidecars[kind])
        pull = read_itk(self.inputs.to_sri24) @ icbm_to_sri24()
        for path, matrix in zip(transforms, (pull, np.linalg.inv(pull)), strict=True):
            write_itk(path, matrix)
        self._results["out_files"] = [str(path) for path in (*files.values(), *transforms)]
        return runtime


class _AlignMaskInputSpec(BaseInterfaceInputSpec):
    in_file = File(mandatory=True, desc="mask in SRI24 space, any voxel order")


class _AlignMaskOutputSpec(TraitedSpec):
    out_file = File(exists=True, desc="binary mask on the SRI24 grid")


class AlignMask(SimpleInterface):
    """Reorder the voxels of a mask in SRI24 space to those of the SRI24 grid, without resampling."""

    input_spec = _AlignMaskInputSpec
    output_spec = _AlignMaskOutputSpec

    def _run_interface(self, runtime):
        lesion, affine = read_lesion(self.inputs.in_file)
        order = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.io_orientation(AFFINE))
        target = Path(runtime.cwd) / "lesion.nii.gz"
        save_image(to_image(nib.orientations.apply_orientation(lesion, order), np.uint8), target)
        self._results["out_file"] = str(target)
        return runtime


class _AddQualityInputSpec(BaseInterfaceInputSpec):
    metadata = traits.Dict(mandatory=True, desc="metadata of the preprocessed image")
    quality = traits.Dict(mandatory=True, desc="quality measures of preprocessing")


class _AddQualityOutputSpec(TraitedSpec):
    metadata = traits.Dict(desc="metadata with the quality measures")


class AddQuality(SimpleInterface):
    """Add the quality measures of preprocessing to the metadata of the preprocessed image."""

    input_spec = _AddQualityInputSpec
    output_spec = _AddQualityOutputSpec

    def _run_interface(self, runtime):
        self._results["metadata"] = {
            **self.inputs.metadata,
            "PreprocessingQuality": dict(self.inputs.quality),
        }
        return runtime


class _WriteQualityInputSpec(BaseInterfaceInputSpec):
    quality = traits.Dict(mandatory=True, desc="quality measures of preprocessing")
    provenance = traits.Dict(mandatory=True, desc="source_image, modality and depends_on")
    sidecar = traits.Dict(mandatory=True, desc="metadata of the table")
    target = traits.Str(mandatory=True, desc="path of the table")


class _WriteQualityOutputSpec(TraitedSpec):
    out_file = File(exists=True, desc="quality table")


class WriteQuality(SimpleInterface):
    """Write the quality table of an image.

    Runs every time, since the table may have been removed from the dataset. The exclusion of an existing
    table is kept, since users may have edited it; tables of changed inputs are removed before the run.
    """

    input_spec = _WriteQualityInputSpec
    output_spec = _WriteQualityOutputSpec
    _always_run = True

    def _run_interface(self, runtime):
        target = Path(self.inputs.target)
        write_json(sidecar_of(target), self.inputs.sidecar)
        table = quality_table(self.inputs.quality, self.inputs.provenance)
        for column, value in _read_exclusion(target).items():
            table[column] = value
        write_tsv(target, table)
        self._results["out_file"] = str(target)
        return runtime


def _read_exclusion(path: Path) -> dict[str, str]:
    """Read the exclusion columns of a quality table; empty if there is no readable table."""
    try:
        row = read_row(path, _EXCLUSION)
    except InputError:
        return {}
    return row if row["exclude"].strip().lower() in ("yes", "no") else {}


def quality_table(quality: Mapping[str, Any], provenance: Mapping[str, str]) -> pd.DataFrame:
    """Return the quality table of an image.

    Parameters
    ----------
    quality : mapping
        Measures of :func:`bids_uad.preprocessing.quality.assess`.
    provenance : mapping
        `source_image`, `modality` and `depends_on`.

    Returns
    -------
    pandas.DataFrame
        One row with the columns of :data:`bids_uad.dataset.sidecars.QUALITY_COLUMNS`. Images with failures
        are excluded.
    """
    failures = quality.get("failures", [])
    excluded = "yes" if failures else "no"
    # Failures concern brain mask, registration or orientation, and so affect dependent images, too.
    exclusion = dict(zip(_EXCLUSION, (excluded, " ".join(failures) or None, excluded), strict=True))
    row = {**quality, **provenance, **exclusion}
    return pd.DataFrame([{name: row.get(name) for name in QUALITY_COLUMNS}])


class _CompleteInputSpec(BaseInterfaceInputSpec):
    files = traits.List(File(exists=True), mandatory=True, desc="outputs of preprocessing")
    after = traits.List(File(exists=True), desc="outputs of the recorded model, written before")
    requested = traits.List(traits.Str, mandatory=True, desc="models without which the run is not complete")
    output_dir = traits.Str(mandatory=True, desc="derivative dataset")
    record_file = traits.Str(mandatory=True, desc="path of the completion record (JSON)")
    record = traits.Dict(mandatory=True, nohash=True, desc="completion record, without `outputs`")
    quality = traits.Dict(mandatory=True, desc="quality measures of preprocessing")


class _CompleteOutputSpec(TraitedSpec):
    out_file = File(exists=True, desc="completion record")


class Complete(SimpleInterface):
    """Write the completion record of an image, or add models to it, after their outputs."""

    input_spec = _CompleteInputSpec
    output_spec = _CompleteOutputSpec
    _always_run = True

    def _run_interface(self, runtime):
        root = Path(self.inputs.output_dir)
        content = dict(self.inputs.record)
        models = {name: ModelRecord(**model) for name, model in content.pop("models").items()}
        record = CompletionRecord(**content, models=models)
        written = [Path(path).relative_to(root) for path in self.inputs.files]
        present = [name for name in with_sidecars(written) if (root / name).is_file()]
        methods = add_measured_methods(record.methods, self.inputs.quality)
        record = replace(record, outputs=present, methods=methods)
        path = write_record(Path(self.inputs.record_file), root, record, self.inputs.requested)
        self._results["out_file"] = str(path)
        return runtime
