"""What this process may use: CPUs and memory as the scheduler or container granted them."""

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
OWN = Path("/proc/self/cgroup")


def cpu_quotas(root: Path = ROOT, own: Path = OWN) -> list[float]:
    """List the CPUs that each group may use, if it has such a limit."""
    quotas = [path.read_text().split()[:2] for path in _files("cpu", "cpu.max", root, own)]
    for path in _files("cpu", "cpu.cfs_quota_us", root, own):
        quotas.append([path.read_text().strip(), path.with_name("cpu.cfs_period_us").read_text().strip()])
    # No limit is "max" in one version and -1 in the other.
    return [int(quota) / int(period) for quota, period in quotas if quota.isdigit()]


def memory_limits(root: Path = ROOT, own: Path = OWN) -> list[int]:
    """List the bytes that each group may use, if it has such a limit."""
    paths = [
        *_files("memory", "memory.max", root, own),
        *_files("memory", "memory.limit_in_bytes", root, own),
    ]
    return [int(value) for path in paths if (value := path.read_text().strip()).isdigit()]


def oom_kills(root: Path = ROOT, own: Path = OWN) -> int:
    """Count the processes of this process's group that the kernel has killed because memory ran out."""
    for name in ("memory.events", "memory.oom_control"):
        for path in _files("memory", name, root, own)[:1]:
            counts = dict(line.split() for line in path.read_text().splitlines())
            return int(counts.get("oom_kill", 0))
    return 0


def why_killed(kills_before: int, root: Path = ROOT, own: Path = OWN) -> str:
    """Say why a process of ours was killed by SIGKILL.

    Parameters
    ----------
    kills_before : int
        What :func:`oom_kills` counted when all was well.
    root, own : pathlib.Path
        Where control groups are mounted, and which are this process's.

    Returns
    -------
    str
        What follows "was killed", and what to do.
    """
    remedy = "give the job more memory or lower --nprocs"
    if oom_kills(root, own) <= kills_before:
        return f"(SIGKILL), most likely because memory ran out; {remedy}"
    limits = memory_limits(root, own)
    granted = f" (limit {min(limits) / 1e9:.2f} GB)" if limits else ""
    return f"because memory ran out{granted}; {remedy}"


def _files(controller: str, name: str, root: Path, own: Path) -> list[Path]:
    """List the files of a name in this process's group and those above it, its own first."""
    folders = []
    for line in own.read_text().splitlines() if own.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers == "" or controller in controllers.split(","):
            top = root / controllers
            group = top / path.lstrip("/")
            folders += [group, *[parent for parent in group.parents if parent.is_relative_to(top)]]
    # Inside a container, /proc tells paths of the host; what is mounted is the container's own group.
    folders += [root / controller, root]
    return [folder / name for folder in dict.fromkeys(folders) if (folder / name).is_file()]


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


def available_cpus(cgroup: Path = ROOT, own: Path = OWN) -> int:
    """Count the CPUs granted to this process: the least of affinity, cgroup quotas and SLURM's grant."""
    counts = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    granted = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE", "")
    if granted.isdigit():
        counts.append(int(granted))
    counts += [int(quota) for quota in cpu_quotas(cgroup, own)]
    return max(1, min(counts))


def available_memory_gb(cgroup: Path = ROOT, meminfo: Path = Path("/proc/meminfo"), own: Path = OWN) -> float:
    """Find the memory granted to this process, in GB: a share of the least of host, cgroups and SLURM."""
    limits = [limit / 1e9 for limit in memory_limits(cgroup, own)]
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


def end_with_parent() -> None:
    """Have this worker and its children killed when the process that started it is gone.

    A killed run must not leave a worker that still writes where the next run works, or that waits for ever
    for work. The kernel sends the signal when the other end of the pipe is gone: a thread would wait for its
    turn behind ITK, which keeps the interpreter's lock for minutes.
    """
    os.setpgrp()
    sentinel = mp.parent_process().sentinel
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(sentinel, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(sentinel, fcntl.F_SETFL, fcntl.fcntl(sentinel, fcntl.F_GETFL) | os.O_ASYNC)


@contextmanager
def worker_pool(workers: int, start_method: str) -> Iterator[ProcessPoolExecutor]:
    """Open a pool of processes that ends with this process, and at once when the block raises.

    Parameters
    ----------
    workers : int
    start_method : {"spawn", "forkserver", "fork"}

    Yields
    ------
    concurrent.futures.ProcessPoolExecutor
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
