"""Signal of tissue maps: class means of a scanner, and the variation within a class.

Signals are relative to white matter (T1w), to cerebrospinal fluid (T2w) or to cortex (FLAIR). The ranges are
those of real magnitude scans, divided by the 99.5th percentile of the brain: gradient-echo and spin-echo T1w,
turbo-spin-echo T2w, and fluid-attenuated turbo spin echo in two and three dimensions (FLAIR).
"""

from __future__ import annotations

import nibabel as nib
import numpy as np
import torch

from bids_uad.simulation.anatomy import CLASSES
from bids_uad.simulation.spatial import BOX_SHAPE, box_points, random_field, smooth, tensor
from bids_uad.space import icbm_to_sri24

CORTEX_TO_WHITE = {
    "T1w": {
        "thalamus": (0.52, 0.08),
        "striatum": (0.20, 0.06),
        "pallidum": (0.72, 0.07),
        "hippocampus": (0.05, 0.05),
        "cerebellar_cortex": (0.02, 0.07),
        "cerebellar_white": (0.92, 0.04),
        "brainstem": (0.85, 0.06),
        "choroid": (-0.35, 0.15),
    },
    "T2w": {
        "thalamus": (0.55, 0.10),
        "striatum": (0.25, 0.12),
        "pallidum": (1.10, 0.12),
        "hippocampus": (-0.15, 0.08),
        "cerebellar_cortex": (0.15, 0.12),
        "cerebellar_white": (0.90, 0.10),
        "brainstem": (0.75, 0.12),
        "choroid": (-1.2, 0.4),
    },
    "FLAIR": {
        "thalamus": (0.50, 0.15),
        "striatum": (0.25, 0.15),
        "pallidum": (1.20, 0.25),
        "hippocampus": (-0.35, 0.20),
        "cerebellar_cortex": (0.35, 0.20),
        "cerebellar_white": (0.95, 0.15),
        "brainstem": (0.70, 0.20),
        "choroid": (0.0, 0.5),
    },
}
"""Mean and standard deviation of the signal of a class, on a scale from cortex (0) to white matter (1)."""
CONTRASTS = tuple(CORTEX_TO_WHITE)
CAPS = ((18.0, 33.0, 8.0), (-18.0, 33.0, 8.0), (28.0, -48.0, 12.0), (-28.0, -48.0, 12.0))
"""White matter at the horns of the lateral ventricles, bright in FLAIR scans of healthy people (Sze et al.
1986); ICBM152 world coordinates, mm."""
FLOW = (
    (0.0, -15.0, 2.0),  # third ventricle
    (0.0, 2.0, 8.0),  # interventricular foramina
    (0.0, -34.0, -12.0),  # aqueduct
    (0.0, -46.0, -32.0),  # fourth ventricle
    (0.0, -8.0, -34.0),  # prepontine cistern
    (0.0, 2.0, -20.0),  # suprasellar cistern
    (18.0, -30.0, -14.0),  # ambient cisterns
    (-18.0, -30.0, -14.0),
    (0.0, -50.0, -58.0),  # cisterna magna
)
"""Positions of pulsating fluid, which inversion suppresses incompletely (Bakshi et al. 2000); ICBM152 world
coordinates, mm."""


