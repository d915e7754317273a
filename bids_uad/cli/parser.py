"""Options of the command line, with fMRIPrep's names where fMRIPrep has the option."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bids_uad import __version__
from bids_uad.config import (
    DECISION_RULES,
    DEVIATIONS,
    EXTRACTIONS,
    LEVELS,
    MODALITIES,
    NIFTI_EXTENSION,
    PRECISIONS,
    RENAMED_DETECTORS,
    RUN_SPECIFIC,
    SCANS,
    Device,
    Label,
    Parser,
    RunConfig,
    SpaceName,
    read_fields,
)
from bids_uad.constraints import NonNegative, allows, describe
from bids_uad.errors import ConfigError, ExitCode, unreadable
from bids_uad.resources import available_cpus, available_memory_gb, parse_memory

FOLDERS = ("derivatives", "experiments")
"""Options that name folders, `NAME=PATH`."""
SEQUENCES = (
    "participants", "sessions", "modalities", "models", "deviations", "hyper", "label_maps", "subgroups",
    "scans", "output_spaces",
)  # fmt: skip
"""Options that take several values; duplicates are dropped."""

WITHOUT_EFFECT = ("notrack", "skip_bids_validation", "output_layout")
"""Options of fMRIPrep that are accepted and checked, but change nothing."""
SUBCOMMANDS = ("train", "calibrate", "simulate", "atlas", "extraction")
"""First argument of a command line that does not name a dataset for the participant or group level."""
TRAINING = ("train", "calibrate")

USAGE = """bids_uad BIDS_DIR OUTPUT_DIR {participant,group} ... [options]
       bids_uad SCAN.nii.gz ... OUTPUT_DIR [options]
       bids_uad {train,calibrate,simulate,atlas,extraction} --help"""
EXIT_CODES = f"Exit codes: {'; '.join(f'{code} {code.meaning}' for code in ExitCode)}."


class LongHelp(argparse.HelpFormatter):
    """Help with the full text of each option, without deprecated spellings with underscores."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        text = super()._format_args(action, default_metavar)
        return f"{text.partition(' ')[0]} ..." if action.nargs == argparse.ONE_OR_MORE else text

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = ", ".join(self._names(action))
        return names if action.nargs == 0 else f"{names} {self._format_args(action, action.dest.upper())}"

    def _names(self, action: argparse.Action) -> list[str]:
        return [name for name in action.option_strings if "_" not in name]


