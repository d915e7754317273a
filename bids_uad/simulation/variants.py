"""Normal findings of healthy brains: perivascular spaces, iron, vessels, dura, and mild artefacts of a scan.

Findings of the anatomy are drawn once per subject and have the signal of their tissue in every contrast.
Artefacts are drawn per scan. Frequencies by age are in `PREVALENCE`, signals in `SIGNALS`; the documentation
of the simulation lists their sources.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from scipy import ndimage

from bids_uad.simulation.anatomy import CLASSES
from bids_uad.simulation.spatial import BOX_SHAPE, random_field, smooth, tensor

INDEX = {name: position for position, name in enumerate(CLASSES)}
AGES = (20.0, 50.0, 90.0)
PREVALENCE = {
    "perivascular_basal": (0.5, 0.7, 0.95),
    "perivascular_white": (0.7, 0.8, 0.95),
    "iron": (0.5, 0.9, 1.0),
    "calcified": (0.01, 0.04, 0.15),
    "choroid": (0.3, 0.5, 0.7),
    "caps": (0.33, 0.5, 0.85),
    "white_matter_foci": (0.2, 0.4, 0.92),
    "cavum": (0.08, 0.08, 0.08),
    "ventricle_asymmetry": (0.12, 0.12, 0.12),
    "sinus": (0.6, 0.6, 0.6),
    "artery": (0.8, 0.8, 0.8),
    "falx": (0.6, 0.7, 0.8),
    "dura": (0.4, 0.4, 0.4),
    "fat": (0.25, 0.25, 0.25),
}
"""Probability of a finding at the ages of `AGES` (years), linear between them."""
ARTEFACTS = {"thick_slices": 0.3, "ghosts": 0.25, "signal_loss": 0.6, "coil": 0.6}
"""Probability of an artefact per scan."""
OLDEST = 90.0
"""Upper limit of the age of subjects with normal findings, years."""

Source = tuple[float, str, float, float]
"""Probability, class with the reference signal ("self" for that of the voxel), and range of the factor."""
SIGNALS: dict[str, dict[str, tuple[Source, ...]]] = {
    "perivascular": {
        "T1w": ((1.0, "ventricle", 1.0, 1.2),),
        "T2w": ((1.0, "ventricle", 0.85, 1.0),),
        "FLAIR": ((1.0, "ventricle", 1.0, 1.3),),
    },
    "iron": {
        "T1w": ((1.0, "self", 0.98, 1.06),),
        "T2w": ((1.0, "self", 0.55, 0.88),),
        "FLAIR": ((1.0, "self", 0.60, 0.90),),
    },
    "calcified": {
        "T1w": ((0.5, "self", 1.10, 1.35), (0.5, "self", 0.60, 0.88)),
        "T2w": ((1.0, "self", 0.35, 0.70),),
        "FLAIR": ((1.0, "self", 0.35, 0.75),),
    },
    "choroid": {
        "T1w": ((1.0, "cortex", 0.70, 1.05),),
        "T2w": ((0.9, "cortex", 1.10, 1.80), (0.1, "cortex", 0.40, 0.80)),
        "FLAIR": ((1.0, "cortex", 0.90, 1.50),),
    },
    "sinus": {
        "T1w": ((0.5, "white", 0.05, 0.30), (0.5, "white", 0.70, 1.30)),
        "T2w": ((0.7, "cortex", 0.10, 0.40), (0.3, "ventricle", 0.60, 1.00)),
        "FLAIR": ((0.6, "white", 0.10, 0.40), (0.4, "white", 0.80, 1.50)),
    },
    "artery": {
        "T1w": ((0.5, "white", 0.90, 1.40), (0.5, "white", 0.05, 0.30)),
        "T2w": ((1.0, "white", 0.15, 0.60),),
        "FLAIR": ((0.8, "white", 0.10, 0.50), (0.2, "cortex", 0.90, 1.30)),
    },
    "dura": {
        "T1w": ((1.0, "cortex", 0.70, 1.20),),
        "T2w": ((1.0, "white", 0.40, 1.00),),
        "FLAIR": ((1.0, "cortex", 0.50, 1.10),),
    },
    "fat": {
        "T1w": ((1.0, "white", 1.00, 1.45),),
        "T2w": ((0.8, "ventricle", 0.45, 0.95), (0.2, "white", 0.30, 0.80)),
        "FLAIR": ((0.7, "cortex", 1.00, 1.60), (0.3, "white", 0.20, 0.50)),
    },
}
"""Signal of each kind of finding by contrast; of alternatives (flow, fat saturation), a scan has one."""


@dataclass(frozen=True)
class Finding:
    """Normal finding of a subject.

    Attributes
    ----------
    kind : str
        Key of `SIGNALS`.
    weight : torch.Tensor, shape (X, Y, Z)
        Fraction of its signal in each voxel, 0 to 1.
    """

    kind: str
    weight: torch.Tensor


@dataclass
class Findings:
    """Tissue maps, brain mask and normal findings of a subject, on the box.

    Attributes
    ----------
    fractions : torch.Tensor, shape (len(CLASSES), X, Y, Z)
        Tissue maps.
    change : torch.Tensor, shape (X, Y, Z)
        Age-related white matter change, 0 to 1.
    brain : torch.Tensor of bool, shape (X, Y, Z)
        Brain mask, with remnants of dura, fat and sinuses at its edge.
    findings : list of Finding
        Findings that replace the signal of the tissue.
    drawn : dict
        Drawn numbers and sizes.
    """

    fractions: torch.Tensor
    change: torch.Tensor
    brain: torch.Tensor
    findings: list[Finding] = field(default_factory=list)
    drawn: dict = field(default_factory=dict)


def prevalence(name: str, age: float) -> float:
    """Return the probability of a finding of `PREVALENCE` at an age (years)."""
    return float(np.interp(age, AGES, PREVALENCE[name]))


def asymmetric_ventricles(
    ventricle: torch.Tensor, side: torch.Tensor, rng: np.random.Generator, age: float
) -> tuple[torch.Tensor, float] | None:
    """Draw the ventricle of one side, and the shift of its walls.

    Parameters
    ----------
    ventricle : torch.Tensor, shape (X, Y, Z)
        Fraction of ventricle per voxel.
    side : torch.Tensor, shape (X, Y, Z)
        Distance from the midline, mm, negative on one side.
    rng : numpy.random.Generator
        Source of all random numbers.
    age : float
        Age, years.

    Returns
    -------
    tuple of (torch.Tensor, float) or None
        Ventricle of one side, shape (X, Y, Z), and the shift of its walls (mm; negative to narrow it); None
        if the ventricles are symmetric.
    """
    present = rng.uniform() < prevalence("ventricle_asymmetry", age)
    sign, shift = rng.choice([-1.0, 1.0]), float(rng.uniform(0.8, 2.2) * rng.choice([-1.0, 1.0]))
    if not present:
        return None
    return ventricle * torch.sigmoid(sign * side - 2.0), shift


class _Brain:
    """Positions in one brain, as NumPy arrays, from which findings are drawn."""

    def __init__(self, fractions: torch.Tensor, brain: torch.Tensor, side: torch.Tensor) -> None:
        self.maps = {name: fractions[position].cpu().numpy() for name, position in INDEX.items()}
        self.brain = brain.cpu().numpy()
        self.side = side.cpu().numpy()
        thalamus = np.argwhere(self.maps["thalamus"] > 0.5)
        # Middle of both thalami; landmarks are given relative to it, in mm: lateral, anterior, superior.
        self.centre = thalamus.mean(0) if len(thalamus) else np.array(BOX_SHAPE) / 2
        plane = self.side[:, int(self.centre[1]), int(self.centre[2])]
        self.middle = int(np.abs(plane).argmin())

    def index(self, lateral: float, anterior: float, superior: float) -> np.ndarray:
        """Return the index of a position relative to the thalami (mm); the second axis points backwards."""
        return np.array([self.middle + lateral, self.centre[1] - anterior, self.centre[2] + superior])

    def draw(self, region: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
        """Draw voxels of a region, shape (count, 3), or none if it is empty."""
        inside = np.flatnonzero(region)
        if not len(inside) or not count:
            return np.zeros((0, 3))
        return np.stack(np.unravel_index(rng.choice(inside, count), BOX_SHAPE), 1).astype(float)


def stamp_tube(volume: np.ndarray, start: np.ndarray, end: np.ndarray, radius: float) -> None:
    """Add a tube with round ends to a map of fractions, by the maximum.

    Parameters
    ----------
    volume : numpy.ndarray, shape (X, Y, Z)
        Map of fractions, changed in place.
    start, end : numpy.ndarray, shape (3,)
        Ends of the axis, voxels of 1 mm; equal ones give a ball.
    radius : float
        Radius, mm. Tubes that are thinner than a voxel fill it partially.
    """
    low = np.maximum(np.floor(np.minimum(start, end) - radius - 1).astype(int), 0)
    high = np.minimum(np.ceil(np.maximum(start, end) + radius + 2).astype(int), volume.shape)
    if (high <= low).any():
        return
    points = np.stack(np.meshgrid(*map(np.arange, low, high), indexing="ij"), -1) - start
    axis = end - start
    along = np.clip(points @ axis / max(float(axis @ axis), 1e-9), 0, 1)
    distance = np.linalg.norm(points - along[..., None] * axis, axis=-1)
    filled = np.clip(radius - distance + 0.5, 0, 1) * min(1.0, np.pi * radius**2)
    part = volume[tuple(map(slice, low, high))]
    np.maximum(part, filled, out=part)


def _ball(centre: np.ndarray, sigma: float) -> np.ndarray:
    """Return a Gaussian of standard deviation `sigma` (mm) around an index of the box, 1 in its centre."""
    parts = [
        np.exp(-0.5 * ((np.arange(size) - c) / sigma) ** 2) for size, c in zip(BOX_SHAPE, centre, strict=True)
    ]
    return np.einsum("i,j,k->ijk", *parts).astype(np.float32)


def _perivascular(brain: _Brain, age: float, rng: np.random.Generator, drawn: dict) -> np.ndarray:
    """Draw perivascular spaces: tubes towards the ventricles, or upwards in the basal ganglia."""
    volume = np.zeros(BOX_SHAPE, np.float32)
    height = np.arange(BOX_SHAPE[2]) - brain.centre[2]
    deep = ndimage.uniform_filter(brain.maps["white"], 5) > 0.9
    regions = {
        "perivascular_white": deep & (height > 8) & (np.abs(brain.side) > 8),
        "perivascular_basal": (brain.maps["striatum"] + brain.maps["pallidum"] > 0.5) & (height < 8),
    }
    solid = 1 - brain.maps["csf"] - brain.maps["ventricle"]
    for name, region in regions.items():
        present = rng.uniform() < prevalence(name, age)
        typical = {"perivascular_white": 8 + 0.5 * (age - 20), "perivascular_basal": 3 + 0.25 * (age - 20)}[
            name
        ]
        count = int(min(rng.lognormal(np.log(typical), 0.7), 150)) * present
        drawn[name] = count
        for centre in brain.draw(region, count, rng):
            if name == "perivascular_white":
                direction = centre - brain.index(np.sign(centre[0] - brain.middle) * 12, 0, 10)
            else:
                direction = np.array([0.4 * np.sign(centre[0] - brain.middle), 0.0, 1.0])
            direction = direction / max(np.linalg.norm(direction), 1e-6) + rng.normal(0, 0.25, 3)
            diameter = float(np.clip(rng.lognormal(np.log(1.1), 0.35), 0.6, 3.0))
            half = direction * rng.uniform(1.0, 5.0)
            stamp_tube(volume, centre - half, centre + half, diameter / 2)
    return volume * np.clip(solid, 0, 1)


def _iron(brain: _Brain, age: float, rng: np.random.Generator, drawn: dict) -> np.ndarray:
    """Draw the iron of pallidum, putamen, red nucleus, substantia nigra and dentate nucleus."""
    volume = np.zeros(BOX_SHAPE, np.float32)
    present = rng.uniform() < prevalence("iron", age)
    amount = float(rng.uniform(0.5, 1.0) * present)
    drawn["iron"] = amount
    patches = (0.85 + 0.15 * random_field(rng, 6.0)[0]).clamp(0.4, 1).cpu().numpy()
    # The pallidum darkens until middle age, the putamen in old age, the other nuclei do not change.
    early = float(np.interp(age, [20, 40, 90], [0.4, 0.85, 1.0]))
    late = float(np.interp(age, [20, 60, 90], [0.0, 0.35, 0.55]))
    volume += brain.maps["pallidum"] * early
    volume += brain.maps["striatum"] * late * (np.abs(brain.side) > 16)
    stem, cerebellar = np.zeros_like(volume), np.zeros_like(volume)
    tilt = np.array([0.0, 3.5, 3.5])
    for lateral in (-1, 1):
        centre = brain.index(5 * lateral, -3, -16)
        stamp_tube(stem, centre, centre, 3.0)
        stamp_tube(stem, brain.index(5 * lateral, 4, -20), brain.index(14 * lateral, -2, -16), 2.0)
        for step in range(4):
            middle = brain.index((10 + 3 * step) * lateral, -38 - 2 * abs(step - 1), -38 + 1.5 * step)
            stamp_tube(cerebellar, middle - tilt, middle + tilt, 1.5)
    volume += 0.8 * (stem * brain.maps["brainstem"] + cerebellar * brain.maps["cerebellar_white"])
    return np.clip(volume * patches * amount, 0, 1)


def _calcified(brain: _Brain, age: float, rng: np.random.Generator, drawn: dict) -> np.ndarray:
    """Draw calcified spots of the pallida."""
    volume = np.zeros(BOX_SHAPE, np.float32)
    present = rng.uniform() < prevalence("calcified", age)
    count = int(rng.integers(4, 24)) * present
    drawn["calcified"] = count
    core = ndimage.uniform_filter(brain.maps["pallidum"], 3)
    core = core > max(0.7 * core.max(), 0.1)
    for centre in brain.draw(core, count, rng):
        stamp_tube(volume, centre, centre + rng.normal(0, 1.2, 3), float(rng.uniform(0.6, 1.6)))
    return volume * np.clip(brain.maps["pallidum"] + 0.3 * brain.maps["white"], 0, 1)


def _lateral(brain: _Brain, side: int) -> np.ndarray:
    """Return the voxels of the lateral ventricle of a side (-1 or 1), without its temporal horn."""
    height = np.arange(BOX_SHAPE[2]) - brain.centre[2]
    fluid = brain.maps["ventricle"] + brain.maps["choroid"] > 0.5
    return fluid & (np.sign(brain.side) == side) & (np.abs(brain.side) > 3) & (height > -14)


def _choroid(brain: _Brain, age: float, rng: np.random.Generator, drawn: dict) -> np.ndarray:
    """Draw the choroid plexus of the atria, of similar size on both sides."""
    volume = np.zeros(BOX_SHAPE, np.float32)
    present = rng.uniform() < prevalence("choroid", age)
    size = float(rng.uniform(2.0, 5.0))
    drawn["choroid_mm"] = size * present
    depth = brain.centre[1] + 12 - np.arange(BOX_SHAPE[1])[:, None]
    for side in (-1, 1):
        atrium = _lateral(brain, side) & (np.abs(brain.side) > 12) & (np.abs(depth + 10) < 12)
        radii = size * rng.uniform(0.7, 1.2)
        places = np.argwhere(atrium)
        if not present or len(places) < 20:
            continue
        centre = places.mean(0)
        for _ in range(6):
            offset = rng.normal(0, 0.5 * radii, 3)
            stamp_tube(volume, centre + offset, centre + offset * 1.5, radii * 0.5)
    # It stays off the wall of the ventricle and has a rough surface.
    fluid = brain.maps["ventricle"] + brain.maps["choroid"]
    texture = (0.8 + 0.25 * random_field(rng, 2.2)[0]).clamp(0, 1).cpu().numpy()
    return volume * np.clip(fluid, 0, 1) * texture


def _white_matter(brain: _Brain, age: float, rng: np.random.Generator, drawn: dict) -> np.ndarray:
    """Draw caps at the horns of the ventricles and punctate foci, as white matter change (0 to 1)."""
    volume = np.zeros(BOX_SHAPE, np.float32)
    caps = rng.uniform() < prevalence("caps", age)
    reach = float(rng.uniform(1.5, 3.0) + 0.02 * max(age - 40, 0))
    strength = float(rng.uniform(0.3, 0.8))
    drawn["caps_mm"] = reach * caps
    for side in (-1, 1):
        places = np.argwhere(_lateral(brain, side) & (np.abs(brain.side) > 4))
        if not caps or len(places) < 50:
            continue
        order = np.argsort(places[:, 1])
        for tip, factor in ((places[order[:30]], 1.0), (places[order[-30:]], rng.uniform(0.6, 1.2))):
            volume = np.maximum(volume, strength * np.clip(2 * _ball(tip.mean(0), reach * factor), 0, 1))
    foci = rng.uniform() < prevalence("white_matter_foci", age)
    count = int(np.clip(rng.lognormal(np.log(2 + 0.15 * max(age - 30, 0)), 0.6), 1, 25)) * foci
    drawn["white_matter_foci"] = count
    height = np.arange(BOX_SHAPE[2]) - brain.centre[2]
    white = (ndimage.uniform_filter(brain.maps["white"], 5) > 0.85) & (height > -10)
    spots = np.zeros(BOX_SHAPE, np.float32)
    for centre in brain.draw(white, count, rng):
        stamp_tube(spots, centre, centre + rng.normal(0, 0.8, 3), float(rng.uniform(0.7, 2.2)))
    volume = np.maximum(volume, spots * rng.uniform(0.5, 1.0))
    return volume * np.clip(brain.maps["white"], 0, 1)


def _cavum(brain: _Brain, age: float, rng: np.random.Generator, drawn: dict) -> tuple | None:
    """Draw the fluid of a cavum septi pellucidi between the frontal horns, and its two leaves."""
    present = rng.uniform() < prevalence("cavum", age)
    width = float(rng.uniform(1.2, 3.5))
    drawn["cavum_mm"] = 0.0
    height = np.arange(BOX_SHAPE[2]) - brain.centre[2]
    ahead = brain.centre[1] - np.arange(BOX_SHAPE[1])[:, None]
    horns = (brain.maps["ventricle"] > 0.5) & (np.abs(brain.side) < 12) & (height > -2) & (ahead > 5)
    places = np.argwhere(horns)
    if not present or len(places) < 200:
        return None
    drawn["cavum_mm"] = 2 * width
    middle, spread = places.mean(0), places.std(0)
    radii = np.array([width, np.clip(1.6 * spread[1], 6, 18), np.clip(1.2 * spread[2], 3, 9)])
    y, z = ((np.arange(BOX_SHAPE[a]) - middle[a]) / radii[a] for a in (1, 2))
    flat = (y[:, None] ** 2 + z**2).astype(np.float32)

    def ellipsoid(wider: float) -> np.ndarray:
        distance = np.sqrt((brain.side / (radii[0] + wider)) ** 2 + flat)
        return np.clip((1 - distance) * (radii[0] + wider) + 0.5, 0, 1)

    inner = ellipsoid(0.0)
    return inner, np.clip(ellipsoid(1.0) - inner, 0, 1)


def _arteries(brain: _Brain, age: float, rng: np.random.Generator, drawn: dict) -> np.ndarray:
    """Draw arteries as random paths in the fluid around the brain, thick at the base and thin elsewhere."""
    volume = np.zeros(BOX_SHAPE, np.float32)
    present = rng.uniform() < prevalence("artery", age)
    count = int(rng.integers(6, 26)) * present
    drawn["arteries"] = count
    fluid = brain.maps["csf"]
    room = ndimage.uniform_filter(fluid, 3)
    height = np.arange(BOX_SHAPE[2]) - brain.centre[2]
    for start in brain.draw((room > 0.6) & brain.brain, count, rng):
        at_base = height[int(start[2])] < 0
        radius = float(rng.uniform(0.8, 1.8) if at_base else rng.uniform(0.5, 1.0))
        position, direction = start, rng.normal(0, 1, 3)
        for _ in range(int(rng.integers(8, 40))):
            # The next point is the one with most fluid around it of five in about the same direction.
            turns = direction / np.linalg.norm(direction) + rng.normal(0, 0.5, (5, 3))
            options = position + 1.5 * turns / np.linalg.norm(turns, axis=1, keepdims=True)
            cells = np.clip(np.round(options).astype(int), 0, np.array(BOX_SHAPE) - 1)
            best = room[tuple(cells.T)].argmax()
            if room[tuple(cells[best])] < 0.35:
                break
            stamp_tube(volume, position, options[best], radius)
            position, direction = options[best], turns[best]
    return volume * np.clip(fluid, 0, 1)


def _falx(brain: _Brain, age: float, rng: np.random.Generator, drawn: dict) -> np.ndarray:
    """Draw the falx: a sheet in the fissure between the hemispheres, above and in front of the thalami."""
    present = rng.uniform() < prevalence("falx", age)
    thickness = float(rng.uniform(0.6, 1.6))
    drawn["falx_mm"] = thickness * present
    height = np.arange(BOX_SHAPE[2]) - brain.centre[2]
    ahead = brain.centre[1] - np.arange(BOX_SHAPE[1])[:, None]
    place = (height > 18) | ((ahead > 35) & (height > -15)) | ((ahead < -30) & (height > 0))
    bent = brain.side + random_field(rng, 40.0)[0].cpu().numpy()
    sheet = np.clip(thickness / 2 - np.abs(bent) + 0.5, 0, 1) * min(1.0, thickness)
    return (sheet * place * np.clip(brain.maps["csf"], 0, 1) * present).astype(np.float32)


def _sinus(
    brain: _Brain, outside: np.ndarray, age: float, rng: np.random.Generator, drawn: dict
) -> np.ndarray:
    """Draw the superior sagittal and the transverse sinuses at the brain edge."""
    present = rng.uniform() < prevalence("sinus", age)
    reach, width = float(rng.uniform(1.0, 4.0)), float(rng.uniform(2.0, 4.0))
    drawn["sinus_mm"] = reach * present
    volume = np.zeros(BOX_SHAPE, np.float32)
    if not present:
        return volume
    height = np.arange(BOX_SHAPE[2]) - brain.centre[2]
    ahead = brain.centre[1] - np.arange(BOX_SHAPE[1])[:, None]
    edge = np.clip(reach - outside + 0.5, 0, 1) * np.clip(outside + 2.5, 0, 1)
    edge *= np.where(outside < 0, brain.maps["csf"], 1)
    # Its section is a triangle with the tip towards the fissure.
    half_width = width * np.clip(0.5 + 0.25 * outside, 0.2, 1.2)
    sagittal = np.clip(half_width - np.abs(brain.side) + 0.5, 0, 1) * (
        (height > 30) | ((ahead < -55) & (height > -10))
    )
    # The tentorium lies where cerebrum and cerebellum meet.
    above, below = (
        smooth(tensor(brain.maps[name]), 4.0).cpu().numpy() for name in ("cortex", "cerebellar_cortex")
    )
    transverse = np.clip(20 * (above * below - 0.02), 0, 1) * (ahead < -25) * (np.abs(brain.side) > 6)
    return (edge * np.maximum(sagittal, transverse)).astype(np.float32)


def _remnants(
    brain: _Brain, outside: np.ndarray, kind: str, age: float, rng: np.random.Generator, drawn: dict
) -> np.ndarray:
    """Draw patches of dura or fat at the brain edge that skull-stripping has left."""
    present = rng.uniform() < prevalence(kind, age)
    count = int(rng.integers(1, 7)) * present
    drawn[f"{kind}_remnants"] = count
    volume = np.zeros(BOX_SHAPE, np.float32)
    thickness = rng.uniform(1.0, 3.5)
    rough = random_field(rng, 6.0)[0].cpu().numpy()
    for centre in brain.draw((outside > 0) & (outside < 2), count, rng):
        patch = 2.5 * _ball(centre, float(rng.uniform(4.0, 11.0))) + 0.4 * rough - 0.8
        volume = np.maximum(volume, np.clip(patch, 0, 1))
    return volume * np.clip(thickness - outside + 0.5, 0, 1) * np.clip(outside + 0.5, 0, 1)


def draw_findings(
    fractions: torch.Tensor,
    change: torch.Tensor,
    brain: torch.Tensor,
    side: torch.Tensor,
    age: float,
    rng: np.random.Generator,
) -> Findings:
    """Draw the normal findings of a subject.

    Parameters
    ----------
    fractions : torch.Tensor, shape (len(CLASSES), X, Y, Z)
        Tissue maps.
    change : torch.Tensor, shape (X, Y, Z)
        Age-related white matter change, 0 to 1.
    brain : torch.Tensor of bool, shape (X, Y, Z)
        Brain mask.
    side : torch.Tensor, shape (X, Y, Z)
        Distance from the midline, mm, negative on one side.
    age : float
        Age, years, on which the frequency and extent of findings depend.
    rng : numpy.random.Generator
        Source of all random numbers.

    Returns
    -------
    Findings
        New maps, mask and findings.
    """
    drawn: dict = {}
    where = _Brain(fractions, brain, side)
    change = torch.maximum(change, tensor(_white_matter(where, age, rng, drawn)))
    cavum = _cavum(where, age, rng, drawn)
    if cavum is not None:
        total = fractions.sum(0)
        for part, name in zip(cavum, ("ventricle", "white"), strict=True):
            weight = tensor(part.astype(np.float32))
            fractions = fractions * (1 - weight)
            fractions[INDEX[name]] += total * weight
    # Distance from the brain mask: positive outside, negative inside, mm.
    mask = where.brain
    outside = ndimage.distance_transform_edt(~mask) - ndimage.distance_transform_edt(mask)
    outside = (outside - np.sign(outside) * 0.5).astype(np.float32)
    edges = {
        "sinus": _sinus(where, outside, age, rng, drawn),
        "dura": _remnants(where, outside, "dura", age, rng, drawn),
        "fat": _remnants(where, outside, "fat", age, rng, drawn),
    }
    for weight in edges.values():
        mask = mask | (weight > 0.5)
    maps = {
        "perivascular": _perivascular(where, age, rng, drawn),
        "iron": _iron(where, age, rng, drawn),
        "calcified": _calcified(where, age, rng, drawn),
        "choroid": _choroid(where, age, rng, drawn),
        "artery": _arteries(where, age, rng, drawn),
    }
    edges["dura"] = np.maximum(edges["dura"], _falx(where, age, rng, drawn))
    findings = [
        Finding(kind, tensor(weight.astype(np.float32)))
        for kind, weight in (maps | edges).items()
        if weight.any()
    ]
    return Findings(fractions, change, tensor(_largest_component(mask)), findings, drawn)


def _largest_component(mask: np.ndarray) -> np.ndarray:
    """Return the largest component of a mask."""
    labels, count = ndimage.label(mask)
    return mask if count == 1 else labels == np.bincount(labels.ravel())[1:].argmax() + 1


def add_findings(
    modality: str,
    image: torch.Tensor,
    findings: list[Finding],
    means: dict[str, float],
    rng: np.random.Generator,
) -> tuple[torch.Tensor, dict]:
    """Replace the signal of tissue by that of normal findings.

    Parameters
    ----------
    modality : {"T1w", "T2w", "FLAIR"}
        Contrast.
    image : torch.Tensor, shape (X, Y, Z)
        Noise-free signal.
    findings : list of Finding
        Findings of the subject.
    means : dict
        Mean signal by class of the scan.
    rng : numpy.random.Generator
        Source of the signals.

    Returns
    -------
    image : torch.Tensor, shape (X, Y, Z)
        Signal with the findings, at least 0.02.
    drawn : dict
        Reference class and factor by kind of finding.
    """
    drawn = {}
    texture = (1 + 0.1 * random_field(rng, 3.0)[0]).clamp(0.7, 1.3)
    for finding in findings:
        options = SIGNALS[finding.kind][modality]
        chosen = rng.choice(len(options), p=[option[0] for option in options])
        _, reference, low, high = options[chosen]
        factor = float(rng.uniform(low, high))
        target = image * factor if reference == "self" else means[reference] * factor * texture
        image = image + (target - image) * finding.weight
        drawn[finding.kind] = {"reference": reference, "factor": factor}
    return image.clamp_min(0.02), drawn


def draw_artefacts(rng: np.random.Generator) -> dict:
    """Draw the artefacts of one scan.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of all random numbers.

    Returns
    -------
    dict
        Thickness of the slices (mm), or None for that of the protocol; amplitude of the ghosts, shift of the
        head (mm) and truncated fraction of k-space; loss of signal at the base (fractions); loss at vertex,
        base and one side of the coil (fractions). 0 where an artefact is absent.
    """
    present = {name: bool(rng.uniform() < probability) for name, probability in ARTEFACTS.items()}
    return {
        "thickness": float(np.round(rng.uniform(3.0, 6.0), 1)) if present["thick_slices"] else None,
        "ghost": float(rng.uniform(0.01, 0.05)) * present["ghosts"],
        "ghosts_per_field": float(rng.uniform(2.0, 12.0)),
        "motion_mm": (rng.uniform(-1.5, 1.5, 3) * present["ghosts"]).tolist(),
        "truncated": float(rng.uniform(0.0, 0.35)) * present["ghosts"],
        "frontal_loss": float(rng.uniform(0.1, 0.7)) * present["signal_loss"],
        "temporal_loss": (rng.uniform(0.0, 0.5, 2) * present["signal_loss"]).tolist(),
        "loss_mm": float(rng.uniform(6.0, 13.0)),
        "coil_vertex": float(rng.uniform(0.0, 0.35)) * present["coil"],
        "coil_base": float(rng.uniform(0.0, 0.45)) * present["coil"],
        "coil_front": float(rng.uniform(-0.2, 0.2)) * present["coil"],
    }


def add_artefacts(
    image: torch.Tensor, fractions: torch.Tensor, brain: torch.Tensor, artefacts: dict
) -> torch.Tensor:
    """Add ghosts, ringing and loss of signal to a noise-free signal.

    Parameters
    ----------
    image : torch.Tensor, shape (X, Y, Z)
        Signal.
    fractions : torch.Tensor, shape (len(CLASSES), X, Y, Z)
        Tissue maps, for the position of the loss of signal.
    brain : torch.Tensor of bool, shape (X, Y, Z)
        Brain mask.
    artefacts : dict
        Result of :func:`draw_artefacts`.

    Returns
    -------
    torch.Tensor, shape (X, Y, Z)
        Signal, at least 0.02.
    """
    if artefacts["ghost"]:
        image = add_ghosts(image, artefacts)
    thalamus = torch.nonzero(fractions[INDEX["thalamus"]] > 0.5).float().mean(0).cpu().numpy()
    loss = np.ones(BOX_SHAPE, np.float32)
    # Above the sphenoid sinus, and above the ear canals of both sides.
    sites = [((0, -38, -36), artefacts["frontal_loss"])]
    sites += [
        ((45 * side, 4, -42), depth) for side, depth in zip((-1, 1), artefacts["temporal_loss"], strict=True)
    ]
    for offset, depth in sites:
        if depth:
            loss *= 1 - depth * _ball(thalamus + offset, artefacts["loss_mm"])
    inside = torch.nonzero(brain)
    low, high = inside.min(0).values, inside.max(0).values
    y, z = ((torch.arange(BOX_SHAPE[a], dtype=torch.float32) - low[a]) / (high[a] - low[a]) for a in (1, 2))
    up, down = ((z - 0.6) / 0.4).clamp(0, 1) ** 2, ((0.4 - z) / 0.4).clamp(0, 1) ** 2
    along = (1 - artefacts["coil_vertex"] * up) * (1 - artefacts["coil_base"] * down)
    across = 1 + artefacts["coil_front"] * (y[:, None] - 0.5)
    return (image * tensor(loss) * along * across).clamp_min(0.02)


def add_ghosts(image: torch.Tensor, artefacts: dict) -> torch.Tensor:
    """Add ghosts and ringing along the second axis, which is the phase-encoding axis.

    A third of k-space is acquired after a shift of the head, periodic modulation of its lines gives ghosts,
    and truncation gives ringing.

    Parameters
    ----------
    image : torch.Tensor, shape (X, Y, Z)
        Signal.
    artefacts : dict
        Result of :func:`draw_artefacts`.

    Returns
    -------
    torch.Tensor, shape (X, Y, Z)
        Magnitude, with the same mean as the image.
    """
    space = torch.fft.fftn(image)
    waves = [torch.fft.fftfreq(size) for size in image.shape]
    line = waves[1].abs()
    phase = sum(
        wave.reshape([-1 if a == axis else 1 for a in range(3)]) * shift
        for axis, (wave, shift) in enumerate(zip(waves, artefacts["motion_mm"], strict=True))
    )
    late = (waves[1] > 1 / 6)[None, :, None]
    space = torch.where(late, space * torch.exp(-2j * np.pi * phase), space)
    pulse = torch.cos(2 * np.pi * waves[1] * image.shape[1] / artefacts["ghosts_per_field"])
    kept = (line <= 0.5 * (1 - artefacts["truncated"])).float()
    modulation = (1 + 2 * artefacts["ghost"] * (pulse - 1)) * kept
    return torch.fft.ifftn(space * modulation[None, :, None]).abs()
