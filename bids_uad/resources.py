"""CPUs and memory that are granted to this process by scheduler, container or host, and worker processes."""

from __future__ import annotations

import fcntl
import multiprocessing as mp
import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from bids_uad.errors import ConfigError

ROOT = Path("/sys/fs/cgroup")
"""Mount point of control groups."""
OWN = Path("/proc/self/cgroup")
"""Control groups of this process."""
USED_FRACTION = 0.9
"""Fraction of the granted memory that is used; the rest is for the interpreter and the file cache."""

_GB_PER_UNIT = {"": 1e-3, "K": 1e-6, "M": 1e-3, "G": 1.0, "T": 1e3}
_MEMORY = re.compile(r"^\s*(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]?)i?b?\s*$", re.IGNORECASE)


def cpu_quotas(root: Path = ROOT, own: Path = OWN) -> list[float]:
    """Return the CPU limits of this process's control groups, in CPUs."""
    quotas = [path.read_text().split()[:2] for path in _files("cpu", "cpu.max", root, own)]
    for path in _files("cpu", "cpu.cfs_quota_us", root, own):
        quotas.append([path.read_text().strip(), path.with_name("cpu.cfs_period_us").read_text().strip()])
    # No limit is "max" in version 2 of control groups and -1 in version 1.
    return [int(quota) / int(period) for quota, period in quotas if quota.isdigit()]


def memory_limits(root: Path = ROOT, own: Path = OWN) -> list[int]:
    """Return the memory limits of this process's control groups, in bytes."""
    paths = [
        *_files("memory", "memory.max", root, own),
        *_files("memory", "memory.limit_in_bytes", root, own),
    ]
    return [int(value) for path in paths if (value := path.read_text().strip()).isdigit()]


def oom_kills(root: Path = ROOT, own: Path = OWN) -> int:
    """Return how many processes of this control group the kernel has killed because memory ran out."""
    for name in ("memory.events", "memory.oom_control"):
        for path in _files("memory", name, root, own)[:1]:
            counts = dict(line.split() for line in path.read_text().splitlines())
            return int(counts.get("oom_kill", 0))
    return 0


def why_killed(kills_before: int, root: Path = ROOT, own: Path = OWN) -> str:
    """Return why a process was killed by SIGKILL.

    Parameters
    ----------
    kills_before : int
        Result of :func:`oom_kills` before the process was started.
    root : pathlib.Path, default=ROOT
        Mount point of control groups.
    own : pathlib.Path, default=OWN
        File with the control groups of this process.

    Returns
    -------
    str
        Cause, which follows "was killed", and remedy.
    """
    remedy = "give the job more memory or lower --nprocs"
    if oom_kills(root, own) <= kills_before:
        return f"(SIGKILL), most likely because memory ran out; {remedy}"
    limits = memory_limits(root, own)
    granted = f" (limit {min(limits) / 1e9:.2f} GB)" if limits else ""
    return f"because memory ran out{granted}; {remedy}"


def _files(controller: str, name: str, root: Path, own: Path) -> list[Path]:
    """List the files with a name in this process's control group and in those above it, in this order."""
    folders = []
    for line in own.read_text().splitlines() if own.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers == "" or controller in controllers.split(","):
            top = root / controllers
            group = top / path.lstrip("/")
            folders += [group, *[parent for parent in group.parents if parent.is_relative_to(top)]]
    # In a container, /proc lists paths of the host, but the group of the container is mounted at the root.
    folders += [root / controller, root]
    return [folder / name for folder in dict.fromkeys(folders) if (folder / name).is_file()]


def parse_memory(text: str) -> float:
    """Parse a memory size.

    Parameters
    ----------
    text : str
        A number with an optional unit: `8000` (MB, as in fMRIPrep), `1.5G`, `16 GB`, `900m`, `1TB`.

    Returns
    -------
    float
        Size in GB.

    Raises
    ------
    ConfigError
        If the text is not a positive memory size.
    """
    match = _MEMORY.match(text)
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"'{text}' is not a memory size; write for example 8000 (MB), 1.5G or 16GB")
    return float(match[1]) * _GB_PER_UNIT[match[2].upper()]


def available_cpus(cgroup: Path = ROOT, own: Path = OWN) -> int:
    """Return the number of CPUs granted to this process: the minimum of affinity, cgroup quotas and SLURM."""
    counts = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    granted = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE", "")
    if granted.isdigit():
        counts.append(int(granted))
    counts += [int(quota) for quota in cpu_quotas(cgroup, own)]
    return max(1, min(counts))


def available_memory_gb(cgroup: Path = ROOT, meminfo: Path = Path("/proc/meminfo"), own: Path = OWN) -> float:
    """Return the memory for this process in GB: `USED_FRACTION` of the minimum of host, cgroups and SLURM."""
    limits = [limit / 1e9 for limit in memory_limits(cgroup, own)]
    if meminfo.is_file():
        total = re.search(r"^MemTotal:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
        if total:
            limits.append(int(total[1]) * 1024 / 1e9)
    limits += [megabytes * 1024 * 1024 / 1e9 for megabytes in _slurm_megabytes()]
    if not limits:
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        limits.append(pages / 1e9)
    return round(min(limits) * USED_FRACTION, 2)


def _slurm_megabytes() -> list[int]:
    """Return the memory granted by SLURM on this node in MB, requested per node (0: all) or per CPU."""
    by_node, by_cpu, cpus = (
        os.environ.get(f"SLURM_{name}", "") for name in ("MEM_PER_NODE", "MEM_PER_CPU", "CPUS_ON_NODE")
    )
    if by_node.isdigit() and int(by_node) > 0:
        return [int(by_node)]
    return [int(by_cpu) * int(cpus)] if by_cpu.isdigit() and cpus.isdigit() else []


def end_with_parent() -> None:
    """Let the kernel kill this worker and its children when the parent process ends.

    Otherwise workers of a killed run would write into folders of the next run, or wait forever. The kernel
    signals the end of the pipe to the parent; a thread could not, while ITK holds the interpreter's lock.
    """
    os.setpgrp()
    sentinel = mp.parent_process().sentinel
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(sentinel, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(sentinel, fcntl.F_SETFL, fcntl.fcntl(sentinel, fcntl.F_GETFL) | os.O_ASYNC)


@contextmanager
def worker_pool(workers: int, start_method: str) -> Iterator[ProcessPoolExecutor]:
    """Open a process pool whose workers end with this process, and are killed if the block raises.

    Parameters
    ----------
    workers : int
        Number of processes.
    start_method : {"spawn", "forkserver", "fork"}
        Start method of :mod:`multiprocessing`.

    Yields
    ------
    concurrent.futures.ProcessPoolExecutor
        The pool.
    """
    pool = ProcessPoolExecutor(workers, mp.get_context(start_method), initializer=end_with_parent)
    try:
        yield pool
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.kill()
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()
