"""Search for the inputs of a run: the images of a BIDS dataset, their anchors and lesion masks."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any

from bids.layout import BIDSLayout, BIDSLayoutIndexer, Query
from bids.utils import listify

from bids_uad.config import MODALITIES, RunConfig
from bids_uad.dataset.external import LESIONS, attach_external_inputs
from bids_uad.dataset.lesion_masks import LesionMask, resolve_masks
from bids_uad.dataset.naming import PREFIX_ENTITIES, ImageUnit, Problem, natural_key
from bids_uad.dataset.raw_metadata import SidecarReader
from bids_uad.errors import ConfigError, InputError, truncate_list

EXTENSIONS = [".nii.gz", ".nii"]

SUFFIXES = {"T1w": ["T1w", "UNIT1"], "T2w": ["T2w"], "FLAIR": ["FLAIR"]}
"""Suffixes of each modality; UNIT1 is the T1-weighted image of MP2RAGE."""

_DEFAULTS: dict[str, dict[str, Any]] = {
    modality: {
        "datatype": "anat",
        "suffix": suffixes,
        "extension": EXTENSIONS,
        "ceagent": None,
        "part": [None, "mag"],
        "chunk": None,
        "inv": None,
    }
    for modality, suffixes in SUFFIXES.items()
}
"""Default pybids filters of each modality.