class ShortHelp(LongHelp):
    """Help that fits one screen: the first name and the first sentence of each option."""

    def _names(self, action: argparse.Action) -> list[str]:
        names = super()._names(action)
        first_long = next(name for name in names if name.startswith("--"))
        return [*(name for name in names if not name.startswith("--")), first_long]

    def _expand_help(self, action: argparse.Action) -> str:
        return super()._expand_help(action).partition(". ")[0]


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the participant and group levels.

    It also accepts the deprecated levels `train` and `calibrate` with their options, which its help omits.

    Returns
    -------
    argparse.ArgumentParser
        Options without a value on the command line are absent from its namespace.
    """
    parser = Parser(
        prog="bids_uad",
        usage=USAGE,
        description="Detect anomalies in T1w, T2w and FLAIR brain MRI. Not for clinical use. See "
        "docs/command_line.md.",
        epilog=EXIT_CODES,
        argument_default=argparse.SUPPRESS,
        formatter_class=ShortHelp,
        add_help=False,
    )
    inputs = parser.add_argument_group("inputs")
    inputs.add_argument("bids_dir", type=Path, help="root of the BIDS dataset")
    inputs.add_argument("output_dir", type=Path, help="folder of the derivatives")
    inputs.add_argument(
        "levels", metavar="{participant,group}", nargs="+", choices=LEVELS, help="analysis level, or both"
    )
    _add_input_options(inputs)
    _add_detection_options(parser.add_argument_group("preprocessing and detection"))
    resources = parser.add_argument_group("resources")
    _add_resource_options(resources)
    _add_scheduling_options(resources)
    control = parser.add_argument_group("run control")
    _add_control_options(control)
    _add_run_options(control)
    control.add_argument("-h", "--help", action="help", help="show this help and exit")
    control.add_argument(
        "--version", action="version", version=f"bids_uad {__version__}", help="show the version and exit"
    )
    _add_group_options(parser.add_argument_group("group level"))
    hidden = parser.add_argument_group("deprecated levels")
    _add_training_options(hidden, *TRAINING)
    for action in hidden._group_actions:
        action.help = argparse.SUPPRESS
    return parser


def build_scans_parser() -> argparse.ArgumentParser:
    """Build the parser of command lines that name scans instead of a dataset and levels.

    Returns
    -------
    argparse.ArgumentParser
        Options without a value on the command line are absent from its namespace.
    """
    parser = Parser(
        prog="bids_uad",
        usage="bids_uad SCAN.nii.gz ... OUTPUT_DIR [options]",
        description="Detect anomalies in scans of the brain that are not in a BIDS dataset. Each scan is "
        "processed as a participant of its own. Not for clinical use.",
        epilog=EXIT_CODES,
        argument_default=argparse.SUPPRESS,
        formatter_class=LongHelp,
    )
    inputs = parser.add_argument_group("inputs")
    inputs.add_argument("scans", metavar="SCAN", nargs="+", help="NIfTI files, or one folder of them")
    inputs.add_argument(
        "output_dir", type=Path, help="folder of the results, and of a BIDS dataset with copies of the scans"
    )
    inputs.add_argument(
        "--modality", choices=MODALITIES,
        help="contrast of the scans (default: T1w, T2w or FLAIR in the name of each)",
    )  # fmt: skip
    _add_detection_options(parser.add_argument_group("preprocessing and detection"))
    resources = parser.add_argument_group("resources")
    _add_resource_options(resources)
    _add_scheduling_options(resources)
    control = parser.add_argument_group("run control")
    _add_control_options(control, "OUTPUT_DIR/work, removed at the end")
    _add_report_options(control)
    return parser


def build_training_parser(command: str) -> argparse.ArgumentParser:
    """Build the parser of a subcommand that makes models.

    Parameters
    ----------
    command : {"train", "calibrate"}
        Name of the subcommand.

    Returns
    -------
    argparse.ArgumentParser
        Its namespace names the two folders as that of :func:`build_parser` does.
    """
    train = command == "train"
    parser = Parser(
        prog=f"bids_uad {command}",
        description="Train a detector on preprocessed scans of healthy controls, and write a model bundle."
        if train
        else "Calibrate a model bundle on preprocessed validation scans: thresholds and normative reference.",
        epilog=EXIT_CODES,
        argument_default=argparse.SUPPRESS,
        formatter_class=LongHelp,
    )
    scans = "output of the participant level (--models none is enough), with participants.tsv"
    parser.add_argument(
        "bids_dir", metavar="DERIVATIVES", type=Path,
        help=scans + "; 'none' with --synthetic" if train else f"{scans}; participants not used for training",
    )  # fmt: skip
    parser.add_argument("output_dir", metavar="MODELS", type=Path, help="folder of the model bundles")
    model = parser.add_argument_group("model")
    _add_training_options(model, command)
    _add_resource_options(parser.add_argument_group("resources"))
    _add_control_options(parser.add_argument_group("run control"))
    return parser


def _add_input_options(group: argparse._ArgumentGroup) -> None:
    """Add the options that select images."""
    group.add_argument(
        "--participant-label", "--participant_label", dest="participants", nargs="+", metavar="LABEL",
        type=_label("sub-"), help="participants to process, with or without 'sub-' (default: all)",
    )  # fmt: skip
    group.add_argument(
        "--session-label", "--session_label", "--session-id", dest="sessions", nargs="+", metavar="LABEL",
        type=_label("ses-"), help="sessions to process, with or without 'ses-' (default: all)",
    )  # fmt: skip
    group.add_argument(
        "--bids-filter-file", dest="filter_file", type=Path, metavar="FILE",
        help="JSON with BIDS entity filters for 't1w', 't2w', 'flair'. A value of null requires the entity "
        "to be absent, '*' accepts any value; other keys are ignored",
    )  # fmt: skip
    group.add_argument(
        "--bids-database-dir", dest="database_dir", type=Path, metavar="PATH",
        help="pybids database of the dataset. It is written if it does not exist. By default, each "
        "participant is indexed when it is processed",
    )  # fmt: skip
    group.add_argument(
        "--skip-bids-validation", "--skip_bids_validation", action="store_true",
        help="no effect, for compatibility with fMRIPrep. The BIDS validator is never run; images that are "
        "used are checked in any case",
    )  # fmt: skip
    group.add_argument(
        "-d", "--derivatives", nargs="+", action="extend", metavar="NAME=PATH",
        help="derivative datasets: lesions=PATH, fmriprep=PATH. 'lesions' holds lesion masks for the "
        "evaluation; from any other, preprocessed images, brain masks and transforms are used",
    )  # fmt: skip
    group.add_argument(
        "--modalities",
        nargs="+",
        choices=MODALITIES,
        help="images to score (default: all with a model)",
    )


def _add_detection_options(group: argparse._ArgumentGroup) -> None:
    """Add the options of preprocessing, detection and evaluation of an image."""
    group.add_argument(
        "--models", nargs="+", metavar="NAME|PATH",
        help="packaged models or paths (default: the best packaged). 'all' selects all packaged "
        "models, 'none' only preprocesses",
    )  # fmt: skip
    group.add_argument(
        "--deviation", dest="deviations", nargs="+", choices=DEVIATIONS,
        help="write scores, or deviations from controls of the same age. 'none' writes the scores; "
        "'normative' writes the deviation of the scores from those of healthy controls of the same age and "
        "sex (participants.tsv) at the same voxel; default: for pls normative, unless scores were better by "
        "more than one standard error on validation scans; none for other detectors",
    )  # fmt: skip
    group.add_argument("--atlas-dir", type=Path, metavar="PATH", help="folder with tpl-SRI24")
    group.add_argument(
        "--brain-extraction", choices=EXTRACTIONS, metavar="NAME",
        help="method for whole heads without a mask (default: combined). 'template' registers the template, "
        "'network' is a U-Net, 'combined' uses both; 'synthstrip' and 'hd-bet' have to be installed",
    )  # fmt: skip
    group.add_argument(
        "--brain-extraction-weights", dest="extraction_weights", type=Path, metavar="PATH",
        help="weights of the method, if not packaged. A trained weights.safetensors, SynthStrip's file, or "
        "HD-BET's folder hd-bet_params",
    )  # fmt: skip
    group.add_argument(
        "--min-lesion-size", type=_volume, metavar="MM3",
        help="smallest component of the anomaly mask (default: the model's, fixed on validation scans). "
        "Smaller ones are removed from the mask; 0 keeps all",
    )  # fmt: skip
    group.add_argument(
        "--min-counted-volume", type=_volume, metavar="MM3",
        help="smallest lesion of the ground truth and false positive counted (default: 3 mm3). Masks do not "
        "depend on it. 0 counts all; 3 mm3 as in the MSSEG challenge, BraTS uses 50",
    )  # fmt: skip
    group.add_argument(
        "--min-lesion-volume", dest="min_counted_volume", type=_volume, help=argparse.SUPPRESS
    )  # deprecated
    group.add_argument(
        "--output-spaces", nargs="+", type=_output_space, metavar="SPACE",
        help="further spaces: MNI152NLin2009cAsym[:res-2], orig. Outputs in SRI24 and the mask on the grid "
        "of the raw image are always written. 'MNI152NLin2009cAsym' adds image, brain mask, map, mask and "
        "components by an affine transform, in voxels of 1 mm, with ':res-2' of 2 mm; 'orig' (or 'anat', "
        "'T1w') adds map and components on the grid of each raw image",
    )  # fmt: skip


def _add_resource_options(group: argparse._ArgumentGroup) -> None:
    """Add the options that every level has for CPUs, device and arithmetic."""
    group.add_argument(
        "--nprocs", "--nthreads", "--n-cpus", "--n_cpus", type=_positive, metavar="N",
        help="CPUs in total (default: all that are granted)",
    )  # fmt: skip
    group.add_argument(
        "--omp-nthreads", type=_positive, metavar="N",
        help="threads per process (default: 1). With 1, results are reproducible to the bit",
    )  # fmt: skip
    group.add_argument(
        "--device", type=_device, metavar="{auto,cpu,cuda,cuda:N,mps}",
        help="device of the networks (default: auto). 'auto' selects a CUDA GPU if there is one, 'mps' is "
        "the GPU of Apple silicon",
    )  # fmt: skip
    group.add_argument(
        "--precision", choices=PRECISIONS,
        help="arithmetic of the networks (default: auto). 'fp32' is reproducible to the bit on one machine, "
        "'bf16' is faster on processors that support it; 'auto' selects it on GPUs that support it, and on "
        "CPUs that support it for detectors whose masks hardly change, else fp32",
    )  # fmt: skip
    group.add_argument(
        "--batch-size", type=_positive, metavar="N",
        help="slices per batch (default: as memory allows). For training: that of the preset",
    )  # fmt: skip
    group.add_argument(
        "--compile", dest="compiled", action="store_true",
        help="compile the networks with torch.compile (once, about 1 min)",
    )  # fmt: skip
    group.add_argument("--random-seed", "--seed", type=int, metavar="N", help="seed (default: 0)")


def _add_scheduling_options(group: argparse._ArgumentGroup) -> None:
    """Add the options of the participant level for memory and parallel jobs."""
    group.add_argument(
        "--mem", "--mem-mb", "--mem_mb", dest="mem_gb", type=_memory, metavar="SIZE",
        help="memory in total: 16G, or in MB (default: all that is granted)",
    )  # fmt: skip
    group.add_argument(
        "--low-mem", action="store_true",
        help="reduce memory usage. Slices are scored one by one, unless --batch-size is given; the memory of "
        "parallel steps is limited by --mem",
    )  # fmt: skip
    group.add_argument(
        "--n-gpu-procs", "--n_gpu_procs", type=_positive, metavar="N",
        help="images scored at a time on the GPU (default: 1)",
    )  # fmt: skip
    group.add_argument(
        "--use-plugin", "--nipype-plugin-file", dest="plugin_file", type=Path, metavar="FILE",
        help="YAML with a nipype plugin and its plugin_args. MultiProc, SLURM or SLURMGraph",
    )  # fmt: skip


def _add_control_options(group: argparse._ArgumentGroup, work_dir: str = "work") -> None:
    """Add the options that every level has for its work folder, configuration and log."""
    group.add_argument(
        "-w", "--work-dir", type=Path, metavar="PATH", help=f"working directory (default: {work_dir})"
    )
    group.add_argument(
        "--config-file", type=Path, metavar="FILE",
        help="TOML file of an earlier run. The command line takes precedence",
    )  # fmt: skip
    group.add_argument(
        "-v", "--verbose", dest="verbosity", action="count", help="log more; -vv adds tracebacks"
    )
    group.add_argument("--notrack", action="store_true", help=argparse.SUPPRESS)


def _add_run_options(group: argparse._ArgumentGroup) -> None:
    """Add the options that control a run of the participant level."""
    group.add_argument(
        "--clean-workdir", action="store_true",
        help="empty the working directory before the run",
    )  # fmt: skip
    group.add_argument(
        "--keep-workdir", action="store_true",
        help="keep intermediate files. By default, those of participants without failures are removed",
    )  # fmt: skip
    group.add_argument(
        "--resource-monitor", action="store_true",
        help="record memory and CPU usage of each step with nipype, in OUTPUT_DIR/logs. Not with SLURMGraph",
    )  # fmt: skip
    group.add_argument(
        "--write-graph", action="store_true",
        help="write the workflow graph of each participant. Beside its crash files, as .dot and, if Graphviz "
        "is installed, .svg",
    )  # fmt: skip
    group.add_argument("--stop-on-first-crash", action="store_true", help="stop at the first failure")
    group.add_argument("--reports-only", action="store_true", help="only rewrite participant reports")
    _add_report_options(group)
    group.add_argument("--dry-run", action="store_true", help="list what would be processed, and exit")


def _add_report_options(group: argparse._ArgumentGroup) -> None:
    """Add the options of the reports and of the methods text."""
    group.add_argument(
        "--no-viewer", action="store_true",
        help="write no interactive viewers beside the reports. Each takes 2 to 5 MB and about 1 s",
    )  # fmt: skip
    group.add_argument(
        "--md-only-boilerplate", action="store_true",
        help="write the methods text as Markdown only. By default, pandoc converts it to HTML and LaTeX, if "
        "it is installed",
    )  # fmt: skip
    group.add_argument(
        "--output-layout", type=_layout, metavar="bids",
        help="layout of the outputs: bids, a derivative dataset in OUTPUT_DIR. fMRIPrep's layout 'legacy' "
        "is not supported",
    )  # fmt: skip


def _add_group_options(group: argparse._ArgumentGroup) -> None:
    """Add the options of the group level."""
    group.add_argument(
        "--cohort", metavar="COLUMN", help="cohorts, a column of participants.tsv (default: pathology)"
    )
    group.add_argument(
        "--subgroups", nargs="+", metavar="COLUMN",
        help="columns that define subgroups (default: sex age ...). Columns of participants.tsv, "
        "sessions.tsv or scans.tsv, fields of the raw images' sidecars, 'lesion load'; "
        "default: sex age scanner scanner_seen 'lesion load'",
    )  # fmt: skip
    group.add_argument("--strata", dest="subgroups", nargs="+", help=argparse.SUPPRESS)  # deprecated
    group.add_argument(
        "--experiments", nargs="+", action="extend", metavar="NAME=PATH",
        help="outputs of other models on the same images, to compare with. For example, of models with "
        "fewer training participants or other hyper-parameters",
    )  # fmt: skip


def _add_training_options(group: argparse._ArgumentGroup, *commands: str) -> None:
    """Add the options of `train`, `calibrate` or both."""
    group.add_argument(
        "--detector", metavar="NAME", type=_detector, help="detector, for example disyre (required)"
    )
    group.add_argument("--modality", choices=MODALITIES, help="images of the model (required)")
    group.add_argument("--preset", metavar="NAME", help="paper, default or lite (default: default)")
    group.add_argument(
        "--hyper", nargs="+", action="extend", metavar="NAME=VALUE",
        help="hyper-parameters that differ from the preset, such as stride=4; after training, only those "
        "that the weights do not depend on",
    )  # fmt: skip
    if "calibrate" in commands:
        group.add_argument(
            "--normative-dir", type=Path, metavar="PATH",
            help="preprocessed scans of further healthy controls, for the normative reference only",
        )  # fmt: skip
        group.add_argument(
            "--decision-rule", choices=DECISION_RULES,
            help="rule for the masks (default: hysteresis for pls, threshold for other detectors). "
            "'hysteresis' chooses two thresholds, the minimum volume of a component, filled holes, and "
            "scores or deviations, by Dice and lesion-wise F1 under a limit for healthy controls",
        )  # fmt: skip
    if "train" in commands:
        _add_learning_options(group)


def _add_learning_options(group: argparse._ArgumentGroup) -> None:
    """Add the options of `train` alone."""
    group.add_argument("--steps", type=_positive, metavar="N", help="training steps (default: the preset's)")
    group.add_argument(
        "--train-fraction", type=_fraction, metavar="F",
        help="fraction of the participants to train on; a smaller one is a subset of a larger (default: 1)",
    )  # fmt: skip
    group.add_argument(
        "--synthetic", type=_positive, metavar="N",
        help="number of simulated healthy participants to train on; DERIVATIVES may then be 'none'",
    )  # fmt: skip
    group.add_argument(
        "--labelmaps", dest="label_maps", nargs="+", metavar="PATH",
        help="label maps, or folders of *_dseg.nii.gz, to simulate from (default: the built-in template)",
    )  # fmt: skip
    group.add_argument(
        "--contrast-transfer", "--recontrast", action="store_true",
        help="with --modality T2w or FLAIR: also train on the T1w scans of DERIVATIVES, mapped to that "
        "contrast",
    )  # fmt: skip
    group.add_argument(
        "--lesion-masks", type=Path, metavar="DIR",
        help="for pls: masks of real lesions in MNI space, whose shapes synthetic lesions may have, and a "
        "lesions.tsv with columns file and pathology",
    )  # fmt: skip
    group.add_argument(
        "--backbone-weights", type=Path, metavar="PATH",
        help="ImageNet weights of torchvision (.pth, .safetensors), or a folder with them, for presets with "
        "such a backbone; for pls, a bundle whose training is continued",
    )  # fmt: skip
    group.add_argument(
        "--force", action="store_true",
        help="accept ImageNet weights other than IMAGENET1K_V1, which are recognised by their SHA-256",
    )  # fmt: skip
    group.add_argument(
        "--num-devices", type=_positive, metavar="N",
        help="GPUs (or CPU processes) per node for distributed training (default: 1)",
    )  # fmt: skip
    group.add_argument(
        "--num-nodes", type=_positive, metavar="N", help="nodes for distributed training (default: 1)"
    )


def subcommand_of(arguments: Sequence[str]) -> str | None:
    """Return the subcommand of a command line; None if it names a dataset and levels.

    Parameters
    ----------
    arguments : sequence of str
        Arguments without the program's name. The first is the subcommand, unless the third is
        `participant` or `group`: then it is a dataset of this name.

    Returns
    -------
    str or None
        One of `SUBCOMMANDS`, `SCANS` if the command line names scans, or None.
    """
    if not arguments:
        return None
    if arguments[0] in SUBCOMMANDS and arguments[2:3] not in (["participant"], ["group"]):
        return arguments[0]
    return SCANS if _names_scans(arguments) else None


def _names_scans(arguments: Sequence[str]) -> bool:
    """Return whether a command line lists scans, or a folder other than a BIDS dataset without a level."""
    first, has_level = Path(arguments[0]), not set(LEVELS).isdisjoint(arguments)
    if arguments[0].startswith("-"):
        return not has_level and any(map(NIFTI_EXTENSION.search, arguments))
    if NIFTI_EXTENSION.search(first.name):
        return True
    if has_level:
        return False
    if first.is_dir():
        is_dataset = (first / "dataset_description.json").exists() or any(
            path.is_dir() for path in first.glob("sub-*")
        )
        return len(arguments) > 1 and all(part.startswith("-") for part in arguments[2:3]) and not is_dataset
    return first.is_file()


def parse_args(argv: Sequence[str] | None = None) -> RunConfig:
    """Parse and check the command line of a level, `train` or `calibrate`.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; those of the process by default.

    Returns
    -------
    RunConfig
        With absolute paths, and the granted CPUs and memory where no option sets them.

    Raises
    ------
    ConfigError
        If options contradict each other, or a path does not exist.
    SystemExit
        Code 2 on malformed arguments, code 0 after `--help` and `--version`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = subcommand_of(arguments)
    if command in TRAINING:
        options = vars(build_training_parser(command).parse_args(arguments[1:])) | {"levels": [command]}
    elif command == SCANS:
        options = _scans_options(arguments)
    else:
        options = vars(build_parser().parse_args(arguments))
    for name in WITHOUT_EFFECT:
        options.pop(name, None)
    config_file = options.pop("config_file", None)
    values = {} if config_file is None else _read_config_file(config_file)
    for name in SEQUENCES:
        if name in options:
            options[name] = tuple(dict.fromkeys(options[name]))
    for name in FOLDERS:
        if name in options:
            options[name] = parse_folders(options[name], f"--{name}")
    options["levels"] = tuple(level for level in (*LEVELS, SCANS) if level in options["levels"])
    values.update(options)
    values.setdefault("work_dir", options["output_dir"] / "work" if command == SCANS else Path("work"))
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


