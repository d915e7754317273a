"""Label maps of preprocessed T1w scans: ``python -m bids_uad.simulation.labelling DATASET OUT LABELMAP ...``.

Known label maps are registered to the scan with an affine transform and a deformation by cubic B-splines
(Rueckert et al. 1999). Their mean gives the prior probability of every structure, and a Gaussian mixture the
likelihood of the intensities (Van Leemput et al. 1999); the prior of cortex, white matter and the fluid of
sulci is weak, so that the folding is that of the scan. Scans of any contrast can be simulated from them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage
from sklearn.mixture import GaussianMixture
from torch.nn import functional as F

from bids_uad.config import Parser
from bids_uad.dataset.sri24_scans import find_preprocessed
from bids_uad.errors import UserError
from bids_uad.images import save_image
from bids_uad.simulation.anatomy import (
    add_fluid,
    find_label_maps,
    icbm_to_sri24,
    label_map_to_sri24,
    read_label_map,
)
from bids_uad.simulation.contrast_transfer import tissue_levels
from bids_uad.simulation.deformation import MIDLINE
from bids_uad.simulation.spatial import (
    BOX,
    BOX_AFFINE,
    BOX_SHAPE,
    apply_axis,
    box_points,
    sample,
    smooth,
    spline_matrix,
    tensor,
    to_grid,
)
from bids_uad.space import to_image

SIDES = {
    24: (24,),
    4: (4, 43, 5, 44, 72),
    14: (14,),
    15: (15,),
    3: (3, 42),
    2: (2, 41, 25, 57, 77, 30, 62),
    10: (10, 49),
    11: (11, 50),
    12: (12, 51),
    13: (13, 52),
    26: (26, 58),
    17: (17, 53),
    18: (18, 54),
    8: (8, 47),
    7: (7, 46),
    16: (16, 85),
    28: (28, 60),
    31: (31, 63, 136, 137, 163, 164),
}
"""FreeSurfer's labels of both sides by the label of the left one, which both sides get."""
LABELS = tuple(SIDES)
FLUID = (24, 4, 14, 15)
CORTEX_TO_WHITE = {
    2: 1.0,
    7: 0.92,
    16: 0.85,
    28: 0.80,
    13: 0.72,
    10: 0.52,
    12: 0.25,
    11: 0.18,
    26: 0.15,
    31: -0.35,
}
"""T1w intensity of a structure on the scale from cortex (0, all others but fluid) to white matter (1)."""
FOLDED = tuple(LABELS.index(label) for label in (24, 3, 2))
STEP = 4
"""Spacing of the samples of the registration, voxels of the box."""
STAGES = ((None, 25), (24.0, 20), (12.0, 15))
"""Spacing of the knots (mm; None for the affine transform) and number of iterations of each stage."""
STIFFNESS = 5e-5
"""Weight of the squared differences between neighbouring knots (mm)."""
PRIOR_SIGMA_MM = 1.2
FOLDING_SIGMA_MM = 3.0
WEAK = 0.5
"""Weight of equal probabilities in the prior of cortex, white matter and fluid of sulci."""
DEEP_MM = 15.0
"""Depth below the brain edge from which fluid is that of the ventricles if most fluid around it is."""
CENTRAL = ((-24.0, -45.0, 0.0), (24.0, 30.0, 28.0))
"""Corners of the region whose fluid is that of the ventricles, ICBM152 world coordinates, mm."""


@dataclass(frozen=True)
class Atlas:
    """Label map that is registered to scans.

    Attributes
    ----------
    name : str
        Path.
    parts : torch.Tensor of uint8, shape (X, Y, Z)
        1 + index into `LABELS`; 0 for background.
    affine : numpy.ndarray, shape (4, 4)
        From voxels to SRI24, after rigid registration, mm.
    """

    name: str
    parts: torch.Tensor
    affine: np.ndarray

    def tissue(self) -> torch.Tensor:
        """Return the fractions of solid tissue and of white matter by T1w intensity, shape (2, X, Y, Z)."""
        table = torch.zeros(2, len(LABELS) + 1)
        for position, label in enumerate(LABELS, start=1):
            table[0, position] = float(label not in FLUID)
            table[1, position] = max(CORTEX_TO_WHITE.get(label, 0.0), 0.0)
        return table[:, self.parts.long()]


