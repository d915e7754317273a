"""Cohorts of preprocessed scans for training and calibration, and their description in a bundle."""

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
from bids_uad.evaluation.missing import find_exclusions
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
        Dataset.
    scans : tuple of PreprocessedScan
        Its selected scans.
    prefix : str, default=""
        Prefix of the subjects' names, which makes them unique across cohorts.
    """

    folder: Path
    scans: tuple[PreprocessedScan, ...]
    prefix: str = ""

    @cached_property
    def participants(self) -> Participants:
        """Contents of participants.tsv, read once."""
        return read_participants(self.folder)

    @property
    def name(self) -> str:
        """Name of the dataset."""
        return source_name(self.folder) or self.folder.name

    def only(self, names: set[str]) -> Cohort:
        """Return the cohort restricted to subjects with these full names."""
        kept = tuple(scan for scan in self.scans if self.full_name(scan) in names)
        return Cohort(self.folder, kept, self.prefix)

    def full_name(self, scan: PreprocessedScan) -> str:
        """Return the name of the subject of a scan, with the prefix of the cohort."""
        return f"{self.prefix}{scan.subject}"


def scratch_folder(work_dir: Path, name: str, *inputs: Any) -> Path:
    """Return a working folder named by a hash of its inputs, which a later run with equal inputs reuses.

    Parameters
    ----------
    work_dir : pathlib.Path
        Parent folder.
    name : str
        Prefix of the folder's name.
    *inputs
        JSON types that are hashed together with the version of the package.

    Returns
    -------
    pathlib.Path
        Folder, which may not exist yet.
    """
    key = json.dumps([__version__, *inputs], sort_keys=True)
    return work_dir / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def usable_scans(folder: Path, modality: str) -> tuple[PreprocessedScan, ...]:
    """Find the preprocessed scans that quality control does not exclude (`exclude` in the quality tables).

    Parameters
    ----------
    folder : pathlib.Path
        Dataset of preprocessed scans.
    modality : {"T1w", "T2w", "FLAIR"}
        Contrast of the scans.

    Returns
    -------
    tuple of PreprocessedScan
        Scans sorted by path; excluded ones are named in the log.

    Raises
    ------
    InputError
        If there is no scan.
    """
    exclusions, unreadable = find_exclusions(folder)
    for message in unreadable:
        logger.warning(message)
    excluded = {f"{prefix}_{contrast}" for prefix, contrast in exclusions}
    scans = find_preprocessed(folder, modality)
    left_out = [scan.key for scan in scans if scan.key in excluded]
    if left_out:
        logger.warning("%d scan(s) excluded by *_qc.tsv: %s", len(left_out), truncate_list(left_out))
    kept = tuple(scan for scan in scans if scan.key not in excluded)
    if not kept:
        raise InputError(folder, f"all {modality} scans are excluded", "check `exclude` in the *_qc.tsv")
    return kept


def healthy_cohort(folder: Path, modality: str) -> Cohort:
    """Find the preprocessed scans of the healthy controls of a dataset.

    Parameters
    ----------
    folder : pathlib.Path
        Dataset of preprocessed scans with participants.tsv.
    modality : {"T1w", "T2w", "FLAIR"}
        Contrast of the scans.

    Returns
    -------
    Cohort
        Scans of participants that are healthy controls by participants.tsv.

    Raises
    ------
    InputError
        If there are none.
    """
    cohort = Cohort(folder, usable_scans(folder, modality))
    for note in cohort.participants.notes:
        logger.warning(note)
    found, participants = cohort.scans, cohort.participants
    healthy = [scan for scan in found if participants.person(scan.subject, scan.session).healthy]
    warn_about_masked_controls(healthy)
    if not healthy:
        raise InputError(
            folder / "participants.tsv",
            f"none of the {len(found)} {modality} scans belongs to a healthy control",
            "label controls as `control` in a column `group`",
        )
    return Cohort(folder, tuple(healthy))


def read_lesion_mask(scan: PreprocessedScan) -> np.ndarray | None:
    """Read the lesion mask of a preprocessed scan.

    Parameters
    ----------
    scan : PreprocessedScan
        Scan.

    Returns
    -------
    numpy.ndarray of bool, shape (240, 240, 155), or None
        Lesion mask; None if the scan has none.

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
    """Warn of healthy controls with a lesion mask that is not empty.

    Parameters
    ----------
    scans : iterable of PreprocessedScan
        Scans of healthy controls.
    """
    masked = {scan.subject for scan in scans if scan.lesion is not None and read_lesion_mask(scan).any()}
    if masked:
        logger.warning(
            "Healthy controls in participants.tsv with a lesion mask that is not empty, used as controls: %s",
            truncate_list(sorted(masked)),
        )


def describe_cohorts(cohorts: Sequence[Cohort]) -> dict[str, Any]:
    """Describe the subjects of cohorts for ``bundle.json``.

    Parameters
    ----------
    cohorts : sequence of Cohort
        Cohorts of a training or validation set.

    Returns
    -------
    dict
        ``source``, ``licence``, ``n_scans``, ``n_subjects``, ``age_range``, ``sex``, ``scanners``,
        ``anatomies`` (label maps of simulated scans) and ``subjects`` (hashes that identify them).
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
    subjects = {cohort.folder: {scan.subject for scan in cohort.scans} for cohort in cohorts}
    licences = [
        read_json(cohort.folder / "dataset_description.json").get("License", "not given")
        for cohort in cohorts
    ]
    return {
        "source": "; ".join(cohort.name for cohort in cohorts),
        "licence": "; ".join(dict.fromkeys(licences)),
        "n_scans": n_scans,
        "n_subjects": sum(len(labels) for labels in subjects.values()),
        "age_range": [min(ages), max(ages)] if ages else None,
        "sex": dict(known.most_common()) or None,
        "scanners": sorted(scanners) or None,
        "anatomies": sorted(anatomies) or None,
        "subjects": sorted(
            set().union(*(subject_hashes(folder, labels) for folder, labels in subjects.items()))
        ),
    }