def _scans_options(arguments: Sequence[str]) -> dict[str, Any]:
    """Parse a command line that names scans; raise ConfigError if its last argument is not a folder."""
    options = vars(build_scans_parser().parse_args(arguments))
    last = options["output_dir"]
    if str(last) in LEVELS:
        raise ConfigError(f"'{last}' needs a BIDS dataset; leave it out to process {options['scans'][0]}")
    if NIFTI_EXTENSION.search(last.name) or last.is_file():
        raise ConfigError(f"the last argument must be the output folder; {last} is a file")
    # Links are not followed, since files of git-annex have other names.
    options["scans"] = [str(Path(scan).expanduser().absolute()) for scan in options["scans"]]
    return options | {"levels": [SCANS], "bids_dir": last / "bids"}


def parse_folders(items: Sequence[str], flag: str) -> dict[str, Path]:
    """Parse `NAME=PATH` items; a path without a name is named after its folder.

    Parameters
    ----------
    items : sequence of str
        Values of the option. Only the first `=` separates, and only after a name of letters, digits, `_`
        and `-`, so that paths may contain the sign.
    flag : str
        The option, for messages.

    Returns
    -------
    dict of str to pathlib.Path
        Path of each name.

    Raises
    ------
    ConfigError
        If a name occurs twice, is empty, or is `raw` in `--derivatives`.
    """
    found: dict[str, Path] = {}
    for item in items:
        name, sign, path = item.partition("=")
        if not sign or not re.fullmatch(r"[0-9a-zA-Z_-]+", name):
            path = item
            # The name becomes part of BIDS URIs.
            name = re.sub(r"[^0-9a-zA-Z_.-]+", "-", Path(item).resolve().name).strip("-")
        if not path:
            raise ConfigError(f"{flag} {item}: no path after the '='")
        if not name or (flag == "--derivatives" and name == "raw"):
            raise ConfigError(f"{flag} {item}: '{name}' is not a valid name; choose one with NAME=PATH")
        if name in found:
            raise ConfigError(f"{flag}: the name '{name}' occurs twice; choose names with NAME=PATH")
        found[name] = Path(path)
    return found


