"""Throughput, time to the first result, memory and size of the work folder by number of participants.

``python -m benchmarks.participants --tree BEFORE --tree AFTER`` runs the participant level of one or two
source trees, alternately, on copies of a simulated scan, and compares them. With ``--stub 10000``, the images
are tiny and are not processed: the time until the first step runs is measured, for all participants and for
one of them. The trees are used through their command line alone. Needs Linux.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import nibabel as nib
import numpy as np

from bids_uad.files import read_json, write_json

RESULTS = Path(__file__).parent / "results"
SET_CHILD_SUBREAPER = 36
"""Option of `prctl`: orphaned descendants become children of this process."""
SECONDS_TO_END = 60
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Run:
    """A run of the participant level.

    Parameters
    ----------
    tree : pathlib.Path
        Folder of the source tree that is imported.
    data, scratch : pathlib.Path
        BIDS dataset, and an empty folder for outputs and intermediates.
    options : tuple of str
        Further arguments of the command line.
    limit : float
        Seconds after which the run is stopped.
    until_first_step : bool, default=False
        Whether to stop the run when it has begun the first step of an image.
    """

    tree: Path
    data: Path
    scratch: Path
    options: tuple[str, ...]
    limit: float
    until_first_step: bool = False


def measure(run: Run) -> dict[str, float | None]:
    """Measure a run from a new process, which has no other child processes.

    Returns
    -------
    dict
        `finished`: participants with a report and a completion record of each image. `seconds` and
        `cpu_seconds`: wall and CPU time of all processes. `first_seconds` and `first_cpu_seconds`: the same
        until the first participant was finished, or until the first step was begun; None if the limit was
        reached before. `peak_mb`: largest memory of all processes (proportional set size). `main_mb`: that of
        the main process (resident). `work_mb`: largest size of the work folder.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measure, run).result()


def _measure(run: Run) -> dict[str, float | None]:
    # Worker processes whose parent has ended would otherwise not be counted.
    if ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError("the descendants of a process can be counted on Linux only")
    out, work = run.scratch / "out", run.scratch / "work"
    images = images_of(run.data)
    is_done: Callable[[], int] = (
        (lambda: has_begun(work)) if run.until_first_step else (lambda: count_finished(out, images))
    )
    command = [sys.executable, "-m", "bids_uad", str(run.data), str(out), "participant", "-w", str(work)]
    environment = {**os.environ, "PYTHONPATH": str(run.tree), "OMP_NUM_THREADS": "1"}
    with (run.scratch / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [*command, *run.options], stdout=log, stderr=log, cwd=run.scratch, env=environment
        )
    start = time.perf_counter()
    first: dict[str, float | None] = {"first_seconds": None, "first_cpu_seconds": None}
    peak = main = size = 0
    while process.poll() is None and time.perf_counter() - start < run.limit:
        begun = time.perf_counter()
        if first["first_seconds"] is None and is_done():
            first = {
                "first_seconds": round(begun - start, 1),
                "first_cpu_seconds": round(cpu_seconds(), 1),
            }
        peak = max(peak, sum(proportional(pid) for pid in descendants(os.getpid())))
        main = max(main, peak_resident(process.pid))
        size = max(size, folder_size(work))
        if run.until_first_step and first["first_seconds"] is not None:
            break
        time.sleep(max(0.1, 5 * (time.perf_counter() - begun)))
    seconds = time.perf_counter() - start
    stopped = process.poll() is None
    end(process)
    if not stopped and process.returncode:
        log_text = (run.scratch / "log.txt").read_text()
        raise SystemExit(f"{run.tree}: exit code {process.returncode}\n{log_text}")
    finished = 0 if run.until_first_step else count_finished(out, images)
    used = cpu_seconds()
    if finished and first["first_seconds"] is None:  # between the last two samples
        first = {"first_seconds": round(seconds, 1), "first_cpu_seconds": round(used, 1)}
    return {
        "finished": finished,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(used, 1),
        **first,
        "peak_mb": round(peak / 1e6),
        "main_mb": round(main / 1e6),
        "work_mb": round(size / 1e6),
    }


def end(process: subprocess.Popen) -> None:
    """End a run and all its processes, as a scheduler does: SIGTERM, then SIGKILL."""
    process.terminate()
    until = time.perf_counter() + SECONDS_TO_END
    while time.perf_counter() < until:
        process.poll()
        reap(process.pid)
        if process.returncode is not None and not descendants(os.getpid()):
            return
        time.sleep(0.1)
    for pid in descendants(os.getpid()):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    while descendants(os.getpid()):
        reap(process.pid)
        time.sleep(0.1)


