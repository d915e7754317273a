"""The SRI24 grid, the space of all anomaly maps.

240 x 240 x 155 voxels of 1 mm, stored left-posterior-superior (LPS) as in the BraTS data. Detectors
process axial slices, centre-cropped to 224 x 224.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING, Annotated

import numpy as np

from bids_uad.constraints import Interval

if TYPE_CHECKING:
    import nibabel as nib

NAME = "SRI24"
MNI = "MNI152NLin2009cAsym"
ORIG = "orig"
"""Names of the other spaces of outputs: the template, and the grid of the raw image."""
MNI_GRIDS = {
    "1": ((193, 229, 193), (-96.0, -132.0, -78.0)),
    "2": ((97, 115, 97), (-96.5, -132.5, -78.5)),
}
"""Grids of the template by voxel size (mm), as in TemplateFlow: shape, and first voxel centre (RAS+, mm)."""
MNI_CODE = 4
"""NIfTI code of both forms of images in the space of the template."""
SHAPE = (240, 240, 155)
AFFINE = np.array(
    [[-1.0, 0.0, 0.0, 0.0], [0.0, -1.0, 0.0, 239.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
)
VOXEL_MM3 = 1.0
CROP = 224
SliceSide = Annotated[int, Interval(16, CROP)]
"""Height or width of a window in a cropped slice, pixels."""
MARGIN = (SHAPE[0] - CROP) // 2
BRAIN_CENTRE = (112, 122)
"""Row and column of a cropped slice at the centre of the brain."""
TISSUES = ("csf", "ventricle", "cortex", "white", "deep", "brainstem")
"""Channels of the tissue priors.

`csf` is fluid outside the ventricles, `ventricle` includes choroid plexus, `cortex` and `white` include the
cerebellum, and `deep` is thalamus, basal ganglia, hippocampus and amygdala.
"""
TISSUE_FILE = "tissues_probseg.nii.gz"
CORTICAL = {
    "frontal": "frontal cortex",
    "parietal": "parietal cortex",
    "temporal": "temporal cortex",
    "occipital": "occipital cortex",
    "cingulate": "cingulate cortex",
    "insula": "insula",
}
"""Regions of the cerebral cortex, by lobe."""
REGIONS = (
    *CORTICAL.values(),
    *("frontal white matter", "parietal white matter", "temporal white matter", "occipital white matter"),
    *("deep white matter", "thalamus", "caudate nucleus", "putamen", "pallidum", "hippocampus", "amygdala"),
    *("lateral ventricle", "third ventricle", "fourth ventricle"),
    *("ventral diencephalon", "brain stem", "cerebellum"),
)
"""Channels of the region atlas."""
MIDLINE_REGIONS = ("third ventricle", "fourth ventricle", "brain stem")
"""Regions that are not divided by hemisphere."""
REGION_FILE = "regions_probseg.nii.gz"
CORTICAL_CLASS = "juxtacortical/cortical"
LESION_CLASSES = {
    "infratentorial": ("brain stem", "cerebellum", "fourth ventricle"),
    "deep grey matter": (
        *("thalamus", "caudate nucleus", "putamen", "pallidum", "hippocampus", "amygdala"),
        "ventral diencephalon",
    ),
    CORTICAL_CLASS: tuple(CORTICAL.values()),
    "periventricular": ("lateral ventricle",),
    "deep white matter": (),
}
"""Classes of lesions by their location, and the regions that define them; see :func:`lesion_classes`."""
CLASS_LIMITS = {"periventricular": (0.2, 3.0), CORTICAL_CLASS: (0.4, 1.0)}
"""Probability to which the regions of a class extend, and largest distance of its lesions from there in mm.

