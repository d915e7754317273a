"""Group level: benchmark tables, analyses and report from the score tables of the participant level."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress
from threadpoolctl import threadpool_limits

from bids_uad.config import DEFAULT_SUBGROUPS
from bids_uad.dataset.participants import read_participants, write_participants
from bids_uad.errors import ConfigError, ExitCode, InputError
from bids_uad.evaluation.analyses import analyse
from bids_uad.evaluation.benchmark import COLUMNS as BENCHMARK_COLUMNS
from bids_uad.evaluation.benchmark import evaluate
from bids_uad.evaluation.experiments import COLUMNS as EXPERIMENT_COLUMNS
from bids_uad.evaluation.experiments import REFERENCE, Variant, compare_variants
from bids_uad.evaluation.missing import subject_folders
from bids_uad.evaluation.provenance import read_model_provenance
from bids_uad.evaluation.subgroups import MIN_PARTICIPANTS
from bids_uad.evaluation.subjects import LESION_LOAD, add_image_columns, add_participant_columns
from bids_uad.evaluation.tables import find_metrics_tables
from bids_uad.files import read_json, remove_unfinished, write_json, write_tsv
from bids_uad.levels.group_tables import current_tables
from bids_uad.reports.boilerplate import write_citation
from bids_uad.reports.group import Provenance, write_group_report
from bids_uad.reports.group_methods import group_methods_text
from bids_uad.reports.group_text import benchmark_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

    from bids_uad.config import RunConfig
    from bids_uad.dataset.participants import Participants
    from bids_uad.evaluation.benchmark import Evaluation
    from bids_uad.evaluation.provenance import ModelProvenance

LOGGER = logging.getLogger(__name__)

PARTICIPANTS_DESCRIPTION = "Participants of the source dataset and of this one"


@threadpool_limits.wrap(limits=1)  # the matrices are small: threads cost more than they save
def run_group(config: RunConfig, console: Console | None = None) -> int:
    """Write the benchmark and the group report of a cohort.

    Reads the score tables below `config.output_dir`, participants.tsv and sessions.tsv of `bids_dir`, and
    where `subgroups` requests it scans.tsv and sidecars. Writes `group_benchmark`, `group_subjects`, the
    tables of the analyses, `group_experiments` if there are experiments, and `participants` (each .tsv and
    .json), `sub-*_sessions.tsv` where participants differ between sessions, `group.html`, `group/figures` and
    `logs/CITATION_group`. A few scans are read for figures, if they exist.

    Parameters
    ----------
    config : RunConfig
        `bids_dir`, `output_dir`, `participants`, `experiments`, `cohort`, `subgroups`, `nprocs` and
        `random_seed` are used.
    console : rich.console.Console, optional
        Console to print the benchmark to; by default the terminal.

    Returns
    -------
    int
        Exit code: 0; 1 if a score table could not be read (the others are evaluated); 66 if there is none.

    Raises
    ------
    InputError
        If `bids_dir` does not exist, participants.tsv is damaged or lacks the column of the cohorts, another
        requested file is damaged, or the tables of one detector and modality are of different models.
    """
    console = console or Console(markup=False)
    output_dir = Path(config.output_dir)
    participants = _read_participants(config)
    if config.cohort is not None:
        participants = participants.with_cohort_column(config.cohort)
    only = frozenset(f"sub-{label}" for label in config.participants)
    for folder in (output_dir, output_dir / "logs", output_dir / "group" / "figures"):
        remove_unfinished(folder)
    found = find_metrics_tables(output_dir, only)
    paths, left_out = current_tables(output_dir, found, config.bids_dir, participants)
    if not paths:
        if left_out:
            LOGGER.warning(left_out)
        if found:
            problem = "no score table is up to date; run the participant level again"
        else:
            problem = "no score tables (sub-*/**/*_metrics.tsv); run the participant level first"
        LOGGER.error("%s: %s", output_dir, problem)
        return ExitCode.NO_INPUT

    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("Reading score tables", total=len(paths))
        evaluation = evaluate(
            output_dir,
            paths,
            participants,
            seed=config.random_seed,
            only=only,
            processes=config.nprocs,
            progress=lambda read: progress.advance(task, read),
        )
    subjects, subject_columns = add_participant_columns(evaluation.subjects, participants)
    subgroups = tuple(dict.fromkeys(map(participants.column, config.subgroups)))
    requested = () if config.subgroups == DEFAULT_SUBGROUPS else subgroups
    subjects, subject_columns = add_image_columns(
        subjects, subject_columns, requested, config.bids_dir, participants
    )
    analyses = analyse(
        subjects, evaluation.cohort_curves, subgroups, seed=config.random_seed, lesions=evaluation.lesions
    )
    unused = _unused_subgroups(requested, subjects, analyses.subgroups["factor"])
    warnings = [*filter(None, [left_out]), *participants.notes, *evaluation.warnings, *unused]
    evaluation = replace(evaluation, warnings=list(dict.fromkeys(warnings)))
    provenance = read_model_provenance(output_dir, evaluation.subjects)
    experiments = _compare_experiments(config, participants, evaluation, provenance)

    write_participants(output_dir, participants, subject_folders(output_dir), PARTICIPANTS_DESCRIPTION)
    tables = {
        "subjects": (subjects, "Numbers of each image and detector", subject_columns),
        "benchmark": (
            evaluation.benchmark,
            "Benchmark of each detector, modality and cohort; not for clinical use",
            BENCHMARK_COLUMNS,
        ),
        **analyses.tables,
    }
    if experiments is not None:
        description = "Models that differ from those of these outputs, on the same images"
        tables["experiments"] = (experiments, description, EXPERIMENT_COLUMNS)
    _write_tables(output_dir, tables)
    methods = group_methods_text(evaluation, analyses, experiments, seed=config.random_seed)
    write_citation(output_dir, methods, "CITATION_group", md_only=config.md_only_boilerplate)
    run = Provenance(_command(config), _date(config), provenance)
    report = write_group_report(output_dir, evaluation, analyses, participants, run, experiments)

    console.print(benchmark_table(evaluation.benchmark))
    for text in (*evaluation.unreadable, *evaluation.warnings):
        LOGGER.warning(text)
    console.print(f"Report: {report}", highlight=False, soft_wrap=True)
    return ExitCode.FAILED if evaluation.unreadable else ExitCode.OK


def _read_participants(config: RunConfig) -> Participants:
    """Read the participants of the raw dataset.

    Raises
    ------
    InputError
        If there is no such folder, or only the output folder has a participants.tsv, which this level did not
        write.
    """
    remedy = "use the raw dataset, or a folder with copies of its participants.tsv, .json and sessions.tsv"
    if not config.bids_dir.is_dir():
        raise InputError(config.bids_dir, "no such folder", remedy)
    own = config.output_dir / "participants.tsv"
    written = read_json(own.with_suffix(".json")).get("Description") == PARTICIPANTS_DESCRIPTION
    if own.is_file() and not written and not (config.bids_dir / own.name).exists():
        raise InputError(own, "not written by the group level, which reads only that of BIDS_DIR", remedy)
    return read_participants(config.bids_dir, subject_folders(config.output_dir))


def _compare_experiments(
    config: RunConfig,
    participants: Participants,
    evaluation: Evaluation,
    provenance: dict[tuple[str, str], ModelProvenance],
) -> pd.DataFrame | None:
    """Compare the outputs of other models with these; return None if there are no experiments.

    Raises
    ------
    ConfigError
        If an experiment has the name of these outputs.
    InputError
        If an experiment has no score tables.
    """
    if not config.experiments:
        return None
    if REFERENCE in config.experiments:
        raise ConfigError(
            f"--experiments {REFERENCE}=...: '{REFERENCE}' is the name of these outputs; choose another name"
        )
    only = frozenset(f"sub-{label}" for label in config.participants)
    variants = [Variant(REFERENCE, evaluation.subjects, provenance)]
    for name, folder in config.experiments.items():
        paths = find_metrics_tables(folder, only)
        paths, left_out = current_tables(folder, paths, config.bids_dir, participants)
        if left_out:
            LOGGER.warning("%s: %s", name, left_out)
        if not paths:
            raise InputError(folder, "no score tables (sub-*/**/*_metrics.tsv)", "run the participant level")
        other = evaluate(
            folder, paths, participants, seed=config.random_seed, only=only, processes=config.nprocs
        )
        for text in other.unreadable:
            LOGGER.warning("%s: %s", name, text)
        variants.append(Variant(name, other.subjects, read_model_provenance(folder, other.subjects)))
    return compare_variants(variants, seed=config.random_seed)


def _command(config: RunConfig) -> tuple[str, ...]:
    """Return the command line that writes the same report."""
    command = ["bids_uad", str(config.bids_dir), str(config.output_dir), "group"]
    if config.participants:
        command += ["--participant-label", *config.participants]
    if config.experiments:
        command += ["--experiments", *(f"{name}={path}" for name, path in config.experiments.items())]
    if config.cohort is not None:
        command += ["--cohort", config.cohort]
    if config.subgroups != DEFAULT_SUBGROUPS:
        command += ["--subgroups", *config.subgroups]
    if config.random_seed:
        command += ["--random-seed", str(config.random_seed)]
    return tuple(command)


def _date(config: RunConfig) -> str:
    """Return the date of the run, from its identifier."""
    day = config.run_id[:8]
    return f"{day[:4]}-{day[4:6]}-{day[6:]}"


def _unused_subgroups(requested: Sequence[str], subjects: pd.DataFrame, used: pd.Series) -> list[str]:
    """List the requested subgroup columns that are not used, with the reason."""
    lines = []
    for column in requested:
        if column not in subjects and column != LESION_LOAD:
            lines.append(
                f"--subgroups {column}: no such column in participants.tsv, sessions.tsv or scans.tsv, and "
                "no such field in the sidecars of the raw images."
            )
        elif column not in set(used):
            lines.append(
                f"--subgroups {column}: fewer than two subgroups of {MIN_PARTICIPANTS} participants."
            )
    return lines


def _write_tables(output_dir: Path, tables: dict[str, tuple[pd.DataFrame, str, dict[str, Any]]]) -> None:
    """Write tables and their data dictionaries; remove the table of experiments of an earlier run."""
    if "experiments" not in tables:
        for suffix in ("tsv", "json"):
            (output_dir / f"group_experiments.{suffix}").unlink(missing_ok=True)
    for name, (table, description, columns) in tables.items():
        write_tsv(output_dir / f"group_{name}.tsv", table)
        write_json(output_dir / f"group_{name}.json", {"Description": description, **columns})
