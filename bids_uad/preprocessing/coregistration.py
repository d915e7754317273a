"""The two registrations of the workflow: anchor to reference, and T2w to its anchor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bids_uad.preprocessing.refinement import refine_rigid
from bids_uad.preprocessing.registration import (
    Volume,
    centred_start,
    local_correlation,
    mask_overlap,
    register_best,
    register_rigid,
    rotated_starts,
    similarity,
)

POOR_OVERLAP = 0.80
POOR_SIMILARITY = 0.027
"""Mask overlap and similarity with the reference below which other starting positions are tried.

Brains overlap by 0.8 even when they lie askew; their similarity tells: 0.029 to 0.12 in place, 0.011 to 0.025
when turned by 20 degrees or more.
"""
RESTARTS = 3
MARGIN = 6
"""Voxels of 2 mm kept around a brain: black background costs time and teaches nothing."""
PAIR_SPACING, PAIR_MARGIN = 3.0, 3
"""Voxel edge (mm) at which two images of one person are compared, and voxels kept around the brain."""


def register_to_reference(
    reference: Volume, brain: Volume, folder: Path, *, asymmetric: bool = False
) -> tuple[np.ndarray, dict[str, Any]]:
    """Register a brain rigidly to the reference image.

    Starts from the two centres of mass; if the images are not alike then, or the masks overlap poorly (head
    tilted far back, header with the wrong orientation), from the best rotations of a coarse grid as well. The
    most similar result is refined.

    Parameters
    ----------
    reference, brain : Volume
        Both with masks, 0 outside them.
    folder : pathlib.Path
        Where ANTs leaves its files.
    asymmetric : bool
        Whether the reference is a brain with a left and a right, so that its mirror image is worth a try.

    Returns
    -------
    pull : numpy.ndarray, shape (4, 4)
        RAS+ matrix from reference points to scan points.
    qc : dict
        ``similarity``, ``mirrored_similarity`` (None for a symmetric reference), ``local_correlation``,
        ``mask_overlap``, ``restarted``.
    """
    fixed, moving = _coarse(reference), _coarse(brain)
    # Unmasked: both are brains on black, and the outline of the brain is good evidence.
    outline, moving_outline = Volume(fixed.data, fixed.affine), Volume(moving.data, moving.affine)
    pull = register_rigid(outline, moving_outline, centred_start(fixed, moving), folder)
    score = similarity(fixed, moving, pull)
    restarted = mask_overlap(fixed, moving, pull) < POOR_OVERLAP or score < POOR_SIMILARITY
    if restarted:
        for start in rotated_starts(fixed, moving, RESTARTS):
            other = register_rigid(outline, moving_outline, start, folder)
            other_score = similarity(fixed, moving, other)
            if other_score > score:
                pull, score = other, other_score
    pull = refine_rigid(fixed, moving, pull)
    return pull, {
        "similarity": round(similarity(fixed, moving, pull), 4),
        "mirrored_similarity": _mirrored(fixed, moving, pull, folder) if asymmetric else None,
        "local_correlation": round(local_correlation(fixed, moving, pull), 4),
        "mask_overlap": round(mask_overlap(fixed, moving, pull), 4),
        "restarted": restarted,
    }


def measure(fixed: Volume, moving: Volume, pull: np.ndarray, folder: Path | None = None) -> dict[str, Any]:
    """Give the figures of a transform that was found elsewhere.

    Parameters
    ----------
    fixed, moving : Volume
        `fixed` with its mask.
    pull : numpy.ndarray, shape (4, 4)
    folder : pathlib.Path, optional
        Where ANTs leaves its files. If given, the mirror image of `fixed` is registered, too.

    Returns
    -------
    dict
        As of :func:`register_to_anchor`.
    """
    fixed, moving = _coarse(fixed), moving.coarse()
    overlap = None if moving.mask is None else round(mask_overlap(fixed, moving, pull), 4)
    return {
        "similarity": round(similarity(fixed, moving, pull), 4),
        "mirrored_similarity": None if folder is None else _mirrored(fixed, moving, pull, folder),
        "local_correlation": round(local_correlation(fixed, moving, pull), 4),
        "mask_overlap": overlap,
        "restarted": False,
    }


def register_to_anchor(anchor: Volume, scan: Volume, folder: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """Register a T2w scan rigidly to the brain of its T1w scan.

    Similarity counts inside the anchor's brain only, so the T2w scan may be a whole head, and may cover a
    part of the brain. Starts from the scanner's coordinates, which one session shares, and from the two
    centres; the more similar result is kept. The anchor's mirror image is registered as well: two scans of
    one head agree better as they are, unless left and right are swapped in one of them.

    Parameters
    ----------
    anchor : Volume
        Brain with its mask.
    scan : Volume
        T2w; with its mask if skull-stripped.
    folder : pathlib.Path

    Returns
    -------
    pull : numpy.ndarray, shape (4, 4)
        RAS+ matrix from anchor points to scan points.
    qc : dict
        ``similarity``, ``mirrored_similarity``, ``local_correlation``, ``mask_overlap`` (None for a whole
        head), ``restarted``.
    """
    fixed, moving = _coarse(anchor), scan.coarse()
    pull, score = _register_same_head(fixed, moving, folder)
    overlap = None if moving.mask is None else round(mask_overlap(fixed, moving, pull), 4)
    return pull, {
        "similarity": round(score, 4),
        "mirrored_similarity": _mirrored(fixed, moving, pull, folder),
        "local_correlation": round(local_correlation(fixed, moving, pull), 4),
        "mask_overlap": overlap,
        "restarted": False,
    }


def register_same_head(anchor: Volume, scan: Volume, folder: Path) -> np.ndarray:
    """Find the way of :func:`register_to_anchor` alone, for scans whose agreement is not judged.

    Parameters
    ----------
    anchor, scan, folder
        As there.

    Returns
    -------
    numpy.ndarray, shape (4, 4)
        RAS+ matrix from anchor points to scan points.
    """
    return _register_same_head(_coarse(anchor), scan.coarse(), folder)[0]


def _register_same_head(fixed: Volume, moving: Volume, folder: Path) -> tuple[np.ndarray, float]:
    starts = [np.eye(4), centred_start(fixed, moving)]
    return register_best(fixed, moving, starts, folder)


def mirror_image(brain: Volume) -> Volume:
    """Swap left and right of a brain, about the middle of its grid."""
    sideways = int(np.argmax(np.abs(brain.affine[0, :3])))
    return Volume(np.flip(brain.data, sideways), brain.affine, np.flip(brain.mask, sideways))


def mirror_ratio(one: Volume, other: Volume) -> float:
    """Compare how well two images of one brain agree if one is mirrored, and if it is not.

    Brains are asymmetric, each in its own way. On 3 mm voxels the ratio was 0.43 to 0.61 for seven pairs of
    T1w and T2w images of one person, registered to the atlas each on its own (five with gliomas), and the
    inverse, at least 1.64, with one of them swapped. For six pairs of images of different people it was 0.86
    to 1.14.

    Parameters
    ----------
    one, other : Volume
        Brains with their masks, registered to the same atlas. Both registrations are refined.

    Returns
    -------
    float
        Similarity with the mirror image, divided by that with the image itself.
    """
    fixed = one.coarse(PAIR_SPACING).cropped(PAIR_MARGIN)
    moving = other.coarse(PAIR_SPACING).cropped(PAIR_MARGIN)
    scores = [
        similarity(brain, moving, refine_rigid(brain, moving, np.eye(4)))
        for brain in (mirror_image(fixed), fixed)
    ]
    return scores[0] / max(scores[1], 1e-6)


def _mirrored(fixed: Volume, moving: Volume, pull: np.ndarray, folder: Path) -> float:
    """Similarity of the mirror image of `fixed`, registered from where `fixed` itself came to lie."""
    return round(register_best(mirror_image(fixed), moving, [pull], folder)[1], 4)


def _coarse(brain: Volume) -> Volume:
    """A brain on the voxels it is registered on, without most of the black around it."""
    return brain.coarse().cropped(MARGIN)
