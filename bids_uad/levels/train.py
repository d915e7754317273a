"""The `train` level: healthy preprocessed scans in, a model bundle out.

``bids_uad DERIVATIVES MODELS train --detector disyre --modality T2w --preset lite`` writes
``MODELS/disyre-T2w-lite``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from bids_uad import __version__
from bids_uad.config import RunConfig
from bids_uad.dataset.participants import healthy_flag, read_participants
from bids_uad.dataset.preprocessed import PreprocessedScan, find_preprocessed
from bids_uad.errors import ConfigError, InputError
from bids_uad.levels.model_card import model_card

logger = logging.getLogger(__name__)

LOG_LINES = 40
HELD_OUT = 0.05  # of the subjects, never learnt from
Report = Callable[[str, int, int, float], None]


def bundle_folder(config: RunConfig) -> Path:
    """Where the bundle of this detector, modality and preset lies in OUTPUT_DIR."""
    if config.detector is None or config.modality is None:
        raise ConfigError("train and calibrate need --detector and --modality")
    return config.output_dir / f"{config.detector}-{config.modality}-{config.preset}"


def run_train(config: RunConfig) -> int:
    """Train one detector on the healthy scans of a derivative dataset.

    Parameters
    ----------
    config : RunConfig
        `bids_dir` holds the preprocessed scans and `participants.tsv`; the bundle goes to `output_dir`.

    Returns
    -------
    int
        0.

    Raises
    ------
    ConfigError
        If no detector, modality or known preset is given.
    InputError
        If there are no healthy preprocessed scans, or a stage lacks what it needs.
    """
    import torch

    from bids_uad.engine.bundle import save_bundle
    from bids_uad.engine.execution import resolve_device
    from bids_uad.engine.protocol import protocol_of
    from bids_uad.engine.store import SliceStore, Subject
    from bids_uad.engine.training import Schedule, TrainingData, train_detector
    from bids_uad.methods.hyper import change_hyper
    from bids_uad.methods.registry import build_detector, preset_of

    folder = bundle_folder(config)
    scans = healthy_scans(config)
    torch.set_num_threads(config.nprocs)
    torch.manual_seed(config.random_seed)
    device = resolve_device(config.device)
    try:
        hyper = change_hyper(preset_of(config.detector, config.preset), config.hyper)
        detector = build_detector(config.detector, hyper)
    except KeyError as error:
        raise ConfigError(error.args[0]) from None
    except ValueError as error:
        raise ConfigError(f"--hyper: {error}") from None
    _load_backbone(detector, config.backbone_weights)
    subjects = [Subject(scan.image, scan.brain, scan.tissue, scan.subject) for scan in scans]
    store = SliceStore.open_or_build(subjects, config.work_dir, protocol_of(config.preset))
    training_slices, held_out = store.split(config.train_fraction, HELD_OUT)
    learnt_from = {store.names[owner] for owner in np.unique(store.owners[training_slices])}
    start = time.monotonic()
    with _progress() as report:
        try:
            losses = train_detector(
                detector,
                TrainingData(store, training_slices, held_out),
                Schedule(config.random_seed, config.steps, config.batch_size),
                config.work_dir / f"training-{folder.name}-{_identity(config, detector, store)}",
                device=device,
                report=report,
            )
        except ValueError as error:
            raise InputError(config.bids_dir, str(error), "use scans that have them") from error
    training = {
        **describe_cohort(config, [scan for scan in scans if scan.subject in learnt_from]),
        "n_slices": len(training_slices),
        "train_fraction": config.train_fraction,
        "n_held_out_subjects": len(np.unique(store.owners[held_out])),
        "stages": _schedule(detector, config),
        "final_loss": losses.training,
        "held_out_loss": losses.held_out,
        "seed": config.random_seed,
        "minutes": round((time.monotonic() - start) / 60, 1),
        "device": str(device),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    parameters = sum(parameter.numel() for parameter in detector.parameters())
    card = model_card(config, training, parameters)
    bundle = save_bundle(
        folder, detector, preset=config.preset, modality=config.modality, training=training, card=card
    )
    logger.info("Wrote %s; run `calibrate` next to fix its thresholds", bundle.folder)
    return 0


def _identity(config: RunConfig, detector: Any, store: Any) -> str:
    """Tell one training from another, so that none goes on where a different one stopped."""
    told = [detector.describe(), config.random_seed, config.steps, config.batch_size, config.train_fraction]
    text = json.dumps([*told, __version__, store.folder.name], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _load_backbone(detector: Any, weights: Path | None) -> None:
    """Give a detector whose backbone comes trained the weights of that backbone.

    Raises
    ------
    ConfigError
        If they are needed and not given, or the other way round.
    InputError
        If the file does not hold them.
    """
    backbone = getattr(detector.hyper, "backbone", None)
    if backbone is None or not backbone.pretrained:
        if weights is not None:
            raise ConfigError(f"{detector.name} needs no --backbone-weights in this preset")
        return
    if weights is None:
        raise ConfigError(
            f"{detector.name} looks at features of {backbone.name}, which is trained on ImageNet and not "
            "part of bids_uad: download torchvision's weights and name the file, or the cache that holds it "
            "(~/.cache/torch/hub), with --backbone-weights, or "
            "choose --preset lite, whose features are trained on your scans"
        )
    from bids_uad.networks.backbones import find_published

    try:
        detector.backbone.load_published(find_published(weights, backbone.name))
    except ValueError as error:
        raise InputError(weights, str(error), f"name the file of {backbone.name}") from error


def healthy_scans(config: RunConfig) -> list[PreprocessedScan]:
    """Preprocessed scans of the participants who are healthy by participants.tsv.

    Raises
    ------
    InputError
        If nobody is.
    """
    people = read_participants(config.bids_dir)
    found = find_preprocessed(config.bids_dir, config.modality)
    healthy = [scan for scan in found if healthy_flag(people.row(scan.subject))]
    if not healthy:
        raise InputError(
            config.bids_dir / "participants.tsv",
            f"none of the {len(found)} {config.modality} scans belongs to a healthy participant",
            "name them `control` in a column `group`",
        )
    return healthy


def describe_cohort(config: RunConfig, scans: list[PreprocessedScan]) -> dict[str, Any]:
    """Say who a bundle learnt from: number, age range, sexes, scanners, source."""
    people = read_participants(config.bids_dir)
    rows = pd.DataFrame([people.row(scan.subject) for scan in scans])
    ages = pd.to_numeric(rows["age"], errors="coerce").dropna() if "age" in rows else pd.Series(dtype=float)
    return {
        "source": _dataset_name(config.bids_dir),
        "n_scans": len(scans),
        "n_subjects": len({scan.subject for scan in scans}),
        "age_range": [float(ages.min()), float(ages.max())] if len(ages) else None,
        "sex": rows["sex"].value_counts().to_dict() if "sex" in rows else None,
        "scanners": sorted(rows["scanner"].dropna().unique()) if "scanner" in rows else None,
    }


def _dataset_name(folder: Path) -> str:
    path = folder / "dataset_description.json"
    if not path.is_file():
        return folder.name
    return json.loads(path.read_text(encoding="utf-8")).get("Name", folder.name)


def _schedule(detector: Any, config: RunConfig) -> list[dict[str, Any]]:
    from bids_uad.methods.base import GradientStage

    return [
        {
            "name": stage.name,
            "steps": config.steps or stage.steps,
            "batch_size": config.batch_size or stage.batch_size,
            "learning_rate": stage.learning_rate,
        }
        if isinstance(stage, GradientStage)
        else {"name": stage.name, "slices": stage.slices}
        for stage in detector.stages()
    ]


@contextmanager
def _progress() -> Iterator[Report]:
    """Show progress: a bar on a terminal, a line of log now and then elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:

        def log(stage: str, step: int, steps: int, loss: float) -> None:
            if step % max(1, steps // LOG_LINES) == 0 or step == steps:
                logger.info("%s: step %d of %d, loss %.4f", stage, step, steps, loss)

        yield log
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.4f}"), console=console) as progress:
        tasks: dict[str, TaskID] = {}

        def draw(stage: str, step: int, steps: int, loss: float) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=steps, loss=loss)
            progress.update(tasks[stage], completed=step, loss=loss)

        yield draw
