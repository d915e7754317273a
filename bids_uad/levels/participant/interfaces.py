"""The data sink: from a node's working folder into the derivative dataset, whole or not at all."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from nipype.interfaces.base import (
    BaseInterfaceInputSpec,
    File,
    SimpleInterface,
    TraitedSpec,
    isdefined,
    traits,
)

from bids_uad.dataset.naming import ENTITIES, PATTERNS
from bids_uad.dataset.sidecars import QUALITY_COLUMNS
from bids_uad.errors import InputError, ModelError
from bids_uad.files import atomic_path, read_row, write_json, write_tsv
from bids_uad.resources import oom_kills, why_killed

if TYPE_CHECKING:
    import numpy as np

_EMPTY_ARCHIVE = Path(__file__).parents[2] / "data" / "templateflow"


def _import_sink() -> type:
    """Import niworkflows' sink without letting it index, or write, a TemplateFlow archive."""
    variable = "TEMPLATEFLOW_HOME"
    users = os.environ.get(variable)
    os.environ[variable] = str(_EMPTY_ARCHIVE)
    try:
        from niworkflows.interfaces.bids import DerivativesDataSink
    finally:
        if users is None:
            del os.environ[variable]
        else:
            os.environ[variable] = users
    return DerivativesDataSink


_NiworkflowsSink = _import_sink()


class DerivativesDataSink(_NiworkflowsSink):
    """niworkflows' data sink with bids_uad's names, no folder of its own, and atomic writing.

    SRI24 is kept out of the standard spaces: whether a machine's TemplateFlow archive happens to hold
    `tpl-SRI24` must not change the headers. Always pass `compress=True` for images: inside a workflow the
    inherited default is lost and the image would be written uncompressed.
    """

    out_path_base = ""
    _config_entities = frozenset(entity["name"] for entity in ENTITIES)
    _config_entities_dict = ENTITIES
    _standard_spaces = frozenset()
    _file_patterns = PATTERNS

    def _run_interface(self, runtime):
        target = Path(self.inputs.base_directory).absolute()
        staging = Path(runtime.cwd) / "staging"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        # The sink unlinks and then writes; it may do so in a folder that nobody reads.
        self.inputs.base_directory = str(staging)
        try:
            runtime = super()._run_interface(runtime)
        finally:
            self.inputs.base_directory = str(target)
        for field in ("out_file", "out_meta"):
            if field in self._results:
                self._results[field] = _publish(self._results[field], staging, target)
        shutil.rmtree(staging)
        return runtime


def sidecar_of(path: Path) -> Path:
    """Give the JSON file that belongs to an output."""
    return path.with_name(path.name.split(".", 1)[0] + ".json")


def _publish(staged: str | list[str], staging: Path, target: Path) -> str | list[str]:
    """Copy staged files to their places in the dataset; one stays one, a list a list."""
    if isinstance(staged, list):
        return [str(_publish(file, staging, target)) for file in staged]
    final = target / Path(staged).relative_to(staging)
    with atomic_path(final) as temporary:
        shutil.copyfile(staged, temporary)
    return str(final)


class _DetectInputSpec(BaseInterfaceInputSpec):
    image = File(exists=True, mandatory=True, desc="preprocessed image, SRI24")
    brain = File(exists=True, mandatory=True, desc="its brain mask")
    key = traits.Str(mandatory=True, desc="name of the image: keys random streams")
    seed = traits.Int(0, usedefault=True, desc="random seed")
    bundles = traits.List(traits.Str, mandatory=True, minlen=1, desc="model bundle folders")
    sha256 = traits.List(traits.Str, mandatory=True, desc="checksum of each: a new model is a new input")
    # A change of device or threads alone computes nothing anew: an interrupted run can go on elsewhere.
    device = traits.Str("cpu", usedefault=True, nohash=True, desc="torch device")
    precision = traits.Enum("fp32", "bf16", usedefault=True, desc="arithmetic of the networks")
    batch_size = traits.Int(0, usedefault=True, nohash=True, desc="slices at once; 0: as fits")
    compiled = traits.Bool(False, usedefault=True, nohash=True, desc="compile the networks")
    use_cuda = traits.Bool(False, usedefault=True, nohash=True, desc="takes a GPU slot of the scheduler")
    threads = traits.Int(1, usedefault=True, nohash=True, desc="CPU threads")


