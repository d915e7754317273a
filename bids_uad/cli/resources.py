"""What this process may use: CPUs and memory as the scheduler or container granted them."""

from __future__ import annotations

import os
import re
from pathlib import Path

from bids_uad.errors import ConfigError

SHARE = 0.9
"""Part of the memory that is planned with; the rest is for the interpreter and the file cache."""

_GB_PER_UNIT = {"": 1e-3, "K": 1e-6, "M": 1e-3, "G": 1.0, "T": 1e3}
_MEMORY = re.compile(r"^\s*(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]?)i?b?\s*$", re.IGNORECASE)


def parse_memory(text: str) -> float:
    """Read a memory size.

    Parameters
    ----------
    text : str
        A number with an optional unit: `8000` (MB, as in fMRIPrep), `1.5G`, `16 GB`, `900m`, `1TB`.

    Returns
    -------
    float
        Gigabytes.

    Raises
    ------
    ConfigError
        If it is no positive memory size.
    """
    match = _MEMORY.match(text)
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"'{text}' is no memory size; write for example 8000 (MB), 1.5G or 16GB")
    return float(match[1]) * _GB_PER_UNIT[match[2].upper()]


def available_cpus(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Count the CPUs granted to this process: the least of affinity, cgroup quota and SLURM's grant."""
    counts = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    granted = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if granted.isdigit():
        counts.append(int(granted))
    quota = cgroup / "cpu.max"
    if quota.is_file():
        limit, period = quota.read_text().split()[:2]
        if limit != "max":
            counts.append(int(int(limit) / int(period)))
    return max(1, min(counts))


def available_memory_gb(
    cgroup: Path = Path("/sys/fs/cgroup"), meminfo: Path = Path("/proc/meminfo")
) -> float:
    """Find the memory granted to this process, in GB: a share of the least of host, cgroup and SLURM."""
    limits = []
    if meminfo.is_file():
        total = re.search(r"^MemTotal:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
        if total:
            limits.append(int(total[1]) * 1024 / 1e9)
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        limit = cgroup / name
        if limit.is_file() and (value := limit.read_text().strip()).isdigit():
            limits.append(int(value) / 1e9)
    granted = os.environ.get("SLURM_MEM_PER_NODE", "")
    if granted.isdigit() and int(granted) > 0:
        limits.append(int(granted) * 1024 * 1024 / 1e9)
    if not limits:
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        limits.append(pages / 1e9)
    return round(min(limits) * SHARE, 2)
