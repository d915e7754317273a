"""What is read: the T1w and T2w images of a BIDS dataset, each with its anchor and its ground truth."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bids.layout import BIDSLayout, BIDSLayoutIndexer, Query

from bids_uad.config import RunConfig
from bids_uad.dataset.filters import EXTENSIONS, read_queries
from bids_uad.dataset.lesions import LesionMask, resolve_masks
from bids_uad.dataset.prepared import LESIONS, attach_prepared
from bids_uad.dataset.units import PREFIX_ENTITIES, ImageUnit, Problem
from bids_uad.errors import ConfigError, InputError
from bids_uad.listing import listed

LOGGER = logging.getLogger("bids_uad")

_NOT_ANAT = (
    "beh",
    "dwi",
    "eeg",
    "fmap",
    "func",
    "ieeg",
    "meg",
    "micr",
    "motion",
    "mrs",
    "nirs",
    "perf",
    "pet",
)


@dataclass(frozen=True)
class Collection:
    """What a run works on.

    Parameters
    ----------
    subjects : tuple of str
        Participants asked for, also those without images.
    units : tuple of ImageUnit
        Images, a participant's anchors before what is registered to them.
    lesions : dict
        Lesion mask by the key of the image it belongs to.
    problems : tuple of Problem
        What could not be used.
    left_out : tuple of pathlib.Path
        Images that the default rules leave out.
    """

    subjects: tuple[str, ...]
    units: tuple[ImageUnit, ...]
    lesions: dict[str, LesionMask] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    left_out: tuple[Path, ...] = ()


def collect_units(config: RunConfig) -> list[ImageUnit]:
    """List the images of a run; see :func:`collect` for all that was found."""
    return list(collect(config).units)


def collect(config: RunConfig, check: Callable[[ImageUnit], None] | None = None) -> Collection:
    """Find the images, anchors and lesion masks of the participants that were asked for.

    Parameters
    ----------
    config : RunConfig
    check : callable, optional
        Raises InputError for an image that cannot be used. Such an image is reported and left out before
        anchors are chosen, so that it takes no other image with it.

    Returns
    -------
    Collection

    Raises
    ------
    InputError
        If a participant or session that was asked for does not exist, or nothing is left.
    ConfigError
        If the filter file is not usable.
    """
    subjects = requested_subjects(config.bids_dir, config.participants)
    queries = read_queries(config.filter_file)
    layout = open_layout(config.bids_dir, subjects)
    _check_sessions(layout, config)
    scope: dict[str, Any] = {"subject": list(subjects)}
    if config.sessions:
        scope["session"] = list(config.sessions)

    found = {modality: _query(layout, {**query, **scope}, config) for modality, query in queries.items()}
    raw = [_to_unit(file, modality) for modality, files in found.items() for file in files]
    raw, problems = _refuse_twins(raw)
    raw, unusable = _refuse_unusable(raw, config.modalities, check)
    problems += unusable
    units, unfitting = attach_prepared(set_anchors(raw, config.modalities), config.derivatives)
    problems += unfitting

    lesions, refused = _attach_lesions(config, units)
    problems += refused
    for subject in subjects:
        if not any(item.subject == subject for item in (*units, *problems)):
            wanted = " or ".join(config.modalities)
            problems.append(Problem(subject, f"sub-{subject}: no {wanted} image to work on"))
    left_out = _left_out(layout, scope, config.modalities, {unit.path for unit in raw})
    return Collection(subjects, tuple(units), lesions, tuple(problems), left_out)


def requested_subjects(bids_dir: Path, labels: Sequence[str]) -> tuple[str, ...]:
    """List the participants to process.

    Parameters
    ----------
    bids_dir : pathlib.Path
    labels : sequence of str
        Labels without `sub-`; empty means all.

    Raises
    ------
    InputError
        If the dataset has no participant, or lacks one that was asked for.
    """
    existing = sorted(path.name.removeprefix("sub-") for path in bids_dir.glob("sub-*") if path.is_dir())
    if not existing:
        raise InputError(bids_dir, "holds no participant (sub-* folder)", "give the root of a BIDS dataset")
    missing = sorted(set(labels) - set(existing))
    if missing:
        raise InputError(bids_dir, f"has no participant {', '.join(missing)}", f"it has {listed(existing)}")
    return tuple(label for label in existing if not labels or label in labels)


def open_layout(bids_dir: Path, subjects: Sequence[str]) -> BIDSLayout:
    """Index the anatomical images of some participants of a raw dataset, and nothing else.

    Indexing everything is what makes BIDS apps slow to start on large datasets.
    """
    keep = "|".join(map(re.escape, subjects))
    indexer = BIDSLayoutIndexer(
        validate=False,
        ignore=[
            re.compile(r"^/(?:code|derivatives|models|phenotype|sourcedata|stimuli)(?:/|$)"),
            re.compile(r"/\."),
            re.compile(rf"^/sub-(?!(?:{keep})(?:/|$))"),
            re.compile(rf"/(?:{'|'.join(_NOT_ANAT)})(?:/|$)"),
        ],
    )
    return BIDSLayout(bids_dir, validate=False, derivatives=False, indexer=indexer)


def set_anchors(units: Sequence[ImageUnit], modalities: Sequence[str]) -> list[ImageUnit]:
    """Say which image each T2w is registered to, and drop what nobody needs.

    The anchor is the first T1w of the same session, else the first T1w of the participant; a T2w of a
    participant without T1w goes to the atlas directly. Plain images come before contrast-enhanced ones.

    Parameters
    ----------
    units : sequence of ImageUnit
        Images of both modalities.
    modalities : sequence of str
        Those that anomalies are looked for in. A T1w that is not wanted itself is kept if it is an
        anchor.

    Returns
    -------
    list of ImageUnit
        Sorted by participant, T1w first.
    """
    t1w = sorted((unit for unit in units if unit.modality == "T1w"), key=_order)
    chosen: list[ImageUnit] = [unit for unit in t1w if "T1w" in modalities]
    for unit in sorted((unit for unit in units if unit.modality == "T2w"), key=_order):
        if "T2w" not in modalities:
            continue
        own = [candidate for candidate in t1w if candidate.subject == unit.subject]
        near = [candidate for candidate in own if candidate.session == unit.session]
        anchor = next(iter(near + own), None)
        if anchor is not None and anchor not in chosen:
            chosen.append(anchor)
        chosen.append(replace(unit, anchor=anchor))
    return sorted(chosen, key=lambda unit: (unit.subject, unit.modality, _order(unit)))


def _order(unit: ImageUnit) -> tuple:
    """Sort key of a participant's images: sessions in order, plain images first, then by run."""
    run = unit.entities.get("run", "0")
    return (
        unit.subject,
        unit.session or "",
        "ceagent" in unit.entities,
        int(run) if run.isdigit() else 0,
        unit.key,
    )


