"""Subjects and scanners that a model has met before: what it says of them holds for no others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bids_uad.dataset import sidecars
from bids_uad.dataset.identity import by_content, by_name, source_name
from bids_uad.dataset.units import ImageUnit
from bids_uad.engine.bundle import Bundle
from bids_uad.levels.participant.records import sha256_of

STRANGER = "no"
SEEN, NAME_SEEN, UNSEEN = sidecars.SCANNER_SEEN_LEVELS


def model_has_met(bundle: Bundle, unit: ImageUnit, bids_dir: Path) -> str:
    """Say where a model has met the subject of an image.

    Parameters
    ----------
    bundle : Bundle
    unit : ImageUnit
    bids_dir : pathlib.Path

    Returns
    -------
    str
        ``no``, or cohorts of the model (:meth:`Bundle.has_met`) with ``and`` between them.
    """
    return _where(bundle, unit, source_name(bids_dir))


def _where(bundle: Bundle, unit: ImageUnit, dataset: str | None) -> str:
    hashes = {by_content(sha256_of(unit.path))}
    if dataset:
        hashes.add(by_name(dataset, f"sub-{unit.subject}"))
    return " and ".join(bundle.has_met(hashes)) or STRANGER


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
        met.pop(STRANGER, None)
        lines += [
            f"{bundle.name} has met {', '.join(sorted(subjects))} in {where}: how well it does on them says "
            "nothing about others"
            for where, subjects in sorted(met.items())
        ]
    return list(dict.fromkeys(lines))
