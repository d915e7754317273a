"""The people behind a model: whom `train` and `calibrate` have worked on."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bids_uad import __version__
from bids_uad.dataset.participants import Participants, read_participants, source_name, subject_hashes
from bids_uad.dataset.sri24_scans import PreprocessedScan, find_preprocessed
from bids_uad.errors import InputError, truncate_list
from bids_uad.files import read_json
from bids_uad.preprocessing.check import read_lesion
from bids_uad.space import AFFINE, SHAPE

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cohort:
    """Preprocessed scans of one dataset.

    Parameters
    ----------
    folder : pathlib.Path
    scans : tuple of PreprocessedScan
    prefix : str
        Put before its subjects' labels where two cohorts are mixed.
    """

    folder: Path
    scans: tuple[PreprocessedScan, ...]
    prefix: str = ""

    @cached_property
    def participants(self) -> Participants:
        """Who they are, read once."""
        return read_participants(self.folder)

    @property
    def name(self) -> str:
        """What the dataset is called."""
        return source_name(self.folder) or self.folder.name

    def only(self, names: set[str]) -> Cohort:
        """Those scans that belong to subjects of these full names."""
        kept = tuple(scan for scan in self.scans if self.full_name(scan) in names)
        return Cohort(self.folder, kept, self.prefix)

    def full_name(self, scan: PreprocessedScan) -> str:
        """Whose scan it is, told apart from those of other cohorts."""
        return f"{self.prefix}{scan.subject}"


def scratch_folder(work_dir: Path, name: str, *made_of: Any) -> Path:
    """Name a folder of scratch space by what its content is made of, so that a later run finds it again.

    Parameters
    ----------
    work_dir : pathlib.Path
    name : str
    *made_of
        JSON types; the version of the program is always among them.
    """
    told = json.dumps([__version__, *made_of], sort_keys=True)
    return work_dir / f"{name}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"


def healthy_cohort(folder: Path, modality: str) -> Cohort:
    """Scans of the participants who are healthy by participants.tsv.

    Raises
    ------
    InputError
        If nobody is.
    """
    cohort = Cohort(folder, tuple(find_preprocessed(folder, modality)))
    for note in cohort.participants.notes:
        logger.warning(note)
    found, people = cohort.scans, cohort.participants
    healthy = [scan for scan in found if people.person(scan.subject, scan.session).healthy]
    warn_about_masked_controls(healthy)
    if not healthy:
        raise InputError(
            folder / "participants.tsv",
            f"none of the {len(found)} {modality} scans belongs to a healthy participant",
            "name them `control` in a column `group`",
        )
    return Cohort(folder, tuple(healthy))


def read_lesion_mask(scan: PreprocessedScan) -> np.ndarray | None:
    """Read the lesion mask of a preprocessed scan.

    Parameters
    ----------
    scan : PreprocessedScan

    Returns
    -------
    numpy.ndarray of bool, shape SHAPE, or None
        None without a lesion mask.

    Raises
    ------
    InputError
        If the mask cannot be used, or is not on the SRI24 grid.
    """
    if scan.lesion is None:
        return None
    lesion, affine = read_lesion(scan.lesion)
    if lesion.shape != SHAPE or not np.allclose(affine, AFFINE, atol=1e-3):
        raise InputError(scan.lesion, "lesion mask not on the SRI24 grid", "run the participant level again")
    return lesion


def warn_about_masked_controls(scans: Iterable[PreprocessedScan]) -> None:
    """Warn of healthy controls in whose lesion mask a voxel is lesion.

    Parameters
    ----------
    scans : iterable of PreprocessedScan
        Of healthy controls.
    """
    masked = {scan.subject for scan in scans if scan.lesion is not None and read_lesion_mask(scan).any()}
    if masked:
        logger.warning(
            "Healthy by participants.tsv and yet with a lesion in the lesion mask: %s. They count as healthy",
            truncate_list(sorted(masked)),
        )


def describe(cohorts: Sequence[Cohort]) -> dict[str, Any]:
    """Say who they are: number, age range, sexes, scanners, sources, and hashes that tell them again.

    Parameters
    ----------
    cohorts : sequence of Cohort

    Returns
    -------
    dict
        JSON types only.
    """
    n_scans, ages, sexes, scanners, anatomies = 0, [], {}, set(), set()
    for cohort in cohorts:
        for scan in cohort.scans:
            person = cohort.participants.person(scan.subject, scan.session)
            n_scans += 1
            ages += [person.age] if person.age is not None else []
            sexes[cohort.folder, scan.subject] = person.sex
            scanners |= {person.scanner} - {None}
            anatomies |= {cohort.participants.row(scan.subject, scan.session).get("anatomy")} - {None}
    known = Counter(sex for sex in sexes.values() if sex is not None)
    met = {cohort.folder: {scan.subject for scan in cohort.scans} for cohort in cohorts}
    licences = [
        read_json(cohort.folder / "dataset_description.json").get("License", "not given")
        for cohort in cohorts
    ]
    return {
        "source": "; ".join(cohort.name for cohort in cohorts),
        "licence": "; ".join(dict.fromkeys(licences)),
        "n_scans": n_scans,
        "n_subjects": sum(len(subjects) for subjects in met.values()),
        "age_range": [min(ages), max(ages)] if ages else None,
        "sex": dict(known.most_common()) or None,
        "scanners": sorted(scanners) or None,
        "anatomies": sorted(anatomies) or None,
        "subjects": sorted(
            set().union(*(subject_hashes(folder, subjects) for folder, subjects in met.items()))
        ),
    }
