"""The program on a real SLURM cluster of one node, with stand-ins for preprocessing and detection.

`pytest -m slurm` as root, where Debian's slurm-wlm and munge are installed.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.one_node import OneNode, missing
from tests.dataset.skeleton import write_dataset
from tests.levels.fakes import fake_bundle, fake_reference
from tests.levels.test_side_by_side import content

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(bool(missing()), reason=f"not there: {', '.join(missing())}"),
]

ROOT = Path(__file__).parents[2]
SUBMIT = ROOT / "containers" / "slurm" / "submit.sbatch"
LABELS = ["01", "02", "03", "04"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with OneNode(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A dataset, a model, and a `bids_uad` with stand-ins."""
    folder = tmp_path_factory.mktemp("study")
    names = [f"sub-{label}/anat/sub-{label}_T1w.nii.gz" for label in LABELS]
    write_dataset(folder / "raw", {name: {"SkullStripped": True} for name in names})
    fake_reference(folder)
    fake_bundle(folder / "disyre-T1w", "disyre", "T1w")
    program = folder / "bin" / "bids_uad"
    program.parent.mkdir()
    program.write_text(f'#!/bin/bash\nexec {sys.executable} -m tests.levels.with_fakes "$@"\n')
    program.chmod(0o755)
    return folder


class Site:
    """The cluster, the study, and one output folder."""

    def __init__(self, cluster: OneNode, study: Path, folder: Path) -> None:
        self.cluster, self.study, self.folder = cluster, study, folder
        self.out, self.work = folder / "out", folder / "work"
        self.environment = {
            **cluster.environment,
            "PATH": f"{study / 'bin'}:{cluster.environment['PATH']}",
            "PYTHONPATH": str(ROOT),
            "REFERENCE": str(study),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "300",
            "DATA": str(study / "raw"),
            "OUT": str(self.out),
            "WORK": str(self.work),
        }

    def submit(self, *options: str, memory: str = "4G") -> str:
        """Submit the example as it is; the job's number."""
        command = ["sbatch", "--parsable", f"--mem={memory}", *options, SUBMIT]
        command += ["--device", "cpu", "--models", self.study / "disyre-T1w"]
        done = subprocess.run(
            list(map(str, command)), env=self.environment, cwd=self.folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def run(self, plugin: str, memory: str) -> subprocess.CompletedProcess:
        """Run the program here, and its steps as jobs, by one of the examples."""
        text = (SUBMIT.with_name(f"{plugin}.yml")).read_text()
        file = self.folder / "plugin.yml"
        file.write_text(text.replace("--mem=4G", f"--mem={memory}"))
        command = [self.study / "bin" / "bids_uad", self.environment["DATA"], self.out, "participant"]
        command += ["--participant-label", "01", "hungry"]
        command += ["-w", self.work, "--device", "cpu", "--use-plugin", file]
        command += ["--models", self.study / "disyre-T1w"]
        return subprocess.run(
            list(map(str, command)),
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=1800,
        )

    def logs(self) -> str:
        """What the array's tasks said."""
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("bids_uad-*.log")))


@pytest.fixture
def site(cluster, study, tmp_path):
    return Site(cluster, study, tmp_path)


@pytest.fixture(scope="module")
def undisturbed(cluster, study, tmp_path_factory):
    """An array of four participants, and the group level that waits for it."""
    site = Site(cluster, study, tmp_path_factory.mktemp("undisturbed"))
    array = site.submit("--array=1-4")
    group = site.submit("--array=0", f"--dependency=afterok:{array}")
    assert cluster.wait(group) == ["COMPLETED"], site.logs()
    return site


def test_array_job_and_group_level_write_all_outputs(undisturbed):
    out = undisturbed.out
    assert {path.name for path in out.glob("sub-*.html")} == {f"sub-{label}.html" for label in LABELS}
    assert {path.name.split("_")[0] for path in out.rglob("*_metrics.tsv")} == {f"sub-{x}" for x in LABELS}
    lines = (out / "group_subjects.tsv").read_text().splitlines()
    assert len(lines) == 1 + len(LABELS)
    assert (out / "group.html").is_file()


def test_killed_and_resubmitted_tasks_equal_an_undisturbed_run(undisturbed, site):
    array = site.submit("--array=1-4")
    calls = site.folder / "calls.txt"
    deadline = time.monotonic() + 600
    while not (calls.exists() and "preproc" in calls.read_text()):
        assert time.monotonic() < deadline, site.logs()
        time.sleep(0.05)
    site.cluster.ask("scancel", "--signal=KILL", "--full", array)
    states = site.cluster.wait(array)
    assert states != ["COMPLETED"] * 4, states
    array = site.submit("--array=1-4")
    group = site.submit("--array=0", f"--dependency=afterok:{array}")
    assert site.cluster.wait(group) == ["COMPLETED"], site.logs()
    assert content(site.out) == content(undisturbed.out)


@pytest.fixture
def hungry(study):
    """A participant whose preprocessing takes more memory than there is."""
    name = "sub-hungry/anat/sub-hungry_T1w.nii.gz"
    write_dataset(study / "raw", {name: {"SkullStripped": True}})
    yield
    for path in (study / "raw" / "sub-hungry").rglob("*.*"):
        path.unlink()
    (study / "raw" / "sub-hungry" / "anat").rmdir()
    (study / "raw" / "sub-hungry").rmdir()


def done_in(out: Path) -> set[str]:
    return {path.name.split("_")[0] for path in out.rglob("*_metrics.tsv")}


def test_out_of_memory_is_reported(site, hungry):
    if not site.cluster.limits_memory:
        pytest.skip("control groups of version 1 limit no memory here")
    job = site.submit("--array=5", memory="2G")
    site.cluster.wait(job)
    said = " ".join(site.logs().split())
    assert "was killed because memory ran out (limit 2.15 GB); give the job more memory" in said
    assert done_in(site.out) == set()


@pytest.mark.parametrize("plugin", ["slurm", "slurmgraph"])
def test_nodes_as_separate_jobs(undisturbed, site, hungry, plugin):
    done = site.run(plugin, memory="1G")
    assert done_in(site.out) == {"sub-01"}, done.stderr
    mine, theirs = (content(folder / "sub-01") for folder in (site.out, undisturbed.out))
    assert mine == theirs
    assert done.returncode == 1
    if site.cluster.limits_memory:
        said = " ".join(done.stderr.split())
        assert "was killed because memory ran out; give the jobs more memory" in said
    assert "Traceback" not in done.stderr
