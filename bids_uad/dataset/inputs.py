"""What is read: the T1w and T2w images of a BIDS dataset, each with its anchor and its ground truth."""

from __future__ import annotations

import json
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any

from bids.layout import BIDSLayout, BIDSLayoutIndexer, Query
from bids.utils import listify

from bids_uad.config import RunConfig
from bids_uad.dataset.demographics import read_object
from bids_uad.dataset.external import LESIONS, attach_external_inputs
from bids_uad.dataset.lesion_masks import LesionMask, resolve_masks
from bids_uad.dataset.naming import PREFIX_ENTITIES, ImageUnit, Problem
from bids_uad.errors import ConfigError, InputError, truncate_list

LOGGER = logging.getLogger("bids_uad")


class SidecarReader:
    """Read the metadata of the images of one dataset; files that several images share are read once.

    Parameters
    ----------
    root : pathlib.Path
        The dataset.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._read = cache(read_object)
        self._listed = cache(lambda folder: sorted(folder.glob("*.json")))

    def files(self, image: PurePosixPath) -> list[Path]:
        """List the sidecars that apply to an image, the most specific last.

        Parameters
        ----------
        image : pathlib.PurePosixPath
            Relative to the dataset.

        Returns
        -------
        list of pathlib.Path
            JSON files of the same suffix in the folders above the image, whose names hold entities of the
            image only: those of outer folders first, and in one folder those with fewer entities.
        """
        entities, suffix = _split(image.name)
        found = []
        for folder in reversed(image.parents):
            own = [
                (len(named), path)
                for path in self._listed(self._root / folder)
                for named, kind in [_split(path.name)]
                if kind == suffix and named <= entities
            ]
            found += [path for _, path in sorted(own)]
        return found

    def fields(self, image: PurePosixPath) -> dict[str, Any]:
        """Merge the sidecars of an image; where two have the same field, the more specific file counts.

        Parameters
        ----------
        image : pathlib.PurePosixPath
            Relative to the dataset.

        Returns
        -------
        dict
            Empty without a sidecar.

        Raises
        ------
        InputError
            If one of the files cannot be read or is not a JSON object.
        """
        fields: dict[str, Any] = {}
        for path in self.files(image):
            fields |= self._read(path)
        return fields

    def fields_if_readable(self, image: PurePosixPath) -> dict[str, Any]:
        """Merge the sidecars of an image as :meth:`fields` does; log a warning if one cannot be read.

        Parameters
        ----------
        image : pathlib.PurePosixPath
            Relative to the dataset.

        Returns
        -------
        dict
            Empty if one of the sidecars cannot be read.
        """
        try:
            return self.fields(image)
        except InputError as error:
            LOGGER.warning("%s. The metadata of %s are not used", error, image.name)
            return {}


def _split(name: str) -> tuple[frozenset[str], str]:
    """Split a file name into its entities and its suffix."""
    *entities, suffix = name.split(".", 1)[0].split("_")
    return frozenset(entities), suffix


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
"""Names of images, in formats that BIDS allows or does not."""

CONTRAST_ENHANCED = "contrast-enhanced; a --bids-filter-file can ask for them"
"""Why images with `ce-` are left out."""


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
    left_out : dict of pathlib.Path to str
        T1w and T2w images (or files that pass for one) that are not used, and why.
    anchors_only : frozenset of str
        Keys of the units of sessions that were not asked for. T2w images of other sessions are registered to
        them; nothing is written about them.
    """

    subjects: tuple[str, ...]
    units: tuple[ImageUnit, ...]
    lesions: dict[str, LesionMask] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    left_out: dict[Path, str] = field(default_factory=dict)
    anchors_only: frozenset[str] = frozenset()


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
    labelled = [subject for subject in subjects if _LABEL.fullmatch(subject)]
    layout = open_layout(config.bids_dir, labelled)
    _check_sessions(layout, config)
    scope: dict[str, Any] = {"subject": labelled, "datatype": "anat"}
    if config.sessions:
        scope["session"] = list(config.sessions)

    found = [
        (file, modality)
        for modality, query in queries.items()
        for file in (_query(layout, {**query, **scope}, config) if labelled else [])
    ]
    problems = [_misnamed_folder(config.bids_dir, subject) for subject in subjects if subject not in labelled]
    raw, misnamed = _make_units(found, config.bids_dir)
    raw, ambiguous = _drop_ambiguous(raw)
    raw, unusable = _refuse_unusable(raw, config.modalities, check)
    elsewhere = _anchors_elsewhere(layout, queries["T1w"], raw, config, check)
    anchored = set_anchors([*raw, *elsewhere], config.modalities)
    used = {unit.anchor.key for unit in anchored if unit.anchor is not None}
    anchors_only = frozenset(unit.key for unit in elsewhere) & used
    anchored = [unit for unit in anchored if unit not in elsewhere or unit.key in used]
    units, unfitting = attach_external_inputs(anchored, config.derivatives)
    lesions, refused = _attach_lesions(config, [unit for unit in units if unit.key not in anchors_only])
    problems += [*misnamed, *ambiguous, *unusable, *unfitting, *refused]
    left_out = _left_out(layout, scope, {Path(file.path) for file, _ in found}, config) if labelled else {}
    for subject in subjects:
        if not any(item.subject == subject for item in (*units, *problems)):
            problems.append(_no_image(subject, config, left_out))
    return Collection(subjects, tuple(units), lesions, tuple(problems), left_out, anchors_only)