Contrast-enhanced images (`ce-`) are left out: the detectors are trained on images without contrast agent and
would mark enhancing vessels. Phase, real and imaginary images (`part-`), parts of a scan (`chunk-`) and
single inversions of MP2RAGE (`inv-`) are left out as well.
"""

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

_LABEL = re.compile(r"[0-9a-zA-Z+]+")
_IMAGE_NAME = re.compile(r"\.(?:nii|img|hdr|mgz|mgh|mnc|nrrd|nhdr|dcm|ima)(?:\.[0-9a-z]+)?$", re.IGNORECASE)
"""Extensions of images, including formats that BIDS does not allow."""

CONTRAST_ENHANCED = "contrast-enhanced; a --bids-filter-file can select them"
"""Reason for leaving out images with `ce-`."""


@dataclass(frozen=True)
class Collection:
    """Inputs of a run.

    Parameters
    ----------
    subjects : tuple of str
        Labels of the requested participants, also of those without images.
    units : tuple of ImageUnit
        Images, each anchor before the images that are registered to it.
    lesions : dict of str to LesionMask, default={}
        Lesion masks by the key of the image.
    problems : tuple of Problem, default=()
        Participants, images and lesion masks that cannot be used.
    left_out : dict of pathlib.Path to str, default={}
        T1w, T2w and FLAIR images, or files with such names, that are not used, with the reason.
    anchors_only : frozenset of str, default=frozenset()
        Keys of T1w images of sessions that were not requested. Images of requested sessions are registered to
        them; no output is written for them.
    """

    subjects: tuple[str, ...]
    units: tuple[ImageUnit, ...]
    lesions: dict[str, LesionMask] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    left_out: dict[Path, str] = field(default_factory=dict)
    anchors_only: frozenset[str] = frozenset()


def collect(
    config: RunConfig,
    check: Callable[[ImageUnit], None] | None = None,
    subjects: Sequence[str] | None = None,
) -> Collection:
    """Find the images, anchors and lesion masks of participants.

    Parameters
    ----------
    config : RunConfig
        Configuration of the run.
    check : callable, optional
        Function that raises InputError for an image that cannot be used. Such an image is reported and left
        out before anchors are chosen, so that other images get another anchor.
    subjects : sequence of str, optional
        Labels without `sub-`; by default all that `config` requests.

    Returns
    -------
    Collection
        Inputs of the run, and what cannot be used.

    Raises
    ------
    InputError
        If a requested participant does not exist.
    ConfigError
        If the filter file or the database cannot be used.
    """
    if subjects is None:
        subjects = requested_subjects(config.bids_dir, config.participants)
    queries = read_queries(config.filter_file)
    valid = [subject for subject in subjects if _LABEL.fullmatch(subject)]
    layout = open_layout(config.bids_dir, valid, config.database_dir)
    scope: dict[str, Any] = {"subject": valid, "datatype": "anat"}
    if config.sessions:
        scope["session"] = list(config.sessions)

    files = [
        (file, modality)
        for modality, query in queries.items()
        for file in (_query(layout, {**query, **scope}, config) if valid else [])
    ]
    problems = [_invalid_label(config.bids_dir, subject) for subject in subjects if subject not in valid]
    raw, misnamed = _make_units(files, config.bids_dir)
    raw, ambiguous = _drop_ambiguous(raw)
    raw, unusable = _drop_unusable(raw, config.modalities, check)
    other_sessions = _anchors_of_other_sessions(layout, queries["T1w"], raw, config, check)
    anchored = set_anchors([*raw, *other_sessions], config.modalities)
    used = {unit.anchor.key for unit in anchored if unit.anchor is not None}
    anchors_only = frozenset(unit.key for unit in other_sessions) & used
    anchored = [unit for unit in anchored if unit not in other_sessions or unit.key in used]
    units, off_grid = attach_external_inputs(anchored, config.derivatives)
    lesions, bad_masks = _find_lesions(config, [unit for unit in units if unit.key not in anchors_only])
    problems += [*misnamed, *ambiguous, *unusable, *off_grid, *bad_masks]
    left_out = _left_out(layout, scope, {Path(file.path) for file, _ in files}, config) if valid else {}
    for subject in subjects:
        if not any(item.subject == subject for item in (*units, *problems)):
            problems.append(_no_image(subject, config, left_out))
    return Collection(tuple(subjects), tuple(units), lesions, tuple(problems), left_out, anchors_only)


def _anchors_of_other_sessions(
    layout: BIDSLayout,
    query: dict[str, Any],
    units: Sequence[ImageUnit],
    config: RunConfig,
    check: Callable[[ImageUnit], None] | None,
) -> list[ImageUnit]:
    """Find T1w images of sessions that were not requested, for other images of sessions without a T1w.

    A job for one session thus registers an image to the same T1w image as a run on all sessions does.
    """
    with_t1w = {(unit.subject, unit.session) for unit in units if unit.modality == "T1w"}
    subjects = {
        unit.subject
        for unit in units
        if unit.modality in config.modalities
        and unit.modality != "T1w"
        and (unit.subject, unit.session) not in with_t1w
    }
    if not config.sessions or not subjects:
        return []
    files = _query(layout, {**query, "subject": sorted(subjects)}, config)
    others, _ = _make_units([(file, "T1w") for file in files], config.bids_dir)
    others, _ = _drop_ambiguous([unit for unit in others if unit.session not in config.sessions])
    # Problems of these images are reported by the runs on their sessions.
    return _drop_unusable(others, ("T1w",), check)[0]


def requested_subjects(bids_dir: Path, labels: Sequence[str]) -> tuple[str, ...]:
    """Return the labels of the participants to process.

    Parameters
    ----------
    bids_dir : pathlib.Path
        Root of the raw dataset.
    labels : sequence of str
        Requested labels without `sub-`; empty means all participants.

    Returns
    -------
    tuple of str
        Labels without `sub-`, sorted with numbers by value.

    Raises
    ------
    InputError
        If the dataset has no participant, or not all of the requested ones.
    """
    labels_of = (path.name.removeprefix("sub-") for path in bids_dir.glob("sub-*") if path.is_dir())
    existing = sorted(labels_of, key=natural_key)
    if not existing:
        raise InputError(bids_dir, "no participant (sub-* folder)", "give the root of a BIDS dataset")
    missing = sorted(set(labels) - set(existing), key=natural_key)
    if missing:
        raise InputError(
            bids_dir, f"no participant {', '.join(missing)}", f"choose from {truncate_list(existing)}"
        )
    return tuple(label for label in existing if not labels or label in labels)


def open_layout(bids_dir: Path, subjects: Sequence[str], database_dir: Path | None = None) -> BIDSLayout:
    """Index the anatomical images of some participants of a raw dataset.

    Only these are indexed, since indexing a large dataset takes minutes. Sidecars are read by
    :class:`bids_uad.dataset.raw_metadata.SidecarReader` instead of pybids, where a single broken one ends the
    run. Entities are read from the path below the root; by default pybids reads them from the whole path, so
    that a parent folder named ``sub-02`` would change the label of every image.

    Parameters
    ----------
    bids_dir : pathlib.Path
        Root of the raw dataset.
    subjects : sequence of str
        Labels without `sub-`.
    database_dir : pathlib.Path, optional
        Folder of a pybids database, which is used as it is. If it does not exist, the whole dataset is
        indexed and written to it.

    Returns
    -------
    bids.layout.BIDSLayout
        Index without metadata.

    Raises
    ------
    ConfigError
        If the database belongs to another dataset.
    """
    config = json.loads((resources.files("bids.layout.config") / "bids.json").read_text(encoding="utf-8"))
    below_root = f"^{re.escape(str(bids_dir.absolute()))}(?=/).*?"
    for entity in config["entities"]:
        entity["pattern"] = below_root + entity["pattern"]
    keep = "|".join(map(re.escape, subjects)) if database_dir is None else ".*"
    indexer = BIDSLayoutIndexer(
        validate=False,
        index_metadata=False,
        ignore=[
            re.compile(r"^/(?:code|derivatives|models|phenotype|sourcedata|stimuli)(?:/|$)"),
            re.compile(r"/\."),
            re.compile(rf"^/sub-(?!(?:{keep})(?:/|$))"),
            re.compile(rf"/(?:{'|'.join(_NOT_ANAT)})(?:/|$)"),
        ],
    )
    layout = BIDSLayout(
        bids_dir,
        validate=False,
        derivatives=False,
        config=[config],
        indexer=indexer,
        database_path=database_dir,
    )
    root = Path(layout.root)
    if database_dir is not None and root.resolve() != bids_dir.resolve():
        raise ConfigError(f"--bids-database-dir {database_dir} is an index of {root}; choose another folder")
    return layout


def set_anchors(units: Sequence[ImageUnit], modalities: Sequence[str]) -> list[ImageUnit]:
    """Choose the T1w image that each other image is registered to, and drop images that are not needed.

    The anchor is the first T1w of the same session, else the first T1w of the participant; images of a
    participant without T1w are registered to the reference image directly. Images without contrast agent come
    before contrast-enhanced ones.

    Parameters
    ----------
    units : sequence of ImageUnit
        Images of all modalities.
    modalities : sequence of str
        Modalities to detect anomalies in. A T1w that is not among them is kept if it is an anchor.

    Returns
    -------
    list of ImageUnit
        Sorted by participant, T1w first.
    """
    t1w = sorted((unit for unit in units if unit.modality == "T1w"), key=_order)
    chosen: list[ImageUnit] = [unit for unit in t1w if "T1w" in modalities]
    for unit in sorted((unit for unit in units if unit.modality != "T1w"), key=_order):
        if unit.modality not in modalities:
            continue
        candidates = [candidate for candidate in t1w if candidate.subject == unit.subject]
        same_session = [candidate for candidate in candidates if candidate.session == unit.session]
        anchor = next(iter(same_session + candidates), None)
        if anchor is not None and anchor not in chosen:
            chosen.append(anchor)
        chosen.append(replace(unit, anchor=anchor))
    return sorted(chosen, key=lambda unit: (unit.subject, MODALITIES.index(unit.modality), _order(unit)))


def _order(unit: ImageUnit) -> tuple:
    """Return the sort key of an image: participant, session, contrast agent, UNIT1 after T1w, run."""
    run = unit.entities.get("run", "0")
    return (
        unit.subject,
        unit.session or "",
        "ceagent" in unit.entities,
        unit.suffix != unit.modality,
        int(run) if run.isdigit() else 0,
        unit.key,
    )


def _query(layout: BIDSLayout, query: dict[str, Any], config: RunConfig) -> list:
    """Query pybids; raise ConfigError if a filter is not valid."""
    try:
        return layout.get(**query)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"--bids-filter-file {config.filter_file}: {error}") from error


def _make_units(files: Sequence[tuple[Any, str]], bids_dir: Path) -> tuple[list[ImageUnit], list[Problem]]:
    """Convert pybids files, each with its modality, to image units; report names that contradict folders."""
    sidecars = SidecarReader(bids_dir)
    units, problems = [], []
    for file, modality in files:
        entities = file.get_entities()
        own = {name: str(entities[name]) for name, _ in PREFIX_ENTITIES if name in entities}
        path = Path(file.path)
        unit = ImageUnit(path, own["subject"], own.get("session"), modality, own)
        expected = [f"sub-{unit.subject}"] + ([f"ses-{unit.session}"] if unit.session else [])
        named = [part for part in path.name.split("_") if part.startswith(("sub-", "ses-"))]
        if named[:1] != expected[:1] or named[1:] not in ([], expected[1:]):
            problem = f"file name does not match its folder {unit.folder.as_posix()}"
            error = InputError(path, problem, f"start the name with {'_'.join(expected)}, or move the file")
            problems.append(Problem(unit.subject, str(error), path.name.split(".", 1)[0]))
            continue
        metadata = sidecars.fields_if_readable(PurePosixPath(path.relative_to(bids_dir)))
        units.append(replace(unit, sidecar=metadata))
    return units, problems


def _drop_ambiguous(units: list[ImageUnit]) -> tuple[list[ImageUnit], list[Problem]]:
    """Drop images with identical BIDS entities, since their outputs would overwrite each other."""
    by_key = defaultdict(list)
    for unit in units:
        by_key[unit.key].append(unit)
    problems = []
    for key, own in by_key.items():
        first, *others = sorted(own, key=lambda unit: unit.path)
        if others:
            names = truncate_list([unit.path.name for unit in others])
            remedy = "keep one of them, e.g. with --bids-filter-file"
            error = InputError(first.path, f"same BIDS entities as {names}", remedy)
            problems.append(Problem(first.subject, str(error), key))
    return [own[0] for own in by_key.values() if len(own) == 1], problems


def _drop_unusable(
    units: list[ImageUnit], modalities: Sequence[str], check: Callable[[ImageUnit], None] | None
) -> tuple[list[ImageUnit], list[Problem]]:
    """Drop images that do not pass the check; T1w images are checked even if they are not requested."""
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


def _find_lesions(
    config: RunConfig, units: Sequence[ImageUnit]
) -> tuple[dict[str, LesionMask], list[Problem]]:
    """Find the lesion mask of each image, by the key of the image."""
    lesions: dict[str, LesionMask] = {}
    problems: list[Problem] = []
    root = config.derivatives.get(LESIONS)
    if root is None:
        return lesions, problems
    for subject in dict.fromkeys(unit.subject for unit in units):
        own = [unit for unit in units if unit.subject == subject]
        masks, errors = resolve_masks(root, own, config.bids_dir, list(config.derivatives.values()))
        lesions |= masks
        problems += [Problem(subject, str(error)) for error in errors]
    return lesions, problems


def _invalid_label(bids_dir: Path, subject: str) -> Problem:
    """Report a participant whose label BIDS does not allow."""
    folder = bids_dir / f"sub-{subject}"
    error = InputError(
        folder, "BIDS allows letters and digits only in a label", "rename the folder and its files"
    )
    return Problem(subject, str(error))


def _no_image(subject: str, config: RunConfig, left_out: Mapping[Path, str]) -> Problem:
    """Report a participant without usable images, and the files that were left out."""
    message = f"sub-{subject}: no usable {truncate_list(config.modalities, last='or')} image"
    own = [
        f"{path.name} ({reason})"
        for path, reason in left_out.items()
        if path.relative_to(config.bids_dir).parts[0] == f"sub-{subject}"
    ]
    return Problem(subject, f"{message}; left out: {truncate_list(own, 3)}" if own else message)


def _left_out(
    layout: BIDSLayout, scope: Mapping[str, Any], used: set[Path], config: RunConfig
) -> dict[Path, str]:
    """List images of requested modalities that no filter excludes but that are not used, with the reason."""
    suffixes = [suffix for modality in config.modalities for suffix in SUFFIXES[modality]]
    reasons = {}
    for file in sorted(layout.get(**scope), key=lambda file: file.path):
        path = Path(file.path)
        if path not in used and _IMAGE_NAME.search(path.name):
            reasons[path] = _reason_left_out(file.get_entities(), suffixes)
    # pybids does not report folders.
    for subject in scope["subject"]:
        for session in scope.get("session", ["*"]):
            for pattern in ("anat/*.nii*", f"ses-{session}/anat/*.nii*"):
                for path in sorted((config.bids_dir / f"sub-{subject}").glob(pattern)):
                    if path.name.split(".", 1)[0].endswith(tuple(suffixes)) and path.is_dir():
                        reasons[path] = "a folder, not a file"
    return {path: reason for path, reason in reasons.items() if reason}


def _reason_left_out(entities: Mapping[str, Any], suffixes: Sequence[str]) -> str:
    """Return why an image is not used; empty if a filter excludes it or it has another suffix."""
    suffix = str(entities.get("suffix"))
    if suffix == "MP2RAGE" and "UNIT1" in suffixes:
        return "one inversion of MP2RAGE; its UNIT1 image is used"
    spelt = {name.lower(): name for name in suffixes}.get(suffix.lower())
    if spelt is None:
        return ""
    if suffix != spelt:
        return f"suffix {suffix}, which BIDS spells {spelt}"
    if entities.get("extension") not in EXTENSIONS:
        return "not a .nii or .nii.gz file; convert it, or rename it in lower case"
    if entities.get("part", "mag") != "mag":
        return f"part-{entities['part']}; only magnitude images are used"
    if "chunk" in entities:
        return "chunk-; a part of a scan"
    if "inv" in entities:
        return "inv-; one inversion of a sequence"
    return CONTRAST_ENHANCED if "ceagent" in entities else ""


def require_sessions(bids_dir: Path, subjects: Sequence[str], sessions: Sequence[str]) -> None:
    """Check that each requested session exists for at least one participant.

    Parameters
    ----------
    bids_dir : pathlib.Path
        Root of the raw dataset.
    subjects : sequence of str
        Labels of the requested participants, without `sub-`.
    sessions : sequence of str
        Labels of the requested sessions, without `ses-`.

    Raises
    ------
    InputError
        If a session does not exist.
    """
    missing = [
        session
        for session in sorted(sessions)
        if not any((bids_dir / f"sub-{subject}" / f"ses-{session}").is_dir() for subject in subjects)
    ]
    if missing:
        existing = sorted(
            {
                path.name.removeprefix("ses-")
                for subject in subjects
                for path in (bids_dir / f"sub-{subject}").glob("ses-*")
            }
        )
        raise InputError(
            bids_dir,
            f"no session {', '.join(missing)}",
            f"choose from {truncate_list(existing)}" if existing else "the dataset has no sessions",
        )


def find_modalities(config: RunConfig, subjects: Sequence[str]) -> list[str]:
    """Return which modalities the requested participants have, from file names only.

    Parameters
    ----------
    config : RunConfig
        `bids_dir`, `sessions` and `modalities` are used.
    subjects : sequence of str
        Labels without `sub-`.

    Returns
    -------
    list of str
        Those of `config.modalities` of which there is an image, in this order. The search ends when all are
        found.
    """
    found: set[str] = set()
    folders = [f"ses-{session}/anat" for session in config.sessions] or ["anat", "ses-*/anat"]
    for subject in subjects:
        for folder in folders:
            for path in (config.bids_dir / f"sub-{subject}").glob(f"{folder}/*.nii*"):
                suffix = path.name.split(".", 1)[0].rsplit("_", 1)[-1]
                found |= {modality for modality, suffixes in SUFFIXES.items() if suffix in suffixes}
        if found >= set(config.modalities):
            break
    return [modality for modality in config.modalities if modality in found]


def read_queries(path: Path | None) -> dict[str, dict[str, Any]]:
    """Merge a filter file into the default queries.

    Parameters
    ----------
    path : pathlib.Path, optional
        JSON file in which `t1w`, `t2w` and `flair` (in any case) map to entity filters. Null requires that
        the entity is absent, `"*"` that it is present with any value. Other keys are ignored, since a file
        may serve several apps.

    Returns
    -------
    dict of str to dict
        pybids query by modality.

    Raises
    ------
    ConfigError
        If the file is not JSON of this form.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path else {}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"--bids-filter-file {path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"--bids-filter-file {path} must hold an object with the keys 't1w', 't2w' and 'flair'"
        )
    filters = {name.lower(): value for name, value in content.items()}
    queries = {}
    for modality, default in _DEFAULTS.items():
        own = filters.get(modality.lower(), {})
        if not isinstance(own, dict):
            raise ConfigError(f"--bids-filter-file {path}: '{modality.lower()}' must be an object")
        query = _translate({**default, **own})
        suffixes = listify(query.get("suffix"))
        if not suffixes or any(suffix not in SUFFIXES[modality] for suffix in suffixes):
            raise ConfigError(
                f"--bids-filter-file {path}: '{modality.lower()}' must keep the suffix "
                f"{' or '.join(SUFFIXES[modality])}"
            )
        queries[modality] = query
    return queries


def _translate(filters: dict[str, Any]) -> dict[str, Any]:
    """Replace null and `"*"`, alone or in a list, by the constants of pybids."""
    constants = {None: Query.NONE, "*": Query.ANY}

    def translated(value: Any) -> Any:
        if isinstance(value, list):
            return [translated(item) for item in value]
        return constants.get(value, value) if value is None or isinstance(value, str) else value

    return {name: translated(value) for name, value in filters.items()}
