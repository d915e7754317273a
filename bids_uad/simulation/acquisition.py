"""The scanner: contrast, resolution, slice thickness, bias field, noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch.nn import functional as F

from bids_uad.simulation.anatomy import CLASSES
from bids_uad.simulation.contrast import class_means
from bids_uad.simulation.spatial import (
    BOX_SHAPE,
    apply_axis,
    random_field,
    smooth,
    tensor,
)


@dataclass(frozen=True)
class Scanner:
    """A scanner of the synthetic world; what differs from scan to scan is drawn around it.

    Attributes
    ----------
    name, manufacturer : str
    field_strength : float
        Tesla.
    style : {"gradient_echo", "spin_echo", "random"}
        Contrast, see `contrast.class_means`.
    noise, blur, bias : float
        Typical noise (relative to the brightest tissue), in-plane blur (mm), bias field strength.
    thick : float
        Probability of a scan with thick axial slices.
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


SPIN_ECHO_SHARE = 0.12


def draw_scanner(number: int, randomised: bool, rng: np.random.Generator) -> Scanner:
    """Draw a scanner.

    Parameters
    ----------
    number : int
        Names it.
    randomised : bool
        Contrasts of no scanner on earth instead of realistic ones.
    rng : numpy.random.Generator

    Returns
    -------
    Scanner
    """
    field_strength = float(rng.choice([1.5, 3.0]))
    spin_echo = rng.uniform() < SPIN_ECHO_SHARE
    style = "random" if randomised else "spin_echo" if spin_echo else "gradient_echo"
    return Scanner(
        name=f"scanner{number + 1:02d}",
        manufacturer=str(rng.choice(["GE", "Philips", "Siemens"])),
        field_strength=field_strength,
        style=style,
        # Twice the field, nearly half the noise, and a stronger bias field.
        noise=float(0.014 * (1.5 / field_strength) ** 0.7 * rng.lognormal(0.0, 0.3)),
        blur=float(rng.uniform(0.15, 0.45)),
        bias=float(0.12 * (field_strength / 1.5) ** 0.5 * rng.lognormal(0.0, 0.3)),
        thick=0.75 if spin_echo else float(rng.choice([0.02, 0.1, 0.3])),
        means={modality: class_means(modality, style, rng) for modality in ("T1w", "T2w")},
    )


