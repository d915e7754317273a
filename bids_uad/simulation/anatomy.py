"""Tissue maps of the built-in template and of label maps, in SRI24 space.

Sources
-------
ICBM152 2009a nonlinear symmetric (Fonov et al. 2011, permissive licence), as packaged by nilearn, and
FreeSurfer-type label maps (for instance those of SynthSeg, Billot et al. 2023, Apache-2.0).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from scipy import ndimage
from torch.nn import functional as F

from bids_uad.errors import InputError
from bids_uad.simulation.spatial import (
    box_points,
    sample,
    smooth,
    tensor,
)
from bids_uad.space import icbm_to_sri24

CLASSES = (
    "csf",  # around the brain and in the sulci
    "ventricle",
    "cortex",
    "white",
    "thalamus",
    "striatum",
    "pallidum",
    "hippocampus",
    "cerebellar_cortex",
    "cerebellar_white",
    "brainstem",
    "choroid",
)
FREESURFER = {
    "csf": (24,),
    "ventricle": (4, 5, 14, 15, 43, 44, 72),
    "cortex": (3, 42),
    "white": (2, 41, 25, 57, 77, 30, 62),
    "thalamus": (10, 49),
    "striatum": (11, 12, 26, 50, 51, 58),
    "pallidum": (13, 52),
    "hippocampus": (17, 18, 53, 54),
    "cerebellar_cortex": (8, 47),
    "cerebellar_white": (7, 46),
    "brainstem": (16, 28, 60, 85),
    "choroid": (31, 63, 136, 137, 163, 164),
}
NAMES = {
    "csf": ("csf", "cerebrospinalfluid", "extracerebralcsf"),
    "ventricle": (
        "ventricle",
        "ventricles",
        "lateralventricle",
        "inflatvent",
        "inferiorlateralventricle",
        "3rdventricle",
        "4thventricle",
        "5thventricle",
        "thirdventricle",
        "fourthventricle",
    ),
    "cortex": (
        "cortex",
        "cerebralcortex",
        "gm",
        "gray",
        "grey",
        "graymatter",
        "greymatter",
        "corticalgraymatter",
    ),
    "white": ("white", "wm", "whitematter", "cerebralwhitematter", "wmhypointensities"),
    "thalamus": ("thalamus", "thalamusproper"),
    "striatum": ("striatum", "caudate", "putamen", "accumbens", "accumbensarea"),
    "pallidum": ("pallidum",),
    "hippocampus": ("hippocampus", "amygdala"),
    "cerebellar_cortex": ("cerebellarcortex", "cerebellumcortex", "cerebellum"),
    "cerebellar_white": ("cerebellarwhite", "cerebellarwhitematter", "cerebellumwhitematter"),
    "brainstem": ("brainstem", "ventraldc", "pons", "midbrain", "medulla"),
    "choroid": ("choroid", "choroidplexus", "vessel"),
}
"""Names in lookup tables, without side and punctuation, by class."""
BUILT_IN = "icbm152"
"""Name of the built-in template as a source of anatomy."""
STEP = 4
"""Spacing of the grid for the alignment of label maps, voxels of the box."""
GROUPS = (
    ("cortex", "cerebellar_cortex", "hippocampus"),
    ("white", "cerebellar_white", "brainstem"),
    ("ventricle",),
    ("thalamus", "striatum", "pallidum"),
)
"""Groups of classes that are aligned."""
SULCUS_MM = 10.0
"""Reach of the closing that defines the fluid between gyri and in the cisterns, if a label map has none."""
FLUID_RIM_MM = 4.0
"""Thickness of the fluid around the closed brain, if a label map has none."""


@dataclass(frozen=True)
class TissueMaps:
    """Tissue maps of one source of anatomy.

    Attributes
    ----------
    name : str
        Name of the source.
    fractions : torch.Tensor, shape (len(CLASSES), X, Y, Z), float32
        Fraction of each class per voxel; their sum is 1 inside the brain and its fluid, and less outside.
    detail : torch.Tensor or None, shape (X, Y, Z)
        Residual of the T1w intensity that the fractions do not explain, in units of the white-grey contrast.
    affine : numpy.ndarray, shape (4, 4)
        Voxel-to-world of SRI24, mm.
    """

    name: str
    fractions: torch.Tensor
    detail: torch.Tensor | None
    affine: np.ndarray


def _ellipsoid(points: np.ndarray, centre: tuple, radii: tuple) -> np.ndarray:
    """Compute the partial-volume map of an ellipsoid and its mirror image at the given points."""
    x = np.abs(points[0]) - centre[0]
    distance = np.sqrt(
        (x / radii[0]) ** 2
        + ((points[1] - centre[1]) / radii[1]) ** 2
        + ((points[2] - centre[2]) / radii[2]) ** 2
    )
    return np.clip((1.0 - distance) * 6.0 + 0.5, 0.0, 1.0).astype(np.float32)


@lru_cache(maxsize=1)
def template_source() -> TissueMaps:
    """Compute the tissue maps of the ICBM152 template.

    The template has maps of grey and white matter only. Deep nuclei, cerebellum and brainstem are separated
    by ellipsoids in ICBM152 space. The maps are averages over participants, so they are sharpened.

    Returns
    -------
    TissueMaps
        Maps with `detail`.
    """
    from nilearn.datasets import load_mni152_gm_template, load_mni152_template, load_mni152_wm_template

    template = load_mni152_template(resolution=1)
    t1w = np.asarray(template.dataobj, dtype=np.float32)
    grey = np.asarray(load_mni152_gm_template(resolution=1).dataobj, dtype=np.float32)
    white = np.asarray(load_mni152_wm_template(resolution=1).dataobj, dtype=np.float32)
    head = t1w > 0
    corner = np.maximum(np.argwhere(head).min(0) - 2, 0)
    cut = tuple(slice(a, b) for a, b in zip(corner, np.argwhere(head).max(0) + 3, strict=True))
    t1w, grey, white, head = t1w[cut], grey[cut], white[cut], head[cut]
    affine = template.affine @ nib.affines.from_matvec(np.eye(3), corner)

    fluid = np.clip(1.0 - grey - white, 0.0, 1.0)
    sharp = np.stack([fluid, grey, white]) ** 2.5
    fluid, grey, white = sharp / np.maximum(sharp.sum(0), 1e-6) * head

    axes = [affine[a, 3] + affine[a, a] * np.arange(n) for a, n in enumerate(t1w.shape)]
    points = np.meshgrid(*axes, indexing="ij", sparse=True)
    thalamus = _ellipsoid(points, (11, -18, 8), (11, 15, 10))
    striatum = np.maximum(
        _ellipsoid(points, (26, 2, 3), (8, 19, 12)), _ellipsoid(points, (12, 12, 8), (7, 14, 14))
    )
    pallidum = _ellipsoid(points, (20, -4, 0), (5, 9, 6))
    hippocampus = _ellipsoid(points, (27, -20, -16), (9, 20, 8))
    inner = _ellipsoid(points, (0, -18, 8), (26, 62, 26))
    below = np.clip((-(points[2] + 0.45 * (points[1] + 60.0)) - 14.0) / 4.0 + 0.5, 0, 1)
    cerebellum = (below * np.clip((-points[1] - 38.0) / 4.0 + 0.5, 0, 1) * (points[2] < 2)).astype(np.float32)
    stem = _ellipsoid(points, (0, -28, -38), (15, 14, 34)) * (1 - cerebellum)

    maps = dict.fromkeys(CLASSES)
    rest_grey, rest_white = grey, white
    for name, region in (
        ("thalamus", thalamus),
        ("pallidum", pallidum),
        ("striatum", striatum),
        ("hippocampus", hippocampus),
    ):
        maps[name] = rest_grey * region
        rest_grey = rest_grey - maps[name]
    maps["cerebellar_cortex"] = rest_grey * cerebellum
    maps["cerebellar_white"] = rest_white * cerebellum
    rest_grey, rest_white = rest_grey * (1 - cerebellum), rest_white * (1 - cerebellum)
    maps["brainstem"] = (rest_grey + rest_white) * stem
    maps["cortex"], maps["white"] = rest_grey * (1 - stem), rest_white * (1 - stem)
    maps["ventricle"] = fluid * inner
    maps["csf"] = fluid * (1 - inner)
    maps["choroid"] = np.zeros_like(fluid)
    fractions = tensor(np.stack([maps[name] for name in CLASSES]))
    return TissueMaps(BUILT_IN, fractions, _unexplained(t1w, fractions, head), icbm_to_sri24() @ affine)


def _unexplained(t1w: np.ndarray, fractions: torch.Tensor, head: np.ndarray) -> torch.Tensor:
    """Compute the residual of a least-squares fit of T1w, relative to the white-grey contrast."""
    design = fractions.cpu().numpy()[:, head].T
    weights = np.linalg.lstsq(design[::7], t1w[head][::7], rcond=None)[0]
    contrast = weights[CLASSES.index("white")] - weights[CLASSES.index("cortex")]
    residual = np.zeros_like(t1w)
    residual[head] = np.clip((t1w[head] - design @ weights) / contrast, -0.6, 0.6)
    return smooth(tensor(residual), 0.7)


def find_label_maps(paths: Sequence[str | Path]) -> list[str]:
    """Find the label maps that a user names.

    Parameters
    ----------
    paths : sequence of path-like
        Label maps, folders of ``*_dseg.nii.gz``, or `BUILT_IN` for the built-in template.

    Returns
    -------
    list of str
        `BUILT_IN` and paths of label maps, those of a folder sorted by name.

    Raises
    ------
    InputError
        If a path is neither a file nor a folder with label maps.
    """
    found = []
    for name in paths:
        path = Path(name)
        if str(name) == BUILT_IN or path.is_file():
            found.append(str(name))
            continue
        inside = sorted(str(each) for each in path.glob("*_dseg.nii.gz"))
        if not inside:
            raise InputError(
                path,
                "neither a label map nor a folder of *_dseg.nii.gz",
                f"use label maps, a folder of them, or {BUILT_IN!r}",
            )
        found += inside
    return found


def read_lookup_table(path: Path) -> dict[str, tuple[int, ...]]:
    """Read the labels of each class from the lookup table of a label map.

    The BIDS lookup table is ``<name>_dseg.tsv``, or ``dseg.tsv`` for the whole folder, with columns `index`
    and `name`. Without one, FreeSurfer's labels are assumed.

    Parameters
    ----------
    path : pathlib.Path
        Label map.

    Returns
    -------
    dict
        Labels by class; all other labels are background.

    Raises
    ------
    InputError
        If the table lacks a column.
    """
    own = path.with_name(path.name.replace(".nii.gz", ".tsv"))
    table = next((each for each in (own, path.with_name("dseg.tsv")) if each.is_file()), None)
    if table is None:
        return FREESURFER
    rows = pd.read_csv(table, sep="\t")
    if not {"index", "name"} <= set(rows.columns):
        raise InputError(table, "lacks a column `index` or `name`", "add a BIDS lookup table with both")
    labels = list(zip(rows["index"], rows["name"].map(_without_side), strict=True))
    return {name: tuple(int(label) for label, text in labels if text in NAMES[name]) for name in CLASSES}


def _without_side(name: str) -> str:
    """Return the name of a label in lower case, without side and punctuation, such as ``cerebralcortex``."""
    words = re.sub(r"[^a-z0-9]", " ", name.lower()).split()
    return "".join(word for word in words if word not in ("left", "right", "l", "r"))


@lru_cache(maxsize=2)
def read_label_map(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a label map as class indices, cropped to the brain; other labels are background.

    A label map without fluid around the brain, such as those of SynthSR, gets some: see :func:`add_fluid`.

    Parameters
    ----------
    path : path-like
        NIfTI file of about 1 mm; see :func:`read_lookup_table` for its labels.

    Returns
    -------
    classes : numpy.ndarray of uint8, shape (X, Y, Z)
        0 for background, otherwise 1 + index into `CLASSES`; RAS+ order.
    affine : numpy.ndarray, shape (4, 4)
        Voxel-to-world, mm.

    Raises
    ------
    InputError
        If the label map has no cortex or no white matter.
    """
    image = nib.as_closest_canonical(nib.load(path))
    labels = np.asarray(image.dataobj).astype(np.int32)
    known = read_lookup_table(Path(path))
    table = np.zeros(
        1 + max(int(labels.max()), *(max(own, default=0) for own in known.values())), dtype=np.uint8
    )
    for index, name in enumerate(CLASSES):
        table[list(known[name])] = index + 1
    classes = table[labels]
    tissue = classes > 1
    if (
        not (classes == CLASSES.index("cortex") + 1).any()
        or not (classes == CLASSES.index("white") + 1).any()
    ):
        raise InputError(
            path,
            "has no cortex or no white matter label",
            "use FreeSurfer's labels, or add a dseg.tsv with their names",
        )
    spans = [np.flatnonzero(tissue.any(tuple(a for a in range(3) if a != axis))) for axis in range(3)]
    # The margin includes the fluid around the brain.
    low = [max(int(span[0]) - 8, 0) for span in spans]
    cut = tuple(slice(a, int(span[-1]) + 9) for a, span in zip(low, spans, strict=True))
    classes = classes[cut]
    if not (classes == CLASSES.index("csf") + 1).any():
        classes = add_fluid(classes)
    return classes, image.affine @ nib.affines.from_matvec(np.eye(3), low)


