"""One frozen description of a run: what was asked for, resolved once, written beside the results."""

from __future__ import annotations

import dataclasses
import tomllib
import uuid
from dataclasses import dataclass, field
from datetime import datetime
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
"""Analysis levels in the order they run when several are asked for in one call."""

MODALITIES = ("T1w", "T2w")

PRECISIONS = ("auto", "fp32", "bf16")

EXTRACTIONS = ("combined", "template", "network", "synthstrip", "hd-bet")
"""Methods of brain extraction: three are built in, two are programs that the user has installed."""

DEFAULT_MIN_LESION_VOLUME = 3.0
"""Least volume in mm3 of a lesion that is counted, as in the MSSEG challenge (Commowick et al. 2018)."""

DEVIATIONS = ("none", "normative")
"""Scores as they are, or their deviation from healthy people of the same age and sex."""

RENAMED_DETECTORS = {"fpi": "pls"}
"""Detectors by the names that they had before; command line and model bundles may still use these."""

RENAMED_FIELDS = {"strata": "subgroups", "recontrast": "contrast_transfer"}
"""Deprecated keys of configuration files, and the fields that they set."""

RUN_SPECIFIC = frozenset(
    {"bids_dir", "output_dir", "levels", "run_id", "dry_run", "reports_only", "verbosity"}
)
"""Fields that a configuration file of an earlier run does not hand on."""


Text = Annotated[str, Matches(r"(?s).+", "a str that is not empty")]
Label = Annotated[str, Matches("[0-9a-zA-Z+]+", "a BIDS label (letters and digits)")]
Modality = Annotated[str, OneOf(*MODALITIES)]
Device = Annotated[str, Matches(r"auto|cpu|cuda(:\d+)?", "one of auto, cpu, cuda, cuda:N")]
Seed = Annotated[int, Interval(0, 2**32 - 1)]


def new_run_id() -> str:
    """Name a run: `YYYYmmdd-HHMMSS_<uuid4>`, sortable and unique."""
    return f"{datetime.now():%Y%m%d-%H%M%S}_{uuid.uuid4()}"


