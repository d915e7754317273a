"""Brain extraction by a program that the user has installed, with weights that the user names."""

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
    Schedule,
    Volume,
    dice,
    register_affine,
    register_best,
    similarity,
)
from bids_uad.preprocessing.resampling import load_ants, resample, rotation_about, to_ants, translation

HD_BET_FOLDER = "hd-bet_params"  # in HOME: where the program looks for its weights


@dataclass(frozen=True)
class Program:
    """A program that finds brains.

    Attributes
    ----------
    commands : tuple of str
        Its names, best first.
    citation : str
        Key of its reference.
    title : str
    """

    commands: tuple[str, ...]
    citation: str
    title: str

    def find(self) -> str:
        """Say where it lies.

        Raises
        ------
        UnavailableError
            If it is not installed.
        """
        for command in self.commands:
            if found := shutil.which(command):
                return found
        raise UnavailableError(
            f"--brain-extraction: {' or '.join(self.commands)} is not on the PATH; install {self.title}, or "
            "leave the option out for the built-in extraction"
        )


PROGRAMS = {
    "synthstrip": Program(("mri_synthstrip", "nipreps-synthstrip"), "synthstrip", "SynthStrip"),
    "hd-bet": Program(("hd-bet",), "hdbet", "HD-BET"),
}