def check(config: RunConfig) -> None:
    """Check paths and combinations of options before anything is written.

    Parameters
    ----------
    config : RunConfig
        Configuration with absolute paths.

    Raises
    ------
    ConfigError
        If a path does not exist, or folders lie inside each other.
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
            raise ConfigError(f"{folder}: not a folder; choose another {name} folder")
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
        raise ConfigError(f"{config.output_dir} does not exist; run the participant level first")
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


def _read_config_file(config_file: Path) -> dict:
    """Read the options of an earlier run, except those that belong to that run alone."""
    if not config_file.is_file():
        raise ConfigError(f"--config-file {config_file} does not exist")
    try:
        text = config_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config-file {config_file} cannot be read: {error}") from error
    fields = read_fields(text)
    return {name: value for name, value in fields.items() if name not in RUN_SPECIFIC}


def _label(prefix: str) -> Callable[[str], str]:
    def convert(text: str) -> str:
        label = text.removeprefix(prefix)
        if not allows(Label, label):
            raise argparse.ArgumentTypeError(f"'{text}' is not a BIDS label (letters and digits)")
        return label

    return convert


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive integer")
    return int(text)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number in the range (0, 1]")
    return value


def _volume(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not allows(NonNegative, value):
        raise argparse.ArgumentTypeError(f"'{text}' is not a volume in mm3 (0 or more)")
    return value


def _output_space(text: str) -> str:
    if not allows(SpaceName, text):
        raise argparse.ArgumentTypeError(f"'{text}' is not supported; choose from {describe(SpaceName)}")
    return text


def _memory(text: str) -> float:
    try:
        return parse_memory(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _layout(text: str) -> str:
    if text != "bids":
        raise argparse.ArgumentTypeError(
            f"'{text}' is not supported; the outputs are always a dataset in OUTPUT_DIR; leave it out"
        )
    return text


def _detector(text: str) -> str:
    return RENAMED_DETECTORS.get(text, text)


def _device(text: str) -> str:
    if not allows(Device, text):
        raise argparse.ArgumentTypeError(f"'{text}' is not {describe(Device)}")
    return text
