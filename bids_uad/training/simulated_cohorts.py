"""Synthetic subjects that a training asks for."""

from __future__ import annotations

import logging
from pathlib import Path

import nibabel as nib
import numpy as np

from bids_uad.config import RunConfig
from bids_uad.dataset.participants import write_participants
from bids_uad.dataset.sri24_scans import PreprocessedScan
from bids_uad.files import read_json, write_json
from bids_uad.images import save_image
from bids_uad.simulation.anatomy import label_map_paths
from bids_uad.simulation.cohort import Cohort as SimulatedCohort
from bids_uad.simulation.cohort import make_cohort
from bids_uad.simulation.contrast_transfer import t1w_to_t2w
from bids_uad.simulation.subject import Population
from bids_uad.space import to_image
from bids_uad.training.cohort import Cohort, healthy_cohort, scratch_folder

logger = logging.getLogger(__name__)


def synthetic_cohort(config: RunConfig) -> Cohort:
    """Simulate healthy subjects in the scratch space, unless an earlier run has done so.

    Parameters
    ----------
    config : RunConfig
        Their number (`synthetic`), their anatomies (`label_maps`), and the seed.

    Returns
    -------
    Cohort
        On the SRI24 grid. Two of them share a scanner on average.
    """
    world = Population(
        config.random_seed,
        tuple(label_map_paths(config.label_maps)) if config.label_maps else Population.sources,
        scanners=max(1, config.synthetic // 2),
    )
    folder = scratch_folder(
        config.work_dir, "synthetic", config.modality, config.synthetic, world.seed, world.sources
    )
    if not (folder / "participants.tsv").is_file():  # which is written last
        simulated = SimulatedCohort(
            folder, world, (None,) * config.synthetic, (config.modality,), derivatives=True
        )
        for done, name in enumerate(make_cohort(simulated, config.nprocs), start=1):
            logger.info("Simulated %s (%d of %d)", name, done, config.synthetic)
    cohort = healthy_cohort(folder, config.modality)
    return Cohort(folder, cohort.scans, prefix="synthetic-")


def contrast_transfer_cohort(config: RunConfig) -> Cohort:
    """Give the healthy T1w scans of `bids_dir` the contrast of T2w, unless an earlier run has done so.

    Parameters
    ----------
    config : RunConfig
        The images go to its scratch space.

    Returns
    -------
    Cohort
        The same people. Its folder says that they come from where the T1w scans come from.

    Raises
    ------
    InputError
        If no T1w scan belongs to a healthy person.
    """
    source = healthy_cohort(config.bids_dir, "T1w")
    stamps = [[str(scan.image), scan.image.stat().st_mtime_ns] for scan in source.scans]
    folder = scratch_folder(config.work_dir, "recontrasted", config.random_seed, stamps)
    if not (folder / "dataset_description.json").is_file():  # which is written last
        for number, scan in enumerate(source.scans):
            _transfer_contrast(scan, folder, np.random.default_rng([config.random_seed, number]))
            logger.info(
                "%s: T1w with the contrast of T2w (%d of %d)", scan.key, number + 1, len(source.scans)
            )
        write_json(
            folder / "dataset_description.json",
            read_json(config.bids_dir / "dataset_description.json"),
        )
    # Written in each run, since the images do not depend on it.
    people = {scan.subject for scan in source.scans}
    write_participants(folder, source.participants, people, "Participants whose T1w scans were recontrasted")
    cohort = healthy_cohort(folder, "T2w")
    return Cohort(folder, cohort.scans, prefix="recontrasted-")


def _transfer_contrast(scan: PreprocessedScan, folder: Path, rng: np.random.Generator) -> None:
    """Write one scan's T2w-like image and its brain mask."""
    brain = np.asarray(nib.load(scan.brain).dataobj) > 0
    image = t1w_to_t2w(nib.load(scan.image).get_fdata(dtype=np.float32), brain, rng)
    brain &= image > 0
    stem = folder / scan.subject / "anat" / scan.image.name.split("desc-")[0]
    save_image(to_image(image), stem.with_name(f"{stem.name}desc-preproc_T2w.nii.gz"))
    save_image(
        to_image(brain.astype(np.uint8), np.uint8), stem.with_name(f"{stem.name}desc-brain_mask.nii.gz")
    )
