"""The group level: benchmark tables and report from what the participant level left."""

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


# The matrices are small: threads would wait for each other more than they work.
@threadpool_limits.wrap(limits=1)
def run_group(config: RunConfig, console: Console | None = None) -> int:
    """Write the benchmark and the group report of a cohort.

    Reads the score tables below `config.output_dir`, and participants.tsv and sessions.tsv of `bids_dir`,
    where `subgroups` asks for it also scans.tsv and sidecars. Tables that this level wrote are not read.
    Writes `group_benchmark`, `group_subjects`, `group_comparison`, `group_subgroups`, `group_disparities`,
    `group_thresholds`, `group_lesions`, `group_missed`, `group_bias`, `group_deviations` and `participants`
    (each .tsv and .json), `sub-*_sessions.tsv` where participants differ between sessions, `group.html`,
    `group/figures` and `logs/CITATION_group`; with `experiments` also `group_experiments`. A few scans
    are read for pictures, where they are there.

    Parameters
    ----------
    config : RunConfig
        `bids_dir`, `output_dir`, `participants`, `experiments`, `cohort`, `subgroups`, `nprocs` and
        `random_seed` are used.
    console : rich.console.Console, optional
        Where the benchmark is printed; the terminal by default.

    Returns
    -------
    int
        0; 1 when a score table could not be read (the others are evaluated); 66 without any table.

    Raises
    ------
    InputError
        If there is no `bids_dir`, participants.tsv is damaged or lacks the column for cohorts, another file
        that was asked for is damaged, or the tables of one detector and modality come from different models.
    """
    console = console or Console(markup=False)
    output_dir = Path(config.output_dir)
    participants = _read_participants(config)
    if config.cohort is not None:
        participants = participants.with_cohort_column(config.cohort)
    only = frozenset(f"sub-{label}" for label in config.participants)
    for folder in (output_dir, output_dir / "logs", output_dir / "group" / "figures"):
        remove_unfinished(folder)
    paths = find_metrics_tables(output_dir, only)
    if not paths:
        LOGGER.error(
            "%s: no score tables (sub-*/**/*_metrics.tsv); run the participant level first",
            output_dir,
        )
        return ExitCode.NO_INPUT

    paths, left_out = current_tables(output_dir, paths, config.bids_dir, participants)
    if left_out:
        LOGGER.warning(left_out)
    if not paths:
        LOGGER.error("%s: no score table is up to date; run the participant level again", output_dir)
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

    write_participants(output_dir, participants, subject_folders(output_dir), PARTICIPANTS_DESCRIPTION)
    subjects, subject_columns = add_participant_columns(evaluation.subjects, participants)
    subgroups = tuple(dict.fromkeys(map(participants.column, config.subgroups)))
    asked = () if config.subgroups == DEFAULT_SUBGROUPS else subgroups
    subjects, subject_columns = add_image_columns(
        subjects, subject_columns, asked, config.bids_dir, participants
    )
    what = "Numbers of each image and detector"
    _write_table(output_dir, "group_subjects", subjects, what, subject_columns)
    what = "Benchmark of each detector, modality and cohort; not for clinical use"
    _write_table(output_dir, "group_benchmark", evaluation.benchmark, what, BENCHMARK_COLUMNS)
    origins = read_model_provenance(output_dir, evaluation.subjects)
    analyses = analyse(
        subjects,
        evaluation.cohort_curves,
        subgroups,
        seed=config.random_seed,
        lesions=evaluation.lesions,
    )
    useless = _useless(asked, subjects, analyses.subgroups["factor"])
    outdated = [left_out] if left_out else []
    warnings = [*outdated, *participants.notes, *evaluation.warnings, *useless]
    evaluation = replace(evaluation, warnings=warnings)
    for name, (table, what, columns) in analyses.tables.items():
        _write_table(output_dir, f"group_{name}", table, what, columns)
    experiments = _experiments(config, participants, evaluation, origins)
    if experiments is None:
        for suffix in ("tsv", "json"):  # of an earlier run
            (output_dir / f"group_experiments.{suffix}").unlink(missing_ok=True)
    else:
        what = "Models that differ from those of these outputs, on the same images"
        _write_table(output_dir, "group_experiments", experiments, what, EXPERIMENT_COLUMNS)
    methods = group_methods_text(evaluation, analyses, experiments, seed=config.random_seed)
    write_citation(output_dir, methods, "CITATION_group")
    provenance = Provenance(_command(config), _date(config), origins)
    report = write_group_report(output_dir, evaluation, analyses, participants, provenance, experiments)

    console.print(benchmark_table(evaluation.benchmark))
    for text in (*evaluation.unreadable, *evaluation.warnings[len(outdated) :]):
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
    remedy = "give the raw dataset, or a folder with copies of its participants.tsv, .json and sessions.tsv"
    if not config.bids_dir.is_dir():
        raise InputError(config.bids_dir, "no such folder", remedy)
    own = config.output_dir / "participants.tsv"
    written = read_json(own.with_suffix(".json")).get("Description") == PARTICIPANTS_DESCRIPTION
    if own.is_file() and not written and not (config.bids_dir / own.name).exists():
        raise InputError(own, "not written by the group level, which reads BIDS_DIR only", remedy)
    return read_participants(config.bids_dir, subject_folders(config.output_dir))


