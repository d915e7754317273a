"""Simulated raw scans: random head position, native grid, arbitrary units."""

from __future__ import annotations

from dataclasses import dataclass

import nibabel as nib
import numpy as np
import torch

from bids_uad.images import make_image
from bids_uad.simulation.acquisition import (
    ScanSettings,
    add_rician_noise,
    bias_field,
    slice_matrix,
)
from bids_uad.simulation.anatomy import rotation
from bids_uad.simulation.spatial import (
    BOX_AFFINE,
    apply_axis,
    sample,
    smooth,
    tensor,
)
from bids_uad.simulation.subject import TISSUE_LABELS, Anatomy

NATIVE_SHAPE = (192, 224, 192)
HEAD_CENTRE = np.array([-119.0, 107.0, 77.0])


@dataclass(frozen=True)
class NativeScan:
    """Raw scan with its true masks.

    Attributes
    ----------
    image : nibabel.Nifti1Image
        int16, RAS+, 1 mm in plane.
    lesion : nibabel.Nifti1Image or None
        Lesion mask, uint8, on the same grid.
    tissue : nibabel.Nifti1Image or None
        Labels of `subject.TISSUES`, uint8, on the same grid; 0 outside the brain.
    drawn : dict
        Drawn head position and intensity scale.
    """

    image: nib.Nifti1Image
    lesion: nib.Nifti1Image | None
    tissue: nib.Nifti1Image | None
    drawn: dict


def _rigid(angles: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Compute a rigid transform, shape (4, 4), from angles (degrees) and a shift (mm)."""
    turn = rotation(tensor(np.deg2rad(angles))).cpu().numpy()
    return nib.affines.from_matvec(turn, shift)


def simulate_native_scan(
    image: torch.Tensor,
    settings: ScanSettings,
    anatomy: Anatomy,
    pose: np.random.Generator,
    rng: np.random.Generator,
    *,
    truth: bool,
) -> NativeScan:
    """Simulate a raw scan on its own grid.

    Parameters
    ----------
    image : torch.Tensor, shape (X, Y, Z)
        Noise-free signal on the box.
    settings : ScanSettings
        Acquisition settings.
    anatomy : Anatomy
        Brain mask, tissue maps and lesion on the box.
    pose : numpy.random.Generator
        Source of the head position, which all scans of a session share.
    rng : numpy.random.Generator
        Source of the random numbers of this scan: motion, bias field, noise, intensity scale.
    truth : bool
        Whether to resample lesion and tissue labels to the grid of the scan.

    Returns
    -------
    NativeScan
        Skull-stripped scan.
    """
    session = _rigid(pose.normal(0.0, 4.0, 3), pose.normal(0.0, 4.0, 3))
    motion = _rigid(rng.normal(0.0, 0.7, 3), rng.normal(0.0, 1.0, 3))
    affine = nib.affines.from_matvec(np.eye(3), -(np.array(NATIVE_SHAPE) - 1) / 2)
    to_sri24 = nib.affines.from_matvec(np.eye(3), HEAD_CENTRE) @ session @ motion

    index = np.stack(np.meshgrid(*[np.arange(n) for n in NATIVE_SHAPE], indexing="ij"), -1).astype(np.float32)
    matrix = tensor(to_sri24 @ affine).float()
    points = tensor(index) @ matrix[:3, :3].T + matrix[:3, 3]
    top = float(torch.quantile(image[anatomy.brain][::17], 0.995))
    volumes = [(image / top).clamp_min(0) ** settings.gamma, anatomy.brain.float()]
    if truth:
        labels = anatomy.tissue_labels()
        volumes += [(labels == tissue).float() for tissue in TISSUE_LABELS]
    if truth and anatomy.lesion is not None:
        volumes.append(anatomy.lesion.fraction)
    moved = sample(torch.stack(volumes), BOX_AFFINE, points)
    blur = settings.blur if settings.thickness == 1 else 0.0
    moved[0] = smooth(moved[0], (settings.blur, settings.blur, blur))
    moved[0] *= bias_field(rng, settings.bias, NATIVE_SHAPE)
    if settings.thickness > 1:
        thick = slice_matrix(NATIVE_SHAPE[2], settings.thickness, 0.0)
        moved = apply_axis(moved, thick, 3)
        affine = affine @ nib.affines.from_matvec(
            np.diag([1, 1, settings.thickness]), [0, 0, (settings.thickness - 1) / 2]
        )
    brain = moved[1] > 0.5
    units = float(rng.uniform(500.0, 3000.0))
    scan = (add_rician_noise(moved[0], settings.noise, rng) * brain * units).round().clamp(0, 32767)
    result = make_image(scan.to(torch.int16).cpu().numpy(), affine, np.int16)
    lesion = tissue = None
    if truth:
        fractions = moved[2 : 2 + len(TISSUE_LABELS)]
        largest = fractions.argmax(0) + TISSUE_LABELS[0]
        tissue = make_image((largest * brain).cpu().numpy(), affine, np.uint8)
    if truth and anatomy.lesion is not None:
        lesion = make_image(((moved[-1] > 0.5) & brain).cpu().numpy(), affine, np.uint8)
    return NativeScan(result, lesion, tissue, {"units": units, "native_to_sri24": to_sri24.tolist()})
