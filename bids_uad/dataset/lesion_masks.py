"""Lesion masks: which mask belongs to which image, and how it comes to the SRI24 grid."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bids_uad.dataset.naming import IDENTIFYING_KEYS, ImageUnit, entities_of, lesion_output
from bids_uad.errors import InputError
from bids_uad.images import Grid, grid_of, same_grid
from bids_uad.preprocessing.check import read_lesion
from bids_uad.space import AFFINE, NAME, SHAPE

TRANSFORM_SUFFIXES = (".txt", ".h5", ".mat")

_MASK_NAME = re.compile(
    r"_(?:label-lesion(?:_desc-[0-9a-zA-Z]+)?_(?:mask|roi)|seg-lesion(?:_desc-[0-9a-zA-Z]+)?_mask)\.nii(\.gz)?$"
)
_WRITTEN = f"*_space-{NAME}_label-lesion_desc-manual_mask.nii.gz"
_DESC_RANK = {None: 0, "manual": 1}
_INDICES = ("run", "echo")
_MODALITIES = {"T1w": "T1w", "T2w": "T2w", "UNIT1": "T1w"}
"""Modality of the images that anomalies are looked for in, by suffix."""
_ATLAS: Grid = (SHAPE, AFFINE)

Session = str | None


@dataclass(frozen=True)
class LesionMask:
    """A lesion mask and how it is brought to the SRI24 grid.

    Parameters
    ----------
    path : pathlib.Path
        The file.
    provider : str
        Key of the image whose workflow brings the mask to SRI24, one of those that the mask belongs to.
    output : pathlib.Path
        The mask on the SRI24 grid, relative to the output dataset. It is named after the entities that the
        mask names, so that :func:`written_mask` finds it for the same images.
    is_empty : bool
        Whether no voxel is lesion.
    on_atlas : bool, default=False
        Whether the mask is on the SRI24 grid already.
    on_prepared : bool, default=False
        Whether the mask is on the grid of another pipeline's version of the image, not of the raw image.
    other : pathlib.Path, optional
        Image on whose grid the mask is, where that is none of the run's images, such as a FLAIR. It is
        registered to the provider.
    transform : pathlib.Path, optional
        ITK transform, linear or not, that resamples the space of the mask to the provider.
    """

    path: Path
    provider: str
    output: Path
    is_empty: bool = False
    on_atlas: bool = False
    on_prepared: bool = False
    other: Path | None = None
    transform: Path | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """The mask, and the files that its position on the SRI24 grid depends on."""
        return tuple(path for path in (self.path, self.other, self.transform) if path is not None)


def identifying_entities(path: Path) -> dict[str, str]:
    """Read the entities of a file name that tell images of a participant apart (session, run and so on).

    Parameters
    ----------
    path : pathlib.Path

    Returns
    -------
    dict of str to str
        By key (`ses`, `run`); indices without leading zeros, since BIDS reads `run-1` and `run-01` alike.
    """
    found = {key: value for key, value in entities_of(path).items() if key in IDENTIFYING_KEYS}
    return {key: value.lstrip("0") or "0" if key in _INDICES else value for key, value in found.items()}


def belongs_to(mask: Path, image: Path) -> bool:
    """Check by the names alone whether a mask may belong to an image.

    Parameters
    ----------
    mask, image : pathlib.Path

    Returns
    -------
    bool
        True if the image has every identifying entity that the mask names, with the same value. A mask that
        names `run-2` belongs neither to an image of another run nor to one without a run.
    """
    return identifying_entities(mask).items() <= identifying_entities(image).items()


def applicable_masks(masks: Iterable[Path], image: Path) -> list[list[Path]]:
    """List the masks that may belong to an image by their names.

    This is the rule by which all levels and reports find the lesion mask of an image.

    Parameters
    ----------
    masks : iterable of pathlib.Path
        In order of preference.
    image : pathlib.Path
        Raw or preprocessed.

    Returns
    -------
    list of list of pathlib.Path
        Masks that name the same entities in one list; those that name most of the image's entities first.
    """
    groups = defaultdict(list)
    for mask in masks:
        if belongs_to(mask, image):
            groups[tuple(sorted(identifying_entities(mask).items()))].append(mask)
    return [groups[named] for named in sorted(groups, key=lambda named: (-len(named), named))]


def written_mask(image: Path) -> Path | None:
    """Find the lesion mask of a preprocessed image in our own outputs.

    Parameters
    ----------
    image : pathlib.Path
        An output for the image in SRI24 space; only its folder and name are used.

    Returns
    -------
    pathlib.Path or None
        None if there is no mask for this image.
    """
    groups = applicable_masks(sorted(image.parent.glob(_WRITTEN)), image)
    return groups[0][0] if groups else None


def find_masks(root: Path, subject: str) -> list[Path]:
    """List the lesion masks of a participant in a derivative dataset.

    Parameters
    ----------
    root : pathlib.Path
        The derivative dataset.
    subject : str
        Label without `sub-`.

    Returns
    -------
    list of pathlib.Path
        `*_label-lesion_mask`, `*_label-lesion_roi` or `*_seg-lesion_mask`; masks without `desc-` first,
        `desc-manual` second, then by name.
    """
    found = [
        path
        for path in (root / f"sub-{subject}").rglob("*.nii*")
        if _MASK_NAME.search(path.name) and entities_of(path).get("sub") == subject
    ]
    return sorted(found, key=lambda path: (_DESC_RANK.get(entities_of(path).get("desc"), 2), path.name))


def find_transforms(roots: Iterable[Path], image: Path, modality: str) -> dict[str, Path]:
    """List the given transforms from other spaces to an image.

    Parameters
    ----------
    roots : iterable of pathlib.Path
        Derivative datasets; the first that has a transform counts.
    image : pathlib.Path
        The raw image.
    modality : str
        `T1w` or `T2w`.

    Returns
    -------
    dict of str to pathlib.Path
        ``from-<space>_to-<modality>_mode-image_xfm`` by space. Its name may hold entities of the image only.
    """
    found: dict[str, Path] = {}
    for root in roots:
        folder = root / f"sub-{entities_of(image).get('sub')}"
        for path in sorted(folder.rglob(f"*_to-{modality}_mode-image_xfm.*")):
            origin = entities_of(path).get("from")
            if origin is not None and path.suffix in TRANSFORM_SUFFIXES and belongs_to(path, image):
                found.setdefault(origin, path)
    return found


def resolve_masks(
    root: Path, units: Sequence[ImageUnit], bids_dir: Path, roots: Sequence[Path]
) -> tuple[dict[str, LesionMask], list[InputError]]:
    """Decide which lesion mask belongs to each image of a participant.

    Names come first: a mask belongs to the images that have all entities it names, and an image takes the
    mask that names most of its entities. A mask without a session belongs to the one session it fits. An
    entity that none of the T1w and T2w images has tells which other image a mask was drawn on, such as a
    FLAIR; such a mask serves the images of its session that have no other. Grids come second: T1w, T2w, SRI24
    space, a space from which a transform leads to the image, any other image of the session.

    Parameters
    ----------
    root : pathlib.Path
        Dataset of the lesion masks.
    units : sequence of ImageUnit
        Images of one participant, T1w first.
    bids_dir : pathlib.Path
        The raw dataset; the participant may have sessions there that are not part of the run.
    roots : sequence of pathlib.Path
        Derivative datasets that may hold transforms from other spaces.

    Returns
    -------
    masks : dict of str to LesionMask
        By the image's key; an image without a mask is not listed.
    problems : list of InputError
        One for each mask that cannot be used.
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
                raise _names_no_image(mask)
            elif session in by_session:
                grid_of(mask)  # raises if it is no image
                by_session[session].append(mask)
        except InputError as error:
            problems.append(error)
    if any(not applicable_masks(by_session[unit.session], unit.path) for unit in units):
        for mask, session in _fitting_sessions(without_session, units, raw, roots, problems):
            by_session.get(session, []).append(mask)
    found: dict[str, LesionMask] = {}
    for session, masks in by_session.items():
        own = [unit for unit in units if unit.session == session]
        found |= _resolve_session(masks, own, raw.get(session, []), roots, problems)
    return found, problems


