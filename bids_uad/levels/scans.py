"""Scans that are not in a BIDS dataset: make one of them and run the participant level; `detect`."""

from __future__ import annotations

import filecmp
import hashlib
import logging
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
import pandas as pd

from bids_uad import __version__
from bids_uad.config import EXTRACTIONS, MODALITIES, NIFTI_EXTENSION, SCANS, RunConfig
from bids_uad.errors import (
    ConfigError,
    ExitCode,
    InputError,
    UserError,
    describe_os_error,
    truncate_list,
    unreadable,
)
from bids_uad.files import atomic_path, write_json, write_text
from bids_uad.images import load_image, make_image, save_image
from bids_uad.resources import (
    NoAnswerError,
    RequestProcess,
    available_cpus,
    available_memory_gb,
    describe_exit,
    library_environment,
    serve_requests,
)
from bids_uad.space import AFFINE

if TYPE_CHECKING:
    from bids_uad.engine.bundle import Bundle

LOGGER = logging.getLogger("bids_uad")

DERIVATIVES = Path("derivatives") / "bids_uad"
"""Folder of the derivatives in the dataset of the scans."""
ENDINGS = {
    "map": "anomalymap.nii.gz",
    "mask": "anomalymask.nii.gz",
    "components": "components.tsv",
}
"""Ends of the names of the results. `mask` alone would be that of a brain mask of HD-BET."""
CONTRASTS = {
    "T1w": {"t1", "t1w", "t1n", "mprage", "unit1"},
    "T2w": {"t2", "t2w"},
    "FLAIR": {"flair", "t2flair", "t2f"},
}
"""Words of file names that state the contrast, in lower case."""
CONTRAST_AGENT = {"t1c", "t1ce", "t1gd", "ce", "gd"}
"""Words of names of contrast-enhanced scans, which the detectors are not trained on."""
NOT_SCANS = {"mask", "seg", "dseg", "probseg", "label", "labels", "anomalymask", "anomalymap"}
"""Last words of names of masks, segmentations and maps."""
MAX_LABEL = 64
"""Maximum length of participant labels, which occur several times in each path."""
README = """Copies of scans that bids_uad was run on without a BIDS dataset, each as a participant of its
own. The labels are made of the file names. The outputs are in derivatives/bids_uad.
"""


@dataclass(frozen=True)
class Scan:
    """File of a scan that is not in a BIDS dataset.

    Parameters
    ----------
    path : pathlib.Path
        NIfTI file.
    modality : {"T1w", "T2w", "FLAIR"}
        Contrast.
    label : str
        Label of the participant in the dataset that is made of the scans, without `sub-`.
    """

    path: Path
    modality: str
    label: str

    @property
    def stem(self) -> str:
        """Name of the file without its extension, with which the names of the results start."""
        return NIFTI_EXTENSION.sub("", self.path.name)

    @property
    def image(self) -> Path:
        """Name of the image in the dataset, relative to its root."""
        # Noise around the head is removed from images with the suffix of MP2RAGE.
        suffix = "UNIT1" if self.modality == "T1w" and "unit1" in _words(self.stem) else self.modality
        extension = NIFTI_EXTENSION.search(self.path.name)[0].lower()
        return Path(f"sub-{self.label}", "anat", f"sub-{self.label}_{suffix}{extension}")


@dataclass(frozen=True)
class ScanOutputs:
    """Results of one model for a scan.

    Parameters
    ----------
    name : str
        File name of the scan.
    modality : {"T1w", "T2w", "FLAIR"}
        Contrast of the scan.
    model : str
        Name of the model bundle, with `+normative` if the map holds deviations.
    threshold : float
        Threshold of the mask.
    warnings : list of str
        Warnings about the quality of the scan and of its preprocessing.
    files : dict of str to str
        Paths of `map`, `mask`, `components` and, if it was written, `report` of the scan.
    derivatives : dict of str to str
        Paths of `scan`, `map`, `mask` and `labels` in SRI24 space.
    """

    name: str
    modality: str
    model: str
    threshold: float
    warnings: list[str]
    files: dict[str, str]
    derivatives: dict[str, str]


