"""Configuration of a run, its TOML file, and the parser class of the command line."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import tomllib
import uuid
from dataclasses import dataclass, field
from datetime import datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

from bids_uad.constraints import (
    Constrained,
    Count,
    CountOrZero,
    Interval,
    InvalidParameterError,
    Items,
    Matches,
    NonNegative,
    OneOf,
    Positive,
    allows,
    annotations,
    describe,
)
from bids_uad.errors import ConfigError

DEFAULT_SUBGROUPS = ("sex", "age", "scanner", "scanner_seen", "lesion load")
LEVELS = ("participant", "train", "calibrate", "group")
"""Levels in the order in which they run."""
SCANS = "scans"
"""Level that makes a BIDS dataset of scans and runs the participant level on it."""

MODALITIES = ("T1w", "T2w", "FLAIR")
"""Suffixes of the images that are scored, anchors of the registration first."""

NIFTI_EXTENSION = re.compile(r"\.nii(\.gz)?$", re.IGNORECASE)
"""Extension of file names of NIfTI images."""

PRECISIONS = ("auto", "fp32", "bf16")

EXTRACTIONS = ("combined", "template", "network", "synthstrip", "hd-bet")
"""Methods of brain extraction; the last two are external programs."""

DEFAULT_MIN_COUNTED_VOLUME = 3.0
"""Minimum volume in mm3 of lesions that are counted, as in the MSSEG challenge (Commowick et al. 2018)."""

THRESHOLD, HYSTERESIS = DECISION_RULES = ("threshold", "hysteresis")
"""Plain threshold, or two thresholds, minimum volume of a component and filled holes."""
DEVIATIONS = ("none", "normative")
"""Scores, or their deviation from healthy controls of the same age and sex."""

RENAMED_DETECTORS = {"fpi": "pls"}
"""Deprecated names of detectors on the command line and in model bundles, and the present names."""

RENAMED_FIELDS = {
    "strata": "subgroups",
    "recontrast": "contrast_transfer",
    "min_lesion_volume": "min_counted_volume",
}
"""Deprecated keys of configuration files, and the fields that they set."""

RUN_SPECIFIC = frozenset(
    {"bids_dir", "output_dir", "levels", "scans", "run_id", "dry_run", "reports_only", "verbosity"}
)
"""Fields that are not read from the configuration file of an earlier run."""


Text = Annotated[str, Matches(r"(?s).+", "a str that is not empty")]
Label = Annotated[str, Matches("[0-9a-zA-Z+]+", "a BIDS label (letters and digits)")]
Modality = Annotated[str, OneOf(*MODALITIES)]
Device = Annotated[str, Matches(r"auto|cpu|cuda(:\d+)?|mps", "one of auto, cpu, cuda, cuda:N, mps")]
SpaceName = Annotated[
    str,
    Matches(
        r"SRI24|MNI152NLin2009cAsym(:res-[12])*|orig|anat|T1w",
        "SRI24, MNI152NLin2009cAsym (also with :res-1, :res-2) or orig (also anat, T1w)",
    ),
]
"""Space of ``--output-spaces``; of other templates no transform to SRI24 is known."""
Seed = Annotated[int, Interval(0, 2**32 - 1)]


def new_run_id() -> str:
    """Return a unique identifier of a run, `YYYYmmdd-HHMMSS_<uuid4>`."""
    return f"{datetime.now():%Y%m%d-%H%M%S}_{uuid.uuid4()}"


@dataclass(frozen=True)
class RunConfig(Constrained):
    """Options of a run, resolved once and written beside the results; see ``--help`` for details.

    Parameters
    ----------
    bids_dir, output_dir, work_dir : pathlib.Path
        Absolute paths of raw dataset (for `train` and `calibrate` preprocessed scans), derivatives (or model
        bundles) and intermediate files.
    levels : tuple of str
        Levels to run, of `LEVELS`, or `SCANS` alone.
    scans : tuple of str, default=()
        Files of the level `SCANS`, or one folder of them. Their dataset becomes `bids_dir`.
    participants, sessions : tuple of str, default=()
        Labels without `sub-` and `ses-`; empty selects all.
    filter_file : pathlib.Path, optional
        JSON file with BIDS entity filters for `t1w`, `t2w` and `flair`.
    database_dir : pathlib.Path, optional
        Folder of a pybids database of the raw dataset, written if it does not exist.
    derivatives : dict of str to pathlib.Path, default={}
        Other derivative datasets by name; `lesions` holds lesion masks.
    modalities : tuple of str, default=MODALITIES
        Images to score. If all are named, those without images or without a model are skipped.
    models : tuple of str, default=()
        Names of packaged bundles or paths; empty selects the best packaged ones, `("all",)` all packaged
        ones, `("none",)` preprocessing only.
    deviations : tuple of str, default=()
        Any of `DEVIATIONS`; empty selects the default of each model.
    atlas_dir : pathlib.Path, optional
        Folder with `tpl-SRI24`.
    brain_extraction : str, default="combined"
        Method for whole-head images, of `EXTRACTIONS`.
    extraction_weights : pathlib.Path, optional
        Weights of that method.
    min_lesion_size : float, optional
        Minimum volume in mm3 of components of the anomaly mask; by default that of the model.
    output_spaces : tuple of str, default=()
        Spaces in which outputs are written in addition to SRI24, see :func:`bids_uad.space.output_spaces`.
    min_counted_volume : float, default=DEFAULT_MIN_COUNTED_VOLUME
        Minimum volume in mm3 of lesions and false components that are counted.
    device : str, default="auto"
        `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
    precision : str, default="auto"
        `auto`, `fp32` or `bf16`: arithmetic of the detectors' networks.
    batch_size : int, optional
        Slices per batch.
    compiled : bool, default=False
        Whether the networks are compiled.
    random_seed : int, default=0
        Seed of all random numbers.
    nprocs, omp_nthreads : int, default=1
        Processes in total, and threads per process.
    mem_gb : float, default=8
        Memory in total, in GB.
    n_gpu_procs : int, default=1
        Images scored at a time on the GPU.
    low_mem : bool, default=False
        Whether slices are scored one by one if `batch_size` is not given.
    plugin_file : pathlib.Path, optional
        YAML file with a nipype plugin and its arguments.
    clean_workdir : bool, default=False
        Whether working folders are removed before the run.
    no_viewer : bool, default=False
        Whether the reports have no interactive viewers.
    md_only_boilerplate : bool, default=False
        Whether the methods text is written as Markdown only.
    resource_monitor : bool, default=False
        Whether memory and CPU usage of each step are recorded.
    write_graph : bool, default=False
        Whether the workflow graph of each participant is written.
    keep_workdir : bool, default=False
        Whether the working folders of finished participants are kept.
    stop_on_first_crash, reports_only, dry_run : bool, default=False
        Whether to stop at the first failure, only rewrite reports, or only list what would be processed.
    verbosity : int, default=0
        1 logs more, 2 adds tracebacks.
    detector, modality : str, optional
        Detector and images of the model, for `train` and `calibrate`; `modality` is also that of `scans`.
    preset : str, default="default"
        Preset of the detector's hyper-parameters.
    steps : int, optional
        Training steps; by default the preset's.
    hyper : tuple of str, default=()
        Hyper-parameters that differ from the preset, `NAME=VALUE`.
    experiments : dict of str to pathlib.Path, default={}
        Outputs of other models on the same images, by name, for `group`.
    cohort : str, optional
        Column of participants.tsv with the cohorts of `group`; by default `pathology`.
    subgroups : tuple of str, default=DEFAULT_SUBGROUPS
        Subgroups of `group`: columns of participants.tsv, sessions.tsv or scans.tsv, fields of the raw
        images' sidecars, and `lesion load`.
    train_fraction : float, default=1
        Fraction of the participants to train on.
    synthetic : int, default=0
        Number of simulated healthy participants to train on.
    contrast_transfer : bool, default=False
        Whether to train also on T1w scans of healthy controls that are mapped to the contrast of `modality`.
    label_maps : tuple of str, default=()
        Label maps, or folders of them, to simulate from; empty selects the built-in template.
    lesion_masks : pathlib.Path, optional
        Folder with masks of real lesions, whose shapes synthetic lesions may have.
    normative_dir : pathlib.Path, optional
        Preprocessed scans of further healthy controls, for the normative reference only.
    decision_rule : str, optional
        Rule that `calibrate` chooses for the masks, of `DECISION_RULES`; by default that of the detector.
    num_devices, num_nodes : int, default=1
        Devices per node, and nodes, for distributed training.
    backbone_weights : pathlib.Path, optional
        ImageNet weights of a backbone, or a folder with them.
    force : bool, default=False
        Whether to accept ImageNet weights other than the published ones.
    run_id : str
        Identifier of the run, see :func:`new_run_id`.

    Raises
    ------
    ConfigError
        If a value is not allowed.
    """

    bids_dir: Path
    output_dir: Path
    levels: Annotated[tuple[Annotated[str, OneOf(*LEVELS, SCANS)], ...], Items()]
    work_dir: Path
    scans: tuple[Text, ...] = ()
    participants: tuple[Label, ...] = ()
    sessions: tuple[Label, ...] = ()
    filter_file: Path | None = None
    database_dir: Path | None = None
    derivatives: dict[Text, Path] = field(default_factory=dict)
    modalities: Annotated[tuple[Modality, ...], Items()] = MODALITIES
    models: tuple[Text, ...] = ()
    deviations: tuple[Annotated[str, OneOf(*DEVIATIONS)], ...] = ()
    atlas_dir: Path | None = None
    brain_extraction: Annotated[str, OneOf(*EXTRACTIONS)] = EXTRACTIONS[0]
    extraction_weights: Path | None = None
    output_spaces: tuple[SpaceName, ...] = ()
    min_lesion_size: NonNegative | None = None
    min_counted_volume: NonNegative = DEFAULT_MIN_COUNTED_VOLUME
    device: Device = "auto"
    precision: Annotated[str, OneOf(*PRECISIONS)] = "auto"
    batch_size: Count | None = None
    compiled: bool = False
    random_seed: Seed = 0
    nprocs: Count = 1
    omp_nthreads: Count = 1
    mem_gb: Positive = 8.0
    n_gpu_procs: Count = 1
    low_mem: bool = False
    plugin_file: Path | None = None
    clean_workdir: bool = False
    no_viewer: bool = False
    md_only_boilerplate: bool = False
    resource_monitor: bool = False
    write_graph: bool = False
    keep_workdir: bool = False
    stop_on_first_crash: bool = False
    reports_only: bool = False
    dry_run: bool = False
    verbosity: CountOrZero = 0
    detector: Text | None = None
    preset: Text = "default"
    modality: Modality | None = None
    steps: Count | None = None
    hyper: tuple[Text, ...] = ()
    experiments: dict[Text, Path] = field(default_factory=dict)
    cohort: Text | None = None
    subgroups: tuple[Text, ...] = DEFAULT_SUBGROUPS
    train_fraction: Annotated[float, Interval(0, 1, closed="right")] = 1.0
    synthetic: CountOrZero = 0
    contrast_transfer: bool = False
    label_maps: tuple[Text, ...] = ()
    lesion_masks: Path | None = None
    normative_dir: Path | None = None
    decision_rule: Annotated[str, OneOf(*DECISION_RULES)] | None = None
    num_devices: Count = 1
    num_nodes: Count = 1
    backbone_weights: Path | None = None
    force: bool = False
    run_id: Text = field(default_factory=new_run_id)

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except InvalidParameterError as error:
            raise ConfigError(str(error)) from None

    def to_toml(self) -> str:
        """Return the configuration as TOML text, without options that are not set."""
        import tomli_w

        content: dict[str, Any] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if value is None:
                continue
            if isinstance(value, Path):
                value = str(value)
            elif isinstance(value, tuple):
                value = list(value)
            elif isinstance(value, dict):
                value = {name: str(path) for name, path in value.items()}
            content[item.name] = value
        return tomli_w.dumps(content)

    @classmethod
    def from_toml(cls, text: str) -> RunConfig:
        """Read a configuration from the text of :meth:`to_toml`, see :func:`read_fields`."""
        return cls(**read_fields(text))


def read_fields(text: str) -> dict[str, Any]:
    """Read fields of :class:`RunConfig` from TOML.

    Parameters
    ----------
    text : str
        TOML text without tables; keys are fields of :class:`RunConfig`, also those of `RENAMED_FIELDS`.

    Returns
    -------
    dict
        Values of the fields in the text.

    Raises
    ------
    ConfigError
        If the text is not TOML, a key is unknown or a value is not allowed.
    """
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the configuration file is not valid TOML: {error}") from error
    content = {RENAMED_FIELDS.get(name, name): value for name, value in content.items()}
    allowed = annotations(RunConfig)
    unknown = sorted(set(content) - set(allowed))
    if unknown:
        raise ConfigError(f"unknown key in the configuration file: {', '.join(unknown)}")
    kinds = get_type_hints(RunConfig)
    values = {name: _converted(value, kinds[name]) for name, value in content.items()}
    for name, value in values.items():
        if not allows(allowed[name], value):
            raise ConfigError(
                f"The {name!r} key of the configuration file must be {describe(allowed[name])}. "
                f"Got {content[name]!r} instead."
            )
    return values


def _converted(value: Any, kind: Any) -> Any:
    """Convert a TOML value to the type of a field: text to path, array to tuple, int to float."""
    kinds = (kind, *get_args(kind))
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, dict):
        return {key: _converted(item, Path) for key, item in value.items()}
    if Path in kinds and isinstance(value, str):
        return Path(value)
    if float in kinds and type(value) is int:
        return float(value)
    return value


class Parser(argparse.ArgumentParser):
    """Parser of all commands, which suggests the nearest option for an unknown one; no abbreviations."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, args=None, namespace=None):
        """Parse arguments as argparse does, after a check of the options' names."""
        # Checked first, since argparse takes the value of an unknown option for a positional argument.
        for argument in sys.argv[1:] if args is None else args:
            name = argument.partition("=")[0]
            if argument == "--":
                break
            if name.startswith("--") and name not in self._option_string_actions:
                self.error(f"unknown option {name}; {self._suggestion(name)}")
        return super().parse_known_args(args, namespace)

    def _suggestion(self, name: str) -> str:
        options = self._option_string_actions.items()
        known = [option for option, action in options if action.help != argparse.SUPPRESS]
        nearest = get_close_matches(name.lower(), known, n=1)
        return f"did you mean {nearest[0]}?" if nearest else "--help lists all options"