def _raw_images(folder: Path) -> dict[Session, list[Path]]:
    """List the anatomical images of a participant's raw folder by session, None without sessions."""
    folders = {None: folder / "anat"}
    folders |= {path.name.removeprefix("ses-"): path / "anat" for path in sorted(folder.glob("ses-*"))}
    found = {session: sorted(anat.glob("sub-*.nii*")) for session, anat in folders.items()}
    return {session: images for session, images in found.items() if images}


def _session_of(mask: Path, root: Path) -> Session:
    """Read the session of a mask from its name, or else from its folder."""
    named = entities_of(mask).get("ses")
    parts = mask.relative_to(root).parent.parts
    lies = next((part.removeprefix("ses-") for part in parts if part.startswith("ses-")), None)
    if None not in (named, lies) and named != lies:
        raise InputError(mask, f"lesion mask of ses-{named} in the folder of ses-{lies}", "move or rename it")
    return named or lies


def _names_no_image(mask: Path) -> InputError:
    """Describe a mask whose entities no image of the participant has."""
    names = [f"{key}-{value}" for key, value in identifying_entities(mask).items() if key != "sub"]
    problem = f"lesion mask that names {', '.join(names)}, as no image of the participant does"
    return InputError(mask, problem, "rename it after the image it was drawn on")


