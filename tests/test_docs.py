"""The documentation builds without a warning and network, and is complete; its commands parse."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest

from bids_uad.cli.parser import (
    SUBCOMMANDS,
    build_parser,
    build_scans_parser,
    build_training_parser,
    subcommand_of,
)
from bids_uad.dataset.sidecars import (
    LESION_COLUMNS,
    LONGITUDINAL_COLUMNS,
    METRICS_COLUMNS,
    QUALITY_COLUMNS,
)
from bids_uad.methods.registry import DETECTORS
from bids_uad.preprocessing import atlas
from bids_uad.simulation import __main__ as simulation
from bids_uad.training import brain_extraction

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "containers" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXPECTED = ROOT / "tests" / "integration" / "expected_outputs.txt"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "-q", "-b", "html"]
    command += ["-d", str(folder / "doctrees"), str(ROOT / "docs"), str(folder / "site")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


def words(page: Path) -> str:
    """Return the visible text of a page."""
    text = page.read_text(encoding="utf-8")
    return unescape(re.sub(r"<[^>]+>", "", text[text.index("<article") :]))


def test_no_page_loads_from_another_host(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 10
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*\ssrc="([^"]+)"', text)
        loaded += re.findall(r'<link[^>]*rel="(?:stylesheet|preload)"[^>]*href="([^"]+)"', text)
        assert [source for source in loaded if source.startswith(("http", "//"))] == [], page.name


def test_formulas_are_drawn_by_the_browser(site):
    text = (site / "detectors.html").read_text(encoding="utf-8")
    assert text.count("<math") > 30
    assert not re.search(r"<script[^>]*mathjax", text, re.IGNORECASE)


def test_every_option_is_explained(site):
    text = words(site / "command_line.html")
    spellings = [
        name
        for action in (*build_parser()._actions, *build_scans_parser()._actions)
        for name in action.option_strings
        if action.help != argparse.SUPPRESS and "_" not in name.lstrip("-")
    ]
    assert [name for name in spellings if name not in text] == []


def test_every_file_and_column_is_explained(site):
    text = words(site / "outputs.html")
    columns = (*QUALITY_COLUMNS, *METRICS_COLUMNS, *LESION_COLUMNS, *LONGITUDINAL_COLUMNS)
    assert [name for name in columns if name not in text] == []
    for path in map(Path, EXPECTED.read_text().split()):
        name = re.sub(r"^sub-\d+(?=_)", "*", path.name)
        name = name.replace("Patchcore", "Disyre").replace("Intensity", "Disyre").replace("T2w", "T1w")
        if path.suffix == ".json" or "T1wBrain" in name:
            continue
        if path.parts[0].startswith("tpl"):
            name = "tpl-SRI24"
        assert re.sub(r"^sub-\d+\.html", "sub-01.html", name) in text, path


def test_every_detector_has_a_section(site):
    text = (site / "detectors.html").read_text(encoding="utf-8")
    for name, entry in DETECTORS.items():
        assert re.search(rf"<h2>{re.escape(entry.title)}<", text), name


PARSERS = {
    None: build_parser,
    "scans": build_scans_parser,
    "train": lambda: build_training_parser("train"),
    "calibrate": lambda: build_training_parser("calibrate"),
    "simulate": simulation.build_parser,
    "atlas": atlas.build_parser,
    "extraction": brain_extraction.build_parser,
}


PROGRAM = re.compile(r"([^=]*/)?bids_uad(:[0-9.]+|(-[0-9.]+)?\.sif)?")
"""The program, and its Docker and Apptainer images."""
OTHERS = ("cp", "datalad", "docker build", "nipoppy")
"""Commands that take the name of the program or an image, but do not run it."""


def commands(page: Path) -> list[str]:
    """Return the command lines of a page: indented by four spaces, continued by a backslash."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    return [line.strip() for line in re.findall(r"^(?: {4}| {7})(\S.*)$", text, re.MULTILINE)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_parse(page, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "SCANS").mkdir()
    for command in commands(page):
        words = shlex.split(command.replace("[OPTIONS]", "").replace("{participant,group} ...", "group"))
        program = next((word for word in words if PROGRAM.fullmatch(word)), None)
        if program is None or command.startswith(OTHERS):
            continue
        arguments = words[words.index(program) + 1 :]
        if arguments != ["--version"] and "{" not in arguments[0]:
            subcommand = subcommand_of(arguments)
            try:
                PARSERS[subcommand]().parse_args(arguments[subcommand in SUBCOMMANDS :])
            except SystemExit:
                pytest.fail(f"{command}: {capsys.readouterr().err}")


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    mentioned = {
        name for page in PAGES for name in re.findall(r"(?:`| {4})make (?:-j\d )?([a-z-]+)", page.read_text())
    }
    assert "demo" in mentioned
    assert mentioned <= targets


def test_files_that_the_readme_links_to_exist():
    links = re.findall(r"\]\(((?!http)[^)#]+)\)", (ROOT / "README.md").read_text())
    assert [link for link in links if not (ROOT / link).is_file()] == []
