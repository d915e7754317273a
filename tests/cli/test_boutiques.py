"""Boutiques descriptor: up to date, valid, and consistent with the parser."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from boutiques.validator import DescriptorValidationError, validate_descriptor

from bids_uad.cli.boutiques import descriptor
from bids_uad.cli.parser import build_parser
from boutiques import bosh

FILE = Path(__file__).resolve().parents[2] / "boutiques" / "descriptor.json"


def simulated(capsys, tmp_path, invocation: dict) -> list[str]:
    """Let Boutiques write the command line of an invocation."""
    file = tmp_path / "invocation.json"
    file.write_text(json.dumps(invocation))
    result = bosh(["exec", "simulate", "-i", str(file), str(FILE)])
    capsys.readouterr()
    return shlex.split(result.shell_command)


def test_descriptor_file_is_up_to_date():
    written = json.loads(FILE.read_text(encoding="utf-8"))
    assert written == descriptor(), "run `make descriptor`"


def test_descriptor_is_valid():
    validate_descriptor(descriptor())
    broken = descriptor()
    del broken["inputs"][0]["type"]
    with pytest.raises(DescriptorValidationError):
        validate_descriptor(broken)


def test_descriptor_types_match_the_parser():
    kinds = {item["id"]: (item["type"], item.get("integer", False)) for item in descriptor()["inputs"]}
    assert kinds["nprocs"] == kinds["random_seed"] == ("Number", True)
    assert kinds["min_counted_volume"] == ("Number", False)
    assert kinds["bids_dir"] == kinds["atlas_dir"] == ("File", False)
    assert kinds["output_dir"] == kinds["mem_gb"] == kinds["device"] == ("String", False)
    assert kinds["dry_run"] == ("Flag", False)
    assert not {"notrack", "help", "version", "train_fraction"} & set(kinds)


def test_command_line_of_the_descriptor_is_parsed(capsys, tmp_path):
    (tmp_path / "data").mkdir()
    invocation = {
        "bids_dir": str(tmp_path / "data"),
        "output_dir": "out",
        "levels": ["participant", "group"],
        "participants": ["01", "02"],
        "modalities": ["T1w"],
        "nprocs": 2,
        "clean_workdir": True,
        "min_counted_volume": 0.5,
    }
    program, *arguments = simulated(capsys, tmp_path, invocation)
    # A list of values takes in what follows, so the positional arguments come first.
    known = vars(build_parser().parse_args(arguments))
    assert program == "bids_uad"
    assert known == {
        "bids_dir": tmp_path / "data",
        "output_dir": Path("out"),
        "levels": ["participant", "group"],
        "participants": ["01", "02"],
        "modalities": ["T1w"],
        "nprocs": 2,
        "clean_workdir": True,
        "min_counted_volume": 0.5,
    }
