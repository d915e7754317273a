"""Ground truth: which lesion mask belongs to a session, and on which image's grid it lies."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from bids_uad.dataset.units import ImageUnit
from bids_uad.errors import InputError
from bids_uad.space import AFFINE, NAME, SHAPE

GRID_TOLERANCE_MM = 0.1

_MASK_NAME = re.compile(
    r"_(?:label-lesion(?:_desc-[0-9a-zA-Z]+)?_(?:mask|roi)|seg-lesion(?:_desc-[0-9a-zA-Z]+)?_mask)\.nii(\.gz)?$"
)
_ENTITY = re.compile(r"(?:^|_)([a-z]+)-([0-9a-zA-Z]+)(?=_)")


@dataclass(frozen=True)
class LesionMask:
    """The lesion mask of one session.

    Parameters
    ----------
    path : pathlib.Path
        The file.
    unit : ImageUnit, optional
        The image on whose grid it lies; none if it is already in SRI24 space.
    """

    path: Path
    unit: ImageUnit | None


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
    grids = {path: _header(path) for path in masks}
    for unit in sorted(units, key=lambda unit: unit.modality):
        if not unit.path.is_file():
            continue
        for path in masks:
            space = entities_of(path).get("space")
            if space in (None, unit.modality, "orig") and same_grid(grids[path], _header(unit.path)):
                return LesionMask(path, unit)
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


def same_grid(one: tuple[tuple[int, ...], np.ndarray], other: tuple[tuple[int, ...], np.ndarray]) -> bool:
    """Say whether two grids have their voxels at the same places, whatever order they are stored in.

    Parameters
    ----------
    one, other : tuple of shape and affine

    Returns
    -------
    bool
        True if, after both are reordered to RAS, the shapes are equal and no corner is further away
        than 0.1 mm.
    """
    (shape_one, affine_one), (shape_other, affine_other) = _to_ras(*one), _to_ras(*other)
    if shape_one != shape_other:
        return False
    corners = np.array(np.meshgrid(*[(0, size - 1) for size in shape_one])).reshape(3, -1)
    distance = nib.affines.apply_affine(affine_one, corners.T) - nib.affines.apply_affine(
        affine_other, corners.T
    )
    return bool(np.linalg.norm(distance, axis=1).max() < GRID_TOLERANCE_MM)


def entities_of(path: Path) -> dict[str, str]:
    """Read the `key-value` pairs of a BIDS file name."""
    return dict(_ENTITY.findall(path.name))


def _to_ras(shape: tuple[int, ...], affine: np.ndarray) -> tuple[tuple[int, ...], np.ndarray]:
    """Describe a grid as if its voxels were stored in RAS order."""
    orientation = nib.io_orientation(affine)
    reordered = affine @ nib.orientations.inv_ornt_aff(orientation, shape)
    new_shape = [0, 0, 0]
    for axis, (target, _) in enumerate(orientation):
        new_shape[int(target)] = shape[axis]
    return tuple(new_shape), reordered


def _header(path: Path) -> tuple[tuple[int, ...], np.ndarray]:
    """Read shape (first three axes) and affine; raise InputError if the file is no image."""
    try:
        image = nib.load(path)
    except (nib.filebasedimages.ImageFileError, OSError, EOFError) as error:
        raise InputError(path, f"cannot be read as an image ({error})", "restore the file") from error
    return tuple(int(size) for size in image.shape[:3]), np.asarray(image.affine)