Chosen on simulated lesions in three segmented brains that are not part of the atlas, for the highest mean
sensitivity of the classes; higher probabilities lose the narrow parts of the ventricles.
"""
PRIOR_STEP = 3
PRIOR_START = (40, 30, 0)
PRIOR_SHAPE = (54, 67, 52)
"""Grid of the stored priors: spacing and first voxel in voxels of the SRI24 grid, whose midplane (first index
119.5) is also that of this grid, and shape."""
PRIOR_AFFINE = AFFINE @ np.array(
    [[3.0, 0, 0, PRIOR_START[0]], [0, 3.0, 0, PRIOR_START[1]], [0, 0, 3.0, PRIOR_START[2]], [0, 0, 0, 1.0]]
)


def to_slices(volume: np.ndarray) -> np.ndarray:
    """Convert a volume on the SRI24 grid to cropped axial slices.

    Parameters
    ----------
    volume : numpy.ndarray, shape (240, 240, 155)
        Image or mask.

    Returns
    -------
    numpy.ndarray, shape (155, 224, 224)
        A view, slice axis first.

    Raises
    ------
    ValueError
        If the volume is not on the SRI24 grid.
    """
    if volume.shape != SHAPE:
        raise ValueError(f"expected a volume of shape {SHAPE}, got {volume.shape}")
    inner = slice(MARGIN, MARGIN + CROP)
    return np.moveaxis(volume[inner, inner, :], -1, 0)


def from_slices(slices: np.ndarray) -> np.ndarray:
    """Convert cropped axial slices to a volume on the SRI24 grid; the margin is 0.

    Parameters
    ----------
    slices : numpy.ndarray, shape (155, 224, 224)
        Output of :func:`to_slices`.

    Returns
    -------
    numpy.ndarray, shape (240, 240, 155)
        Same dtype as the input.
    """
    expected = (SHAPE[2], CROP, CROP)
    if slices.shape != expected:
        raise ValueError(f"expected slices of shape {expected}, got {slices.shape}")
    inner = slice(MARGIN, MARGIN + CROP)
    volume = np.zeros(SHAPE, dtype=slices.dtype)
    volume[inner, inner, :] = np.moveaxis(slices, 0, -1)
    return volume


def to_image(volume: np.ndarray, dtype: type = np.float32) -> nib.Nifti1Image:
    """Create a NIfTI image from an array on the SRI24 grid (sform and qform code 2: aligned).

    Parameters
    ----------
    volume : numpy.ndarray, shape (240, 240, 155)
        Voxel values.
    dtype : type, default=numpy.float32
        Type on disk; see :func:`bids_uad.images.make_image`.

    Returns
    -------
    nibabel.Nifti1Image
        Image with the affine of the SRI24 grid.

    Raises
    ------
    ValueError
        If the volume is not on the SRI24 grid, or `dtype` is not supported.
    """
    from bids_uad.images import make_image

    if volume.shape != SHAPE:
        raise ValueError(f"expected a volume of shape {SHAPE}, got {volume.shape}")
    return make_image(volume, AFFINE, dtype, code=2)


@dataclass(frozen=True)
class OutputSpace:
    """Space that outputs are written in besides SRI24.

    Parameters
    ----------
    name : {"MNI152NLin2009cAsym", "orig"}
        Template, or the space of the raw image.
    resolution : {"1", "2"}, optional
        Voxel size of the template's grid in mm, if the names of the outputs state it (`res-`). Otherwise it
        is 1 mm.
    """

    name: str
    resolution: str | None = None

    @property
    def is_template(self) -> bool:
        """Whether the space is that of a template."""
        return self.name == MNI

    @property
    def entities(self) -> dict[str, str]:
        """Entities in the names of outputs, by pybids name."""
        return {"space": self.name} | ({"resolution": self.resolution} if self.resolution else {})

    @property
    def grid(self) -> tuple[tuple[int, int, int], np.ndarray]:
        """Shape and affine of the template's grid."""
        size = self.resolution or "1"
        shape, origin = MNI_GRIDS[size]
        affine = np.diag([float(size)] * 3 + [1.0])
        affine[:3, 3] = origin
        return shape, affine

    def kind(self, name: str) -> str:
        """Return the key of an output in this space, such as `mask_MNI152NLin2009cAsym_res-2`."""
        return f"{name}_{self.name}" + (f"_res-{self.resolution}" if self.resolution else "")