def _modality_of(image: Path) -> str:
    """Return the modality of an image, its suffix if it is neither T1w nor T2w."""
    suffix = image.name.split(".", 1)[0].rsplit("_", 1)[-1]
    return _MODALITIES.get(suffix, suffix)


def _is_scored(image: Path) -> bool:
    """Check whether anomalies are looked for in images of this kind unless other ones are asked for."""
    return _modality_of(image) in _MODALITIES and "ce" not in entities_of(image)


def _is_on(grid: Grid, image: Path) -> bool:
    """Check whether an image has this grid; one that cannot be read has not."""
    try:
        return same_grid(grid, grid_of(image))
    except InputError:
        return False


def _fitting_sessions(
    masks: Sequence[Path],
    units: Sequence[ImageUnit],
    raw: Mapping[Session, Sequence[Path]],
    roots: Sequence[Path],
    problems: list[InputError],
) -> list[tuple[Path, Session]]:
    """Find the one session that each mask without a session fits, in the run or not."""
    found, unfitting = [], []
    for mask in masks:
        try:
            grid = grid_of(mask)
            fitting = [session for session, images in raw.items() if _fits(mask, grid, images, roots)]
            external = [unit for unit in units if unit.image != unit.path and belongs_to(mask, unit.path)]
            fitting += [unit.session for unit in external if _is_on(grid, unit.image)]
            fitting = list(dict.fromkeys(fitting))
            if len(fitting) == 1:
                found.append((mask, fitting[0]))
                continue
            sessions = [f"ses-{session}" if session else "images without a session" for session in fitting]
            problem = "lesion mask without a session on the grid of none of the participant's images"
            if sessions:
                problem = f"lesion mask without a session that fits {', '.join(sessions[:-1])}"
                problem += f" and {sessions[-1]}"
            error = InputError(mask, problem, "add the session it was drawn in to its name (ses-<label>)")
            (problems if sessions else unfitting).append(error)
        except InputError as error:
            problems.append(error)
    problems += [] if found else unfitting
    return found