@dataclass(frozen=True)
class RunConfig(Constrained):
    """Everything a level needs to know about the run.

    Paths are absolute. Sequences are tuples, so that the whole can be shared between processes without
    anybody changing it.

    Parameters
    ----------
    bids_dir, output_dir, work_dir : pathlib.Path
        Raw dataset, derivatives, scratch.
    levels : tuple of str
        Any of `LEVELS`.
    participants, sessions : tuple of str
        Labels without `sub-`/`ses-`; empty means all.
    filter_file : pathlib.Path, optional
        JSON with BIDS entity filters, keys `t1w` and `t2w`.
    derivatives : dict of str to pathlib.Path
        Other derivative datasets by name (`lesions` holds lesion masks).
    modalities : tuple of str
        Image suffixes that anomalies are looked for in.
    models : tuple of str
        Names of packaged bundles or paths; empty means the best packaged ones, `("all",)` every
        packaged one, `("none",)` preprocessing only.
    deviations : tuple of str
        Any of `DEVIATIONS`: what maps are made of; empty means what is usual for each model.
    atlas_dir : pathlib.Path, optional
        Where `tpl-SRI24` lies.
    brain_extraction : str
        What finds brains in whole heads: `combined`, `template`, `network`, `synthstrip` or `hd-bet`.
    extraction_weights : pathlib.Path, optional
        Weights of that network or program.
    min_lesion_volume : float
        Least volume in mm3 of lesions that are counted, and of false components.
    device : str
        `auto`, `cpu`, `cuda` or `cuda:N`.
    precision : str
        `auto`, `fp32` or `bf16`: arithmetic of the detectors' networks.
    batch_size : int, optional
        Slices that are scored, or learnt from, at once.
    compiled : bool
        Compile the detectors' networks.
    random_seed : int
        Seed of everything that is drawn.
    nprocs, omp_nthreads : int
        Processes in all, and threads of one process.
    mem_gb : float
        Memory that may be used, in GB.
    n_gpu_procs : int
        Detections at a time on GPUs.
    plugin_file : pathlib.Path, optional
        YAML that names a nipype plugin and its arguments.
    detector, preset, modality, steps
        What `train` and `calibrate` work on.
    experiments : dict of str to pathlib.Path
        Outputs of other models on the same images, by name, that `group` compares with its own.
    cohort : str, optional
        Column of participants.tsv whose values are the cohorts of `group`; `pathology` if not given.
    subgroups : tuple of str
        What `group` divides the cohort by: columns of participants.tsv, sessions.tsv or scans.tsv, fields of
        the raw images' sidecars, and `lesion load`.
    train_fraction : float
        Share of the training subjects that is learnt from.
    synthetic : int
        Healthy subjects that are simulated to learn from.
    contrast_transfer : bool
        Also train on T1w scans of healthy controls that are mapped to T2w contrast.
    label_maps : tuple of str
        Label maps and folders of them that they are simulated from; empty means the built-in template.
    normative_dir : pathlib.Path, optional
        Preprocessed scans of healthy people beside those of `bids_dir`, for the normative reference alone.
    num_devices, num_nodes : int
        Devices of a node, and nodes, that share a training.
    hyper : tuple of str
        Hyper-parameters to change, `NAME=VALUE`.
    backbone_weights : pathlib.Path, optional
        Weights of a backbone that comes trained on ImageNet, or a folder that holds them.

    Raises
    ------
    ConfigError
        If a value is not allowed.
    """

    bids_dir: Path
    output_dir: Path
    levels: Annotated[tuple[Annotated[str, OneOf(*LEVELS)], ...], Items()]
    work_dir: Path
    participants: tuple[Label, ...] = ()
    sessions: tuple[Label, ...] = ()
    filter_file: Path | None = None
    derivatives: dict[Text, Path] = field(default_factory=dict)
    modalities: Annotated[tuple[Modality, ...], Items()] = MODALITIES
    models: tuple[Text, ...] = ()
    deviations: tuple[Annotated[str, OneOf(*DEVIATIONS)], ...] = ()
    atlas_dir: Path | None = None
    brain_extraction: Annotated[str, OneOf(*EXTRACTIONS)] = EXTRACTIONS[0]
    extraction_weights: Path | None = None
    min_lesion_volume: NonNegative = DEFAULT_MIN_LESION_VOLUME
    device: Device = "auto"
    precision: Annotated[str, OneOf(*PRECISIONS)] = "auto"
    batch_size: Count | None = None
    compiled: bool = False
    random_seed: Seed = 0
    nprocs: Count = 1
    omp_nthreads: Count = 1
    mem_gb: Positive = 8.0
    n_gpu_procs: Count = 1
    plugin_file: Path | None = None
    clean_workdir: bool = False
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
    normative_dir: Path | None = None
    num_devices: Count = 1
    num_nodes: Count = 1
    backbone_weights: Path | None = None
    run_id: Text = field(default_factory=new_run_id)

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except InvalidParameterError as error:
            raise ConfigError(str(error)) from None

    def to_toml(self) -> str:
        """Write the configuration as TOML text; options that are not set are left out."""
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
        """Rebuild a configuration from :meth:`to_toml`'s text.

        Raises
        ------
        ConfigError
            If the text is no TOML or holds an unknown key.
        """
        return cls(**read_fields(text))


def read_fields(text: str) -> dict[str, Any]:
    """Parse TOML text into values of the right types for :class:`RunConfig`.

    Parameters
    ----------
    text : str
        Flat TOML, keys named as the fields of :class:`RunConfig`.

    Returns
    -------
    dict
        Only the fields that the text holds.

    Raises
    ------
    ConfigError
        If the text is no TOML, a key is unknown or a value is not allowed.
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
    found = {name: _converted(value, kinds[name]) for name, value in content.items()}
    for name, value in found.items():
        if not allows(allowed[name], value):
            raise ConfigError(
                f"The {name!r} key of the configuration file must be {describe(allowed[name])}. "
                f"Got {content[name]!r} instead."
            )
    return found


def _converted(value: Any, kind: Any) -> Any:
    """Convert a TOML value to what a field holds: paths from texts, tuples from arrays, floats from ints."""
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
