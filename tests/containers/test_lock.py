"""What is locked for the image is what the project asks for and is tested with."""

from __future__ import annotations

import re
import subprocess
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


def test_antspyx_is_built_from_its_locked_source_on_arm64(tmp_path):
    """The commands of the Dockerfile divide the lock file into antspyx and the others."""
    lock = (ROOT / "containers/requirements-cuda.txt").read_text()
    (tmp_path / "requirements.txt").write_text(lock)
    for command in re.findall(r"sed .* (?=\\\n)", (ROOT / "Dockerfile").read_text()):
        subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True)
    source, others = (tmp_path / name for name in ("antspyx.txt", "requirements.txt"))
    assert list(pins(source)) == ["antspyx"]
    assert sorted((source.read_text() + others.read_text()).split("\n")) == sorted(lock.split("\n"))
    tools = pins(ROOT / "containers/requirements-build.txt")
    # What antspyx 0.6.3 requires to be built.
    assert pins(source)["antspyx"] == "0.6.3"
    assert "scikit-build-core" in tools
    assert tuple(map(int, tools["nanobind"].split("."))) < (2, 6)