def class_means(modality: str, style: str, rng: np.random.Generator) -> dict[str, float]:
    """Draw the mean signal of every class.

    Parameters
    ----------
    modality : {"T1w", "T2w", "FLAIR"}
        Contrast.
    style : {"gradient_echo", "spin_echo", "random"}
        T1w spin echo has less contrast between grey and white matter. ``random`` draws all classes
        independently (domain randomisation, Billot et al. 2023).
    rng : numpy.random.Generator
        Source of all random numbers.

    Returns
    -------
    dict
        Mean signal by name of `CLASSES`. T1w: fluid < grey < white = 1. T2w: white < grey < fluid = 1.
        FLAIR: fluid < white < grey = 1.
    """
    if style == "random":
        return {name: float(rng.uniform(0.05, 1.0)) for name in CLASSES}
    if modality == "T1w":
        white = 1.0
        if style == "spin_echo":
            cortex, fluid = rng.uniform(0.80, 0.90), rng.uniform(0.32, 0.50)
        else:
            cortex, fluid = rng.uniform(0.54, 0.72), rng.uniform(0.08, 0.26)
        outer = 1.1
    elif modality == "T2w":
        fluid = 1.0
        white = rng.uniform(0.17, 0.33)
        cortex = white * rng.uniform(1.28, 1.50)
        outer = rng.uniform(0.72, 0.98)
    else:
        cortex = 1.0
        white, fluid = rng.uniform(0.70, 0.88), rng.uniform(0.08, 0.25)
        # Flow and membranes make the fluid around the brain brighter than that of the lateral ventricles.
        outer = rng.uniform(0.95, 1.40)
    means = {"csf": fluid * outer, "ventricle": fluid}
    means |= {"cortex": cortex, "white": white}
    for name, (centre, std) in CORTEX_TO_WHITE[modality].items():
        means[name] = cortex + (white - cortex) * rng.normal(centre, std)
    return {name: float(means[name]) for name in CLASSES}


def jitter_means(means: dict[str, float], rng: np.random.Generator) -> dict[str, float]:
    """Draw the class means of one scan: those of the scanner with a variation of 3 %."""
    return {name: float(mean * rng.lognormal(0.0, 0.03)) for name, mean in means.items()}


def simulate_signal(
    modality: str,
    fractions: torch.Tensor,
    means: dict[str, float],
    detail: torch.Tensor | None,
    change: torch.Tensor,
    rng: np.random.Generator,
) -> torch.Tensor:
    """Simulate the noise-free signal of a brain.

    Parameters
    ----------
    modality : {"T1w", "T2w", "FLAIR"}
        Contrast.
    fractions : torch.Tensor, shape (len(CLASSES), X, Y, Z)
        Tissue maps.
    means : dict
        Mean signal by class, from :func:`class_means`.
    detail : torch.Tensor or None, shape (X, Y, Z)
        Residual T1w intensity of the template, in units of the white-grey contrast.
    change : torch.Tensor, shape (X, Y, Z)
        Age-related white matter change, 0 to 1.
    rng : numpy.random.Generator
        Source of all random numbers.

    Returns
    -------
    torch.Tensor, shape (X, Y, Z)
        Signal, at least 0.02, relative units.
    """
    index = {name: position for position, name in enumerate(CLASSES)}
    values = torch.tensor([means[name] for name in CLASSES])
    image = torch.tensordot(values, fractions, dims=1)
    # The rest of a voxel (membranes, veins, edge of the skull) has a signal near that of fluid.
    image += (1 - fractions.sum(0)).clamp_min(0) * means["csf"] * (1.25 if modality == "T1w" else 0.8)

    contrast = means["white"] - means["cortex"]
    white = fractions[index["white"]] + fractions[index["cerebellar_white"]]
    near_white = smooth(white, 2.0)
    deep_white = smooth(near_white, 3.5)
    cortex = fractions[index["cortex"]] + fractions[index["cerebellar_cortex"]]
    # The inner cortex is more myelinated, the subcortical white matter less compact than the deep one.
    image += contrast * cortex * (near_white - 0.35) * rng.uniform(0.15, 0.4)
    image += contrast * white * (deep_white - 0.8) * rng.uniform(0.1, 0.35)

    solid = fractions.sum(0) - fractions[index["csf"]] - fractions[index["ventricle"]]
    coarse, middle, fine = (random_field(rng, scale)[0] for scale in (30.0, 7.0, 2.2))
    texture = 0.30 * coarse + 0.30 * middle + 0.40 * fine
    # The contrast of FLAIR is low, its texture is not.
    image += abs(contrast) * solid * texture * rng.uniform(0.10, 0.22) * (1.8 if modality == "FLAIR" else 1.0)
    if detail is not None:
        image += contrast * detail * {"T1w": 0.8, "T2w": 0.5, "FLAIR": 0.4}[modality] * solid
    folia = fractions[index["cerebellar_cortex"]] * _folia(rng)
    image += (means["csf"] - means["cortex"]) * folia * rng.uniform(0.08, 0.35)
    # Vessels and membranes in the fluid around the brain; there are none in the ventricles.
    vessels = random_field(rng, 3.0)[0]
    if modality == "T1w":
        image += means["csf"] * fractions[index["csf"]] * 0.30 * vessels.clamp(-1.0, 3.0)
        # Slow or enhanced blood and remnants of fat are the brightest voxels.
        bright = (vessels - rng.uniform(1.8, 3.0)).clamp(0.0, 1.0) * rng.uniform(0.2, 1.2)
        image += means["white"] * bright * (1 - solid - fractions[index["ventricle"]]).clamp(0, 1)
        image -= abs(contrast) * 0.8 * change
    elif modality == "FLAIR":
        image *= 1 + fractions[index["csf"]] * 0.25 * vessels.clamp(-2.0, 2.0)
        image += _flair_variants(fractions, means, change, rng)
    else:
        image *= 1 - fractions[index["csf"]] * 0.16 * (vessels - 0.3).clamp(0.0, 3.0)
        image += (means["ventricle"] - means["white"]) * 0.45 * change
    return image.clamp_min(0.02)