def _fits(mask: Path, grid: Grid, images: Sequence[Path], roots: Sequence[Path]) -> bool:
    """Check whether a mask is on the grid of one of these raw images, or can be brought to it."""
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
    """Distribute the masks of a session over its images; see :func:`resolve_masks`."""
    named, elsewhere = [], []
    for mask in masks:
        if any(belongs_to(mask, unit.path) for unit in units):
            named.append(mask)
            continue
        bearers = [image for image in raw if belongs_to(mask, image)]
        if not bearers:
            problems.append(_names_no_image(mask))
        elif not any(map(_is_scored, bearers)):
            elsewhere.append(mask)
    refused: set[Path] = set()
    while True:
        parts: dict[tuple[Path, ...], list[ImageUnit]] = defaultdict(list)
        for unit in units:
            groups = applicable_masks([mask for mask in named if mask not in refused], unit.path)
            free = [mask for mask in elsewhere if mask not in refused]
            parts[tuple(groups[0] if groups else free)].append(unit)
        parts.pop((), None)
        found, faulty = {}, set()
        for candidates, users in parts.items():
            at_fault = candidates
            try:
                lesion = _place(candidates, users, raw, roots)
                at_fault = (lesion.path,)
                lesion = replace(lesion, is_empty=not read_lesion(lesion.path)[0].any())
            except InputError as error:
                problems.append(error)
                faulty.update(at_fault)
                continue
            found |= {user.key: lesion for user in users}
        if not faulty:
            return found
        # Images whose mask was refused may have another one that names fewer entities.
        refused |= faulty


def _place(
    masks: Sequence[Path], users: Sequence[ImageUnit], raw: Sequence[Path], roots: Sequence[Path]
) -> LesionMask:
    """Choose one of the masks of some images by its grid, and say how it comes to SRI24.

    Parameters
    ----------
    masks : sequence of pathlib.Path
        Masks that name the same entities, best first.
    users : sequence of ImageUnit
        The images they belong to, T1w first.
    raw : sequence of pathlib.Path
        All raw images of the session.
    roots : sequence of pathlib.Path
        Derivative datasets that may hold transforms from other spaces.

    Returns
    -------
    LesionMask
        Its content has not been looked at.

    Raises
    ------
    InputError
        If none of the masks is on a known grid.
    """
    grids = {path: grid_of(path) for path in masks}
    spaces = {path: entities_of(path).get("space") for path in masks}
    users = sorted(users, key=lambda unit: unit.modality)

    def placed(path: Path, unit: ImageUnit = users[0], **how: Any) -> LesionMask:
        shared = {
            name: value
            for key, name in IDENTIFYING_KEYS.items()
            if key in (*identifying_entities(path), "ses")
            and (value := unit.entities.get(name)) is not None
            and all(user.entities.get(name) == value for user in users)
        }
        return LesionMask(path, unit.key, lesion_output(shared), **how)

    for unit in users:
        for image in dict.fromkeys([unit.path, unit.image]):
            for path in masks:
                if spaces[path] in (None, "orig", unit.modality) and _is_on(grids[path], image):
                    return placed(path, unit, on_prepared=image != unit.path)
    for path in masks:
        if spaces[path] == NAME and same_grid(grids[path], _ATLAS):
            return placed(path, on_atlas=True)
    # Looked for only now: folders of other pipelines may be large, and most masks are on a known grid.
    for unit in users:
        transforms = find_transforms(roots, unit.path, unit.modality)
        for path in masks:
            transform = transforms.get(spaces[path] or "")
            if transform is not None:
                return placed(path, unit, on_prepared=_same_tree(transform, unit), transform=transform)
    known = {unit.path.name for unit in users}
    for path in masks:
        named = [image for image in raw if belongs_to(path, image) and image.name not in known]
        # One that names a run is not taken from the grid of a T1w of another run.
        unnamed = [image for image in raw if not belongs_to(path, image) and not _is_scored(image)]
        for other in (*named, *unnamed):
            if _is_on(grids[path], other):
                return placed(path, other=other)
    others = ", ".join(path.name for path in masks[1:])
    raise InputError(
        masks[0],
        "lesion mask on the grid of none of the images it may serve, and no transform leads from its space"
        + (f" (nor from {others})" if others else ""),
        "resample it to the T1w with nearest-neighbour interpolation",
    )


def _same_tree(transform: Path, unit: ImageUnit) -> bool:
    """Check whether a transform leads to another pipeline's version of an image."""
    return unit.external.image is not None and transform.is_relative_to(unit.external.root)