class _DetectOutputSpec(TraitedSpec):
    out_files = traits.List(File(exists=True), desc="one map for each bundle, in their order")


class Detect(SimpleInterface):
    """Score one image with several detectors, in a short-lived process that gives its GPU memory back."""

    input_spec = _DetectInputSpec
    output_spec = _DetectOutputSpec

    def _run_interface(self, runtime):
        maps = [Path(runtime.cwd) / f"{Path(bundle).name}_map.nii.gz" for bundle in self.inputs.bundles]
        command = [sys.executable, "-m", "bids_uad.engine.inference"]
        command += ["--image", self.inputs.image, "--brain", self.inputs.brain, "--key", self.inputs.key]
        command += ["--seed", str(self.inputs.seed), "--device", self.inputs.device]
        command += ["--threads", str(self.inputs.threads), "--precision", self.inputs.precision]
        if self.inputs.batch_size:
            command += ["--batch-size", str(self.inputs.batch_size)]
        if self.inputs.compiled:
            command.append("--compile")
        for bundle, target in zip(self.inputs.bundles, maps, strict=True):
            command += ["--job", bundle, str(target)]
        threads = str(self.inputs.threads)
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        kills = oom_kills()
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode != 0:
            raise RuntimeError(f"detection failed: {explain(done.returncode, done.stderr, kills)}")
        self._results["out_files"] = [str(path) for path in maps]
        return runtime


def explain(returncode: int, stderr: str, oom_kills_before: int) -> str:
    """Say in one line why the engine process ended.

    Parameters
    ----------
    returncode : int
        Negative for a signal.
    stderr : str
    oom_kills_before : int
        Processes that the kernel had killed for memory when it started.

    Returns
    -------
    str
    """
    if returncode == -signal.SIGKILL:
        return f"the process was killed {why_killed(oom_kills_before)}"
    lines = [line for line in stderr.strip().splitlines() if line.strip()]
    last = lines[-1].strip() if lines else "it said nothing"
    if "out of memory" in stderr.lower():
        return f"out of memory ({last}); free the GPU or use --device cpu"
    return f"{last} (exit code {returncode})"


class _PostprocessInputSpec(BaseInterfaceInputSpec):
    score_map = File(exists=True, mandatory=True, desc="anomaly map, SRI24")
    brain_mask = File(exists=True, mandatory=True, desc="brain mask, SRI24")
    lesion = File(exists=True, desc="ground truth, SRI24")
    image = File(exists=True, desc="preprocessed image, SRI24; needed with ground truth")
    native_ref = File(exists=True, mandatory=True, desc="brain mask on the grid of the raw image")
    from_sri24 = File(exists=True, mandatory=True, desc="transform back to the raw image, ITK text")
    bundle = traits.Str(mandatory=True, desc="model bundle folder")
    deviation = traits.Enum("none", "normative", usedefault=True, desc="what is written about")
    person = traits.Dict(desc="age and sex of the participant, None where they are not known")
    facts = traits.Dict(mandatory=True, desc="where the numbers come from: columns of the metrics table")
    min_lesion_volume = traits.Float(mandatory=True, desc="least volume of a lesion that is counted, mm3")
    files = traits.Dict(mandatory=True, desc="final place of each output, by kind")
    sidecars = traits.Dict(mandatory=True, desc="metadata of each output, by kind")
    parcellations = traits.Dict(desc="label image of each parcellation of the atlas, by name")


class _PostprocessOutputSpec(TraitedSpec):
    out_files = traits.List(File(exists=True), desc="everything written")


