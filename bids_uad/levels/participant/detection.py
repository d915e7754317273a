"""The nipype interfaces between a preprocessed image and what is written about its anomalies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nipype.interfaces.base import (
    BaseInterfaceInputSpec,
    File,
    SimpleInterface,
    TraitedSpec,
    isdefined,
    traits,
)

from bids_uad.atomic import write_json, write_tsv
from bids_uad.cgroups import oom_kills, why_killed
from bids_uad.dataset.outputs import sidecar_of
from bids_uad.errors import ModelError

if TYPE_CHECKING:
    import numpy as np


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
        command = [sys.executable, "-m", "bids_uad.engine"]
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
        from bids_uad.levels.participant.lesions import lesion_table
        from bids_uad.preprocessing.native import map_to_native

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

    from bids_uad.calibration.histogram import score_counts
    from bids_uad.levels.participant import maps

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
