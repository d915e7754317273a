import os

import pytest

from bids_uad.errors import ConfigError
from bids_uad.resources import (
    USED_FRACTION,
    available_cpus,
    available_memory_gb,
    has_native_bf16,
    oom_kills,
    parse_memory,
    why_killed,
)


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
    with pytest.raises(ConfigError, match="not a memory size"):
        parse_memory(text)


@pytest.mark.parametrize(
    ("flags", "expected"), [("avx512f avx512_bf16", True), ("amx_bf16", True), ("avx512f avx512_vnni", False)]
)
def test_bf16_is_read_from_the_flags_of_the_cpu(tmp_path, flags, expected):
    (tmp_path / "cpuinfo").write_text(f"model name : a CPU\nflags : fpu {flags}\n")
    assert has_native_bf16(tmp_path / "cpuinfo") == expected
    assert not has_native_bf16(tmp_path / "absent")


@pytest.fixture
def no_slurm(monkeypatch):
    for name in ("CPUS_PER_TASK", "CPUS_ON_NODE", "MEM_PER_NODE", "MEM_PER_CPU"):
        monkeypatch.delenv(f"SLURM_{name}", raising=False)


@pytest.fixture
def own(tmp_path):
    """What /proc says of a process two or three groups down, in both versions of control groups."""
    path = tmp_path / "own"
    path.write_text("4:memory:/slurm/job_3/step_0\n1:cpu,cpuacct:/slurm/job_3\n0::/slurm/job_3/step_0\n")
    return path


def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


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
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "7")
    assert available_cpus(tmp_path) == 7
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "5")
    assert available_cpus(tmp_path) == 5


def test_limits_hold_for_all_groups_below(tmp_path, no_slurm, own, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    none = tmp_path / "no meminfo"
    put(tmp_path / "slurm/cpu.max", "800000 100000\n")
    put(tmp_path / "slurm/job_3/step_0/cpu.max", "max 100000\n")
    put(tmp_path / "slurm/other/cpu.max", "100000 100000\n")
    assert available_cpus(tmp_path, own) == 8
    for group, quota in (("slurm/job_3", "300000"), ("slurm", "-1")):
        put(tmp_path / "cpu,cpuacct" / group / "cpu.cfs_quota_us", f"{quota}\n")
        put(tmp_path / "cpu,cpuacct" / group / "cpu.cfs_period_us", "100000\n")
    assert available_cpus(tmp_path, own) == 3
    put(tmp_path / "slurm/job_3/memory.max", "4000000000\n")
    put(tmp_path / "slurm/job_3/step_0/memory.max", "max\n")
    assert available_memory_gb(tmp_path, none, own) == pytest.approx(4 * USED_FRACTION)
    put(tmp_path / "memory/slurm/memory.limit_in_bytes", "3000000000\n")
    put(tmp_path / "memory/memory.limit_in_bytes", "9223372036854771712\n")
    assert available_memory_gb(tmp_path, none, own) == pytest.approx(3 * USED_FRACTION)


@pytest.mark.parametrize(
    "counter", ["slurm/job_3/step_0/memory.events", "memory/slurm/job_3/step_0/memory.oom_control"]
)
def test_kills_for_memory_are_told_from_others(tmp_path, own, counter):
    put(tmp_path / counter, "low 0\noom 3\noom_kill 2\n")
    assert oom_kills(tmp_path, own) == 2
    assert why_killed(2, tmp_path, own).startswith("(SIGKILL), most likely")
    put(tmp_path / "slurm/job_3/memory.max", "4000000000\n")
    assert why_killed(1, tmp_path, own).startswith("because memory ran out (limit 4.00 GB); give")


def test_memory_is_the_least_of_host_cgroup_and_slurm(tmp_path, no_slurm, monkeypatch):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       50000000 kB\nMemFree: 1 kB\n")
    assert available_memory_gb(tmp_path, meminfo) == pytest.approx(51.2 * USED_FRACTION, abs=0.01)
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory_gb(tmp_path, meminfo) == pytest.approx(51.2 * USED_FRACTION, abs=0.01)
    (tmp_path / "memory.max").write_text("8000000000\n")
    assert available_memory_gb(tmp_path, meminfo) == pytest.approx(8 * USED_FRACTION, abs=0.01)
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "2048")
    assert available_memory_gb(tmp_path, meminfo) == pytest.approx(2.147 * USED_FRACTION, abs=0.01)
    monkeypatch.delenv("SLURM_MEM_PER_NODE")
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "1024")
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "3")
    assert available_memory_gb(tmp_path, meminfo) == pytest.approx(3.221 * USED_FRACTION, abs=0.01)