def output_spaces(names: Iterable[str]) -> tuple[OutputSpace, ...]:
    """Return the spaces that ``--output-spaces`` adds to SRI24.

    Parameters
    ----------
    names : iterable of str
        Spaces as in fMRIPrep, see :data:`bids_uad.config.SpaceName`: `MNI152NLin2009cAsym` may be followed by
        one or more `:res-1` or `:res-2`; `anat` and `T1w` are read as `orig`.

    Returns
    -------
    tuple of OutputSpace
        Each space once; SRI24 is not among them.
    """
    spaces = []
    for text in names:
        name, *modifiers = text.split(":")
        if name == MNI:
            spaces += [OutputSpace(MNI, item.removeprefix("res-")) for item in modifiers] or [
                OutputSpace(MNI)
            ]
        elif name != NAME:
            spaces.append(OutputSpace(ORIG))
    return tuple(dict.fromkeys(spaces))


@lru_cache(maxsize=1)
def icbm_to_sri24() -> np.ndarray:
    """Read the affine from ICBM152 to SRI24 world coordinates.

    It was estimated with MNI152NLin2009aSym and is also used for MNI152NLin2009cAsym: both are averages of
    the same 152 brains in one coordinate system.

    Returns
    -------
    numpy.ndarray, shape (4, 4)
        Transform of RAS+ coordinates in mm. Read-only.
    """
    path = resources.files("bids_uad") / "data" / "template" / "icbm152_to_sri24.json"
    affine = np.array(json.loads(path.read_text(encoding="utf-8"))["affine"])
    affine.flags.writeable = False
    return affine


def _read_atlas(name: str) -> np.ndarray:
    """Read an image of the built-in atlas, in percent, uint8, shape (channels, *PRIOR_SHAPE)."""
    from bids_uad.images import load_image

    with resources.as_file(resources.files("bids_uad") / "data" / "atlas" / name) as path:
        return np.moveaxis(np.asarray(load_image(path).dataobj), -1, 0)


def tissue_priors() -> np.ndarray:
    """Interpolate the tissue priors of the built-in atlas to the SRI24 grid; the result takes 214 MB.

    Returns
    -------
    numpy.ndarray of float32, shape (6, 240, 240, 155)
        Probability of each tissue of `TISSUES`, from 0 to 1, rounded to 0.01 at the stored voxels; their sum
        is at most 1, but for rounding, and 0 far from the brain. Symmetric about the midplane, so reversing
        the second axis swaps left and right.
    """
    return _to_sri24(_read_atlas(TISSUE_FILE).astype(np.float32) / 100)


def _to_sri24(maps: np.ndarray) -> np.ndarray:
    """Interpolate maps of the built-in atlas, shape (channels, *PRIOR_SHAPE), to the SRI24 grid."""
    for axis, (start, size) in enumerate(zip(PRIOR_START, SHAPE, strict=True), 1):
        weights = _linear_weights((np.arange(size) - start) / PRIOR_STEP, maps.shape[axis])
        maps = np.moveaxis(np.tensordot(weights, maps, (1, axis)), 0, axis)
    return np.ascontiguousarray(maps)


def _linear_weights(positions: np.ndarray, size: int) -> np.ndarray:
    """Compute the matrix of linear interpolation of `size` samples; the end samples are repeated."""
    distance = np.abs(np.clip(positions, 0, size - 1)[:, None] - np.arange(size)[None, :])
    return np.maximum(1 - distance, 0).astype(np.float32)


@lru_cache(maxsize=1)
def region_probabilities() -> np.ndarray:
    """Read the region atlas, on its own grid.

    Returns
    -------
    numpy.ndarray of uint8, shape (23, 54, 67, 52)
        Probability of each region of `REGIONS` in percent; voxel (i, j, k) is voxel
        `PRIOR_START + PRIOR_STEP * (i, j, k)` of the SRI24 grid. Read-only.
    """
    atlas = _read_atlas(REGION_FILE)
    atlas.flags.writeable = False
    return atlas