def run_scans(config: RunConfig) -> int:
    """Run the participant level on scans that are not in a BIDS dataset.

    Parameters
    ----------
    config : RunConfig
        Options; the results are written to `output_dir`, the dataset to `bids_dir`.

    Returns
    -------
    int
        Exit code: 0 if all results exist, 1 if a scan failed.

    Raises
    ------
    UserError
        If the run cannot start, for example because the contrast of a scan is not known.
    """
    outputs, errors = process_scans(config)
    for output in outputs:
        LOGGER.info("%s: %s", output.name, output.files["mask"])
    return ExitCode.FAILED if errors else ExitCode.OK


def process_scans(config: RunConfig) -> tuple[list[ScanOutputs], list[str]]:
    """Make a dataset of the scans, run the participant level on it and write results under the scans' names.

    Parameters
    ----------
    config : RunConfig
        As for :func:`run_scans`.

    Returns
    -------
    outputs : list of ScanOutputs
        Results of each scan and model that did not fail.
    errors : list of str
        Messages of scans and reports that failed; logged, too.

    Raises
    ------
    UserError
        If the run cannot start, or none of the scans can be read.
    """
    # Imported here, since nipype takes seconds, and `detect` calls this function in another process.
    from bids_uad.levels.participant.run import run_dataset
    from bids_uad.preprocessing.check import check_image

    scans = find_scans([Path(path) for path in config.scans], config.modality, config.output_dir)
    usable, unusable = [], []
    for scan in scans:
        try:
            check_image(scan.path)
            usable.append(scan)
        except InputError as error:
            unusable.append(error)
            _remove_results(scan, "", config.output_dir)
    for error in unusable[not usable :]:
        LOGGER.error(error)
    if not usable:
        raise unusable[0]
    derivatives = config.bids_dir / DERIVATIVES
    makes_work_dir = config.work_dir == config.output_dir / "work" and not config.work_dir.exists()
    make_dataset(usable, config.bids_dir)
    run = run_dataset(
        replace(
            config,
            output_dir=derivatives,
            levels=("participant",),
            scans=(),
            modality=None,
            participants=tuple(scan.label for scan in usable),
            sessions=(),
            modalities=tuple(name for name in MODALITIES if any(scan.modality == name for scan in usable)),
            derivatives={},
            filter_file=None,
            database_dir=None,
        )
    )
    outputs = []
    for scan in usable:
        outputs += write_results(scan, run.bundles, derivatives, config.output_dir)
    errors = [*map(str, unusable), *run.errors]
    for scan in usable:
        errors = [error.replace(str(config.bids_dir / scan.image), str(scan.path)) for error in errors]
    if makes_work_dir and not errors:
        shutil.rmtree(config.work_dir, ignore_errors=True)
    return outputs, errors


