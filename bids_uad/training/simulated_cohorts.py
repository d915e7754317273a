"""Training cohorts that are simulated, or made of real T1w scans by contrast transfer."""

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
from bids_uad.simulation.anatomy import find_label_maps
from bids_uad.simulation.cohort import SimulatedCohort, make_cohort
from bids_uad.simulation.contrast_transfer import t1w_to_flair, t1w_to_t2w
from bids_uad.simulation.subject import Population
from bids_uad.space import to_image
from bids_uad.training.cohort import Cohort, healthy_cohort, scratch_folder

logger = logging.getLogger(__name__)

RANDOM_CONTRAST = 0.3
"""Fraction of simulated training scans with random tissue contrasts."""


def synthetic_cohort(config: RunConfig) -> Cohort:
    """Simulate healthy subjects in the working folder, unless an earlier run has done so.

    Parameters
    ----------
    config : RunConfig
        Number of subjects (`synthetic`), label maps (`label_maps`) and seed.

    Returns
    -------
    Cohort
        Scans on the SRI24 grid, with half as many scanners as subjects.
    """
    population = Population(
        config.random_seed,
        tuple(find_label_maps(config.label_maps)) if config.label_maps else Population.sources,
        scanners=max(1, config.synthetic // 2),
        random_contrast=RANDOM_CONTRAST,
        normal_variants=True,
    )
    folder = scratch_folder(
        config.work_dir,
        "synthetic",
        *(
            config.modality,
            config.synthetic,
            population.seed,
            population.sources,
            RANDOM_CONTRAST,
            "variants",
        ),
    )
    if not (folder / "participants.tsv").is_file():  # written last
        simulated = SimulatedCohort(
            folder, population, (None,) * config.synthetic, (config.modality,), derivatives=True
        )
        for done, name in enumerate(make_cohort(simulated, config.nprocs), start=1):
            logger.info("Simulated %s (%d of %d)", name, done, config.synthetic)
    cohort = healthy_cohort(folder, config.modality)
    return Cohort(folder, cohort.scans, prefix="synthetic-")


def contrast_transfer_cohort(config: RunConfig) -> Cohort:
    """Transfer T1w scans of healthy controls to another contrast, unless an earlier run has done so.

    Parameters
    ----------
    config : RunConfig
        `bids_dir` is the dataset of T1w scans; the images are written to the working folder.

    Returns
    -------
    Cohort
        Scans of the same participants in the contrast of `config.modality`, with the dataset description
        of the T1w scans.

    Raises
    ------
    InputError
        If no T1w scan belongs to a healthy control.
    """
    source = healthy_cohort(config.bids_dir, "T1w")
    stamps = [[str(scan.image), scan.image.stat().st_mtime_ns] for scan in source.scans]
    modality = config.modality
    folder = scratch_folder(config.work_dir, "recontrasted", modality, config.random_seed, stamps)
    if not (folder / "dataset_description.json").is_file():  # written last
        for number, scan in enumerate(source.scans):
            _transfer_contrast(scan, folder, modality, np.random.default_rng([config.random_seed, number]))
            logger.info(
                "%s: transferred to %s contrast (%d of %d)", scan.key, modality, number + 1, len(source.scans)
            )
        write_json(
            folder / "dataset_description.json",
            read_json(config.bids_dir / "dataset_description.json"),
        )
    # Written in each run, since participants.tsv may have changed.
    subjects = {scan.subject for scan in source.scans}
    description = f"Participants whose T1w scans were transferred to {modality} contrast"
    write_participants(folder, source.participants, subjects, description)
    cohort = healthy_cohort(folder, modality)
    # The prefix is part of the hash that selects held-out subjects, so it keeps its former name.
    return Cohort(folder, cohort.scans, prefix="recontrasted-")


def _transfer_contrast(scan: PreprocessedScan, folder: Path, modality: str, rng: np.random.Generator) -> None:
    """Write the image of a T1w scan in another contrast, and its brain mask."""
    brain = np.asarray(nib.load(scan.brain).dataobj) > 0
    transfer = t1w_to_t2w if modality == "T2w" else t1w_to_flair
    image = transfer(nib.load(scan.image).get_fdata(dtype=np.float32), brain, rng)
    brain &= image > 0
    stem = folder / scan.subject / "anat" / scan.image.name.split("desc-")[0]
    save_image(to_image(image), stem.with_name(f"{stem.name}desc-preproc_{modality}.nii.gz"))
    save_image(
        to_image(brain.astype(np.uint8), np.uint8), stem.with_name(f"{stem.name}desc-brain_mask.nii.gz")
    )