def add_fluid(classes: np.ndarray) -> np.ndarray:
    """Label the background in sulci, fissures and cisterns, and a rim around the brain, as fluid.

    Parameters
    ----------
    classes : numpy.ndarray of uint8, shape (X, Y, Z)
        0 for background, otherwise 1 + index into `CLASSES`, voxels of 1 mm.

    Returns
    -------
    numpy.ndarray of uint8, shape (X, Y, Z)
        The same classes, with fluid (`csf`) in the background voxels inside the closed brain (by a ball of
        `SULCUS_MM`) or within `FLUID_RIM_MM` of it.
    """
    margin = int(SULCUS_MM) + 1
    background = np.pad(classes == 0, margin, constant_values=True)
    dilated = ndimage.distance_transform_edt(background) <= SULCUS_MM
    closed = ndimage.distance_transform_edt(dilated) > SULCUS_MM - FLUID_RIM_MM
    inner = (slice(margin, -margin),) * 3
    return np.where((classes == 0) & closed[inner], np.uint8(CLASSES.index("csf") + 1), classes)


def label_map_source(path: str | Path) -> TissueMaps:
    """Compute the tissue maps of one label map, aligned rigidly with SRI24 space.

    Parameters
    ----------
    path : path-like
        Label map.

    Returns
    -------
    TissueMaps
        Maps of the original size, as after rigid registration of a real brain.
    """
    classes, affine = read_label_map(str(path))
    indices = tensor(classes)
    fractions = torch.stack([(indices == index + 1).float() for index in range(len(CLASSES))])
    name = Path(path).name.removesuffix("_dseg.nii.gz")
    return TissueMaps(name, fractions, None, label_map_to_sri24(str(path)) @ affine)


