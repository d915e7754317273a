"""The command line as a Boutiques descriptor, which ``python -m bids_uad.cli.boutiques`` prints.

Boutiques (Glatard et al. 2018, doi:10.1093/gigascience/giy016) lets platforms such as CBRAIN show a form for
a program and start it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bids_uad import __version__
from bids_uad.cli import main
from bids_uad.cli.parser import build_parser

SCHEMA_VERSION = "0.5"
SKIPPED = ("help", "version")
WRITTEN = ("output_dir", "work_dir")
"""Folders that need not be there before the run."""


def descriptor() -> dict[str, Any]:
    """Describe the program: every option that its help shows, and what its exit codes mean.

    Returns
    -------
    dict
        As JSON.
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
            {"code": main.FAILED, "description": "A participant or report failed; the others are complete"},
            {"code": main.USAGE, "description": "Wrong usage"},
            {"code": main.NO_INPUT, "description": "Nothing to work on"},
            {"code": main.UNAVAILABLE, "description": "A GPU, model or atlas is not available"},
            {"code": main.SOFTWARE, "description": "The workflow could not be built"},
            {"code": main.UNWRITABLE, "description": "A folder cannot be written (disk full, read-only)"},
            {"code": main.INTERRUPTED, "description": "Interrupted"},
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
        item["value-choices"] = list(action.choices)
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
    """Read a one as the option does: what gives a one back takes numbers."""
    try:
        return action.type("1") if action.type else "1"
    except argparse.ArgumentTypeError:
        return None


if __name__ == "__main__":
    print(json.dumps(descriptor(), indent=2))
