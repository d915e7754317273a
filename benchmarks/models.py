"""The detectors that benchmarks are run with."""

from __future__ import annotations

from pathlib import Path

import torch

from bids_uad.engine.bundle import PACKAGED, load_bundle, save_bundle
from bids_uad.engine.protocol import protocol_of
from bids_uad.methods.registry import build_detector
from bids_uad.training.loop import TrainingData, TrainingSettings, start_fabric, train_detector
from bids_uad.training.store import SliceStore, TrainingScan

STEPS = 30  # enough for a network that gives something else than zero


def find_model(name: str, preset: str, models: Path | None, scratch: Path, device: torch.device) -> Path:
    """Give the bundle of a detector for T2w scans: a given one, a packaged one, or one trained for a moment.

    Parameters
    ----------
    name, preset : str
    models : pathlib.Path, optional
        Folder of bundles.
    scratch : pathlib.Path
        Holds `slices`, a slice store; a bundle that has to be made goes here.
    device : torch.device
    """
    folder = f"{name}-T2w-{preset}"
    for place in (models, PACKAGED, scratch):
        if place is not None and (place / folder / "bundle.json").is_file():
            return place / folder
    torch.manual_seed(0)
    detector = build_detector(name, preset)
    data = TrainingData.all_of(SliceStore(scratch / "slices"))
    train_detector(
        detector,
        data,
        TrainingSettings(0, STEPS, 4),
        scratch / f"training-{name}",
        fabric=start_fabric(device),
    )
    training = {"source": f"benchmark: {STEPS} steps"}
    save_bundle(scratch / folder, detector, preset=preset, modality="T2w", training=training, card="")
    return scratch / folder


def store_slices(scans: list[tuple[Path, Path, Path]], scratch: Path, preset: str) -> None:
    """Store the slices that models are trained on for a moment."""
    subjects = [TrainingScan(image, brain, tissue) for image, brain, tissue in scans]
    SliceStore.build(subjects, scratch / "slices", protocol_of(preset))


def threshold_of(bundle_folder: Path) -> float | None:
    """Give the fixed threshold of a bundle, if it is calibrated."""
    bundle = load_bundle(bundle_folder)
    return None if bundle.calibration is None else bundle.default_threshold[1]
