"""A SLURM cluster of one node for the length of a test. Needs Debian's slurm-wlm and munge, and root."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "sinfo")

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/{task}
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=4000
KillWait=5
MpiDefault=none
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=16000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
"""
CGROUPS = """\
CgroupMountpoint=/sys/fs/cgroup
CgroupAutomount=no
ConstrainRAMSpace=yes
ConstrainCores=yes
"""


def missing() -> list[str]:
    """List the programs that are not there."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    found = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    return found if os.geteuid() == 0 else [*found, "root"]


class OneNode:
    """The cluster; a context manager that gives itself when a node is idle.

    Parameters
    ----------
    folder : pathlib.Path
        For its state and logs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.limits_memory = Path("/sys/fs/cgroup/memory/memory.limit_in_bytes").exists()
        self._daemons: list[subprocess.Popen] = []

    @property
    def environment(self) -> dict[str, str]:
        """What SLURM's programs need to find the cluster."""
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        return {**kept, "SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": path}

    def __enter__(self) -> OneNode:
        for name in ("state", "spool"):
            (self.folder / name).mkdir(parents=True)
        cgroup = ("cgroup", "cgroup,affinity") if self.limits_memory else ("linuxproc", "none")
        task = cgroup[1].replace(",", ",task/")
        host = socket.gethostname().split(".")[0]
        text = CONFIGURATION.format(
            host=host,
            folder=self.folder,
            ports=_free_ports(2),
            proctrack=cgroup[0],
            task=task,
            cpus=os.cpu_count(),
        )
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "cgroup.conf").write_text(CGROUPS)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        names = ("key-file", "socket", "pid-file", "log-file", "seed-file")
        files = ("munge.key", "munge.socket", "munge.pid", "munge.log", "munge.seed")
        options = [f"--{name}={self.folder / file}" for name, file in zip(names, files, strict=True)]
        self._start("munged", "--foreground", "--force", *options)
        _until(lambda: (self.folder / "munge.socket").exists(), "munged does not start")
        self._start("slurmctld", "-D")
        self._start("slurmd", "-D", "-N", host)
        _until(lambda: "idle" in self.ask("sinfo", "--noheader", "--format=%t"), "no idle node", self._logs)
        return self

    def __exit__(self, *error: object) -> None:
        self.ask("scancel", "--user=root")
        for daemon in reversed(self._daemons):
            daemon.terminate()
            daemon.wait(timeout=30)

    def ask(self, *command: str) -> str:
        """Run one of SLURM's programs; what it says, whether or not it is pleased."""
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment, timeout=60)
        return done.stdout + done.stderr

    def submit(self, *command: str) -> str:
        """Submit a job; its number."""
        said = self.ask("sbatch", *command)
        found = re.search(r"Submitted batch job (\d+)", said)
        assert found, said
        return found[1]

    def wait(self, job: str, seconds: float = 1200) -> list[str]:
        """Wait until a job, or all tasks of an array, have ended; their states."""

        def ended() -> bool:
            return re.search(r"^\d", self.ask("squeue", "-h", "-o", "%i", "-j", job), re.M) is None

        _until(ended, f"job {job} does not end", self._logs, seconds)
        return re.findall(r"\bJobState=(\w+)", self.ask("scontrol", "--oneliner", "show", "job", job))

    def _start(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("w") as log:
            self._daemons.append(subprocess.Popen(command, stdout=log, stderr=log, env=self.environment))

    def _logs(self) -> str:
        return "\n".join(path.read_text()[-2000:] for path in sorted(self.folder.glob("*.log")))


def _until(true, otherwise: str, describe=str, seconds: float = 60) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"{otherwise}\n{describe()}"
        time.sleep(0.5)


def _free_ports(count: int) -> list[int]:
    """Find ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
