"""Print the Boutiques descriptor of the participant and group levels: ``python -m bids_uad.cli.boutiques``.

Boutiques (Glatard et al. 2018, doi:10.1093/gigascience/giy016) describes a command line in JSON, from which
platforms such as CBRAIN make a form and start the program.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bids_uad import __version__
from bids_uad.cli.parser import TRAINING, build_parser
from bids_uad.errors import ExitCode

SCHEMA_VERSION = "0.5"
SKIPPED = ("help", "version")
WRITTEN = ("output_dir", "work_dir")
"""Folders that need not exist before the run."""


def descriptor() -> dict[str, Any]:
    """Describe every option of the participant and group levels, and the exit codes.

    Returns
    -------
    dict
        Descriptor of schema version 0.5, for JSON.
    """
    parser = build_parser()
    actions = [
        action
        for action in parser._actions
        if action.dest not in SKIPPED and action.help != argparse.SUPPRESS
    ]
    inputs = [_input(action) for action in actions]
    return {
        "name": "bids_uad",
        "description": parser.description,
        "author": "The bids_uad developers",
        "tool-version": __version__,
        "schema-version": SCHEMA_VERSION,
        "command-line": " ".join(["bids_uad", *(item["value-key"] for item in inputs)]),
        "inputs": inputs,
        "output-files": [
            {
                "id": "output",
                "name": "Derivative dataset",
                "description": "Maps, masks, tables and reports",
                "path-template": "[OUTPUT_DIR]",
            }
        ],
        "error-codes": [
            {"code": int(code), "description": code.meaning[:1].upper() + code.meaning[1:]}
            for code in ExitCode
            if code != ExitCode.OK
        ],
        "tags": {"domain": ["neuroinformatics", "mri", "bids"]},
    }


def _input(action: argparse.Action) -> dict[str, Any]:
    name = action.dest
    flag = next((option for option in action.option_strings if option.startswith("--")), None)
    item: dict[str, Any] = {
        "id": name,
        "name": (flag or name).lstrip("-").replace("-", " ").replace("_", " "),
        "description": action.help,
        "type": _kind(action),
        "value-key": f"[{name.upper()}]",
        "optional": flag is not None,
    }
    if flag:
        item["command-line-flag"] = flag
    if action.nargs == "+":
        item["list"] = True
    if action.choices:
        item["value-choices"] = [choice for choice in action.choices if choice not in TRAINING]
    if isinstance(_sample(action), int):
        item["integer"] = True
    return item


def _kind(action: argparse.Action) -> str:
    if action.nargs == 0:
        return "Flag"
    if _sample(action) == 1:
        return "Number"
    return "File" if action.type is Path and action.dest not in WRITTEN else "String"


def _sample(action: argparse.Action) -> Any:
    """Return what the option reads from the text "1": the number 1 if its values are numbers."""
    try:
        return action.type("1") if action.type else "1"
    except argparse.ArgumentTypeError:
        return None


if __name__ == "__main__":
    print(json.dumps(descriptor(), indent=2))
