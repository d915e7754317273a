"""Brain masks: from the background of skull-stripped scans, and extracted from whole heads.

Whole heads are masked by template registration, by a network (`network`), by both combined, or by an external
program (SynthStrip, HD-BET).
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from contextlib import chdir
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from scipy import ndimage

from bids_uad.errors import InputError, UnavailableError
from bids_uad.preprocessing.check import background
from bids_uad.preprocessing.intensity_correction import correct_bias
from bids_uad.preprocessing.registration import (
    SPACING,
    RegistrationSchedule,
    Volume,
    dice,
    register_affine,
    register_best,
    similarity,
)
from bids_uad.preprocessing.resampling import load_ants, resample, rotation_about, to_ants, translation

COMBINED, TEMPLATE, NETWORK = "combined", "template", "network"
"""Built-in methods: template registration and network combined, or one of the two alone."""
HD_BET_FOLDER = "hd-bet_params"
"""Folder of HD-BET's weights; the program expects it in ``$HOME``."""
BRAIN_VOLUME_RANGE_ML = (700.0, 2300.0)
"""Smallest and largest plausible volume of a brain mask, which may include cerebrospinal fluid."""
MIN_AGREEMENT = 0.9
"""Dice of the template's and the network's mask below which the network's mask is used alone."""
DILATION_MM = 1.0
"""Dilation of the mean of the two masks, so that lesions at the edge of the brain are kept."""

CORE_VOXELS = 4
"""Depth (2 mm voxels) from which a mask is not changed by `_refine`."""
MIN_EDGE_INTENSITY = 0.45
"""Voxels near the surface are removed below this fraction of the median brain intensity: skull, air, dura."""
MAX_ADDED_INTENSITY = 1.25
"""Voxels next to the mask are added to it only below this fraction of the median brain intensity; brighter
ones are likely fat."""

# Search for the position of the head, and skull and scalp drawn around the template.
CENTRE_BELOW_TOP_MM = 70.0
HEAD_SLAB_MM = (20.0, 120.0)
PITCHES = (-40.0, -20.0, 0.0, 20.0, 40.0)  # degrees
FORWARD_MM = (-20.0, -10.0, 0.0, 10.0, 20.0)
UPWARD_MM = (-20.0, -10.0, 0.0, 10.0, 20.0)
STARTS = 2
SCALP_MM = (9.0, 14.0)
AIR_MM = 20.0
VAULT_HEIGHT = 0.4
"""Fraction of the brain's height above which skull and air are drawn: face and neck have no vault."""
AIR_SPACING_MM = 3.0
RIGID_SCHEDULE = RegistrationSchedule((300, 150), (2, 1), (1, 0), 1.0)
AFFINE_SCHEDULE = RegistrationSchedule((300, 150, 40))
AFFINE_SPACING = 3.0
"""Voxel edge (mm) of the affine registration, which the deformable one on 2 mm voxels follows."""


@dataclass(frozen=True)
class Program:
    """External program for brain extraction.

    Attributes
    ----------
    commands : tuple of str
        Names of the executable, in order of preference.
    citation : str
        Key in the bibliography.
    title : str
        Name in reports and messages.
    """

    commands: tuple[str, ...]
    citation: str
    title: str

    def executable(self) -> str:
        """Return the path of the first of `commands` that is on the PATH.

        Raises
        ------
        UnavailableError
            If none is installed.
        """
        for command in self.commands:
            if path := shutil.which(command):
                return path
        raise UnavailableError(
            f"--brain-extraction: {' or '.join(self.commands)} is not on the PATH; install {self.title}, or "
            "leave the option out for the built-in extraction"
        )


PROGRAMS = {
    "synthstrip": Program(("mri_synthstrip", "nipreps-synthstrip"), "synthstrip", "SynthStrip"),
    "hd-bet": Program(("hd-bet",), "hdbet", "HD-BET"),
}


@dataclass(frozen=True)
class Extraction:
    """Method of brain extraction for whole heads.

    Parameters
    ----------
    program : str
        One of `bids_uad.config.EXTRACTIONS`.
    weights : pathlib.Path, optional
        Weights file, or HD-BET's folder of weights. None for the template method.
    """

    program: str
    weights: Path | None = None

    @property
    def files(self) -> list[Path]:
        """All files of the weights."""
        if self.weights is None:
            return []
        if self.weights.is_dir():
            return sorted(path for path in self.weights.rglob("*") if path.is_file())
        return [self.weights]


def packaged_weights() -> Path:
    """Return the path of the network weights that come with the package."""
    return Path(str(resources.files("bids_uad") / "data" / "extraction" / "weights.safetensors"))