def _anchors_elsewhere(
    layout: BIDSLayout,
    query: dict[str, Any],
    units: Sequence[ImageUnit],
    config: RunConfig,
    check: Callable[[ImageUnit], None] | None,
) -> list[ImageUnit]:
    """Find the T1w images of sessions that were not asked for, for T2w images of sessions without one.

    A job for one session registers a T2w image to the same T1w image as a run on the whole participant does.
    """
    with_t1w = {(unit.subject, unit.session) for unit in units if unit.modality == "T1w"}
    alone = {
        unit.subject
        for unit in units
        if unit.modality == "T2w" and (unit.subject, unit.session) not in with_t1w
    }
    if not config.sessions or "T2w" not in config.modalities or not alone:
        return []
    files = _query(layout, {**query, "subject": sorted(alone)}, config)
    found, _ = _make_units([(file, "T1w") for file in files], config.bids_dir)
    found, _ = _drop_ambiguous([unit for unit in found if unit.session not in config.sessions])
    # What is wrong with the others is for the runs on their sessions to report.
    return _refuse_unusable(found, ("T1w",), check)[0]


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
        raise InputError(
            bids_dir, f"has no participant {', '.join(missing)}", f"it has {truncate_list(existing)}"
        )
    return tuple(label for label in existing if not labels or label in labels)


def open_layout(bids_dir: Path, subjects: Sequence[str]) -> BIDSLayout:
    """Index the anatomical images of some participants of a raw dataset, and nothing else.

    Indexing everything is what makes BIDS apps slow to start on large datasets. Metadata are not indexed: one
    broken sidecar would end the run, see :class:`bids_uad.dataset.inputs.SidecarReader`. Entities are
    read from the path below the root: pybids reads them from the whole path, where a folder above, such as
    ``sub-02``, would give its label to every image.

    Parameters
    ----------
    bids_dir : pathlib.Path
    subjects : sequence of str
        Labels without `sub-`.

    Returns
    -------
    bids.layout.BIDSLayout
    """
    config = json.loads((resources.files("bids.layout.config") / "bids.json").read_text(encoding="utf-8"))
    below_root = f"^{re.escape(str(bids_dir.absolute()))}(?=/).*?"
    for entity in config["entities"]:
        entity["pattern"] = below_root + entity["pattern"]
    keep = "|".join(map(re.escape, subjects))
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
    return BIDSLayout(bids_dir, validate=False, derivatives=False, config=[config], indexer=indexer)


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
    """Sort key of a participant's images: by session; plain images first, T1w before UNIT1; by run."""
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
    """Ask pybids; a session in the filter file and one on the command line must both hold."""
    try:
        return layout.get(**query)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"--bids-filter-file {config.filter_file}: {error}") from error


def _make_units(found: Sequence[tuple[Any, str]], bids_dir: Path) -> tuple[list[ImageUnit], list[Problem]]:
    """Make units of pybids files, each with its modality; refuse those whose name and folder disagree."""
    sidecars = SidecarReader(bids_dir)
    units, problems = [], []
    for file, modality in found:
        entities = file.get_entities()
        own = {name: str(entities[name]) for name, _ in PREFIX_ENTITIES if name in entities}
        path = Path(file.path)
        unit = ImageUnit(path, own["subject"], own.get("session"), modality, own)
        expected = [f"sub-{unit.subject}"] + ([f"ses-{unit.session}"] if unit.session else [])
        named = [part for part in path.name.split("_") if part.startswith(("sub-", "ses-"))]
        if named[:1] != expected[:1] or named[1:] not in ([], expected[1:]):
            problem = f"the name of the image does not agree with its folder {unit.folder.as_posix()}"
            error = InputError(path, problem, f"let it start with {'_'.join(expected)}, or move it")
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


def _misnamed_folder(bids_dir: Path, subject: str) -> Problem:
    """Refuse a participant whose label BIDS does not allow."""
    folder = bids_dir / f"sub-{subject}"
    error = InputError(
        folder, "a participant label holds letters and digits only", "rename the folder and its files"
    )
    return Problem(subject, str(error))