def central_region() -> tuple[slice, ...]:
    """Return every second voxel of the box in the region `CENTRAL`."""
    corners = nib.affines.apply_affine(np.linalg.inv(BOX_AFFINE) @ icbm_to_sri24(), CENTRAL)
    return tuple(
        slice(int(low), int(high), 2) for low, high in zip(corners.min(0), corners.max(0), strict=True)
    )


def nearest_atlases(atlases: Sequence[Atlas], tissue: torch.Tensor, count: int) -> list[Atlas]:
    """Select the label maps whose amount of fluid around the thalami is closest to that of a scan.

    Parameters
    ----------
    atlases : sequence of Atlas
        Label maps.
    tissue : torch.Tensor, shape (2, X, Y, Z)
        Fractions of solid tissue and of white matter of the scan, on the box.
    count : int
        Number of label maps to select.

    Returns
    -------
    list of Atlas
        The closest first.
    """
    region = central_region()
    points = box_points()[region].contiguous()
    wanted = float(tissue[0][region].mean())
    found = [float(sample(atlas.tissue()[:1], atlas.affine, points).mean()) for atlas in atlases]
    order = np.argsort(np.abs(np.array(found) - wanted), kind="stable")
    return [atlases[position] for position in order[:count]]


def read_atlas(path: str) -> Atlas:
    """Read a label map with FreeSurfer's labels, and register it rigidly to SRI24.

    Parameters
    ----------
    path : str
        Label map.

    Returns
    -------
    Atlas
        Label map, in which left and right have the same label.

    Raises
    ------
    InputError
        If it has no cortex or no white matter.
    """
    classes, affine = read_label_map(path)
    image = nib.as_closest_canonical(nib.load(path))
    corner = np.rint(np.linalg.inv(image.affine) @ affine[:, 3])[:3].astype(int)
    labels = np.asarray(image.dataobj).astype(np.int32)
    labels = labels[tuple(slice(c, c + n) for c, n in zip(corner, classes.shape, strict=True))]
    parts = np.zeros(labels.shape, np.uint8)
    for position, label in enumerate(LABELS, start=1):
        parts[np.isin(labels, SIDES[label])] = position
    if not (parts == LABELS.index(24) + 1).any():
        # Fluid is the first of the classes of `add_fluid` as well.
        parts = add_fluid(parts)
    return Atlas(path, tensor(parts), label_map_to_sri24(path) @ affine)


@dataclass(frozen=True)
class TissueIntensities:
    """Intensities of fluid, grey and white matter of a scan.

    Attributes
    ----------
    means, stds : numpy.ndarray, shape (3,)
        Mean and standard deviation, in ascending order of the means.
    """

    means: np.ndarray
    stds: np.ndarray

    def fractions(self, scan: np.ndarray) -> np.ndarray:
        """Return the fractions of solid tissue and of white matter (2, X, Y, Z), linear between the means."""
        fluid, grey, white = self.means
        return np.stack(
            [np.clip((scan - fluid) / (grey - fluid), 0, 1), np.clip((scan - grey) / (white - grey), 0, 1)]
        ).astype(np.float32)

    def likelihood(self, scan: np.ndarray, label: int) -> np.ndarray:
        """Return the likelihood of the intensities in a structure."""
        fluid, grey, white = self.means
        scale = CORTEX_TO_WHITE.get(label, 0.0)
        mean = fluid if label in FLUID else grey + scale * (white - grey if scale > 0 else grey - fluid)
        std = self.stds[0 if label in FLUID else 2 if label in (2, 7) else 1]
        # Fluid is darker than its partial volumes, and vessels are brighter than white matter.
        scan = np.maximum(scan, mean) if label in FLUID else np.minimum(scan, mean) if label == 2 else scan
        return np.exp(-0.5 * ((scan - mean) / std) ** 2) / std + 1e-3 / std