def _query(layout: BIDSLayout, query: dict[str, Any], config: RunConfig) -> list:
    """Ask pybids; a session in the filter file and one on the command line must both hold."""
    try:
        return layout.get(**query)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"--bids-filter-file {config.filter_file}: {error}") from error


def _to_unit(file: Any, modality: str) -> ImageUnit:
    """Make a unit of a pybids file."""
    entities = file.get_entities()
    own = {name: str(entities[name]) for name, _ in PREFIX_ENTITIES if name in entities}
    return ImageUnit(
        path=Path(file.path),
        subject=own["subject"],
        session=own.get("session"),
        modality=modality,
        entities=own,
        sidecar=file.get_metadata(),
    )


def _refuse_twins(units: list[ImageUnit]) -> tuple[list[ImageUnit], list[Problem]]:
    """Refuse images whose outputs would have the same names."""
    by_key = defaultdict(list)
    for unit in units:
        by_key[unit.key].append(unit)
    problems = [
        Problem(
            twins[0].subject,
            f"{twins[0].path}: cannot be told from {twins[1].path.name} by its BIDS entities; "
            "leave one out with --bids-filter-file",
            key,
        )
        for key, twins in by_key.items()
        if len(twins) > 1
    ]
    return [twins[0] for twins in by_key.values() if len(twins) == 1], problems


def _refuse_unusable(
    units: list[ImageUnit], modalities: Sequence[str], check: Callable[[ImageUnit], None] | None
) -> tuple[list[ImageUnit], list[Problem]]:
    """Leave out the images that do not pass the check; T2w images that nobody wants are not looked at."""
    usable, problems = [], []
    for unit in units:
        if check is not None and (unit.modality in modalities or unit.modality == "T1w"):
            try:
                check(unit)
            except InputError as error:
                problems.append(Problem(unit.subject, str(error), unit.key))
                continue
        usable.append(unit)
    return usable, problems


def _attach_lesions(
    config: RunConfig, units: Sequence[ImageUnit]
) -> tuple[dict[str, LesionMask], list[Problem]]:
    """Find the lesion mask of each image, by the image's key."""
    lesions: dict[str, LesionMask] = {}
    problems: list[Problem] = []
    root = config.derivatives.get(LESIONS)
    if root is None:
        return lesions, problems
    for subject in dict.fromkeys(unit.subject for unit in units):
        own = [unit for unit in units if unit.subject == subject]
        found, refused = resolve_masks(root, own, config.bids_dir, list(config.derivatives.values()))
        lesions |= found
        problems += [Problem(subject, str(error)) for error in refused]
    return lesions, problems


def _left_out(
    layout: BIDSLayout, scope: dict[str, Any], modalities: Sequence[str], used: set[Path]
) -> tuple[Path, ...]:
    """List contrast-enhanced images that nobody asked for, to say so in the log."""
    files = layout.get(
        **scope, datatype="anat", suffix=list(modalities), extension=EXTENSIONS, ceagent=Query.ANY
    )
    return tuple(Path(file.path) for file in files if Path(file.path) not in used)


def _check_sessions(layout: BIDSLayout, config: RunConfig) -> None:
    """Refuse sessions that no participant has."""
    existing = sorted(layout.get_sessions())
    missing = sorted(set(config.sessions) - set(existing))
    if missing:
        raise InputError(
            config.bids_dir,
            f"has no session {', '.join(missing)}",
            f"it has {listed(existing)}" if existing else "it has no sessions",
        )
