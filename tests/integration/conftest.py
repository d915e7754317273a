"""A small synthetic dataset, and the program run on it once for all tests of this folder."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from bids_uad.simulation import __main__ as simulation


@dataclass(frozen=True)
class Run:
    """What one call of the program left behind."""

    code: int
    text: str
    out: Path
    data: Path


def bids_uad(*arguments: object, timeout: float = 1500) -> subprocess.CompletedProcess:
    """Call the program as a user would."""
    return subprocess.run(
        [sys.executable, "-m", "bids_uad", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "COLUMNS": "200"},
        check=False,
    )


DETECTORS = ("disyre", "intensity")


def simulate(folder: Path, *options: str) -> Path:
    """Simulate a raw dataset."""
    assert simulation.main([str(folder), *options, "--seed", "7"]) == 0
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """One healthy subject with a T1w scan, and one with a stroke, T1w and T2w; raw BIDS."""
    folder = simulate(tmp_path_factory.mktemp("simulated") / "data", "--healthy", "1", "--stroke", "1")
    for path in folder.rglob("sub-001_T2w.*"):
        path.unlink()
    return folder


@pytest.fixture(scope="session")
def run(data, tmp_path_factory) -> Run:
    """Participant and group level with two detectors."""
    base = tmp_path_factory.mktemp("whole")
    done = bids_uad(
        data, base / "out", "participant", "group", "-w", base / "work", "--nprocs", "2", "--no-viewer",
        "-d", f"lesions={data / 'derivatives' / 'lesions'}", "--models", *DETECTORS,
    )  # fmt: skip
    return Run(done.returncode, done.stdout + done.stderr, base / "out", data)