class Postprocess(SimpleInterface):
    """Turn one anomaly map into everything that is written about it.

    Runs every time, since it writes into the dataset: what is there may have been removed.
    """

    input_spec = _PostprocessInputSpec
    output_spec = _PostprocessOutputSpec
    _always_run = True

    def _run_interface(self, runtime):
        import numpy as np

        from bids_uad.calibration.normative import NormativeReference
        from bids_uad.engine.bundle import NORMATIVE_FILE, load_bundle
        from bids_uad.images import save_image
        from bids_uad.levels.participant.postprocess import lesion_table
        from bids_uad.preprocessing.resampling import map_to_native

        bundle = load_bundle(self.inputs.bundle).with_deviation(self.inputs.deviation)

        brain = read_on_grid(self.inputs.brain_mask) > 0
        scores = read_on_grid(self.inputs.score_map).astype(np.float32)
        scores = np.where(brain, scores, np.float32(0))
        if bundle.deviation != "none":
            reference = NormativeReference.read(bundle.folder / NORMATIVE_FILE, bundle.normative["reference"])
            scores = reference.deviations(scores, brain, **self.inputs.person)
        if not np.isfinite(scores).all():
            raise ModelError(
                f"{bundle.scored_as} gave NaN or infinite scores for {self.inputs.facts['source_image']}; "
                "train and calibrate the model again"
            )
        lesion = read_on_grid(self.inputs.lesion) > 0 if isdefined(self.inputs.lesion) else None
        files = {kind: Path(path) for kind, path in self.inputs.files.items()}
        for kind, path in files.items():
            write_json(sidecar_of(path), self.inputs.sidecars[kind])
        write_detection(
            scores,
            brain,
            lesion,
            threshold=float(self.inputs.facts["threshold"]),
            edges=bundle.bin_edges,
            facts=dict(self.inputs.facts),
            min_lesion_volume=self.inputs.min_lesion_volume,
            files=files,
            parcellations=self.inputs.parcellations or {},
        )
        mask = read_on_grid(files["mask"])
        if lesion is not None:
            image = read_on_grid(self.inputs.image)
            write_tsv(files["lesions"], lesion_table(lesion, mask > 0, image, brain))
        native = map_to_native(mask, self.inputs.native_ref, self.inputs.from_sri24)
        save_image(native, files["native_mask"])
        written = [*files.values(), *{sidecar_of(path) for path in files.values()}]
        self._results["out_files"] = sorted(str(path) for path in written)
        return runtime


def write_detection(
    scores: np.ndarray,
    brain: np.ndarray,
    lesion: np.ndarray | None,
    *,
    threshold: float,
    edges: np.ndarray,
    facts: dict[str, Any],
    min_lesion_volume: float,
    files: dict[str, Path],
    parcellations: Mapping[str, str],
) -> None:
    """Write the images and tables of one map in SRI24 space.

    Parameters
    ----------
    scores : numpy.ndarray of float32, SRI24 grid
        0 outside the brain.
    brain : numpy.ndarray of bool
    lesion : numpy.ndarray of bool, optional
    threshold : float
    edges : numpy.ndarray
        Bin edges of the score histogram.
    facts : dict
        Columns of the metrics table that say where the numbers come from.
    min_lesion_volume : float
        Least volume of a lesion that is counted, in mm3.
    files : dict of str to pathlib.Path
        Targets by kind (see `dataset.naming.detection_outputs`).
    parcellations : mapping of str to str
        Label images on the same grid by name, each with its table of names beside it.
    """
    import numpy as np
    import pandas as pd

    from bids_uad.calibration.thresholds import score_counts
    from bids_uad.levels.participant import postprocess as maps

    mask = maps.anomaly_mask(scores, brain, threshold)
    labels = maps.label_components(mask)
    write_image(scores, np.float32, files["anomalymap"])
    write_image(maps.squash(scores, threshold), np.float32, files["probseg"])
    write_image(mask, np.uint8, files["mask"])
    write_image(labels, np.int32, files["dseg"])
    components = maps.component_table(labels, scores)
    for name, path in parcellations.items():
        names = pd.read_csv(path.replace(".nii.gz", ".tsv"), sep="\t").set_index("index")["name"].to_dict()
        components[name.lower()] = maps.regions(labels, read_on_grid(path), names)
    write_tsv(files["components"], components)
    counts = score_counts(scores, brain, lesion, edges)
    write_tsv(files["histogram"], maps.histogram_table(edges, *counts))
    write_tsv(files["metrics"], maps.metrics_row(facts, labels, brain, lesion, min_lesion_volume))


def write_image(volume: np.ndarray, dtype: type, target: Path) -> None:
    """Write a volume on the SRI24 grid, atomically."""
    from bids_uad.images import save_image
    from bids_uad.space import to_image

    save_image(to_image(volume, dtype), target)


def read_on_grid(path: str | Path) -> np.ndarray:
    """Read an image that must lie on the SRI24 grid.

    Raises
    ------
    ValueError
        If it does not.
    """
    import nibabel as nib
    import numpy as np

    from bids_uad.space import AFFINE, SHAPE

    image = nib.load(path)
    if image.shape != SHAPE or not np.allclose(image.affine, AFFINE, atol=1e-3):
        raise ValueError(f"{path} is not on the SRI24 grid")
    return np.asanyarray(image.dataobj)