def _flair_variants(
    fractions: torch.Tensor, means: dict[str, float], change: torch.Tensor, rng: np.random.Generator
) -> torch.Tensor:
    """Draw the bright signal in FLAIR scans of healthy people: periventricular change, and pulsating fluid.

    Periventricular bands and caps are visible at all ages, and `change` increases with age. The fluid has no
    artefact in some scans, and is as bright as tissue in others, more so in two-dimensional scans.
    """
    ventricle = fractions[CLASSES.index("ventricle")]
    patches = torch.sigmoid(1.5 * random_field(rng, 7.0)[0])
    beside = (smooth(ventricle, 1.5) * 3.0).clamp(0, 1)
    near = (smooth(ventricle, 3.5) * 4.0).clamp(0, 1)
    bright = beside * rng.uniform(0.05, 0.30) + near * patches * _spots(CAPS, 8.0, rng) * rng.uniform(
        0.1, 0.5
    )
    white = fractions[CLASSES.index("white")]
    added = means["cortex"] * white * (bright + rng.uniform(0.9, 1.3) * change).clamp(0, 0.6)
    fluid = ventricle + fractions[CLASSES.index("csf")]
    flow = _spots(FLOW, 9.0, rng) * (random_field(rng, 5.0)[0] + 0.5).clamp(0.0, 1.2) * rng.uniform(0.0, 0.9)
    return added + (means["cortex"] - means["ventricle"]) * fluid * flow


def _spots(
    positions: tuple[tuple[float, float, float], ...], width: float, rng: np.random.Generator
) -> torch.Tensor:
    """Draw Gaussian weights, 0 to 1, of random strength at positions in ICBM152 space; `width` in mm."""
    points = box_points()
    weights = torch.zeros(BOX_SHAPE)
    for place in tensor(nib.affines.apply_affine(icbm_to_sri24(), positions)).float():
        squared = (points - place).square().sum(-1)
        weights = torch.maximum(weights, float(rng.uniform()) * torch.exp(-squared / (2 * width**2)))
    return weights


def _folia(rng: np.random.Generator) -> torch.Tensor:
    """Draw the fluid-filled fissures between cerebellar folia, 0 to 1: wavy sheets at 3 to 5 mm."""
    y, z = (torch.arange(size, dtype=torch.float32) for size in BOX_SHAPE[1:])
    tilt = rng.uniform(-0.6, 0.6)
    sheets = (z[None, :] + tilt * y[:, None])[None] * (2 * np.pi / rng.uniform(3.2, 5.0))
    wavy = sheets + 2.5 * random_field(rng, 16.0)[0] + 1.2 * random_field(rng, 6.0)[0]
    return torch.sin(wavy).clamp_min(0) ** 2
