"""Training scans of PLS: healthy scans that are varied, and synthetic lesions that are painted into them.

All shapes are three-dimensional, so that neighbouring slices agree. Intensities of lesions are drawn relative
to the levels of fluid, grey and white matter of the scan, from which its contrast follows. Intensities of
real lesions are never used; shapes of real lesions may be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from bids_uad.constraints import (
    Constrained,
    Count,
    CountOrZero,
    Items,
    NonNegative,
    PositiveRange,
    Probability,
    invalid,
)
from bids_uad.images import UPPER_PERCENTILE
from bids_uad.methods.base import PaintedScan, Scan
from bids_uad.methods.pls.volumes import (
    Box,
    bounding_box,
    chance,
    draw_voxels,
    ellipsoid,
    erode_in_plane,
    expand_shape,
    gaussian_smooth,
    integer,
    log_uniform,
    normal_field,
    uniform,
    warp,
)
from bids_uad.space import TISSUES, tissue_priors, to_slices

FLUID, GREY, WHITE = 1, 2, 3
"""Tissue classes: fluid; cortical and deep grey matter; white matter and brain stem."""
FITTED_VOXELS = 20_000
FITTING_STEPS = 30
PRIOR_FLOOR = 0.05
"""Added to the tissue priors, since anatomies differ."""
VENTRICLE_PRIOR = 0.1
"""Prior probability of ventricles from which on fluid is taken for ventricle."""
MARGIN = 6
"""Voxels around the brain that are processed."""
FAINTEST, OPAQUE = 0.15, 0.7
"""Least opacity of any lesion, and of those that hide the tissue under them."""
SMALL_DIAMETER, MAX_EMPHASIS = 6.0, 5.0
"""Diameter in mm at which a small lesion has the configured weight, and the largest multiple of it."""
FULL_VISIBILITY = 0.08
"""Mean intensity change of a lesion, relative to the brightest tissue, from which on its weight is full."""


@dataclass(frozen=True)
class LesionConfig(Constrained):
    """Synthetic lesions of a scan.

    Parameters
    ----------
    healthy_prob : float, default=0.1
        Probability that a scan gets no lesion.
    large_counts : tuple of float, default=(0.25, 0.4, 0.25, 0.1)
        Probabilities of 0, 1, 2, ... large lesions.
    large_size : tuple of float, default=(10.0, 90.0)
        Smallest and largest diameter of a large lesion in mm, drawn log-uniformly. A tumour is not in the
        lower third of the logarithmic range.
    along_white_prob : float, default=0.6
        Probability that the oedema of a large lesion spreads in white matter and spares grey matter.
    mass_prob : float, default=0.25
        Probability of an isointense mass: a large tumour whose intensity differs from that of the tissue by 3
        to 15 %. It has lost the border of grey and white matter, and displaces the tissue around it.
    mass_volume : tuple of float, default=(15.0, 220.0)
        Smallest and largest volume of a mass in mL, drawn log-uniformly.
    small_prob : float, default=0.75
        Probability of small lesions.
    max_small : int, default=40
        Largest number of small lesions.
    small_size : tuple of float, default=(3.0, 14.0)
        Smallest and largest diameter of a small lesion in mm, drawn log-uniformly.
    white_matter_prob : float, default=0.65
        Probability that a small lesion lies in white matter; otherwise it lies anywhere in the brain.
    periventricular_prob : float, default=0.3
        Probability of a band of lesions along the ventricles.
    real_shape_prob : float, default=0.5
        Probability that a large lesion has the shape of a real one, if there are any.
    """

    healthy_prob: Probability = 0.1
    large_counts: Annotated[tuple[Probability, ...], Items()] = (0.25, 0.4, 0.25, 0.1)
    large_size: PositiveRange = (10.0, 90.0)
    along_white_prob: Probability = 0.6
    mass_prob: Probability = 0.25
    mass_volume: PositiveRange = (15.0, 220.0)
    small_prob: Probability = 0.75
    max_small: Count = 40
    small_size: PositiveRange = (3.0, 14.0)
    white_matter_prob: Probability = 0.65
    periventricular_prob: Probability = 0.3
    real_shape_prob: Probability = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not any(self.large_counts):
            raise invalid(self, "large_counts", "a tuple with a sum above 0")


@dataclass(frozen=True)
class HealthyConfig(Constrained):
    """Variation of healthy scans, as probabilities per scan.

    Parameters
    ----------
    max_erosion : int, default=2
        Largest erosion of the brain mask in pixels, since skull-stripping programs differ by as much.
    ventricles : float, default=0.5
        That the centre of the brain is expanded or contracted, which varies the ventricles.
    rim_artifacts : float, default=0.3
        That dura and skull are left in patches of the outermost two pixels.
    strip_remnants : float, default=0.3
        Of each of up to two pieces of other tissue outside the brain.
    edge_cut : float, default=0.15
        That part of the brain is cut off by a plane.
    nuclei : float, default=0.4
        That deep grey nuclei are changed by iron or calcium.
    flow : float, default=0.4
        Of flow voids or bright vessels at the edge, and of flow artefacts in fluid.
    perivascular : float, default=0.4
        Of enlarged perivascular spaces.
    ventricle_rim : float, default=0.5
        That white matter along the ventricles differs slightly from other white matter.
    regions : float, default=0.5
        That intensities of grey and white matter differ between regions.
    shading : float, default=0.5
        That the signal falls or rises towards base and vertex.
    thick_slices : float, default=0.3
        Of a slice thickness of 2 to 6 mm.
    motion : float, default=0.1
        Of a ghost along the phase-encoding direction.
    """

    max_erosion: CountOrZero = 2
    ventricles: Probability = 0.5
    rim_artifacts: Probability = 0.3
    strip_remnants: Probability = 0.3
    edge_cut: Probability = 0.15
    nuclei: Probability = 0.4
    flow: Probability = 0.4
    perivascular: Probability = 0.4
    ventricle_rim: Probability = 0.5
    regions: Probability = 0.5
    shading: Probability = 0.5
    thick_slices: Probability = 0.3
    motion: Probability = 0.1


@dataclass(frozen=True)
class PaintingConfig(Constrained):
    """Training scans.

    Parameters
    ----------
    lesion : LesionConfig
        Synthetic lesions.
    healthy : HealthyConfig
        Variation of the healthy scan.
    rotation : float, default=6.0
        Largest rotation about each axis in degrees: error of the registration.
    zoom : tuple of float, default=(0.9, 1.1)
        Range of the size of the brain.
    shift : float, default=4.0
        Largest shift along each axis in mm.
    small_lesion_weight : float, default=8.0
        Factor of the weight in the loss of voxels of small lesions with a diameter of 6 mm, and of
        periventricular ones. Its excess over 1 is inversely proportional to the square of the diameter, up to
        five times as large, so that all small lesions have about the same total weight in a slice.
    """

    lesion: LesionConfig = field(default_factory=LesionConfig)
    healthy: HealthyConfig = field(default_factory=HealthyConfig)
    rotation: NonNegative = 6.0
    zoom: PositiveRange = (0.9, 1.1)
    shift: NonNegative = 4.0
    small_lesion_weight: NonNegative = 8.0


@dataclass(frozen=True)
class Levels:
    """Median intensities of the tissue classes of a scan.

    Parameters
    ----------
    fluid, grey, white : float
        Median intensities.
    pure_fluid : float
        Intensity of fluid without partial volume, as in the ventricles: the 95th percentile of fluid if it is
        brighter than tissue, otherwise the 5th. In T2w scans it is up to twice as bright as the median.
    """

    fluid: float
    grey: float
    white: float
    pure_fluid: float

    @property
    def top(self) -> float:
        """The highest median."""
        return max(self.fluid, self.grey, self.white)

    @property
    def brightest(self) -> float:
        """The highest level, that of pure fluid included."""
        return max(self.top, self.pure_fluid)

    @property
    def contrast(self) -> str:
        """``T1w``, ``T2w`` or ``FLAIR`` by the order of the levels, otherwise ``other``."""
        if self.fluid > max(self.grey, self.white):
            return "T2w" if self.grey > self.white else "other"
        if self.fluid < min(self.grey, self.white):
            return "T1w" if self.white > self.grey else "FLAIR"
        return "other"

    @classmethod
    def measure(cls, image: Tensor, tissue: Tensor) -> Levels:
        """Measure the medians of a scan.

        Parameters
        ----------
        image : Tensor, shape (Z, H, W)
            Intensities.
        tissue : Tensor of uint8, shape (Z, H, W)
            `FLUID`, `GREY` or `WHITE`; 0 outside the brain.

        Returns
        -------
        Levels
            Levels; those of a class without voxels are the median of the brain.
        """
        overall = image[tissue > 0].median()
        values = [image[tissue == label] for label in (FLUID, GREY, WHITE)]
        fluid, grey, white = (float(part.median() if len(part) else overall) for part in values)
        of_fluid = values[0] if len(values[0]) else overall[None]
        percentile = 0.95 if fluid > (grey + white) / 2 else 0.05
        pure_fluid = of_fluid.kthvalue(1 + round(percentile * (len(of_fluid) - 1))).values
        return cls(fluid, grey, white, float(pure_fluid))


def paint_scan(
    scan: Scan, config: PaintingConfig, generator: Generator, shapes: Sequence[Tensor] = ()
) -> PaintedScan:
    """Vary a healthy scan, and paint synthetic lesions into it.

    Parameters
    ----------
    scan : Scan
        Healthy scan, intensities in [0, 1]. Without tissue classes, they are estimated.
    config : PaintingConfig
        Lesions and variation.
    generator : torch.Generator
        Draws everything.
    shapes : sequence of Tensor of bool, shape (x, y, z)
        Shapes of real lesions at 1 mm, cropped.

    Returns
    -------
    PaintedScan
        Scan, target and weights. The target is 1 in the shape of a lesion, whatever the intensity of the
        voxel itself, and 0 elsewhere. The weight of a lesion in the loss is proportional to its visibility.
    """
    tissue = estimate_tissue(scan) if scan.tissue is None else _three_classes(scan.tissue)
    box = bounding_box(scan.brain, MARGIN)
    image, brain, tissue = scan.slices[box], scan.brain[box], tissue[box]
    plan = _Plan.draw(brain, config.lesion, generator)
    image, tissue = _deform(image, tissue * brain, plan, config, generator)
    brain = erode_in_plane(tissue > 0, integer(0, config.healthy.max_erosion, generator))
    levels = Levels.measure(image, tissue)
    ventricles = (tissue == FLUID) & (prior_slices()[TISSUES.index("ventricle")][box] > VENTRICLE_PRIOR)
    image, brain = _vary_healthy(image, brain, tissue, ventricles, levels, config.healthy, generator)
    lesions = _Lesions(image, brain, tissue, ventricles, levels, generator)
    lesions.paint(plan, config.lesion, shapes)
    painted = _acquire(lesions.image, lesions.levels.contrast, config.healthy, generator)
    painted = _scaled(painted, brain)
    weight = brain * lesions.weight(config.small_lesion_weight)
    whole = [torch.zeros(scan.slices.shape, dtype=torch.float16) for _ in range(3)]
    for target, part in zip(whole, (painted, lesions.target * brain, weight), strict=True):
        target[box] = part.half()
    inside = torch.zeros_like(scan.brain)
    inside[box] = brain
    return PaintedScan(whole[0], inside, whole[1], whole[2])


@cache
def prior_slices() -> Tensor:
    """Return the tissue priors of the atlas as cropped slices, shape (6, 155, 224, 224), float16."""
    return torch.stack([torch.from_numpy(to_slices(part)).half() for part in tissue_priors()])


def estimate_tissue(scan: Scan) -> Tensor:
    """Estimate fluid, grey and white matter of a scan of any contrast.

    The intensities of each class have a normal distribution, and the tissue priors of the atlas are its prior
    probabilities. Means and variances are estimated by expectation maximisation (Ashburner and Friston 1997,
    "Multimodal image coregistration and partitioning").

    Parameters
    ----------
    scan : Scan
        Scan in SRI24 space.

    Returns
    -------
    Tensor of uint8, shape (Z, H, W)
        `FLUID`, `GREY` or `WHITE`; 0 outside the brain.
    """
    fluid, ventricle, cortex, white, deep, stem = prior_slices()[:, scan.brain].float()
    priors = torch.stack([fluid + ventricle, cortex + deep, white + stem]) + PRIOR_FLOOR
    priors = priors / priors.sum(0)
    values = scan.slices[scan.brain]
    some = slice(None, None, max(1, len(values) // FITTED_VOXELS))
    weights = priors[:, some]
    for _ in range(FITTING_STEPS):
        total = weights.sum(1).clamp_min(1e-6)
        mean = weights @ values[some] / total
        variance = (weights * (values[some] - mean[:, None]).square()).sum(1) / total
        moments = mean, variance.clamp_min(1e-5)
        weights = _log_posterior(values[some], priors[:, some], *moments).softmax(0)
    tissue = torch.zeros(scan.slices.shape, dtype=torch.uint8)
    # The classes are numbered from 1.
    tissue[scan.brain] = 1 + _log_posterior(values, priors, *moments).argmax(0).to(torch.uint8)
    return tissue


def _log_posterior(values: Tensor, priors: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Return logarithms of class probabilities, shape (classes, n), up to a constant of each voxel."""
    distance = (values - mean[:, None]).square() / variance[:, None]
    return priors.log() - 0.5 * (distance + variance.log()[:, None])


