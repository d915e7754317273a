"""CPUs and memory that are granted to this process by scheduler, container or host, and worker processes."""

from __future__ import annotations

import ctypes
import fcntl
import json
import multiprocessing as mp
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, ClassVar

from bids_uad import errors
from bids_uad.errors import ConfigError, UserError

ROOT = Path("/sys/fs/cgroup")
"""Mount point of control groups."""
OWN = Path("/proc/self/cgroup")
"""Control groups of this process."""
USED_FRACTION = 0.9
"""Fraction of the granted memory that is used; the rest is for the interpreter and the file cache."""
ATTEMPTS = 2
"""Number of processes that are given a request, if each ends without an answer."""

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


def describe_exit(exitcode: int | None, oom_kills_before: int) -> str:
    """Describe why a worker process has ended.

    Parameters
    ----------
    exitcode : int or None
        Exit code; negative for a signal, as in :mod:`multiprocessing`.
    oom_kills_before : int
        Number of processes killed for memory before it started, see :func:`oom_kills`.

    Returns
    -------
    str
        Predicate of a sentence in one line.
    """
    if exitcode is None:
        return "ended without an exit code"
    if exitcode >= 0:
        return f"ended with exit code {exitcode}; see the error above"
    name = signal.Signals(-exitcode).name
    return f"was killed {why_killed(oom_kills_before)}" if name == "SIGKILL" else f"was ended by {name}"


def has_native_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether the CPU computes products of bfloat16 numbers (Linux on x86; False elsewhere)."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(text.split())


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


def library_environment(threads: int) -> dict[str, str]:
    """Return environment variables that libraries read on import: number of threads, and no update checks.

    Parameters
    ----------
    threads : int
        Threads of each numerical library. Variables that the user has set are kept.

    Returns
    -------
    dict of str to str
        Variables of this process, and those that are added.
    """
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    added = dict.fromkeys(names, str(threads))
    if "OMP_WAIT_POLICY" not in os.environ:
        # Idle threads stop spinning soon, and free their cores for other processes.
        added["GOMP_SPINCOUNT"] = "10000"
    return {**added, **os.environ, "NIPYPE_NO_ET": "1", "NO_ET": "1"}


