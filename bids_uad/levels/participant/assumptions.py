"""What deviations take for granted about people whose age or sex is not known, or unlike the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bids_uad.calibration.normative import FORMULA, HealthyCohort
from bids_uad.levels.participant.plan import Task


def deviation_sidecar(
    normative: Mapping[str, Any], *, age: float | None, sex: float | None
) -> dict[str, Any]:
    """Say what the deviations of a person are deviations from.

    Parameters
    ----------
    normative : mapping
        What the bundle's ``calibration.json`` says about its reference.
    age, sex : float or None
        Of the person, see :meth:`bids_uad.calibration.normative.HealthyCohort.place`.

    Returns
    -------
    dict
        Keys of a sidecar.
    """
    reference = normative["reference"]
    used, remarks = HealthyCohort.read(reference["covariates"]).place(age, sex)
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