def _three_classes(tissue: Tensor) -> Tensor:
    """Merge deep grey with cortical grey matter, and brain stem with white matter."""
    return torch.tensor([0, FLUID, GREY, WHITE, GREY, WHITE], dtype=torch.uint8)[tissue.long()]


def _scaled(image: Tensor, brain: Tensor) -> Tensor:
    """Scale as the preprocessing does, with the 99.5th percentile of the brain at 1, and clip to [0, 1]."""
    values = image[brain][::23]
    top = values.kthvalue(max(1, math.ceil(UPPER_PERCENTILE / 100 * len(values)))).values
    return (image / top.clamp_min(1e-3)).clamp(0, 1) * brain


@dataclass(frozen=True)
class _LargeLesion:
    """Place and size of a large lesion, and how far it displaces tissue (mm)."""

    kind: str
    centre: Tensor
    radius: float
    displacement: float


@dataclass(frozen=True)
class _Plan:
    """What is painted: large lesions, number of small ones, and whether there is a periventricular band."""

    large_lesions: tuple[_LargeLesion, ...]
    small: int
    band: bool

    @classmethod
    def draw(cls, brain: Tensor, config: LesionConfig, generator: Generator) -> _Plan:
        """Draw the lesions of a scan with the given brain mask."""
        if chance(config.healthy_prob, generator):
            return cls((), 0, band=False)
        counts = torch.tensor(config.large_counts)
        number = int(torch.multinomial(counts, 1, generator=generator))
        large_lesions = []
        if chance(config.mass_prob, generator):
            volume = 1000 * log_uniform(*config.mass_volume, generator)
            radius = (3 * volume / (4 * math.pi)) ** (1 / 3)
            large_lesions.append(("mass", radius, uniform(0.1, 0.5, generator) * radius))
        for _ in range(number):
            kind = ("oedema", "tumour", "cavity")[integer(0, 2, generator)]
            low, high = map(math.log, config.large_size)
            # A tumour is not in the lower third of the range.
            low += (high - low) / 3 * (kind == "tumour")
            radius = math.exp(uniform(low, high, generator)) / 2
            large_lesions.append((kind, radius, uniform(0, 0.3, generator) * radius * (kind == "tumour")))
        centres = draw_voxels(brain, len(large_lesions), generator)
        return cls(
            tuple(
                _LargeLesion(kind, at, size, push)
                for (kind, size, push), at in zip(large_lesions, centres, strict=True)
            ),
            integer(1, config.max_small, generator) if chance(config.small_prob, generator) else 0,
            band=chance(config.periventricular_prob, generator),
        )


