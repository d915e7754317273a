"""Ground truth: which lesion mask belongs to a session, and on which image's grid it lies."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bids_uad.dataset.grids import grid_of, same_grid
from bids_uad.dataset.naming import entities_of
from bids_uad.dataset.units import ImageUnit
from bids_uad.errors import InputError
from bids_uad.space import AFFINE, NAME, SHAPE

TRANSFORM_SUFFIXES = (".txt", ".h5", ".mat")

_MASK_NAME = re.compile(
    r"_(?:label-lesion(?:_desc-[0-9a-zA-Z]+)?_(?:mask|roi)|seg-lesion(?:_desc-[0-9a-zA-Z]+)?_mask)\.nii(\.gz)?$"
)


@dataclass(frozen=True)
class LesionMask:
    """The lesion mask of one session.

    Parameters
    ----------
    path : pathlib.Path
        The file.
    unit : ImageUnit, optional
        The image on whose grid it lies; none if it is already in SRI24 space.
    on_prepared : bool
        Whether that is another pipeline's version of the image and not the raw one.
    other : pathlib.Path, optional
        Another image of the session on whose grid it lies instead; that one is registered to `unit`.
    transform : pathlib.Path, optional
        ITK transform, linear or not, that resamples the space of the mask to `unit`.
    """

    path: Path
    unit: ImageUnit | None
    on_prepared: bool = False
    other: Path | None = None
    transform: Path | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """All that its place on the atlas depends on."""
        return tuple(path for path in (self.path, self.other, self.transform) if path is not None)


def find_mask(root: Path, subject: str, session: str | None) -> list[Path]:
    """List the lesion masks of a session in a derivative dataset.

    Parameters
    ----------
    root : pathlib.Path
        The derivative dataset.
    subject : str
    session : str, optional
        A mask without session is taken for every session of the participant.

    Returns
    -------
    list of pathlib.Path
        `*_label-lesion_mask`, `*_label-lesion_roi` or `*_seg-lesion_mask`; sorted, masks without `desc-`
        first, `desc-manual` second.
    """
    found = []
    for path in sorted((root / f"sub-{subject}").rglob("*.nii*")):
        entities = entities_of(path)
        if not _MASK_NAME.search(path.name) or entities.get("sub") != subject:
            continue
        if "ses" in entities and entities["ses"] != session:
            continue
        found.append(path)
    rank = {None: 0, "manual": 1}
    return sorted(found, key=lambda path: (rank.get(entities_of(path).get("desc"), 2), path.name))


def find_transforms(roots: Iterable[Path], unit: ImageUnit) -> dict[str, Path]:
    """List the given transforms from other spaces to an image.

    Parameters
    ----------
    roots : iterable of pathlib.Path
        Derivative datasets; the first that has a transform counts.
    unit : ImageUnit

    Returns
    -------
    dict of str to pathlib.Path
        ``from-<space>_to-<modality>_mode-image_xfm`` by space.
    """
    found: dict[str, Path] = {}
    for root in roots:
        for path in sorted((root / f"sub-{unit.subject}").rglob(f"*_to-{unit.modality}_mode-image_xfm.*")):
            entities = entities_of(path)
            own_session = "ses" not in entities or entities["ses"] == unit.session
            if own_session and "from" in entities and path.suffix in TRANSFORM_SUFFIXES:
                found.setdefault(entities["from"], path)
    return found


def other_images(units: Sequence[ImageUnit]) -> list[Path]:
    """List the raw images beside those that are worked on: FLAIR, contrast-enhanced and so on."""
    folders = dict.fromkeys(unit.path.parent for unit in units)
    known = {unit.path for unit in units}
    return [path for folder in folders for path in sorted(folder.glob("sub-*.nii*")) if path not in known]


def match_mask(
    masks: Sequence[Path],
    units: Sequence[ImageUnit],
    roots: Iterable[Path],
) -> LesionMask | None:
    """Decide which mask of a session is used.

    The T1w's grid comes first, then the T2w's, then SRI24 space, which needs no transform; then a space from
    which a given transform leads to the session's first image, then the grid of any other image of the
    session, which has to be registered. However it comes, a mask is resampled once.

    Parameters
    ----------
    masks : sequence of pathlib.Path
        Candidates, best first.
    units : sequence of ImageUnit
        The session's images, T1w first.
    roots : iterable of pathlib.Path
        Derivative datasets that may hold transforms from other spaces.

    Returns
    -------
    LesionMask or None
        None if there is no candidate.

    Raises
    ------
    InputError
        If there are candidates, but none is on a known grid.
    """
    if not masks:
        return None
    grids = {path: grid_of(path) for path in masks}
    for unit in sorted(units, key=lambda unit: unit.modality):
        for image in dict.fromkeys([unit.path, unit.image]):
            for path in masks:
                space = entities_of(path).get("space")
                if space in (None, unit.modality, "orig") and same_grid(grids[path], grid_of(image)):
                    return LesionMask(path, unit, on_prepared=image != unit.path)
    for path in masks:
        if entities_of(path).get("space") == NAME and same_grid(grids[path], (SHAPE, AFFINE)):
            return LesionMask(path, None)
    # Looked for only now: folders of other pipelines may be large, and most masks lie on a known grid.
    transforms = find_transforms(roots, units[0])
    for path in masks:
        transform = transforms.get(entities_of(path).get("space", ""))
        if transform is not None:
            prepared = _same_tree(transform, units[0])
            return LesionMask(path, units[0], on_prepared=prepared, transform=transform)
    others = other_images(units)
    for path in masks:
        for other in others:
            if same_grid(grids[path], grid_of(other)):
                return LesionMask(path, units[0], other=other)
    listed = ", ".join(path.name for path in masks[1:])
    raise InputError(
        masks[0],
        "lesion mask on the grid of none of the session's images, and no transform leads from its space"
        + (f" (nor from {listed})" if listed else ""),
        "resample it to the T1w with nearest-neighbour interpolation",
    )


def _same_tree(transform: Path, unit: ImageUnit) -> bool:
    """Say whether a transform leads to another pipeline's version of an image."""
    return unit.prepared.image is not None and transform.is_relative_to(unit.prepared.root)