def reap(but: int) -> None:
    """Wait for adopted processes that have ended, so that their CPU time is counted; not for `but`."""
    for pid in children(os.getpid()):
        if pid != but:
            os.waitpid(pid, os.WNOHANG)


def children(pid: int) -> list[int]:
    """List the child processes of a process; none if it has ended."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def descendants(pid: int) -> list[int]:
    """List the descendants of a process."""
    return [found for child in children(pid) for found in (child, *descendants(child))]


def cpu_seconds() -> float:
    """Return the CPU time of all descendants of this process, also of those that have ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    ticks = 0
    for pid in descendants(os.getpid()):
        fields = _read(pid, "stat").rpartition(")")[2].split()
        ticks += sum(int(value) for value in fields[11:15])  # own, and of children that have ended
    return ended.ru_utime + ended.ru_stime + ticks / TICKS


def proportional(pid: int) -> int:
    """Return the proportional set size of a process in bytes; 0 if it has ended."""
    return _kilobytes(_read(pid, "smaps_rollup"), "Pss")


def peak_resident(pid: int) -> int:
    """Return the peak resident memory of a process in bytes; 0 if it has ended."""
    return _kilobytes(_read(pid, "status"), "VmHWM")


def _kilobytes(text: str, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def folder_size(folder: Path) -> int:
    """Return the disk space of the files in a folder in bytes; files may be removed meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += 512 * os.lstat(f"{parent}/{name}").st_blocks
            except FileNotFoundError:
                continue
    return total


def has_begun(work: Path) -> int:
    """Return 1 if the work folder has a folder of an image, which the first step of the image makes."""
    walk = os.walk(work)
    return int(any(re.match(r"sub[-_]", Path(parent).name) and folders for parent, folders, _ in walk))


def images_of(data: Path) -> dict[str, list[str]]:
    """List the names of the images of each participant, such as ``sub-0001_T1w``."""
    folders = sorted(data.glob("sub-*"))
    return {
        folder.name: [path.name.removesuffix(".nii.gz") for path in folder.glob("anat/*.nii.gz")]
        for folder in folders
    }


def count_finished(out: Path, images: dict[str, list[str]]) -> int:
    """Count the participants that have a report and a completion record of each image."""
    return sum(
        (out / f"{name}.html").exists() and all((out / name / "log" / f"{key}.json").exists() for key in keys)
        for name, keys in images.items()
    )


def write_dataset(folder: Path, images: dict[str, Path], participants: int) -> Path:
    """Write a BIDS dataset of participants with the same images.

    Parameters
    ----------
    folder : pathlib.Path
        Folder of the dataset, on the disk of the images, which are linked.
    images : dict of str to pathlib.Path
        Files by the end of their name, such as ``T1w.nii.gz``.
    participants : int
        Number of participants.

    Returns
    -------
    pathlib.Path
        `folder`.
    """
    folder.mkdir()
    write_json(folder / "dataset_description.json", {"Name": "benchmark", "BIDSVersion": "1.10.0"})
    names = [f"sub-{number:05d}" for number in range(1, participants + 1)]
    for name in names:
        (folder / name / "anat").mkdir(parents=True)
        for ending, path in images.items():
            (folder / name / "anat" / f"{name}_{ending}").hardlink_to(path)
    rows = [f"{name}\t40\tF\n" for name in names]
    (folder / "participants.tsv").write_text("participant_id\tage\tsex\n" + "".join(rows))
    return folder


def simulated_images(folder: Path, modalities: Sequence[str]) -> dict[str, Path]:
    """Simulate a skull-stripped participant."""
    command = [sys.executable, "-m", "bids_uad", "simulate", str(folder), "--healthy", "1", "--seed", "7"]
    subprocess.run([*command, "--modalities", *modalities], check=True)
    files = sorted(folder.glob("sub-*/anat/*"))
    return {path.name.rpartition("_")[2]: path for path in files}


def stub_image(folder: Path) -> dict[str, Path]:
    """Write a T1w image of 16 x 16 x 16 voxels that can be read, but not registered."""
    data = np.zeros((16, 16, 16), np.int16)
    data[3:13, 3:13, 3:13] = np.random.default_rng(0).integers(100, 1000, (10, 10, 10))
    image = nib.Nifti1Image(data, np.diag([10.0, 10.0, 10.0, 1.0]))
    image.header.set_xyzt_units("mm")
    folder.mkdir()
    nib.save(image, folder / "T1w.nii.gz")
    return {"T1w.nii.gz": folder / "T1w.nii.gz"}


def compare(
    trees: dict[str, Path],
    data: Path,
    scratch: Path,
    options: tuple[str, ...],
    limit: float,
    *,
    until_first_step: bool = False,
) -> Iterator[dict[str, float | str | None]]:
    """Run each tree on a dataset; yield the figures of each."""
    for name, tree in trees.items():
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        figures = measure(Run(tree, data, scratch, options, limit, until_first_step))
        yield {"tree": name, **figures}


def scaling(args: argparse.Namespace, trees: dict[str, Path], folder: Path) -> dict:
    """Measure runs of several numbers of participants; return settings, figures and ratios."""
    options = ["--nprocs", str(args.nprocs), "--modalities", *args.modalities]
    if args.models:
        options += ["--models", *args.models]
    images = simulated_images(folder / "simulated", args.modalities)
    rows: list[dict] = []
    for number in sorted(args.participants):
        data = write_dataset(folder / f"data-{number}", images, number)
        for figures in compare(trees, data, folder / "run", tuple(options), args.limit):
            hours = figures["cpu_seconds"] / 3600
            rate = {"per_core_hour": round(figures["finished"] / hours, 1)}
            rows.append({"participants": number, **figures, **rate})
            print(rows[-1], flush=True)
    return {
        "models": args.models or "default",
        "modalities": args.modalities,
        "processes": args.nprocs,
        "rows": rows,
        "ratios": ratios(rows, ("per_core_hour", "first_cpu_seconds", "peak_mb", "work_mb")),
    }


def start(args: argparse.Namespace, trees: dict[str, Path], folder: Path) -> dict:
    """Measure the time until the first step, for all participants of a dataset and for one of them."""
    data = write_dataset(folder / "data", stub_image(folder / "stub"), args.stub)
    rows: list[dict] = []
    for number, selected in ((args.stub, ()), (1, ("--participant-label", f"{args.stub // 2 + 1:05d}"))):
        options = ("--models", "none", "--nprocs", str(args.nprocs), *selected)
        for figures in compare(trees, data, folder / "run", options, args.limit, until_first_step=True):
            kept = ("tree", "first_seconds", "first_cpu_seconds", "cpu_seconds", "main_mb")
            rows.append({"participants": number, **{key: figures[key] for key in kept}})
            print(rows[-1], flush=True)
    return {
        "participants": args.stub,
        "limit_seconds": args.limit,
        "rows": rows,
        "ratios": ratios(rows, ("first_cpu_seconds", "main_mb")),
    }


def ratios(rows: Sequence[dict], keys: Sequence[str]) -> list[dict]:
    """Divide the figures of the second tree by those of the first, for each number of participants."""
    by_number: dict[int, list[dict]] = {}
    for row in rows:
        by_number.setdefault(row["participants"], []).append(row)
    return [
        {
            "participants": number,
            **{key: round(pair[1][key] / pair[0][key], 3) for key in keys if pair[0][key] and pair[1][key]},
        }
        for number, pair in by_number.items()
        if len(pair) > 1
    ]


def commit_of(tree: Path) -> str:
    """Return the commit of a source tree; the name of the folder if it is not a repository."""
    command = ["git", "-C", str(tree), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or tree.name


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark, print the figures and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tree", type=Path, action="append", help="source tree; twice: before and after (default: this one)"
    )
    parser.add_argument("--participants", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--stub", type=int, metavar="N", help="measure the start with N tiny images instead")
    parser.add_argument("--models", nargs="+", help="as of bids_uad (default: its default)")
    parser.add_argument("--modalities", nargs="+", default=["T1w", "T2w"])
    parser.add_argument("--nprocs", type=int, default=1)
    parser.add_argument("--limit", type=float, default=86_400.0, help="seconds after which a run is stopped")
    parser.add_argument("--output", type=Path, default=RESULTS / "participants.json")
    args = parser.parse_args(argv)
    given = [tree.resolve() for tree in args.tree or [Path(__file__).parents[1]]]
    if len(given) > 2:
        parser.error("--tree: give one or two source trees")
    trees = dict(zip(("before", "after"), given, strict=False)) if len(given) == 2 else {"this": given[0]}
    with tempfile.TemporaryDirectory() as folder:
        section = "start" if args.stub else "scaling"
        found = (start if args.stub else scaling)(args, trees, Path(folder))
    commits = {name: commit_of(tree) for name, tree in trees.items()}
    results = read_json(args.output) if args.output.is_file() else {}
    write_json(args.output, {**results, section: {"commits": commits, **found}})
    print(*found["ratios"], sep="\n")


if __name__ == "__main__":
    main()
