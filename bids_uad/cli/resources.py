"""What this process may use: CPUs and memory as the scheduler or container granted them."""

from __future__ import annotations

import os
import re
from pathlib import Path

from bids_uad import cgroups
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


def available_cpus(cgroup: Path = cgroups.ROOT, own: Path = cgroups.OWN) -> int:
    """Count the CPUs granted to this process: the least of affinity, cgroup quotas and SLURM's grant."""
    counts = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    granted = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE", "")
    if granted.isdigit():
        counts.append(int(granted))
    counts += [int(quota) for quota in cgroups.cpu_quotas(cgroup, own)]
    return max(1, min(counts))


def available_memory_gb(
    cgroup: Path = cgroups.ROOT, meminfo: Path = Path("/proc/meminfo"), own: Path = cgroups.OWN
) -> float:
    """Find the memory granted to this process, in GB: a share of the least of host, cgroups and SLURM."""
    limits = [limit / 1e9 for limit in cgroups.memory_limits(cgroup, own)]
    if meminfo.is_file():
        total = re.search(r"^MemTotal:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
        if total:
            limits.append(int(total[1]) * 1024 / 1e9)
    limits += [megabytes * 1024 * 1024 / 1e9 for megabytes in _slurm_megabytes()]
    if not limits:
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        limits.append(pages / 1e9)
    return round(min(limits) * SHARE, 2)


def _slurm_megabytes() -> list[int]:
    """Memory that SLURM granted on this node, asked for by node (0 is all of it) or by CPU."""
    by_node, by_cpu, cpus = (
        os.environ.get(f"SLURM_{name}", "") for name in ("MEM_PER_NODE", "MEM_PER_CPU", "CPUS_ON_NODE")
    )
    if by_node.isdigit() and int(by_node) > 0:
        return [int(by_node)]
    return [int(by_cpu) * int(cpus)] if by_cpu.isdigit() and cpus.isdigit() else []
