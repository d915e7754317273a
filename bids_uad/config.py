"""One frozen description of a run: what was asked for, resolved once, written beside the results."""

from __future__ import annotations

import dataclasses
import tomllib
import uuid
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from bids_uad.errors import ConfigError

DEFAULT_STRATA = ("sex", "age", "scanner", "scanner_seen", "lesion load")
LEVELS = ("participant", "train", "calibrate", "group")
"""Analysis levels in the order they run when several are asked for in one call."""

MODALITIES = ("T1w", "T2w")

PRECISIONS = ("auto", "fp32", "bf16")

DEVIATIONS = ("none", "normative")
"""Scores as they are, or their deviation from healthy people of the same age and sex."""

RUN_SPECIFIC = frozenset(
    {"bids_dir", "output_dir", "levels", "run_id", "dry_run", "reports_only", "verbosity"}
)
"""Fields that a configuration file of an earlier run does not hand on."""


def new_run_id() -> str:
    """Name a run: `YYYYmmdd-HHMMSS_<uuid4>`, sortable and unique."""
    return f"{datetime.now():%Y%m%d-%H%M%S}_{uuid.uuid4()}"


@dataclass(frozen=True)
class RunConfig:
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
    strata : tuple of str
        What `group` divides the cohort by: columns of participants.tsv, sessions.tsv or scans.tsv, fields of
        the raw images' sidecars, and `lesion load`.
    train_fraction : float
        Share of the training subjects that is learnt from.
    synthetic : int
        Healthy subjects that are simulated to learn from.
    recontrast : bool
        Learn from healthy T1w scans, too, with the contrast of T2w.
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
    """

    bids_dir: Path
    output_dir: Path
    levels: tuple[str, ...]
    work_dir: Path
    participants: tuple[str, ...] = ()
    sessions: tuple[str, ...] = ()
    filter_file: Path | None = None
    derivatives: dict[str, Path] = field(default_factory=dict)
    modalities: tuple[str, ...] = MODALITIES
    models: tuple[str, ...] = ()
    deviations: tuple[str, ...] = ()
    atlas_dir: Path | None = None
    brain_extraction: str = "combined"
    extraction_weights: Path | None = None
    device: str = "auto"
    precision: str = "auto"
    batch_size: int | None = None
    compiled: bool = False
    random_seed: int = 0
    nprocs: int = 1
    omp_nthreads: int = 1
    mem_gb: float = 8.0
    n_gpu_procs: int = 1
    plugin_file: Path | None = None
    clean_workdir: bool = False
    stop_on_first_crash: bool = False
    reports_only: bool = False
    dry_run: bool = False
    verbosity: int = 0
    detector: str | None = None
    preset: str = "default"
    modality: str | None = None
    steps: int | None = None
    hyper: tuple[str, ...] = ()
    experiments: dict[str, Path] = field(default_factory=dict)
    cohort: str | None = None
    strata: tuple[str, ...] = DEFAULT_STRATA
    train_fraction: float = 1.0
    synthetic: int = 0
    recontrast: bool = False
    label_maps: tuple[str, ...] = ()
    normative_dir: Path | None = None
    num_devices: int = 1
    num_nodes: int = 1
    backbone_weights: Path | None = None
    run_id: str = field(default_factory=new_run_id)

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
        If the text is no TOML, a key is unknown or a value has the wrong type.
    """
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the configuration file is not valid TOML: {error}") from error
    known = {item.name: str(item.type) for item in dataclasses.fields(RunConfig)}
    unknown = sorted(set(content) - set(known))
    if unknown:
        raise ConfigError(f"unknown key in the configuration file: {', '.join(unknown)}")
    return {name: _typed(name, value, known[name]) for name, value in content.items()}


def _typed(name: str, value: Any, annotation: str) -> Any:
    """Convert one TOML value to the type that the field declares."""
    kind = annotation.removesuffix(" | None")
    if kind == "Path" and isinstance(value, str):
        return Path(value)
    if kind.startswith("tuple") and isinstance(value, list) and all(isinstance(v, str) for v in value):
        return tuple(value)
    if (
        kind.startswith("dict")
        and isinstance(value, dict)
        and all(isinstance(v, str) for v in value.values())
    ):
        return {key: Path(path) for key, path in value.items()}
    if kind == "float" and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    plain = {"str": str, "int": int, "bool": bool}
    if kind in plain and type(value) is plain[kind]:
        return value
    raise ConfigError(f"the configuration file gives {name} a value of the wrong kind: {value!r}")
