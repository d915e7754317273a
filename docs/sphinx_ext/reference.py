"""Sphinx directives that generate tables of columns, files, hyper-parameters, options and exit codes."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from bids_uad.dataset import naming, sidecars
from bids_uad.dataset.naming import ImageUnit
from bids_uad.errors import ExitCode
from bids_uad.evaluation.analyses import analyse
from bids_uad.evaluation.benchmark import COLUMNS as BENCHMARK_COLUMNS
from bids_uad.evaluation.experiments import COLUMNS as EXPERIMENT_COLUMNS
from bids_uad.evaluation.subjects import COLUMNS as SUBJECT_COLUMNS
from bids_uad.methods.registry import detector_class

ROOT = Path("/data")
UNIT = ImageUnit(ROOT / "sub-01" / "anat" / "sub-01_T1w.nii.gz", "01", None, "T1w", {"subject": "01"})


class Generated(SphinxDirective):
    """Base class of directives that generate Markdown."""

    has_content = False

    def run(self) -> list[nodes.Node]:
        """Parse the generated Markdown."""
        return self.parse_text_to_nodes("\n".join(self.lines()), allow_section_headings=True)

    def lines(self) -> Iterator[str]:
        """Return the lines of the Markdown text."""
        raise NotImplementedError


class Columns(Generated):
    """``{columns} module:NAME``: columns of a table with their descriptions in the data dictionary."""

    required_arguments = 1

    def lines(self) -> Iterator[str]:
        """Return one row per column."""
        module, name = self.arguments[0].split(":")
        return column_table(getattr(import_module(module), name))


class GroupTables(Generated):
    """``{group-tables}``: all tables of the group level."""

    def lines(self) -> Iterator[str]:
        """Return one section per table."""
        empty = pd.DataFrame(columns=list(SUBJECT_COLUMNS))
        tables = {
            "benchmark": ("Benchmark of each detector, modality and cohort", BENCHMARK_COLUMNS),
            "subjects": (
                "Scores of each image and detector, followed by the columns of participants.tsv",
                SUBJECT_COLUMNS,
            ),
        }
        tables |= {
            name: (what, columns)
            for name, (_, what, columns) in analyse(empty, {}, (), seed=0).tables.items()
        }
        tables["experiments"] = (
            "With `--experiments`: other models on the same images",
            EXPERIMENT_COLUMNS,
        )
        for name, (what, columns) in tables.items():
            yield from (f"### `group_{name}.tsv`", "", f"{what}.", "")
            yield from column_table(columns)
            yield ""


class Outputs(Generated):
    """``{outputs}``: all output files of an image, with the descriptions in their sidecars."""

    def lines(self) -> Iterator[str]:
        """Return one row per file."""
        yield from table_head("file", "content")
        for path, text in output_files():
            yield row(f"`{path.name.replace('sub-01', '*')}`", text)


class Presets(Generated):
    """``{presets} name``: the hyper-parameters in which a detector's presets differ."""

    required_arguments = 1

    def lines(self) -> Iterator[str]:
        """Return one row per hyper-parameter."""
        detector = detector_class(self.arguments[0])
        presets = {name: dict(flat(dataclasses.asdict(hyper))) for name, hyper in detector.presets.items()}
        for (preset, modality), settings in detector.modality_settings.items():
            for name, value in settings.items():
                presets[preset][name] = f"{presets[preset][name]}, {modality} {value}"
        yield from table_head("hyper-parameter", *(f"`{name}`" for name in presets))
        names = dict.fromkeys(name for values in presets.values() for name in values)
        for name in names:
            values = [values.get(name, "") for values in presets.values()]
            if len(values) == 1 or len(set(map(str, values))) > 1:
                yield row(f"`{name}`", *(f"`{value}`" if value != "" else "" for value in values))