def _no_image(subject: str, config: RunConfig, left_out: Mapping[Path, str]) -> Problem:
    """Report a participant without images, and which files were left out."""
    message = f"sub-{subject}: no {' or '.join(config.modalities)} image to work on"
    own = [
        f"{path.name} ({reason})"
        for path, reason in left_out.items()
        if path.relative_to(config.bids_dir).parts[0] == f"sub-{subject}"
    ]
    return Problem(subject, f"{message}; left out: {truncate_list(own, 3)}" if own else message)


def _left_out(
    layout: BIDSLayout, scope: Mapping[str, Any], used: set[Path], config: RunConfig
) -> dict[Path, str]:
    """List the T1w and T2w images that are not used although no filter excludes them, and why."""
    suffixes = [suffix for modality in config.modalities for suffix in SUFFIXES[modality]]
    found = {}
    for file in sorted(layout.get(**scope), key=lambda file: file.path):
        path = Path(file.path)
        if path not in used and _IMAGE_NAME.search(path.name):
            found[path] = _why_left_out(file.get_entities(), suffixes)
    # pybids does not report folders.
    for subject in scope["subject"]:
        for session in scope.get("session", ["*"]):
            for pattern in ("anat/*.nii*", f"ses-{session}/anat/*.nii*"):
                for path in sorted((config.bids_dir / f"sub-{subject}").glob(pattern)):
                    if path.name.split(".", 1)[0].endswith(tuple(suffixes)) and path.is_dir():
                        found[path] = "a folder, not a file"
    return {path: reason for path, reason in found.items() if reason}


def _why_left_out(entities: Mapping[str, Any], suffixes: Sequence[str]) -> str:
    """Say why an image is not used; empty if a filter excludes it or it is neither T1w nor T2w."""
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


def _check_sessions(layout: BIDSLayout, config: RunConfig) -> None:
    """Refuse sessions that no participant has."""
    existing = sorted(layout.get_sessions())
    missing = sorted(set(config.sessions) - set(existing))
    if missing:
        raise InputError(
            config.bids_dir,
            f"has no session {', '.join(missing)}",
            f"it has {truncate_list(existing)}" if existing else "it has no sessions",
        )


EXTENSIONS = [".nii.gz", ".nii"]

SUFFIXES = {"T1w": ["T1w", "UNIT1"], "T2w": ["T2w"]}
"""Suffixes of the images of each modality; UNIT1 is the T1-weighted image of MP2RAGE."""

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


def default_queries() -> dict[str, dict[str, Any]]:
    """Give the query of each modality.

    Contrast-enhanced (`ce-`) images are left out: the models have learnt plain T1w and T2w images, and a
    vessel that shines with gadolinium is no anomaly. So are phase, real and imaginary images (`part-`),
    parts of a scan (`chunk-`) and single inversions of MP2RAGE (`inv-`).
    """
    return {modality: translate(query) for modality, query in _DEFAULTS.items()}


def read_queries(path: Path | None) -> dict[str, dict[str, Any]]:
    """Merge a filter file into the default queries.

    Parameters
    ----------
    path : pathlib.Path, optional
        JSON: `t1w` and `t2w` (any case) map to entity filters. Null means that the entity must be
        absent, `"*"` that it must be there with any value. Other keys belong to other apps and are
        ignored.

    Returns
    -------
    dict of str to dict
        pybids query by modality.

    Raises
    ------
    ConfigError
        If the file is not JSON of that form.
    """
    if path is None:
        return default_queries()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"--bids-filter-file {path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--bids-filter-file {path} must hold an object with the keys 't1w' and 't2w'")
    by_name = {name.lower(): filters for name, filters in content.items()}
    queries = {}
    for modality, default in _DEFAULTS.items():
        own = by_name.get(modality.lower(), {})
        if not isinstance(own, dict):
            raise ConfigError(f"--bids-filter-file {path}: '{modality.lower()}' must be an object")
        query = translate({**default, **own})
        suffixes = listify(query.get("suffix"))
        if not suffixes or any(suffix not in SUFFIXES[modality] for suffix in suffixes):
            raise ConfigError(
                f"--bids-filter-file {path}: '{modality.lower()}' must keep the suffix "
                f"{' or '.join(SUFFIXES[modality])}"
            )
        queries[modality] = query
    return queries


def translate(filters: dict[str, Any]) -> dict[str, Any]:
    """Turn null and `"*"`, alone or in a list, into pybids' query marks."""
    marks = {None: Query.NONE, "*": Query.ANY}

    def translated(value: Any) -> Any:
        if isinstance(value, list):
            return [translated(item) for item in value]
        return marks.get(value, value) if value is None or isinstance(value, str) else value

    return {name: translated(value) for name, value in filters.items()}
