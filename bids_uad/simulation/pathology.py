"""Simulated lesions with exact masks: stroke, multiple sclerosis, white matter hyperintensities, tumours.

Shapes are those of real lesions (`shapes`) or ellipsoids with random surfaces. A lesion is a map of fractions
between 0 and 1 with an edge of about one voxel; its mask is the region above 0.5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from bids_uad.simulation.anatomy import CLASSES
from bids_uad.simulation.shapes import Shape
from bids_uad.simulation.spatial import BOX_SHAPE, random_field, smooth

KINDS = ("stroke", "ms", "wmh", "tumour")
INDEX = {name: position for position, name in enumerate(CLASSES)}


@dataclass(frozen=True)
class Lesion:
    """Lesion with nested partial-volume maps.

    Attributes
    ----------
    kind : {"stroke", "ms", "wmh", "tumour"}
        Kind of lesion.
    fraction : torch.Tensor, shape (X, Y, Z)
        Fraction of lesion per voxel, 0 to 1.
    core : torch.Tensor, shape (X, Y, Z)
        Fraction of its core (fluid of an old stroke, solid tumour), 0 to `fraction`.
    contrast : float
        Weight of the lesion's signal against that of the tissue: 1 for a realistic lesion, 0 for an invisible
        one.
    drawn : dict
        Drawn parameters.
    """

    kind: str
    fraction: torch.Tensor
    core: torch.Tensor
    contrast: float
    drawn: dict


def _coordinates(centre: np.ndarray) -> torch.Tensor:
    """Compute the offset of each voxel from a centre, shape (3, X, Y, Z)."""
    axes = [
        torch.arange(size, dtype=torch.float32) - float(c) for size, c in zip(BOX_SHAPE, centre, strict=True)
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def _blob(centre: np.ndarray, radii: np.ndarray, roughness: torch.Tensor, amount: float) -> torch.Tensor:
    """Draw an ellipsoid whose surface is displaced by a random field, with an edge of about one voxel."""
    scaled = _coordinates(centre) / torch.tensor(radii, dtype=torch.float32)[:, None, None, None]
    distance = (1.0 - scaled.square().sum(0).sqrt() + amount * roughness) * float(radii.min())
    return (distance + 0.5).clamp(0, 1)


def _draw_voxel(weight: torch.Tensor, rng: np.random.Generator) -> np.ndarray:
    """Draw a voxel index with probability proportional to `weight`."""
    flat = weight.flatten().double().cumsum(0).cpu().numpy()
    position = int(np.searchsorted(flat, rng.uniform(0, flat[-1])))
    return np.array(np.unravel_index(min(position, flat.size - 1), BOX_SHAPE), dtype=float)


def draw_tumour_site(rng: np.random.Generator, volume: float | None = None) -> tuple[np.ndarray, float]:
    """Draw the site of a tumour, whose mass effect is part of the anatomy.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of all random numbers.
    volume : float, default=None
        Target volume of core and oedema, mL; random if None.

    Returns
    -------
    centre : numpy.ndarray, shape (3,)
        Index in the box.
    radius : float
        Radius of the core, mm.
    """
    side = rng.choice([-1.0, 1.0])
    centre = np.array([79.0 + side * rng.uniform(18, 42), rng.uniform(60, 140), rng.uniform(62, 100)])
    radius = float(rng.uniform(8.0, 18.0))
    if volume is not None:
        # Oedema approximately doubles the volume.
        radius = float(np.clip((1000 * volume / 2 * 3 / (4 * np.pi)) ** (1 / 3), 2.0, 32.0))
    return centre, radius


Parts = tuple[torch.Tensor, torch.Tensor, dict]
CAVITY_AGE = 0.35
"""Age of a stroke, from 0 to 1, above which it has a cavity."""


def _inner(fraction: torch.Tensor, depth: float) -> torch.Tensor:
    """Return the inner part of a shape; `depth` from 0 (nothing) to 1 (nearly everything)."""
    return torch.minimum(((smooth(fraction, 3.0) - (1 - depth)) * 3.0).clamp(0, 1), fraction)


def _stroke(fractions: torch.Tensor, rng: np.random.Generator, scale: float, shape: Shape | None) -> Parts:
    old = float(rng.uniform(0.0, 1.0))
    if shape is not None:
        fraction = shape(scale)
        core = _inner(fraction, old) if old > CAVITY_AGE else torch.zeros_like(fraction)
        return fraction, core, {"old": old}
    tissue = fractions[INDEX["cortex"]] + fractions[INDEX["white"]]
    centre = _draw_voxel(tissue, rng)
    radii = scale * rng.uniform(9.0, 28.0) * rng.uniform(0.65, 1.35, 3)
    rough = 0.7 * random_field(rng, 14.0)[0] + 0.3 * random_field(rng, 5.0)[0]
    fraction = _blob(centre, radii, rough, 0.30)
    # Arterial territories end at the midline.
    side = _coordinates(np.array([79.0, 0, 0]))[0] * np.sign(centre[0] - 79.0)
    fraction = fraction * (side + 0.5).clamp(0, 1)
    core = _blob(centre, radii * old, rough, 0.35) if old > CAVITY_AGE else torch.zeros_like(fraction)
    return fraction, torch.minimum(core, fraction), {"radii_mm": radii.tolist(), "old": old}


def _plaques(fractions: torch.Tensor, rng: np.random.Generator, scale: float, shape: Shape | None) -> Parts:
    # Plaques start in white matter and may extend into grey matter, but not into fluid.
    keep = (1 - fractions[INDEX["ventricle"]] - fractions[INDEX["csf"]]).clamp(0, 1)
    none = torch.zeros(BOX_SHAPE)
    if shape is not None:
        return shape(scale) * keep, none, {}
    white = fractions[INDEX["white"]]
    near = smooth(fractions[INDEX["ventricle"]], 6.0)
    weight = (white > 0.9) * (0.04 + near / near.max())
    fraction = none.clone()
    rough = random_field(rng, 4.0)[0]
    count = int(rng.integers(6, 28))
    for _ in range(count):
        radii = np.clip(rng.lognormal(np.log(2.8), 0.4), 1.6, 8.0) * rng.uniform(0.7, 1.4, 3) * scale
        fraction = torch.maximum(fraction, _blob(_draw_voxel(weight, rng), radii, rough, 0.2))
    return fraction * keep, none, {"plaques": count}


def _hyperintensities(
    fractions: torch.Tensor, rng: np.random.Generator, scale: float, shape: Shape | None
) -> Parts:
    white, ventricle = fractions[INDEX["white"]], fractions[INDEX["ventricle"]]
    none = torch.zeros(BOX_SHAPE)
    if shape is not None:
        return shape(scale) * (white * 1.5 - 0.25).clamp(0, 1), none, {}
    reach = float(rng.uniform(2.5, 6.0)) * scale
    near = smooth(ventricle, reach)
    patches = 0.7 * random_field(rng, 10.0)[0] + 0.5 * random_field(rng, 4.0)[0]
    around = ((near + 0.09 * patches - 0.20) * 2.0 * reach + 0.5).clamp(0, 1)
    fraction = around * (white * 1.5 - 0.25).clamp(0, 1)
    weight = (smooth(white, 2.0) > 0.85).float()
    rough = random_field(rng, 4.0)[0]
    count = int(rng.integers(3, 18))
    for _ in range(count):
        radii = rng.uniform(1.5, 4.0) * rng.uniform(0.7, 1.5, 3) * scale
        spot = _blob(_draw_voxel(weight, rng), radii, rough, 0.2)
        fraction = torch.maximum(fraction, spot * (white + fractions[INDEX["cortex"]]).clamp(0, 1))
    return fraction, none, {"reach_mm": reach, "spots": count}


def _tumour(
    fractions: torch.Tensor, rng: np.random.Generator, scale: float, site: tuple[np.ndarray, float]
) -> Parts:
    centre, radius = site
    radii = scale * radius * rng.uniform(0.8, 1.25, 3)
    rough = 0.7 * random_field(rng, 10.0)[0] + 0.3 * random_field(rng, 4.0)[0]
    core = _blob(centre, radii, rough, 0.2)
    oedema_scale = float(rng.uniform(1.3, 2.1))
    # Oedema extends along white matter and ends at cortex and fluid.
    white = smooth(fractions[INDEX["white"]], 1.0)
    reach = _blob(centre, radii * oedema_scale, rough + 1.2 * (white - 0.6), 0.4)
    oedema = reach * (white * 1.6 - 0.3).clamp(0, 1)
    return torch.maximum(core, oedema), core, {"radii_mm": radii.tolist(), "oedema": oedema_scale}


@dataclass(frozen=True)
class LesionTarget:
    """Requested properties of a lesion.

    Parameters
    ----------
    shape : callable, default=None
        Shape of a real lesion, see `shapes.real_shape`; not for tumours. If None, the shape is drawn.
    volume : float, default=None
        Volume, mL; if None, that of the drawn lesion.
    contrast : float, default=1.0
        See `Lesion`.
    """

    shape: Shape | None = None
    volume: float | None = None
    contrast: float = 1.0


ATTEMPTS = 6
MAX_FLAIR = 1.9
"""Brightest signal of a lesion in FLAIR scans, relative to cortex."""
VOLUME_TOLERANCE = 0.1
"""Accepted relative deviation from the requested volume."""


def make_lesion(
    kind: str,
    fractions: torch.Tensor,
    brain: torch.Tensor,
    draw: Callable[[], np.random.Generator],
    site: tuple[np.ndarray, float] | None = None,
    target: LesionTarget | None = None,
) -> Lesion:
    """Draw a lesion in a brain.

    A requested volume is reached by scaling the same lesion. If the anatomy does not permit it (a lesion of
    white matter is limited by its volume), the closest of six attempts is returned.

    Parameters
    ----------
    kind : {"stroke", "ms", "wmh", "tumour"}
        Kind of lesion.
    fractions : torch.Tensor, shape (len(CLASSES), X, Y, Z)
        Tissue maps.
    brain : torch.Tensor of bool, shape (X, Y, Z)
        Brain mask.
    draw : callable
        Returns a new generator with the same random numbers at every call.
    site : tuple, default=None
        Result of :func:`draw_tumour_site`, required for tumours.
    target : LesionTarget, default=None
        Requested shape, volume and contrast; by default all are drawn.

    Returns
    -------
    Lesion
        Lesion, 0 outside the brain.
    """
    target = target or LesionTarget()
    inside = brain.float()
    scale, best = 1.0, None
    for _ in range(ATTEMPTS):
        if kind == "tumour":
            fraction, core, drawn = _tumour(fractions, draw(), scale, site)
        else:
            maker = {"stroke": _stroke, "ms": _plaques, "wmh": _hyperintensities}[kind]
            fraction, core, drawn = maker(fractions, draw(), scale, target.shape)
        fraction = fraction * inside
        volume = float((fraction > 0.5).sum()) / 1000
        drawn |= {"scale": scale, "volume_ml": volume, "contrast": target.contrast}
        lesion = Lesion(kind, fraction, torch.minimum(core, fraction), target.contrast, drawn)
        error = 0.0 if target.volume is None else abs(volume / target.volume - 1)
        if best is None or error < best[0]:
            best = (error, lesion)
        if error <= VOLUME_TOLERANCE:
            break
        scale *= float(np.clip((target.volume / max(volume, 0.001)) ** (1 / 3), 0.4, 2.5))
    return best[1]


def add_lesion_signal(
    modality: str, image: torch.Tensor, lesion: Lesion, means: dict[str, float], rng: np.random.Generator
) -> torch.Tensor:
    """Replace the signal of tissue by that of a lesion, in proportion to its fraction.

    Parameters
    ----------
    modality : {"T1w", "T2w", "FLAIR"}
        Contrast.
    image : torch.Tensor, shape (X, Y, Z)
        Noise-free signal.
    lesion : Lesion
        Lesion on the same grid.
    means : dict
        Class means of the scan.
    rng : numpy.random.Generator
        Source of all random numbers.

    Returns
    -------
    torch.Tensor, shape (X, Y, Z)
        Signal with the lesion; unchanged outside it, and everywhere if its contrast is 0.

    Notes
    -----
    The signal changes from that of tissue towards that of fluid, in FLAIR towards `MAX_FLAIR`: free water is
    dark there, but water in tissue is bright. Cavities have the signal of fluid in all contrasts.
    """
    fluid, grey, white = means["ventricle"], means["cortex"], means["white"]
    # Range of the relative change of the signal.
    ranges = {"stroke": (0.30, 0.65), "ms": (0.30, 0.60), "wmh": (0.22, 0.45), "tumour": (0.28, 0.55)}
    low, high = ranges[lesion.kind]
    towards = rng.uniform(low, high) * (0.75 if modality == "T1w" else 1.0)
    fine, middle = random_field(rng, 3.0)[0], random_field(rng, 9.0)[0]
    variation = (1 + 0.12 * fine + 0.15 * middle).clamp(0.5, 1.5)
    flair = modality == "FLAIR"
    change = (MAX_FLAIR * grey if flair else fluid) - image
    if flair and fluid < 0.6 * min(white, grey):
        # Fluid of sulci within the lesion stays dark.
        change = change * ((image - fluid) / (0.6 * min(white, grey) - fluid)).clamp(0, 1)
    outer = image + change * (towards * variation).clamp(0, 1)
    if lesion.kind == "tumour":
        level = grey * rng.uniform(0.85, 1.45) if flair else grey + (fluid - grey) * rng.uniform(-0.05, 0.35)
        patchy = level + abs(fluid - white) * (0.12 * middle + 0.05 * fine)
        necrosis = torch.sigmoid(4.0 * (middle - rng.uniform(0.2, 1.2)))
        # In FLAIR, the signal of necrosis lies between those of fluid and cortex, as its protein content.
        inner = (
            patchy + (grey + (fluid - grey) * (rng.uniform(0.0, 0.8) if flair else 0.8) - patchy) * necrosis
        )
    else:
        inner = image + (fluid - image) * rng.uniform(0.8, 0.97)
    # The signal of the core replaces that of the outer part.
    ratio = lesion.core / lesion.fraction.clamp_min(1e-6)
    changed = outer + (inner - outer) * ratio
    return (image + (changed - image) * lesion.fraction * lesion.contrast).clamp_min(0.02)