def _deform(
    image: Tensor, tissue: Tensor, plan: _Plan, config: PaintingConfig, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Deform a scan: position, size, individual shape, ventricles, and displacement by lesions."""
    angles = [math.radians(uniform(-config.rotation, config.rotation, generator)) for _ in range(3)]
    zoom = [uniform(*config.zoom, generator) for _ in range(3)]
    shift = [uniform(-config.shift, config.shift, generator) for _ in range(3)]
    flip = chance(0.5, generator)
    pushes = [
        (large_lesion.centre, max(large_lesion.radius, 4.0), large_lesion.displacement)
        for large_lesion in plan.large_lesions
    ]
    if chance(config.healthy.ventricles, generator):
        centre = torch.nonzero(tissue)[::101].float().mean(0) + 5 * torch.randn(3, generator=generator)
        radius = uniform(12, 40, generator)
        pushes.append((centre, radius, uniform(-0.3, 0.5, generator) * 0.6 * radius))
    roughness = uniform(0, 3, generator)
    return warp(image, tissue, angles, zoom, shift, pushes, roughness, flip=flip, generator=generator)


def _vary_healthy(
    image: Tensor,
    brain: Tensor,
    tissue: Tensor,
    ventricles: Tensor,
    levels: Levels,
    config: HealthyConfig,
    generator: Generator,
) -> tuple[Tensor, Tensor]:
    """Apply the variation of healthy scans; return the image and the brain mask."""
    image = image * brain
    if chance(config.regions, generator):
        image = _vary_regions(image, tissue, levels, generator)
    if chance(config.ventricle_rim, generator):
        image = _change_ventricle_rim(image, tissue, ventricles, levels, generator)
    rim = brain & ~erode_in_plane(brain, 2)
    if chance(config.rim_artifacts, generator):
        image = _add_rim_artifacts(image, rim, levels, generator)
    if chance(config.edge_cut, generator):
        brain = _cut_edge(brain, generator)
    for _ in range(2):
        if chance(config.strip_remnants, generator):
            image, brain = _add_strip_remnant(image, brain, rim, levels, generator)
    if chance(config.nuclei, generator):
        image = _change_nuclei(image, brain, levels, generator)
    if chance(config.flow, generator):
        image = _add_flow_effects(image, brain, rim, tissue, levels, generator)
    if chance(config.perivascular, generator):
        image = _add_perivascular_spaces(image, tissue, levels, generator)
    return image * brain, brain


def _vary_regions(image: Tensor, tissue: Tensor, levels: Levels, generator: Generator) -> Tensor:
    """Vary grey and white matter between regions, by up to 0.2 times their contrast (standard deviation)."""
    for label in (GREY, WHITE):
        amount = uniform(0, 0.2, generator) * (levels.white - levels.grey)
        change = amount * normal_field(tuple(image.shape), uniform(15, 40, generator), generator)
        image = image + change * gaussian_smooth((tissue == label).float(), 0.7)
    return image


def _change_ventricle_rim(
    image: Tensor, tissue: Tensor, ventricles: Tensor, levels: Levels, generator: Generator
) -> Tensor:
    """Move the intensity of white matter along the ventricles towards that of grey matter.

    In FLAIR scans, rim and caps of healthy people may be brighter than grey matter.
    """
    near = gaussian_smooth(ventricles.float(), uniform(0.7, 3, generator))
    thickness = (0.5 * normal_field(tuple(image.shape), 20.0, generator)).exp()
    mask = (2 * thickness * near).clamp(0, 1) * gaussian_smooth((tissue == WHITE).float(), 0.7)
    amount = uniform(0, 2 if levels.contrast == "FLAIR" else 0.7, generator)
    return image + amount * mask * (levels.grey - levels.white)


def _any_level(levels: Levels, generator: Generator) -> float:
    """Draw an intensity that any tissue, also outside the brain, may have."""
    return uniform(0, 1.1 * levels.brightest, generator)


def _add_rim_artifacts(image: Tensor, rim: Tensor, levels: Levels, generator: Generator) -> Tensor:
    """Blend another intensity into patches of the edge of the brain, as remnants of dura do."""
    patches = normal_field(tuple(image.shape), 18.0, generator) > uniform(-0.5, 1.5, generator)
    opacity = uniform(0, 1, generator)
    return torch.where(rim & patches, image + opacity * (_any_level(levels, generator) - image), image)


def _cut_edge(brain: Tensor, generator: Generator) -> Tensor:
    """Cut off the outermost part of a brain by a plane, by up to a third of the way to its centre."""
    direction = F.normalize(torch.randn(3, generator=generator), dim=0)
    places = torch.nonzero(brain)[::17].float()
    centre = places.mean(0)
    axes = (torch.arange(size) - middle for size, middle in zip(brain.shape, centre, strict=True))
    z, row, column = (axis * along for axis, along in zip(axes, direction, strict=True))
    height = z[:, None, None] + row[:, None] + column
    farthest = float(((places - centre) @ direction).max())
    return brain & (height <= farthest * (1 - uniform(0, 1 / 3, generator)))


def _add_strip_remnant(
    image: Tensor, brain: Tensor, rim: Tensor, levels: Levels, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Add a piece of other tissue at the edge of the brain to image and brain mask."""
    image, brain = image.clone(), brain.clone()
    (centre,) = draw_voxels(rim, 1, generator)
    box, blob = ellipsoid(tuple(image.shape), centre, log_uniform(3, 25, generator), 0.4, generator)
    texture = normal_field(tuple(blob.shape), 4.0, generator)
    level = _any_level(levels, generator) + uniform(0, 0.3, generator) * texture
    tissue = level.clamp(0, 1.1 * levels.brightest)
    piece = (blob > 0.5) & ~brain[box]
    image[box] = torch.where(piece, tissue, image[box])
    brain[box] |= piece
    return image, brain


def _add_flow_effects(
    image: Tensor, brain: Tensor, rim: Tensor, tissue: Tensor, levels: Levels, generator: Generator
) -> Tensor:
    """Add vessels, mostly dark ones, at the edge of the brain, and effects of flow to patches of fluid."""
    image, shape = image.clone(), tuple(image.shape)
    for centre in draw_voxels(rim, 4, generator):
        box, blob = ellipsoid(shape, centre, uniform(2, 10, generator), 0.3, generator)
        is_dark = chance(0.7, generator)
        level = uniform(0, 0.4, generator) * levels.top if is_dark else _any_level(levels, generator)
        image[box] += blob * (level - image[box]) * brain[box]
    patches = (normal_field(shape, 7.0, generator) - uniform(0.5, 2, generator)).clamp(0, 1)
    amount = uniform(0, 0.8, generator) * patches * (tissue == FLUID)
    return image + amount * (uniform(0, 1, generator) * levels.top - image)


def _change_nuclei(image: Tensor, brain: Tensor, levels: Levels, generator: Generator) -> Tensor:
    """Change a pair of spots beside the midline, as iron and calcium do in deep grey nuclei.

    They are dark in T2w and FLAIR scans; in T1w scans calcium may be bright.
    """
    middle = torch.nonzero(brain)[::101].float().mean(0)
    image = image.clone()
    away, along = uniform(3, 28, generator), 12 * torch.randn(2, generator=generator)
    darker = levels.contrast != "T1w" or chance(0.4, generator)
    factor = uniform(-0.6, 0, generator) if darker else uniform(0, 0.3, generator)
    for side in (-1, 1):
        centre = middle + torch.tensor([float(along[0]), side * away, float(along[1])])
        box, blob = ellipsoid(tuple(image.shape), centre, uniform(3, 11, generator), 0.3, generator)
        image[box] *= 1 + factor * blob
    return image


def _add_perivascular_spaces(image: Tensor, tissue: Tensor, levels: Levels, generator: Generator) -> Tensor:
    """Add fluid-filled spaces of 1 to 2 mm in white matter, up to 6 mm long."""
    spots = torch.zeros_like(image)
    starts = draw_voxels(tissue == WHITE, integer(5, 120, generator), generator)
    directions = torch.randn((len(starts), 3), generator=generator)
    for step in range(4):
        now = (starts + step * F.normalize(directions, dim=1)).round().long()
        ends = torch.tensor(image.shape) - 1
        spots[tuple(now.clamp_min(0).minimum(ends).T)] = 1
    soft = (gaussian_smooth(spots, uniform(0.4, 0.8, generator)) * 2.5).clamp(0, 1)
    return image + uniform(0.2, 0.9, generator) * soft * (levels.fluid - image) * (tissue == WHITE)


def _acquire(image: Tensor, contrast: str, config: HealthyConfig, generator: Generator) -> Tensor:
    """Apply the effects of an acquisition to a painted scan: shading, thick slices, motion."""
    depth = len(image)
    if chance(config.shading, generator):
        z = torch.arange(depth, dtype=torch.float32)
        for distance in (z, depth - 1 - z):
            ramp = (1 - distance / uniform(15, 50, generator)).clamp_min(0)
            image = image * (uniform(-0.5, 0.25, generator) * ramp).exp()[:, None, None]
    # T1w scans are more often three-dimensional.
    if chance(config.thick_slices * (1.0 if contrast == "T1w" else 1.5), generator):
        thickness = uniform(2, 6, generator)
        matrix = _thick_slices(depth, thickness, uniform(0, thickness, generator))
        image = (matrix @ image.flatten(1)).view_as(image)
    if chance(config.motion, generator):
        image = image + uniform(0.02, 0.1, generator) * image.roll(integer(10, 80, generator), 2)
    return image


def _thick_slices(depth: int, thickness: float, offset: float) -> Tensor:
    """Return the matrix that averages slices of 1 mm to thicker ones, and interpolates these linearly.

    Parameters
    ----------
    depth : int
        Number of slices.
    thickness : float
        Thickness of the thicker slices, mm.
    offset : float
        Start of the second one, mm; the first starts before 0.

    Returns
    -------
    Tensor, shape (depth, depth)
        Weights, whose sum is 1 in each row.
    """
    z = torch.arange(depth, dtype=torch.float32)
    slabs = torch.arange(-1, math.ceil(depth / thickness) + 1) * thickness + offset
    overlap = torch.minimum(slabs[:, None] + thickness, z + 1) - torch.maximum(slabs[:, None], z)
    mean = overlap.clamp_min(0) / overlap.clamp_min(0).sum(1, keepdim=True).clamp_min(1e-6)
    position = ((z + 0.5 - slabs[0]) / thickness - 0.5)[:, None]
    linear = (1 - (position - torch.arange(len(slabs))).abs()).clamp_min(0)
    matrix = linear @ mean
    return matrix / matrix.sum(1, keepdim=True).clamp_min(1e-6)


class _Lesions:
    """Paints lesions into a scan, one after the other, and keeps target, visibility and small lesions.

    Attributes
    ----------
    image : Tensor, shape (Z, H, W)
        Scan with the lesions that were painted so far.
    target : Tensor, shape (Z, H, W)
        Soft mask of the lesions.
    visible : Tensor, shape (Z, H, W)
        Soft mask of each lesion times its visibility (0 to 1); the maximum over lesions.
    emphasis : Tensor, shape (Z, H, W)
        Additional weight of small and periventricular lesions relative to that of one of 6 mm, times their
        soft mask; the maximum over lesions.
    """

    def __init__(
        self,
        image: Tensor,
        brain: Tensor,
        tissue: Tensor,
        ventricles: Tensor,
        levels: Levels,
        generator: Generator,
    ) -> None:
        self.image, self.brain, self.tissue, self.levels = image, brain, tissue, levels
        self.ventricles = ventricles
        self.generator = generator
        self.target, self.visible, self.emphasis = (torch.zeros_like(image) for _ in range(3))

    def _uniform(self, low: float, high: float) -> float:
        return uniform(low, high, self.generator)

    def _chance(self, probability: float) -> bool:
        return chance(probability, self.generator)

    def _any_level(self) -> float:
        return self._uniform(0, 1.2) * self.levels.brightest

    def weight(self, small_lesion_weight: float) -> Tensor:
        """Return weights in the loss: 1 outside lesions, that of their visibility and size inside."""
        return (1 - self.target + self.visible) * (1 + (small_lesion_weight - 1) * self.emphasis)

    def paint(self, plan: _Plan, config: LesionConfig, shapes: Sequence[Tensor]) -> None:
        """Paint the planned lesions."""
        for large_lesion in plan.large_lesions:
            self._paint_large(large_lesion, config, shapes)
        if plan.band:
            self._paint_band()
        if plan.small:
            self._paint_small(plan.small, config)

    def _paint_large(
        self, large_lesion: _LargeLesion, config: LesionConfig, shapes: Sequence[Tensor]
    ) -> None:
        size = tuple(self.image.shape)
        if shapes and self._chance(config.real_shape_prob):
            shape = shapes[integer(0, len(shapes) - 1, self.generator)]
            box, mask = expand_shape(size, large_lesion.centre, shape, large_lesion.radius, self.generator)
        else:
            rough = self._uniform(0.2, 0.9)
            box, mask = ellipsoid(size, large_lesion.centre, large_lesion.radius, rough, self.generator)
        edge = self._uniform(0, 3) * min(1, large_lesion.radius / 10)
        mask = gaussian_smooth(mask, edge) * self.brain[box]
        if not mask.any():
            return
        before = self.image[box]
        if large_lesion.kind == "mass":
            self._keep(box, mask, *self._mass(before, mask))
            return
        core = mask
        if large_lesion.kind != "cavity" and self._chance(config.along_white_prob):
            near_white = gaussian_smooth((self.tissue[box] == WHITE).float(), self._uniform(0.5, 1.2))
            mask = mask * (1.6 * near_white).clamp(0, 1)
        # Half of the large lesions are opaque: many gliomas are as bright as fluid throughout in T2w scans.
        after = self._blend(
            before, mask, self._lesion_level(before), weakest=OPAQUE if self._chance(0.5) else FAINTEST
        )
        # A tumour has one core, or two of which one contains the other.
        cores = (
            integer(1, 2, self.generator)
            if large_lesion.kind == "tumour"
            else int(large_lesion.kind == "cavity")
        )
        for _ in range(cores):
            depth = self._uniform(0.3, 0.8)
            core = ((gaussian_smooth(core, 0.25 * large_lesion.radius) - depth) * 6).clamp(0, 1) * core
            level = self.levels.pure_fluid if large_lesion.kind == "cavity" else self._any_level()
            after = self._blend(after, core, torch.full_like(before, level), weakest=OPAQUE)
            mask = torch.maximum(mask, core)
        self._keep(box, mask, after)

    def _paint_band(self) -> None:
        """Paint a band of varying thickness along the ventricles."""
        near = gaussian_smooth(self.ventricles.float(), self._uniform(1, 5))
        # A step edge that is smoothed by a Gaussian falls to 0.16 at one standard deviation from the edge.
        level = 0.16 * (1.2 * normal_field(tuple(near.shape), 20.0, self.generator)).exp()
        mask = gaussian_smooth(((near > level) & (self.tissue == WHITE)).float(), self._uniform(0.3, 1))
        mask = mask * self.brain
        # White matter along the ventricles differs slightly from other white matter in healthy people too.
        after = self._blend(self.image, mask, self._lesion_level(self.image), weakest=0.4)
        self._keep(Box.whole(self.image), mask, after, emphasis=mask)

    def _paint_small(self, number: int, config: LesionConfig) -> None:
        white = (self.tissue == WHITE) & self.brain
        inside = round(number * config.white_matter_prob)
        centres = [
            *draw_voxels(white, inside, self.generator),
            *draw_voxels(self.brain, number - inside, self.generator),
        ]
        mask, emphasis = torch.zeros_like(self.image), torch.zeros_like(self.image)
        for centre in centres:
            diameter = log_uniform(*config.small_size, self.generator)
            rough = self._uniform(0, 0.4)
            box, one = ellipsoid(tuple(mask.shape), centre, diameter / 2, rough, self.generator)
            mask[box] = torch.maximum(mask[box], one)
            relative = min(MAX_EMPHASIS, (SMALL_DIAMETER / diameter) ** 2)
            emphasis[box] = torch.maximum(emphasis[box], relative * one)
        edge = self._uniform(0, 0.8)
        mask, emphasis = (gaussian_smooth(part, edge) * self.brain for part in (mask, emphasis))
        after = self._blend(self.image, mask, self._lesion_level(self.image))
        self._keep(Box.whole(self.image), mask, after, emphasis=emphasis)

    def _lesion_level(self, before: Tensor) -> Tensor:
        """Draw the intensity of a lesion, relative to the tissue under it."""
        levels, generator = self.levels, self.generator
        if self._chance(0.15):
            steps = [integer(-40, 40, generator) for _ in range(3)]
            return before.flip(1).roll(steps, (0, 1, 2))  # foreign texture
        if self._chance(0.15) or levels.contrast == "other":
            return torch.full_like(before, self._any_level())
        if levels.contrast == "FLAIR":
            if self._chance(0.8):
                bright = max(levels.grey, levels.white)
                return before + bright * self._uniform(0.15, 1.0)
            return torch.full_like(before, self._uniform(levels.fluid, levels.white))
        # Partial volume moves the median of fluid towards tissue: many lesions differ more from it.
        fluid = self._uniform(levels.fluid, levels.pure_fluid)
        # Many gliomas are as dark as grey matter in T1w scans.
        other, farthest = (levels.white, 0.45) if levels.contrast == "T2w" else (levels.grey, 0.9)
        return torch.full_like(before, fluid + self._uniform(0, farthest) * (other - fluid))

    def _blend(self, before: Tensor, mask: Tensor, level: Tensor, *, weakest: float = FAINTEST) -> Tensor:
        """Blend a level into a mask, with a texture of its own and an opacity of at least `weakest`."""
        shape = tuple(before.shape)
        coarse, fine = (normal_field(shape, size, self.generator) for size in (14.0, 4.0))
        level = level + 0.05 * self.levels.top * coarse
        opacity = self._uniform(weakest, 1)
        return before + mask * (opacity * (1 + 0.15 * fine + 0.1 * coarse)).clamp(0, 1) * (level - before)

    def _mass(self, before: Tensor, mask: Tensor) -> tuple[Tensor, float]:
        """Return the scan with an isointense mass, and its visibility."""
        blurred = gaussian_smooth(before, self._uniform(3, 7))
        grain = before - gaussian_smooth(before, 0.8)
        weight = self._uniform(0.4, 1)
        inner = weight * blurred + (1 - weight) * before + weight * self._uniform(0.3, 1) * grain
        contrast = self._uniform(0.03, 0.15)
        sign = 1.0 if self._chance(0.8) == (self.levels.contrast != "T1w") else -1.0
        shape = tuple(before.shape)
        coarse, fine = (normal_field(shape, size, self.generator) for size in (14.0, 5.0))
        texture = self._uniform(0, 0.06) * coarse + self._uniform(0, 0.04) * fine
        inner = inner * (1 + sign * contrast + texture)
        return before + mask * (inner - before), min(1.0, 0.4 + 4 * contrast + 0.4 * weight)

    def _keep(
        self,
        box: Box,
        mask: Tensor,
        after: Tensor,
        visibility: float | None = None,
        *,
        emphasis: Tensor | None = None,
    ) -> None:
        """Keep image and mask of a lesion. Without a visibility, it is measured from the intensity change."""
        if visibility is None:
            change = ((after - self.image[box]).abs() * mask).sum() / mask.square().sum().clamp_min(1e-3)
            visibility = min(1.0, float(change) / (FULL_VISIBILITY * self.levels.top))
        self.image[box] = after.clamp_min(0)
        self.target[box] = torch.maximum(self.target[box], mask)
        self.visible[box] = torch.maximum(self.visible[box], mask * visibility)
        if emphasis is not None:
            self.emphasis[box] = torch.maximum(self.emphasis[box], emphasis)
