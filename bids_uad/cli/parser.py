"""The command line, spelt as fMRIPrep spells it wherever fMRIPrep has the flag."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import os
import re
from collections.abc import Sequence
from pathlib import Path

from bids_uad import __version__
from bids_uad.config import (
    DEVIATIONS,
    EXTRACTIONS,
    LEVELS,
    MODALITIES,
    PRECISIONS,
    RENAMED_DETECTORS,
    RUN_SPECIFIC,
    Device,
    Label,
    RunConfig,
    read_fields,
)
from bids_uad.constraints import NonNegative, allows
from bids_uad.errors import ConfigError, unreadable
from bids_uad.resources import available_cpus, available_memory_gb, parse_memory

FOLDERS = ("derivatives", "experiments")
"""Options that name folders, `NAME=PATH`."""


class _Help(argparse.HelpFormatter):
    """Names the value of an option once, and leaves out the spellings with underscores."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        names = [name for name in action.option_strings if "_" not in name]
        return f"{', '.join(names)} {self._format_args(action, action.dest.upper())}"


def build_parser() -> argparse.ArgumentParser:
    """Build the argument parser; every flag in it does something, except the hidden `--notrack`."""
    parser = argparse.ArgumentParser(
        prog="bids_uad",
        usage="%(prog)s BIDS_DIR OUTPUT_DIR LEVEL [LEVEL ...] [options]",
        description=(
            "Find what does not belong in a brain MRI with models that have only learnt what healthy "
            "looks like. Research software, not for clinical use."
        ),
        epilog="Exit codes: 0 all done, 1 a participant or report failed, 2 wrong usage, 66 nothing to work "
        "on, 69 GPU, model or atlas not available, 70 the workflow could not be built, 73 a folder cannot be "
        "written (disk full, read-only).",
        argument_default=argparse.SUPPRESS,
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.add_argument("bids_dir", type=Path, help="root of the BIDS dataset")
    parser.add_argument("output_dir", type=Path, help="where the derivatives go")
    parser.add_argument(
        "levels",
        metavar="analysis_level",
        nargs="+",
        choices=LEVELS,
        help="one or more of: participant, group, train, calibrate",
    )
    parser.add_argument("--version", action="version", version=f"bids_uad {__version__}")

    pick = parser.add_argument_group("what to work on")
    pick.add_argument(
        "--participant-label", "--participant_label", dest="participants", nargs="+", metavar="LABEL",
        type=_label("sub-"), help="participants to process, with or without 'sub-' (default: all)",
    )  # fmt: skip
    pick.add_argument(
        "--session-label", "--session_label", "--session-id", dest="sessions", nargs="+", metavar="LABEL",
        type=_label("ses-"), help="sessions to process, with or without 'ses-' (default: all)",
    )  # fmt: skip
    pick.add_argument(
        "--bids-filter-file", dest="filter_file", type=Path, metavar="FILE",
        help="JSON with entity filters under the keys 't1w' and 't2w'; null: the entity must be absent, "
        "'*': any value. Other keys are ignored",
    )  # fmt: skip
    pick.add_argument(
        "-d", "--derivatives", nargs="+", action="extend", metavar="NAME=PATH",
        help="other derivative datasets: 'lesions=PATH' gives lesion masks to compare with, any other (such "
        "as 'fmriprep=PATH') preprocessed images, brain masks and transforms to take over",
    )  # fmt: skip
    pick.add_argument(
        "--modalities",
        nargs="+",
        choices=MODALITIES,
        help="images to look for anomalies in (default: T1w T2w)",
    )
    pick.add_argument(
        "--models", nargs="+", metavar="NAME|PATH",
        help="model bundles, by packaged name or path (default: the best packaged ones; 'all': all of them; "
        "'none': only preprocess)",
    )  # fmt: skip
    pick.add_argument(
        "--deviation", dest="deviations", nargs="+", choices=DEVIATIONS,
        help="make maps of the scores themselves ('none'), of their deviation from what healthy people of "
        "the same age and sex (participants.tsv) have at that place ('normative'), or both (default: "
        "normative for pls, which finds more so, none for the others)",
    )  # fmt: skip
    pick.add_argument("--atlas-dir", type=Path, metavar="PATH", help="folder that holds tpl-SRI24")
    pick.add_argument(
        "--brain-extraction", choices=EXTRACTIONS, metavar="NAME",
        help="what finds the brain in whole heads without a brain mask: registration of the 'template', a "
        "'network', both ('combined', the default), or 'synthstrip' or 'hd-bet' that you have installed",
    )  # fmt: skip
    pick.add_argument(
        "--brain-extraction-weights", dest="extraction_weights", type=Path, metavar="PATH",
        help="its weights, where they are not packaged: a trained weights.safetensors, "
        "SynthStrip's file, or HD-BET's folder hd-bet_params",
    )  # fmt: skip

    pick.add_argument(
        "--min-lesion-volume", type=_volume, metavar="MM3",
        help="least volume of a lesion in mm3: smaller ones, and smaller false components, are not counted; "
        "0 counts all (default: 3, as in the MSSEG challenge; BraTS uses 50)",
    )  # fmt: skip

    means = parser.add_argument_group("means")
    means.add_argument(
        "--nprocs", "--nthreads", "--n-cpus", "--n_cpus", type=_positive, metavar="N",
        help="CPUs in all (default: as many as this process was granted)",
    )  # fmt: skip
    means.add_argument(
        "--omp-nthreads", type=_positive, metavar="N",
        help="threads of one step (default: 1, which repeats to the bit)",
    )  # fmt: skip
    means.add_argument(
        "--mem", "--mem-mb", "--mem_mb", dest="mem_gb", type=_memory, metavar="SIZE",
        help="memory in all: 16G, 1.5GB, or a bare number in MB (default: what was granted)",
    )  # fmt: skip
    means.add_argument(
        "--device", type=_device, metavar="{auto,cpu,cuda,cuda:N}",
        help="where detectors run; 'auto' takes a GPU when there is one (default: auto)",
    )  # fmt: skip
    means.add_argument(
        "--precision", choices=PRECISIONS,
        help="arithmetic of the networks: 'fp32' repeats to the bit on one machine, 'bf16' is faster; 'auto' "
        "takes bf16 on GPUs that have it, and fp32 elsewhere (default: auto)",
    )  # fmt: skip
    means.add_argument(
        "--batch-size", type=_positive, metavar="N",
        help="slices at once (default: what fits; for train, the preset's)",
    )  # fmt: skip
    means.add_argument(
        "--compile", dest="compiled", action="store_true",
        help="compile the networks (torch.compile); the first scan waits a minute for it",
    )  # fmt: skip
    means.add_argument(
        "--n-gpu-procs", "--n_gpu_procs", type=_positive, metavar="N",
        help="images at a time on the GPU (default: 1)",
    )  # fmt: skip
    means.add_argument(
        "--use-plugin", "--nipype-plugin-file", dest="plugin_file", type=Path, metavar="FILE",
        help="YAML with a nipype plugin (MultiProc, SLURM or SLURMGraph) and its plugin_args",
    )  # fmt: skip
    means.add_argument("--random-seed", "--seed", type=int, metavar="N", help="seed (default: 0)")

    control = parser.add_argument_group("run control")
    control.add_argument("-w", "--work-dir", type=Path, metavar="PATH", help="scratch space (./work)")
    control.add_argument(
        "--clean-workdir", action="store_true",
        help="empty the scratch space before the run, and after it if all went well",
    )  # fmt: skip
    control.add_argument(
        "--stop-on-first-crash", action="store_true", help="stop at the first failure instead of going on"
    )
    control.add_argument(
        "--config-file", type=Path, metavar="FILE", help="TOML of an earlier run; the command line wins"
    )
    control.add_argument("--reports-only", action="store_true", help="only write participant reports again")
    control.add_argument("--dry-run", action="store_true", help="list what would be done, and stop")
    control.add_argument(
        "-v", "--verbose", dest="verbosity", action="count", help="say more; -vv adds tracebacks"
    )
    control.add_argument("--notrack", action="store_true", help=argparse.SUPPRESS)

    study = parser.add_argument_group("group")
    study.add_argument(
        "--cohort", metavar="COLUMN",
        help="column of participants.tsv whose values are the cohorts of the benchmark (default: pathology)",
    )  # fmt: skip
    study.add_argument(
        "--subgroups", nargs="+", metavar="COLUMN",
        help="what divides the cohort: columns of participants.tsv, sessions.tsv or scans.tsv, fields of the "
        "raw images' sidecars, and 'lesion load' (default: sex age scanner scanner_seen 'lesion load')",
    )  # fmt: skip

    study.add_argument(
        "--strata", dest="subgroups", nargs="+", help=argparse.SUPPRESS,  # deprecated
    )  # fmt: skip
    study.add_argument(
        "--experiments", nargs="+", action="extend", metavar="NAME=PATH",
        help="outputs of other models on the same images (fewer training subjects, other hyper-parameters) "
        "to compare with those in OUTPUT_DIR",
    )  # fmt: skip

    models = parser.add_argument_group("train and calibrate")
    models.add_argument("--detector", metavar="NAME", type=_detector, help="detector to train")
    models.add_argument("--preset", metavar="NAME", help="paper, default or lite (default: default)")
    models.add_argument("--modality", choices=MODALITIES, help="images to train on")
    models.add_argument(
        "--hyper", nargs="+", action="extend", metavar="NAME=VALUE",
        help="hyper-parameters of the preset to change, such as stride=4; with calibrate, those of a trained "
        "model that its weights do not depend on",
    )  # fmt: skip
    models.add_argument(
        "--train-fraction", type=_fraction, metavar="F",
        help="learn from this share of the subjects; a smaller share is part of a larger (default: 1)",
    )  # fmt: skip
    models.add_argument(
        "--synthetic", type=_positive, metavar="N",
        help="simulate N healthy subjects, and learn from them, too; BIDS_DIR may then be 'none'",
    )  # fmt: skip
    models.add_argument(
        "--recontrast", action="store_true",
        help="with --modality T2w: learn from the T1w scans of BIDS_DIR, too, given the contrast of T2w",
    )  # fmt: skip
    models.add_argument(
        "--labelmaps", dest="label_maps", nargs="+", metavar="PATH",
        help="label maps, or folders of *_dseg.nii.gz, to simulate from (default: the built-in template)",
    )  # fmt: skip
    models.add_argument(
        "--normative-dir", type=Path, metavar="PATH",
        help="with calibrate: more healthy people, preprocessed, for the normative reference alone",
    )  # fmt: skip
    models.add_argument(
        "--num-devices", type=_positive, metavar="N",
        help="GPUs (or CPU processes) per node that share a training (default: 1)",
    )  # fmt: skip
    models.add_argument("--num-nodes", type=_positive, metavar="N", help="nodes that do so (default: 1)")
    models.add_argument("--steps", type=_positive, metavar="N", help="training steps (default: preset's)")
    models.add_argument(
        "--backbone-weights",
        type=Path,
        metavar="PATH",
        help="torchvision's weights (.pth, .safetensors) or a folder that holds them, for presets that look "
        "at ImageNet features",
    )
    return parser


def parse_args(argv: Sequence[str] | None = None) -> RunConfig:
    """Turn the command line into a checked run configuration.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments; the process's own by default.

    Returns
    -------
    RunConfig

    Raises
    ------
    ConfigError
        If the arguments ask for something impossible.
    SystemExit
        Code 2 on malformed arguments, code 0 after `--help` and `--version`.
    """
    given = vars(build_parser().parse_args(argv))
    given.pop("notrack", None)
    config_file = given.pop("config_file", None)
    values = {} if config_file is None else _earlier(config_file)
    for name in (
        "participants",
        "sessions",
        "modalities",
        "models",
        "deviations",
        "hyper",
        "label_maps",
        "subgroups",
    ):
        if name in given:
            given[name] = tuple(dict.fromkeys(given[name]))
    for name in FOLDERS:
        if name in given:
            given[name] = parse_folders(given[name], f"--{name}")
    given["levels"] = tuple(level for level in LEVELS if level in given["levels"])
    values.update(given)
    values.setdefault("work_dir", Path("work"))
    values.setdefault("nprocs", available_cpus())
    values.setdefault("mem_gb", available_memory_gb())
    for item in dataclasses.fields(RunConfig):
        if isinstance(values.get(item.name), Path):
            values[item.name] = values[item.name].expanduser().resolve()
    for name in FOLDERS:
        values[name] = {key: path.expanduser().resolve() for key, path in values.get(name, {}).items()}
    config = RunConfig(**values)
    check(config)
    return config


def parse_folders(items: Sequence[str], flag: str) -> dict[str, Path]:
    """Read `NAME=PATH` items; a bare path is named after its folder.

    Parameters
    ----------
    items : sequence of str
        Only the first `=` separates, and only when a plain name stands before it, so that paths may
        hold the sign.
    flag : str
        Where they were given.

    Returns
    -------
    dict of str to pathlib.Path

    Raises
    ------
    ConfigError
        If a name comes twice, or is that of the raw dataset.
    """
    found: dict[str, Path] = {}
    for item in items:
        name, sign, path = item.partition("=")
        if not sign or not re.fullmatch(r"[0-9a-zA-Z_-]+", name):
            path = item
            # The name becomes a part of BIDS URIs.
            name = re.sub(r"[^0-9a-zA-Z_.-]+", "-", Path(item).resolve().name).strip("-")
        if not path:
            raise ConfigError(f"{flag} {item}: no path after the '='")
        if not name or (flag == "--derivatives" and name == "raw"):
            raise ConfigError(f"{flag} {item}: '{name}' cannot be the name of it; name it: NAME=PATH")
        if name in found:
            raise ConfigError(f"{flag} gives '{name}' twice; name them apart: NAME=PATH")
        found[name] = Path(path)
    return found


def check(config: RunConfig) -> None:
    """Refuse impossible combinations before anything is written.

    Raises
    ------
    ConfigError
        Naming the path or flag at fault.
    InputError
        If the dataset cannot be read.
    """
    if config.output_dir == config.bids_dir:
        raise ConfigError(
            f"the output folder is the dataset itself ({config.bids_dir}); "
            f"use for example {config.bids_dir / 'derivatives' / 'bids_uad'}"
        )
    for name, folder in (("work", config.work_dir), ("output", config.output_dir)):
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"the {name} folder is not a folder: {folder}")
    if config.bids_dir.is_dir() and not os.access(config.bids_dir, os.R_OK | os.X_OK):
        raise unreadable(config.bids_dir, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    if config.work_dir.is_relative_to(config.bids_dir):
        raise ConfigError(
            f"the work folder {config.work_dir} lies inside the dataset {config.bids_dir}; "
            "choose another with -w"
        )
    if config.output_dir.is_relative_to(config.work_dir):
        raise ConfigError(
            f"the output folder {config.output_dir} lies inside the work folder {config.work_dir}"
        )
    if "participant" in config.levels:
        if not config.bids_dir.is_dir():
            raise ConfigError(f"the dataset folder does not exist: {config.bids_dir}")
        if not (config.bids_dir / "dataset_description.json").is_file():
            raise ConfigError(
                f"{config.bids_dir} has no dataset_description.json; is it the root of a BIDS dataset?"
            )
    if config.levels == ("group",) and not config.output_dir.is_dir():
        raise ConfigError(f"there is nothing to group: {config.output_dir} does not exist")
    for path, flag in (
        (config.filter_file, "--bids-filter-file"),
        (config.plugin_file, "--use-plugin"),
        (config.atlas_dir, "--atlas-dir"),
        (config.backbone_weights, "--backbone-weights"),
        (config.normative_dir, "--normative-dir"),
    ):
        if path is not None and not path.exists():
            raise ConfigError(f"{flag} {path} does not exist")
    for flag in FOLDERS:
        for name, path in getattr(config, flag).items():
            if not path.is_dir():
                raise ConfigError(f"--{flag} {name}={path}: no such folder")
    if config.output_dir in config.experiments.values():
        raise ConfigError(f"--experiments names the output folder itself ({config.output_dir})")


def _earlier(config_file: Path) -> dict:
    """Read the fields that an earlier run hands on."""
    if not config_file.is_file():
        raise ConfigError(f"--config-file {config_file} does not exist")
    try:
        text = config_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config-file {config_file} cannot be read: {error}") from error
    fields = read_fields(text)
    return {name: value for name, value in fields.items() if name not in RUN_SPECIFIC}


def _label(prefix: str):
    def convert(text: str) -> str:
        label = text.removeprefix(prefix)
        if not allows(Label, label):
            raise argparse.ArgumentTypeError(f"'{text}' is no BIDS label (letters and digits)")
        return label

    return convert


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"'{text}' is no positive whole number")
    return int(text)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no share between 0 and 1")
    return value


def _volume(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not allows(NonNegative, value):
        raise argparse.ArgumentTypeError(f"'{text}' is no volume in mm3 (0 or more)")
    return value


def _memory(text: str) -> float:
    try:
        return parse_memory(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _detector(text: str) -> str:
    return RENAMED_DETECTORS.get(text, text)


def _device(text: str) -> str:
    if not allows(Device, text):
        raise argparse.ArgumentTypeError(f"'{text}' is none of auto, cpu, cuda, cuda:N")
    return text