class _AlignMaskInputSpec(BaseInterfaceInputSpec):
    in_file = File(mandatory=True, desc="mask in SRI24 space, voxels in any order")


class _AlignMaskOutputSpec(TraitedSpec):
    out_file = File(exists=True, desc="binary mask with voxels in our order")


class AlignMask(SimpleInterface):
    """Store a mask that is already in SRI24 space in the voxel order of our grid; nothing is resampled."""

    input_spec = _AlignMaskInputSpec
    output_spec = _AlignMaskOutputSpec

    def _run_interface(self, runtime):
        import nibabel as nib
        import numpy as np

        from bids_uad.preprocessing.check import read_lesion
        from bids_uad.space import AFFINE

        lesion, affine = read_lesion(self.inputs.in_file)
        order = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.io_orientation(AFFINE))
        target = Path(runtime.cwd) / "lesion.nii.gz"
        write_image(nib.orientations.apply_orientation(lesion, order), np.uint8, target)
        self._results["out_file"] = str(target)
        return runtime


_VERDICT = ("exclude", "exclude_reasons", "exclude_dependents")


class _AddQualityInputSpec(BaseInterfaceInputSpec):
    metadata = traits.Dict(mandatory=True, desc="metadata of the preprocessed image")
    quality = traits.Dict(mandatory=True, desc="what preprocessing measured")


class _AddQualityOutputSpec(TraitedSpec):
    metadata = traits.Dict(desc="both")


class AddQuality(SimpleInterface):
    """Put what preprocessing measured into the sidecar of the preprocessed image."""

    input_spec = _AddQualityInputSpec
    output_spec = _AddQualityOutputSpec

    def _run_interface(self, runtime):
        self._results["metadata"] = {
            **self.inputs.metadata,
            "PreprocessingQuality": dict(self.inputs.quality),
        }
        return runtime


class _WriteQualityInputSpec(BaseInterfaceInputSpec):
    quality = traits.Dict(mandatory=True, desc="what preprocessing measured")
    facts = traits.Dict(mandatory=True, desc="columns that say which image it is")
    sidecar = traits.Dict(mandatory=True, desc="metadata of the table")
    target = traits.Str(mandatory=True, desc="where the table goes")


class _WriteQualityOutputSpec(TraitedSpec):
    out_file = File(exists=True, desc="the table")


class WriteQuality(SimpleInterface):
    """Write the table of an image's quality.

    Runs every time, since it writes into the dataset: what is there may have been removed. Where a table is
    there, its verdict is kept, which may have been changed by hand. Tables of other inputs are removed before
    the workflow runs.
    """

    input_spec = _WriteQualityInputSpec
    output_spec = _WriteQualityOutputSpec
    _always_run = True

    def _run_interface(self, runtime):
        target = Path(self.inputs.target)
        write_json(sidecar_of(target), self.inputs.sidecar)
        table = quality_table(self.inputs.quality, self.inputs.facts)
        for column, value in _verdict(target).items():
            table[column] = value
        write_tsv(target, table)
        self._results["out_file"] = str(target)
        return runtime


def _verdict(path: Path) -> dict[str, str]:
    """Read the verdict from a quality table; empty if there is no table, or none that can be read."""
    try:
        row = read_row(path, _VERDICT)
    except InputError:
        return {}
    return row if row["exclude"].strip().lower() in ("yes", "no") else {}


def quality_table(quality: dict[str, Any], facts: dict[str, str]) -> pd.DataFrame:
    """Make the one row of an image.

    Parameters
    ----------
    quality : dict
        Of :func:`bids_uad.preprocessing.quality.assess`.
    facts : dict
        ``source_image``, ``modality`` and ``depends_on``.

    Returns
    -------
    pandas.DataFrame
        Columns of ``QUALITY_COLUMNS``.
    """
    failures = quality.get("failures", [])
    verdict = "yes" if failures else "no"
    # Every failure that is found automatically is one of geometry: brain mask, registration or orientation.
    judged = {
        "exclude": verdict,
        "exclude_reasons": " ".join(failures) or None,
        "exclude_dependents": verdict,
    }
    row = {**quality, **facts, **judged}
    return pd.DataFrame([{name: row.get(name) for name in QUALITY_COLUMNS}])
