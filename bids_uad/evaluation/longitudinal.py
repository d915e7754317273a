"""Change of anomalies between two sessions: alignment, matched components, and limits of change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import nibabel as nib
import numpy as np
from scipy.cluster.hierarchy import DisjointSet

from bids_uad.preprocessing.registration import Volume, coregister
from bids_uad.space import VOXEL_MM3

MAX_RESIDUAL_MM = 2.0
"""Mean residual misalignment in mm above which sessions are not matched: small lesions would not overlap."""
NEW, GROWN, SHRUNK, GONE, UNCHANGED = CHANGES = ("new", "grown", "shrunk", "gone", "unchanged")
"""Changes of a lesion between two sessions."""


@dataclass(frozen=True)
class ChangeLimit:
    """Differences in volume that lesions of an unchanged brain seldom exceed in two scans.

    Parameters
    ----------
    volume : float
        Limit in mm3 for lesions in both sessions.
    fraction : float
        Limit for lesions in both sessions, as a fraction of their mean volume; the larger of both counts.
    single : float
        Limit in mm3 for lesions in one session only: those up to this volume are neither new nor gone.
    """

    volume: float
    fraction: float
    single: float

    def at(self, before: float, after: float) -> float:
        """Return the limit in mm3 for a lesion with these volumes in mm3; 0 if it is not in a session."""
        if not (before and after):
            return self.single
        return max(self.volume, self.fraction * (before + after) / 2)


CHANGE_LIMITS = {
    "T1w": ChangeLimit(160.0, 0.47, 920.0),
    "T2w": ChangeLimit(220.0, 0.22, 170.0),
    "FLAIR": ChangeLimit(370.0, 1.4, 5700.0),
}
"""Limits by modality: 95th percentiles in pairs of simulated scans of one brain in two positions and two
scanners, scored by the packaged PLS models (``benchmarks/results/sessions.tsv``)."""


@dataclass(frozen=True)
class Match:
    """Lesion in two sessions: components that overlap directly, or through others.

    Parameters
    ----------
    before, after : tuple of int
        Labels of its components in each session; empty if it has none.
    volume_before, volume_after : float
        Total volume of these components in mm3.
    overlap : float
        Volume in mm3 that belongs to components of both sessions.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    volume_before: float
    volume_after: float
    overlap: float = 0.0

    def change(self, limit: float) -> str:
        """Return the change of the lesion.

        Parameters
        ----------
        limit : float
            Difference in volume in mm3 up to which a lesion is unchanged.

        Returns
        -------
        str
            One of `CHANGES`. A lesion in one session only is `unchanged` up to the limit, too.
        """
        if abs(self.volume_after - self.volume_before) <= limit:
            return UNCHANGED
        if not (self.before and self.after):
            return GONE if self.before else NEW
        return GROWN if self.volume_after > self.volume_before else SHRUNK


def residual_misalignment(before: Volume, after: Volume) -> float:
    """Measure how far two images of one brain in SRI24 space are from being aligned.

    Parameters
    ----------
    before, after : Volume
        Skull-stripped images of one modality with their brain masks.

    Returns
    -------
    float
        Mean displacement in mm, over the brain of `before`, by the rigid transform that aligns the images.
    """
    pull = coregister(before, after)
    points = nib.affines.apply_affine(before.affine, np.argwhere(before.mask))
    return float(np.linalg.norm(nib.affines.apply_affine(pull, points) - points, axis=1).mean())


def match_components(before: np.ndarray, after: np.ndarray) -> list[Match]:
    """Match the components of two sessions by overlap.

    Components that share a voxel belong to one lesion, also if a lesion has split or lesions have merged.

    Parameters
    ----------
    before, after : numpy.ndarray of int, same shape
        Components of each session, labelled 1..n, in the same space.

    Returns
    -------
    list of Match
        By decreasing volume (the larger of both sessions). Each component belongs to one match.
    """
    sizes = [np.bincount(labels[labels > 0]) for labels in (before, after)]
    nodes = [(side, int(label)) for side in (0, 1) for label in np.flatnonzero(sizes[side])]
    lesions = DisjointSet(nodes)
    shared = (before > 0) & (after > 0)
    links, counts = np.unique(np.stack([before[shared], after[shared]]), axis=1, return_counts=True)
    overlaps = {}
    for one, other, count in zip(*links.tolist(), counts.tolist(), strict=True):
        lesions.merge((0, one), (1, other))
        overlaps[one] = overlaps.get(one, 0) + count
    matches = []
    for nodes in lesions.subsets():
        own = [tuple(sorted(label for side, label in nodes if side == wanted)) for wanted in (0, 1)]
        volumes = [float(sizes[side][list(own[side])].sum()) * VOXEL_MM3 for side in (0, 1)]
        overlap = sum(overlaps.get(label, 0) for label in own[0]) * VOXEL_MM3
        matches.append(Match(*own, *volumes, float(overlap)))
    return sorted(
        matches,
        key=lambda match: (-max(match.volume_before, match.volume_after), match.before, match.after),
    )


def number_lesions(pairs: Sequence[Sequence[Match]]) -> dict[tuple[int, int], int]:
    """Number the lesions of a series of sessions, so that a lesion has the same number in all of them.

    Parameters
    ----------
    pairs : sequence of sequence of Match
        Matches of the sessions 0 and 1, of 1 and 2, and so on.

    Returns
    -------
    dict of (int, int) to int
        Number of the lesion from 1, the largest first (in its largest session), by session and label of a
        component. Lesions that merge in one session have the same number in all.
    """
    lesions = DisjointSet()
    volumes: dict[tuple[tuple[int, int], int], float] = {}
    for session, matches in enumerate(pairs):
        for match in matches:
            nodes = [(session, label) for label in match.before]
            nodes += [(session + 1, label) for label in match.after]
            for node in nodes:
                lesions.add(node)
                lesions.merge(nodes[0], node)
    for session, matches in enumerate(pairs):
        for match in matches:
            first = (session, match.before[0]) if match.before else (session + 1, match.after[0])
            root = lesions[first]
            for number, volume in ((session, match.volume_before), (session + 1, match.volume_after)):
                # Both pairs of a session name its components, the second pair perhaps in other groups.
                if number == session + 1 or session == 0:
                    volumes[root, number] = volumes.get((root, number), 0.0) + volume
    largest: dict[tuple[int, int], float] = {}
    for (root, _), volume in volumes.items():
        largest[root] = max(largest.get(root, 0.0), volume)
    order = sorted(largest, key=lambda root: (-largest[root], root))
    numbers = {root: number for number, root in enumerate(order, start=1)}
    return {node: numbers[lesions[node]] for node in lesions}
