"""The layering of the package: what may import what, and how much of it one run on scans needs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "bids_uad"
LAYERS = (
    {"errors"},
    {"constraints", "files", "images", "progress", "resources"},
    {"space"},
    {"config"},
    {"networks"},
    {"methods"},
    {"engine", "calibration", "dataset", "preprocessing", "simulation"},
    {"evaluation"},
    {"reports"},
    {"levels", "training"},
    {"cli"},
    {"__main__"},
)
"""From the lowest to the highest; a module imports from its own layer and from those below."""
MAIN_JOB = ("bids_uad.levels.participant.run", "bids_uad.engine.inference")
SHORT_FILES: dict[str, str] = {}
"""Files under 30 lines, each with the reason for it."""


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def imported(module: str) -> frozenset[str]:
    """Modules of the package that a module imports at any depth of its code, and names of modules in text.

    Imports for type checkers alone are left out.
    """
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return frozenset(found & set(MODULES)) - {module}


def layer_of(module: str) -> int | None:
    """Place of a module in `LAYERS`; None for the package itself."""
    parts = module.split(".")
    if len(parts) == 1:
        return None
    return next(number for number, names in enumerate(LAYERS) if parts[1] in names)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_module_imports_from_a_higher_layer(module):
    own = layer_of(module)
    if own is None:
        return
    upward = {other for other in imported(module) if layer_of(other) is not None and layer_of(other) > own}
    # The command line names the runner of each level as text.
    assert not upward


def test_imports_have_no_cycle():
    graph = {module: imported(module) for module in MODULES}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_methods_networks_and_engine_know_neither_nipype_nor_bids():
    for module, path in MODULES.items():
        if module.split(".")[1:2] not in (["methods"], ["networks"], ["engine"]):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        roots = {
            alias.name.split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        roots |= {
            str(node.module).split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
        }
        assert not roots & {"nipype", "niworkflows", "bids"}, module


def test_all_commands_use_the_parser_that_suggests_options():
    calls = {
        module
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("ArgumentParser")
    }
    assert calls == set()


def test_start_of_a_run_imports_neither_pytorch_nor_scikit_learn():
    # They take seconds, and only some of the processes of a run need them.
    program = (
        f"import sys, {MAIN_JOB[0]}; print(*{{'torch', 'sklearn', 'scipy.stats', 'ants'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_run_on_scans_needs_fewer_than_sixty_files_and_nothing_that_only_trains():
    needed, waiting = set(), list(MAIN_JOB)
    while waiting:
        module = waiting.pop()
        if module in needed or module.startswith("bids_uad.reports"):
            continue
        needed.add(module)
        waiting += imported(module)
    files = {module for module in needed if MODULES[module].name != "__init__.py"}
    assert len(files) < 60, sorted(files)
    assert not {module for module in needed if module.split(".")[1:2] in (["training"], ["simulation"])}


def test_no_file_is_too_short_to_be_worth_opening():
    short = {
        str(path.relative_to(PACKAGE))
        for path in MODULES.values()
        if path.name not in ("__init__.py", "__main__.py")
        and len(path.read_text(encoding="utf-8").splitlines()) < 30
    }
    assert short == set(SHORT_FILES)


PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
HOPS = re.findall(r"^\| \d+ \|.*\| `(bids_uad/[\w/]+\.py)` \| `(\w+)` \|$", PAGE, re.MULTILINE)


def test_the_page_follows_a_scan_in_at_most_twelve_steps():
    assert 8 <= len(HOPS) <= 12


@pytest.mark.parametrize(("file", "name"), HOPS)
def test_each_step_of_the_page_is_a_public_definition(file, name):
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_each_step_of_the_page_is_reached_from_the_one_before_it_or_an_earlier_one():
    modules = [_name(ROOT / file) for file, _ in HOPS]
    for number, module in enumerate(modules[1:], 1):
        reached, waiting = set(), modules[:number]
        while waiting:
            new = imported(waiting.pop()) - reached
            reached |= new
            waiting += new
        assert module in reached


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:\w+/)*\w+(?:/|\.py))`", PAGE))))
def test_files_and_folders_of_the_page_exist(path):
    assert (PACKAGE / path).exists() or (ROOT / path).exists()
