"""CPU time, peak memory and bytes written of each step of one participant, from the command to the report.

``python -m benchmarks.steps BIDS_DIR LABEL ...`` runs the participant level for each participant with the
default models, one worker and one thread, and records every node of the workflow in the process that runs it.
Needs Linux (``/proc``). ``python benchmarks/steps.py`` measures the version that is first on ``PYTHONPATH``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results" / "steps.json"
RECORD, ROOT = "BIDS_UAD_STEPS_FILE", "BIDS_UAD_STEPS_ROOT"
"""Environment variables of a recorded run: file of the records, and number of its first process."""
MODULE = __spec__.name if __spec__ else Path(__file__).stem
START, REST, REPORT = "start", "scheduler", "report and end"


def usage() -> tuple[float, float]:
    """Return CPU seconds and megabytes written of all processes of the run, ended ones included."""
    family = descendants(int(os.environ[ROOT]))
    ticks = sum(sum(map(int, stat[11:15])) for stat in family.values())
    written = 0
    for number in family:
        with suppress(OSError):  # ended meanwhile
            written += int(Path(f"/proc/{number}/io").read_text().split()[3])
    return ticks / os.sysconf("SC_CLK_TCK"), written / 1e6


def descendants(root: int) -> dict[int, list[str]]:
    """Return a process and its descendants, each with the fields of ``/proc/PID/stat`` from its state on."""
    stats = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            stats[int(path.parent.name)] = path.read_text().rsplit(")", 1)[1].split()
    found = {root: stats[root]}
    while new := {n: stat for n, stat in stats.items() if int(stat[1]) in found and n not in found}:
        found |= new
    return found


def peak_mb() -> float:
    """Return the peak resident memory in MB since its reset, of this process or its largest child."""
    peaks = [resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]
    for number in descendants(os.getpid()):
        with suppress(OSError):
            status = Path(f"/proc/{number}/status").read_text()
            peaks += [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")]
    return max(peaks) / 1e3


def append(record: dict[str, Any]) -> None:
    """Append a record to the file of the run."""
    with Path(os.environ[RECORD]).open("a") as stream:
        stream.write(json.dumps(record) + "\n")


def recorded(run: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap nipype's ``Node.run`` such that it appends its use of resources to the file of records."""

    def run_and_record(node: Any, *args: Any, **options: Any) -> Any:
        for number in descendants(os.getpid()):
            with suppress(OSError):
                Path(f"/proc/{number}/clear_refs").write_text("5")  # resets the peak memory
        before = usage()
        result = run(node, *args, **options)
        append({"node": node.fullname, "before": before, "after": usage(), "peak_mb": peak_mb()})
        return result

    return run_and_record


if RECORD in os.environ:
    # In the run itself and in its worker processes.
    from nipype.pipeline.engine.nodes import Node

    Node.run = recorded(Node.run)


def run_recorded(arguments: list[str]) -> None:
    """Run the command line in this process; worker processes import this module, too."""
    from bids_uad.cli.main import main as run_command
    from bids_uad.levels.participant import executors

    executors.PRELOADED = (*executors.PRELOADED, MODULE)
    code = run_command(arguments)
    append({"node": REPORT, "after": usage(), "peak_mb": peak_mb()})
    sys.exit(code)


def arguments_for(bids_dir: Path, out: Path, label: str, options: list[str]) -> list[str]:
    """Return the arguments of a run of one participant with one worker and one thread."""
    arguments = [str(bids_dir), str(out / "out"), "participant", "--participant-label", label]
    arguments += ["--work-dir", str(out / "work"), "--nprocs", "1", "--omp-nthreads", "1"]
    return [*arguments, *options]


def profile(arguments: list[str]) -> list[dict[str, Any]]:
    """Run a command line and return one row per step: name, CPU seconds, peak MB, MB written."""
    with tempfile.NamedTemporaryFile() as file:
        wrapper = (
            f"import os; os.environ['{ROOT}'] = str(os.getpid()); os.environ['{RECORD}'] = '{file.name}'\n"
            f"import sys; from {MODULE} import run_recorded; run_recorded(sys.argv[1:])"
        )
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        subprocess.run([sys.executable, "-c", wrapper, *arguments], check=True, env=environment)
        records = [json.loads(line) for line in Path(file.name).read_text().splitlines()]
    *nodes, end = records
    rows = [_row(record["node"], record["before"], record) for record in nodes]
    first, last = nodes[0]["before"], max(nodes, key=lambda node: node["after"][0])["after"]
    start = _row(START, (0.0, 0.0), {"after": first, "peak_mb": None})
    between = last[0] - first[0] - sum(row["cpu_seconds"] for row in rows)
    rest = {"step": REST, "cpu_seconds": round(between, 2), "peak_mb": None, "written_mb": None}
    return [start, *rows, rest, _row(REPORT, last, end)]


def _row(name: str, before: tuple[float, float], record: dict[str, Any]) -> dict[str, Any]:
    """Return the row of a step from the use of resources before and after it."""
    cpu, written = (after - start for after, start in zip(record["after"], before, strict=True))
    peak = record["peak_mb"]
    return {
        "step": ".".join(name.split(".")[2:]) or name,
        "cpu_seconds": round(cpu, 2),
        "peak_mb": peak and round(peak),
        "written_mb": round(written, 1),
    }


def main() -> None:
    """Run the benchmark, print a table per participant and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bids_dir", type=Path, help="BIDS dataset")
    parser.add_argument("labels", nargs="+", help="participants, without sub-")
    parser.add_argument("--options", default="", help="further options of bids_uad, separated by spaces")
    parser.add_argument("--name", default="after", help="name of the measured version (default: after)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file, of which only --name changes")
    parser.add_argument("--keep", type=Path, help="folder that keeps the outputs, one folder per participant")
    options = parser.parse_args()
    results = {}
    for label in options.labels:
        with tempfile.TemporaryDirectory() as temporary:
            out = Path(temporary) if options.keep is None else options.keep / label
            rows = profile(arguments_for(options.bids_dir, out, label, options.options.split()))
        total = {"step": "total", "peak_mb": None}
        for key in ("cpu_seconds", "written_mb"):
            total[key] = round(sum(row[key] or 0 for row in rows), 1)
        results[label] = [*rows, total]
        table = Table("step", "CPU, s", "peak memory, MB", "written, MB", title=label)
        for row in results[label]:
            if (row["cpu_seconds"] or 0) >= 0.05 or (row["written_mb"] or 0) >= 0.1:
                table.add_row(*("" if value is None else str(value) for value in (
                    row["step"], row["cpu_seconds"], row["peak_mb"], row["written_mb"]
                )))  # fmt: skip
        Console(width=120).print(table)
    known = json.loads(options.out.read_text()) if options.out.is_file() else {}
    options.out.write_text(json.dumps(known | {options.name: results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