class CommandLine(Generated):
    """``{command-line} module:function [argument]``: the options of a parser, group by group."""

    required_arguments = 1
    optional_arguments = 1

    def lines(self) -> Iterator[str]:
        """Return one section per group of options."""
        module, name = self.arguments[0].split(":")
        parser: argparse.ArgumentParser = getattr(import_module(module), name)(*self.arguments[1:])
        for group in parser._action_groups:
            shown = [action for action in group._group_actions if action.help != argparse.SUPPRESS]
            if not shown:
                continue
            yield from (f"### {group.title.capitalize()}", "")
            for action in shown:
                yield ", ".join(f"`{spelling}`" for spelling in spellings(action))
                yield from (f": {description(action)}", "")


class ExitCodes(Generated):
    """``{exit-codes}``: exit codes of the command line."""

    def lines(self) -> Iterator[str]:
        """Return one row per code."""
        yield from table_head("exit code", "meaning")
        for code in ExitCode:
            yield row(str(int(code)), code.meaning)


def spellings(action: argparse.Action) -> list[str]:
    """Return the spellings of an option with its value."""
    value = action.metavar or (
        "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest
    )
    value = "" if action.nargs == 0 else f"{value} ..." if action.nargs == "+" else str(value)
    names = [name for name in action.option_strings if "_" not in name.lstrip("-")]
    return [f"{name} {value}".strip() for name in names] or [value]


def description(action: argparse.Action) -> str:
    """Return the help of an option, with the default value if the help does not contain it."""
    text = escaped(action.help or "").rstrip(".")
    if action.default not in (None, argparse.SUPPRESS, False) and "default" not in text:
        default = action.default
        text += f" (default: {' '.join(map(str, default)) if isinstance(default, list) else default})"
    return f"{text[:1].upper()}{text[1:]}."


def output_files() -> Iterator[tuple[Path, str]]:
    """Yield the output files of a T1w image with their descriptions."""
    described = sidecars.preprocessing_sidecars(UNIT, ROOT, {})
    described["to_sri24"] = {"Description": "Rigid transform of the image to SRI24, ITK text"}
    described["from_sri24"] = {"Description": "The inverse transform"}
    for name, path in naming.preprocessing_outputs(UNIT).items():
        yield path, described[name]["Description"]
    preproc = naming.preprocessing_outputs(UNIT)["preproc"]
    yield naming.quality_output(UNIT), sidecars.quality_sidecar(preproc, preproc)["Description"]
    yield naming.lesion_output(UNIT.entities), sidecars.lesion_sidecar("", {})["Description"]
    files = naming.detection_outputs(UNIT, "disyre", with_lesions=True)
    inputs = {"preproc": preproc, "brain_mask": preproc, "raw": Path("raw")}
    detection = sidecars.detection_sidecars(files, inputs, {}, {}, min_lesion_volume=0)
    for kind, path in files.items():
        text = detection[kind]["Description"]
        yield path, f"Colours for {kind}" if kind in naming.LOOK_UP_TABLES else text


def column_table(columns: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Return a table of columns: name, description, units and levels."""
    yield from table_head("column", "description")
    for name, column in columns.items():
        text = escaped(column["Description"])
        if "Units" in column:
            text += f", in {escaped(column['Units'])}"
        levels = column.get("Levels", {})
        text += "".join(f"<br>`{level}`: {escaped(what)}" for level, what in levels.items())
        yield row(f"`{name}`", text)


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested values with dotted names."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, list(value) if isinstance(value, tuple) else value


def table_head(*cells: str) -> Iterator[str]:
    """Return the first two lines of a table."""
    yield row(*cells)
    yield row(*["---"] * len(cells))


def row(*cells: str) -> str:
    """Format a row of a table."""
    return f"| {' | '.join(cells)} |"


def escaped(text: str) -> str:
    """Escape characters with a meaning in Markdown."""
    for sign in ("\\", "|", "*", "_", "<", "$", "["):
        text = text.replace(sign, f"\\{sign}")
    return text


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directives."""
    app.add_directive("columns", Columns)
    app.add_directive("group-tables", GroupTables)
    app.add_directive("outputs", Outputs)
    app.add_directive("presets", Presets)
    app.add_directive("command-line", CommandLine)
    app.add_directive("exit-codes", ExitCodes)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
