"""What is locked for the image is what the project asks for and is tested with."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PIN = re.compile(r"^([A-Za-z0-9_.-]+)==([^\s;\\]+)", re.MULTILINE)


def pins(path: Path) -> dict[str, str]:
    return {name.lower().replace("_", "-"): version for name, version in PIN.findall(path.read_text())}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_lock_holds_every_dependency_in_the_tested_version(device):
    path = ROOT / "containers" / f"requirements-{device}.txt"
    locked, tested = pins(path), pins(ROOT / "constraints.txt")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {re.match(r"[A-Za-z0-9_.-]+", line)[0].lower() for line in project["dependencies"]}
    assert asked <= set(locked), "run containers/lock.sh"
    versions = {name: version.removesuffix("+cpu") for name, version in locked.items()}
    other = {
        name: (versions[name], tested[name])
        for name in versions.keys() & tested
        if versions[name] != tested[name]
    }
    assert not other, "run containers/lock.sh"
    assert ("nvidia-cudnn-cu13" in locked) == (device == "cuda")
    assert locked["torch"].endswith("+cpu") == (device == "cpu")
    # Each is followed by its hashes, and no line names where it comes from.
    requirements = path.read_text().replace("\\\n", " ").strip().splitlines()
    assert all("--hash=sha256:" in line for line in requirements)
    assert not re.search(r"https?:|file:|--find-links|--index", path.read_text())
