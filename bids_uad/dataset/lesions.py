"""Ground truth: which lesion mask belongs to a session, and on which image's grid it lies."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bids_uad.dataset.grids import grid_of, same_grid
from bids_uad.dataset.naming import entities_of
from bids_uad.dataset.units import ImageUnit
from bids_uad.errors import InputError
from bids_uad.space import AFFINE, NAME, SHAPE

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
    """

    path: Path
    unit: ImageUnit | None
    on_prepared: bool = False


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


def match_mask(masks: Sequence[Path], units: Sequence[ImageUnit]) -> LesionMask | None:
    """Decide which mask of a session is used.

    The T1w's grid comes first, then the T2w's, then SRI24 space, which needs no transform: a mask drawn
    on the image that the atlas is registered to is resampled once.

    Parameters
    ----------
    masks : sequence of pathlib.Path
        Candidates, best first.
    units : sequence of ImageUnit
        The session's images, T1w first.

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
    listed = ", ".join(path.name for path in masks[1:])
    raise InputError(
        masks[0],
        "lesion mask on the grid of none of the session's T1w and T2w images"
        + (f" (nor are {listed})" if listed else ""),
        "resample it to the T1w with nearest-neighbour interpolation",
    )
