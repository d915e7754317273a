"""Matching of lesion masks to images, and the route of each mask to the SRI24 grid."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bids_uad.config import MODALITIES
from bids_uad.dataset.describe import is_own
from bids_uad.dataset.naming import IDENTIFYING_KEYS, ImageUnit, entities_of, lesion_output
from bids_uad.errors import InputError
from bids_uad.files import read_json
from bids_uad.images import Grid, grid_of, same_grid
from bids_uad.preprocessing.check import read_lesion
from bids_uad.space import AFFINE, NAME, SHAPE

LOGGER = logging.getLogger("bids_uad")

TRANSFORM_SUFFIXES = (".h5", ".txt", ".mat")
"""Extensions of ITK transforms; composite ones, such as the nonlinear ones of fMRIPrep, are `.h5`."""

_MASK_NAME = re.compile(
    r"_(?:label-lesion(?:_desc-[0-9a-zA-Z]+)?_(?:mask|roi)|seg-lesion(?:_desc-[0-9a-zA-Z]+)?_mask)\.nii(\.gz)?$"
)
_WRITTEN = f"*_space-{NAME}_label-lesion_desc-manual_mask.nii.gz"
_DESC_RANK = {None: 0, "manual": 1}
_INDICES = ("run", "echo")
_MODALITIES = {"T1w": "T1w", "T2w": "T2w", "UNIT1": "T1w", "FLAIR": "FLAIR"}
"""Modality of the images in which anomalies are detected, by suffix."""
_ATLAS: Grid = (SHAPE, AFFINE)

Session = str | None


@dataclass(frozen=True)
class LesionMask:
    """Lesion mask and its route to the SRI24 grid.

    Parameters
    ----------
    path : pathlib.Path
        Mask file.
    provider : str
        Key of the image whose workflow resamples the mask to SRI24; one of the images of the mask.
    output : pathlib.Path
        Path of the mask on the SRI24 grid, relative to the output dataset. Its name has the entities of the
        input mask, so that :func:`written_mask` finds it for the same images.
    is_empty : bool, default=False
        Whether the mask has no lesion voxel.
    on_atlas : bool, default=False
        Whether the mask is on the SRI24 grid.
    on_external : bool, default=False
        Whether the mask is on the grid of an external derivative of the image instead of the raw image.
    other : pathlib.Path, optional
        Image on whose grid the mask is, if that is not an image of the run, such as a PDw. It is registered
        to the provider.
    transform : pathlib.Path, optional
        ITK transform, linear or not, that resamples the space of the mask to the provider.
    """

    path: Path
    provider: str
    output: Path
    is_empty: bool = False
    on_atlas: bool = False
    on_external: bool = False
    other: Path | None = None
    transform: Path | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """The mask, and the files on which its position on the SRI24 grid depends."""
        return tuple(path for path in (self.path, self.other, self.transform) if path is not None)


def identifying_entities(path: Path) -> dict[str, str]:
    """Return the entities of a file name that identify an image of a participant (session, run and so on).

    Parameters
    ----------
    path : pathlib.Path
        File with a BIDS name.

    Returns
    -------
    dict of str to str
        Entities by key (`ses`, `run`); indices without leading zeros, since `run-1` and `run-01` are equal in
        BIDS.
    """
    entities = {key: value for key, value in entities_of(path).items() if key in IDENTIFYING_KEYS}
    return {key: value.lstrip("0") or "0" if key in _INDICES else value for key, value in entities.items()}


def belongs_to(mask: Path, image: Path) -> bool:
    """Return whether a mask matches an image by name.

    Parameters
    ----------
    mask : pathlib.Path
        Lesion mask.
    image : pathlib.Path
        Raw or preprocessed image.

    Returns
    -------
    bool
        True if the image has all identifying entities of the mask, with the same values. A mask with `run-2`
        matches neither an image of another run nor an image without a run.
    """
    return identifying_entities(mask).items() <= identifying_entities(image).items()


def applicable_masks(masks: Iterable[Path], image: Path) -> list[list[Path]]:
    """Group the masks that match an image by name, best match first.

    All levels and reports find the lesion mask of an image by this rule.

    Parameters
    ----------
    masks : iterable of pathlib.Path
        Lesion masks in order of preference.
    image : pathlib.Path
        Raw or preprocessed image.

    Returns
    -------
    list of list of pathlib.Path
        Groups of masks with the same entities; the group with most entities of the image is first.
    """
    groups = defaultdict(list)
    for mask in masks:
        if belongs_to(mask, image):
            groups[tuple(sorted(identifying_entities(mask).items()))].append(mask)
    return [groups[named] for named in sorted(groups, key=lambda named: (-len(named), named))]


def written_mask(image: Path) -> Path | None:
    """Find the lesion mask of a preprocessed image in the outputs of the participant level.

    Parameters
    ----------
    image : pathlib.Path
        Any output of the image in SRI24 space; only its folder and name are used.

    Returns
    -------
    pathlib.Path or None
        Lesion mask on the SRI24 grid; None without a mask of this image.
    """
    groups = applicable_masks(sorted(image.parent.glob(_WRITTEN)), image)
    return groups[0][0] if groups else None


def find_masks(root: Path, subject: str) -> list[Path]:
    """List the lesion masks of a participant in a derivative dataset.

    Parameters
    ----------
    root : pathlib.Path
        Root of the derivative dataset.
    subject : str
        Participant label without `sub-`.

    Returns
    -------
    list of pathlib.Path
        Files `*_label-lesion_mask`, `*_label-lesion_roi` or `*_seg-lesion_mask`; masks without `desc-` first,
        those with `desc-manual` second, then by name.
    """
    masks = [
        path
        for path in (root / f"sub-{subject}").rglob("*.nii*")
        if _MASK_NAME.search(path.name) and entities_of(path).get("sub") == subject
    ]
    return sorted(masks, key=lambda path: (_DESC_RANK.get(entities_of(path).get("desc"), 2), path.name))


def find_transforms(roots: Iterable[Path], image: Path, modality: str) -> dict[str, Path]:
    """Find transforms from other spaces to an image in derivative datasets.

    Parameters
    ----------
    roots : iterable of pathlib.Path
        Derivative datasets, in order of preference.
    image : pathlib.Path
        Raw image.
    modality : {"T1w", "T2w", "FLAIR"}
        Modality of the image.

    Returns
    -------
    dict of str to pathlib.Path
        Files ``from-<space>_to-<modality>_mode-image_xfm`` whose entities match the image, by space. Of
        several, composite transforms (`.h5`) are preferred to others, then those of other pipelines to the
        affine ones of bids_uad, then those with most entities of the image.

    Raises
    ------
    UserError
        If the dataset_description.json of a dataset is not valid or cannot be read.
    """
    ranked = []
    for number, root in enumerate(dict.fromkeys(roots)):
        folder = root / f"sub-{entities_of(image).get('sub')}"
        paths = [
            path
            for path in folder.rglob(f"*_to-{modality}_mode-image_xfm.*")
            if "from" in entities_of(path) and path.suffix in TRANSFORM_SUFFIXES and belongs_to(path, image)
        ]
        own = bool(paths) and is_own(read_json(root / "dataset_description.json"))
        for path in paths:
            n_entities = len(identifying_entities(path))
            ranked.append((path.suffix != ".h5", own, -n_entities, number, path.name, path))
    # The first of each space is inserted last.
    return {entities_of(path)["from"]: path for *_, path in sorted(ranked, reverse=True)}


def resolve_masks(
    root: Path, units: Sequence[ImageUnit], bids_dir: Path, roots: Sequence[Path]
) -> tuple[dict[str, LesionMask], list[InputError]]:
    """Find the lesion mask of each image of a participant.

    Masks are matched by name first. A mask belongs to the images that have all of its entities, and an image
    uses the matching mask with most entities. A mask without a session belongs to the session whose grids
    match. A mask with an entity that no T1w or T2w image has was drawn on another image, such as a FLAIR; it
    is used for the images of its session without a mask of their own. The grid of the mask is identified
    second: that of an image of the run, SRI24 space, a space with a transform to an image, or any other image
    of the session.

    Parameters
    ----------
    root : pathlib.Path
        Dataset of the lesion masks.
    units : sequence of ImageUnit
        Images of one participant, anchors first.
    bids_dir : pathlib.Path
        Root of the raw dataset, which may have sessions of the participant that are not part of the run.
    roots : sequence of pathlib.Path
        Derivative datasets to search for transforms from other spaces.

    Returns
    -------
    masks : dict of str to LesionMask
        Masks by the key of the image, for images with a mask.
    problems : list of InputError
        One error for each mask that cannot be used.
    """
    subject = units[0].subject
    raw = _raw_images(bids_dir / f"sub-{subject}")
    problems: list[InputError] = []
    by_session: dict[Session, list[Path]] = {unit.session: [] for unit in units}
    without_session = []
    for mask in find_masks(root, subject):
        try:
            session = _session_of(mask, root)
            if session is None and set(raw) - {None}:
                without_session.append(mask)
            elif session not in {*raw, *by_session}:
                raise _no_matching_image(mask)
            elif session in by_session:
                grid_of(mask)  # raises if it is no image
                by_session[session].append(mask)
        except InputError as error:
            problems.append(error)
    if any(not applicable_masks(by_session[unit.session], unit.path) for unit in units):
        for mask, session in _match_sessions(without_session, units, raw, roots, problems):
            by_session.get(session, []).append(mask)
    resolved: dict[str, LesionMask] = {}
    for session, masks in by_session.items():
        own = [unit for unit in units if unit.session == session]
        resolved |= _resolve_session(masks, own, raw.get(session, []), roots, problems)
    return resolved, problems


def _raw_images(folder: Path) -> dict[Session, list[Path]]:
    """List the anatomical images in the raw folder of a participant by session (None: without a session)."""
    folders = {None: folder / "anat"}
    folders |= {path.name.removeprefix("ses-"): path / "anat" for path in sorted(folder.glob("ses-*"))}
    images = {session: sorted(anat.glob("sub-*.nii*")) for session, anat in folders.items()}
    return {session: paths for session, paths in images.items() if paths}


def _session_of(mask: Path, root: Path) -> Session:
    """Return the session of a mask by its name, else by its folder."""
    by_name = entities_of(mask).get("ses")
    parts = mask.relative_to(root).parent.parts
    by_folder = next((part.removeprefix("ses-") for part in parts if part.startswith("ses-")), None)
    if None not in (by_name, by_folder) and by_name != by_folder:
        problem = f"lesion mask of ses-{by_name} in the folder of ses-{by_folder}"
        raise InputError(mask, problem, "move or rename it")
    return by_name or by_folder


def _no_matching_image(mask: Path) -> InputError:
    """Return the error for a mask whose entities no image of the participant has."""
    names = [f"{key}-{value}" for key, value in identifying_entities(mask).items() if key != "sub"]
    problem = f"no image of the participant has {', '.join(names)} of this lesion mask"
    return InputError(mask, problem, "rename the mask after the image it was drawn on")


def _modality_of(image: Path) -> str:
    """Return the modality of an image; its suffix if it has none of `_MODALITIES`."""
    suffix = image.name.split(".", 1)[0].rsplit("_", 1)[-1]
    return _MODALITIES.get(suffix, suffix)


def _has_own_masks(image: Path) -> bool:
    """Return whether a mask that was drawn on this image is not used for others: a T1w or T2w without `ce-`.

    A FLAIR, or an image with contrast agent, is the image on which lesions of a session are usually drawn.
    """
    return _modality_of(image) in ("T1w", "T2w") and "ce" not in entities_of(image)


def _is_on(grid: Grid, image: Path) -> bool:
    """Return whether an image has this grid; False if it cannot be read."""
    try:
        return same_grid(grid, grid_of(image))
    except InputError:
        return False


def _match_sessions(
    masks: Sequence[Path],
    units: Sequence[ImageUnit],
    raw: Mapping[Session, Sequence[Path]],
    roots: Sequence[Path],
    problems: list[InputError],
) -> list[tuple[Path, Session]]:
    """Match masks without a session to the only session, in the run or not, that has their grid."""
    matched, unmatched = [], []
    for mask in masks:
        try:
            grid = grid_of(mask)
            candidates = [session for session, images in raw.items() if _matches(mask, grid, images, roots)]
            external = [unit for unit in units if unit.image != unit.path and belongs_to(mask, unit.path)]
            candidates += [unit.session for unit in external if _is_on(grid, unit.image)]
            candidates = list(dict.fromkeys(candidates))
            if len(candidates) == 1:
                matched.append((mask, candidates[0]))
                continue
            sessions = [f"ses-{session}" if session else "images without a session" for session in candidates]
            problem = "lesion mask without a session on the grid of none of the participant's images"
            if sessions:
                problem = f"lesion mask without a session that matches {', '.join(sessions[:-1])}"
                problem += f" and {sessions[-1]}"
            error = InputError(mask, problem, "add the session it was drawn in to its name (ses-<label>)")
            (problems if sessions else unmatched).append(error)
        except InputError as error:
            problems.append(error)
    problems += [] if matched else unmatched
    return matched


def _matches(mask: Path, grid: Grid, images: Sequence[Path], roots: Sequence[Path]) -> bool:
    """Return whether a mask is on the grid of one of these raw images, or can be resampled to it."""
    space = entities_of(mask).get("space")
    for image in images:
        modality = _modality_of(image)
        if not belongs_to(mask, image):
            continue
        if space == NAME and same_grid(grid, _ATLAS):
            return True
        if space in (None, "orig", modality) and _is_on(grid, image):
            return True
        if modality in _MODALITIES and space in find_transforms(roots, image, modality):
            return True
    return False


def _resolve_session(
    masks: Sequence[Path],
    units: Sequence[ImageUnit],
    raw: Sequence[Path],
    roots: Sequence[Path],
    problems: list[InputError],
) -> dict[str, LesionMask]:
    """Assign the masks of a session to its images; see :func:`resolve_masks`."""
    matching, of_others = [], []
    for mask in masks:
        owners = [unit.path for unit in units if belongs_to(mask, unit.path)]
        if owners:
            matching.append(mask)
            if not any(map(_has_own_masks, owners)):
                of_others.append(mask)
            continue
        others = [image for image in raw if belongs_to(mask, image)]
        if not others:
            problems.append(_no_matching_image(mask))
        elif not any(map(_has_own_masks, others)):
            of_others.append(mask)
    rejected: set[Path] = set()
    while True:
        users_of: dict[tuple[Path, ...], list[ImageUnit]] = defaultdict(list)
        for unit in units:
            groups = applicable_masks([mask for mask in matching if mask not in rejected], unit.path)
            fallback = [mask for mask in of_others if mask not in rejected]
            users_of[tuple(groups[0] if groups else fallback)].append(unit)
        users_of.pop((), None)
        resolved, invalid = {}, set()
        for candidates, users in users_of.items():
            at_fault = candidates
            try:
                lesion = _locate(candidates, users, raw, roots)
                at_fault = (lesion.path,)
                lesion = replace(lesion, is_empty=not read_lesion(lesion.path)[0].any())
            except InputError as error:
                problems.append(error)
                invalid.update(at_fault)
                continue
            resolved |= {user.key: lesion for user in users}
        if not invalid:
            return resolved
        # Images with a rejected mask may have another mask with fewer entities.
        rejected |= invalid


def _locate(
    masks: Sequence[Path], users: Sequence[ImageUnit], raw: Sequence[Path], roots: Sequence[Path]
) -> LesionMask:
    """Choose the first mask on a known grid, and its route to SRI24.

    Parameters
    ----------
    masks : sequence of pathlib.Path
        Masks with the same entities, in order of preference.
    users : sequence of ImageUnit
        Images of these masks.
    raw : sequence of pathlib.Path
        All raw images of the session.
    roots : sequence of pathlib.Path
        Derivative datasets to search for transforms from other spaces.

    Returns
    -------
    LesionMask
        The mask, without a check of its voxels.

    Raises
    ------
    InputError
        If none of the masks is on a known grid.
    """
    grids = {path: grid_of(path) for path in masks}
    spaces = {path: entities_of(path).get("space") for path in masks}
    users = sorted(users, key=lambda unit: MODALITIES.index(unit.modality))

    def located(path: Path, unit: ImageUnit = users[0], **route: Any) -> LesionMask:
        shared = {
            name: value
            for key, name in IDENTIFYING_KEYS.items()
            if key in (*identifying_entities(path), "ses")
            and (value := unit.entities.get(name)) is not None
            and all(user.entities.get(name) == value for user in users)
        }
        return LesionMask(path, unit.key, lesion_output(shared), **route)

    for unit in users:
        for image in dict.fromkeys([unit.path, unit.image]):
            for path in masks:
                if spaces[path] in (None, "orig", unit.modality) and _is_on(grids[path], image):
                    return located(path, unit, on_external=image != unit.path)
    for path in masks:
        if spaces[path] == NAME and same_grid(grids[path], _ATLAS):
            return located(path, on_atlas=True)
    # Searched last, since folders of other pipelines may be large and most masks are on a known grid.
    for unit in users:
        transforms = find_transforms(roots, unit.path, unit.modality)
        for path in masks:
            transform = transforms.get(spaces[path] or "")
            if transform is not None:
                kind = "composite" if transform.suffix == ".h5" else "linear"
                LOGGER.info("%s: resampled to %s with the %s transform %s", path, unit.key, kind, transform)
                return located(path, unit, on_external=_same_tree(transform, unit), transform=transform)
    of_users = {unit.path.name for unit in users}
    for path in masks:
        matching = [image for image in raw if belongs_to(path, image) and image.name not in of_users]
        # The grid of a T1w of another run is not used for a mask of a run.
        remaining = [image for image in raw if not belongs_to(path, image) and not _has_own_masks(image)]
        for other in (*matching, *remaining):
            if _is_on(grids[path], other):
                return located(path, other=other)
    others = ", ".join(path.name for path in masks[1:])
    raise InputError(
        masks[0],
        "lesion mask on the grid of none of the images it matches, and no transform from its space"
        + (f" (likewise {others})" if others else ""),
        "resample it to the T1w with nearest-neighbour interpolation",
    )


def _same_tree(transform: Path, unit: ImageUnit) -> bool:
    """Return whether a transform is to the external derivative of an image."""
    return unit.external.image is not None and transform.is_relative_to(unit.external.root)
