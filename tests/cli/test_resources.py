import os

import pytest

from bids_uad.cli.resources import SHARE, available_cpus, available_memory_gb, parse_memory
from bids_uad.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "gigabytes"),
    [
        ("8000", 8.0),
        ("1.5G", 1.5),
        ("1.5g", 1.5),
        ("16 GB", 16.0),
        ("16gb", 16.0),
        ("16GiB", 16.0),
        ("900M", 0.9),
        (".5T", 500.0),
        ("250000K", 0.25),
        (" 2 G ", 2.0),
    ],
)
def test_memory_sizes(text, gigabytes):
    assert parse_memory(text) == pytest.approx(gigabytes)


@pytest.mark.parametrize("text", ["", "G", "0", "-4G", "4X", "4 4G", "1,5G", "4GG", "nan"])
def test_what_is_no_memory_size_is_refused(text):
    with pytest.raises(ConfigError, match="no memory size"):
        parse_memory(text)


@pytest.fixture
def no_slurm(monkeypatch):
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_MEM_PER_NODE"):
        monkeypatch.delenv(name, raising=False)


def test_cgroup_quota_limits_cpus(tmp_path, no_slurm, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    assert available_cpus(tmp_path) == 64
    (tmp_path / "cpu.max").write_text("350000 100000\n")
    assert available_cpus(tmp_path) == 3
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert available_cpus(tmp_path) == 1
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert available_cpus(tmp_path) == 64


def test_slurm_limits_cpus(tmp_path, no_slurm, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "5")
    assert available_cpus(tmp_path) == 5


def test_memory_is_the_least_of_host_cgroup_and_slurm(tmp_path, no_slurm, monkeypatch):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       50000000 kB\nMemFree: 1 kB\n")
    assert available_memory_gb(tmp_path, meminfo) == pytest.approx(51.2 * SHARE, abs=0.01)
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory_gb(tmp_path, meminfo) == pytest.approx(51.2 * SHARE, abs=0.01)
    (tmp_path / "memory.max").write_text("8000000000\n")
    assert available_memory_gb(tmp_path, meminfo) == pytest.approx(8 * SHARE, abs=0.01)
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "2048")
    assert available_memory_gb(tmp_path, meminfo) == pytest.approx(2.147 * SHARE, abs=0.01)