def find_scans(paths: Sequence[Path], modality: str | None, output_dir: Path) -> list[Scan]:
    """Find scans, their contrasts and labels for them.

    Parameters
    ----------
    paths : sequence of pathlib.Path
        NIfTI files, or one folder, whose NIfTI files are the scans.
    modality : {"T1w", "T2w", "FLAIR"} or None
        Contrast of all scans. If None, it is read from their names.
    output_dir : pathlib.Path
        Folder of the results.

    Returns
    -------
    list of Scan
        Scans in the order of `paths`, those of a folder sorted by name.

    Raises
    ------
    ConfigError
        If the contrast of a scan is not known, or results would overwrite each other or a scan.
    InputError
        If a file does not exist or does not have the name of a NIfTI file, or the folder has none.
    """
    if len(paths) == 1 and paths[0].is_dir():
        folder = paths[0]
        if folder.resolve() == output_dir:
            raise ConfigError(f"{folder} holds the scans; choose another output folder")
        paths = [
            path
            for path in sorted(folder.iterdir())
            if NIFTI_EXTENSION.search(path.name) and not path.is_dir()
        ]
        if not paths:
            remedy = "convert DICOM files, for example with dcm2niix"
            raise InputError(folder, "no NIfTI file (.nii, .nii.gz) in this folder", remedy)
    for path in paths:
        if not path.exists():
            raise unreadable(path, FileNotFoundError())
        if path.is_dir():
            raise InputError(path, "a folder, not a file", "name files, or one folder alone")
        if not NIFTI_EXTENSION.search(path.name):
            raise InputError(path, "not a NIfTI file (.nii, .nii.gz)", "convert it to NIfTI")
    modalities = [modality or contrast_of(path.name) for path in paths]
    if unknown := [path.name for path, found in zip(paths, modalities, strict=True) if found is None]:
        raise ConfigError(
            f"{truncate_list(unknown, 3)}: the name is not that of a T1w, T2w or FLAIR scan without contrast "
            "agent; state the contrast with --modality (modality= in Python), or leave the file out"
        )
    stems = [NIFTI_EXTENSION.sub("", path.name) for path in paths]
    labels = make_labels(stems)
    scans = [Scan(*fields) for fields in zip(paths, modalities, labels, strict=True)]
    written: dict[str, Path] = {}
    resolved = {path.resolve() for path in paths}
    for scan in scans:
        other = written.setdefault(scan.stem.lower(), scan.path)
        if other is not scan.path:
            raise ConfigError(
                f"{other} and {scan.path} have the same name, with which their results would be written; "
                "rename one, or process it to another output folder"
            )
        for ending in ENDINGS.values():
            if (result := output_dir / f"{scan.stem}_{ending}") in resolved:
                raise ConfigError(f"{result} is also the name of a result of {scan.path.name}; leave it out")
    return scans


def contrast_of(name: str) -> str | None:
    """Return the contrast that the name of a file states.

    Parameters
    ----------
    name : str
        File name, with or without extension. Of names that start with `sub-`, as in BIDS, the suffix counts.

    Returns
    -------
    str or None
        T1w, T2w or FLAIR; None if the name states no or several contrasts, a contrast agent, or a mask.
    """
    words = _words(NIFTI_EXTENSION.sub("", name))
    if (words[-1:] and words[-1] in NOT_SCANS) or not CONTRAST_AGENT.isdisjoint(words):
        return None
    if name.startswith("sub-"):
        words = words[-1:]
    found = [contrast for contrast, own in CONTRASTS.items() if not own.isdisjoint(words)]
    if found == ["T2w", "FLAIR"]:  # FLAIR images are T2-weighted
        return "FLAIR"
    return found[0] if len(found) == 1 else None


def make_labels(stems: Sequence[str]) -> list[str]:
    """Make labels of participants from file names.

    Parameters
    ----------
    stems : sequence of str
        File names without extension.

    Returns
    -------
    list of str
        Letters and digits of each name. A checksum of the name is appended to labels that are too long or, in
        lower case, not unique.
    """
    labels = [re.sub("[^0-9a-zA-Z]", "", stem.removeprefix("sub-")) for stem in stems]
    lower = [label.lower() for label in labels]
    return [
        label
        if 0 < len(label) <= MAX_LABEL and lower.count(label.lower()) == 1
        else label[:MAX_LABEL] + hashlib.sha256(stem.encode()).hexdigest()[:8]
        for label, stem in zip(labels, stems, strict=True)
    ]