def _experiments(
    config: RunConfig,
    participants: Participants,
    evaluation: Evaluation,
    origins: dict[tuple[str, str], ModelProvenance],
) -> pd.DataFrame | None:
    """Compare other models with those of these outputs; None if there are none to compare with.

    Raises
    ------
    ConfigError
        If one is called as these outputs are.
    InputError
        If an output of another model has no score tables.
    """
    if not config.experiments:
        return None
    if REFERENCE in config.experiments:
        raise ConfigError(
            f"--experiments {REFERENCE}=...: that is what these outputs are called; name it apart"
        )
    only = frozenset(f"sub-{label}" for label in config.participants)
    variants = [Variant(REFERENCE, evaluation.subjects, origins)]
    for name, folder in config.experiments.items():
        paths = find_metrics_tables(folder, only)
        paths, left_out = current_tables(folder, paths, config.bids_dir, participants)
        if left_out:
            LOGGER.warning("%s: %s", name, left_out)
        if not paths:
            raise InputError(folder, "no score tables (sub-*/**/*_metrics.tsv)", "run the participant level")
        found = evaluate(
            folder, paths, participants, seed=config.random_seed, only=only, processes=config.nprocs
        )
        for text in found.unreadable:
            LOGGER.warning("%s: %s", name, text)
        variants.append(Variant(name, found.subjects, read_model_provenance(folder, found.subjects)))
    return compare_variants(variants, seed=config.random_seed)


def _command(config: RunConfig) -> tuple[str, ...]:
    """Write the command line that asks for the same page."""
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
    """Read the day from the name of the run."""
    day = config.run_id[:8]
    return f"{day[:4]}-{day[4:6]}-{day[6:]}"


def _useless(asked: Sequence[str], subjects: pd.DataFrame, used: pd.Series) -> list[str]:
    """Say which subgroup variables that were requested divide nothing, and why."""
    lines = []
    for factor in asked:
        if factor not in subjects and factor != LESION_LOAD:
            lines.append(
                f"--subgroups {factor}: no such column in participants.tsv, sessions.tsv or scans.tsv, and "
                "no such field in the sidecars of the raw images."
            )
        elif factor not in set(used):
            lines.append(
                f"--subgroups {factor}: no two parts of the cohort have {MIN_PARTICIPANTS} participants each."
            )
    return lines


def _write_table(
    output_dir: Path, name: str, table: pd.DataFrame, description: str, columns: dict[str, Any]
) -> None:
    """Write a table and its sidecar: what it is, and what each column is."""
    write_tsv(output_dir / f"{name}.tsv", table)
    write_json(output_dir / f"{name}.json", {"Description": description, **columns})