def fit_intensities(scan: np.ndarray, brain: np.ndarray) -> tuple[np.ndarray, TissueIntensities]:
    """Even out the intensity of white matter, and fit a mixture of three normal distributions.

    Parameters
    ----------
    scan : numpy.ndarray, shape (X, Y, Z)
        T1w intensities.
    brain : numpy.ndarray of bool, shape (X, Y, Z)
        Brain mask.

    Returns
    -------
    scan : numpy.ndarray, shape (X, Y, Z)
        Scan without the remaining bias field.
    intensities : TissueIntensities
        Fitted intensities.
    """
    _, grey, white = tissue_levels(scan, brain)
    core = brain & (scan > (grey + white) / 2) & (scan < 1.3 * white)
    weight = smooth(tensor(core.astype(np.float32)), 12.0)
    level = smooth(tensor((scan * core).astype(np.float32)), 12.0) / weight.clamp_min(1e-3) / white
    field = torch.where(weight > 0.02, level, torch.ones(())).clamp(0.8, 1.2).cpu().numpy()
    scan = scan / field
    values = scan[brain][::37, None]
    start = np.array(tissue_levels(scan, brain))[:, None]
    mixture = GaussianMixture(3, means_init=start, max_iter=30, random_state=0).fit(values)
    order = np.argsort(mixture.means_[:, 0])
    means, stds = mixture.means_[order, 0], np.sqrt(mixture.covariances_[order, 0, 0])
    # A mixture whose components do not separate is replaced by the clusters.
    if (np.diff(means) < 0.5 * (start[2, 0] - start[1, 0])).any():
        means, stds = start[:, 0], np.full(3, (start[2, 0] - start[1, 0]) / 3)
    return scan, TissueIntensities(means, np.clip(stds, 0.15 * (means[2] - means[1]), means[2] - means[1]))


@dataclass(frozen=True)
class Transform:
    """Affine transform and deformation, from the box to a label map.

    Attributes
    ----------
    linear : torch.Tensor, shape (3, 3)
        Linear part about the middle of the brain.
    shift : torch.Tensor, shape (3,)
        Shift, mm.
    fields : tuple of (torch.Tensor, float)
        Knots of cubic B-splines, shape (3, I, J, K), mm, and their spacing, mm.
    """

    linear: torch.Tensor
    shift: torch.Tensor
    fields: tuple[tuple[torch.Tensor, float], ...] = ()

    def positions(self, step: int = 1) -> torch.Tensor:
        """Return the position in the label map (mm) of every `step`-th voxel of the box, (X, Y, Z, 3)."""
        centre = torch.tensor([MIDLINE, 107.0, 77.0])
        points = box_points()[::step, ::step, ::step]
        moved = (points - centre) @ self.linear.T + centre + self.shift
        for knots, spacing in self.fields:
            for axis, size in enumerate(BOX_SHAPE, start=1):
                knots = apply_axis(knots, spline_matrix(size, spacing)[::step], axis)
            moved = moved + knots.permute(1, 2, 3, 0)
        return moved


