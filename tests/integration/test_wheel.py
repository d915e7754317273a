"""What is published is whole: the source archive, and the wheel in an environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = ROOT / "constraints.txt"

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(3600)]


def tracked() -> set[str]:
    """Files of the checkout that git knows and that are still there."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name for name in done.stdout.splitlines() if (ROOT / name).is_file()}


def run(*command: object, cwd: Path | None = None) -> str:
    """Run a program that sees nothing of this environment; give what it printed."""
    environment = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    environment |= {"HOME": str(cwd or Path.home()), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The source archive, and the wheel that is built from it."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", out, ROOT]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


def test_source_archive_holds_the_whole_checkout(archives):
    with tarfile.open(archives[0]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert tracked() - names == set()


def test_wheel_holds_the_package_and_nothing_else(archives):
    with zipfile.ZipFile(archives[1]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        (notice,) = [name for name in wheel.namelist() if name.endswith("licenses/boilerplate/NOTICE")]
        assert "SynthSeg" in wheel.read(notice).decode()
    expected = {name for name in tracked() if name.startswith("bids_uad/")}
    expected |= {f"bids_uad/data/{name}" for name in tracked() if name.startswith("boilerplate/")}
    assert names == expected


def test_wheel_runs_the_demo_in_an_empty_environment(archives, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python, program = environment / "bin" / "python", environment / "bin" / "bids_uad"
    # pip as it is set up here, so that what was downloaded once is not downloaded again.
    command = [python, "-m", "pip", "install", "--quiet", "--constraint", CONSTRAINTS, archives[1]]
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, check=True, env=own)
    run(python, "-m", "pip", "check", cwd=home)
    where = run(python, "-c", "import bids_uad; print(bids_uad.__file__)", cwd=home)
    assert Path(where.strip()).is_relative_to(environment)

    data, out = home / "data", home / "out"
    run(python, "-m", "bids_uad.simulation", data, "--healthy", 1, "--stroke", 1, "--seed", 7, cwd=home)
    run(
        program, data, out, "participant", "group", "--models", "disyre", "intensity", "-w", home / "work",
        "-d", f"lesions={data / 'derivatives' / 'lesions'}", "--nprocs", 2, cwd=home,
    )  # fmt: skip
    benchmark = pd.read_csv(out / "group_benchmark.tsv", sep="\t")
    assert set(benchmark["detector"]) == {"disyre", "intensity"}
    assert (out / "group.html").is_file()
    assert len(list(out.glob("sub-*.html"))) == 2
    assert "@article{n4," in (out / "logs" / "CITATION.bib").read_text()
    assert "Disyre on T1w" in (out / "logs" / "CITATION.md").read_text()
