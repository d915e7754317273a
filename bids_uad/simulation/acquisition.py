"""Simulated acquisition: scanners, scan settings, slice thickness, bias field, noise, and the brain mask."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch.nn import functional as F

from bids_uad.simulation.anatomy import CLASSES
from bids_uad.simulation.contrast import CONTRASTS, class_means
from bids_uad.simulation.spatial import (
    BOX_SHAPE,
    apply_axis,
    random_field,
    smooth,
    tensor,
)


@dataclass(frozen=True)
class Scanner:
    """Simulated scanner. Settings of single scans vary around its typical values.

    Attributes
    ----------
    name, manufacturer : str
        Name and manufacturer.
    field_strength : float
        Field strength, tesla.
    style : {"gradient_echo", "spin_echo", "random"}
        Contrast, see `contrast.class_means`.
    noise : float
        Typical standard deviation of the noise, relative to the brightest tissue.
    blur : float
        Typical standard deviation of the in-plane point spread, mm.
    bias : float
        Typical standard deviation of the log bias field.
    thick : float
        Probability of thick axial slices.
    means : dict
        Mean signal of every class, by modality.
    """

    name: str
    manufacturer: str
    field_strength: float
    style: str
    noise: float
    blur: float
    bias: float
    thick: float
    means: dict[str, dict[str, float]]


SPIN_ECHO_PROB = 0.12
"""Probability of a spin-echo T1w contrast."""


def draw_scanner(number: int, randomised: bool, rng: np.random.Generator) -> Scanner:
    """Draw a scanner.

    Parameters
    ----------
    number : int
        Index, which determines its name.
    randomised : bool
        Whether contrasts are random instead of realistic.
    rng : numpy.random.Generator
        Source of all random numbers.

    Returns
    -------
    Scanner
        Drawn scanner.
    """
    field_strength = float(rng.choice([1.5, 3.0]))
    spin_echo = rng.uniform() < SPIN_ECHO_PROB
    style = "random" if randomised else "spin_echo" if spin_echo else "gradient_echo"
    return Scanner(
        name=f"scanner{number + 1:02d}",
        manufacturer=str(rng.choice(["GE", "Philips", "Siemens"])),
        field_strength=field_strength,
        style=style,
        # Doubling the field reduces the noise by about 40 % and increases the bias field.
        noise=float(0.014 * (1.5 / field_strength) ** 0.7 * rng.lognormal(0.0, 0.3)),
        blur=float(rng.uniform(0.15, 0.45)),
        bias=float(0.12 * (field_strength / 1.5) ** 0.5 * rng.lognormal(0.0, 0.3)),
        thick=0.75 if spin_echo else float(rng.choice([0.02, 0.1, 0.3])),
        means={modality: class_means(modality, style, rng) for modality in CONTRASTS},
    )


@dataclass(frozen=True)
class ScanSettings:
    """Acquisition settings of one scan.

    Attributes
    ----------
    noise : float
        Standard deviation in each channel, relative to the 99.5th percentile of the signal.
    blur : float
        Standard deviation of the in-plane point spread, mm.
    thickness : float
        Thickness of the axial slices, mm; 1 for an isotropic scan.
    bias : float
        Standard deviation of the log bias field.
    gamma : float
        Exponent applied to the signal.
    """

    noise: float
    blur: float
    thickness: float
    bias: float
    gamma: float


def draw_scan_settings(scanner: Scanner, modality: str, rng: np.random.Generator) -> ScanSettings:
    """Draw the settings of one scan.

    Parameters
    ----------
    scanner : Scanner
        Scanner with typical values.
    modality : {"T1w", "T2w", "FLAIR"}
        Contrast; thick slices are more frequent in T2w scans, and most frequent and thickest in FLAIR scans.
    rng : numpy.random.Generator
        Source of all random numbers.

    Returns
    -------
    ScanSettings
        Drawn settings.
    """
    # Inversion reduces the signal of all tissue.
    noise = scanner.noise * (1.4 if modality == "FLAIR" else 1.0)
    more_often = {"T1w": 0.0, "T2w": 0.25, "FLAIR": 0.5}[modality]
    thick = rng.uniform() < min(scanner.thick + more_often, 0.9)
    thinnest, thickest = (3.0, 6.0) if modality == "FLAIR" else (2.0, 5.5)
    return ScanSettings(
        noise=float(noise * rng.lognormal(0.0, 0.3)),
        blur=float(scanner.blur * rng.uniform(0.7, 1.5)),
        thickness=float(np.round(rng.uniform(thinnest, thickest), 1)) if thick else 1.0,
        bias=float(scanner.bias * rng.uniform(0.5, 1.5)),
        gamma=float(rng.uniform(0.92, 1.10)),
    )


def slice_matrix(size: int, thickness: float, offset: float) -> torch.Tensor:
    """Compute the matrix that averages 1 mm slices to thick slices.

    Parameters
    ----------
    size : int
        Number of 1 mm slices.
    thickness : float
        Slice thickness without gap, mm, at least 1.
    offset : float
        Position of the first thick slice, mm from the edge of the first thin one.

    Returns
    -------
    torch.Tensor, shape (slices, size), float32
        Weights; rows sum to 1.
    """
    count = int(np.floor((size - offset) / thickness))
    start = offset + thickness * np.arange(count)[:, None]
    thin = np.arange(size)[None, :]
    overlap = np.clip(np.minimum(start + thickness, thin + 1) - np.maximum(start, thin), 0, None)
    return tensor((overlap / overlap.sum(1, keepdims=True)).astype(np.float32))


def interpolation_matrix(size: int, thickness: float, offset: float, count: int) -> torch.Tensor:
    """Compute the matrix that interpolates thick slices linearly to 1 mm, with constant ends.

    Parameters
    ----------
    size : int
        Number of 1 mm slices.
    thickness, offset : float
        As for :func:`slice_matrix`, mm.
    count : int
        Number of thick slices.

    Returns
    -------
    torch.Tensor, shape (size, count), float32
        Weights; rows sum to 1.
    """
    position = (np.arange(size) + 0.5 - offset) / thickness - 0.5
    position = np.clip(position, 0, count - 1)
    weights = np.clip(1 - np.abs(position[:, None] - np.arange(count)[None, :]), 0, None)
    return tensor((weights / weights.sum(1, keepdims=True)).astype(np.float32))


def bias_field(rng: np.random.Generator, strength: float, shape: tuple[int, int, int]) -> torch.Tensor:
    """Draw a smooth multiplicative field; `strength` is the standard deviation of its logarithm."""
    return torch.exp(strength * random_field(rng, 80.0, shape)[0])


def add_rician_noise(image: torch.Tensor, sigma: float, rng: np.random.Generator) -> torch.Tensor:
    """Return the magnitude of the image plus complex Gaussian noise of standard deviation `sigma`."""
    real, imaginary = (tensor(rng.standard_normal(tuple(image.shape), dtype=np.float32)) for _ in range(2))
    return torch.hypot(image + sigma * real, sigma * imaginary)


def simulate_preprocessed_scan(
    image: torch.Tensor, settings: ScanSettings, brain: torch.Tensor, rng: np.random.Generator
) -> torch.Tensor:
    """Simulate a preprocessed scan: on the box, with a weak residual bias field, resampled once.

    Parameters
    ----------
    image : torch.Tensor, shape (X, Y, Z)
        Noise-free signal.
    settings : ScanSettings
        Acquisition settings.
    brain : torch.Tensor of bool, shape (X, Y, Z)
        Brain mask.
    rng : numpy.random.Generator
        Source of all random numbers.

    Returns
    -------
    torch.Tensor, shape (X, Y, Z)
        Scan that is neither scaled nor masked.
    """
    top = float(torch.quantile(image[brain][::17], 0.995))
    image = (image / top).clamp_min(0) ** settings.gamma
    image = smooth(image, (settings.blur, settings.blur, settings.blur if settings.thickness == 1 else 0.0))
    image = image * bias_field(rng, settings.bias * 0.25, BOX_SHAPE)
    depth = BOX_SHAPE[2]
    if settings.thickness > 1:
        offset = float(rng.uniform(0, settings.thickness))
        thick = slice_matrix(depth, settings.thickness, offset)
        noisy = add_rician_noise(apply_axis(image, thick, 2), settings.noise, rng)
        noisy = smooth(noisy, (0.4, 0.4, 0.0))
        return apply_axis(noisy, interpolation_matrix(depth, settings.thickness, offset, len(thick)), 2)
    # The resampling of the preprocessing smooths the noise slightly.
    return smooth(add_rician_noise(image, settings.noise, rng), float(rng.uniform(0.25, 0.45)))


def grey_closing(tissue: torch.Tensor, reach: int) -> torch.Tensor:
    """Fill sulci and fissures by a grey closing with a cube.

    Parameters
    ----------
    tissue : torch.Tensor, shape (X, Y, Z)
        Fraction of tissue per voxel.
    reach : int
        Half the edge of the cube, voxels: gaps of up to about twice this width are filled.

    Returns
    -------
    torch.Tensor, shape (X, Y, Z)
        Closed map.
    """
    return -_dilated(-_dilated(tissue, reach), reach)


def _dilated(volume: torch.Tensor, reach: int) -> torch.Tensor:
    """Compute the maximum in a cube around each voxel, along one axis after the other."""
    for axis in range(3):
        size, padding = [1, 1, 1], [0, 0, 0]
        size[axis], padding[axis] = 2 * reach + 1, reach
        volume = F.max_pool3d(volume[None, None], size, stride=1, padding=padding)[0, 0]
    return volume


def draw_brain_mask(
    fractions: torch.Tensor, rng: np.random.Generator
) -> tuple[torch.Tensor, dict[str, float]]:
    """Draw a brain mask around the tissue.

    The smoothed tissue map is thresholded at a level that differs between scans (a low one includes a rim of
    fluid) and slightly between positions.

    Parameters
    ----------
    fractions : torch.Tensor, shape (len(CLASSES), X, Y, Z)
        Tissue maps.
    rng : numpy.random.Generator
        Source of all random numbers.

    Returns
    -------
    mask : torch.Tensor of bool, shape (X, Y, Z)
        Mask with one component, without holes in any slice.
    drawn : dict
        Drawn level, smoothing (mm) and closing (mm).
    """
    tissue = fractions.sum(0) - fractions[CLASSES.index("csf")]
    width = float(rng.uniform(1.5, 3.0))
    # A quarter of the masks include a rim of fluid, as masks of some brain-extraction tools do.
    level = float(rng.uniform(0.20, 0.35) if rng.uniform() < 0.25 else rng.uniform(0.38, 0.55))
    reach = int(rng.integers(3, 8))
    tissue = grey_closing(tissue, reach)
    cut = level + 0.05 * random_field(rng, 20.0)[0]
    mask = (smooth(tissue, width) > cut).cpu().numpy()
    labels, _ = ndimage.label(mask)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    mask = labels == sizes.argmax()
    # Slice by slice, to fill channels of fluid that are open to the outside as well.
    for axis in range(3):
        for plane in np.moveaxis(mask, axis, 0):
            plane[...] = ndimage.binary_fill_holes(plane)
    return tensor(mask), {"rim_level": level, "rim_smoothness_mm": width, "closing_mm": reach}
