"""Runs in separate processes that tests interrupt, and comparison of their outputs."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pytest

from bids_uad.cli.main import main
from bids_uad.files import CHECKSUMS
from bids_uad.levels.participant import (
    executors as plugin,
)
from bids_uad.levels.participant import (
    run,
    workflow,
)
from bids_uad.levels.participant import (
    workflow as writing,
)
from bids_uad.methods.registry import DETECTORS, Entry
from tests.levels.fakes import FakeDetect, init_fake_preproc_wf
from tests.levels.study import Study

# What runs would import is imported here, so that they are disturbed at work.
MODULES = (
    "bids_uad.calibration.thresholds",
    "bids_uad.engine.inference",
    "bids_uad.training.calibrate",
    "bids_uad.levels.group",
    "bids_uad.levels.participant.run",
    "bids_uad.training.train",
    "bids_uad.reports.participant",
)
CLEARED = 20.0
"""Seconds within which the workers of a killed run must be gone."""

EXPECTED_TO_DIFFER = (
    "logs/bids_uad-*.toml",  # the configuration of each run
    "sub-*/log/*/*",  # the same for a participant, and crash files
    "**/*.lock",  # empty
    "sub-*/log/last_run.json",  # says 'up to date' of an image that the killed run had finished
)
RUN_ID = re.compile(rb"\d{8}-\d{6}_[0-9a-f]{8}-[0-9a-f-]{27}")
INPUTS = re.compile(rb'"(?:(?:\.\./)+(?:[^"/]+/)*inputs/\w+|urn:bids-dataset:(?:Phantoms|Masks))"')
"""Inputs in dataset_description.json, by relative path or, where they are on another disk, by name."""
MINUTES = re.compile(rb'("minutes": |, )[0-9.]+(?=,\n| minutes)')
"""How long the training took, in bundle.json and in MODEL_CARD.md."""


def content(folder: Path) -> dict[str, bytes]:
    """Read every file of a folder, apart from run ids, the time it took, and where the folder lies."""
    differing = {path for pattern in EXPECTED_TO_DIFFER for path in folder.glob(pattern)}
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path not in differing:
            text = path.read_bytes().replace(os.fsencode(folder.parent), b"HERE")
            text = INPUTS.sub(b'"INPUTS"', text)
            found[path.relative_to(folder).as_posix()] = MINUTES.sub(rb"\1?", RUN_ID.sub(b"RUN", text))
    return found


class Forked:
    """One command in a process, forked from this one, that is the first of a session of its own."""

    def __init__(self, arguments: list[str], log: Path, first: Callable[[], None] | None = None) -> None:
        self.log = log
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 99
            try:
                os.setsid()
                with log.open("wb") as stream:
                    os.dup2(stream.fileno(), 1)
                    os.dup2(stream.fileno(), 2)
                sys.stdout = sys.stderr = os.fdopen(2, "w", closefd=False)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                if first is not None:
                    first()
                code = main(arguments)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)

    def members(self, *, others: bool = False) -> list[int]:
        """List the processes of the session that run; only its workers with `others`."""
        found = []
        for entry in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = entry.read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            pid = int(entry.parent.name)
            if int(fields[3]) == self.pid and fields[0] != "Z" and not (others and pid == self.pid):
                found.append(pid)
        return found

    def wait(self, seconds: float) -> int | None:
        """Wait for the end, at most so long; give the exit code, negative for a signal, or None."""
        end = time.monotonic() + seconds
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() >= end:
                return None
            time.sleep(0.005)

    def kill(self, *, alone: bool) -> None:
        """Kill the session, or only its first process, and wait until all of it is gone."""
        for pid in [self.pid] if alone else self.members():
            with_signal(pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        end = time.monotonic() + CLEARED
        while left := self.members():
            assert time.monotonic() < end, f"workers outlive their run: {left}"
            if not alone:
                for pid in left:
                    with_signal(pid, signal.SIGKILL)
            time.sleep(0.01)


def with_signal(pid: int, number: int) -> None:
    """Send a signal to a process that may have ended."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


BEFORE = {"group": "participant", "reports": "participant", "calibrate": "train"}
"""Level whose outputs are the inputs of another."""


class Bench:
    """Inputs, and the outputs of an undisturbed run of each level."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.inputs = Study(root / "inputs").write()
        self.expected: dict[str, dict[str, bytes]] = {}
        self.seconds: dict[str, float] = {}
        self.whole: dict[str, Path] = {}
        self.work: dict[str, Path] = {}

    def study(self, name: str) -> Study:
        """Name folders for outputs, without any yet; the inputs are shared."""
        folder = self.root / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        study = Study(self.inputs.folder, folder / "out", folder / "work", folder / "trained")
        study.detector = "toy"
        return study

    def prepared(self, level: str, name: str, **places: Path) -> Study:
        """Name folders for a level, with the outputs of the level before it."""
        study = self.study(name)
        for place, folder in places.items():
            setattr(study, place, folder)
        if level in BEFORE:
            shutil.copytree(self.whole[BEFORE[level]], target(study, level))
        return study

    def undisturbed(self, level: str) -> None:
        """Run a level from start to end, and keep what it leaves."""
        if level in self.expected:
            return
        if level in BEFORE:
            self.undisturbed(BEFORE[level])
        study = self.prepared(level, f"undisturbed-{level}")
        begin = time.monotonic()
        process = Forked(study.arguments(level), self.root / "undisturbed.log")
        assert process.wait(600) == 0, process.log.read_text()
        self.seconds[level] = time.monotonic() - begin
        self.whole[level], self.work[level] = target(study, level), study.work
        self.expected[level] = content(self.whole[level])


def target(study: Study, level: str) -> Path:
    """Return the folder that a level writes to."""
    return study.trained if level in ("train", "calibrate") else study.out


@contextmanager
def stand_ins(reference) -> Iterator[None]:
    """Replace preprocessing and detection, and have workers forked from what is imported here."""
    for name in MODULES:
        import_module(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workflow, "init_preproc_wf", init_fake_preproc_wf)
        patch.setattr(writing, "Detect", FakeDetect)
        patch.setattr(run, "resolve_reference", lambda atlas, cache: reference)
        patch.setattr(plugin, "START_METHOD", "fork")
        patch.setitem(DETECTORS, "toy", Entry("tests.training.train_toy", "Toy", "Toy", "#000000"))
        CHECKSUMS.clear()
        yield


def difference(found: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    """Name the files that are missing, of another content, or too many."""
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