def run_external_program(name: str, weights: Path, image: Path, folder: Path) -> Path:
    """Run a program on a scan.

    Parameters
    ----------
    name : str
        Key of `PROGRAMS`.
    weights : pathlib.Path
    image : pathlib.Path
        Three-dimensional NIfTI file.
    folder : pathlib.Path
        Where its files go.

    Returns
    -------
    pathlib.Path
        Brain mask on the grid of the scan.

    Raises
    ------
    InputError
        If it fails or leaves no mask.
    """
    command, environment = [PROGRAMS[name].find()], dict(os.environ)
    if name == "hd-bet":
        brain, mask = folder / "brain.nii.gz", folder / "brain_bet.nii.gz"
        command += ["-i", str(image), "-o", str(brain), "-device", "cpu", "--disable_tta", "--save_bet_mask"]
        environment["HOME"] = str(weights.parent)
    else:
        mask = folder / "brain_mask.nii.gz"
        command += ["-i", str(image), "-m", str(mask), "--model", str(weights)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0 or not mask.is_file():
        said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
        raise InputError(
            image,
            f"{PROGRAMS[name].title} found no brain in it (exit code {done.returncode}: {said})",
            "give a brain mask, or leave --brain-extraction out",
        )
    return mask


COMBINED, TEMPLATE, NETWORK = "combined", "template", "network"
"""Built in: registration of the template, the network of this package, or both."""


@dataclass(frozen=True)
class Extraction:
    """What finds the brain in a whole head.

    Parameters
    ----------
    program : str
        One of `bids_uad.config.EXTRACTIONS`.
    weights : pathlib.Path, optional
        File, or HD-BET's folder.
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
    """Say where the network's weights lie that come with the package."""
    return Path(str(resources.files("bids_uad") / "data" / "extraction" / "weights.safetensors"))


def resolve_extraction(program: str, weights: Path | None) -> Extraction:
    """Refuse what cannot be run, before any scan is touched.

    Parameters
    ----------
    program : str
        One of `bids_uad.config.EXTRACTIONS`.
    weights : pathlib.Path, optional
        As named by the user; the network has packaged ones.

    Returns
    -------
    Extraction

    Raises
    ------
    UnavailableError
        If the program is not installed, or its weights are not named or not there.
    """
    if program == TEMPLATE:
        return Extraction(TEMPLATE)
    if program in (COMBINED, NETWORK) and weights is None:
        weights = packaged_weights()
    if program in PROGRAMS:
        PROGRAMS[program].find()
    if weights is None:
        raise UnavailableError(
            f"--brain-extraction {program} needs --brain-extraction-weights, since nothing is downloaded at "
            "run time"
        )
    if program == "hd-bet" and not (weights.is_dir() and weights.name == HD_BET_FOLDER):
        raise UnavailableError(
            f"--brain-extraction-weights {weights}: HD-BET wants its folder {HD_BET_FOLDER}"
        )
    if not weights.exists():
        raise UnavailableError(f"--brain-extraction-weights {weights} does not exist")
    return Extraction(program, weights)


CENTRE_BELOW_TOP_MM = 70.0
HEAD_SLAB_MM = (20.0, 120.0)
PITCHES = (-40.0, -20.0, 0.0, 20.0, 40.0)
FORWARD_MM = (-20.0, -10.0, 0.0, 10.0, 20.0)
UPWARD_MM = (-20.0, -10.0, 0.0, 10.0, 20.0)
STARTS = 2
SCALP_MM = (9.0, 14.0)
AIR_MM = 20.0
AIR_SPACING = 3.0
VAULT_FROM = 0.4
"""Share of the brain's height above which the template is given a skull: face and neck have none."""
CORE_VOXELS = 4
DARK_SHARE = 0.45
"""Share of the brain's median intensity below which a voxel near its surface is not brain."""
BRIGHT_SHARE = 1.25
"""And above which a voxel just outside the warped mask is not taken in."""
AGREEMENT = 0.9
"""Dice of the two masks below which they contradict each other."""
GENEROUS_MM = 1.0
"""How far the mean of two masks is widened: a lesion at the edge must not be lost."""
VOLUME_ML = (700.0, 2300.0)
"""Least and largest volume of a brain with its fluid; what is left of eyes, skull or neck adds to it."""
POSITION = Schedule((300, 150), (2, 1), (1, 0), 1.0)
SHAPE = Schedule((300, 150, 40))


def mask_from_background(data: np.ndarray) -> np.ndarray:
    """Take the brain mask of a skull-stripped scan from its background.

    Parameters
    ----------
    data : numpy.ndarray, three-dimensional

    Returns
    -------
    numpy.ndarray of bool
        Largest connected piece that is not background, holes filled: fluid that happens to be zero is inside.
    """
    return ndimage.binary_fill_holes(largest_component(data != background(data)))


def mask_volume(mask: np.ndarray, affine: np.ndarray) -> float:
    """Compute the volume of a mask.

    Parameters
    ----------
    mask : numpy.ndarray of bool, three-dimensional
    affine : numpy.ndarray, shape (4, 4)
        Voxel-to-world, mm.

    Returns
    -------
    float
        In mL.
    """
    return float(np.count_nonzero(mask) * abs(np.linalg.det(affine[:3, :3])) / 1000.0)


def has_brain_volume(mask: np.ndarray, affine: np.ndarray) -> bool:
    """Say whether the volume of a mask is one that brains have (`VOLUME_ML`).

    Parameters
    ----------
    mask, affine
        As of :func:`mask_volume`.

    Returns
    -------
    bool
    """
    return VOLUME_ML[0] <= mask_volume(mask, affine) <= VOLUME_ML[1]


def extract_brain(
    head: Volume, template: Volume | None, folder: Path, seen: np.ndarray | None = None
) -> tuple[np.ndarray, float | None]:
    """Find the brain in a whole-head scan.

    The template, a network, or both say where it is, and intensities refine the surface. Of two masks that
    agree the mean is taken, somewhat widened. If they contradict each other the network's is taken: a
    template that was stretched over a skull is far off.

    Parameters
    ----------
    head : Volume
        Scan in native space, T1w or T2w.
    template : Volume or None
        Reference image with its brain mask; None to go by the network alone.
    folder : pathlib.Path
        Where ANTs leaves its files.
    seen : numpy.ndarray of bool, optional
        What the network took for the brain, on the grid of `head`.

    Returns
    -------
    mask : numpy.ndarray of bool
        On the grid of `head`.
    agreement : float or None
        Dice of the two masks; None where there is only one.
    """
    coarse = head.coarse(SPACING)
    tissue = _foreground(coarse.data)
    coarse = Volume(correct_bias(coarse.data, coarse.affine, tissue, (30, 30)), coarse.affine)
    masks = []
    if template is not None:
        masks.append(_by_template(coarse, tissue, template, folder))
    if seen is not None:
        masks.append(resample(seen, head.affine, coarse.data.shape, coarse.affine) > 0.5)
    mask, *others = [_refine(mask, coarse.data) for mask in masks]
    agreement = None
    for other in others:
        agreement = dice(mask, other)
        if agreement >= AGREEMENT:
            mask = _agreed(mask, other)
        elif other.any():
            mask = other
    mask = resample(mask, coarse.affine, head.data.shape, head.affine) > 0.5
    return ndimage.binary_fill_holes(largest_component(mask)), agreement


def _agreed(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Take the surface halfway between two masks, and go out a little."""
    depth = [
        ndimage.distance_transform_edt(mask) - ndimage.distance_transform_edt(~mask) for mask in (one, other)
    ]
    return (depth[0] + depth[1]) / 2 > -GENEROUS_MM / SPACING


def _by_template(coarse: Volume, tissue: np.ndarray, template: Volume, folder: Path) -> np.ndarray:
    """Register the skull-stripped template to a head and bring its mask along.

    The template is first given what it lacks, a dark skull, a bright scalp and dark air around the vault:
    without them nothing keeps a brain from being stretched over the whole head. Rigid (after a search over
    the pitch and place of the head), then affine, then deformable inside the brain, on 2 mm voxels; the mask
    of the template comes back through both.
    """
    brain = _padded(template.coarse(SPACING).cropped(0), int(AIR_MM / SPACING) + 2)
    vault = _with_skull(brain)
    shift = translation(_brain_centre(tissue, coarse.affine) - brain.centre())
    start = _position(vault, coarse, shift, brain.centre(), folder)
    affine = register_affine(vault, coarse, start, folder, SHAPE)
    likely, likely_affine = _deform(brain, coarse, affine, folder)
    back = np.linalg.inv(affine)
    return resample(likely, likely_affine, coarse.data.shape, coarse.affine, back) > 0.5


def air_mask(head: Volume) -> np.ndarray:
    """Find the air around a head, well away from the skin.

    Parameters
    ----------
    head : Volume
        Whole-head scan.

    Returns
    -------
    numpy.ndarray of bool
        On its grid.
    """
    coarse = head.coarse(AIR_SPACING)
    tissue = ndimage.binary_dilation(_foreground(coarse.data), iterations=3)
    return resample(tissue, coarse.affine, head.data.shape, head.affine, order=0, extend=True) < 0.5


def _with_skull(brain: Volume) -> Volume:
    """Draw skull, scalp and air around the vault of a skull-stripped template."""
    distance = ndimage.distance_transform_edt(~brain.mask) * SPACING
    drawn = np.where(brain.mask, brain.data, 0.0)
    scalp = (distance > SCALP_MM[0]) & (distance <= SCALP_MM[1])
    drawn[scalp] = 1.2 * np.percentile(brain.data[brain.mask], 95)
    height = np.argwhere(brain.mask)[:, 2]
    # The reference is on the SRI24 grid, whose third axis points up.
    above = np.arange(brain.mask.shape[2]) > height.min() + VAULT_FROM * np.ptp(height)
    region = brain.mask | ((distance <= AIR_MM) & above)
    return Volume(ndimage.gaussian_filter(drawn, 0.5), brain.affine, region)


def _position(vault: Volume, head: Volume, shift: np.ndarray, origin: np.ndarray, folder: Path) -> np.ndarray:
    """Try pitches and shifts exhaustively on 6 mm voxels, then register rigidly from the best of them."""
    candidates = [
        translation(np.array([0.0, forward, upward])) @ shift @ rotation_about(origin, (pitch, 0.0, 0.0))
        for pitch, forward, upward in itertools.product(PITCHES, FORWARD_MM, UPWARD_MM)
    ]
    fixed, moving = vault.coarse(6.0), head.coarse(6.0)
    scores = [similarity(fixed, moving, pull) for pull in candidates]
    starts = [candidates[i] for i in np.argsort(scores)[::-1][:STARTS]]
    return register_best(vault.coarse(4.0), head.coarse(4.0), starts, folder, POSITION)[0]


def _deform(brain: Volume, head: Volume, affine: np.ndarray, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Deform the template's mask to the head, both on the template's grid."""
    ants = load_ants()
    near = ndimage.binary_dilation(brain.mask, iterations=2)
    box = Volume(np.where(brain.mask, brain.data, 0.0), brain.affine, near).cropped(2)
    template_mask = resample(brain.mask, brain.affine, box.data.shape, box.affine)
    target = to_ants(resample(head.data, head.affine, box.data.shape, box.affine, affine), box.affine)
    # ANTs would take commas and brackets in the path of the folder for its own syntax.
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
        likely = ants.apply_transforms(
            fixed=target,
            moving=to_ants(template_mask, box.affine),
            transformlist=warps,
            interpolator="linear",
        )
    return likely.numpy(), box.affine


def _padded(volume: Volume, margin: int) -> Volume:
    affine = volume.affine.copy()
    affine[:3, 3] -= affine[:3, :3] @ np.full(3, float(margin))
    return Volume(np.pad(volume.data, margin), affine, np.pad(volume.mask, margin))


def _refine(mask: np.ndarray, data: np.ndarray) -> np.ndarray:
    """Let the outer layer of the mask follow the intensities; the core is kept whatever it looks like.

    Dark voxels near the surface (skull, air, dura) are dropped, and a layer that is neither dark nor bright
    (fat) is taken in. Bright voxels are never dropped: they may be a lesion.
    """
    core = ndimage.binary_erosion(mask, iterations=CORE_VOXELS)
    if not core.any():
        return ndimage.binary_fill_holes(largest_component(mask))
    typical = float(np.median(data[core]))
    added = ndimage.binary_dilation(mask, iterations=1) & (data < BRIGHT_SHARE * typical)
    follow = ((mask | added) & (data > DARK_SHARE * typical)) | core
    follow = largest_component(ndimage.binary_opening(follow, _ball(2))) | core
    margin = 4
    closed = ndimage.binary_closing(np.pad(follow, margin), _ball(3))
    inner = (slice(margin, -margin),) * 3
    return ndimage.binary_fill_holes(closed[inner])


def _ball(radius: int) -> np.ndarray:
    return (np.square(np.indices((2 * radius + 1,) * 3) - radius)).sum(axis=0) <= radius**2


def _brain_centre(tissue: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Guess where the brain is from the top of the head (world z), since necks and chins vary."""
    world = affine[:3, :3] @ np.argwhere(tissue).T + affine[:3, 3:]
    top = np.percentile(world[2], 99.9)
    depth = top - world[2]
    slab = world[:, (depth > HEAD_SLAB_MM[0]) & (depth < HEAD_SLAB_MM[1])]
    centre = slab.mean(axis=1) if slab.shape[1] else world.mean(axis=1)
    return np.array([centre[0], centre[1], top - CENTRE_BELOW_TOP_MM])


def _foreground(data: np.ndarray) -> np.ndarray:
    """Separate the head from air: Otsu's threshold, loosened, largest piece, holes filled."""
    values = np.clip(data, *np.percentile(data, [0.5, 99.0]))
    mask = values > 0.5 * _otsu(values)
    mask = largest_component(ndimage.binary_opening(mask, iterations=1))
    return ndimage.binary_fill_holes(ndimage.binary_closing(mask, iterations=2))


def _otsu(values: np.ndarray, bins: int = 256) -> float:
    counts, edges = np.histogram(values, bins=bins)
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    sums = np.cumsum(counts * centres)
    with np.errstate(invalid="ignore", divide="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(centres[np.nanargmax(between)])


def largest_component(mask: np.ndarray) -> np.ndarray:
    """Keep the largest connected piece of a mask; one that is empty stays so."""
    labels, count = ndimage.label(mask)
    if count == 0:
        return mask
    return labels == 1 + int(np.argmax(np.bincount(labels.ravel())[1:]))