def make_dataset(scans: Sequence[Scan], root: Path) -> None:
    """Make a BIDS dataset with copies of the scans, or add them to an earlier one.

    Sidecars beside the scans, as dcm2niix writes them, are copied as well.

    Parameters
    ----------
    scans : sequence of Scan
        Scans; those of an earlier run with the same labels are replaced.
    root : pathlib.Path
        Root of the dataset.

    Raises
    ------
    ConfigError
        If the folder holds another dataset.
    """
    from bids_uad.dataset.describe import BIDS_VERSION, refuse_foreign

    refuse_foreign(root)
    write_json(
        root / "dataset_description.json",
        {
            "Name": "Scans",
            "BIDSVersion": BIDS_VERSION,
            "DatasetType": "raw",
            "GeneratedBy": [{"Name": "bids_uad", "Version": __version__}],
        },
    )
    write_text(root / "README", README)
    for scan in scans:
        target = root / scan.image
        sources = {target: scan.path}
        if (sidecar := scan.path.with_name(f"{scan.stem}.json")).is_file():
            sources[target.with_name(f"{target.name.split('.', 1)[0]}.json")] = sidecar
        for path in target.parent.glob("*"):
            if path not in sources:
                path.unlink()
                # Otherwise the report would show the outputs of the earlier image as well.
                shutil.rmtree(root / DERIVATIVES / f"sub-{scan.label}", ignore_errors=True)
        for copy, source in sources.items():
            if not (copy.is_file() and filecmp.cmp(source, copy)):
                with atomic_path(copy) as temporary:
                    shutil.copy2(source, temporary)


def write_results(
    scan: Scan, bundles: Sequence[Bundle], derivatives: Path, output_dir: Path
) -> list[ScanOutputs]:
    """Write map, mask, table and report of a scan under its name, the images on its grid.

    Parameters
    ----------
    scan : Scan
        The scan, after the participant level.
    bundles : sequence of Bundle
        Models of the run. If several are for the contrast of the scan, their names are part of those of the
        results.
    derivatives : pathlib.Path
        Outputs of the participant level.
    output_dir : pathlib.Path
        Folder of the results.

    Returns
    -------
    list of ScanOutputs
        One entry per model; none for models that failed, whose earlier results are removed.
    """
    from bids_uad.dataset.naming import ImageUnit, detection_outputs, preprocessing_outputs
    from bids_uad.levels.participant.completion_records import read_record, record_path
    from bids_uad.levels.participant.summary import image_warnings, read_metrics

    unit = ImageUnit(scan.image, scan.label, None, scan.modality, {"subject": scan.label})
    record = read_record(record_path(derivatives, unit))
    preprocessed = {kind: derivatives / path for kind, path in preprocessing_outputs(unit).items()}
    own = [bundle for bundle in bundles if bundle.modality == scan.modality]
    page, report = derivatives / f"sub-{scan.label}.html", output_dir / f"{scan.stem}.html"
    shown = {"report": report} if page.is_file() else {}
    if shown:
        # Figures are in the derivatives.
        below = derivatives.relative_to(output_dir).as_posix()
        write_text(report, page.read_text(encoding="utf-8").replace('="./', f'="./{below}/'))
    outputs = []
    for bundle in own:
        model = f"_{bundle.scored_as.replace('+', '-')}" if len(own) > 1 else ""
        if record is None or bundle.scored_as not in record.models:
            _remove_results(scan, model, output_dir)
            continue
        files = {kind: output_dir / f"{scan.stem}{model}_{ending}" for kind, ending in ENDINGS.items()}
        detected = {
            kind: derivatives / path for kind, path in detection_outputs(unit, bundle.scored_as).items()
        }
        save_image(
            _map_to_native(detected["anomalymap"], detected["native_mask"], preprocessed["from_sri24"]),
            files["map"],
        )
        for kind, source in (("mask", "native_mask"), ("components", "components")):
            with atomic_path(files[kind]) as temporary:
                shutil.copyfile(detected[source], temporary)
        metrics = read_metrics(unit, derivatives, [bundle.scored_as])
        outputs.append(
            ScanOutputs(
                name=scan.path.name,
                modality=scan.modality,
                model=bundle.label,
                threshold=bundle.default_threshold[1],
                warnings=image_warnings(unit, derivatives, metrics),
                files={kind: str(path) for kind, path in (files | shown).items()},
                derivatives={
                    "scan": str(preprocessed["preproc"]),
                    "map": str(detected["anomalymap"]),
                    "mask": str(detected["mask"]),
                    "labels": str(detected["dseg"]),
                },
            )
        )
    return outputs


