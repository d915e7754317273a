"""Command `train`: train a model bundle on preprocessed scans of healthy controls.

``bids_uad train DERIVATIVES MODELS --detector disyre --modality T2w --preset lite`` writes
``MODELS/disyre-T2w-lite``.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import TaskID, TextColumn

from bids_uad.config import RunConfig
from bids_uad.dataset.sri24_scans import has_preprocessed
from bids_uad.engine.bundle import Bundle, protocol_of, save_bundle
from bids_uad.engine.execution import resolve_device, resolve_precision
from bids_uad.errors import ConfigError, InputError
from bids_uad.files import remove_unfinished
from bids_uad.methods.base import Detector, GradientStage, change_hyper, changed_names
from bids_uad.methods.pls.detector import PLS
from bids_uad.methods.registry import build_detector, preset_of
from bids_uad.progress import is_reported, progress_bar
from bids_uad.simulation.shapes import component_shapes
from bids_uad.training.backbone import initialise_backbone
from bids_uad.training.cohort import (
    Cohort,
    describe_cohorts,
    healthy_cohort,
    scratch_folder,
)
from bids_uad.training.loop import TrainingData, TrainingSettings, start_fabric, train_detector
from bids_uad.training.model_card import model_card
from bids_uad.training.simulated_cohorts import contrast_transfer_cohort, synthetic_cohort
from bids_uad.training.store import SliceStore, TrainingScan

logger = logging.getLogger(__name__)

NO_SCANS = "none"
"""Value of `bids_dir` for training on simulated scans only."""
HELD_OUT_FRACTION = 0.05
"""Fraction of the subjects for the held-out loss."""
Report = Callable[[str, int, int, float], None]


def bundle_folder(config: RunConfig) -> Path:
    """Return the folder of the bundle of this detector, modality and preset in OUTPUT_DIR."""
    if config.detector is None or config.modality is None:
        raise ConfigError("train and calibrate need --detector and --modality")
    return config.output_dir / f"{config.detector}-{config.modality}-{config.preset}"


def run_train(config: RunConfig) -> int:
    """Train one detector on the healthy scans of a derivative dataset.

    Parameters
    ----------
    config : RunConfig
        `bids_dir` is a dataset of preprocessed scans with `participants.tsv`, or ``none`` with `synthetic`
        subjects; the bundle is written to `output_dir`.

    Returns
    -------
    int
        Exit code 0.

    Raises
    ------
    ConfigError
        If no detector, modality or known preset is given.
    InputError
        If there are no preprocessed scans of healthy controls, or a stage lacks its inputs or diverges.
    """
    folder = bundle_folder(config)
    device = resolve_device(config.device)
    fabric = start_fabric(device, config.num_devices, config.num_nodes)
    torch.set_num_threads(max(1, config.nprocs // config.num_devices))
    detector = _build(config)
    backbone = initialise_backbone(detector, config.modality, config.backbone_weights, config.force)
    if config.lesion_masks is not None:
        if not isinstance(detector, PLS):
            raise ConfigError(f"{detector.name} does not use --lesion-masks")
        detector.shapes = component_shapes(config.lesion_masks)
    with fabric.rank_zero_first():
        cohorts = training_cohorts(config)
        store = _open_store(config, cohorts)
    training_slices, held_out = store.split(config.train_fraction, HELD_OUT_FRACTION)
    data = TrainingData(store, training_slices, held_out)
    is_published = protocol_of(config.preset).published
    precision = resolve_precision(config.precision, device, published=is_published)
    schedule = TrainingSettings(config.random_seed, config.steps, config.batch_size, precision)
    scratch = _scratch(config, folder.name, detector, store)
    if fabric.is_global_zero:
        remove_unfinished(scratch)
    start = time.monotonic()
    with _progress(fabric.is_global_zero) as report:
        try:
            losses = train_detector(detector, data, schedule, scratch, fabric=fabric, report=report)
        except ValueError as error:
            raise InputError(
                config.bids_dir, str(error), "inspect the training scans for artefacts"
            ) from error
    if not fabric.is_global_zero:
        return 0
    training = _describe(config, cohorts, data, detector, backbone) | {
        "final_loss": losses.training,
        "held_out_loss": losses.held_out,
        "minutes": round((time.monotonic() - start) / 60, 1),
        "device": str(device),
        "n_processes": fabric.world_size,
        "precision": precision,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    parameters = sum(parameter.numel() for parameter in detector.parameters())
    card = model_card(config, training, parameters)
    bundle = save_bundle(
        folder,
        detector,
        preset=config.preset,
        modality=config.modality,
        training=training,
        card=card,
        changed=changed_names(type(detector.hyper), config.hyper),
    )
    logger.info("Wrote %s; run `calibrate` next to set its thresholds", bundle.folder)
    return 0


def _build(config: RunConfig) -> Detector:
    """Build the detector with initial weights determined by the seed."""
    torch.manual_seed(config.random_seed)
    try:
        hyper = preset_of(config.detector, config.preset, config.modality)
        if any(each.name == "modality" for each in fields(hyper)):
            hyper = replace(hyper, modality=config.modality)
        hyper = change_hyper(hyper, config.hyper)
        return build_detector(config.detector, hyper)
    except KeyError as error:
        raise ConfigError(error.args[0]) from None
    except ValueError as error:
        raise ConfigError(f"--hyper: {error}") from None


def _open_store(config: RunConfig, cohorts: Sequence[Cohort]) -> SliceStore:
    subjects = [
        TrainingScan(scan.image, scan.brain, scan.tissue, cohort.full_name(scan))
        for cohort in cohorts
        for scan in cohort.scans
    ]
    return SliceStore.open_or_build(subjects, config.work_dir, protocol_of(config.preset))


def _describe(
    config: RunConfig,
    cohorts: Sequence[Cohort],
    data: TrainingData,
    detector: Detector,
    backbone: Bundle | dict[str, str] | None,
) -> dict[str, Any]:
    """Describe training data and schedule for ``bundle.json``."""
    store = data.store
    used = {store.names[owner] for owner in np.unique(store.owners[[*data.training, *data.held_out]])}
    description = {
        **describe_cohorts([cohort.only(used) for cohort in cohorts]),
        "n_slices": len(data.training),
        "train_fraction": config.train_fraction,
        "n_held_out_subjects": len(np.unique(store.owners[data.held_out])),
        "stages": _schedule(detector, config),
        "seed": config.random_seed,
    }
    if config.lesion_masks is not None:
        description["lesion_shapes"] = len(detector.shapes)
    if isinstance(backbone, dict):
        description["stages"].insert(0, backbone)
    elif backbone is not None:
        description["backbone"] = {"bundle": backbone.name, "sha256": backbone.sha256}
        # The training subjects of the backbone count as training subjects of the model.
        subjects = {*description["subjects"], *backbone.info["training"]["subjects"]}
        description["subjects"] = sorted(subjects)
    return description


def training_cohorts(config: RunConfig) -> list[Cohort]:
    """Return the training cohorts: scans of `bids_dir`, contrast-transferred scans, and simulated ones.

    Raises
    ------
    ConfigError
        If contrast transfer is requested for T1w.
    InputError
        If there are no scans.
    """
    if config.contrast_transfer and config.modality == "T1w":
        raise ConfigError(
            "--contrast-transfer creates images of another contrast; use --modality T2w or FLAIR"
        )
    if config.synthetic and config.bids_dir.name == NO_SCANS and not config.bids_dir.exists():
        return [synthetic_cohort(config)]
    cohorts = [contrast_transfer_cohort(config)] if config.contrast_transfer else []
    if config.synthetic:
        cohorts.append(synthetic_cohort(config))
    # Real T2w scans are optional with contrast-transferred ones.
    if config.contrast_transfer and not has_preprocessed(config.bids_dir, config.modality):
        return cohorts
    return [healthy_cohort(config.bids_dir, config.modality), *cohorts]


def _scratch(config: RunConfig, bundle: str, detector: Detector, store: SliceStore) -> Path:
    """Return the folder of the checkpoint, which trainings with other settings do not share."""
    settings = [
        *(detector.describe(), config.random_seed, config.steps, config.batch_size, config.train_fraction),
        *(
            str(config.backbone_weights),
            str(config.lesion_masks),
            config.precision,
            config.num_devices * config.num_nodes,
        ),
    ]
    return scratch_folder(config.work_dir, f"training-{bundle}", *settings, store.folder.name)


def _schedule(detector: Detector, config: RunConfig) -> list[dict[str, Any]]:
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
def _progress(enabled: bool) -> Iterator[Report | None]:
    """Report progress of the first process: a bar on a terminal, elsewhere lines of the log."""
    if not enabled:
        yield None
        return
    console = Console(stderr=True)
    if not console.is_terminal:

        def log(stage: str, step: int, steps: int, loss: float) -> None:
            if is_reported(step, steps):
                logger.info("%s: step %d of %d, loss %.4f", stage, step, steps, loss)

        yield log
        return
    with progress_bar(console, TextColumn("loss {task.fields[loss]:.4f}")) as progress:
        tasks: dict[str, TaskID] = {}

        def draw(stage: str, step: int, steps: int, loss: float) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=steps, loss=loss)
            progress.update(tasks[stage], completed=step, loss=loss)

        yield draw
