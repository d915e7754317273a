"""What the kernel grants this process: limits of its control group and of all groups above it, v1 and v2.

In a container the group is the root of what is mounted; on a node of a cluster it lies deep in the tree.
"""

from __future__ import annotations

from pathlib import Path

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