def probable_regions(voxels: np.ndarray, owner: np.ndarray) -> tuple[list[str | None], np.ndarray]:
    """Find the most probable region of groups of voxels, such as the components of an anomaly mask.

    Parameters
    ----------
    voxels : numpy.ndarray of int, shape (n, 3)
        Voxels of the SRI24 grid.
    owner : numpy.ndarray of int, shape (n,)
        Number of the group of each voxel, from 0.

    Returns
    -------
    regions : list of str or None
        Region with the highest mean probability in each group, with its hemisphere, such as
        ``left thalamus``; None for groups outside all regions.
    probabilities : numpy.ndarray of float64, shape (number of groups,)
        This probability, from 0 to 1.
    """
    atlas = region_probabilities()
    size = np.bincount(owner)
    index = _atlas_index(voxels)
    # The first axis of the grid runs from right to left.
    left = voxels[:, 0] >= SHAPE[0] / 2
    names, means = [], []
    for region, percent in zip(REGIONS, atlas.reshape(len(REGIONS), -1), strict=True):
        inside = percent[index]
        sides = {"": True} if region in MIDLINE_REGIONS else {"left ": left, "right ": ~left}
        for side, chosen in sides.items():
            names.append(f"{side}{region}")
            total = np.bincount(owner, weights=inside * chosen, minlength=size.size)
            means.append(total / np.maximum(size, 1) / 100)
    table = np.stack(means)
    best = table.argmax(0)
    highest = table.max(0)
    return [names[k] if p > 0 else None for k, p in zip(best, highest, strict=True)], highest


def _atlas_index(voxels: np.ndarray) -> np.ndarray:
    """Return the flat indices of the nearest voxels of the atlas for voxels of the SRI24 grid."""
    cells = np.rint((voxels - np.array(PRIOR_START)) / PRIOR_STEP).astype(int)
    return np.ravel_multi_index(tuple(np.clip(cells, 0, np.array(PRIOR_SHAPE) - 1).T), PRIOR_SHAPE)


def lesion_classes(voxels: np.ndarray, owner: np.ndarray) -> list[str | None]:
    """Classify groups of voxels, such as the components of an anomaly mask, by their location.

    The classes are those of the criteria for multiple sclerosis (Filippi et al. 2019), and deep grey
    matter. A group with the highest mean probability in the infratentorial regions, in deep grey matter or in
    the cerebral cortex has that class. Any other is periventricular if a voxel is close to the lateral
    ventricles, else juxtacortical if one is close to the cortex (`CLASS_LIMITS`), else in deep white matter.

    Parameters
    ----------
    voxels : numpy.ndarray of int, shape (n, 3)
        Voxels of the SRI24 grid.
    owner : numpy.ndarray of int, shape (n,)
        Number of the group of each voxel, from 0.

    Returns
    -------
    list of str or None
        Key of `LESION_CLASSES` of each group; None for groups outside all regions.
    """
    percent = region_probabilities().reshape(len(REGIONS), -1)[:, _atlas_index(voxels)]
    by_region = ("infratentorial", "deep grey matter", CORTICAL_CLASS)
    members = [np.isin(REGIONS, LESION_CLASSES[name]) for name in by_region]
    members.append(~np.any(members, axis=0))  # white matter, lateral and third ventricle
    totals = np.stack([np.bincount(owner, weights=percent[own].sum(0, dtype=float)) for own in members])
    reached = {
        name: np.bincount(owner, weights=_near(LESION_CLASSES[name], *limits)[tuple(voxels.T)]) > 0
        for name, limits in CLASS_LIMITS.items()
    }
    classes: list[str | None] = []
    for group, (largest, total) in enumerate(zip(totals.argmax(0), totals.sum(0), strict=True)):
        if total == 0:
            classes.append(None)
        elif largest < len(by_region):
            classes.append(by_region[largest])
        else:
            near = (name for name in CLASS_LIMITS if reached[name][group])
            classes.append(next(near, "deep white matter"))
    return classes


@lru_cache(maxsize=2)
def _near(regions: tuple[str, ...], probability: float, limit: float) -> np.ndarray:
    """Return the voxels of the SRI24 grid within a distance in mm of where regions have a probability."""
    from scipy.ndimage import distance_transform_edt

    chosen = [REGIONS.index(region) for region in regions]
    percent = _to_sri24(region_probabilities()[chosen].sum(0, dtype=np.float32)[None])[0]
    inside = percent >= 100 * probability
    near = np.zeros(SHAPE, dtype=bool)
    # A box with a margin, since a distance transform of the whole grid takes seconds.
    spans = [np.flatnonzero(inside.any(tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    margin = math.ceil(limit)
    box = tuple(slice(max(span[0] - margin, 0), span[-1] + margin + 1) for span in spans)
    near[box] = distance_transform_edt(~inside[box]) <= limit
    return near
