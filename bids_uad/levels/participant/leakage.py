"""Overlap of training and test data, and limits of normative references: metadata and warnings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bids_uad.calibration.normative import FORMULA, HealthyCohort
from bids_uad.dataset import sidecars
from bids_uad.dataset.naming import ImageUnit
from bids_uad.dataset.participants import image_hash, source_name, subject_hash
from bids_uad.engine.bundle import Bundle
from bids_uad.errors import truncate_list
from bids_uad.files import sha256_of

if TYPE_CHECKING:
    from bids_uad.levels.participant.plan import Task

NOT_SEEN = "no"
"""Value of `seen_in_training` for participants without overlap."""
SEEN, NAME_SEEN, UNSEEN = sidecars.SCANNER_SEEN_LEVELS


class Remark(NamedTuple):
    """Warning about one participant or image; the same ones about others are joined to one line.

    Parameters
    ----------
    before : str
        Text before the name.
    name : str
        Participant or image.
    after : str
        Text after the name.
    """

    before: str
    name: str
    after: str

    @property
    def kind(self) -> tuple[str, str]:
        """Text without the name."""
        return self.before, self.after


def join_remarks(names: Mapping[tuple[str, str], Iterable[str]]) -> list[str]:
    """Write one line per kind of remark.

    Parameters
    ----------
    names : mapping of (str, str) to iterable of str
        Participants or images of each kind of remark.

    Returns
    -------
    list of str
        One line per kind, with the sorted names.
    """
    return [f"{before}{truncate_list(sorted(own))}{after}" for (before, after), own in names.items()]


def seen_in_training(bundle: Bundle, unit: ImageUnit, dataset: str | None) -> str:
    """Return the cohorts of a model that contain the participant of an image.

    Parameters
    ----------
    bundle : Bundle
        Model with the hashes of its participants.
    unit : ImageUnit
        The image.
    dataset : str or None
        Name of the raw dataset. If None, participants are compared by image content only.

    Returns
    -------
    str
        `no`, or cohorts (:meth:`Bundle.cohorts_containing`) joined by `and`.
    """
    hashes = {image_hash(sha256_of(unit.path))}
    if dataset:
        hashes.add(subject_hash(dataset, f"sub-{unit.subject}"))
    return " and ".join(bundle.cohorts_containing(hashes)) or NOT_SEEN


def scanner_seen(bundle: Bundle, scanner: str | None, dataset: str | None) -> str | None:
    """Return whether the training data of a model contain a scanner.

    Parameters
    ----------
    bundle : Bundle
        Model with the names of its training datasets and scanners.
    scanner : str or None
        Name of the scanner in participants.tsv.
    dataset : str or None
        Name of the raw dataset. Scanners of the same name in different datasets may be different scanners.

    Returns
    -------
    str or None
        One of :data:`bids_uad.dataset.sidecars.SCANNER_SEEN_LEVELS`; None if the scanner of the image or
        those of the training data are unknown.
    """
    training = bundle.info.get("training", {})
    if scanner is None or not training.get("scanners"):
        return None
    if scanner not in training["scanners"]:
        return UNSEEN
    return SEEN if dataset in training["source"].split("; ") else NAME_SEEN


def leakage_remarks(bundles: Sequence[Bundle], units: Sequence[ImageUnit], bids_dir: Path) -> list[Remark]:
    """Report a participant who is in the training or calibration data of the models.

    Parameters
    ----------
    bundles : sequence of Bundle
        Models of the run.
    units : sequence of ImageUnit
        Images of the participant.
    bids_dir : pathlib.Path
        Raw dataset.

    Returns
    -------
    list of Remark
        One for each model and image.
    """
    dataset = source_name(bids_dir)
    remarks = []
    for bundle in bundles:
        for unit in units:
            if unit.modality != bundle.modality:
                continue
            cohort = seen_in_training(bundle, unit, dataset)
            if cohort != NOT_SEEN:
                end = f" seen in {cohort}; the results do not estimate the performance on other participants"
                remarks.append(Remark(f"{bundle.name}: ", f"sub-{unit.subject}", end))
    return remarks


def normative_metadata(
    normative: Mapping[str, Any], *, age: float | None, sex: float | None
) -> dict[str, Any]:
    """Return the sidecar fields that describe the normative reference of a participant's deviations.

    Parameters
    ----------
    normative : mapping
        Normative reference in the bundle's `calibration.json`.
    age : float or None
        Age in years, None if unknown.
    sex : float or None
        0.5 for male, -0.5 for female, None if unknown; see
        :meth:`bids_uad.calibration.normative.HealthyCohort.impute_covariates`.

    Returns
    -------
    dict
        Fields `Deviation` and `Normative*`. `NormativeRemarks` lists imputed and extrapolated covariates.
    """
    reference = normative["reference"]
    used, remarks = HealthyCohort.read(reference["covariates"]).impute_covariates(age, sex)
    names = {0.5: "male", -0.5: "female"}
    return {
        "Deviation": "normative",
        "NormativeFormula": FORMULA,
        "NormativeReferenceSHA256": normative["sha256"],
        "NormativeReferenceSubjects": normative["n_healthy_subjects"],
        "NormativeAge": used["age"],
        "NormativeSex": names.get(used["sex"], "mean of the reference"),
        "NormativeRemarks": remarks,
    }


def normative_remarks(tasks: Sequence[Task]) -> list[Remark]:
    """Report a participant whose deviations use imputed or extrapolated covariates.

    Parameters
    ----------
    tasks : sequence of Task
        Tasks of the participant.

    Returns
    -------
    list of Remark
        One for each image, model and covariate.
    """
    remarks = []
    for task in tasks:
        for bundle in task.bundles:
            if bundle.deviation != "none":
                fields = normative_metadata(bundle.normative, **task.person.covariates)
                for text in fields["NormativeRemarks"]:
                    remarks.append(Remark("deviation of ", f"sub-{task.unit.subject}", f": {text}"))
    return remarks