def register(atlas: Atlas, tissue: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Register a label map to a scan.

    Parameters
    ----------
    atlas : Atlas
        Label map.
    tissue : torch.Tensor, shape (2, X, Y, Z)
        Fractions of solid tissue and of white matter of the scan, on the box.
    weight : torch.Tensor, shape (X, Y, Z)
        Weight of each voxel.

    Returns
    -------
    torch.Tensor, shape (X, Y, Z, 3)
        Position in the label map (SRI24 coordinates after its rigid registration, mm) of each voxel.
    """
    moving = smooth(atlas.tissue(), STEP * 0.5), atlas.affine
    fine = (slice(None, None, STEP),) * 3
    target = smooth(tissue, STEP * 0.5)[:, *fine], weight[fine]
    transform = Transform(torch.eye(3), torch.zeros(3))
    for spacing, iterations in STAGES:
        transform = _optimise(transform, moving, target, spacing, iterations)
    with torch.no_grad():
        return transform.positions()


def _optimise(
    before: Transform,
    moving: tuple[torch.Tensor, np.ndarray],
    target: tuple[torch.Tensor, torch.Tensor],
    spacing: float | None,
    iterations: int,
) -> Transform:
    """Minimise the squared difference of the tissue maps over the parameters of one stage."""
    if spacing is None:
        free = torch.zeros(12, requires_grad=True)
    else:
        knots = [spline_matrix(size, spacing).shape[1] for size in BOX_SHAPE]
        free = torch.zeros(3, *knots, requires_grad=True)
    optimiser = torch.optim.LBFGS([free], lr=0.5, max_iter=iterations, line_search_fn="strong_wolfe")

    def after(free: torch.Tensor) -> Transform:
        if spacing is None:
            return Transform(torch.eye(3) + free[:9].reshape(3, 3) * 0.1, free[9:] * 10.0)
        return replace(before, fields=(*before.fields, (free, spacing)))

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        moved = sample(*moving, after(free).positions(STEP).contiguous())
        value = ((moved - target[0]) ** 2 * target[1]).mean() * 100
        if spacing is not None:
            rough = sum(torch.diff(free, dim=axis).square().sum() for axis in (1, 2, 3))
            value = value + STIFFNESS * (spacing / 12.0) * rough
        value.backward()
        return value

    optimiser.step(loss)
    return after(free.detach())


def label_scan(scan: np.ndarray, brain: np.ndarray, atlases: Sequence[Atlas], count: int = 1) -> np.ndarray:
    """Label the structures of a T1w scan.

    Parameters
    ----------
    scan : numpy.ndarray, shape (X, Y, Z)
        Preprocessed T1w intensities, on the box.
    brain : numpy.ndarray of bool, shape (X, Y, Z)
        Brain mask.
    atlases : sequence of Atlas
        Known label maps.
    count : int, default=1
        Number of label maps that are registered, see :func:`nearest_atlases`.

    Returns
    -------
    numpy.ndarray of uint8, shape (X, Y, Z)
        FreeSurfer's labels of the left side, with a rim of fluid of 4 mm around the brain.
    """
    scan, intensities = fit_intensities(scan, brain)
    tissue = intensities.fractions(scan) * brain
    rim = ndimage.binary_dilation(brain, iterations=4)
    weight = np.where(brain, 1.0, np.where(rim, 0.3, 0.0)).astype(np.float32)
    chosen = nearest_atlases(atlases, tensor(tissue), count)
    prior = sum(_prior(atlas, register(atlas, tensor(tissue), tensor(weight))) for atlas in chosen) / len(
        chosen
    )
    labels = np.zeros(scan.shape, np.uint8)
    labels[brain] = _most_probable(scan[brain], brain, prior, intensities)
    _divide_fluid(labels, brain)
    labels[rim & ~brain] = 24
    return labels


def _halved(volume: torch.Tensor, sigma_mm: float) -> torch.Tensor:
    """Smooth a map on the box, and halve its resolution."""
    return smooth(F.avg_pool3d(volume.float()[None, None], 2)[0, 0], sigma_mm / 2)


def _doubled(volume: torch.Tensor) -> np.ndarray:
    """Interpolate a map of half the resolution on the box."""
    size = tuple(2 * n for n in volume.shape)
    doubled = F.interpolate(volume[None, None], size=size, mode="trilinear", align_corners=False)
    return doubled[0, 0].cpu().numpy()


def _prior(atlas: Atlas, points: torch.Tensor) -> torch.Tensor:
    """Return the smoothed maps of the structures of a registered label map, at half the resolution."""
    matrix = tensor(np.linalg.inv(atlas.affine)).float()
    index = (points @ matrix[:3, :3].T + matrix[:3, 3]).round().long()
    last = torch.tensor(atlas.parts.shape) - 1
    inside = ((index >= 0) & (index <= last)).all(-1)
    index = torch.minimum(index.clamp_min(0), last)
    parts = atlas.parts[index[..., 0], index[..., 1], index[..., 2]] * inside
    return torch.stack([_halved(parts == position, PRIOR_SIGMA_MM) for position in range(1, len(LABELS) + 1)])


def _most_probable(
    values: np.ndarray, brain: np.ndarray, prior: torch.Tensor, intensities: TissueIntensities
) -> np.ndarray:
    """Return the most probable label of each voxel of the brain."""
    prior = prior.clone()
    folded = list(FOLDED)
    total = prior[folded].sum(0)
    wide = smooth(prior[folded], FOLDING_SIGMA_MM / 2)
    fraction = wide / wide.sum(0).clamp_min(1e-6)
    prior[folded] = total * ((1 - WEAK) * fraction + WEAK / len(folded)) + 1e-3
    best, labels = np.zeros(values.shape, np.float32), np.full(values.shape, 24, np.uint8)
    for position, label in enumerate(LABELS):
        posterior = _doubled(prior[position])[brain] * intensities.likelihood(values, label)
        better = posterior > best
        best[better], labels[better] = posterior[better], label
    return labels


def _divide_fluid(labels: np.ndarray, brain: np.ndarray) -> None:
    """Assign deep fluid to the lateral ventricles or to the cisterns by the majority around it, in place."""
    depth = ndimage.distance_transform_edt(brain[::2, ::2, ::2]) * 2
    deep = (depth > DEEP_MM).repeat(2, 0).repeat(2, 1).repeat(2, 2)
    lateral, outer = (_halved(tensor(labels == label), 2.5) for label in (4, 24))
    either = deep & np.isin(labels, (4, 24))
    labels[either] = np.where(_doubled(lateral - outer) > 0, 4, 24)[either]


def label_file(image: Path, brain: Path, atlases: Sequence[Atlas], target: Path, count: int = 1) -> None:
    """Label a preprocessed T1w scan on the SRI24 grid, and write the label map.

    Parameters
    ----------
    image, brain : pathlib.Path
        Scan and brain mask.
    atlases : sequence of Atlas
        Known label maps.
    target : pathlib.Path
        New file.
    count : int, default=1
        Number of label maps that are registered.
    """
    scan = nib.load(image).get_fdata(dtype=np.float32)[BOX]
    mask = (np.asarray(nib.load(brain).dataobj) > 0)[BOX] & (scan > 0)
    labels = label_scan(scan, mask, atlases, count)
    save_image(to_image(to_grid(tensor(labels), np.uint8), np.uint8), target)


def build_parser() -> Parser:
    """Build the parser of the command."""
    parser = Parser(
        prog="python -m bids_uad.simulation.labelling",
        description="Label the structures of preprocessed T1w scans, as sources of simulated scans.",
    )
    parser.add_argument("dataset", type=Path, help="derivative dataset with preprocessed T1w scans")
    parser.add_argument("out", type=Path, help="folder of the label maps, <subject>_dseg.nii.gz")
    parser.add_argument(
        "labelmaps", nargs="+", help="label maps with FreeSurfer's labels, or folders of them"
    )
    parser.add_argument("--count", type=int, default=1, help="label maps to register to a scan (default 1)")
    parser.add_argument(
        "--participant-label", nargs="+", default=None, help="subjects, with or without sub- (default all)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Label all scans of a dataset that have no label map yet.

    Parameters
    ----------
    argv : list of str, optional
        Arguments; those of the process by default.

    Returns
    -------
    int
        Exit code: 0 on success, else that of the error.
    """
    args = build_parser().parse_args(argv)
    torch.set_num_threads(1)
    try:
        scans = find_preprocessed(args.dataset, "T1w")
        wanted = {f"sub-{label.removeprefix('sub-')}" for label in args.participant_label or ()}
        atlases = [read_atlas(path) for path in find_label_maps(args.labelmaps)]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    args.out.mkdir(parents=True, exist_ok=True)
    for scan in scans:
        target = args.out / f"{scan.key.removesuffix('_T1w')}_dseg.nii.gz"
        if (wanted and scan.subject not in wanted) or target.is_file():
            continue
        label_file(scan.image, scan.brain, atlases, target, args.count)
        print(target, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