@dataclass(frozen=True)
class Protocol:
    """What one scan was taken with.

    Attributes
    ----------
    noise : float
        Standard deviation in each channel, relative to the 99.5th percentile of the signal.
    blur : float
        Standard deviation of the in-plane point spread, mm.
    thickness : float
        Of the axial slices, mm; 1 means an isotropic scan.
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


def draw_scan_settings(scanner: Scanner, modality: str, rng: np.random.Generator) -> Protocol:
    """Draw the settings of one scan.

    Parameters
    ----------
    scanner : Scanner
    modality : {"T1w", "T2w"}
        T2w scans are thick more often.
    rng : numpy.random.Generator

    Returns
    -------
    Protocol
    """
    thick = rng.uniform() < min(scanner.thick + (0.25 if modality == "T2w" else 0.0), 0.9)
    return Protocol(
        noise=float(scanner.noise * rng.lognormal(0.0, 0.3)),
        blur=float(scanner.blur * rng.uniform(0.7, 1.5)),
        thickness=float(np.round(rng.uniform(2.0, 5.5), 1)) if thick else 1.0,
        bias=float(scanner.bias * rng.uniform(0.5, 1.5)),
        gamma=float(rng.uniform(0.92, 1.10)),
    )


def slice_matrix(size: int, thickness: float, offset: float) -> torch.Tensor:
    """Thick slices out of 1 mm slices: each row averages `thickness` mm.

    Parameters
    ----------
    size : int
        Number of 1 mm slices.
    thickness : float
        mm, at least 1; slices have no gap.
    offset : float
        Where the first thick slice starts, mm from the edge of the first thin one.

    Returns
    -------
    torch.Tensor, shape (slices, size), float32
        Rows sum to 1.
    """
    count = int(np.floor((size - offset) / thickness))
    start = offset + thickness * np.arange(count)[:, None]
    thin = np.arange(size)[None, :]
    overlap = np.clip(np.minimum(start + thickness, thin + 1) - np.maximum(start, thin), 0, None)
    return tensor((overlap / overlap.sum(1, keepdims=True)).astype(np.float32))


def interpolation_matrix(size: int, thickness: float, offset: float, count: int) -> torch.Tensor:
    """Linear interpolation of thick slices back to 1 mm; ends are held constant.

    Returns
    -------
    torch.Tensor, shape (size, count), float32
    """
    position = (np.arange(size) + 0.5 - offset) / thickness - 0.5
    position = np.clip(position, 0, count - 1)
    weights = np.clip(1 - np.abs(position[:, None] - np.arange(count)[None, :]), 0, None)
    return tensor((weights / weights.sum(1, keepdims=True)).astype(np.float32))


def bias_field(rng: np.random.Generator, strength: float, shape: tuple[int, int, int]) -> torch.Tensor:
    """Smooth multiplicative field; `strength` is the standard deviation of its logarithm."""
    return torch.exp(strength * random_field(rng, 80.0, shape)[0])


def add_rician_noise(image: torch.Tensor, sigma: float, rng: np.random.Generator) -> torch.Tensor:
    """Magnitude of the image plus complex Gaussian noise of standard deviation `sigma`."""
    real, imaginary = (tensor(rng.standard_normal(tuple(image.shape), dtype=np.float32)) for _ in range(2))
    return torch.hypot(image + sigma * real, sigma * imaginary)


def scan_on_grid(
    image: torch.Tensor, protocol: Protocol, brain: torch.Tensor, rng: np.random.Generator
) -> torch.Tensor:
    """Acquire a scan as it looks after preprocessing: on the box, bias nearly gone, resampled once.

    Parameters
    ----------
    image : torch.Tensor, shape (X, Y, Z)
        Noise-free signal.
    protocol : Protocol
    brain : torch.Tensor of bool, shape (X, Y, Z)
    rng : numpy.random.Generator

    Returns
    -------
    torch.Tensor, shape (X, Y, Z)
        Not yet scaled or masked.
    """
    top = float(torch.quantile(image[brain][::17], 0.995))
    image = (image / top).clamp_min(0) ** protocol.gamma
    image = smooth(image, (protocol.blur, protocol.blur, protocol.blur if protocol.thickness == 1 else 0.0))
    image = image * bias_field(rng, protocol.bias * 0.25, BOX_SHAPE)
    depth = BOX_SHAPE[2]
    if protocol.thickness > 1:
        offset = float(rng.uniform(0, protocol.thickness))
        thick = slice_matrix(depth, protocol.thickness, offset)
        noisy = add_rician_noise(apply_axis(image, thick, 2), protocol.noise, rng)
        noisy = smooth(noisy, (0.4, 0.4, 0.0))
        return apply_axis(noisy, interpolation_matrix(depth, protocol.thickness, offset, len(thick)), 2)
    # The one resampling of the preprocessing smooths the noise a little.
    return smooth(add_rician_noise(image, protocol.noise, rng), float(rng.uniform(0.25, 0.45)))


def closed(tissue: torch.Tensor, reach: int) -> torch.Tensor:
    """Fill sulci and fissures up to about twice `reach` mm wide: grey closing by a cube.

    Parameters
    ----------
    tissue : torch.Tensor, shape (X, Y, Z)
    reach : int
        Half the cube's edge, voxels.
    """
    return -_dilated(-_dilated(tissue, reach), reach)


def _dilated(volume: torch.Tensor, reach: int) -> torch.Tensor:
    """Largest value in a cube about each voxel, one axis after the other."""
    for axis in range(3):
        size, padding = [1, 1, 1], [0, 0, 0]
        size[axis], padding[axis] = 2 * reach + 1, reach
        volume = F.max_pool3d(volume[None, None], size, stride=1, padding=padding)[0, 0]
    return volume


def brain_mask(fractions: torch.Tensor, rng: np.random.Generator) -> tuple[torch.Tensor, dict[str, float]]:
    """Draw a brain mask around the tissue.

    The smoothed tissue map is cut at a level that differs between scans (a low one keeps a rim of fluid)
    and, a little, between places.

    Parameters
    ----------
    fractions : torch.Tensor, shape (len(CLASSES), X, Y, Z)
    rng : numpy.random.Generator

    Returns
    -------
    mask : torch.Tensor of bool, shape (X, Y, Z)
        One component, without holes in any slice.
    drawn : dict
        The level, the smoothness and the closing that were used.
    """
    tissue = fractions.sum(0) - fractions[CLASSES.index("csf")]
    width = float(rng.uniform(1.5, 3.0))
    # Most strippers are tight; one scan in four keeps a rim of fluid.
    level = float(rng.uniform(0.20, 0.35) if rng.uniform() < 0.25 else rng.uniform(0.38, 0.55))
    reach = int(rng.integers(3, 8))
    tissue = closed(tissue, reach)
    cut = level + 0.05 * random_field(rng, 20.0)[0]
    mask = (smooth(tissue, width) > cut).cpu().numpy()
    labels, _ = ndimage.label(mask)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    mask = labels == sizes.argmax()
    # Slice by slice, so that channels of fluid that open to the outside are filled too.
    for axis in range(3):
        for plane in np.moveaxis(mask, axis, 0):
            plane[...] = ndimage.binary_fill_holes(plane)
    return tensor(mask), {"rim_level": level, "rim_smoothness_mm": width, "closing_mm": reach}
