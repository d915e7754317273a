"""External derivatives: outputs of other pipelines, or of earlier runs, for the images of a run.

They are found by their names in the derivative datasets (``-d NAME=PATH``) of the run.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from bids_uad.dataset.naming import IDENTIFYING_KEYS, ExternalInputs, ImageUnit, Problem, entities_of
from bids_uad.errors import InputError, UserError
from bids_uad.files import read_json
from bids_uad.images import Grid, grid_of, same_grid

LOGGER = logging.getLogger("bids_uad")

LESIONS = "lesions"
"""Name of the derivative dataset that holds lesion masks; it is not searched for anything else."""
REFERENCE_SIDECAR = Path("tpl-SRI24", "anat", "tpl-SRI24_desc-brain_T1w.json")

_SUFFIX = re.compile(r"_([0-9a-zA-Z]+)\.(?:nii|nii\.gz|txt)$")


def attach_external_inputs(
    units: Sequence[ImageUnit], derivatives: Mapping[str, Path]
) -> tuple[list[ImageUnit], list[Problem]]:
    """Find the external derivatives of every image.

    Names of fMRIPrep and of this package are recognised: ``desc-preproc_T1w``, ``_T2w`` and ``_FLAIR`` in
    native space, the brain mask on the grid of that image or of the raw image, ``from-orig_to-T1w`` and
    ``from-T1w_to-SRI24``. A file whose name has fewer entities than the image (fMRIPrep merges runs) is used
    for the first image that it matches.

    Parameters
    ----------
    units : sequence of ImageUnit
        Images, each anchor before the images that are registered to it.
    derivatives : mapping of str to pathlib.Path
        Derivative datasets by name, without the one of lesion masks (`LESIONS`), which is skipped. The first
        dataset with a file for an image is used.

    Returns
    -------
    units : list of ImageUnit
        Images that can be processed, with their external inputs.
    problems : list of Problem
        Images whose brain mask is on another grid, and the images registered to them. They are left out.
    """
    roots = {name: root for name, root in derivatives.items() if name != LESIONS}
    references = {name: _reference_of(name, root) for name, root in roots.items()}
    used: set[Path] = set()
    usable: dict[str, ImageUnit] = {}
    problems: list[Problem] = []
    for unit in units:
        if unit.anchor is not None:
            if unit.anchor.key not in usable:
                problems.append(Problem(unit.subject, f"{unit.path}: its T1w image cannot be used", unit.key))
                continue
            unit = replace(unit, anchor=usable[unit.anchor.key])
        try:
            for name, root in roots.items():
                external = _find(name, root, unit, used, references[name])
                if external.files:
                    used |= {external.image, external.brain_mask} - {None}
                    unit = replace(unit, external=external)
                    break
        except InputError as error:
            problems.append(Problem(unit.subject, str(error), unit.key))
            continue
        usable[unit.key] = unit
    return list(usable.values()), problems


def _reference_of(name: str, root: Path) -> dict | None:
    """Read the metadata of a dataset's reference image; None, with a warning, if they cannot be read."""
    try:
        return read_json(root / REFERENCE_SIDECAR)
    except UserError as error:
        LOGGER.warning("%s. The transforms to SRI24 of the dataset %s are not used", error, name)
        return None


def _find(
    dataset: str, root: Path, unit: ImageUnit, used: set[Path], reference: dict | None
) -> ExternalInputs:
    """Find the files of one dataset for an image, apart from those `used` for other images."""
    files = [path for path in _participant_files(root, unit) if path not in used]
    images = _matching(files, unit, suffix=unit.modality, spaces=(None, "T1w"), desc="preproc")
    image = images[0] if images else None
    grid = grid_of(image or unit.path)
    mask = _brain_mask(files, unit, grid)
    if image is None and mask is None:
        return ExternalInputs()
    raw_space = "orig" if unit.modality == "T1w" else unit.modality
    to_sri24 = None if reference is None else _transform(files, unit, unit.modality, "SRI24")
    return ExternalInputs(
        dataset=dataset,
        root=root,
        image=image,
        brain_mask=mask,
        from_raw=None if image is None else _transform(files, unit, raw_space, "T1w"),
        to_sri24=to_sri24,
        reference_sha256=(reference or {}).get("ReferenceSHA256"),
        aligned=image is not None and unit.anchor is not None and same_grid(grid, grid_of(unit.anchor.image)),
    )


def _brain_mask(files: list[Path], unit: ImageUnit, grid: Grid) -> Path | None:
    """Find the brain mask of an image; raise InputError if a T1w has masks on other grids only."""
    desc = "brain" if unit.is_anchor else f"{unit.modality}Brain"
    masks = [
        path
        for space in (None, unit.modality, "orig")
        for path in _matching(files, unit, suffix="mask", spaces=(space,), desc=desc)
    ]
    for path in masks:
        if same_grid(grid_of(path), grid):
            return path
    if masks and unit.modality == "T1w":
        raise InputError(
            masks[0],
            f"brain mask that is not on the grid of {unit.path.name}",
            "add the preprocessed image it belongs to, or leave the mask out",
        )
    return None


def _transform(files: list[Path], unit: ImageUnit, source: str, target: str) -> Path | None:
    """Find the ITK text transform of an image from one space to another."""
    for path in _matching(files, unit, suffix="xfm", spaces=(None,), desc=None):
        entities = entities_of(path)
        if (entities.get("from"), entities.get("to")) == (source, target) and path.suffix == ".txt":
            return path
    return None


def _matching(
    files: list[Path], unit: ImageUnit, *, suffix: str, spaces: Sequence[str | None], desc: str | None
) -> list[Path]:
    """List the files of an image, those with most of its entities in their names first."""
    own = {key: unit.entities[name] for key, name in IDENTIFYING_KEYS.items() if name in unit.entities}
    matches = []
    for path in files:
        entities, ending = entities_of(path), _SUFFIX.search(path.name)
        named = {key: value for key, value in entities.items() if key in IDENTIFYING_KEYS}
        if ending is None or ending[1] != suffix or not named.items() <= own.items():
            continue
        if entities.get("space") in spaces and entities.get("desc") == desc:
            matches.append((-len(named), path.name, path))
    return [path for _, _, path in sorted(matches)]


def _participant_files(root: Path, unit: ImageUnit) -> list[Path]:
    """List the files of a participant that may belong to an image: those of its session or of no session."""
    folder = root / f"sub-{unit.subject}"
    folders = [folder / "anat"] + ([folder / f"ses-{unit.session}" / "anat"] if unit.session else [])
    return [path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir())]