def resolve_extraction(program: str, weights: Path | None) -> Extraction:
    """Check that a brain-extraction method can be run, and find its weights.

    Parameters
    ----------
    program : str
        One of `bids_uad.config.EXTRACTIONS`.
    weights : pathlib.Path or None
        Weights named by the user. The built-in network has packaged ones.

    Returns
    -------
    Extraction
        Method and weights; both exist.

    Raises
    ------
    UnavailableError
        If the program is not installed, or its weights are not named or do not exist.
    """
    if program == TEMPLATE:
        return Extraction(TEMPLATE)
    if program in (COMBINED, NETWORK) and weights is None:
        weights = packaged_weights()
    if program in PROGRAMS:
        PROGRAMS[program].executable()
    if weights is None:
        raise UnavailableError(
            f"--brain-extraction {program} needs --brain-extraction-weights, since nothing is downloaded at "
            "run time"
        )
    if program == "hd-bet" and not (weights.is_dir() and weights.name == HD_BET_FOLDER):
        raise UnavailableError(
            f"--brain-extraction-weights {weights} must be HD-BET's folder {HD_BET_FOLDER}"
        )
    if not weights.exists():
        raise UnavailableError(f"--brain-extraction-weights {weights} does not exist")
    return Extraction(program, weights)


def mask_volume(mask: np.ndarray, affine: np.ndarray) -> float:
    """Compute the volume of a mask.

    Parameters
    ----------
    mask : numpy.ndarray of bool, three-dimensional
        Mask.
    affine : numpy.ndarray, shape (4, 4)
        Voxel-to-world, mm.

    Returns
    -------
    float
        Volume in mL.
    """
    return float(np.count_nonzero(mask) * abs(np.linalg.det(affine[:3, :3])) / 1000.0)


def has_brain_volume(mask: np.ndarray, affine: np.ndarray) -> bool:
    """Return whether the volume of a mask is plausible for a brain (`BRAIN_VOLUME_RANGE_ML`).

    Parameters
    ----------
    mask, affine
        As for :func:`mask_volume`.

    Returns
    -------
    bool
        True within the range, limits included.
    """
    return BRAIN_VOLUME_RANGE_ML[0] <= mask_volume(mask, affine) <= BRAIN_VOLUME_RANGE_ML[1]


def mask_from_background(data: np.ndarray) -> np.ndarray:
    """Derive the brain mask of a skull-stripped scan from its constant background.

    Parameters
    ----------
    data : numpy.ndarray, three-dimensional
        Skull-stripped scan.

    Returns
    -------
    numpy.ndarray of bool
        Largest connected component of the voxels that differ from the background, with holes filled, so that
        fluid with the value of the background is included.
    """
    return ndimage.binary_fill_holes(largest_component(data != background(data)))


def largest_component(mask: np.ndarray) -> np.ndarray:
    """Return the largest connected component (by faces) of a mask; an empty mask is returned unchanged."""
    labels, count = ndimage.label(mask)
    if count == 0:
        return mask
    return labels == 1 + int(np.argmax(np.bincount(labels.ravel())[1:]))


def air_mask(head: Volume) -> np.ndarray:
    """Segment the air around a head, at least 9 mm away from the skin.

    Parameters
    ----------
    head : Volume
        Whole-head scan.

    Returns
    -------
    numpy.ndarray of bool
        Air mask on the grid of the scan.
    """
    coarse = head.coarse(AIR_SPACING_MM)
    tissue = ndimage.binary_dilation(_head_mask(coarse.data), iterations=3)
    return resample(tissue, coarse.affine, head.data.shape, head.affine, order=0, extend=True) < 0.5


def extract_brain(
    head: Volume, template: Volume | None, folder: Path, network_mask: np.ndarray | None = None
) -> tuple[np.ndarray, float | None]:
    """Mask the brain of a whole-head scan by template registration, from a network's mask, or both.

    The surface of each mask is refined by the intensities (`_refine`). If both masks agree, their mean is
    used, dilated by 1 mm. If they do not (Dice below 0.9), the network's mask is used, since the template may
    have been stretched over the skull.

    Parameters
    ----------
    head : Volume
        T1w, T2w or FLAIR scan in native space.
    template : Volume or None
        Reference image with its brain mask. If None, only `network_mask` is used.
    folder : pathlib.Path
        Working folder for the files that ANTs writes.
    network_mask : numpy.ndarray of bool, optional
        Brain mask predicted by the network, on the grid of `head`. If None, only the template is used.

    Returns
    -------
    mask : numpy.ndarray of bool
        Brain mask on the grid of `head`.
    agreement : float or None
        Dice of the two masks; None if there is only one.
    """
    coarse = head.coarse(SPACING)
    tissue = _head_mask(coarse.data)
    coarse = Volume(correct_bias(coarse.data, coarse.affine, tissue, (30, 30)), coarse.affine)
    masks = []
    if template is not None:
        masks.append(_warp_template_mask(coarse, tissue, template, folder))
    if network_mask is not None:
        masks.append(resample(network_mask, head.affine, coarse.data.shape, coarse.affine) > 0.5)
    mask, *others = [_refine(mask, coarse.data) for mask in masks]
    agreement = None
    for other in others:
        agreement = dice(mask, other)
        if agreement >= MIN_AGREEMENT:
            mask = _mean_mask(mask, other)
        elif other.any():
            mask = other
    mask = resample(mask, coarse.affine, head.data.shape, head.affine) > 0.5
    return ndimage.binary_fill_holes(largest_component(mask)), agreement


