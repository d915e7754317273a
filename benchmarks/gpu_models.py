"""Train, calibrate and pack model bundles within some minutes of a GPU.

``python -m benchmarks.gpu_models TRAIN VALIDATION OUT --minutes 14`` runs ``bids_uad train`` and ``bids_uad
calibrate`` for each detector and modality. The time is divided among them. The number of training steps
follows from the speed of short trainings, and that of the validation scans from the time of one scan. Further
options are those of ``train``, such as ``--synthetic 200 --labelmaps FOLDER``; `TRAIN` is ``none`` for
simulated scans only. ``OUT/gpu_models.json`` lists what was done; the same command again continues where the
last one stopped.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu import Budget
from benchmarks.scan import read
from bids_uad.cli.main import main as bids_uad
from bids_uad.dataset.participants import read_participants
from bids_uad.dataset.sri24_scans import PreprocessedScan, find_preprocessed
from bids_uad.engine.bundle import Bundle, load_bundle, load_detector
from bids_uad.engine.execution import Execution, resolve_device, resolve_precision
from bids_uad.engine.inference import anomaly_map
from bids_uad.files import read_json, write_json
from bids_uad.methods.base import GradientStage, change_hyper
from bids_uad.methods.registry import build_detector, preset_of

MAX_BYTES = 16 * 10**6
"""Largest bundle."""
NORMATIVE_BYTES = 5 * 10**5
"""Bytes of a bundle besides the weights, at most."""
SMALLER = {"disyre": ("network.width=24", "network.head_width=24")}
"""Hyper-parameters of networks that are too large for `MAX_BYTES`."""
FIRST_STEPS, MAX_WARM_UP = 4, 1024
WARM_UP = 0.05
"""Fraction of the time of a model that the last short training takes."""
CPU_SECONDS = {"pls": 8.0}
"""Seconds per validation scan of `calibrate` besides the scores; PLS has a decision rule that is chosen."""
OTHER_CPU_SECONDS = 2.0
"""The same, other detectors."""
CALIBRATION = 1 / 3
"""Largest fraction of the time of a model for its calibration."""
LEAST_SCANS = 8
"""Fewest validation scans of a calibration."""
MARGIN = 0.9
"""Fraction of the remaining time that is planned for training."""


@dataclass(frozen=True)
class Plan:
    """Steps of a training and number of validation scans.

    Parameters
    ----------
    steps : int
        Training steps of each stage; 0 if the time does not suffice.
    scans : int
        Validation scans.
    """

    steps: int
    scans: int


def make_plan(
    seconds: float, rate: float, overhead: float, per_scan: float, scans: int, most_steps: int
) -> Plan:
    """Divide the time of a model between training and calibration.

    Parameters
    ----------
    seconds : float
        Time that is left for the model.
    rate : float
        Seconds per training step.
    overhead : float
        Seconds of a training besides its steps.
    per_scan : float
        Seconds per validation scan.
    scans : int
        Validation scans that there are.
    most_steps : int
        Steps of the preset, which are not exceeded.

    Returns
    -------
    Plan
    """
    used = min(scans, int(CALIBRATION * seconds / per_scan))
    if used < min(LEAST_SCANS, scans):
        return Plan(0, used)
    steps = int(MARGIN * (seconds - used * per_scan - overhead) / rate)
    return Plan(max(0, min(steps, most_steps)), used)


def speed(train: Callable[[int], float], enough: float) -> tuple[float, float]:
    """Measure the speed of trainings that become longer.

    Parameters
    ----------
    train : callable
        Trains for a number of steps, and returns the seconds.
    enough : float
        Seconds by which the last training exceeds the first.

    Returns
    -------
    rate, overhead : float
        Seconds per step, and of a training besides its steps.
    """
    train(FIRST_STEPS // 2)  # prepares what the others find
    steps, first = FIRST_STEPS, train(FIRST_STEPS)
    longer = 0.0
    while steps < MAX_WARM_UP and longer < enough:
        steps *= 4
        longer = train(steps) - first
    rate = max(longer, 1e-3) / (steps - FIRST_STEPS)
    return rate, max(0.0, first - FIRST_STEPS * rate)


def choose_scans(validation: Path, modality: str, count: int, folder: Path) -> Path:
    """Link some validation scans, half of them of healthy controls, in a folder; return it.

    Parameters
    ----------
    validation : pathlib.Path
        Dataset of preprocessed scans.
    modality : str
        Modality of the scans.
    count : int
        Number of participants.
    folder : pathlib.Path
        Folder that is made.

    Returns
    -------
    pathlib.Path
        `folder`, or `validation` if it has no more participants.
    """
    people = read_participants(validation)
    groups: dict[bool, dict[str, None]] = {True: {}, False: {}}
    for scan in find_preprocessed(validation, modality):
        healthy = bool(people.person(scan.subject, scan.session).healthy)
        if healthy or scan.lesion is not None:
            groups[healthy][scan.subject] = None
    if count >= sum(map(len, groups.values())):
        return validation
    folder.mkdir(parents=True, exist_ok=True)
    for path in validation.iterdir():
        link = folder / path.name
        if path.is_file() and not link.exists():
            link.symlink_to(path.resolve())
    patients = min(len(groups[False]), count // 2)
    for healthy, number in ((False, patients), (True, count - patients)):
        names = list(groups[healthy])
        for k in np.linspace(0, len(names) - 1, min(number, len(names))).round().astype(int):
            if not (folder / names[k]).exists():
                (folder / names[k]).symlink_to((validation / names[k]).resolve())
    return folder


def seconds_per_scan(bundle: Bundle, scan: PreprocessedScan, device: torch.device) -> float:
    """Measure the time of `calibrate` for one scan; the first of two maps is not counted."""
    precision = resolve_precision("auto", device, published=bundle.protocol.published)
    execution = Execution(precision)
    detector = execution.prepare(load_detector(bundle, str(device)))
    volume, brain = read(scan.image), read(scan.brain) > 0
    for _ in range(2):
        start = time.perf_counter()
        anomaly_map(detector, volume, brain, key=scan.key, protocol=bundle.protocol, execution=execution)
        seconds = time.perf_counter() - start
    return seconds + CPU_SECONDS.get(bundle.detector, OTHER_CPU_SECONDS)


class Models:
    """Models of a command, and what was done for each.

    Parameters
    ----------
    args : argparse.Namespace
        Options of the command.
    options : sequence of str
        Further options of ``train``.
    """

    def __init__(self, args: argparse.Namespace, options: Sequence[str]) -> None:
        self.args, self.options = args, list(options)
        self.device = resolve_device(args.device)
        self.file = args.output / "gpu_models.json"
        self.done: dict[str, dict[str, Any]] = read_json(self.file)

    def note(self, name: str, **facts: Any) -> dict[str, Any]:
        """Add facts about a model to the file."""
        self.done[name] = self.done.get(name, {}) | facts
        write_json(self.file, self.done)
        print(name, facts, flush=True)
        return self.done[name]

    def hyper(self, detector: str) -> list[str]:
        """Return the changed hyper-parameters of a detector."""
        return [*(SMALLER.get(detector, ()) if self.args.preset == "default" else ()), *self.args.hyper]

    def command(
        self, level: str, data: Path | str, models: Path, detector: str, modality: str, *more: str
    ) -> int:
        """Run ``bids_uad train`` or ``calibrate``; return the exit code."""
        model = ["--detector", detector, "--modality", modality, "--preset", self.args.preset]
        machine = ["--device", self.args.device, "--nprocs", str(self.args.nprocs)]
        folders = [str(data), str(models), "-w", str(self.args.work_dir / "training")]
        return bids_uad([level, *folders, *model, *machine, *more])

    def train(self, models: Path, detector: str, modality: str, steps: int) -> float:
        """Train a model; return the seconds.

        Raises
        ------
        RuntimeError
            If it fails.
        """
        hyper = self.hyper(detector)
        more = [*(["--hyper", *hyper] if hyper else []), "--steps", str(steps), *self.options]
        if detector == "pls" and self.args.lesion_masks:
            more += ["--lesion-masks", str(self.args.lesion_masks)]
        start = time.perf_counter()
        if self.command("train", self.args.train, models, detector, modality, *more):
            raise RuntimeError("training failed, see above")
        return time.perf_counter() - start

    def check(self, detector: str, modality: str) -> int:
        """Check the size of a model; return the steps of its preset.

        Raises
        ------
        ValueError
            If its weights are too large, or it has no steps.
        """
        hyper = change_hyper(preset_of(detector, self.args.preset, modality), self.hyper(detector))
        built = build_detector(detector, hyper)
        size = 2 * sum(tensor.numel() for tensor in built.state_dict().values())
        if size + NORMATIVE_BYTES > MAX_BYTES:
            raise ValueError(f"{size / 1e6:.0f} MB in float16; choose a smaller network with --hyper")
        steps = [stage.steps for stage in built.stages() if isinstance(stage, GradientStage)]
        if not steps:
            raise ValueError("this detector is not trained by steps")
        return max(steps)

    def plan(self, detector: str, modality: str, budget: Budget) -> Plan:
        """Measure the speed of a model, and plan its training."""
        most, warm_up = self.check(detector, modality), self.args.work_dir / "warm-up"
        rate, overhead = speed(
            lambda steps: self.train(warm_up, detector, modality, steps), WARM_UP * budget.left
        )
        bundle = load_bundle(warm_up / f"{detector}-{modality}-{self.args.preset}")
        scans = find_preprocessed(self.args.validation, modality)
        per_scan = seconds_per_scan(bundle, scans[0], self.device)
        scans = [] if detector in self.args.calibrate_later else scans
        plan = make_plan(budget.left, rate, overhead, per_scan, len(scans), most)
        facts = {"steps": plan.steps, "scans": plan.scans, "steps_of_preset": most}
        speeds = {"seconds_per_step": rate, "seconds_per_scan": per_scan}
        self.note(
            f"{detector}-{modality}-{self.args.preset}",
            **facts,
            **{name: float(f"{value:.3g}") for name, value in speeds.items()},
        )
        return plan

    def make(self, detector: str, modality: str, seconds: float) -> None:
        """Train and calibrate a model, unless that was done.

        Raises
        ------
        ValueError, RuntimeError
            If the model is too large, the time does not suffice, or a step fails.
        """
        name, args = f"{detector}-{modality}-{self.args.preset}", self.args
        known, folder = self.done.get(name, {}), args.output / name
        if known.get("steps"):
            plan = Plan(known["steps"], known["scans"])
        else:
            plan = self.plan(detector, modality, Budget(seconds))
        if not plan.steps:
            raise ValueError(f"{seconds:.0f} s do not suffice")
        if not known.get("trained"):
            self.train(args.output, detector, modality, plan.steps)
            self.note(name, trained=True)
        if not plan.scans:
            self.note(name, complete=True)
            return
        chosen = choose_scans(
            args.validation, modality, plan.scans, args.work_dir / f"validation-{modality}-{plan.scans}"
        )
        if self.command("calibrate", chosen, args.output, detector, modality):
            raise RuntimeError("calibration failed, see above")
        size = sum(path.stat().st_size for path in folder.iterdir())
        validation = load_bundle(folder).calibration["validation"]
        self.note(
            name,
            complete=True,
            megabytes=round(size / 1e6, 2),
            **{key: validation[key] for key in ("n_healthy", "n_lesion", "healthy_fpr", "mean_dice")},
        )
        if size > MAX_BYTES:
            raise ValueError(f"the bundle has {size / 1e6:.1f} MB, more than {MAX_BYTES / 1e6:.0f}")


def main(argv: Sequence[str] | None = None) -> int:
    """Make all models; return 1 if one of them was not completed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train", help="preprocessed scans of healthy controls, or none")
    parser.add_argument("validation", type=Path, help="preprocessed scans of controls and with lesions")
    parser.add_argument("output", type=Path, help="folder of the bundles")
    parser.add_argument("--minutes", type=float, default=14.0, help="time of all models (default 14)")
    parser.add_argument("--detectors", nargs="+", default=["pls", "disyre", "andi"])
    parser.add_argument("--modalities", nargs="+", default=["T2w"])
    parser.add_argument("--calibrate-later", nargs="+", default=[], help="detectors that are only trained")
    parser.add_argument("--preset", default="default")
    parser.add_argument("--hyper", nargs="+", default=[], help="as of train, for all detectors")
    parser.add_argument("--lesion-masks", type=Path, help="as of train, for PLS")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--nprocs", type=int, default=1)
    parser.add_argument("-w", "--work-dir", type=Path, default=Path("work"))
    args, options = parser.parse_known_args(argv)
    budget, models = Budget(60 * args.minutes), Models(args, options)
    pairs = [
        (detector, modality)
        for detector in args.detectors
        for modality in args.modalities
        if not models.done.get(f"{detector}-{modality}-{args.preset}", {}).get("complete")
    ]
    failed = 0
    for number, (detector, modality) in enumerate(pairs):
        try:
            models.make(detector, modality, budget.left / (len(pairs) - number))
        except (ValueError, RuntimeError) as error:
            failed += 1
            models.note(f"{detector}-{modality}-{args.preset}", problem=str(error))
    print(f"{math.ceil(budget.left)} s of {60 * args.minutes:.0f} left")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