def _coarse(maps: list[torch.Tensor], affine: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    """Halve the resolution of the group maps and smooth them for the coarse grid."""
    halved = F.avg_pool3d(torch.stack(maps), 2)
    # The first coarse voxel is centred between the first two fine ones.
    return smooth(halved, STEP * 0.375), affine @ nib.affines.from_matvec(np.diag([2, 2, 2]), [0.5] * 3)


@lru_cache(maxsize=1)
def _target() -> tuple[torch.Tensor, torch.Tensor]:
    """Resample the grouped template maps to the coarse grid, and return them with the points of the grid."""
    source = template_source()
    points = box_points()[::STEP, ::STEP, ::STEP].contiguous()
    maps = [sum(source.fractions[CLASSES.index(name)] for name in group) for group in GROUPS]
    return sample(*_coarse(maps, source.affine), points), points


def rotation(angles: torch.Tensor) -> torch.Tensor:
    """Compute the rotation matrix of three Euler angles (radians; about x, then y, then z)."""
    (cx, cy, cz), (sx, sy, sz) = torch.cos(angles), torch.sin(angles)
    one, zero = torch.ones_like(cx), torch.zeros_like(cx)
    about_x = torch.stack([one, zero, zero, zero, cx, -sx, zero, sx, cx]).reshape(3, 3)
    about_y = torch.stack([cy, zero, sy, zero, one, zero, -sy, zero, cy]).reshape(3, 3)
    about_z = torch.stack([cz, -sz, zero, sz, cz, zero, zero, zero, one]).reshape(3, 3)
    return about_z @ about_y @ about_x


@lru_cache(maxsize=64)
def label_map_to_sri24(path: str) -> np.ndarray:
    """Register a label map rigidly to SRI24 space.

    A similarity transform is fitted to the template, and its scale is then removed, since rigid registration
    preserves the size of a brain.

    Parameters
    ----------
    path : str
        Label map.

    Returns
    -------
    numpy.ndarray, shape (4, 4)
        From world coordinates of the label map to SRI24 world coordinates, mm.
    """
    classes, affine = read_label_map(path)
    indices = tensor(classes)
    maps = [sum((indices == CLASSES.index(name) + 1).float() for name in group) for group in GROUPS]
    moving, coarse_affine = _coarse(maps, affine)
    target, points = _target()
    weight = target.sum(0).flatten()
    centre_target = (points.reshape(-1, 3) * weight[:, None]).sum(0) / weight.sum()
    mass = np.argwhere(classes[::STEP, ::STEP, ::STEP] > 2).mean(0) * STEP
    centre_moving = tensor(affine[:3, :3] @ mass + affine[:3, 3]).float()

    # Angles in units of 0.1 rad and shifts in cm give parameters of one order of magnitude.
    parameters = torch.zeros(7, requires_grad=True)
    optimiser = torch.optim.LBFGS([parameters], lr=0.5, max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        turn = rotation(parameters[:3] * 0.1) * torch.exp(parameters[6] * 0.1)
        moved = (points - centre_target) @ turn.T + centre_moving + parameters[3:6] * 10.0
        value = ((sample(moving, coarse_affine, moved) - target) ** 2).mean() * 100
        value.backward()
        return value

    optimiser.step(loss)
    with torch.no_grad():
        turn = rotation(parameters[:3] * 0.1).double().cpu().numpy()
        shift = (centre_moving + parameters[3:6] * 10.0).double().cpu().numpy()
    pull = np.eye(4)
    pull[:3, :3] = turn
    pull[:3, 3] = shift - turn @ centre_target.double().cpu().numpy()
    return np.linalg.inv(pull)