def _refine(mask: np.ndarray, data: np.ndarray) -> np.ndarray:
    """Fit the outer layer of a mask to the intensities; the core (`CORE_VOXELS`) is kept.

    Dark voxels near the surface are removed, and adjacent voxels that are neither dark nor bright are added.
    Bright voxels of the mask are never removed: they may be a lesion.
    """
    core = ndimage.binary_erosion(mask, iterations=CORE_VOXELS)
    if not core.any():
        return ndimage.binary_fill_holes(largest_component(mask))
    typical = float(np.median(data[core]))
    added = ndimage.binary_dilation(mask, iterations=1) & (data < MAX_ADDED_INTENSITY * typical)
    refined = ((mask | added) & (data > MIN_EDGE_INTENSITY * typical)) | core
    refined = largest_component(ndimage.binary_opening(refined, _ball(2))) | core
    margin = 4
    closed = ndimage.binary_closing(np.pad(refined, margin), _ball(3))
    inner = (slice(margin, -margin),) * 3
    return ndimage.binary_fill_holes(closed[inner])


def _ball(radius: int) -> np.ndarray:
    return (np.square(np.indices((2 * radius + 1,) * 3) - radius)).sum(axis=0) <= radius**2


def _mean_mask(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Average the signed distance maps of two masks, and dilate the result by `DILATION_MM`."""
    depth = [
        ndimage.distance_transform_edt(mask) - ndimage.distance_transform_edt(~mask) for mask in (one, other)
    ]
    return (depth[0] + depth[1]) / 2 > -DILATION_MM / SPACING


def _head_mask(data: np.ndarray) -> np.ndarray:
    """Segment the head: half of Otsu's threshold, largest component, holes filled."""
    values = np.clip(data, *np.percentile(data, [0.5, 99.0]))
    mask = values > 0.5 * _otsu(values)
    mask = largest_component(ndimage.binary_opening(mask, iterations=1))
    return ndimage.binary_fill_holes(ndimage.binary_closing(mask, iterations=2))


def _otsu(values: np.ndarray, bins: int = 256) -> float:
    """Compute the threshold that maximises the between-class variance (Otsu 1979)."""
    counts, edges = np.histogram(values, bins=bins)
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    sums = np.cumsum(counts * centres)
    with np.errstate(invalid="ignore", divide="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(centres[np.nanargmax(between)])


def _warp_template_mask(head: Volume, tissue: np.ndarray, template: Volume, folder: Path) -> np.ndarray:
    """Register the skull-stripped template to a head, and warp its brain mask to the head.

    A dark skull, a bright scalp and dark air are drawn around the template first; without them the brain
    would be stretched over the whole head. Registration is rigid (after a search over pitch and position),
    then affine on 3 mm voxels, then deformable within the brain on 2 mm voxels.
    """
    brain = _padded(template.coarse(SPACING).cropped(0), int(AIR_MM / SPACING) + 2)
    vault = _with_skull(brain)
    shift = translation(_brain_centre(tissue, head.affine) - brain.centre())
    start = _search_position(vault, head, shift, brain.centre(), folder)
    coarse = [volume.coarse(AFFINE_SPACING) for volume in (vault, head)]
    affine = register_affine(*coarse, start, folder, AFFINE_SCHEDULE)
    probability, grid = _deform(brain, head, affine, folder)
    return resample(probability, grid, head.data.shape, head.affine, np.linalg.inv(affine)) > 0.5


def _padded(volume: Volume, margin: int) -> Volume:
    affine = volume.affine.copy()
    affine[:3, 3] -= affine[:3, :3] @ np.full(3, float(margin))
    return Volume(np.pad(volume.data, margin), affine, np.pad(volume.mask, margin))


def _with_skull(brain: Volume) -> Volume:
    """Draw skull, scalp and air around the vault of a skull-stripped template."""
    distance = ndimage.distance_transform_edt(~brain.mask) * SPACING
    drawn = np.where(brain.mask, brain.data, 0.0)
    scalp = (distance > SCALP_MM[0]) & (distance <= SCALP_MM[1])
    drawn[scalp] = 1.2 * np.percentile(brain.data[brain.mask], 95)
    height = np.argwhere(brain.mask)[:, 2]
    # The reference is on the SRI24 grid, whose third axis points up.
    above = np.arange(brain.mask.shape[2]) > height.min() + VAULT_HEIGHT * np.ptp(height)
    region = brain.mask | ((distance <= AIR_MM) & above)
    return Volume(ndimage.gaussian_filter(drawn, 0.5), brain.affine, region)


def _brain_centre(tissue: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Estimate the centre of the brain from the top of the head (world z), since necks and chins vary."""
    world = affine[:3, :3] @ np.argwhere(tissue).T + affine[:3, 3:]
    top = np.percentile(world[2], 99.9)
    depth = top - world[2]
    slab = world[:, (depth > HEAD_SLAB_MM[0]) & (depth < HEAD_SLAB_MM[1])]
    centre = slab.mean(axis=1) if slab.shape[1] else world.mean(axis=1)
    return np.array([centre[0], centre[1], top - CENTRE_BELOW_TOP_MM])


def _search_position(
    vault: Volume, head: Volume, shift: np.ndarray, origin: np.ndarray, folder: Path
) -> np.ndarray:
    """Compare pitches and shifts on 6 mm voxels, then register rigidly from the `STARTS` best of them."""
    candidates = [
        translation(np.array([0.0, forward, upward])) @ shift @ rotation_about(origin, (pitch, 0.0, 0.0))
        for pitch, forward, upward in itertools.product(PITCHES, FORWARD_MM, UPWARD_MM)
    ]
    fixed, moving = vault.coarse(6.0), head.coarse(6.0)
    scores = [similarity(fixed, moving, pull) for pull in candidates]
    starts = [candidates[i] for i in np.argsort(scores)[::-1][:STARTS]]
    return register_best(vault.coarse(4.0), head.coarse(4.0), starts, folder, RIGID_SCHEDULE)[0]


def _deform(brain: Volume, head: Volume, affine: np.ndarray, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Deform the template's mask to the head (SyN); return it and its affine, on the template's grid."""
    ants = load_ants()
    near = ndimage.binary_dilation(brain.mask, iterations=2)
    box = Volume(np.where(brain.mask, brain.data, 0.0), brain.affine, near).cropped(2)
    template_mask = resample(brain.mask, brain.affine, box.data.shape, box.affine)
    target = to_ants(resample(head.data, head.affine, box.data.shape, box.affine, affine), box.affine)
    # ANTs parses commas and brackets in a path as its own syntax, so it gets relative names.
    with chdir(folder):
        result = ants.registration(
            fixed=to_ants(box.data, box.affine),
            moving=target,
            type_of_transform="SyNOnly",
            initial_transform="Identity",
            mask=to_ants(box.mask, box.affine),
            mask_all_stages=True,
            outprefix="syn_",
            reg_iterations=(40, 30, 0),
        )
        warps = [name for name in result["invtransforms"] if not name.endswith(".mat")]
        probability = ants.apply_transforms(
            fixed=target,
            moving=to_ants(template_mask, box.affine),
            transformlist=warps,
            interpolator="linear",
        )
    return probability.numpy(), box.affine


def run_external_program(name: str, weights: Path, image: Path, folder: Path) -> Path:
    """Run an external brain-extraction program on a scan.

    Parameters
    ----------
    name : str
        Key of `PROGRAMS`.
    weights : pathlib.Path
        Weights file (SynthStrip) or folder (HD-BET).
    image : pathlib.Path
        Three-dimensional NIfTI file.
    folder : pathlib.Path
        Working folder for the output files.

    Returns
    -------
    pathlib.Path
        Brain mask on the grid of the scan.

    Raises
    ------
    InputError
        If the program fails or writes no mask.
    """
    command, environment = [PROGRAMS[name].executable()], dict(os.environ)
    if name == "hd-bet":
        brain, mask = folder / "brain.nii.gz", folder / "brain_bet.nii.gz"
        command += ["-i", str(image), "-o", str(brain), "-device", "cpu", "--disable_tta", "--save_bet_mask"]
        environment["HOME"] = str(weights.parent)
    else:
        mask = folder / "brain_mask.nii.gz"
        command += ["-i", str(image), "-m", str(mask), "--model", str(weights)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if result.returncode != 0 or not mask.is_file():
        message = (result.stderr.strip() or result.stdout.strip() or "no message").splitlines()[-1]
        raise InputError(
            image,
            f"{PROGRAMS[name].title} wrote no brain mask (exit code {result.returncode}: {message})",
            "provide a brain mask, or leave --brain-extraction out",
        )
    return mask
