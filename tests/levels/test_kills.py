"""Runs that are killed at random times and continued equal undisturbed runs."""

from __future__ import annotations

import os
import random
import re
import signal
import time

import pytest

from bids_uad.engine.bundle import load_bundle
from tests.levels.fakes import fake_reference
from tests.levels.interrupted import (
    CLEARED,
    Bench,
    Forked,
    content,
    difference,
    stand_ins,
    target,
    with_signal,
)

SEED = 20251129
KILLS = {"participant": 40, "group": 25, "train": 20, "calibrate": 15}
"""A hundred in all. KILLS=5 in the environment makes it five of each."""
IN_A_ROW = 5
"""Kills of one run before it is left to its end."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    root = tmp_path_factory.mktemp("kills")
    bench = Bench(root)
    with stand_ins(fake_reference(bench.inputs.folder)):
        for level in ("participant", "group", "train", "calibrate"):
            bench.undisturbed(level)
        yield bench


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("level", KILLS)
def test_killed_and_continued_run_equals_an_undisturbed_run(bench, level):
    rng = random.Random(f"{SEED} {level}")  # noqa: S311
    wanted = int(os.environ.get("KILLS", KILLS[level]))
    kills = series = 0
    while kills < wanted:
        series += 1
        study = bench.prepared(level, f"killed-{level}")
        said = []
        for _ in range(min(IN_A_ROW, wanted - kills)):
            moment, alone = rng.uniform(0, bench.seconds[level]), rng.random() < 0.3
            process = Forked(study.arguments(level), bench.root / "killed.log")
            code = process.wait(moment)
            if code is not None:
                assert code == 0, process.log.read_text()
                break
            process.kill(alone=alone)
            kills += 1
            said.append(f"{'alone ' if alone else ''}{moment:.3f} s")
        process = Forked(study.arguments(level), bench.root / "again.log")
        assert process.wait(600) == 0, (said, process.log.read_text())
        assert difference(content(target(study, level)), bench.expected[level]) == [], said
        left = study.work.rglob(".*")
        assert not [path for path in left if re.match(r"\.[0-9a-f]{6}-\d+-", path.name)], said
        assert series < 10 * wanted


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))
def test_killed_worker_fails_only_its_image(bench, number):
    rng = random.Random(SEED + number)  # noqa: S311
    study = bench.prepared("participant", "worker")
    process = Forked(study.arguments("participant"), bench.root / "worker.log")
    assert process.wait(rng.uniform(0.2, 0.8) * bench.seconds["participant"]) is None
    workers = process.members(others=True)
    if workers:
        with_signal(rng.choice(workers), signal.SIGKILL)
    code = process.wait(600)
    said = process.log.read_text()
    assert code in (0, 1), said
    assert "Traceback" not in said
    if code == 0:
        assert difference(content(study.out), bench.expected["participant"]) == [], said
    else:
        assert "killed" in said
    process = Forked(study.arguments("participant"), bench.root / "again.log")
    assert process.wait(600) == 0, process.log.read_text()
    assert difference(content(study.out), bench.expected["participant"]) == []


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("level", KILLS)
def test_interrupted_run_prints_one_line_and_continues(bench, level, number, code):
    for _ in range(5):
        study = bench.prepared(level, f"interrupted-{level}")
        process = Forked(study.arguments(level), bench.root / "interrupted.log")
        ended = process.wait(0.4 * bench.seconds[level])
        assert ended is None, process.log.read_text()
        with_signal(process.pid, number)
        if (ended := process.wait(30)) != 0 or level != "group":
            break
        # Matplotlib's search for a font catches every exception, so the run may have gone on to its end.
        assert difference(content(target(study, level)), bench.expected[level]) == []
    assert ended == code, process.log.read_text()
    said = process.log.read_text()
    assert said.splitlines()[-1] == "bids_uad: interrupted; run the same command again to continue"
    assert "Traceback" not in said
    end = time.monotonic() + CLEARED
    while process.members():
        assert time.monotonic() < end
        time.sleep(0.05)
    left = [path for path in target(study, level).rglob(".*") if re.match(r"\.[0-9a-f]{6}-\d+-", path.name)]
    assert left == []
    process = Forked(study.arguments(level), bench.root / "again.log")
    assert process.wait(600) == 0, process.log.read_text()
    assert difference(content(target(study, level)), bench.expected[level]) == []


@pytest.mark.slow
def test_damaged_checkpoint_is_ignored(bench):
    study = bench.prepared("train", "damaged")
    process = Forked(study.arguments("train"), bench.root / "damaged.log")
    assert process.wait(600) == 0, process.log.read_text()
    (checkpoint,) = study.work.rglob("checkpoint.safetensors")
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    process = Forked(study.arguments("train"), bench.root / "damaged.log")
    assert process.wait(600) == 0, process.log.read_text()
    assert "is damaged" in " ".join(process.log.read_text().split())
    assert difference(content(study.trained), bench.expected["train"]) == []
    assert load_bundle(study.trained / "toy-T2w-lite").modality == "T2w"
