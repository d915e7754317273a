"""Synthetic subjects that a training asks for."""

from __future__ import annotations

import logging

from bids_uad.config import RunConfig
from bids_uad.levels.cohort import Cohort, healthy_cohort, scratch_folder
from bids_uad.simulation.anatomy import label_map_paths
from bids_uad.simulation.cohort import Cohort as SimulatedCohort
from bids_uad.simulation.cohort import make_cohort
from bids_uad.simulation.subject import World

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
    world = World(
        config.random_seed,
        tuple(label_map_paths(config.label_maps)) if config.label_maps else World.sources,
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