def end_with_parent(sentinel: int | None = None) -> None:
    """Let the kernel kill this worker and its children when the parent process ends.

    Otherwise workers of a killed run would write into folders of the next run, or wait forever. The kernel
    signals the end of the pipe to the parent; a thread could not, while ITK holds the interpreter's lock.

    Parameters
    ----------
    sentinel : int, optional
        File descriptor of a pipe to the parent. By default that of :mod:`multiprocessing`.
    """
    os.setpgrp()
    if sentinel is None:
        sentinel = mp.parent_process().sentinel
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(sentinel, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(sentinel, fcntl.F_SETFL, fcntl.fcntl(sentinel, fcntl.F_GETFL) | os.O_ASYNC)


def map_in_processes(function: Callable[..., Any], *arguments: Sequence[Any], workers: int) -> Iterator[Any]:
    """Compute the results of a function in several processes, and yield them in order.

    With one worker or one call, this process computes them. Otherwise the processes end with this one, and
    are killed if a call fails or the generator is closed. Each has its own pipe. Those of
    :class:`concurrent.futures.ProcessPoolExecutor` share one, so that this process would wait forever if one
    of them were killed while it sends a result.

    Parameters
    ----------
    function : callable
        Function of a module.
    *arguments : sequences
        Arguments of each call, as in :func:`map`.
    workers : int
        Number of processes.

    Yields
    ------
    object
        Result of each call.

    Raises
    ------
    UserError
        If a process ends before it has sent its result.
    Exception
        The error of the first call that fails.
    """
    workers = min(workers, len(arguments[0]))
    if workers <= 1:
        yield from map(function, *arguments)
        return
    # Spawned instead of forked, since the calling process may have threads.
    context = mp.get_context("spawn")
    kills = oom_kills()
    calls = enumerate(zip(*arguments, strict=True))
    processes: dict[Connection, mp.process.BaseProcess] = {}
    running: dict[Connection, int] = {}
    results: dict[int, Any] = {}
    following = 0

    def start_next(pipe: Connection) -> None:
        for index, call in islice(calls, 1):
            running[pipe] = index
            with suppress(BrokenPipeError, ConnectionResetError):  # the end of the process is found below
                pipe.send(call)

    try:
        for _ in range(workers):
            pipe, child_end = context.Pipe()
            processes[pipe] = context.Process(target=_serve_calls, args=(function, child_end), daemon=True)
            processes[pipe].start()
            child_end.close()
            start_next(pipe)
        while running:
            for pipe in wait(list(running)):
                try:
                    succeeded, result = pipe.recv()
                except (EOFError, ConnectionResetError):
                    processes[pipe].join()
                    cause = describe_exit(processes[pipe].exitcode, kills)
                    raise UserError(f"a worker process {cause}") from None
                if not succeeded:
                    raise result
                results[running.pop(pipe)] = result
                start_next(pipe)
            while following in results:
                yield results.pop(following)
                following += 1
    finally:
        for pipe, process in processes.items():
            process.kill()
            process.join()
            pipe.close()


def _serve_calls(function: Callable[..., Any], pipe: Connection) -> None:
    """Call a function with the arguments that a pipe brings until this process is killed."""
    end_with_parent()
    while True:
        call = pipe.recv()
        try:
            answer = (True, function(*call))
        except Exception as error:
            if not isinstance(error, UserError):
                error.add_note(traceback.format_exc())  # a traceback cannot be sent
            answer = (False, error)
        pipe.send(answer)


class NoAnswerError(Exception):
    """A process has ended without an answer, or has answered with an error.

    Parameters
    ----------
    returncode : int or None
        Exit code; negative for a signal. None if the process has answered with an error.
    stderr : str
        Standard error, or the traceback of the error.
    oom_kills_before : int
        Number of processes killed for memory before the request, see :func:`oom_kills`.
    """

    def __init__(self, returncode: int | None, stderr: str, oom_kills_before: int) -> None:
        super().__init__(stderr)
        self.returncode, self.stderr, self.oom_kills_before = returncode, stderr, oom_kills_before


class RequestProcess:
    """A Python process that answers requests one after another, see :func:`serve_requests`.

    It is started by the first request, and again whenever it has ended. It ends with this process.

    Parameters
    ----------
    module : str
        Module that the process runs as a program.
    """

    _running: ClassVar[set[RequestProcess]] = set()

    def __init__(self, module: str) -> None:
        self._module = module
        self._process: subprocess.Popen[str] | None = None

    def ask(self, request: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Send a request and wait for the answer.

        If the process ends before it has answered, a new one is asked once more.

        Parameters
        ----------
        request : mapping
            JSON types only.
        environment : mapping of str to str, optional
            Environment of the process if it is started; by default that of this process.

        Returns
        -------
        dict
            The answer.

        Raises
        ------
        UserError
            If the process has answered with an error for users; of the same class.
        NoAnswerError
            If it has answered with another error, or has ended twice.
        """
        for _ in range(ATTEMPTS):
            if self._process is None or self._process.poll() is not None:
                self._start(environment)
            kills, begin = oom_kills(), os.fstat(self._stderr.fileno()).st_size
            try:
                line = self._send(request)
            except BaseException:  # an answer that nobody has read would be taken for the next one
                self.stop()
                raise
            if line.endswith("\n"):
                return self._read_answer(json.loads(line), kills)
            end = os.fstat(self._stderr.fileno()).st_size
            stderr = os.pread(self._stderr.fileno(), end - begin, begin).decode(errors="replace")
            failure = NoAnswerError(self._process.wait(), stderr, kills)
        raise failure

    def stop(self) -> None:
        """Kill the process and wait for its end."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        os.close(self._sentinel)
        for file in (self._process.stdin, self._process.stdout, self._stderr):
            with suppress(BrokenPipeError):
                file.close()
        self._process = None
        self._running.discard(self)

    @classmethod
    def stop_all(cls) -> None:
        """Stop all such processes that this process has started."""
        for process in list(cls._running):
            process.stop()

    def _start(self, environment: Mapping[str, str] | None) -> None:
        self.stop()
        own_end, self._sentinel = os.pipe()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `stop`
        self._process = subprocess.Popen(
            [sys.executable, "-m", self._module, str(own_end)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env=environment,
            cwd=os.sep,  # the folder of the first request may be removed, and is not searched for modules
            pass_fds=(own_end,),
        )
        os.close(own_end)
        self._running.add(self)

    def _send(self, request: Mapping[str, Any]) -> str:
        """Return the line with the answer; empty or incomplete if the process has ended."""
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._process.stdout.readline()

    def _read_answer(self, answer: dict[str, Any], kills: int) -> dict[str, Any]:
        if answer["last"]:
            self.stop()
        if "refusal" in answer:
            kind, *arguments = answer["refusal"]
            raise getattr(errors, kind)(*arguments)
        if "traceback" in answer:
            raise NoAnswerError(None, answer["traceback"], kills)
        return answer["result"]


def serve_requests(
    handle: Callable[[dict[str, Any]], dict[str, Any]],
    sentinel: int,
    *,
    idle_seconds: float,
    memory_growth: float,
) -> None:
    """Answer the requests of :class:`RequestProcess` until this process is to end.

    It ends after an error that is not one for users, when no request has come for a while, when it occupies
    much more memory than after the first request, and with its parent. Requests and answers are JSON objects,
    one per line of standard input and output; what is printed meanwhile goes to standard error.

    Parameters
    ----------
    handle : callable
        Returns the answer to a request, JSON types only.
    sentinel : int
        File descriptor of a pipe to the parent.
    idle_seconds : float
        Time in s without a request after which the process ends.
    memory_growth : float
        Growth of the resident memory in bytes, since the end of the first request, above which the process
        ends.
    """
    end_with_parent(sentinel)
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    with Path(os.devnull).open() as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    last, first_bytes = False, None
    while not last and select.select([requests], [], [], idle_seconds)[0]:
        line = requests.readline()
        if not line:
            return
        try:
            answer = {"result": handle(json.loads(line))}
        except UserError as error:
            kind, arguments = error.__reduce__()[:2]
            answer = {"refusal": [kind.__name__, *arguments]}
        except Exception:
            answer = {"traceback": traceback.format_exc()}
        release_memory()
        occupied = resident_bytes()
        first_bytes = occupied if first_bytes is None else first_bytes
        last = "traceback" in answer or occupied - first_bytes > memory_growth
        answers.write(json.dumps({**answer, "last": last}) + "\n")
        answers.flush()


def release_memory() -> None:
    """Return freed memory to the system; glibc keeps it, which are 250 MB after an anomaly map."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def resident_bytes() -> int:
    """Return the resident memory of this process in bytes; 0 where the system does not report it."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.is_file() else 0
