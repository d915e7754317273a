"""Models for benchmarks: given, packaged, or trained for a few steps."""

from __future__ import annotations

from pathlib import Path

import torch

from bids_uad.engine.bundle import PACKAGED, load_bundle, protocol_of, save_bundle
from bids_uad.methods.registry import build_detector
from bids_uad.training.loop import TrainingData, TrainingSettings, start_fabric, train_detector
from bids_uad.training.store import SliceStore, TrainingScan

STEPS = 30
"""Training steps of models that are not packaged; enough for outputs other than zero."""


def find_model(name: str, preset: str, models: Path | None, scratch: Path, device: torch.device) -> Path:
    """Find the bundle of a detector for T2w scans, or train one for `STEPS` steps.

    Parameters
    ----------
    name : str
        Name of the detector.
    preset : str
        Name of the preset.
    models : pathlib.Path, optional
        Folder of bundles that is searched before the packaged ones.
    scratch : pathlib.Path
        Folder with a slice store `slices`, to which a new bundle is written.
    device : torch.device
        Device of the training.

    Returns
    -------
    pathlib.Path
        Folder of the bundle.
    """
    folder = f"{name}-T2w-{preset}"
    for parent in (models, PACKAGED, scratch):
        if parent is not None and (parent / folder / "bundle.json").is_file():
            return parent / folder
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
    """Write the slice store for :func:`find_model`."""
    subjects = [TrainingScan(image, brain, tissue) for image, brain, tissue in scans]
    SliceStore.build(subjects, scratch / "slices", protocol_of(preset))


def threshold_of(bundle_folder: Path) -> float | None:
    """Return the default threshold of a bundle; None if it is not calibrated."""
    bundle = load_bundle(bundle_folder)
    return None if bundle.calibration is None else bundle.default_threshold[1]
