"""Subjects and scanners that a model has met before: what it says of them holds for no others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bids_uad.calibration.normative import FORMULA, HealthyCohort
from bids_uad.dataset import sidecars
from bids_uad.dataset.naming import ImageUnit
from bids_uad.dataset.participants import by_content, by_name, source_name
from bids_uad.engine.bundle import Bundle
from bids_uad.files import sha256_of

if TYPE_CHECKING:
    from bids_uad.levels.participant.plan import Task

NOT_SEEN = "no"
SEEN, NAME_SEEN, UNSEEN = sidecars.SCANNER_SEEN_LEVELS


def seen_in_training(bundle: Bundle, unit: ImageUnit, bids_dir: Path) -> str:
    """Say where a model has met the subject of an image.

    Parameters
    ----------
    bundle : Bundle
    unit : ImageUnit
    bids_dir : pathlib.Path

    Returns
    -------
    str
        ``no``, or cohorts of the model (:meth:`Bundle.cohorts_containing`) with ``and`` between them.
    """
    return _where(bundle, unit, source_name(bids_dir))


def _where(bundle: Bundle, unit: ImageUnit, dataset: str | None) -> str:
    hashes = {by_content(sha256_of(unit.path))}
    if dataset:
        hashes.add(by_name(dataset, f"sub-{unit.subject}"))
    return " and ".join(bundle.cohorts_containing(hashes)) or NOT_SEEN


def scanner_seen(bundle: Bundle, scanner: str | None, dataset: str | None) -> str | None:
    """Say whether a model has learnt from a scanner.

    A name tells a scanner only within a dataset: what is called `1` in one is another machine elsewhere.

    Parameters
    ----------
    bundle : Bundle
        Its training cohort names its sources and scanners.
    scanner : str, optional
        As participants.tsv names it.
    dataset : str, optional
        Name of the raw dataset.

    Returns
    -------
    str or None
        One of :data:`bids_uad.dataset.sidecars.SCANNER_SEEN_LEVELS`; None where the scanner, or those of the
        training, are not known.
    """
    training = bundle.info.get("training", {})
    if scanner is None or not training.get("scanners"):
        return None
    if scanner not in training["scanners"]:
        return UNSEEN
    return SEEN if dataset in training["source"].split("; ") else NAME_SEEN


def overlaps(bundles: Sequence[Bundle], units: Sequence[ImageUnit], bids_dir: Path) -> list[str]:
    """Warn of models that have met subjects of this run.

    Returns
    -------
    list of str
        A line for each model and cohort.
    """
    dataset = source_name(bids_dir)
    lines = []
    for bundle in bundles:
        met: dict[str, set[str]] = {}
        for unit in units:
            if unit.modality == bundle.modality:
                met.setdefault(_where(bundle, unit, dataset), set()).add(f"sub-{unit.subject}")
        met.pop(NOT_SEEN, None)
        lines += [
            f"{bundle.name} has met {', '.join(sorted(subjects))} in {where}: how well it does on them says "
            "nothing about others"
            for where, subjects in sorted(met.items())
        ]
    return list(dict.fromkeys(lines))


def deviation_sidecar(
    normative: Mapping[str, Any], *, age: float | None, sex: float | None
) -> dict[str, Any]:
    """Say what the deviations of a person are deviations from.

    Parameters
    ----------
    normative : mapping
        What the bundle's ``calibration.json`` says about its reference.
    age, sex : float or None
        Of the person, see :meth:`bids_uad.calibration.normative.HealthyCohort.impute_covariates`.

    Returns
    -------
    dict
        Keys of a sidecar.
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


def assumptions(tasks: Sequence[Task]) -> list[str]:
    """Warn of people whose deviations rest on an assumption.

    Returns
    -------
    list of str
        A line for each model and assumption.
    """
    told: dict[str, set[str]] = {}
    for task in tasks:
        for bundle in task.bundles:
            if bundle.deviation == "none":
                continue
            for remark in deviation_sidecar(bundle.normative, **task.person.covariates)["NormativeRemarks"]:
                told.setdefault(remark, set()).add(f"sub-{task.unit.subject}")
    return [
        f"deviation of {', '.join(sorted(subjects))}: {remark}" for remark, subjects in sorted(told.items())
    ]