def _remove_results(scan: Scan, model: str, output_dir: Path) -> None:
    """Remove the results that an earlier run has written for a scan."""
    for ending in ENDINGS.values():
        (output_dir / f"{scan.stem}{model}_{ending}").unlink(missing_ok=True)


def _map_to_native(scores: Path, native: Path, from_sri24: Path) -> nib.Nifti1Image:
    """Resample an anomaly map from SRI24 to the grid of another image by linear interpolation."""
    from bids_uad.preprocessing.resampling import read_itk, resample

    volume, grid = np.asarray(load_image(scores).dataobj), nib.load(native)
    values = resample(volume, AFFINE, grid.shape, grid.affine, read_itk(from_sri24))
    return make_image(values, grid.affine, np.float32)


def _words(name: str) -> list[str]:
    """Return the words of a file name, runs of letters and digits, in lower case."""
    return re.findall("[0-9a-z]+", name.lower())


@dataclass(frozen=True)
class Anomalies:
    """Anomaly map and mask on one grid.

    Parameters
    ----------
    map_image : nibabel.Nifti1Image
        Anomaly scores, float32; 0 outside the brain.
    mask_image : nibabel.Nifti1Image
        Anomaly mask, uint8.
    """

    map_image: nib.Nifti1Image = field(repr=False)
    mask_image: nib.Nifti1Image = field(repr=False)

    @cached_property
    def map(self) -> np.ndarray:
        """Anomaly scores, float32."""
        return np.asarray(self.map_image.dataobj)

    @cached_property
    def mask(self) -> np.ndarray:
        """Anomaly mask, boolean."""
        return np.asarray(self.mask_image.dataobj) > 0


@dataclass(frozen=True)
class Result:
    """Anomalies of a scan.

    Parameters
    ----------
    modality : {"T1w", "T2w", "FLAIR"}
        Contrast of the scan.
    model : str
        Name of the model, with `+normative` if the map holds deviations from healthy controls.
    threshold : float
        Score above which voxels are anomalous; see the model's decision rule for further steps.
    warnings : tuple of str
        Warnings about the scan, its preprocessing and the marked fraction of the brain.
    components : pandas.DataFrame
        Connected components of the mask: volume, scores, position and region.
    native : Anomalies
        Map and mask on the grid of the scan.
    sri24 : Anomalies
        Map and mask in SRI24 space.
    scan_image : nibabel.Nifti1Image
        The brain in SRI24 space, bias-corrected and scaled.
    label_image : nibabel.Nifti1Image
        Components in SRI24 space, labelled by the column `index` of `components`.
    report : pathlib.Path or None
        HTML report; None without an output folder.
    """

    modality: str
    model: str
    threshold: float
    warnings: tuple[str, ...]
    components: pd.DataFrame = field(repr=False)
    native: Anomalies = field(repr=False)
    sri24: Anomalies = field(repr=False)
    scan_image: nib.Nifti1Image = field(repr=False)
    label_image: nib.Nifti1Image = field(repr=False)
    report: Path | None = None


