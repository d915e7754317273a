"""What other pipelines have already done for an image: found by name in the derivative datasets of a run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np

from bids_uad.dataset.describe import read_json
from bids_uad.dataset.naming import (
    PREFIX_ENTITIES,
    ExternalInputs,
    ImageUnit,
    Problem,
    entities_of,
)
from bids_uad.errors import InputError
from bids_uad.images import open_nifti

LESIONS = "lesions"
"""Name of the derivative dataset that holds ground truth and nothing else."""
REFERENCE_SIDECAR = Path("tpl-SRI24", "anat", "tpl-SRI24_desc-brain_T1w.json")

_SUFFIX = re.compile(r"_([0-9a-zA-Z]+)\.(?:nii|nii\.gz|txt)$")
_IDENTIFYING = {key: name for name, key in PREFIX_ENTITIES}


def attach_external_inputs(
    units: Sequence[ImageUnit], derivatives: Mapping[str, Path]
) -> tuple[list[ImageUnit], list[Problem]]:
    """Give every image what the derivative datasets of the run hold about it.

    Read are fMRIPrep's names and our own: ``desc-preproc_T1w`` and ``_T2w`` in native space, the brain
    mask on that image's grid or on the raw one's, ``from-orig_to-T1w``, and ``from-T1w_to-SRI24``. A file
    that names fewer entities than the image (fMRIPrep merges runs) is taken for the first image it fits.

    Parameters
    ----------
    units : sequence of ImageUnit
        A participant's anchors before what is registered to them.
    derivatives : mapping of str to pathlib.Path
        Datasets by name; the first that has something about an image is used. That of the lesion masks
        is left out.

    Returns
    -------
    units : list of ImageUnit
    problems : list of Problem
        Images whose brain mask fits no grid. They are left out, and what is registered to them, too.
    """
    sources = {name: root for name, root in derivatives.items() if name != LESIONS}
    taken: set[Path] = set()
    done: dict[str, ImageUnit] = {}
    problems: list[Problem] = []
    for unit in units:
        if unit.anchor is not None:
            if unit.anchor.key not in done:
                problems.append(Problem(unit.subject, f"{unit.path}: its T1w image cannot be used", unit.key))
                continue
            unit = replace(unit, anchor=done[unit.anchor.key])
        try:
            for name, root in sources.items():
                external = _find(name, root, unit, taken)
                if external.files:
                    taken |= {external.image, external.brain_mask} - {None}
                    unit = replace(unit, external=external)
                    break
        except InputError as error:
            problems.append(Problem(unit.subject, str(error), unit.key))
            continue
        done[unit.key] = unit
    return list(done.values()), problems


def _find(dataset: str, root: Path, unit: ImageUnit, taken: set[Path]) -> ExternalInputs:
    """Collect what one dataset holds about an image."""
    files = [path for path in _files(root, unit) if path not in taken]
    image = _best(files, unit, suffix=unit.modality, spaces=(None, "T1w"), desc=("preproc",))
    grid = grid_of(unit.path if image is None else image)
    mask = _mask(files, unit, grid)
    if image is None and mask is None:
        return ExternalInputs()
    origin = "orig" if unit.modality == "T1w" else unit.modality
    return ExternalInputs(
        dataset=dataset,
        root=root,
        image=image,
        brain_mask=mask,
        from_raw=None if image is None else _transform(files, unit, origin, "T1w"),
        to_sri24=_transform(files, unit, unit.modality, "SRI24"),
        reference_sha256=read_json(root / REFERENCE_SIDECAR).get("ReferenceSHA256"),
        aligned=image is not None and unit.anchor is not None and same_grid(grid, grid_of(unit.anchor.image)),
    )


def _mask(files: list[Path], unit: ImageUnit, grid: Grid) -> Path | None:
    """Find the brain mask of an image; one that is there but fits no grid is refused."""
    descs = ("brain",) if unit.is_anchor else (f"{unit.modality}Brain",)
    wanted = [
        path
        for space in (None, unit.modality, "orig")
        for path in _matching(files, unit, suffix="mask", spaces=(space,), desc=descs)
    ]
    for path in wanted:
        if same_grid(grid_of(path), grid):
            return path
    if wanted and unit.modality == "T1w":
        raise InputError(
            wanted[0],
            f"brain mask that is not on the grid of {unit.path.name}",
            "give the preprocessed image it belongs to as well, or leave the mask out",
        )
    return None


def _transform(files: list[Path], unit: ImageUnit, origin: str, target: str) -> Path | None:
    for path in _matching(files, unit, suffix="xfm", spaces=(None,), desc=(None,)):
        ends = entities_of(path).get("from"), entities_of(path).get("to")
        if ends == (origin, target) and path.suffix == ".txt":
            return path
    return None


def _best(files: list[Path], unit: ImageUnit, **named: Sequence[str | None]) -> Path | None:
    return next(_matching(files, unit, **named), None)


def _matching(
    files: list[Path],
    unit: ImageUnit,
    *,
    suffix: str,
    spaces: Sequence[str | None],
    desc: Sequence[str | None],
) -> Iterator[Path]:
    """Files about an image, those that name most of its entities first."""
    own = {key: unit.entities[name] for key, name in _IDENTIFYING.items() if name in unit.entities}
    fitting = []
    for path in files:
        found, ending = entities_of(path), _SUFFIX.search(path.name)
        named = {key: value for key, value in found.items() if key in _IDENTIFYING}
        if ending is None or ending[1] != suffix or not named.items() <= own.items():
            continue
        if found.get("space") in spaces and found.get("desc") in desc:
            fitting.append((-len(named), path.name, path))
    return iter([path for _, _, path in sorted(fitting)])


def _files(root: Path, unit: ImageUnit) -> list[Path]:
    """Files of a participant that may be about an image: of its session, or of none."""
    folder = root / f"sub-{unit.subject}"
    places = [folder / "anat"] + ([folder / f"ses-{unit.session}" / "anat"] if unit.session else [])
    return [path for place in places if place.is_dir() for path in sorted(place.iterdir())]


TOLERANCE_MM = 0.1

Grid = tuple[tuple[int, ...], np.ndarray]
"""Shape (first three axes) and affine."""


def grid_of(path: Path) -> Grid:
    """Read the grid of an image from its header.

    Raises
    ------
    InputError
        If the file is missing or no image, see :func:`bids_uad.images.open_nifti`, or its affine is singular.
    """
    image = open_nifti(path)
    affine = np.asarray(image.affine)
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine) < 4:
        raise InputError(path, "the header's affine is singular or not finite", "repair the NIfTI header")
    return tuple(int(size) for size in image.shape[:3]), affine


def same_grid(one: Grid, other: Grid) -> bool:
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
    return bool(np.linalg.norm(distance, axis=1).max() < TOLERANCE_MM)


def _to_ras(shape: tuple[int, ...], affine: np.ndarray) -> Grid:
    """Describe a grid as if its voxels were stored in RAS order."""
    orientation = nib.io_orientation(affine)
    reordered = affine @ nib.orientations.inv_ornt_aff(orientation, shape)
    new_shape = [0, 0, 0]
    for axis, (target, _) in enumerate(orientation):
        new_shape[int(target)] = shape[axis]
    return tuple(new_shape), reordered
