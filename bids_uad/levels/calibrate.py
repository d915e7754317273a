"""The `calibrate` level: fix a bundle's thresholds on validation scans.

``bids_uad VALIDATION MODELS calibrate --detector disyre --modality T2w --preset lite`` writes
``MODELS/disyre-T2w-lite/calibration.json``.
"""

from __future__ import annotations

import logging

import nibabel as nib
import numpy as np

from bids_uad.atomic import write_json, write_text
from bids_uad.config import RunConfig
from bids_uad.dataset.participants import cohort_of, healthy_flag, read_participants
from bids_uad.dataset.preprocessed import find_preprocessed
from bids_uad.errors import ConfigError, InputError
from bids_uad.levels.cohort import Cohort, describe
from bids_uad.levels.model_card import add_validation
from bids_uad.levels.train import bundle_folder

logger = logging.getLogger(__name__)


def run_calibrate(config: RunConfig) -> int:
    """Score validation scans and keep the thresholds they imply in the bundle.

    Hyper-parameters that are changed (`config.hyper`) are kept in the bundle, too; the weights must fit them.

    Healthy scans (by participants.tsv) give the false-positive thresholds, scans with a lesion mask the
    Dice threshold. A scan that is neither is left out: a missing mask does not mean healthy.

    Parameters
    ----------
    config : RunConfig
        `bids_dir` holds preprocessed validation scans, `output_dir` the bundle.

    Returns
    -------
    int
        0.

    Raises
    ------
    ConfigError
        If there is no such hyper-parameter.
    InputError
        If no scan can be used.
    ModelError
        If the bundle is missing or damaged.
    """
    import torch
    from rich.progress import track

    from bids_uad.calibration.thresholds import ThresholdEstimator
    from bids_uad.engine.bundle import load_bundle, load_detector
    from bids_uad.engine.execution import Execution, resolve_device, resolve_precision
    from bids_uad.engine.inference import anomaly_map

    bundle = load_bundle(bundle_folder(config))
    if config.hyper:
        try:
            bundle = bundle.with_hyper(config.hyper)
        except ValueError as error:
            raise ConfigError(f"--hyper: {error}") from None
    people = read_participants(config.bids_dir)
    scans = [
        scan
        for scan in find_preprocessed(config.bids_dir, bundle.modality)
        if scan.lesion or healthy_flag(people.row(scan.subject))
    ]
    if not scans:
        raise InputError(
            config.bids_dir,
            "no healthy scan and no lesion mask",
            "add `group` to participants.tsv or lesion masks",
        )
    torch.set_num_threads(config.nprocs)
    device = resolve_device(config.device)
    execution = Execution(resolve_precision(config.precision, device), config.batch_size, config.compiled)
    detector = execution.prepare(load_detector(bundle, str(device)))
    estimator = ThresholdEstimator()
    for scan in track(scans, description=f"Scoring with {bundle.name}"):
        volume = np.asarray(nib.load(scan.image).dataobj, dtype=np.float32)
        brain = np.asarray(nib.load(scan.brain).dataobj) > 0
        lesion = np.asarray(nib.load(scan.lesion).dataobj) > 0 if scan.lesion else None
        scores = anomaly_map(
            detector,
            volume,
            brain,
            key=scan.key,
            seed=config.random_seed,
            protocol=bundle.protocol,
            execution=execution,
        )
        estimator.add(scores, brain, lesion, cohort_of(people.row(scan.subject)))
    calibration = estimator.summary()
    calibration["cohort"] = describe([Cohort(config.bids_dir, tuple(scans))])
    calibration["weights_sha256"] = bundle.sha256
    if config.hyper:
        # Thresholds of other hyper-parameters must not stand beside these.
        (bundle.folder / "calibration.json").unlink(missing_ok=True)
        write_json(bundle.folder / "bundle.json", bundle.info)
    write_json(bundle.folder / "calibration.json", calibration)
    card = bundle.folder / "MODEL_CARD.md"
    write_text(card, add_validation(card.read_text(encoding="utf-8"), calibration))
    for name, value in calibration["thresholds"].items():
        logger.info("%s: %s = %.5g", bundle.name, name, value)
    return 0