def detect(
    scan: str | PathLike[str],
    *,
    modality: str | None = None,
    model: str | PathLike[str] | None = None,
    output_dir: str | PathLike[str] | None = None,
    brain_extraction: str = EXTRACTIONS[0],
    device: str = "auto",
    precision: str = "auto",
    min_lesion_size: float | None = None,
    random_seed: int = 0,
) -> Result:
    """Detect anomalies in a scan of the brain, as ``bids_uad SCAN OUTPUT_DIR`` does.

    The participant level runs in another process, so that it does not change the settings of this one.
    Nothing is printed.

    Parameters
    ----------
    scan : path-like
        NIfTI file of a T1w, T2w or FLAIR scan, skull-stripped or whole-head.
    modality : {"T1w", "T2w", "FLAIR"}, default=None
        Contrast of the scan. If None, it is read from the name of the file.
    model : str or path-like, default=None
        Packaged model or path of a model bundle. If None, the best packaged one for the contrast.
    output_dir : path-like, default=None
        Folder for the results and the BIDS dataset that is made of the scan. If None, no file is kept.
    brain_extraction : str, default="combined"
        Method for whole heads: `combined`, `template`, `network`, `synthstrip` or `hd-bet`.
    device : str, default="auto"
        `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
    precision : {"auto", "fp32", "bf16"}, default="auto"
        Arithmetic of the networks.
    min_lesion_size : float, default=None
        Minimum volume in mm3 of components of the mask; 0 keeps all. If None, that of the model, which was
        fixed on validation scans.
    random_seed : int, default=0
        Seed of all random numbers.

    Returns
    -------
    Result
        Images, arrays and tables in memory.

    Raises
    ------
    bids_uad.errors.UserError
        If the scan cannot be processed. Its subclasses are `InputError` (the file), `ConfigError` (an
        argument), `ModelError`, `UnavailableError` (such as a GPU) and `StorageError` (a full disk).

    Examples
    --------
    >>> from bids_uad import detect
    >>> result = detect("sub-01_T1w.nii.gz")  # doctest: +SKIP
    >>> result.components["volume_mm3"].sum()  # doctest: +SKIP
    1204.0
    """
    with TemporaryDirectory(prefix="bids_uad-") as temporary:
        out = Path(temporary if output_dir is None else output_dir).expanduser().resolve()
        config = RunConfig(
            bids_dir=out / "bids",
            output_dir=out,
            levels=(SCANS,),
            work_dir=out / "work",
            scans=(str(Path(scan).expanduser().absolute()),),
            modality=modality,
            models=() if model is None else (str(Path(model).resolve() if Path(model).is_dir() else model),),
            brain_extraction=brain_extraction,
            device=device,
            precision=precision,
            min_lesion_size=None if min_lesion_size is None else float(min_lesion_size),
            random_seed=random_seed,
            no_viewer=output_dir is None,
            nprocs=available_cpus(),
            mem_gb=available_memory_gb(),
        )
        process = RequestProcess("bids_uad.levels.scans")
        try:
            request = {"config": config.to_toml(), "keep": output_dir is not None}
            answer = process.ask(request, library_environment(config.omp_nthreads))
        except NoAnswerError as error:
            if error.returncode is None:
                raise RuntimeError(str(error)) from None
            cause = describe_exit(error.returncode, error.oom_kills_before)
            raise UserError(f"{scan}: the process {cause}") from error
        finally:
            process.stop()
        return _read_result(ScanOutputs(**answer), keep=output_dir is not None)


def _read_result(outputs: ScanOutputs, *, keep: bool) -> Result:
    """Read the results of a scan into memory."""
    files, derivatives = outputs.files, outputs.derivatives
    report = files.get("report")
    return Result(
        outputs.modality,
        outputs.model,
        outputs.threshold,
        tuple(outputs.warnings),
        pd.read_csv(files["components"], sep="\t", na_values="n/a"),
        Anomalies(load_image(files["map"]), load_image(files["mask"])),
        Anomalies(load_image(derivatives["map"]), load_image(derivatives["mask"])),
        load_image(derivatives["scan"]),
        load_image(derivatives["labels"]),
        Path(report) if keep and report else None,
    )


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Process the scan of a request of :func:`detect`."""
    config = RunConfig.from_toml(request["config"])
    try:
        outputs, errors = process_scans(config)
    except OSError as error:
        problem = describe_os_error(error, [config.output_dir, config.work_dir])
        if problem is None:
            raise
        raise problem from error
    if not outputs:
        # Crash files in a temporary folder are removed with it.
        details = "" if request["keep"] else r" \(details: [^)]*\)"
        raise UserError("; ".join(re.sub(details, "", error) for error in errors))
    return asdict(outputs[0])


if __name__ == "__main__":
    serve_requests(_answer, int(sys.argv[1]), idle_seconds=60.0, memory_growth=0.0)
